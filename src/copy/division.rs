//! How a large table is divided into ranges that the source can read one by one.
//!
//! From PostgreSQL 14 on a range of a heap's blocks is read without a look at the others. Before, and where a table is stored in a way that
//! cannot do this, an index finds some of the rows: there, the values of the first column of the primary key (or else of the replica
//! identity's index) are divided into *shares* of about as many rows each.
//!
//! # Why each row is in one range
//!
//! Of blocks: it stands in one. Of shares: each begins where the one before it ends, the first one has no beginning and the last one no end;
//! this holds for any bounds that ascend. They are taken from a sample of the table as the cut shows it, and are written down when the table
//! is opened: units of different runs are ranges of the same shares. Only such types are divided whose values print the same for ever and
//! whose order no library decides, so that neither a bound nor the index can come to mean something else.
//!
//! That the index finds each row is trusted, as the source's own queries do. Rows that a damaged index has lost are missed; only a
//! comparison of all rows tells that, for a count may go by the same index.
//!
//! # Why not always as many shares as units
//!
//! Where rows do not lie in the order of the key, each block holds rows of many shares, and is read for each of them. The sample tells for
//! how many. Neighbours are made one share, two and two, until the table is read about twice at most.

use std::collections::HashMap;

use super::plan::{self, Splitting};
use super::{Context, blockers, statements, version};
use crate::error::{Doing, Error, Result};
use crate::postgres::catalog::Table;
use crate::postgres::{Session, quote_identifier, quote_literal};
use crate::state::Begun;

/// Some places of a table that follow one another: blocks of its heap, or shares of its key. The last range has no end, so that what comes
/// to the table behind it is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first place.
    pub from: u64,
    /// The first place that is not in it any more.
    pub to: Option<u64>,
}

/// What ranges of a table are ranges of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Division {
    /// The blocks of its heap.
    Blocks,
    /// Shares of its key.
    Key(Shares),
}

/// The values of a column that holds no NULL, divided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares {
    key: Key,
    /// Where each share begins, but for the first one.
    bounds: Vec<String>,
}

/// A column by which an index finds ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    column: String,
    /// `format_type`
    type_name: String,
}

/// `$1`: oids of tables. The first column of an index that holds each of their rows, in the order of its type. 950 and 951 are the collations
/// C and POSIX, 100 is the database's. Which column it is must stay the same for tables of one shape, see [`super::survey`].
const KEYS: &str = "
    SELECT DISTINCT ON (i.indrelid) i.indrelid, a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod)
    FROM pg_catalog.pg_index i
    JOIN pg_catalog.pg_attribute a
      ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] AND a.attnotnull AND a.attcollation = i.indcollation[0]
    JOIN pg_catalog.pg_type t ON t.oid = a.atttypid AND t.oid < 16384
     AND t.typname IN ('int2', 'int4', 'int8', 'numeric', 'uuid', 'date', 'timestamp', 'timestamptz', 'bytea', 'text', 'varchar', 'bpchar')
    JOIN pg_catalog.pg_opclass oc ON oc.oid = i.indclass[0] AND oc.opcdefault
    JOIN pg_catalog.pg_am am ON am.oid = oc.opcmethod AND am.amname = 'btree'
    WHERE i.indrelid = ANY ($1) AND (i.indisprimary OR i.indisreplident) AND i.indisvalid
      AND (i.indcollation[0] IN (0, 950, 951) OR i.indcollation[0] = 100 AND (
          SELECT d.datcollate IN ('C', 'POSIX') AND COALESCE(pg_catalog.to_jsonb(d) ->> 'datlocprovider', 'c') = 'c'
          FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()))
      -- From 18 on such a column may hold NULL where it did before, and counts as one that does not.
      AND NOT EXISTS (
          SELECT FROM pg_catalog.pg_constraint n
          WHERE n.conrelid = i.indrelid AND n.contype = 'n' AND NOT n.convalidated AND a.attnum = ANY (n.conkey))
    ORDER BY i.indrelid, i.indisprimary DESC";

/// `$1`: oids of tables. Those that are no heap.
const NO_HEAPS: &str = "SELECT c.oid FROM pg_catalog.pg_class c WHERE c.oid = ANY ($1) AND c.relam <> 2";

/// So many blocks are looked at for each share, if there are that many.
const BLOCKS_A_SHARE: u64 = 4;

/// So many are looked at for a table.
const MOST_BLOCKS: u64 = 10_000;

impl Division {
    /// How many places there are; `blocks` in the heap.
    pub(super) fn places(&self, blocks: u64) -> u64 {
        match self {
            Self::Blocks => blocks,
            Self::Key(shares) => shares.bounds.len() as u64 + 1,
        }
    }

