//! The SQL of the copy, for both sides. No I/O.

use crate::error::{Class, Error, Result};
use crate::postgres::catalog::Table;
use crate::postgres::{QualifiedName, quote_identifier, quote_literal};

use super::plan::Blocks;

/// Set on both connections of a worker, beyond what every connection pins: rows arrive in the order of the heap.
pub(super) const BOTH_SIDES: &str = "SET synchronize_seqscans = off";

/// How long a worker stands in the queue of a lock on the source before it steps aside for a moment.
pub(super) const SOURCE_LOCK_TIMEOUT: &str = "SET lock_timeout = '5s'";

/// Nothing fires on the target while rows arrive; a role that may not say so goes on without.
pub(super) const REPLICA_ROLE: &str = "SET session_replication_role = replica";

/// Begins a transaction that sees exactly what the cut holds.
pub(super) fn import_snapshot(snapshot: &str) -> String {
    format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}; SAVEPOINT unit",
        quote_literal(snapshot)
    )
}

/// Ends a unit on the source: its lock goes, the snapshot stays.
pub(super) const RELEASE: &str = "ROLLBACK TO SAVEPOINT unit";

/// Locks a table against being rewritten, and asks whether it was since the cut.
///
/// The row of `pg_class` is read as the snapshot shows it, while `pg_relation_filenode` answers for this moment. They
/// differ after TRUNCATE, VACUUM FULL, CLUSTER and an ALTER TABLE that rewrites. The last one empties a table for older
/// snapshots, and any of them moves rows between ranges of blocks.
pub(super) fn lock(table: &Table) -> String {
    format!(
        "LOCK TABLE ONLY {name} IN ACCESS SHARE MODE;
         SELECT c.relfilenode = pg_catalog.pg_relation_filenode(c.oid) AND c.oid = {literal}::pg_catalog.regclass
         FROM pg_catalog.pg_class c WHERE c.oid = {oid}",
        name = table.name,
        literal = quote_literal(&table.name.to_string()),
        oid = table.oid,
    )
}

/// Tables whose rows pass a CHECK of the user's own function, on the table or on a domain that a column holds, however deep.
/// Such a function may read other tables, so theirs are copied last.
pub(crate) const CHECKED_BY_FUNCTIONS: &str = "
    WITH RECURSIVE calling AS (
        SELECT con.conrelid, con.contypid
        FROM pg_catalog.pg_constraint con
        JOIN pg_catalog.pg_depend d
          ON d.classid = 'pg_catalog.pg_constraint'::pg_catalog.regclass AND d.objid = con.oid
         AND d.refclassid IN ('pg_catalog.pg_proc'::pg_catalog.regclass, 'pg_catalog.pg_operator'::pg_catalog.regclass)
        WHERE con.contype = 'c' AND d.refobjid >= 16384),
    types (oid) AS (
        SELECT contypid FROM calling WHERE contypid <> 0
        UNION
        SELECT t.oid FROM types
        JOIN pg_catalog.pg_type t
          ON t.typbasetype = types.oid OR t.typelem = types.oid AND t.typlen = -1
          OR t.typrelid <> 0 AND t.typtype = 'c' AND EXISTS (
                 SELECT FROM pg_catalog.pg_attribute a
                 WHERE a.attrelid = t.typrelid AND a.atttypid = types.oid AND a.attnum > 0 AND NOT a.attisdropped))
    SELECT conrelid FROM calling WHERE conrelid <> 0
    UNION
    SELECT a.attrelid FROM types
    JOIN pg_catalog.pg_attribute a ON a.atttypid = types.oid AND a.attnum > 0 AND NOT a.attisdropped";

/// `$1`: oids of tables. Those that were rewritten since the cut, by the same reasoning; what was dropped is not among them.
pub(super) const REWRITTEN: &str = "
    SELECT c.oid FROM pg_catalog.pg_class c
    WHERE c.oid = ANY ($1) AND c.relfilenode <> pg_catalog.pg_relation_filenode(c.oid)";

/// Reads a table, or the rows that stood in a range of its blocks.
pub(super) fn read(table: &Table, blocks: Option<Blocks>) -> String {
    let Some(blocks) = blocks else {
        return format!("COPY {}{} TO STDOUT", table.name, column_list(table));
    };
    let from = format!("ctid >= '({},0)'::pg_catalog.tid", blocks.from);
    let to = blocks.to.map(|to| format!(" AND ctid < '({to},0)'::pg_catalog.tid")).unwrap_or_default();
    format!("COPY (SELECT {} FROM ONLY {} WHERE {from}{to}) TO STDOUT", columns(table), table.name)
}

/// Writes rows into a table. A table that was truncated in the same transaction takes them as frozen, which spares the
/// target a rewrite by autovacuum later.
pub(super) fn write(table: &Table, truncated: bool) -> String {
    let freeze = if truncated { " WITH (FREEZE)" } else { "" };
    format!("COPY {}{} FROM STDIN{freeze}", table.name, column_list(table))
}

