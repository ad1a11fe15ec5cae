//! Rows that are in no stream: those of unlogged tables, and what updates and deletes did to tables without a replica
//! identity under `follow.without_identity = "copy"`.
//!
//! Both sides sum up the table in [`buckets`](super::buckets), at the same time; of the buckets that differ, the target's
//! rows go and the source's come, in one target transaction. The source is read under one snapshot, so what the target
//! then holds is exactly what that snapshot shows: a row cannot collide by a unique key with one in a bucket that was left
//! alone. That makes a pass right whenever nobody else writes to the table of the target.
//!
//! # Why tables that the stream writes to are only compared before the fence
//!
//! An inserted row may be in the snapshot that a pass reads, and in the stream behind it. Carried by the pass and applied
//! later, it would be there twice, and no key would tell. Behind the fence, after the drain, nothing of such a table is on its
//! way: the target holds every insert, and the pass is exact. Should the cutover be given up after it, what the source
//! inserts next has a later position in the stream, so it is applied on top, once.

use super::buckets::{Buckets, differing, sums};
use super::{Carried, Context, Exactly};
use crate::copy::pump::{self, Form, Pass};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::catalog::Table;
use crate::postgres::wire::{Mode, Wire};
use crate::state::only_the_leader;

/// A table of which rows are left over.
#[derive(Clone, Debug)]
pub(super) struct Leftover {
    /// As the source has it.
    pub(super) table: Table,
    /// Whether the stream writes to it as well.
    pub(super) followed: bool,
}

/// A connection to each side.
pub(super) struct Pair {
    source: Wire,
    target: Wire,
}

impl Pair {
    pub(super) async fn connect(context: &Context<'_>) -> Result<Self> {
        let connect = |server| Wire::connect(server, "carry", Mode::Sql, &[]);
        let (mut source, mut target) = tokio::try_join!(connect(context.source), connect(context.target))?;
        for side in [&mut source, &mut target] {
            match side.query(super::NOTICE_OUR_END).await {
                Ok(_) => {}
                // Not every operating system can tell.
                Err(error) if error.sqlstate().is_some() => {
                    tracing::debug!(%error, "the server would not notice our end");
                }
                Err(error) => return Err(error),
            }
        }
        // Foreign keys of the target must not look at rows that come one table after the other. A role that may not say so
        // has none there before the release.
        match target.query("SET session_replication_role = replica").await {
            Ok(_) => {}
            Err(error) if error.sqlstate().is_some() => tracing::debug!(%error, "triggers cannot be switched off"),
            Err(error) => return Err(error),
        }
        Ok(Self { source, target })
    }

    /// Brings the table of the target to what the source shows now.
    pub(super) async fn carry(&mut self, context: &Context<'_>, left: &Leftover, exactly: Exactly) -> Result<Carried> {
        let name = &left.table.name;
        self.pass(context, left, exactly, true).await.doing(|| format!("carrying the rows of {}", name.plain()))
    }

    /// How much [`Pair::carry`] would carry, as far as a look at both sides beside the stream can tell.
    pub(super) async fn compare(
        &mut self,
        context: &Context<'_>,
        left: &Leftover,
        exactly: Exactly,
    ) -> Result<Carried> {
        let name = &left.table.name;
        self.pass(context, left, exactly, false).await.doing(|| format!("comparing the rows of {}", name.plain()))
    }

    async fn pass(
        &mut self,
        context: &Context<'_>,
        left: &Leftover,
        exactly: Exactly,
        repair: bool,
    ) -> Result<Carried> {
        let buckets = Buckets::of(&left.table);
        let limits = exactly.limits();
        let begun = (format!("{limits}; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"), format!("{limits}; BEGIN"));
        tokio::try_join!(self.source.query(&begun.0), self.target.query(&begun.1))?;
        let all = buckets.sums(None);
        let (ours, theirs) =
            tokio::try_join!(async { self.source.query(&all).await.doing(|| "on the source") }, async {
                self.target.query(&all).await.doing(|| "on the target")
            })?;
        let (ours, theirs) = (sums(ours)?, sums(theirs)?);
        let differ = differing(&ours, &theirs);
        let mut carried = Carried::default();
        if !differ.is_empty() {
            let rows_of = |sums: &super::buckets::Sums| differ.iter().filter_map(|b| Some(sums.get(b)?.0)).sum::<u64>();
            carried = Carried { tables: 1, rows: rows_of(&ours), gone: rows_of(&theirs), ..Carried::default() };
            if repair {
                // Where nothing agrees, nothing has to be looked for.
                let whole = !ours.keys().chain(theirs.keys()).any(|bucket| differ.binary_search(bucket).is_err());
                let which = (!whole).then_some(differ.as_slice());
                carried.bytes = self.replace(&buckets, which).await?;
                let proof = sums(self.target.query(&buckets.sums(which)).await?)?;
                let expected = ours.into_iter().filter(|(bucket, _)| differ.binary_search(bucket).is_ok()).collect();
                if !differing(&expected, &proof).is_empty() {
                    return Err(still_differs(left));
                }
            }
        }
        if repair {
            let guard = context.guard();
            self.target.query(&format!("{guard}; COMMIT")).await.map_err(only_the_leader)?;
        } else {
            self.target.query("ROLLBACK").await?;
        }
        self.source.query("COMMIT").await?;
        Ok(carried)
    }

    /// The bytes that travelled.
    async fn replace(&mut self, buckets: &Buckets, which: Option<&[u32]>) -> Result<u64> {
        self.target.query(&buckets.delete(which)).await.doing(|| "on the target")?;
        let pass = Pass { doing: String::new(), read: buckets.read(which), write: buckets.write(), form: Form::Text };
        let moved = pump::forward(&mut self.source, &mut self.target, &[pass], "", &mut ()).await?;
        Ok(moved.iter().map(|moved| moved.bytes).sum())
    }
}

fn still_differs(left: &Leftover) -> Error {
    let message = format!(
        "table {} holds something else on the target after its rows were brought there",
        left.table.name.plain()
    );
    Error::new(Class::No, "leftover_differs", message).hint(format!(
        "the target prints or computes a value differently, or someone writes to its table: exclude {} or find out why",
        left.table.name.plain()
    ))
}