    /// Where shares begin, but for the first one.
    pub(super) fn bounds(&self) -> Option<&[String]> {
        match self {
            Self::Blocks => None,
            Self::Key(shares) => Some(&shares.bounds),
        }
    }

    /// A condition: a row stands in one of these ranges. `alias` is empty, or the table's alias with its dot.
    pub(super) fn within(&self, alias: &str, ranges: &[Range]) -> String {
        let one = |range: &Range| match self {
            Self::Blocks => in_blocks(alias, *range),
            Self::Key(shares) => shares.within(alias, *range),
        };
        match ranges {
            [range] => one(range),
            _ => ranges.iter().map(|range| format!("({})", one(range))).collect::<Vec<_>>().join(" OR "),
        }
    }
}

fn in_blocks(alias: &str, range: Range) -> String {
    let from = format!("{alias}ctid >= '({},0)'::pg_catalog.tid", range.from);
    let to = range.to.map(|to| format!(" AND {alias}ctid < '({to},0)'::pg_catalog.tid")).unwrap_or_default();
    format!("{from}{to}")
}

impl Shares {
    #[cfg(test)]
    pub(super) fn new(column: &str, type_name: &str, bounds: &[&str]) -> Self {
        let key = Key { column: column.to_owned(), type_name: type_name.to_owned() };
        Self { key, bounds: bounds.iter().map(|&bound| bound.to_owned()).collect() }
    }

    fn within(&self, alias: &str, range: Range) -> String {
        let compare = |operator: &str, place: u64| {
            let bound = self.bounds.get(usize::try_from(place).ok()?.checked_sub(1)?)?;
            let Key { column, type_name } = &self.key;
            let (column, bound) = (quote_identifier(column), quote_literal(bound));
            Some(format!("{alias}{column} OPERATOR(pg_catalog.{operator}) {bound}::{type_name}"))
        };
        let from = compare(">=", range.from);
        if from.is_none() && range.from > 0 {
            // Behind the last share is nothing.
            return "false".to_owned();
        }
        match (from, range.to.and_then(|to| compare("<", to))) {
            (None, None) => "true".to_owned(),
            (Some(one), None) | (None, Some(one)) => one,
            (Some(from), Some(to)) => format!("{from} AND {to}"),
        }
    }
}

/// Finds how each of these tables is divided; those that cannot be are left out. One of which units are there stays divided as it was. The
/// session is in the transaction of the cut, and its process id is `pid`; nothing stays locked.
///
/// # Errors
/// The connection's.
pub(super) async fn find(
    context: &Context,
    (session, pid): (&Session, i32),
    splitting: Splitting,
    wanted: &[(&Table, Option<&Begun>)],
) -> Result<HashMap<u32, Division>> {
    let mut divisions = HashMap::new();
    if wanted.is_empty() {
        return Ok(divisions);
    }
    let version = version(session).await?;
    let oids: Vec<u32> = wanted.iter().map(|(table, _)| table.oid).collect();
    let no_heaps = session.query(NO_HEAPS, &[&oids]).await.doing(|| "looking how tables are stored")?;
    let no_heaps: Vec<u32> = no_heaps.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    let is_plain = |table: &Table| version >= 140_000 && !no_heaps.contains(&table.oid);
    // Most sources have plain tables only, and are asked nothing more.
    let others = wanted.iter().filter(|(table, _)| !is_plain(table)).map(|(table, _)| table.oid);
    let mut keys = keys(session, others.collect()).await?;
    for &(table, begun) in wanted {
        let key = keys.remove(&table.oid);
        let division = match begun {
            Some(Begun { bounds: None, .. }) => Some(Division::Blocks),
            Some(Begun { bounds: Some(bounds), .. }) => key.map(|key| by_key(key, bounds.clone())),
            // What is there of it is of another shape, and it is small by now.
            None if table.bytes <= splitting.above => None,
            None if is_plain(table) => Some(Division::Blocks),
            None => {
                let what = format!("looking how {} can be read", table.name.plain());
                context.telemetry.activity(&what);
                let looking = look(session, version, splitting, table, key);
                let division = blockers::explained(&context.source, pid, &what, &context.telemetry, looking).await;
                division.doing(|| what)?
            }
        };
        divisions.extend(division.map(|division| (table.oid, division)));
    }
    Ok(divisions)
}

fn by_key(key: Key, bounds: Vec<String>) -> Division {
    Division::Key(Shares { key, bounds })
}