/// Begins the transaction in which a table of the target is filled from nothing, with nobody else near it. Asks whether it
/// is empty, and how it can be emptied: see [`how_to_empty`].
pub(super) fn begin_alone(table: &QualifiedName) -> String {
    format!(
        "BEGIN; LOCK TABLE ONLY {table} IN ACCESS EXCLUSIVE MODE;
         SELECT NOT EXISTS (SELECT FROM ONLY {table}), {}",
        how_to_empty(table)
    )
}

/// Two expressions: whether a foreign key of another table refers to the table, which makes the server refuse TRUNCATE;
/// and whether foreign keys do not fire in this session.
pub(super) fn how_to_empty(table: &QualifiedName) -> String {
    format!(
        "EXISTS (SELECT FROM pg_catalog.pg_constraint
                 WHERE contype = 'f' AND confrelid = {}::pg_catalog.regclass AND conrelid <> confrelid),
         pg_catalog.current_setting('session_replication_role') = 'replica'",
        quote_literal(&table.to_string())
    )
}

/// How a table of the target is emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Emptying {
    Truncate,
    /// Row by row, with foreign keys at rest: other tables refer to it, and the rows that they refer to come back.
    Delete,
}

impl Emptying {
    /// # Errors
    /// Class operator: other tables refer to it, and their foreign keys would fire.
    pub(super) fn of(table: &QualifiedName, referred_to: bool, at_rest: bool) -> Result<Self> {
        match (referred_to, at_rest) {
            (false, _) => Ok(Self::Truncate),
            (true, true) => Ok(Self::Delete),
            (true, false) => Err(Error::new(
                Class::Operator,
                "table_referred_to",
                format!("the table {} of the target cannot be emptied: foreign keys of other tables refer to it", table.plain()),
            )
            .hint(
                "the target's role may not keep them from firing. Drop these foreign keys on the target, or let the role set \
                 session_replication_role, and start again; the move adds the source's foreign keys at the cutover",
            )),
        }
    }

    /// The statement.
    pub(super) fn sql(self, table: &QualifiedName) -> String {
        match self {
            Self::Truncate => format!("TRUNCATE ONLY {table}"),
            Self::Delete => format!("DELETE FROM ONLY {table}"),
        }
    }
}

/// The columns that are copied: those that each side does not compute itself.
fn columns(table: &Table) -> String {
    table.columns.iter().filter(|c| !c.generated).map(|c| quote_identifier(&c.name)).collect::<Vec<_>>().join(", ")
}

/// ` (a, b)`, or nothing where no column is copied: COPY knows no empty list, and leaves generated columns out itself.
fn column_list(table: &Table) -> String {
    let columns = columns(table);
    if columns.is_empty() { columns } else { format!(" ({columns})") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::catalog::{Column, ReplicaIdentity};

    fn table(columns: &[(&str, bool)]) -> Table {
        Table {
            oid: 1,
            name: QualifiedName::new("s", "t\"x"),
            columns: columns
                .iter()
                .map(|&(name, generated)| Column {
                    name: name.to_owned(),
                    type_name: "int4".to_owned(),
                    generated,
                    identity_always: false,
                })
                .collect(),
            primary_key: Vec::new(),
            identity: ReplicaIdentity::Nothing,
            above: Vec::new(),
            heap_bytes: 0,
            bytes: 0,
        }
    }

    #[test]
    fn generated_columns_are_left_out_on_both_sides() {
        let table = table(&[("a", false), ("b", true), ("c d", false)]);
        assert_eq!(read(&table, None), r#"COPY "s"."t""x" ("a", "c d") TO STDOUT"#);
        assert_eq!(write(&table, true), r#"COPY "s"."t""x" ("a", "c d") FROM STDIN WITH (FREEZE)"#);
    }

    #[test]
    fn a_table_without_columns_is_copied_without_a_list() {
        for columns in [&[][..], &[("g", true)]] {
            assert_eq!(read(&table(columns), None), r#"COPY "s"."t""x" TO STDOUT"#);
            assert_eq!(write(&table(columns), false), r#"COPY "s"."t""x" FROM STDIN"#);
        }
    }

    #[test]
    fn the_last_range_has_no_end() {
        let table = table(&[("a", false)]);
        let first = read(&table, Some(Blocks { from: 0, to: Some(7) }));
        assert!(first.ends_with("WHERE ctid >= '(0,0)'::pg_catalog.tid AND ctid < '(7,0)'::pg_catalog.tid) TO STDOUT"));
        let last = read(&table, Some(Blocks { from: 7, to: None }));
        assert!(last.ends_with("WHERE ctid >= '(7,0)'::pg_catalog.tid) TO STDOUT"));
    }
}
