//! Statements that change many rows of one table: their text, and their parameters.
//!
//! Values travel as the source printed them, and are read by the input function of their column's type: an array of a type reads
//! its elements so, and COPY reads its fields so. The rows of a batch are a table of arrays, one for each column.

use std::sync::Arc;

use bytes::{BufMut, BytesMut};

use super::net::{Alike, Keyed, Updates};
use super::pipeline::{Pipeline, Purpose, Set, StatementKey};
use super::relation::{Finder, Plan, PlannedColumn};
use super::row::text;
use super::target_table::Many;
use crate::error::Result;
use crate::postgres::copy_text;
use crate::postgres::pgoutput::{Tuple, Value};

/// One statement takes rows of about so much, in bytes: what it needs of the server's memory stays small, and in its caches.
const STATEMENT: usize = 512 << 10;

/// For statements that find rows by an index. The planner knows neither how many rows are in a set nor, of a table that
/// grows, how many are in there, and it may keep a plan for long: one that walks through the table costs more than all that could be won.
const GUIDE: [&str; 4] = [
    "SET LOCAL enable_seqscan = off",
    "SET LOCAL enable_hashjoin = off",
    "SET LOCAL enable_mergejoin = off",
    "SET LOCAL plan_cache_mode = force_generic_plan",
];
const UNGUIDE: [&str; 4] = [
    "SET LOCAL enable_seqscan TO DEFAULT",
    "SET LOCAL enable_hashjoin TO DEFAULT",
    "SET LOCAL enable_mergejoin TO DEFAULT",
    "SET LOCAL plan_cache_mode TO DEFAULT",
];

/// Between the elements of an array of text.
const TEXT_DELIMITER: u8 = b',';

impl Pipeline {
    /// Encodes what the changes of a table come to, for rows that are found by their key.
    pub(super) async fn keyed(&mut self, plan: &Arc<Plan>, net: &Keyed<'_>) -> Result<()> {
        let Finder::Key(key) = &plan.finder else {
            return self.copy_in(plan, net.inserts.iter().map(AsRef::as_ref)).await;
        };
        if !net.deletes.is_empty() || !net.updates.is_empty() {
            let by_index = key.iter().filter_map(|&at| plan.columns.get(at)).any(|column| column.leads);
            self.guide(by_index).await?;
        }
        let mut deletes = net.deletes.iter();
        while deletes.len() > 0 {
            let mut parameters =
                Parameters::new(key.iter().filter_map(|&at| plan.columns.get(at)).map(PlannedColumn::delimiter));
            for row in deletes.by_ref() {
                parameters.row(row.parts().iter().map(|part| Ok(Some(*part))))?;
                if parameters.bytes >= STATEMENT {
                    break;
                }
            }
            self.set(plan, Set::Delete, Vec::new(), parameters, || plan.delete_set()).await?;
        }
        for Updates { set, rows } in &net.updates {
            let mut rows = rows.iter();
            while rows.len() > 0 {
                let mut parameters = Parameters::new(
                    key.iter().chain(set).filter_map(|&at| plan.columns.get(at)).map(PlannedColumn::delimiter),
                );
                for (key, row) in rows.by_ref() {
                    let parts = key.parts().iter().map(|part| Ok(Some(*part)));
                    parameters.row(parts.chain(chosen(row, set).map(|value| text(value, plan))))?;
                    if parameters.bytes >= STATEMENT {
                        break;
                    }
                }
                self.set(plan, Set::Update, set.clone(), parameters, || plan.update_set(set)).await?;
            }
        }
        self.copy_in(plan, net.inserts.iter().map(AsRef::as_ref)).await
    }

    /// The same for rows that are found by their look. One statement takes all of them: numbering those that look the same,
    /// it must see them all.
    pub(super) async fn alike(&mut self, plan: &Arc<Plan>, net: &Alike<'_>) -> Result<()> {
        self.guide(false).await?;
        // Old rows travel as text, whatever their columns are.
        let looks = || plan.columns.iter().map(|_| TEXT_DELIMITER);
        if !net.deletes.is_empty() {
            let mut parameters = Parameters::new(looks());
            for old in &net.deletes {
                parameters.row(old.values().map(|value| text(value, plan)))?;
            }
            self.set(plan, Set::DeleteAlike, Vec::new(), parameters, || plan.delete_alike()).await?;
        }
        if !net.updates.is_empty() {
            let written = plan.columns.iter().filter(|column| column.written);
            let mut parameters = Parameters::new(looks().chain(written.map(PlannedColumn::delimiter)));
            for (old, new) in &net.updates {
                let new = new.values().enumerate().filter(|(at, _)| plan.is_written(*at)).map(|(_, value)| value);
                parameters.row(old.values().chain(new).map(|value| text(value, plan)))?;
            }
            self.set(plan, Set::UpdateAlike, Vec::new(), parameters, || plan.update_alike()).await?;
        }
        self.copy_in(plan, net.inserts.iter().copied()).await
    }