async fn look(
    session: &Session,
    version: i32,
    splitting: Splitting,
    table: &Table,
    key: Option<Key>,
) -> Result<Option<Division>> {
    if version >= 140_000 && reads_ranges_of_blocks(session, table).await? {
        return Ok(Some(Division::Blocks));
    }
    let Some(key) = key else { return Ok(without("no key of it can be divided", table)) };
    let sampled = session.query_one(&sample_sql(table, &key, splitting), &[]).await;
    session.batch_execute(statements::RELEASE).await?;
    let sample = match sampled.map_err(Error::from).and_then(|row| Sample::of(&row)) {
        Ok(sample) => sample,
        Err(error) => return Ok(without(&format!("no sample of it can be taken ({error})"), table)),
    };
    let bounds = sample.bounds(table);
    if bounds.is_empty() {
        return Ok(without("its key has one value, or a sample of it shows no more", table));
    }
    tracing::debug!(table = %table.name.plain(), shares = bounds.len() + 1, "divided by its key");
    Ok(Some(by_key(key, bounds)))
}

fn without<T>(why: &str, table: &Table) -> Option<T> {
    tracing::info!(
        table = %table.name.plain(),
        "the source cannot read blocks of this table alone, and {why}: one worker copies it, in one transaction"
    );
    None
}

/// Asks the planner about a table that is no heap.
async fn reads_ranges_of_blocks(session: &Session, table: &Table) -> Result<bool> {
    let one_block = Division::Blocks.within("", &[Range { from: 0, to: Some(1) }]);
    let sql = format!("EXPLAIN (COSTS OFF) SELECT FROM ONLY {} WHERE {one_block}", table.name);
    let plan = session.query(&sql, &[]).await;
    session.batch_execute(statements::RELEASE).await?;
    let Some(line) = plan.ok().and_then(|plan| plan.first()?.try_get::<_, String>(0).ok()) else { return Ok(false) };
    Ok(line.starts_with("Tid Range Scan"))
}

async fn keys(session: &Session, oids: Vec<u32>) -> Result<HashMap<u32, Key>> {
    if oids.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = session.query(KEYS, &[&oids]).await.doing(|| "looking for keys that tell ranges of rows")?;
    let one =
        |row: &tokio_postgres::Row| Ok((row.try_get(0)?, Key { column: row.try_get(1)?, type_name: row.try_get(2)? }));
    rows.iter().map(one).collect()
}

/// What a sample tells of a table that is divided into shares.
#[derive(Debug)]
struct Sample {
    /// The first value of each share.
    begins: Vec<String>,
    /// If 2^`k` neighbours are one share: of how many shares a block holds rows, on average.
    held: Vec<f64>,
    /// How many blocks were looked at.
    blocks: f64,
}

/// Asks for a [`Sample`] of shares that are no larger than units; of a power of two, so that all stay of one size when they are made fewer.
fn sample_sql(table: &Table, key: &Key, splitting: Splitting) -> String {
    let shares = plan::parts(table.bytes, splitting.above).next_power_of_two().min(plan::MOST_PARTS);
    let blocks = (shares * BLOCKS_A_SHARE).min(MOST_BLOCKS) * splitting.block_size;
    // Of numbers above 2^53 the quotient is good enough, too.
    #[expect(clippy::cast_precision_loss)]
    let percent = (100.0 * blocks as f64 / table.heap_bytes.max(1) as f64).clamp(0.0001, 100.0);
    format!(
        "WITH sample AS MATERIALIZED (
             SELECT {column} AS key, (ctid::text::point)[0]::int8 AS block,
                    pg_catalog.ntile({shares}) OVER (ORDER BY {column}, ctid) - 1 AS share
             FROM ONLY {} TABLESAMPLE SYSTEM ({percent}) REPEATABLE (0)),
         begins AS (SELECT DISTINCT ON (share) share, sample.key::text AS first FROM sample ORDER BY share, sample.key),
         blocks AS (SELECT DISTINCT block, share FROM sample),
         steps AS (SELECT share, pg_catalog.lag(share) OVER (PARTITION BY block ORDER BY share) AS before FROM blocks),
         held AS (SELECT k, count(*) FILTER (WHERE (before >> k = share >> k) IS NOT TRUE) AS held
                  FROM steps, pg_catalog.generate_series(0, {}) k GROUP BY k),
         total AS (SELECT count(DISTINCT block)::float8 AS blocks FROM blocks)
         SELECT COALESCE((SELECT pg_catalog.array_agg(first ORDER BY share) FROM begins), '{{}}'),
                COALESCE((SELECT pg_catalog.array_agg(held / blocks ORDER BY k) FROM held, total), '{{}}'),
                blocks
         FROM total",
        table.name,
        shares.ilog2(),
        column = quote_identifier(&key.column),
    )
}

