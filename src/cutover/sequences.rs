//! Sequences do not travel in the stream: they are read on the source once writes have stopped, and set on the target.

use crate::error::{Class, Doing, Error, Result};
use crate::postgres::catalog::{self, Sequence};
use crate::postgres::{Server, quote_literal};

/// Carries every sequence over; returns how many. Sequences that only the source has are an error if `all` of them
/// should be there, and left out otherwise.
pub(super) async fn carry(source: &Server, target: &Server, all: bool) -> Result<usize> {
    let (from, to) = tokio::try_join!(source.connect("sequences"), target.connect("sequences"))?;
    let (wanted, present) = tokio::try_join!(catalog::sequences(&*from), catalog::sequences(&*to))?;
    let present: std::collections::HashSet<_> = present.into_iter().map(|sequence| sequence.name).collect();
    let (known, unknown): (Vec<Sequence>, Vec<Sequence>) =
        wanted.into_iter().partition(|sequence| present.contains(&sequence.name));
    if all && let Some(missing) = unknown.first() {
        return Err(Error::new(
            Class::No,
            "sequence_missing",
            format!("the target has no sequence {} ({} are missing)", missing.name.plain(), unknown.len()),
        )
        .hint("create it on the target as it is on the source"));
    }
    for chunk in known.chunks(500) {
        let values = chunk
            .iter()
            .map(|sequence| {
                format!(
                    "SELECT pg_catalog.setval({}::pg_catalog.regclass, {}, {})",
                    quote_literal(&sequence.name.to_string()),
                    sequence.last_value,
                    sequence.is_called
                )
            })
            .collect::<Vec<_>>()
            .join(" UNION ALL ");
        to.batch_execute(&values).await.doing(|| "setting the sequences on the target")?;
    }
    Ok(known.len())
}