    /// Whether the statements that follow shall find their rows by an index, whatever the planner thinks of that; until the target
    /// transaction ends.
    pub(super) async fn guide(&mut self, by_index: bool) -> Result<()> {
        if self.replace_guided(by_index) == by_index {
            return Ok(());
        }
        for sql in if by_index { GUIDE } else { UNGUIDE } {
            self.execute(StatementKey::Own(sql), || sql.to_owned(), std::iter::empty(), Purpose::Own(sql)).await?;
        }
        Ok(())
    }

    async fn set(
        &mut self,
        plan: &Arc<Plan>,
        set: Set,
        columns: Vec<usize>,
        parameters: Parameters,
        sql: impl FnOnce() -> String,
    ) -> Result<()> {
        let purpose = Purpose::Set { set, plan: Arc::clone(plan), rows: parameters.rows };
        let key = StatementKey::Set { generation: plan.generation, set, columns };
        let arrays = parameters.finish();
        self.execute(key, sql, arrays.iter().map(|array| Some(array.as_ref())), purpose).await
    }

    async fn copy_in<'t>(&mut self, plan: &Arc<Plan>, rows: impl ExactSizeIterator<Item = &'t Tuple>) -> Result<()> {
        if rows.len() == 0 {
            return Ok(());
        }
        let key = StatementKey::Set { generation: plan.generation, set: Set::Copy, columns: Vec::new() };
        let purpose = Purpose::Set { set: Set::Copy, plan: Arc::clone(plan), rows: rows.len() as u64 };
        self.begin_copy(key, || plan.copy_set(), purpose).await?;
        for row in rows {
            self.copy_row(|line| copy_line(plan, row, line)).await?;
        }
        self.end_copy();
        Ok(())
    }
}

/// The values at these positions, which ascend.
fn chosen<'t>(row: &'t Tuple, positions: &[usize]) -> impl Iterator<Item = Value<'t>> {
    let mut wanted = positions.iter().copied().peekable();
    row.values().enumerate().filter(move |(at, _)| wanted.next_if_eq(at).is_some()).map(|(_, value)| value)
}

/// One array for each column, as literals.
struct Parameters {
    arrays: Vec<BytesMut>,
    delimiters: Vec<u8>,
    rows: u64,
    bytes: usize,
}

impl Parameters {
    /// One delimiter for each column.
    fn new(delimiters: impl Iterator<Item = u8>) -> Self {
        let delimiters: Vec<u8> = delimiters.collect();
        Self { arrays: vec![BytesMut::from(&b"{"[..]); delimiters.len()], delimiters, rows: 0, bytes: 0 }
    }

    fn row<'v>(&mut self, values: impl Iterator<Item = Result<Option<&'v [u8]>>>) -> Result<()> {
        for ((array, &delimiter), value) in self.arrays.iter_mut().zip(&self.delimiters).zip(values) {
            let value = value?;
            if self.rows > 0 {
                array.put_u8(delimiter);
            }
            self.bytes += value.map_or(0, <[u8]>::len) + 8;
            element(array, value);
        }
        self.rows += 1;
        Ok(())
    }

    fn finish(self) -> Vec<BytesMut> {
        let mut arrays = self.arrays;
        arrays.iter_mut().for_each(|array| array.put_u8(b'}'));
        arrays
    }
}

/// One element of an array literal, in quotes unless it is as plain as a number.
fn element(array: &mut BytesMut, value: Option<&[u8]>) {
    let Some(value) = value else { return array.put_slice(b"NULL") };
    if !value.is_empty() && value.iter().all(|byte| byte.is_ascii_digit() || matches!(byte, b'-' | b'.')) {
        return array.put_slice(value);
    }
    array.reserve(value.len() + 2);
    array.put_u8(b'"');
    let mut rest = value;
    while let Some(at) = rest.iter().position(|byte| matches!(byte, b'"' | b'\\')) {
        let (plain, special) = rest.split_at(at);
        array.put_slice(plain);
        array.put_u8(b'\\');
        array.put_slice(special.get(..1).unwrap_or_default());
        rest = special.get(1..).unwrap_or_default();
    }
    array.put_slice(rest);
    array.put_u8(b'"');
}

