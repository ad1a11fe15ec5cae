//! The SQL of the copy, for both sides. No I/O.

use crate::error::{Class, Error, Result};
use crate::postgres::catalog::Table;
use crate::postgres::{QualifiedName, quote_identifier, quote_literal};

use super::division::{Division, Range};
use super::plan::Candidate;
use super::pump::Form;

/// Set on both connections of a worker, beyond what every connection pins: whoever reads a heap begins at its first block.
pub(super) const BOTH_SIDES: &str = "SET synchronize_seqscans = off";

/// The rows of a unit and their record are one transaction, and a crash of the target takes transactions from the end of its log only:
/// what it lost, nobody relies on. The next phase is entered by a commit that waits for the disk, and with it for all of these.
pub(super) const DURABLE_LATER: &str = "SET synchronous_commit = off";

/// A worker stands in the queue of a lock on the source for so long before it steps aside for a moment. It is one process there, also where
/// it reads by a key, and reads ranges of blocks whatever the role is set to.
pub(super) const SOURCE_SIDE: &str =
    "SET lock_timeout = '5s'; SET max_parallel_workers_per_gather = 0; SET enable_tidscan = on";

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

/// Locks tables against being rewritten, and asks which of them were since the cut. Of several, all at once or none: who holds some
/// while waiting for another would hold up others, and could be one half of a deadlock.
///
/// The row of `pg_class` is read as the snapshot shows it, while `pg_relation_filenode` answers for this moment. They
/// differ after TRUNCATE, VACUUM FULL, CLUSTER and an ALTER TABLE that rewrites. The last one empties a table for older
/// snapshots, and any of them moves rows between ranges of blocks.
pub(super) fn lock(tables: &[&Table]) -> String {
    let names: Vec<String> = tables.iter().map(|table| format!("ONLY {}", table.name)).collect();
    let row = |(at, table): (usize, &&Table)| {
        let name = quote_literal(&table.name.to_string());
        format!("({at}, {}::pg_catalog.oid, {name}::pg_catalog.regclass)", table.oid)
    };
    let rows: Vec<String> = tables.iter().enumerate().map(row).collect();
    format!(
        "LOCK TABLE {} IN ACCESS SHARE MODE{};
         SELECT t.at FROM (VALUES {}) AS t (at, oid, of_this_name) LEFT JOIN pg_catalog.pg_class c ON c.oid = t.oid
         WHERE (c.relfilenode = pg_catalog.pg_relation_filenode(c.oid) AND c.oid = t.of_this_name) IS NOT TRUE",
        names.join(", "),
        nowait(names.len()),
        rows.join(", "),
    )
}

fn nowait(tables: usize) -> &'static str {
    if tables > 1 { " NOWAIT" } else { "" }
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

/// Reads a table, or the rows that stand in a range of it.
pub(super) fn read(of: &Candidate, range: Option<(&Division, Range)>) -> String {
    let (table, with) = (&of.table, options(of.form(), false));
    let Some((division, range)) = range else {
        return format!("COPY {}{} TO STDOUT{with}", table.name, column_list(table));
    };
    let range = division.within("", &[range]);
    format!("COPY (SELECT {} FROM ONLY {} WHERE {range}) TO STDOUT{with}", columns(table, ""), table.name)
}

/// Writes rows into a table. A table that was truncated in the same transaction takes them as frozen, which spares the
/// target a rewrite by autovacuum later.
pub(super) fn write(table: &Table, truncated: bool, form: Form) -> String {
    format!("COPY {}{} FROM STDIN{}", table.name, column_list(table), options(form, truncated))
}

fn options(form: Form, frozen: bool) -> &'static str {
    match (form, frozen) {
        (Form::Text, false) => "",
        (Form::Text, true) => " WITH (FREEZE)",
        (Form::Binary, false) => " WITH (FORMAT binary)",
        (Form::Binary, true) => " WITH (FORMAT binary, FREEZE)",
    }
}

/// Begins the transaction in which tables of the target are filled from nothing, with nobody else near them. One is waited for as on the
/// source; of several, all are locked at once or none. Asks of each in turn whether it has no block, and so no row.
pub(super) fn begin_alone(tables: &[&QualifiedName]) -> String {
    let names: Vec<String> = tables.iter().map(|table| format!("ONLY {table}")).collect();
    let rows: Vec<String> =
        tables.iter().map(|table| quote_literal(&table.to_string()) + "::pg_catalog.regclass").collect();
    // What another access method keeps elsewhere has no size here; 2 is heap.
    format!(
        "BEGIN; SET LOCAL lock_timeout = '5s'; LOCK TABLE {} IN ACCESS EXCLUSIVE MODE{}; SET LOCAL lock_timeout = 0;
         SELECT c.relam = 2 AND pg_catalog.pg_relation_size(c.oid) = 0
         FROM pg_catalog.unnest(ARRAY[{}]) WITH ORDINALITY AS t (oid, at) JOIN pg_catalog.pg_class c ON c.oid = t.oid
         ORDER BY t.at",
        names.join(", "),
        nowait(names.len()),
        rows.join(", "),
    )
}

