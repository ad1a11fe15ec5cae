//! Whether a target holds what the source holds: for each table the number of its rows, and a hash over their texts that does
//! not depend on their order. Made by the servers, and by nothing of pgtandem's own.
//! After a copy also whether it has the same indexes and constraints.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use tokio_postgres::Client;

/// What makes a value's text depend on the value alone.
const PIN: &str = "
    SET datestyle = 'ISO, YMD'; SET intervalstyle = 'postgres'; SET timezone = 'UTC';
    SET extra_float_digits = 3; SET bytea_output = 'hex'; SET search_path = 'pg_catalog'";

/// Tables of the workload: not the system's, and not what a contender keeps for itself.
pub(crate) const TABLES: &str = "
    SELECT format('%I.%I', n.nspname, c.relname)
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname !~ '^pg_'
      AND n.nspname NOT IN ('information_schema', 'pgtandem', 'pgcopydb')
    ORDER BY 1";

/// The hash is a sum, so equal rows count as often as they are there.
const SUM: &str = "
    SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text FROM ONLY TABLE t";

/// Tables with their number of rows and their hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Content(BTreeMap<String, (i64, String)>);

impl Content {
    /// Reads all of a database.
    pub(crate) async fn of(client: &Client) -> Result<Self> {
        client.batch_execute(PIN).await.context("pinning settings")?;
        let tables = client.query(TABLES, &[]).await.context("listing tables")?;
        let mut found = BTreeMap::new();
        for row in tables {
            let table: String = row.try_get(0)?;
            let sum = client.query_one(&SUM.replace("TABLE", &table), &[]).await;
            let sum = sum.with_context(|| format!("summing up {table}"))?;
            found.insert(table, (sum.try_get(0)?, sum.try_get(1)?));
        }
        Ok(Self(found))
    }

    /// The rows of all tables together.
    pub(crate) fn rows(&self) -> i64 {
        self.0.values().map(|(rows, _)| rows).sum()
    }

    /// What differs on the target, a line each.
    pub(crate) fn differences(&self, target: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for (table, (rows, hash)) in &self.0 {
            match target.0.get(table) {
                None => found.push(format!("{table} is missing on the target")),
                Some((theirs, _)) if theirs != rows => {
                    found.push(format!("{table} has {rows} rows on the source, {theirs} on the target"));
                }
                Some((_, theirs)) if theirs != hash => found.push(format!("{table} has other rows on the target")),
                Some(_) => {}
            }
        }
        found.extend(
            target.0.keys().filter(|table| !self.0.contains_key(*table)).map(|t| format!("{t} is only on the target")),
        );
        found
    }
}

/// Indexes that are ready for use, and constraints. From 18 on NOT NULL is a constraint too, so the kinds are named.
const SHAPE: &str = "
    SELECT pg_get_indexdef(i.indexrelid)
    FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE i.indisvalid AND i.indisready AND n.nspname !~ '^pg_'
      AND n.nspname NOT IN ('information_schema', 'pgtandem', 'pgcopydb')
    UNION ALL
    SELECT format('constraint %I of %s %s', k.conname, k.conrelid::regclass, pg_get_constraintdef(k.oid))
    FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE k.contype IN ('p', 'u', 'f', 'x', 'c') AND n.nspname !~ '^pg_'
      AND n.nspname NOT IN ('information_schema', 'pgtandem', 'pgcopydb')";

/// How many of the indexes and constraints that differ are told.
const SHAPES_TOLD: usize = 5;

/// The indexes and constraints of a database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape(BTreeSet<String>);

impl Shape {
    pub(crate) async fn of(client: &Client) -> Result<Self> {
        client.batch_execute(PIN).await.context("pinning settings")?;
        let rows = client.query(SHAPE, &[]).await.context("listing indexes and constraints")?;
        Ok(Self(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?))
    }

    /// What differs on the target, a line each, the first few.
    pub(crate) fn differences(&self, target: &Self) -> Vec<String> {
        let missing = self.0.difference(&target.0).map(|shape| format!("missing on the target: {shape}"));
        let added = target.0.difference(&self.0).map(|shape| format!("only on the target: {shape}"));
        missing.chain(added).take(SHAPES_TOLD).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(tables: &[(&str, i64, &str)]) -> Content {
        Content(tables.iter().map(|(name, rows, hash)| ((*name).to_owned(), (*rows, (*hash).to_owned()))).collect())
    }

    #[test]
    fn every_difference_is_told() {
        let source = content(&[("a", 1, "1"), ("b", 2, "2"), ("c", 3, "3"), ("d", 4, "4")]);
        assert!(source.differences(&source).is_empty());
        let target = content(&[("a", 1, "1"), ("b", 1, "2"), ("c", 3, "0"), ("e", 0, "0")]);
        assert_eq!(
            source.differences(&target),
            [
                "b has 2 rows on the source, 1 on the target",
                "c has other rows on the target",
                "d is missing on the target",
                "e is only on the target"
            ]
        );
    }
}
