//! Both sides row for row, as of the switch.
//!
//! Each table is reduced on its server to a count and two sums over the halves of the MD5 of every row's text, which does not depend on
//! the order of the rows; the settings that decide how values print are pinned. Where these differ, the rows
//! that only one side has are found by their MD5 and shown. Sequences and the definitions around the tables are compared too.
//!
//! Promises: reads only, and only through the sessions it is given.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::pin::pin;

use futures_util::TryStreamExt;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

use super::switch::Held;
use crate::error::{Doing, Result};
use crate::postgres::{QualifiedName, quote_literal};

/// Schemas that are not the application's.
const FOREIGN_SCHEMAS: &str =
    "n.nspname NOT IN ('pg_catalog', 'information_schema', 'pgtandem') AND n.nspname NOT LIKE 'pg\\_%'";

/// How many differing rows of a table are shown for each side.
const SHOWN: usize = 3;

/// How much of a differing row is shown, in characters.
const SHOWN_WIDTH: usize = 160;

/// Where a sequence stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SequenceState {
    /// Its name.
    pub name: QualifiedName,
    /// The last value given out, or the first one to be.
    pub last_value: i64,
    /// Whether `last_value` was given out.
    pub is_called: bool,
}

/// A table on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableComparison {
    /// Its name.
    pub name: QualifiedName,
    /// Rows on the source; `None`: there is no such table.
    pub source_rows: Option<u64>,
    /// Rows on the target.
    pub target_rows: Option<u64>,
    /// Whether every row is the same.
    pub equal: bool,
    /// The first rows that only one side has, each with its side.
    pub differences: Vec<String>,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Every table and materialized view of either side.
    pub tables: Vec<TableComparison>,
    /// How many sequences both sides have.
    pub sequences: usize,
    /// One line for each sequence that differs.
    pub different_sequences: Vec<String>,
    /// How many definitions (indexes, constraints, triggers, views, functions) the source has.
    pub definitions: usize,
    /// One line for each definition that only one side has.
    pub different_definitions: Vec<String>,
}

impl Comparison {
    /// Whether nothing differs.
    #[must_use]
    pub fn equal(&self) -> bool {
        self.tables.iter().all(|table| table.equal)
            && self.different_sequences.is_empty()
            && self.different_definitions.is_empty()
    }

    /// Rows compared.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.tables.iter().filter_map(|table| table.source_rows).sum()
    }
}

/// Compares what was held on both sides. `each` hears of every table as it is done.
///
/// # Errors
/// A side cannot be read.
pub async fn compare(source: &Held, target: &Held, mut each: impl FnMut(&TableComparison)) -> Result<Comparison> {
    let (on_source, on_target) = tokio::try_join!(tables(&source.client), tables(&target.client))?;
    let mut comparison = Comparison::default();
    for name in on_source.union(&on_target) {
        let both =
            (on_source.contains(name).then_some(&source.client), on_target.contains(name).then_some(&target.client));
        let table = compare_table(name, both).await.doing(|| format!("comparing {}", name.plain()))?;
        each(&table);
        comparison.tables.push(table);
    }
    comparison.sequences = source.sequences.len();
    comparison.different_sequences = only_one_side(&source.sequences, &target.sequences);
    let (definitions, theirs) = tokio::try_join!(definitions(&source.client), definitions(&target.client))?;
    comparison.definitions = definitions.len();
    comparison.different_definitions = only_one_side(&definitions, &theirs);
    Ok(comparison)
}

async fn compare_table(name: &QualifiedName, both: (Option<&Client>, Option<&Client>)) -> Result<TableComparison> {
    let (Some(source), Some(target)) = both else {
        let count = async |client: Option<&Client>| match client {
            Some(client) => digest(client, name).await.map(|digest| Some(digest.rows)),
            None => Ok(None),
        };
        return Ok(TableComparison {
            name: name.clone(),
            source_rows: count(both.0).await?,
            target_rows: count(both.1).await?,
            equal: false,
            differences: vec![format!(
                "only the {} has this table",
                if both.0.is_some() { "source" } else { "target" }
            )],
        });
    };
    let (on_source, on_target) = tokio::try_join!(digest(source, name), digest(target, name))?;
    let equal = on_source == on_target;
    Ok(TableComparison {
        name: name.clone(),
        source_rows: Some(on_source.rows),
        target_rows: Some(on_target.rows),
        equal,
        differences: if equal { Vec::new() } else { differing_rows(source, target, name).await? },
    })
}

/// A whole table in three numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Digest {
    rows: u64,
    /// Both sums, as the server prints numerics.
    sums: String,
}

async fn digest(client: &Client, table: &QualifiedName) -> Result<Digest> {
    let sql = format!(
        "SELECT count(*),
             concat(sum(('x' || left(md5, 16))::bit(64)::bigint), ' ', sum(('x' || right(md5, 16))::bit(64)::bigint))
         FROM (SELECT md5(t::text) FROM {table} t) AS each (md5)"
    );
    let row = client.query_one(&sql, &[]).await?;
    Ok(Digest { rows: u64::try_from(row.try_get::<_, i64>(0)?).unwrap_or(0), sums: row.try_get(1)? })
}