/// One line of COPY's text format.
fn copy_line(plan: &Plan, row: &Tuple, line: &mut BytesMut) -> Result<()> {
    let mut first = true;
    for (_, value) in row.values().enumerate().filter(|(at, _)| plan.is_written(*at)) {
        if !std::mem::take(&mut first) {
            line.put_u8(b'\t');
        }
        match text(value, plan)? {
            None => line.put_slice(b"\\N"),
            Some(value) => copy_text::field(line, value),
        }
    }
    line.put_u8(b'\n');
    Ok(())
}

impl PlannedColumn {
    /// What stands between the elements of its array.
    fn delimiter(&self) -> u8 {
        match self.many {
            Many::Array { delimiter } => delimiter,
            Many::Text | Many::Never => TEXT_DELIMITER,
        }
    }

    /// The array as a parameter of this number.
    fn array(&self, number: usize) -> String {
        match self.many {
            Many::Array { .. } => format!("${number}::{}[]", self.type_name),
            Many::Text | Many::Never => format!("${number}::text[]"),
        }
    }

    /// The column of the batch as a value of the type.
    fn value(&self, alias: &str) -> String {
        match self.many {
            Many::Array { .. } => alias.to_owned(),
            Many::Text | Many::Never => format!("{alias}::{}", self.type_name),
        }
    }
}

impl Plan {
    /// `$1` and on: the columns of the key.
    fn delete_set(&self) -> String {
        let key = self.key_columns();
        format!(
            "DELETE FROM {}{} AS target USING {} WHERE {}",
            self.only(),
            self.name,
            batch(&key, "k", 1),
            self.matches(&key)
        )
    }

    /// `$1` and on: the columns of the key, then those that are set.
    fn update_set(&self, set: &[usize]) -> String {
        let key = self.key_columns();
        let written: Vec<&PlannedColumn> = set.iter().filter_map(|&at| self.columns.get(at)).collect();
        let mut assignments: Vec<String> = written
            .iter()
            .enumerate()
            .map(|(at, column)| format!("{} = {}", column.name, column.value(&format!("batch.c{at}"))))
            .collect();
        if assignments.is_empty() {
            // Nothing that we write changed, but the rows must be there all the same.
            let any = self.columns.iter().find(|c| c.written).map_or("ctid", |c| c.name.as_str());
            assignments.push(format!("{any} = target.{any}"));
        }
        let arrays = arrays(&key, 1).chain(arrays(&written, 1 + key.len())).collect::<Vec<_>>().join(", ");
        let names = names("k", key.len()).chain(names("c", written.len())).collect::<Vec<_>>().join(", ");
        format!(
            "UPDATE {}{} AS target SET {} FROM unnest({arrays}) AS batch ({names}) WHERE {}",
            self.only(),
            self.name,
            assignments.join(", "),
            self.matches(&key)
        )
    }

    /// Rows follow in COPY's text format.
    fn copy_set(&self) -> String {
        let names: Vec<_> = self.columns.iter().filter(|c| c.written).map(|c| c.name.as_str()).collect();
        format!("COPY {} ({}) FROM STDIN", self.name, names.join(", "))
    }

