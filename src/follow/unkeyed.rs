//! The watch over tables without a replica identity.
//!
//! Their inserts and truncates are carried, their updates and deletes are not: the stream has nothing that would tell
//! which row was meant. Publishing them anyway would make the source refuse the application's own statements.
//!
//! Two looks tell whether there was one. The source's counters are the early warning: [`Watch::check`] makes a blocker
//! of a counter that rose. They may rise late, by many seconds, and they rise for what was rolled back, so they decide
//! nothing: a table whose counter rose is compared, and where both sides agree the warning is taken back. The proof is
//! [`differing`], which compares the tables behind the fence of a cutover. Nothing here ends a move.

use std::collections::{BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use crate::error::{Class, Doing, Error, Result};
use crate::postgres::catalog::{self, ReplicaIdentity, Table};
use crate::postgres::{QualifiedName, Server, Session};
use crate::state::Store;
use crate::telemetry::Blocker;
use crate::verify::{Comparison, Depth};

/// How many tables are compared at a time.
const WORKERS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(3);

/// So many tables are named.
const NAMED: usize = 10;

/// A table that was found to differ is read again after this, or after ten times as long as reading it took.
const COMPARE_AGAIN: Duration = Duration::from_secs(10);

/// Updates and deletes so far. `$1` schemas, `$2` names.
const COUNTS: &str = r"
    SELECT s.schemaname::text, s.relname::text, s.n_tup_upd + s.n_tup_del
    FROM pg_catalog.pg_stat_user_tables s
    JOIN unnest($1::text[], $2::text[]) t (schema_name, table_name)
         ON t.schema_name = s.schemaname AND t.table_name = s.relname";

/// Writes down where the counters stand, for the tables that are not copied yet, and watches those no longer that have an
/// identity by now. To be called before each cut, once the publications fit.
///
/// A table that is not copied yet is copied under a cut that comes after this: what was changed before is in the copy, and what is
/// changed afterwards is in the stream. A death in between leaves it to be copied, under a later cut.
///
/// # Errors
/// The connections'.
pub async fn remember(source: &Server, store: &Store, tables: &[Table]) -> Result<()> {
    let unkeyed: Vec<&QualifiedName> =
        tables.iter().filter(|table| table.identity == ReplicaIdentity::Nothing).map(|table| &table.name).collect();
    let watched = store.unkeyed().await?;
    let identified: Vec<QualifiedName> = tables
        .iter()
        .filter(|table| table.identity != ReplicaIdentity::Nothing)
        .filter(|table| watched.iter().any(|(name, _)| *name == table.name))
        .map(|table| table.name.clone())
        .collect();
    store.forget_unkeyed(&identified).await?;
    if unkeyed.is_empty() {
        return Ok(());
    }
    let session = source.connect("watch").await?;
    let counts = counts(&session, &unkeyed).await?;
    store.remember_unkeyed(&counts).await
}

/// Those tables without a replica identity of which the target holds something else than the source. Both sides must
/// stand still at the same point.
///
/// # Errors
/// The connections', or no privilege.
pub async fn differing(source: &Server, target: &Server, store: &Store) -> Result<Vec<QualifiedName>> {
    let known: BTreeSet<QualifiedName> = store.unkeyed().await?.into_iter().map(|(name, _)| name).collect();
    let moved: BTreeSet<QualifiedName> = store.tables().await?.into_iter().map(|table| table.name).collect();
    // Also one that has an identity by now: what changed before then was not carried.
    let unkeyed = |table: &Table| {
        moved.contains(&table.name) && (table.identity == ReplicaIdentity::Nothing || known.contains(&table.name))
    };
    compare(source, target, unkeyed).await
}

/// As [`differing`], with an error for whoever waits for the proof.
///
/// # Errors
/// Class no: some differ. Those of [`differing`].
pub async fn prove(source: &Server, target: &Server, store: &Store) -> Result<()> {
    match blocker(&differing(source, target, store).await?) {
        None => Ok(()),
        Some(blocker) => Err(Error::new(Class::No, "unkeyed_changed", blocker.message).hint(blocker.hint)),
    }
}

async fn compare(source: &Server, target: &Server, which: impl Fn(&Table) -> bool) -> Result<Vec<QualifiedName>> {
    let session = source.connect("verify").await?;
    let tables: Vec<(QualifiedName, Vec<String>)> = catalog::tables(&*session)
        .await?
        .into_iter()
        .filter(which)
        .map(|table| (table.name, table.columns.into_iter().map(|column| column.name).collect()))
        .collect();
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    let different = Comparison::prepare(source, target, tables, Depth::Full, WORKERS).await?.run().await?;
    Ok(different.into_iter().map(|difference| difference.table).collect())
}

/// What a counter says. Pure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counter {
    Still,
    /// It was reset by hand or by a crash of the source, and counts from nothing.
    Restarted,
    Rose,
}

