//! Whether each table can be followed: what identifies its old rows.

use std::collections::BTreeSet;

use super::Finding;
use super::finding::kinds;
use super::look::Look;
use super::privileges::{plain, tables};
use crate::config::WithoutIdentity;
use crate::error::Result;
use crate::postgres::QualifiedName;
use crate::postgres::catalog::{IS_USER_TABLE, KEY_IS_PUBLISHED};

/// Tables with what identifies their old rows, and how many updates and deletes they have seen. Counters are reset by
/// a crash or by hand, and NULL with track_counts off.
fn identities() -> String {
    let key_columns = "CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, ord)
            JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum";
    format!(
        r"
        SELECT n.nspname::text, c.relname::text,
               CASE WHEN c.relreplident = 'f' AND EXISTS (
                        SELECT FROM pg_catalog.pg_attribute a
                        WHERE a.attrelid = c.oid AND a.attgenerated = 'v' AND NOT a.attisdropped)
                    THEN 'n' ELSE c.relreplident::text END,
               pk.indimmediate,
               ri.indexrelid IS NOT NULL,
               CASE WHEN pg_catalog.current_setting('track_counts')::bool
                    THEN COALESCE(pg_catalog.pg_stat_get_tuples_updated(c.oid), 0)
                       + COALESCE(pg_catalog.pg_stat_get_tuples_deleted(c.oid), 0) END,
               EXISTS (SELECT FROM pg_catalog.pg_attribute a
                       WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
               EXISTS (SELECT FROM pg_catalog.pg_attribute a
                       WHERE a.attrelid = c.oid AND a.attgenerated = 'v' AND NOT a.attisdropped)
        FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        LEFT JOIN LATERAL (
            SELECT bool_and(i.indimmediate) AS indimmediate
            FROM pg_catalog.pg_index i {key_columns}
            WHERE i.indrelid = c.oid AND i.indisprimary AND i.indisvalid AND k.ord <= i.indnkeyatts
            HAVING {KEY_IS_PUBLISHED}) pk ON true
        LEFT JOIN LATERAL (
            SELECT min(i.indexrelid::int8) AS indexrelid
            FROM pg_catalog.pg_index i {key_columns}
            WHERE i.indrelid = c.oid AND i.indisreplident AND i.indisvalid AND k.ord <= i.indnkeyatts
            HAVING {KEY_IS_PUBLISHED}) ri ON true
        WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND {IS_USER_TABLE}
        ORDER BY 1, 2"
    )
}

/// Columns whose type only means something inside one server: object identifiers stored as data.
fn local_identifiers() -> String {
    format!(
        r"
        SELECT n.nspname::text, c.relname::text, a.attname::text, pg_catalog.format_type(a.atttypid, NULL)
        FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relkind = 'r' AND c.relpersistence = 'p'
          AND a.atttypid::pg_catalog.regtype::text IN ('oid', 'xid', 'xid8', 'cid', 'tid', 'pg_lsn', 'pg_snapshot')
          AND {IS_USER_TABLE}
        ORDER BY 1, 2, 3"
    )
}

kinds! {
    NO_REPLICA_IDENTITY = Blocking "no_replica_identity" {
        what: "a table without a replica identity is updated or deleted from",
        why: "its updates and deletes cannot be followed, and publishing them would make the source refuse them",
        fix: "add a primary key, or ALTER TABLE … REPLICA IDENTITY FULL, or follow.without_identity = \"full\" or \"copy\", or exclude the table",
    }
    GIVEN_IDENTITY = Info "identity_given" {
        what: "tables without a replica identity will be given one",
        why: "follow.without_identity is \"full\": ALTER TABLE … REPLICA IDENTITY FULL on the source, an instant each, until `pgtandem clean`; each update and delete then writes its whole old row into the WAL",
        fix: "",
    }
    COPIED_DIFFERENCES = Warning "differences_copied" {
        what: "the differences of tables without a replica identity will be carried behind the fence",
        why: "follow.without_identity is \"copy\": their inserts are followed; what updates and deletes did is found by reading them on both sides while writes wait, and is not on the target before",
        fix: "a primary key, or follow.without_identity = \"full\", keeps the write pause short",
    }
    INSERT_ONLY = Info "insert_only" {
        what: "a table without a replica identity has only seen inserts",
        why: "its inserts and truncates are carried; after an update or delete the cutover refuses with its name",
        fix: "if it will be updated: ALTER TABLE … REPLICA IDENTITY FULL, or follow.without_identity",
    }
    FULL_IDENTITY = Warning "full_replica_identity" {
        what: "a table is identified by its whole rows",
        why: "each update and delete carries the whole old row and searches the target for it, which is slow for large tables",
        fix: "add a primary key, then ALTER TABLE … REPLICA IDENTITY DEFAULT",
    }
    DEFERRABLE_KEY = Warning "deferrable_key" {
        what: "a table's primary key is deferrable",
        why: "PostgreSQL does not use it as a replica identity, so the table counts as having none",
        fix: "ALTER TABLE … REPLICA IDENTITY FULL, or make the key not deferrable",
    }
    NO_COLUMNS = Info "table_without_columns" {
        what: "a table has no columns",
        why: "its rows are counted, not compared",
        fix: "",
    }
    LOCAL_IDENTIFIERS = Info "local_identifiers" {
        what: "columns hold identifiers of one server: oid, xid, pg_lsn and the like",
        why: "they arrive as they are; if they point into the catalog or the WAL of the source, they point nowhere on the target",
        fix: "",
    }
}

/// What the replica identity of a table means for the move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identified {
    Well,
    ByWholeRow,
    Not { deferrable: bool },
}

