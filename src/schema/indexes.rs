//! The indexes and keys of tables, as statements that can run as soon as a table's rows are in.
//!
//! pg_restore builds what an archive holds of them once all rows are in, and a primary key as one step during which nobody else may
//! touch the table. Here each index is a step of its own, also the one behind a key; a key is then declared over its index.
//! What is not built here is found missing by [`Restorer::after_data`](super::Restorer::after_data), and built by pg_restore from
//! the archive: exclusion constraints, keys of partitioned tables, indexes in a tablespace, and whatever was refused here.

use std::collections::{HashMap, HashSet};

use tokio_postgres::Row;

use super::Archive;
use super::existing::Existing;
use super::toc::{Entry, Step};
use crate::error::{Doing, Result};
use crate::postgres::catalog::IS_USER_TABLE;
use crate::postgres::{QualifiedName, Session, quote_identifier};

/// An index that a table of the target lacks, wholly or in part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Schema and name.
    pub name: QualifiedName,
    /// CREATE INDEX, with the marks of one that is behind no key, as one transaction: pg_restore makes them together, too, and asks no
    /// more for those of an index that is there. `None` if it is there, and only what follows is missing.
    pub create: Option<String>,
    /// What declares its key, with its marks, as one transaction. It needs the table for itself, for a moment.
    pub key: Option<String>,
    /// The same of both together, in fewer steps but with the table for itself all the time. `None` where one of them is there, or the index
    /// has what a key's declaration cannot tell.
    pub at_once: Option<String>,
}

/// What a table needs once its rows are in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Its indexes.
    pub indexes: Vec<Index>,
    /// Its statistics are gathered then. Not where statistics objects are still to come, or a partitioned table above it is
    /// gathered as a whole.
    pub analyze: bool,
    /// How large its indexes are on the source, in bytes.
    pub bytes: u64,
}

/// What can be told of an index in SQL, and what pg_dump writes down beside its definition. A key of the kind WITHOUT OVERLAPS has a
/// GiST index, over which no key can be declared.
fn definitions() -> String {
    format!(
        "SELECT n.nspname::text, c.relname::text, i.relname::text, pg_catalog.pg_get_indexdef(i.oid),
                k.contype::text, COALESCE(k.condeferrable, false), COALESCE(k.condeferred, false), x.indisclustered, x.indisreplident,
                ARRAY(SELECT pg_catalog.format('ALTER INDEX %I.%I ALTER COLUMN %s SET STATISTICS %s', n.nspname, i.relname, a.attnum, a.attstattarget)
                      FROM pg_catalog.pg_attribute a WHERE a.attrelid = i.oid AND a.attstattarget >= 0 ORDER BY a.attnum),
                pg_catalog.pg_relation_size(i.oid),
                CASE WHEN i.reloptions IS NULL THEN pg_catalog.pg_get_constraintdef(k.oid) END
         FROM pg_catalog.pg_index x
         JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
         JOIN pg_catalog.pg_class c ON c.oid = x.indrelid
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         JOIN pg_catalog.pg_am am ON am.oid = i.relam
         LEFT JOIN pg_catalog.pg_constraint k ON k.conindid = i.oid AND k.conrelid = c.oid AND k.contype IN ('p', 'u', 'x')
         WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND {IS_USER_TABLE}
           AND x.indisvalid AND i.reltablespace = 0
           AND (k.contype IS NULL OR k.contype <> 'x' AND am.amname = 'btree')
         ORDER BY 11 DESC, 3"
    )
}

/// Tables with statistics objects, partitions, and the partitioned tables above them.
const ANALYZED_LATER: &str = "
    SELECT n.nspname::text, c.relname::text
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'p'
       OR c.relkind = 'r' AND (c.relispartition OR EXISTS (SELECT FROM pg_catalog.pg_statistic_ext s WHERE s.stxrelid = c.oid))";

/// Indexes of the target.
const THERE: &str = "
    SELECT n.nspname::text, i.relname::text
    FROM pg_catalog.pg_class i JOIN pg_catalog.pg_namespace n ON n.oid = i.relnamespace WHERE i.relkind = 'i'";