/// The first rows of either side that the other does not have, or not as often.
async fn differing_rows(source: &Client, target: &Client, table: &QualifiedName) -> Result<Vec<String>> {
    let mut balance: HashMap<String, i64> = HashMap::new();
    for (client, weight) in [(source, 1), (target, -1)] {
        let rows = client.query_raw(&format!("SELECT md5(t::text) FROM {table} t"), std::iter::empty::<&str>()).await?;
        let mut rows = pin!(rows);
        while let Some(row) = rows.try_next().await? {
            *balance.entry(row.try_get(0)?).or_default() += weight;
        }
    }
    let mut shown = Vec::new();
    for (client, side, sign) in [(source, "source", 1), (target, "target", -1)] {
        let mut only_here: Vec<&str> =
            balance.iter().filter(|(_, count)| **count * sign > 0).map(|(md5, _)| md5.as_str()).collect();
        only_here.sort_unstable();
        let total = only_here.len();
        only_here.truncate(SHOWN);
        let sql = format!("SELECT t::text FROM {table} t WHERE md5(t::text) = ANY ($1) ORDER BY 1");
        for row in client.query(&sql, &[&only_here as &(dyn ToSql + Sync)]).await? {
            shown.push(format!("only on the {side}: {}", shortened(row.try_get(0)?)));
        }
        if total > SHOWN {
            shown.push(format!("only on the {side}: {} more", total - SHOWN));
        }
    }
    Ok(shown)
}

/// Tables, partitioned ones as a whole, and materialized views.
async fn tables(client: &Client) -> Result<BTreeSet<QualifiedName>> {
    let sql = format!(
        "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind IN ('r', 'p', 'm') AND NOT c.relispartition AND {FOREIGN_SCHEMAS}"
    );
    let rows = client.query(&sql, &[]).await.doing(|| "listing tables")?;
    rows.iter().map(name_of).collect()
}

/// Every sequence of the application and where it stands. Not covered by a snapshot: it is read as it is now.
///
/// # Errors
/// The connection's.
pub async fn read_sequences(client: &Client) -> Result<Vec<SequenceState>> {
    let sql = format!(
        "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind = 'S' AND {FOREIGN_SCHEMAS} ORDER BY 1, 2"
    );
    let names: Vec<QualifiedName> = client.query(&sql, &[]).await?.iter().map(name_of).collect::<Result<_>>()?;
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let each: Vec<String> = names
        .iter()
        .map(|name| {
            let (schema, bare) = (quote_literal(&name.schema), quote_literal(&name.name));
            format!("SELECT {schema}::text, {bare}::text, last_value, is_called FROM {name}")
        })
        .collect();
    let rows = client.query(&each.join(" UNION ALL "), &[]).await?;
    let mut states: Vec<SequenceState> = rows
        .iter()
        .map(|row| Ok(SequenceState { name: name_of(row)?, last_value: row.try_get(2)?, is_called: row.try_get(3)? }))
        .collect::<Result<_>>()?;
    states.sort();
    Ok(states)
}

/// Indexes, constraints, triggers, views and functions, each as one line that must be the same on both sides. What a
/// move adds for its own use is left out: it all bears its name.
async fn definitions(client: &Client) -> Result<Vec<String>> {
    let sql = format!(
        "SELECT format('index %I.%I', n.nspname, c.relname) FROM pg_catalog.pg_class c
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('i', 'I') AND {FOREIGN_SCHEMAS}
         UNION ALL
         SELECT format('view %I.%I', n.nspname, c.relname) FROM pg_catalog.pg_class c
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'v' AND {FOREIGN_SCHEMAS}
         UNION ALL
         SELECT format('constraint %I on %I.%I%s', o.conname, n.nspname, c.relname, CASE WHEN NOT o.convalidated THEN ', not valid' END)
             FROM pg_catalog.pg_constraint o JOIN pg_catalog.pg_class c ON c.oid = o.conrelid
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE o.contype <> 'n' AND {FOREIGN_SCHEMAS}
         UNION ALL
         SELECT format('trigger %I on %I.%I%s', t.tgname, n.nspname, c.relname, CASE WHEN t.tgenabled = 'D' THEN ', disabled' END)
             FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE NOT t.tgisinternal AND t.tgname NOT LIKE 'pgtandem%' AND {FOREIGN_SCHEMAS}
         UNION ALL
         SELECT format('function %I.%I', n.nspname, p.proname) FROM pg_catalog.pg_proc p
             JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace WHERE p.proname NOT LIKE 'pgtandem%' AND {FOREIGN_SCHEMAS}
         ORDER BY 1"
    );
    let rows = client.query(&sql, &[]).await.doing(|| "listing definitions")?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

fn name_of(row: &tokio_postgres::Row) -> Result<QualifiedName> {
    Ok(QualifiedName::new(row.try_get::<_, String>(0)?, row.try_get::<_, String>(1)?))
}

/// One line for each entry that only one side has.
fn only_one_side<T: Ord + fmt::Display>(source: &[T], target: &[T]) -> Vec<String> {
    let (source, target): (BTreeSet<&T>, BTreeSet<&T>) = (source.iter().collect(), target.iter().collect());
    let here = source.difference(&target).map(|entry| format!("only on the source: {entry}"));
    let there = target.difference(&source).map(|entry| format!("only on the target: {entry}"));
    here.chain(there).collect()
}

fn shortened(row: String) -> String {
    match row.char_indices().nth(SHOWN_WIDTH) {
        Some((at, _)) => format!("{}…", &row[..at]),
        None => row,
    }
}

impl fmt::Display for SequenceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let called = if self.is_called { "given out" } else { "next" };
        write!(f, "sequence {} at {}, {called}", self.name, self.last_value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_one_side_has_is_named() {
        assert_eq!(only_one_side(&["a", "b"], &["b", "a"]), Vec::<String>::new());
        assert_eq!(only_one_side(&["a", "b"], &["b", "c"]), ["only on the source: a", "only on the target: c"]);
    }

    #[test]
    fn a_long_row_is_cut_between_characters() {
        assert_eq!(shortened("short".into()), "short");
        assert_eq!(shortened("ä".repeat(500)).chars().count(), SHOWN_WIDTH + 1);
    }
}