/// Asks whether a table of the target is empty, and how it can be emptied: see [`how_to_empty`].
pub(super) fn is_empty(table: &QualifiedName) -> String {
    format!("SELECT NOT EXISTS (SELECT FROM ONLY {table}), {}", how_to_empty(table))
}

/// Two expressions: whether a foreign key of another table refers to the table, which makes the server refuse TRUNCATE;
/// and whether foreign keys do not fire in this session.
pub(super) fn how_to_empty(table: &QualifiedName) -> String {
    // Such a foreign key puts triggers on the table; constraints are found by the tables that have them only.
    format!(
        "CASE WHEN (SELECT relhastriggers FROM pg_catalog.pg_class WHERE oid = {this}) THEN EXISTS (
             SELECT FROM pg_catalog.pg_constraint WHERE contype = 'f' AND confrelid = {this} AND conrelid <> confrelid)
         ELSE false END,
         pg_catalog.current_setting('session_replication_role') = 'replica'",
        this = quote_literal(&table.to_string()) + "::pg_catalog.regclass"
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

/// A column of a key, with the equality of the index behind it, as `OPERATOR(schema.=)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeyColumn {
    pub name: String,
    pub type_name: String,
    pub equality: String,
}

/// `$1`: a table. Each column of its primary key and of its replica identity, with its equality, which is that of its type; a key that goes
/// by another one, such as a period without overlaps, is none here.
pub(super) const EQUALITIES: &str = "
    SELECT DISTINCT a.attname::text, pg_catalog.format('OPERATOR(%I.%s)', opn.nspname, op.oprname)
    FROM pg_catalog.pg_index i
    CROSS JOIN LATERAL unnest(i.indkey::int2[], i.indclass::oid[]) k(attnum, opclass)
    JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
    JOIN pg_catalog.pg_opclass oc ON oc.oid = k.opclass AND oc.opcdefault
    JOIN pg_catalog.pg_am am ON am.oid = oc.opcmethod AND am.amname = 'btree'
    JOIN pg_catalog.pg_amop ao ON ao.amopfamily = oc.opcfamily AND ao.amopmethod = oc.opcmethod AND ao.amopstrategy = 3
         AND ao.amoplefttype = oc.opcintype AND ao.amoprighttype = oc.opcintype
    JOIN pg_catalog.pg_operator op ON op.oid = ao.amopopr
    JOIN pg_catalog.pg_namespace opn ON opn.oid = op.oprnamespace
    WHERE i.indrelid = $1 AND i.indisvalid AND (i.indisprimary OR i.indisreplident)";

/// Where keys of changed rows are gathered on the target: a table of this session, for the table that is number `at`.
pub(super) fn touched(at: usize) -> String {
    format!("pg_temp.pgtandem_touched_{at}")
}

/// Makes it.
pub(super) fn create_touched(at: usize, table: &QualifiedName, key: &[KeyColumn]) -> String {
    let columns = list(key, |column, k| format!("{} AS k{k}", quote_identifier(&column.name)));
    format!("CREATE TEMPORARY TABLE pgtandem_touched_{at} AS SELECT {columns} FROM ONLY {table} WITH NO DATA")
}

/// Begins to take what the target holds of the changed rows away, and to read their keys: see [`fetch_touched`].
pub(super) fn delete_touched(at: usize, table: &QualifiedName, key: &[KeyColumn]) -> String {
    let names = list(key, |_, k| format!("k{k}"));
    let texts = list(key, |_, k| format!("k{k}::pg_catalog.text"));
    let touched = touched(at);
    format!(
        "ANALYZE {touched};
         DELETE FROM ONLY {table} AS of USING (SELECT DISTINCT {names} FROM {touched}) AS touched WHERE {};
         DECLARE touched NO SCROLL CURSOR FOR SELECT {texts} FROM (SELECT DISTINCT {names} FROM {touched}) AS touched",
        same_key(key)
    )
}

/// The next so many keys.
pub(super) fn fetch_touched(count: usize) -> String {
    format!("FETCH {count} FROM touched")
}

/// The planner looks keys up, and ranges of them, whatever it thinks and the role is set to: to read all of the table each time would take much
/// longer.
pub(super) const LOOK_UP: &str = "
    SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off;
    SET LOCAL enable_indexscan = on; SET LOCAL enable_bitmapscan = on; SET LOCAL enable_nestloop = on";