/// An index of the source.
struct Definition {
    table: QualifiedName,
    index: Index,
    /// As `pg_restore --list` names it: kind and tag.
    listed: (&'static str, String),
    bytes: u64,
}

impl Definition {
    fn of(row: &Row) -> Result<Self> {
        let (schema, table, name): (String, String, String) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let kind: Option<String> = row.try_get(4)?;
        let listed = match kind {
            Some(_) => ("CONSTRAINT", format!("{table} {name}")),
            None => ("INDEX", name.clone()),
        };
        let (table, name) = (QualifiedName::new(&schema, table), QualifiedName::new(&schema, name));
        let mut marks: Vec<String> = row.try_get(9)?;
        if row.try_get(7)? {
            marks.push(format!("ALTER TABLE {table} CLUSTER ON {}", quote_identifier(&name.name)));
        }
        if row.try_get(8)? {
            marks.push(format!(
                "ALTER TABLE ONLY {table} REPLICA IDENTITY USING INDEX {}",
                quote_identifier(&name.name)
            ));
        }
        let definition: String = row.try_get(3)?;
        let with = |first: String| std::iter::once(first).chain(marks.iter().cloned()).collect::<Vec<_>>().join(";\n");
        let (create, key, at_once) = match kind {
            Some(kind) => {
                let declaration = declaration(&table, &name.name, &kind, row.try_get(5)?, row.try_get(6)?);
                let whole = row.try_get::<_, Option<String>>(11)?.map(|whole| with(added(&table, &name.name, &whole)));
                (definition, Some(with(declaration)), whole)
            }
            None => {
                let create = with(definition);
                (create.clone(), None, Some(create))
            }
        };
        let bytes = u64::try_from(row.try_get::<_, i64>(10)?).unwrap_or(0);
        Ok(Self { table, index: Index { name, create: Some(create), key, at_once }, listed, bytes })
    }
}

/// What each table of the archive needs that the target lacks, the largest index first.
///
/// # Errors
/// The connection's.
pub async fn missing(source: &Session, target: &Session, archive: &Archive) -> Result<HashMap<QualifiedName, Missing>> {
    let existing = Existing::read(target).await?;
    let entries = archive.contents.of(Step::AfterData);
    let wanted = entries.iter().filter(|entry| !existing.has(entry));
    let wanted: HashSet<(&str, &str, &str)> = wanted.filter_map(key).collect();
    let there = names(target, THERE, "listing the target's indexes").await?;
    let later = names(source, ANALYZED_LATER, "looking for statistics objects").await?;
    let mut missing: HashMap<QualifiedName, Missing> = HashMap::new();
    for entry in archive.contents.of(Step::BeforeData).iter().filter(|entry| entry.kind == "TABLE") {
        let Some(schema) = &entry.schema else { continue };
        let table = QualifiedName::new(schema, &entry.tag);
        let analyze = !later.contains(&table);
        missing.insert(table, Missing { analyze, ..Missing::default() });
    }
    for row in &source.query(&definitions(), &[]).await.doing(|| "listing the source's indexes")? {
        let Definition { table, mut index, listed: (kind, tag), bytes } = Definition::of(row)?;
        if !wanted.contains(&(kind, table.schema.as_str(), tag.as_str())) {
            continue;
        }
        if there.contains(&index.name) {
            (index.create, index.at_once) = (None, None);
        }
        if let Some(missing) = missing.get_mut(&table) {
            missing.indexes.push(index);
            missing.bytes += bytes;
        }
    }
    Ok(missing)
}

/// As `pg_restore --list` names them.
fn key(entry: &Entry) -> Option<(&str, &str, &str)> {
    matches!(entry.kind.as_str(), "INDEX" | "CONSTRAINT").then_some(())?;
    Some((&entry.kind, entry.schema.as_deref()?, &entry.tag))
}

/// Declares a key over an index that is there and has its name.
fn declaration(table: &QualifiedName, name: &str, kind: &str, deferrable: bool, deferred: bool) -> String {
    let kind = if kind == "p" { "PRIMARY KEY" } else { "UNIQUE" };
    let name = quote_identifier(name);
    let deferrable = if deferrable { " DEFERRABLE" } else { "" };
    let deferred = if deferred { " INITIALLY DEFERRED" } else { "" };
    format!("ALTER TABLE ONLY {table} ADD CONSTRAINT {name} {kind} USING INDEX {name}{deferrable}{deferred}")
}

/// Adds a key by its whole definition, with an index of its own.
fn added(table: &QualifiedName, name: &str, definition: &str) -> String {
    format!("ALTER TABLE ONLY {table} ADD CONSTRAINT {} {definition}", quote_identifier(name))
}

async fn names(session: &Session, sql: &str, doing: &'static str) -> Result<HashSet<QualifiedName>> {
    let rows = session.query(sql, &[]).await.doing(|| doing)?;
    rows.iter().map(|row| Ok(QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_declared_as_it_was() {
        let table = QualifiedName::new("s", "T");
        assert_eq!(
            declaration(&table, "k", "p", false, false),
            r#"ALTER TABLE ONLY "s"."T" ADD CONSTRAINT "k" PRIMARY KEY USING INDEX "k""#
        );
        assert!(
            declaration(&table, "k", "u", true, true)
                .ends_with(r#"UNIQUE USING INDEX "k" DEFERRABLE INITIALLY DEFERRED"#)
        );
    }
}
