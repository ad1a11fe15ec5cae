//! How a large table is divided into ranges that the source can read one by one.
//!
//! From PostgreSQL 14 on a range of a heap's blocks is read without a look at the others. Before, and where a table is stored otherwise than
//! as a heap, only an index finds some of the rows: there, the values of the primary key's first column (or of the replica identity's) are
//! divided into *shares* of about as many rows each.
//!
//! Where the shares begin is taken from a sample of the table as the cut shows it, and is written down when the table is opened: units of
//! different runs are ranges of the same shares. The sample also tells by how many shares a block would be read. Where rows do not lie in the
//! order of the key, that is by nearly all of them, so that shares as small as units would have the table read over and over: then there
//! are as many shares as workers.

use std::collections::HashMap;

use super::{Context, blockers, plan, statements};
use crate::error::{Doing, Result};
use crate::postgres::catalog::Table;
use crate::postgres::{Session, quote_identifier, quote_literal};

/// Some places of a table that follow one another: blocks of its heap, or shares of its key. The last range has no end, so that blocks added
/// since it was planned are in it.
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
    /// `format_type`, qualified.
    type_name: String,
    /// The index's own, as `OPERATOR(schema.<)`.
    below: String,
    at_least: String,
}

/// `$1`: oids of tables. The first column of an index that finds each of their rows, in the order that is its type's and its own.
const KEYS: &str = "
    SELECT DISTINCT ON (i.indrelid) i.indrelid, a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod),
           pg_catalog.format('OPERATOR(%I.%s)', bn.nspname, b.oprname), pg_catalog.format('OPERATOR(%I.%s)', an.nspname, l.oprname)
    FROM pg_catalog.pg_index i
    JOIN pg_catalog.pg_attribute a
      ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] AND a.attnotnull AND a.attcollation = i.indcollation[0]
    JOIN pg_catalog.pg_opclass oc ON oc.oid = i.indclass[0] AND oc.opcdefault
    JOIN pg_catalog.pg_am am ON am.oid = oc.opcmethod AND am.amname = 'btree'
    JOIN pg_catalog.pg_amop ab ON ab.amopfamily = oc.opcfamily AND ab.amopstrategy = 1
         AND ab.amoplefttype = oc.opcintype AND ab.amoprighttype = oc.opcintype
    JOIN pg_catalog.pg_operator b ON b.oid = ab.amopopr JOIN pg_catalog.pg_namespace bn ON bn.oid = b.oprnamespace
    JOIN pg_catalog.pg_amop al ON al.amopfamily = oc.opcfamily AND al.amopstrategy = 4
         AND al.amoplefttype = oc.opcintype AND al.amoprighttype = oc.opcintype
    JOIN pg_catalog.pg_operator l ON l.oid = al.amopopr JOIN pg_catalog.pg_namespace an ON an.oid = l.oprnamespace
    WHERE i.indrelid = ANY ($1) AND i.indisvalid AND i.indpred IS NULL AND (i.indisprimary OR i.indisreplident)
    ORDER BY i.indrelid, i.indisprimary DESC";

/// `$1`: oids of tables. Those that are no heap.
const NO_HEAPS: &str = "SELECT c.oid FROM pg_catalog.pg_class c WHERE c.oid = ANY ($1) AND c.relam <> 2";

/// So many blocks are looked at for each share, if there are that many.
const BLOCKS_A_SHARE: u64 = 16;

/// So many are looked at for a table.
const MOST_BLOCKS: u64 = 10_000;

/// By how many shares a block may be read on average.
const MOST_READS: f64 = 2.0;

impl Division {
    /// How many places there are; `blocks` in the heap.
    pub(super) fn places(&self, blocks: u64) -> u64 {
        match self {
            Self::Blocks => blocks,
            Self::Key(shares) => shares.bounds.len() as u64 + 1,
        }
    }

    /// See [`Shares`].
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
        let operator = |name: &str| format!("OPERATOR(pg_catalog.{name})");
        let (column, type_name) = (column.to_owned(), type_name.to_owned());
        let key = Key { column, type_name, below: operator("<"), at_least: operator(">=") };
        Self { key, bounds: bounds.iter().map(|&bound| bound.to_owned()).collect() }
    }

    fn within(&self, alias: &str, range: Range) -> String {
        let Key { column, type_name, below, at_least } = &self.key;
        // A place beyond the last share has no bound: nothing ends or begins there.
        let bound = |place: u64| self.bounds.get(usize::try_from(place).ok()?.checked_sub(1)?);
        let compare = |operator: &str, bound: &String| {
            format!("{alias}{} {operator} {}::{type_name}", quote_identifier(column), quote_literal(bound))
        };
        let from = bound(range.from).map(|bound| compare(at_least, bound));
        let to = range.to.and_then(bound).map(|bound| compare(below, bound));
        match (from, to) {
            (None, None) => "true".to_owned(),
            (Some(one), None) | (None, Some(one)) => one,
            (Some(from), Some(to)) => format!("{from} AND {to}"),
        }
    }
}

/// A table that is to be divided, or was when it was opened.
pub(super) struct Wanted<'a> {
    pub table: &'a Table,
    /// How it was divided when it was opened, if that still counts: see [`Shares`].
    pub opened: Option<Option<&'a [String]>>,
}

