//! The watch over tables without a replica identity.
//!
//! Their inserts and truncates are carried, their updates and deletes are not: the stream has nothing that would tell
//! which row was meant. Publishing them anyway would make the source refuse the application's own statements, so the
//! source counts instead: an update or delete since before the first cut means that the sides differ, and the move stops
//! with the table's name. A counter may rise late (the server reports it up to some seconds after the transaction)
//! and also for a transaction that was rolled back; it never fails to rise.

use crate::error::{Class, Doing, Error, Result};
use crate::postgres::catalog::{ReplicaIdentity, Table};
use crate::postgres::{QualifiedName, Server, Session};
use crate::state::Store;

/// Updates and deletes so far. `$1` schemas, `$2` names.
const COUNTS: &str = r"
    SELECT s.schemaname::text, s.relname::text, s.n_tup_upd + s.n_tup_del
    FROM pg_catalog.pg_stat_user_tables s
    JOIN unnest($1::text[], $2::text[]) t (schema_name, table_name)
         ON t.schema_name = s.schemaname AND t.table_name = s.relname";

/// Writes down where the counters stand. To be called before the first cut is taken.
///
/// # Errors
/// The connections'.
pub async fn remember(source: &Server, store: &Store, tables: &[Table]) -> Result<()> {
    let unkeyed: Vec<&QualifiedName> =
        tables.iter().filter(|table| table.identity == ReplicaIdentity::Nothing).map(|table| &table.name).collect();
    if unkeyed.is_empty() {
        return Ok(());
    }
    let session = source.connect("watch").await?;
    let counts = counts(&session, &unkeyed).await?;
    store.remember_unkeyed(&counts).await
}

/// Whether every counter still stands where it stood.
///
/// # Errors
/// Class operator, with the table: it was updated or deleted from. The connections'.
pub async fn check(source: &Server, store: &Store) -> Result<()> {
    let known = store.unkeyed().await?;
    if known.is_empty() {
        return Ok(());
    }
    let session = source.connect("watch").await?;
    let names: Vec<&QualifiedName> = known.iter().map(|(name, _)| name).collect();
    let now = counts(&session, &names).await?;
    for (table, count) in now {
        let before = known.iter().find(|(name, _)| *name == table).map_or(0, |(_, count)| *count);
        if count != before {
            let what = if count < before { "its counters were reset" } else { "it was updated or deleted from" };
            return Err(Error::new(
                Class::Operator,
                "unkeyed_changed",
                format!(
                    "table {} has no replica identity, and {what} since the move began: the target may lack changes",
                    table.plain()
                ),
            )
            .hint(format!(
                "`ALTER TABLE {table} REPLICA IDENTITY FULL` on the source, or exclude it; then `pgtandem clean`, \
                 empty the target and begin again"
            )));
        }
    }
    Ok(())
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