/// Reads the rows of these keys, as far as they stand in one of these ranges.
pub(super) fn read_touched(
    of: &Candidate,
    key: &[KeyColumn],
    keys: &[Vec<String>],
    division: &Division,
    ranges: &[Range],
) -> String {
    let row = |values: &Vec<String>| {
        let values =
            key.iter().zip(values).map(|(column, value)| format!("{}::{}", quote_literal(value), column.type_name));
        format!("({})", values.collect::<Vec<_>>().join(", "))
    };
    format!(
        "COPY (SELECT {} FROM ONLY {} AS of JOIN (VALUES {}) AS touched ({}) ON {} WHERE {}) TO STDOUT{}",
        columns(&of.table, "of."),
        of.table.name,
        keys.iter().map(row).collect::<Vec<_>>().join(", "),
        list(key, |_, k| format!("k{k}")),
        same_key(key),
        division.within("of.", ranges),
        options(of.form(), false),
    )
}

fn same_key(key: &[KeyColumn]) -> String {
    let pairs = key.iter().enumerate();
    let pairs = pairs.map(|(k, c)| format!("of.{} {} touched.k{k}", quote_identifier(&c.name), c.equality));
    pairs.collect::<Vec<_>>().join(" AND ")
}

fn list(key: &[KeyColumn], one: impl Fn(&KeyColumn, usize) -> String) -> String {
    key.iter().enumerate().map(|(k, column)| one(column, k)).collect::<Vec<_>>().join(", ")
}

/// The columns that are copied: those that each side does not compute itself. `of` is empty, or a table's alias with its dot.
fn columns(table: &Table, of: &str) -> String {
    let copied = table.columns.iter().filter(|c| !c.generated);
    copied.map(|c| format!("{of}{}", quote_identifier(&c.name))).collect::<Vec<_>>().join(", ")
}

/// ` (a, b)`, or nothing where no column is copied: COPY knows no empty list, and leaves generated columns out itself.
fn column_list(table: &Table) -> String {
    let columns = columns(table, "");
    if columns.is_empty() { columns } else { format!(" ({columns})") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::catalog::{Column, ReplicaIdentity};

    fn candidate(columns: &[(&str, bool)]) -> Candidate {
        let table = Table {
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
        };
        Candidate { table, shape: String::new(), division: Some(Division::Blocks), binary: false, late: false }
    }

    #[test]
    fn generated_columns_are_left_out_on_both_sides() {
        let of = candidate(&[("a", false), ("b", true), ("c d", false)]);
        assert_eq!(read(&of, None), r#"COPY "s"."t""x" ("a", "c d") TO STDOUT"#);
        assert_eq!(write(&of.table, true, Form::Text), r#"COPY "s"."t""x" ("a", "c d") FROM STDIN WITH (FREEZE)"#);
    }

    #[test]
    fn a_table_without_columns_is_copied_without_a_list() {
        for columns in [&[][..], &[("g", true)]] {
            let of = candidate(columns);
            assert_eq!(read(&of, None), r#"COPY "s"."t""x" TO STDOUT"#);
            assert_eq!(write(&of.table, false, Form::Text), r#"COPY "s"."t""x" FROM STDIN"#);
        }
    }

    #[test]
    fn a_range_is_read_alone() {
        let of = candidate(&[("a", false)]);
        let part = read(&of, Some((&Division::Blocks, Range { from: 7, to: None })));
        assert_eq!(part, r#"COPY (SELECT "a" FROM ONLY "s"."t""x" WHERE ctid >= '(7,0)'::pg_catalog.tid) TO STDOUT"#);
    }

    #[test]
    fn binary_is_asked_of_both_sides() {
        let of = Candidate { binary: true, ..candidate(&[("a", false)]) };
        assert!(read(&of, None).ends_with("TO STDOUT WITH (FORMAT binary)"));
        assert!(write(&of.table, true, Form::Binary).ends_with("FROM STDIN WITH (FORMAT binary, FREEZE)"));
    }

    #[test]
    fn changed_rows_are_read_by_their_keys_where_units_are_there() {
        let of = candidate(&[("a", false), ("b", false)]);
        let key = ["a", "b"].map(|name| KeyColumn {
            name: name.to_owned(),
            type_name: "integer".to_owned(),
            equality: "OPERATOR(pg_catalog.=)".to_owned(),
        });
        let ranges = [Range { from: 0, to: Some(3) }, Range { from: 7, to: None }];
        let keys = [vec!["1".to_owned(), "it's".to_owned()]];
        assert_eq!(
            read_touched(&of, &key, &keys, &Division::Blocks, &ranges),
            r#"COPY (SELECT of."a", of."b" FROM ONLY "s"."t""x" AS of JOIN (VALUES ('1'::integer, 'it''s'::integer)) AS touched (k0, k1) ON of."a" OPERATOR(pg_catalog.=) touched.k0 AND of."b" OPERATOR(pg_catalog.=) touched.k1 WHERE (of.ctid >= '(0,0)'::pg_catalog.tid AND of.ctid < '(3,0)'::pg_catalog.tid) OR (of.ctid >= '(7,0)'::pg_catalog.tid)) TO STDOUT"#
        );
        assert!(delete_touched(4, &of.table.name, &key).contains("pg_temp.pgtandem_touched_4"));
    }
}