fn judge(before: i64, now: i64) -> Counter {
    match now.cmp(&before) {
        std::cmp::Ordering::Equal => Counter::Still,
        std::cmp::Ordering::Less => Counter::Restarted,
        std::cmp::Ordering::Greater => Counter::Rose,
    }
}

/// The early warning. Keeps in mind what was compared already.
#[derive(Debug, Default)]
pub struct Watch {
    /// When a table that was found to differ may be read again.
    again: HashMap<QualifiedName, Instant>,
}

impl Watch {
    /// A blocker for each table that was updated or deleted from, as far as the source has counted it and both sides do
    /// differ. While changes flow, rows on their way make them differ too; the blocker then goes with a later look.
    ///
    /// # Errors
    /// The connections'.
    pub async fn check(&mut self, source: &Server, target: &Server, store: &Store) -> Result<Vec<Blocker>> {
        let mut risen = Vec::new();
        for (table, now) in risen_counters(source, store).await? {
            let wait = self.again.get(&table).is_some_and(|when| Instant::now() < *when);
            if !wait && self.agrees(source, target, &table).await? {
                // The count was read before the comparison: what was counted since raises it above this again.
                store.reset_unkeyed(&table, now).await?;
                self.again.remove(&table);
                tracing::info!("table {} is the same on both sides after all", table.plain());
                continue;
            }
            risen.push(table);
        }
        Ok(blocker(&risen).into_iter().collect())
    }

    async fn agrees(&mut self, source: &Server, target: &Server, table: &QualifiedName) -> Result<bool> {
        let began = Instant::now();
        let differs = !compare(source, target, |found| found.name == *table).await?.is_empty();
        let wait = COMPARE_AGAIN.max(began.elapsed() * 10);
        self.again.insert(table.clone(), Instant::now() + wait);
        Ok(!differs)
    }
}

/// The counters that stand above what was written down, with where they stand.
async fn risen_counters(source: &Server, store: &Store) -> Result<Vec<(QualifiedName, i64)>> {
    let known = store.unkeyed().await?;
    if known.is_empty() {
        return Ok(Vec::new());
    }
    let session = source.connect("watch").await?;
    let names: Vec<&QualifiedName> = known.iter().map(|(name, _)| name).collect();
    let now: HashMap<QualifiedName, i64> = counts(&session, &names).await?.into_iter().collect();
    let mut risen = Vec::new();
    for (table, before) in known {
        let Some(&now) = now.get(&table) else { continue };
        let mut before = before;
        if judge(before, now) == Counter::Restarted {
            tracing::warn!("the source's counters of table {} were reset; they count from nothing", table.plain());
            store.reset_unkeyed(&table, 0).await?;
            before = 0;
        }
        if judge(before, now) == Counter::Rose {
            risen.push((table, now));
        }
    }
    Ok(risen)
}

fn blocker(tables: &[QualifiedName]) -> Option<Blocker> {
    if tables.is_empty() {
        return None;
    }
    let names = tables.iter().take(NAMED).map(QualifiedName::plain).collect::<Vec<_>>().join(", ");
    let alter: Vec<String> =
        tables.iter().take(3).map(|t| format!("`ALTER TABLE {t} REPLICA IDENTITY FULL`")).collect();
    Some(Blocker {
        code: "unkeyed_changed",
        message: format!(
            "{} tables without a replica identity were updated or deleted from since the copy, and are not the same on \
             both sides: {names}",
            tables.len()
        ),
        hint: format!(
            "such changes are not carried while following. If this does not go away while the table rests: set \
             follow.without_identity = \"copy\" and start the daemon again, and the cutover carries the difference; or {} \
             on the source (or exclude it), then `pgtandem clean`, empty the target and begin again",
            alter.join(", ")
        ),
    })
}

async fn counts(session: &Session, tables: &[&QualifiedName]) -> Result<Vec<(QualifiedName, i64)>> {
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let rows = session
        .query(COUNTS, &[&schemas, &names])
        .await
        .doing(|| "reading the counters of tables without a replica identity")?;
    rows.iter()
        .map(|row| Ok((QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? }, row.try_get(2)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_fell_is_no_alarm() {
        assert_eq!([judge(5, 5), judge(5, 0), judge(5, 6)], [Counter::Still, Counter::Restarted, Counter::Rose]);
    }

    #[test]
    fn the_blocker_names_the_tables_and_what_to_do() {
        assert_eq!(blocker(&[]), None);
        let found = blocker(&[QualifiedName::new("public", "log")]).unwrap();
        assert!(found.message.contains("public.log") && found.hint.contains("REPLICA IDENTITY FULL"), "{found:?}");
    }
}
