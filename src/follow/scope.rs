//! The watch over what is in scope: tables that were made or dropped on the source since the copy.
//!
//! A new table is in no publication, so the stream says nothing of it, and a dropped one ends without a word. Neither
//! may go unnoticed: each is a blocker until it is dealt with.
//!
//! # Partitions
//!
//! A partition of a published root is published from its first row, under its own name. One that was made after the
//! slot, as a partition, is carried whole if the target has it, and becomes a table of the move under the slot's position.
//! The catalog tells these from tables that were attached, with rows from before: attaching rewrites the entries of
//! the columns, so that one which was made with the table proves that it was a partition from birth; and storage that
//! is still the first proves that no row was written before it was logged. Whoever cannot prove it is a blocker.

use std::collections::BTreeSet;

use crate::config::Config;
use crate::error::{Doing, Result};
use crate::postgres::catalog::IS_USER_TABLE;
use crate::postgres::{QualifiedName, Server, Session, quote_identifier};
use crate::state::Store;
use crate::telemetry::Blocker;

/// How many names a message holds.
const NAMES: usize = 10;

/// `$1`: the publications. Every table that stores rows: whether it is published, whether it is a partition, and whether
/// it was one from birth; see the module's first lines.
fn tables_sql() -> String {
    format!(
        r"
        WITH published AS MATERIALIZED (
            SELECT DISTINCT schemaname, tablename FROM pg_catalog.pg_publication_tables WHERE pubname = ANY ($1))
        SELECT n.nspname::text, c.relname::text, p.tablename IS NOT NULL, c.relispartition,
               c.relispartition AND pg_catalog.pg_relation_filenode(c.oid) = c.oid AND EXISTS (
                   SELECT FROM pg_catalog.pg_attribute system
                   JOIN pg_catalog.pg_attribute own ON own.attrelid = system.attrelid AND own.attnum > 0
                        AND own.xmin = system.xmin AND own.cmin = system.cmin
                   WHERE system.attrelid = c.oid AND system.attname = 'tableoid')
        FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        LEFT JOIN published p ON p.schemaname = n.nspname AND p.tablename = c.relname
        WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND {IS_USER_TABLE}
        ORDER BY 1, 2"
    )
}

/// `$1` schema, `$2` name: a partition and the partitioned tables above it, topmost first, each with what makes it.
const LINEAGE: &str = r"
    SELECT n.nspname::text, c.relname::text, pn.nspname::text, pc.relname::text,
           pg_catalog.pg_get_expr(c.relpartbound, c.oid),
           CASE WHEN c.relkind = 'p' THEN pg_catalog.pg_get_partkeydef(c.oid) END
    FROM pg_catalog.pg_class leaf
    JOIN pg_catalog.pg_namespace ln ON ln.oid = leaf.relnamespace
    CROSS JOIN LATERAL pg_catalog.pg_partition_ancestors(leaf.oid) WITH ORDINALITY AS line (relid, up)
    JOIN pg_catalog.pg_class c ON c.oid = line.relid
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_catalog.pg_inherits i ON i.inhrelid = c.oid
    JOIN pg_catalog.pg_class pc ON pc.oid = i.inhparent
    JOIN pg_catalog.pg_namespace pn ON pn.oid = pc.relnamespace
    WHERE ln.nspname = $1 AND leaf.relname = $2
    ORDER BY line.up DESC";

/// A table of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    name: QualifiedName,
    published: bool,
    partition: bool,
    /// Proven to be a partition from birth.
    born_partition: bool,
}

/// What became of the tables in scope since the copy.
#[derive(Debug, Default, PartialEq, Eq)]
struct Drift {
    /// Made since, and not carried.
    new: Vec<QualifiedName>,
    /// Published with their root, and carried whole if the target has them.
    partitions: Vec<QualifiedName>,
    /// Published with their root, and perhaps with rows from before.
    attached: Vec<QualifiedName>,
    /// Gone from the source.
    dropped: Vec<QualifiedName>,
}