    /// `$1` and on: all columns of the old rows, as text.
    fn delete_alike(&self) -> String {
        let width = self.columns.len();
        let arrays = (1..=width).map(|n| format!("${n}::text[]")).collect::<Vec<_>>().join(", ");
        format!(
            "WITH wanted AS (
                SELECT look, row_number() OVER (PARTITION BY look) AS nth
                FROM (SELECT {look} AS look FROM unnest({arrays}) AS batch ({names})) AS rows),
             located AS ({located})
             DELETE FROM {only}{table} AS target USING located JOIN wanted USING (look, nth)
             WHERE target.tableoid = located.tableoid AND target.ctid = located.ctid",
            look = look(names("o", width)),
            names = names("o", width).collect::<Vec<_>>().join(", "),
            located = self.located(),
            only = self.only(),
            table = self.name,
        )
    }

    /// `$1` and on: all columns of the old rows, as text; then the written columns of the new rows.
    fn update_alike(&self) -> String {
        let width = self.columns.len();
        let written: Vec<&PlannedColumn> = self.columns.iter().filter(|column| column.written).collect();
        let arrays = (1..=width).map(|n| format!("${n}::text[]")).chain(arrays(&written, 1 + width));
        let assignments = written
            .iter()
            .enumerate()
            .map(|(at, column)| format!("{} = {}", column.name, column.value(&format!("wanted.c{at}"))));
        format!(
            "WITH wanted AS (
                SELECT rows.*, row_number() OVER (PARTITION BY look) AS nth
                FROM (SELECT {look} AS look, batch.* FROM unnest({arrays}) AS batch ({names})) AS rows),
             located AS ({located})
             UPDATE {only}{table} AS target SET {assignments} FROM located JOIN wanted USING (look, nth)
             WHERE target.tableoid = located.tableoid AND target.ctid = located.ctid",
            look = look(names("o", width)),
            arrays = arrays.collect::<Vec<_>>().join(", "),
            names = names("o", width).chain(names("c", written.len())).collect::<Vec<_>>().join(", "),
            located = self.located(),
            only = self.only(),
            table = self.name,
            assignments = assignments.collect::<Vec<_>>().join(", "),
        )
    }

    /// The table's rows that look like a wanted one, those that look the same numbered. Compared as printed: works for types
    /// without equality, and tells 1.0 from 1.00. IS NULL would also find a composite whose fields are all NULL.
    fn located(&self) -> String {
        let printed = self.columns.iter().map(|column| {
            format!("CASE WHEN {0} IS DISTINCT FROM NULL THEN pg_catalog.format('%s', {0}) END", column.name)
        });
        format!(
            "SELECT rows.*, row_number() OVER (PARTITION BY look) AS nth
             FROM (SELECT tableoid, ctid, {} AS look FROM {}{}) AS rows
             WHERE look IN (SELECT look FROM wanted)",
            look(printed),
            self.only(),
            self.name
        )
    }

    fn key_columns(&self) -> Vec<&PlannedColumn> {
        match &self.finder {
            Finder::Key(key) => key.iter().filter_map(|&at| self.columns.get(at)).collect(),
            Finder::WholeRow | Finder::Nothing => Vec::new(),
        }
    }

    fn matches(&self, key: &[&PlannedColumn]) -> String {
        key.iter()
            .enumerate()
            .map(|(at, column)| {
                format!("target.{} {} {}", column.name, column.equality, column.value(&format!("batch.k{at}")))
            })
            .collect::<Vec<_>>()
            .join(" AND ")
    }
}

/// A row as an array of texts, compared byte by byte.
fn look(parts: impl Iterator<Item = String>) -> String {
    format!("ARRAY[{}]::text[] COLLATE \"C\"", parts.collect::<Vec<_>>().join(", "))
}

/// The batch as a table.
fn batch(columns: &[&PlannedColumn], prefix: &'static str, from: usize) -> String {
    format!(
        "unnest({}) AS batch ({})",
        arrays(columns, from).collect::<Vec<_>>().join(", "),
        names(prefix, columns.len()).collect::<Vec<_>>().join(", ")
    )
}

fn arrays<'p>(columns: &'p [&PlannedColumn], from: usize) -> impl Iterator<Item = String> + use<'p> {
    columns.iter().enumerate().map(move |(at, column)| column.array(from + at))
}

fn names(prefix: &'static str, count: usize) -> impl Iterator<Item = String> {
    (0..count).map(move |at| format!("{prefix}{at}"))
}

#[cfg(test)]
mod tests {
    use super::super::relation::tests::planned;
    use super::*;

    #[test]
    fn elements_stand_in_quotes_unless_they_are_plain_numbers() {
        let mut array = BytesMut::new();
        for value in [&b"-1.5"[..], b"", b"null", b"a,b", b"\"\\", b"{}", b"12:30"] {
            element(&mut array, Some(value));
            array.put_u8(b'|');
        }
        element(&mut array, None);
        assert_eq!(&array[..], br#"-1.5|""|"null"|"a,b"|"\"\\"|"{}"|"12:30"|NULL"#);
    }

    #[test]
    fn statements_name_everything_by_its_type() {
        let mut plan = planned(Finder::Key(vec![0]), 3);
        plan.columns[2].many = Many::Text;
        assert_eq!(
            plan.update_set(&[1, 2]),
            r#"UPDATE ONLY "public"."t" AS target SET "c1" = batch.c0, "c2" = batch.c1::"pg_catalog"."text" FROM unnest($1::"pg_catalog"."text"[], $2::"pg_catalog"."text"[], $3::text[]) AS batch (k0, c0, c1) WHERE target."c0" OPERATOR(pg_catalog.=) batch.k0"#
        );
        assert_eq!(
            plan.delete_set(),
            r#"DELETE FROM ONLY "public"."t" AS target USING unnest($1::"pg_catalog"."text"[]) AS batch (k0) WHERE target."c0" OPERATOR(pg_catalog.=) batch.k0"#
        );
        assert!(plan.update_set(&[]).contains(r#"SET "c0" = target."c0" FROM"#));
        assert_eq!(plan.copy_set(), r#"COPY "public"."t" ("c0", "c1", "c2") FROM STDIN"#);
    }
}
