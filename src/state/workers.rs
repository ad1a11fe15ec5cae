//! Progress of the workers beside the first, of `follow.workers`: what each of them committed of a batch that the move's own progress
//! does not hold yet.

use std::collections::BTreeSet;

use super::{Store, json, lsn};
use crate::error::{Doing, Error, Result};
use crate::postgres::{Lsn, QualifiedName};

/// The shares of one batch that are on the target though the batch as a whole is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkersAhead {
    /// The end of the batch.
    pub until: Lsn,
    /// Among how many workers it was divided.
    pub workers: u16,
    /// The tables that were split by key.
    pub split: BTreeSet<QualifiedName>,
    /// The workers whose shares are there.
    pub done: BTreeSet<u16>,
}

/// The tables that were split, as the state holds them: an array of pairs.
#[must_use]
pub fn split_json(split: &BTreeSet<QualifiedName>) -> String {
    serde_json::Value::from_iter(split.iter().map(|name| vec![name.schema.clone(), name.name.clone()])).to_string()
}

impl Store {
    /// The workers that are ahead of progress, if any are. They all stopped in the same batch: the next one is begun only after
    /// the first worker, which commits last, has committed the one before; and a crash of the target takes commits back in their reverse order.
    ///
    /// # Errors
    /// Class bug: the rows say otherwise. The connection's.
    pub async fn workers_ahead(&self) -> Result<Option<WorkersAhead>> {
        let session = self.session().await?;
        let client = session.get()?;
        let rows = client
            .query(
                "SELECT w.worker, w.workers, w.lsn::text, w.split::text
                 FROM pgtandem.worker_progress w JOIN pgtandem.progress p USING (move)
                 WHERE w.move = $1 AND w.lsn > p.lsn
                 ORDER BY w.worker",
                &[&self.name.as_str()],
            )
            .await
            .doing(|| "reading the progress of workers")?;
        let mut ahead: Option<WorkersAhead> = None;
        for row in rows {
            let number = |at: usize| -> Result<u16> {
                u16::try_from(row.try_get::<_, i32>(at)?)
                    .map_err(|_| Error::bug("the state holds no number of a worker"))
            };
            let pairs = json(&row.try_get::<_, String>(3)?)?;
            let found = WorkersAhead {
                until: lsn(row.try_get(2)?)?.unwrap_or_default(),
                workers: number(1)?,
                split: split_of(&pairs)?,
                done: BTreeSet::from([number(0)?]),
            };
            match &mut ahead {
                None => ahead = Some(found),
                Some(ahead)
                    if (ahead.until, ahead.workers, &ahead.split) == (found.until, found.workers, &found.split) =>
                {
                    ahead.done.extend(found.done);
                }
                Some(_) => return Err(Error::bug("workers are ahead of progress in more than one batch")),
            }
        }
        Ok(ahead)
    }
}

fn split_of(pairs: &serde_json::Value) -> Result<BTreeSet<QualifiedName>> {
    let name = |pair: &serde_json::Value| {
        let part = |at: usize| pair.get(at).and_then(serde_json::Value::as_str);
        Some(QualifiedName::new(part(0)?, part(1)?))
    };
    pairs
        .as_array()
        .and_then(|pairs| pairs.iter().map(name).collect())
        .ok_or_else(|| Error::bug("the state holds no list of tables for a worker"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_tables_survive() {
        let split = BTreeSet::from([QualifiedName::new("a\"b", "c.d"), QualifiedName::new("public", "t")]);
        assert_eq!(split_of(&json(&split_json(&split)).unwrap()).unwrap(), split);
        assert!(split_of(&json("[[1]]").unwrap()).is_err());
    }
}