/// Compares what there is with what the move knows. Pure; both are in scope.
fn drift(found: &[Found], known: &BTreeSet<QualifiedName>) -> Drift {
    let mut drift = Drift::default();
    for table in found {
        let list = match (known.contains(&table.name), table) {
            // Known and published: as it was. Known and not published: another table under the name of a dropped one.
            (true, Found { published: true, .. }) => continue,
            (false, Found { published: true, born_partition: true, .. }) => &mut drift.partitions,
            (false, Found { published: true, partition: true, .. }) => &mut drift.attached,
            _ => &mut drift.new,
        };
        list.push(table.name.clone());
    }
    let there: BTreeSet<&QualifiedName> = found.iter().map(|table| &table.name).collect();
    drift.dropped = known.iter().filter(|name| !there.contains(name)).cloned().collect();
    drift
}

/// What keeps the target from being whole: tables in scope that were made or dropped since the copy. New partitions
/// that the stream carries whole become tables of the move here.
///
/// # Errors
/// The connections'.
pub async fn check(source: &Server, store: &Store, config: &Config) -> Result<Vec<Blocker>> {
    let in_scope = |name: &QualifiedName| config.scope.contains(&name.schema, &name.name);
    let session = source.connect("watch").await?;
    // In this order: what is adopted meanwhile is then known.
    let mut found = tables(&session, config).await?;
    found.retain(|table| in_scope(&table.name));
    let known = store.tables().await?.into_iter().map(|table| table.name).filter(in_scope).collect();
    let drift = drift(&found, &known);
    if drift == Drift::default() {
        return Ok(Vec::new());
    }
    let mut asked = drift.dropped.clone();
    asked.extend_from_slice(&drift.partitions);
    let on_target = store.present(&asked).await?;
    let (carried, missing): (Vec<_>, Vec<_>) = drift.partitions.into_iter().partition(|name| on_target.contains(name));
    for name in &carried {
        store.adopt_table(name).await?;
        tracing::info!("the new partition {} is on both sides: it moves with its table", name.plain());
    }
    let left_over: Vec<_> = drift.dropped.into_iter().filter(|name| on_target.contains(name)).collect();
    let mut blockers = Vec::new();
    blockers.extend(some(&drift.new).map(made));
    blockers.extend(some(&drift.attached).map(attached));
    if let Some(names) = some(&missing) {
        let make = statements(&session, store, &missing).await?;
        blockers.push(blocker(
            "partition_new",
            format!("new partitions that the target does not have: {names}"),
            format!("on the target: {make}"),
        ));
    }
    blockers.extend(some(&left_over).map(|names| dropped(names, &left_over)));
    Ok(blockers)
}

pub(super) fn blocker(code: &'static str, message: String, hint: String) -> Blocker {
    Blocker { code, message, hint }
}

const OR_BEGIN_AGAIN: &str = "to take them along, run `pgtandem clean`, empty the target and begin the move again";

fn made(names: String) -> Blocker {
    blocker(
        "table_new",
        format!("made on the source since the copy, and not carried: {names}"),
        format!("name them in [move] exclude and start again, or drop them on the source; {OR_BEGIN_AGAIN}"),
    )
}

fn attached(names: String) -> Blocker {
    blocker(
        "partition_attached",
        format!("attached to partitioned tables since the copy, perhaps with rows that are not carried: {names}"),
        format!("name them in [move] exclude and start again, or drop them on the source; {OR_BEGIN_AGAIN}"),
    )
}

fn dropped(names: String, tables: &[QualifiedName]) -> Blocker {
    let list = tables.iter().take(NAMES).map(ToString::to_string).collect::<Vec<_>>().join(", ");
    blocker(
        "table_dropped",
        format!("dropped or renamed on the source since the copy, and still on the target: {names}"),
        format!("if they shall go, once the lag is zero, on the target: DROP TABLE {list};"),
    )
}