/// Finds how each of these tables is divided; those that cannot be are left out. In the transaction of the cut; nothing stays locked.
///
/// # Errors
/// The connection's.
pub(super) async fn find(
    context: &Context,
    session: &Session,
    version: i32,
    wanted: &[Wanted<'_>],
) -> Result<HashMap<u32, Division>> {
    let oids: Vec<u32> = wanted.iter().map(|wanted| wanted.table.oid).collect();
    let no_heaps = session.query(NO_HEAPS, &[&oids]).await.doing(|| "looking how tables are stored")?;
    let no_heaps: Vec<u32> = no_heaps.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    let mut keys = keys(session, oids).await?;
    let pid = session.query_one("SELECT pg_catalog.pg_backend_pid()", &[]).await?.try_get(0)?;
    let mut divisions = HashMap::new();
    for Wanted { table, opened } in wanted {
        let key = keys.remove(&table.oid);
        let by_blocks = version >= 140_000 && !no_heaps.contains(&table.oid);
        let division = match (opened, key) {
            (Some(None), _) => Some(Division::Blocks),
            (Some(Some(bounds)), Some(key)) => Some(Division::Key(Shares { key, bounds: bounds.to_vec() })),
            (None, _) if by_blocks => Some(Division::Blocks),
            (None, Some(key)) => {
                let what = format!("looking how the keys of {} lie", table.name.plain());
                let sample = shares(context, session, table, key);
                blockers::explained(&context.source, pid, &what, &context.telemetry, sample).await?.map(Division::Key)
            }
            (_, None) => None,
        };
        match division {
            Some(division) => drop(divisions.insert(table.oid, division)),
            None => {
                tracing::info!(table = %table.name.plain(), "the source cannot read ranges of this table: one worker copies it, in one transaction");
            }
        }
    }
    Ok(divisions)
}

async fn keys(session: &Session, oids: Vec<u32>) -> Result<HashMap<u32, Key>> {
    let rows = session.query(KEYS, &[&oids]).await.doing(|| "looking for keys that tell ranges of rows")?;
    let one = |row: &tokio_postgres::Row| {
        let (column, type_name, below, at_least) = (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?, row.try_get(4)?);
        Ok((row.try_get(0)?, Key { column, type_name, below, at_least }))
    };
    rows.iter().map(one).collect()
}

/// Divides the values of a key; `None` where the source cannot take a sample of the table.
async fn shares(context: &Context, session: &Session, table: &Table, key: Key) -> Result<Option<Shares>> {
    let wanted = plan::parts(table.bytes, context.settings.split_above);
    let sampled = session.query_one(&sample(table, &key, wanted), &[]).await;
    session.batch_execute(statements::RELEASE).await.doing(|| "looking how keys lie")?;
    let (bounds, reads): (Vec<String>, f64) = match sampled {
        Ok(row) => (row.try_get(0)?, row.try_get(1)?),
        Err(error) => {
            tracing::debug!(%error, table = %table.name.plain(), "cannot take a sample");
            return Ok(None);
        }
    };
    let bounds = if reads > MOST_READS { fewer(&bounds, context.settings.workers.get()) } else { bounds };
    tracing::debug!(table = %table.name.plain(), reads, shares = bounds.len() + 1, "divided by its key");
    Ok((!bounds.is_empty()).then_some(Shares { key, bounds }))
}

/// Asks a sample of a table where so many shares of its key begin, and by how many of them a block would be read.
fn sample(table: &Table, key: &Key, shares: u64) -> String {
    let blocks = (shares * BLOCKS_A_SHARE).min(MOST_BLOCKS) * 8192;
    // Of any two numbers below 2^53 the quotient is good enough.
    #[expect(clippy::cast_precision_loss)]
    let percent = (100.0 * blocks as f64 / table.heap_bytes.max(1) as f64).clamp(0.0001, 100.0);
    format!(
        "WITH sample AS MATERIALIZED (
             SELECT {column} AS key, pg_catalog.split_part(ctid::text, ',', 1) AS block, pg_catalog.ntile({shares}) OVER (ORDER BY {column}) AS share
             FROM ONLY {} TABLESAMPLE SYSTEM ({percent}) REPEATABLE (0)),
         begins AS (SELECT DISTINCT ON (share) share, key::text AS bound FROM sample ORDER BY share, sample.key),
         reads AS (SELECT block, count(DISTINCT share) AS shares FROM sample GROUP BY block)
         SELECT COALESCE((SELECT array_agg(bound ORDER BY share) FROM begins WHERE share > 1), '{{}}'),
                COALESCE((SELECT avg(shares) FROM reads), 0)::float8",
        table.name,
        column = quote_identifier(&key.column),
    )
}

/// So many shares, of those that there are.
fn fewer(bounds: &[String], shares: usize) -> Vec<String> {
    let there = bounds.len() + 1;
    let shares = shares.min(there);
    (1..shares).filter_map(|share| bounds.get(share * there / shares - 1).cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_range_of_blocks_has_no_end() {
        let first = Division::Blocks.within("", &[Range { from: 0, to: Some(7) }]);
        assert_eq!(first, "ctid >= '(0,0)'::pg_catalog.tid AND ctid < '(7,0)'::pg_catalog.tid");
        assert_eq!(Division::Blocks.within("t.", &[Range { from: 7, to: None }]), "t.ctid >= '(7,0)'::pg_catalog.tid");
    }

    #[test]
    fn shares_hold_every_value_once() {
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
        let both = division.within("", &[Range { from: 0, to: Some(1) }, Range { from: 2, to: None }]);
        assert_eq!(both, format!(r#"("K" {below} 'b'::character(2)) OR ("K" {at_least} 'it''s'::character(2))"#));
    }

    #[test]
    fn fewer_shares_are_of_about_the_same_size() {
        let bounds: Vec<String> = (1..8).map(|bound| bound.to_string()).collect();
        assert_eq!(fewer(&bounds, 4), ["2", "4", "6"]);
        assert_eq!(fewer(&bounds, 3), ["2", "5"]);
        assert_eq!(fewer(&bounds, 100), bounds);
        assert_eq!(fewer(&bounds, 1), [""; 0]);
        assert_eq!(fewer(&[], 4), [""; 0]);
    }
}