fn identified(relreplident: &str, primary_key_immediate: Option<bool>, has_index: bool) -> Identified {
    match relreplident {
        "f" => Identified::ByWholeRow,
        "d" => match primary_key_immediate {
            Some(true) => Identified::Well,
            Some(false) => Identified::Not { deferrable: true },
            None => Identified::Not { deferrable: false },
        },
        "i" if has_index => Identified::Well,
        _ => Identified::Not { deferrable: false },
    }
}

/// Tables by how their rows are identified.
#[derive(Default)]
struct Sorted {
    /// Those that REPLICA IDENTITY FULL would not help: a virtual column is not published.
    virtual_columns: BTreeSet<QualifiedName>,
    updated: Vec<QualifiedName>,
    insert_only: Vec<QualifiedName>,
    full: Vec<QualifiedName>,
    deferrable: Vec<QualifiedName>,
    no_columns: Vec<QualifiedName>,
}

pub(super) async fn replica_identity(look: &Look<'_>) -> Result<Vec<Finding>> {
    let mut sorted = Sorted::default();
    for (name, row) in look.in_scope(look.source.client.query(&identities(), &[]).await?)? {
        let how = identified(&row.try_get::<_, String>(2)?, row.try_get(3)?, row.try_get(4)?);
        let changes: Option<i64> = row.try_get(5)?;
        if !row.try_get::<_, bool>(6)? {
            sorted.no_columns.push(name.clone());
        }
        if row.try_get(7)? {
            sorted.virtual_columns.insert(name.clone());
        }
        match how {
            Identified::Well => {}
            Identified::ByWholeRow => sorted.full.push(name),
            Identified::Not { deferrable } => {
                if deferrable {
                    sorted.deferrable.push(name.clone());
                }
                if changes == Some(0) { sorted.insert_only.push(name) } else { sorted.updated.push(name) }
            }
        }
    }
    Ok(findings(look, &sorted))
}