/// Up to ten names, and how many more there are; `None` if there is none.
pub(super) fn some(tables: &[QualifiedName]) -> Option<String> {
    if tables.is_empty() {
        return None;
    }
    let names = tables.iter().take(NAMES).map(QualifiedName::plain).collect::<Vec<_>>().join(", ");
    let more = tables.len().saturating_sub(NAMES);
    Some(if more == 0 { names } else { format!("{names} and {more} more") })
}

async fn tables(session: &Session, config: &Config) -> Result<Vec<Found>> {
    let publications = [config.name.publication(), config.name.insert_publication()];
    let rows = session
        .query(&tables_sql(), &[&&publications[..]])
        .await
        .doing(|| "looking for tables that were made or dropped")?;
    rows.iter()
        .map(|row| {
            Ok(Found {
                name: QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? },
                published: row.try_get(2)?,
                partition: row.try_get(3)?,
                born_partition: row.try_get(4)?,
            })
        })
        .collect()
}

/// What makes these partitions on the target, with the partitioned ones between that it has not either.
async fn statements(session: &Session, store: &Store, partitions: &[QualifiedName]) -> Result<String> {
    let mut statements: Vec<String> = Vec::new();
    for leaf in partitions.iter().take(NAMES) {
        let rows = session
            .query(LINEAGE, &[&leaf.schema, &leaf.name])
            .await
            .doing(|| format!("reading where the partition {} belongs", leaf.plain()))?;
        let mut line = Vec::new();
        for row in &rows {
            let name = QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? };
            let parent = QualifiedName { schema: row.try_get(2)?, name: row.try_get(3)? };
            line.push((name, create(&parent, row)?));
        }
        let names: Vec<QualifiedName> = line.iter().map(|(name, _)| name.clone()).collect();
        let present = store.present(&names).await?;
        for (name, rest) in line {
            let statement = format!("CREATE TABLE {name} {rest};");
            if !present.contains(&name) && !statements.contains(&statement) {
                statements.push(statement);
            }
        }
    }
    Ok(statements.join(" "))
}

fn create(parent: &QualifiedName, row: &tokio_postgres::Row) -> Result<String> {
    let bound: Option<String> = row.try_get(4)?;
    let key: Option<String> = row.try_get(5)?;
    let by = key.map(|key| format!(" PARTITION BY {key}")).unwrap_or_default();
    let parent = format!("{}.{}", quote_identifier(&parent.schema), quote_identifier(&parent.name));
    Ok(format!("PARTITION OF {parent} {}{by}", bound.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> QualifiedName {
        QualifiedName::new("public", name)
    }

    fn found(table: &str, published: bool, partition: bool, born_partition: bool) -> Found {
        Found { name: name(table), published, partition, born_partition }
    }

    #[test]
    fn what_was_made_since_is_told_apart() {
        let known = ["known", "dropped", "remade"].map(name).into();
        let there = [
            found("known", true, false, false),
            found("remade", false, false, false),
            found("new", false, false, false),
            found("listed", false, true, true),
            found("born", true, true, true),
            found("attached", true, true, false),
            found("added", true, false, false),
        ];
        let expected = Drift {
            new: ["remade", "new", "listed", "added"].map(name).to_vec(),
            partitions: vec![name("born")],
            attached: vec![name("attached")],
            dropped: vec![name("dropped")],
        };
        assert_eq!(drift(&there, &known), expected);
    }

    #[test]
    fn a_message_holds_ten_names() {
        assert_eq!(some(&[]), None);
        let many: Vec<_> = (0..12).map(|at| name(&format!("t{at}"))).collect();
        let text = some(&many).unwrap();
        assert!(text.starts_with("public.t0, ") && text.ends_with("public.t9 and 2 more"), "{text}");
    }
}