impl Sample {
    fn of(row: &tokio_postgres::Row) -> Result<Self> {
        Ok(Self { begins: row.try_get(0)?, held: row.try_get(1)?, blocks: row.try_get(2)? })
    }

    /// The bounds of as many shares as do not have much more than all of the table read again.
    #[expect(clippy::cast_precision_loss, reason = "exact for all that there can be")]
    fn bounds(self, table: &Table) -> Vec<String> {
        let shares = self.begins.len();
        let is_cheap = |&(k, &held): &(usize, &f64)| {
            // Each bound is a row of a block that was looked at, and parts it; of all the others hardly one is parted.
            let parted = (shares.div_ceil(1 << k) - 1) as f64 / self.blocks;
            // TOAST is read once, whatever the order.
            (held - 1.0 - parted) * table.heap_bytes as f64 <= table.bytes as f64
        };
        let Some((k, _)) = self.held.iter().enumerate().find(is_cheap) else { return Vec::new() };
        let mut begins: Vec<String> = self.begins.into_iter().step_by(1 << k).collect();
        // A value that fills several shares is in the first of them.
        begins.dedup();
        begins.into_iter().skip(1).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::QualifiedName;
    use crate::postgres::catalog::ReplicaIdentity;

    #[test]
    fn the_last_range_of_blocks_has_no_end() {
        let first = Division::Blocks.within("", &[Range { from: 0, to: Some(7) }]);
        assert_eq!(first, "ctid >= '(0,0)'::pg_catalog.tid AND ctid < '(7,0)'::pg_catalog.tid");
        assert_eq!(Division::Blocks.within("t.", &[Range { from: 7, to: None }]), "t.ctid >= '(7,0)'::pg_catalog.tid");
    }

    #[test]
    fn shares_meet_at_their_bounds() {
        let division = Division::Key(Shares::new("K", "character(2)", &["b", "it's"]));
        let within = |from, to| division.within("t.", &[Range { from, to }]);
        let (below, at_least) = ("OPERATOR(pg_catalog.<)", "OPERATOR(pg_catalog.>=)");
        assert_eq!(within(0, Some(1)), format!(r#"t."K" {below} 'b'::character(2)"#));
        assert_eq!(
            within(1, Some(2)),
            format!(r#"t."K" {at_least} 'b'::character(2) AND t."K" {below} 'it''s'::character(2)"#)
        );
        assert_eq!(within(2, None), format!(r#"t."K" {at_least} 'it''s'::character(2)"#));
        assert_eq!(within(0, None), "true");
        assert_eq!(within(3, None), "false");
        let both = division.within("", &[Range { from: 0, to: Some(1) }, Range { from: 2, to: None }]);
        assert_eq!(both, format!(r#"("K" {below} 'b'::character(2)) OR ("K" {at_least} 'it''s'::character(2))"#));
    }

    fn chosen(held: &[f64], begins: &[&str], bytes: u64) -> Vec<String> {
        let begins = begins.iter().map(|&first| first.to_owned()).collect();
        let table = Table {
            oid: 1,
            name: QualifiedName::new("public", "t"),
            columns: Vec::new(),
            primary_key: Vec::new(),
            identity: ReplicaIdentity::Nothing,
            above: Vec::new(),
            heap_bytes: 1000,
            bytes,
        };
        Sample { begins, held: held.to_vec(), blocks: 28.0 }.bounds(&table)
    }

    #[test]
    fn there_are_as_many_shares_as_do_not_have_the_table_read_over_and_over() {
        let begins = ["0", "1", "2", "3", "4", "5", "6", "7"];
        // In order, and somewhat out of order.
        assert_eq!(chosen(&[1.25, 1.1, 1.0, 1.0], &begins, 1000), begins[1..]);
        assert_eq!(chosen(&[2.2, 1.9, 1.4, 1.0], &begins, 1000), begins[1..]);
        // By chance: each block holds all.
        assert_eq!(chosen(&[8.0, 4.0, 2.0, 1.0], &begins, 1000), ["4"]);
        // The same, where most of it is out of line.
        assert_eq!(chosen(&[8.0, 4.0, 2.0, 1.0], &begins, 3000), ["2", "4", "6"]);
        assert_eq!(chosen(&[8.0, 4.0, 2.0, 1.0], &begins, 7000), begins[1..]);
        // Few values, one, and none.
        assert_eq!(chosen(&[1.0; 3], &["1", "1", "1", "2"], 1000), ["2"]);
        assert_eq!(chosen(&[1.0; 3], &["1", "1", "1", "1"], 1000), [""; 0]);
        assert_eq!(chosen(&[], &[], 1000), [""; 0]);
    }
}
