//! The proof that two databases hold the same: every user table as a multiset of rows, every sequence.
//!
//! Independent of the product's own verification on purpose. Rows are compared as the server prints them,
//! under pinned settings, column by column in the order of their names. A table is first summed up by two 64-bit hashes of
//! each row on the server; only where those differ are the rows fetched, to show which.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tokio_postgres::Client;

use super::database::{Database, rows};

/// What makes a value's text depend on the value alone; and one snapshot for all tables.
const PIN: &str = "
    set datestyle = 'ISO, YMD';
    set intervalstyle = 'postgres';
    set timezone = 'UTC';
    set extra_float_digits = 3;
    set bytea_output = 'hex';
    set search_path = 'pg_catalog';
    set row_security = off;
    set statement_timeout = 0;
    begin isolation level repeatable read read only";

/// Relations of these kinds that are the user's: not the system's, not an extension's, not pgtandem's own state.
/// A partition is seen through its root, so that both sides may be partitioned differently.
const RELATIONS: &str = "
    select format('%I.%I', n.nspname, c.relname)
      from pg_class c join pg_namespace n on n.oid = c.relnamespace
     where c.relkind in (KINDS) and not c.relispartition and c.relpersistence <> 't'
       and n.nspname <> 'information_schema' and n.nspname <> 'pgtandem' and n.nspname !~ '^pg_'
       and not exists (select from pg_depend d
                        where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')";

/// Always quoted: which names need quotes differs from version to version.
const COLUMNS: &str = "
    select '\"' || replace(attname, '\"', '\"\"') || '\"' from pg_attribute
     where attrelid = 'TABLE'::regclass and attnum > 0 and not attisdropped
     order by attname collate \"C\"";

/// How many rows of a table that differs are shown for each side.
const SHOWN: usize = 5;

/// Panics with every difference in tables and sequences.
pub async fn assert_same(source: &Database, target: &Database) {
    let found = differences(source, target).await;
    assert!(found.is_empty(), "source and target differ:\n{}", found.join("\n"));
}

/// Every difference, a line or a few each; none where both sides hold the same.
pub async fn differences(source: &Database, target: &Database) -> Vec<String> {
    let (source, target) = (Side::open(source).await, Side::open(target).await);
    let mut found = Vec::new();
    let (ours, theirs) = (source.relations("'r', 'p'").await, target.relations("'r', 'p'").await);
    found.extend(one_sided("table", &ours, &theirs));
    for table in ours.intersection(&theirs) {
        found.extend(compare_table(&source, &target, table).await);
    }
    found.extend(compare_sequences(&source, &target).await);
    found
}

fn one_sided(kind: &str, source: &BTreeSet<String>, target: &BTreeSet<String>) -> Vec<String> {
    let missing = source.difference(target).map(|name| format!("{kind} {name} is missing on the target"));
    let extra = target.difference(source).map(|name| format!("{kind} {name} is only on the target"));
    missing.chain(extra).collect()
}

async fn compare_table(source: &Side, target: &Side, table: &str) -> Option<String> {
    let (ours, theirs) = (source.columns(table).await, target.columns(table).await);
    if ours != theirs {
        return Some(format!("table {table} has columns {ours:?} on the source, {theirs:?} on the target"));
    }
    let (ours, theirs) = (source.sum(table).await, target.sum(table).await);
    if ours == theirs {
        return None;
    }
    let (missing, extra) = multiset_difference(source.rows(table).await, target.rows(table).await);
    let show = |side: &str, rows: &[String]| {
        rows.iter().take(SHOWN).map(|row| format!("\n  only on the {side}: {row}")).collect::<String>()
    };
    // Equal texts with different hashes: the servers' encodings differ.
    (!missing.is_empty() || !extra.is_empty()).then(|| {
        format!(
            "table {table}: {} rows only on the source, {} only on the target{}{}",
            missing.len(),
            extra.len(),
            show("source", &missing),
            show("target", &extra)
        )
    })
}

/// The rows that one side has more often than the other, sorted.
fn multiset_difference(source: Vec<String>, target: Vec<String>) -> (Vec<String>, Vec<String>) {
    let mut surplus: HashMap<String, i64> = HashMap::new();
    source.into_iter().for_each(|row| *surplus.entry(row).or_default() += 1);
    target.into_iter().for_each(|row| *surplus.entry(row).or_default() -= 1);
    let (mut missing, mut extra) = (Vec::new(), Vec::new());
    for (row, count) in surplus {
        let side = if count > 0 { &mut missing } else { &mut extra };
        side.extend((0..count.abs()).map(|_| row.clone()));
    }
    missing.sort();
    extra.sort();
    (missing, extra)
}

async fn compare_sequences(source: &Side, target: &Side) -> Vec<String> {
    let (ours, theirs) = (source.sequences().await, target.sequences().await);
    let mut found = one_sided("sequence", &ours.keys().cloned().collect(), &theirs.keys().cloned().collect());
    for (name, ours) in &ours {
        match theirs.get(name) {
            Some(theirs) if theirs != ours => {
                found.push(format!(
                    "sequence {name}: (last_value|is_called) {ours} on the source, {theirs} on the target"
                ));
            }
            _ => {}
        }
    }
    found
}

/// One database, in one snapshot.
struct Side(Client);

impl Side {
    async fn open(database: &Database) -> Self {
        let client = database.connect().await;
        client.batch_execute(PIN).await.expect("pin the settings");
        Self(client)
    }

    async fn relations(&self, kinds: &str) -> BTreeSet<String> {
        rows(&self.0, &RELATIONS.replace("KINDS", kinds)).await.into_iter().collect()
    }

    async fn columns(&self, table: &str) -> Vec<String> {
        rows(&self.0, &COLUMNS.replace("TABLE", &table.replace('\'', "''"))).await
    }

    async fn sum(&self, table: &str) -> Vec<String> {
        let all = self.select_rows(table).await;
        let sum = format!(
            "select count(*), sum(hashtextextended(r, 0)::numeric), sum(hashtextextended(r, 1)::numeric) from ({all}) s"
        );
        rows(&self.0, &sum).await
    }

    async fn rows(&self, table: &str) -> Vec<String> {
        rows(&self.0, &self.select_rows(table).await).await
    }

    /// One text a row; ONLY for a plain table, since those that inherit from it are tables of their own here.
    async fn select_rows(&self, table: &str) -> String {
        let columns =
            self.columns(table).await.iter().map(|name| format!("{name}::text")).collect::<Vec<_>>().join(", ");
        let kind = format!("select relkind from pg_class where oid = '{}'::regclass", table.replace('\'', "''"));
        let only = if rows(&self.0, &kind).await == ["r"] { "only" } else { "" };
        format!("select row({columns})::text collate \"C\" as r from {only} {table}")
    }

    async fn sequences(&self) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        for name in self.relations("'S'").await {
            let position = rows(&self.0, &format!("select last_value, is_called from {name}")).await.join("");
            found.insert(name, position);
        }
        found
    }
}