fn findings(look: &Look<'_>, sorted: &Sorted) -> Vec<Finding> {
    let side = look.source.side;
    let mut found = Vec::new();
    let mut say = |finding: Finding, names: &[QualifiedName]| {
        if !names.is_empty() {
            found.push(finding.objects(plain(names)));
        }
    };
    let full = |names: &[QualifiedName]| {
        names.iter().map(|table| give_identity(table, &sorted.virtual_columns)).collect::<Vec<_>>().join("\n")
    };
    let what = |names: &[QualifiedName], rest: &str| format!("{} {rest}", tables(names.len()));

    let s = sorted;
    let choice = look.config.follow.without_identity;
    // FULL is of no use to a table that has a virtual column.
    let given = |table: &&QualifiedName| choice == WithoutIdentity::Full && !s.virtual_columns.contains(*table);
    let without: Vec<QualifiedName> = s.updated.iter().chain(&s.insert_only).cloned().collect();
    if choice == WithoutIdentity::Copy {
        say(COPIED_DIFFERENCES.on(side, what(&without, "without a replica identity")), &without);
    }
    let to_give: Vec<QualifiedName> = without.iter().filter(given).cloned().collect();
    say(GIVEN_IDENTITY.on(side, what(&to_give, "will be given REPLICA IDENTITY FULL")), &to_give);
    let watched = |names: &[QualifiedName]| -> Vec<QualifiedName> {
        let left = names.iter().filter(|table| choice != WithoutIdentity::Copy && !given(table));
        left.cloned().collect()
    };
    let (still_updated, still_insert_only) = (watched(&s.updated), watched(&s.insert_only));
    let updated = "without a replica identity, with updates or deletes seen (or not counted)";
    say(NO_REPLICA_IDENTITY.on(side, what(&still_updated, updated)).fix(full(&still_updated)), &still_updated);
    let inserts = "without a replica identity, with inserts only so far";
    say(INSERT_ONLY.on(side, what(&still_insert_only, inserts)).fix(full(&still_insert_only)), &still_insert_only);
    say(FULL_IDENTITY.on(side, what(&s.full, "with REPLICA IDENTITY FULL")), &s.full);
    say(
        DEFERRABLE_KEY.on(side, what(&s.deferrable, "with a deferrable primary key")).fix(full(&s.deferrable)),
        &s.deferrable,
    );
    say(NO_COLUMNS.on(side, what(&s.no_columns, "without columns")), &s.no_columns);
    found
}

/// The statement after which the table's updates and deletes can be followed.
fn give_identity(table: &QualifiedName, virtual_columns: &BTreeSet<QualifiedName>) -> String {
    if virtual_columns.contains(table) {
        format!(
            "ALTER TABLE {table} REPLICA IDENTITY DEFAULT, ADD PRIMARY KEY (…);  -- FULL is refused: a column is virtual"
        )
    } else {
        format!("ALTER TABLE {table} REPLICA IDENTITY FULL;")
    }
}

pub(super) async fn identifiers_as_data(look: &Look<'_>) -> Result<Vec<Finding>> {
    let mut columns = Vec::new();
    for (name, row) in look.in_scope(look.source.client.query(&local_identifiers(), &[]).await?)? {
        columns.push(format!("{}.{} {}", name.plain(), row.try_get::<_, String>(2)?, row.try_get::<_, String>(3)?));
    }
    if columns.is_empty() {
        return Ok(Vec::new());
    }
    let what = format!("{} columns hold identifiers of one server", columns.len());
    Ok(vec![LOCAL_IDENTIFIERS.on(look.source.side, what).objects(columns)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_immediate_key_identifies_rows_by_default() {
        assert_eq!(identified("d", Some(true), false), Identified::Well);
        assert_eq!(identified("d", Some(false), false), Identified::Not { deferrable: true });
        assert_eq!(identified("d", None, false), Identified::Not { deferrable: false });
    }

    #[test]
    fn a_chosen_index_must_still_be_there() {
        assert_eq!(identified("i", None, true), Identified::Well);
        assert_eq!(identified("i", Some(true), false), Identified::Not { deferrable: false });
        assert_eq!(identified("n", Some(true), true), Identified::Not { deferrable: false });
        assert_eq!(identified("f", Some(true), false), Identified::ByWholeRow);
    }
}
