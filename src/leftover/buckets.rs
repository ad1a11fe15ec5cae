//! A table in buckets: how both sides say what they hold in one scan each, and how a bucket's rows are taken. Pure.
//!
//! A row's bucket follows from the row itself: bits of the hash of its text under the pinned settings. So a row that
//! changes leaves one bucket and enters another, equal rows share a bucket, and a table needs no key for it. A bucket is
//! summed up by how many rows it has and by the sums of both halves of their hashes, which do not depend on an order.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::postgres::catalog::Table;
use crate::postgres::quote_identifier;
use crate::postgres::wire::TextRow;

/// About so many bytes of a table are in a bucket.
const BUCKET_BYTES: u64 = 4096;
/// What both sides answer must fit into memory.
const MOST_BUCKETS: u64 = 1 << 16;

/// How a table is divided, and the SQL for it.
#[derive(Clone, Debug)]
pub(super) struct Buckets {
    /// `ONLY "schema"."table"`
    only: String,
    /// `"a", "b"`: what is stored; the target computes generated columns itself.
    columns: String,
    /// One less than the number of buckets, which is a power of two.
    mask: u64,
    hash: String,
}

/// What a bucket holds: rows, and the sums of the halves of their hashes.
pub(super) type Sum = (u64, String, String);

/// What each bucket that is not empty holds.
pub(super) type Sums = HashMap<u32, Sum>;

impl Buckets {
    /// Divides by the table's size on the source.
    pub(super) fn of(table: &Table) -> Self {
        let count = (table.bytes / BUCKET_BYTES).clamp(1, MOST_BUCKETS).next_power_of_two();
        let stored: Vec<String> =
            table.columns.iter().filter(|column| !column.generated).map(|c| quote_identifier(&c.name)).collect();
        let row = stored.iter().map(|name| format!("t.{name}")).collect::<Vec<_>>().join(", ");
        Self {
            only: format!("ONLY {}", table.name),
            columns: stored.join(", "),
            mask: count - 1,
            hash: format!("pg_catalog.md5(ROW({row})::text)"),
        }
    }

    /// Asks for the sums, all of them or those of some buckets. OFFSET keeps a row from being hashed more than once.
    pub(super) fn sums(&self, which: Option<&[u32]>) -> String {
        let Self { only, mask, hash, .. } = self;
        let which = which.map(|which| format!(" WHERE bucket IN ({})", list(which))).unwrap_or_default();
        format!(
            "SELECT bucket, count(*), sum(a::numeric), sum(b::numeric) FROM (
                 SELECT (a & {mask})::int4 AS bucket, a, b FROM (
                     SELECT ('x' || pg_catalog.left(m, 16))::bit(64)::int8 AS a,
                            ('x' || pg_catalog.right(m, 16))::bit(64)::int8 AS b
                     FROM (SELECT {hash} AS m FROM {only} t OFFSET 0) h OFFSET 0) s) r{which}
             GROUP BY bucket"
        )
    }

    /// Takes the rows of some buckets, or all, out of a table; answers with how many there were.
    pub(super) fn delete(&self, which: Option<&[u32]>) -> String {
        format!(
            "WITH gone AS (DELETE FROM {} t{} RETURNING 1) SELECT count(*) FROM gone",
            self.only,
            self.filter(which)
        )
    }

    /// Sends the rows of some buckets, or all.
    pub(super) fn read(&self, which: Option<&[u32]>) -> String {
        format!("COPY (SELECT {} FROM {} t{}) TO STDOUT", self.columns, self.only, self.filter(which))
    }

    /// Takes such rows in. COPY knows no empty list of columns.
    pub(super) fn write(&self) -> String {
        let table = self.only.strip_prefix("ONLY ").unwrap_or(&self.only);
        let columns = if self.columns.is_empty() { String::new() } else { format!(" ({})", self.columns) };
        format!("COPY {table}{columns} FROM STDIN")
    }

    /// A subquery, because it is hashed where a long list of constants would be searched for each row.
    fn filter(&self, which: Option<&[u32]>) -> String {
        let Some(which) = which else { return String::new() };
        format!(
            " WHERE (('x' || pg_catalog.left({}, 16))::bit(64)::int8 & {})::int4 IN ({})",
            self.hash,
            self.mask,
            list(which)
        )
    }
}

fn list(buckets: &[u32]) -> String {
    let list = buckets.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    format!("SELECT pg_catalog.unnest('{{{list}}}'::int4[])")
}

/// Reads the answer to [`Buckets::sums`].
pub(super) fn sums(rows: Vec<TextRow>) -> Result<Sums> {
    rows.into_iter()
        .map(|row| match <[Option<String>; 4]>::try_from(row) {
            Ok([Some(bucket), Some(rows), Some(a), Some(b)]) => {
                Some((bucket.parse().ok()?, (rows.parse().ok()?, a, b)))
            }
            _ => None,
        })
        .collect::<Option<_>>()
        .ok_or_else(|| Error::bug("the sums of buckets are no numbers"))
}

/// The buckets of which the sides hold something else, in order.
pub(super) fn differing(source: &Sums, target: &Sums) -> Vec<u32> {
    let mut found: Vec<u32> = source
        .iter()
        .filter(|(bucket, sum)| target.get(bucket) != Some(*sum))
        .map(|(bucket, _)| *bucket)
        .chain(target.keys().filter(|bucket| !source.contains_key(bucket)).copied())
        .collect();
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::QualifiedName;
    use crate::postgres::catalog::{Column, ReplicaIdentity};

    fn table(bytes: u64, columns: &[(&str, bool)]) -> Table {
        let column = |&(name, generated): &(&str, bool)| Column {
            name: name.to_owned(),
            type_name: "text".to_owned(),
            generated,
            identity_always: false,
        };
        Table {
            oid: 1,
            name: QualifiedName::new("s", "T"),
            columns: columns.iter().map(column).collect(),
            primary_key: Vec::new(),
            identity: ReplicaIdentity::Nothing,
            above: Vec::new(),
            heap_bytes: bytes,
            bytes,
        }
    }

    fn sum(rows: u64, a: &str) -> Sum {
        (rows, a.to_owned(), "0".to_owned())
    }

    #[test]
    fn a_small_table_is_one_bucket_and_a_huge_one_has_a_bounded_number() {
        for (bytes, mask) in [(0, 0), (4095, 0), (40_000, 15), (1 << 50, 65_535)] {
            assert_eq!(Buckets::of(&table(bytes, &[("a", false)])).mask, mask, "{bytes}");
        }
    }

    #[test]
    fn what_is_generated_is_neither_compared_nor_sent() {
        let buckets = Buckets::of(&table(0, &[("a", false), ("g", true), ("B", false)]));
        assert!(buckets.sums(None).contains(r#"ROW(t."a", t."B")"#));
        assert_eq!(buckets.read(None), r#"COPY (SELECT "a", "B" FROM ONLY "s"."T" t) TO STDOUT"#);
        assert_eq!(buckets.write(), r#"COPY "s"."T" ("a", "B") FROM STDIN"#);
        assert!(buckets.delete(Some(&[1, 2])).contains("unnest('{1,2}'::int4[])"));
    }

    #[test]
    fn a_bucket_differs_in_its_rows_or_when_one_side_has_none() {
        let source = Sums::from([(1, sum(1, "5")), (2, sum(1, "5")), (4, sum(2, "7"))]);
        let target = Sums::from([(1, sum(1, "5")), (2, sum(1, "6")), (3, sum(1, "1"))]);
        assert_eq!(differing(&source, &target), [2, 3, 4]);
        assert_eq!(differing(&source, &source), [0; 0]);
    }
}
