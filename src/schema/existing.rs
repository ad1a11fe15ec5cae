//! What the target already has, under the names that an archive's list uses, so that a repeated step builds only what
//! is missing.

use std::collections::HashSet;

use super::toc::Entry;
use crate::error::{Doing, Result};
use crate::postgres::{QualifiedName, Session};

/// Objects of the target by kind, schema and tag.
pub(super) struct Existing(HashSet<(String, Option<String>, String)>);

/// Line breaks in names read as spaces, as in the list. A schema of NULL is `-` there. An index counts only when it is
/// valid; the index of a partitioned table becomes valid with its last attached part, so it counts from the beginning.
const EXISTING: &str = r"
    WITH relation AS (
        SELECT c.oid, c.relkind, n.nspname::text AS schema, c.relname::text AS name
        FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast', 'pgtandem')
    ), found (kind, schema, tag) AS (
        SELECT CASE relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' WHEN 'S' THEN 'SEQUENCE'
                            WHEN 'f' THEN 'FOREIGN TABLE' ELSE 'TABLE' END, schema, name
        FROM relation WHERE relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
        UNION ALL
        SELECT 'INDEX', r.schema, r.name
        FROM relation r JOIN pg_catalog.pg_index i ON i.indexrelid = r.oid
        WHERE i.indisvalid OR r.relkind = 'I'
        UNION ALL
        SELECT CASE k.contype WHEN 'f' THEN 'FK CONSTRAINT' WHEN 'c' THEN 'CHECK CONSTRAINT' ELSE 'CONSTRAINT' END,
               r.schema, r.name || ' ' || k.conname
        FROM relation r JOIN pg_catalog.pg_constraint k ON k.conrelid = r.oid
        UNION ALL
        SELECT 'CHECK CONSTRAINT', n.nspname, t.typname || ' ' || k.conname
        FROM pg_catalog.pg_constraint k
        JOIN pg_catalog.pg_type t ON t.oid = k.contypid
        JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
        UNION ALL
        SELECT 'TRIGGER', r.schema, r.name || ' ' || g.tgname
        FROM relation r JOIN pg_catalog.pg_trigger g ON g.tgrelid = r.oid
        UNION ALL
        SELECT 'RULE', r.schema, r.name || ' ' || w.rulename
        FROM relation r JOIN pg_catalog.pg_rewrite w ON w.ev_class = r.oid
        WHERE w.rulename <> '_RETURN'
        UNION ALL
        SELECT 'POLICY', r.schema, r.name || ' ' || p.polname
        FROM relation r JOIN pg_catalog.pg_policy p ON p.polrelid = r.oid
        UNION ALL
        SELECT 'STATISTICS', n.nspname, s.stxname
        FROM pg_catalog.pg_statistic_ext s JOIN pg_catalog.pg_namespace n ON n.oid = s.stxnamespace
        UNION ALL
        SELECT 'EVENT TRIGGER', NULL, evtname FROM pg_catalog.pg_event_trigger
        UNION ALL
        SELECT 'SCHEMA', NULL, nspname FROM pg_catalog.pg_namespace
        UNION ALL
        SELECT CASE p.prokind WHEN 'p' THEN 'PROCEDURE' WHEN 'a' THEN 'AGGREGATE' ELSE 'FUNCTION' END, n.nspname,
               p.proname || '(' || COALESCE((
                   SELECT string_agg(pg_catalog.format_type(a.type, NULL), ', ' ORDER BY a.at)
                   FROM unnest(p.proargtypes::oid[]) WITH ORDINALITY a (type, at)), '') || ')'
        FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname NOT IN ('pg_catalog', 'information_schema')
        UNION ALL
        SELECT CASE t.typtype WHEN 'd' THEN 'DOMAIN' ELSE 'TYPE' END, n.nspname, t.typname
        FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
        WHERE t.typtype IN ('d', 'e', 'c', 'b', 'r') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
    )
    SELECT kind, translate(schema, E'\n\r', '  '), translate(tag, E'\n\r', '  ') FROM found";

/// `$1`: schemas, `$2`: names of indexes. Those that a killed build left behind; a partitioned one is never.
const INVALID_INDEXES: &str = r"
    SELECT n.nspname, c.relname
    FROM pg_catalog.pg_index i
    JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid AND c.relkind = 'i'
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    JOIN unnest($1::text[], $2::text[]) AS ours (schema, name) ON ours.schema = n.nspname AND ours.name = c.relname
    WHERE NOT i.indisvalid";

impl Existing {
    pub(super) async fn read(target: &Session) -> Result<Self> {
        let rows = target.query(EXISTING, &[]).await.doing(|| "listing what the target has")?;
        let keys = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?)));
        Ok(Self(keys.collect::<Result<_>>()?))
    }

    pub(super) fn has(&self, entry: &Entry) -> bool {
        self.0.contains(&(entry.kind.clone(), entry.schema.clone(), entry.tag.clone()))
    }
}

/// Whether finding the entry on the target proves that a restore was here. Schemas and extensions may be older.
pub(super) fn is_proof(entry: &Entry) -> bool {
    matches!(
        entry.kind.as_str(),
        "TABLE"
            | "VIEW"
            | "MATERIALIZED VIEW"
            | "SEQUENCE"
            | "FOREIGN TABLE"
            | "FUNCTION"
            | "PROCEDURE"
            | "DOMAIN"
            | "TYPE"
    )
}

/// Indexes among `entries` that are there but not valid.
pub(super) async fn invalid_indexes(target: &Session, entries: &[Entry]) -> Result<Vec<QualifiedName>> {
    let indexes = || entries.iter().filter(|entry| entry.kind == "INDEX");
    let schemas: Vec<_> = indexes().filter_map(|entry| entry.schema.clone()).collect();
    let names: Vec<_> = indexes().filter(|entry| entry.schema.is_some()).map(|entry| entry.tag.clone()).collect();
    let rows = target.query(INVALID_INDEXES, &[&schemas, &names]).await.doing(|| "looking for invalid indexes")?;
    rows.iter().map(|row| Ok(QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? })).collect()
}
