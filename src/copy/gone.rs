//! Tables that went away while the move copied: dropped, renamed or excluded since they were planned.
//!
//! The cut shows nothing of such a table, and nothing is what the target shall hold of it. So it counts as copied under the
//! cut, without rows: the copy can end, and the changes that the stream still brings from before the drop, which
//! committed before the cut, are skipped like those of any other table.

use std::collections::BTreeSet;

use super::Context;
use super::statements::{self, Emptying};
use crate::error::{Doing, Result};
use crate::postgres::catalog::Table;
use crate::postgres::{Lsn, QualifiedName, Session};
use crate::state::{TableRecord, TableState, copied_sql, fence_sql};

/// `$1` schema, `$2` name.
const EXISTS: &str = "
    SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                   WHERE n.nspname = $1 AND c.relname = $2)";

/// Those of `records` that are not copied and that the cut does not show. Pure.
fn gone<'r>(records: &'r [TableRecord], shown: &[Table]) -> Vec<&'r TableRecord> {
    let shown: BTreeSet<&QualifiedName> = shown.iter().map(|table| &table.name).collect();
    records.iter().filter(|record| record.state != TableState::Copied && !shown.contains(&record.name)).collect()
}

/// Records them as copied under `cut`, without rows; what an earlier run began is thrown away. Returns whether there
/// was one.
pub(super) async fn settle(context: &Context, records: &[TableRecord], shown: &[Table], cut: Lsn) -> Result<bool> {
    let gone = gone(records, shown);
    if gone.is_empty() {
        return Ok(false);
    }
    let move_name = context.store.name().as_str();
    let session = context.target.connect("copy").await?;
    for record in gone {
        let name = &record.name;
        let doing = || format!("letting go of the table {}", name.plain());
        let there = session.query_one(EXISTS, &[&name.schema, &name.name]).await.doing(doing)?.try_get(0)?;
        let began = record.state == TableState::Copying;
        let empty = if there && began { emptying(&session, name).await? + "; " } else { String::new() };
        let copied = copied_sql(move_name, cut, &[(name, 0, 0)]);
        let fence = fence_sql(move_name, context.epoch);
        session.batch_execute(&format!("BEGIN; {empty}{copied}; {fence}; COMMIT")).await.doing(doing)?;
        tracing::warn!("the table {} is no longer among those that move; it is not copied", name.plain());
    }
    Ok(true)
}

/// The statement that empties the table.
async fn emptying(session: &Session, table: &QualifiedName) -> Result<String> {
    session.batch_execute(statements::REPLICA_ROLE).await.or_else(refusal_is_an_answer)?;
    let question = format!("SELECT {}", statements::how_to_empty(table));
    let row = session.query_one(&question, &[]).await.doing(|| format!("looking at table {}", table.plain()))?;
    Ok(Emptying::of(table, row.try_get(0)?, row.try_get(1)?)?.sql(table))
}

/// A role that may not say so goes on without.
fn refusal_is_an_answer(error: tokio_postgres::Error) -> Result<()> {
    if error.code().is_some() { Ok(()) } else { Err(error.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::catalog::ReplicaIdentity;

    fn record(name: &str, state: TableState) -> TableRecord {
        let name = QualifiedName::new("public", name);
        TableRecord { name, state, cut_lsn: None, rows: 0, bytes: 0, bytes_total: 0 }
    }

    #[test]
    fn what_is_copied_or_shown_is_not_gone() {
        let shown = Table {
            oid: 1,
            name: QualifiedName::new("public", "shown"),
            columns: Vec::new(),
            primary_key: Vec::new(),
            identity: ReplicaIdentity::Nothing,
            above: Vec::new(),
            heap_bytes: 0,
            bytes: 0,
        };
        let records = [
            record("shown", TableState::Pending),
            record("copied", TableState::Copied),
            record("pending", TableState::Pending),
            record("begun", TableState::Copying),
        ];
        let found: Vec<_> = gone(&records, &[shown]).into_iter().map(|r| r.name.name.as_str()).collect();
        assert_eq!(found, ["pending", "begun"]);
    }
}
