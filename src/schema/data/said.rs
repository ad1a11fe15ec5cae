//! How far pg_dump and pg_restore are, from what `--verbose` prints. Pure.
//!
//! ```text
//! pg_dump: dumping contents of table "public.orders"
//! pg_restore: processing data for table "public.orders"
//! pg_restore: finished item 3158 TABLE DATA orders
//! ```
//!
//! With one worker nothing is said of the end: the next table begins once the one before it is finished. With several, each
//! process writes the name of its program, a space and the rest of a line apart, so that lines run into each other. One that
//! cannot be understood says nothing, and its table is known to be finished at the end of all. Nothing that was not finished
//! is ever taken for it: where a name could forge a line, nothing is believed.

use std::collections::HashMap;

use crate::postgres::QualifiedName;

/// What to expect, and what was begun. Tables are known by their place in the list.
#[derive(Debug)]
pub(super) struct Course {
    /// `schema.table`, as the programs print it, where only one table is called so.
    names: HashMap<String, Option<usize>>,
    tables: Vec<QualifiedName>,
    /// Entries of the archive, where they are known.
    items: HashMap<u32, usize>,
    /// Begun and not finished, in this order.
    open: Vec<usize>,
    /// Several tables at a time, and each end is told.
    tells_ends: bool,
    /// No name can look like a line of the program.
    trusted: bool,
}

/// A table that is finished, and the entry of the archive that was said with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Finished {
    pub(super) table: usize,
    pub(super) item: Option<u32>,
}

impl Course {
    /// `items` are entries of the archive with the table of each; empty while it is being made.
    pub(super) fn new(tables: Vec<QualifiedName>, items: HashMap<u32, usize>, workers: usize) -> Self {
        let mut names: HashMap<String, Option<usize>> = HashMap::new();
        for (at, table) in tables.iter().enumerate() {
            let plain = format!("{}.{}", table.schema, table.name);
            names.entry(plain).and_modify(|known| *known = None).or_insert(Some(at));
        }
        let trusted = !tables.iter().any(|t| t.schema.contains(['\n', '\r']) || t.name.contains(['\n', '\r']));
        Self { names, tables, items, open: Vec::new(), tells_ends: workers > 1, trusted }
    }

    /// The tables, as they were given.
    pub(super) fn tables(&self) -> &[QualifiedName] {
        &self.tables
    }

    /// Takes a line in; says which table is finished by it.
    pub(super) fn hears(&mut self, line: &str) -> Option<Finished> {
        match understood(line).filter(|_| self.trusted)? {
            Said::Begins(name) => {
                let before = if self.tells_ends { None } else { self.open.pop() };
                self.open.extend(self.names.get(name).copied().flatten());
                before.map(|table| Finished { table, item: None })
            }
            Said::Finished(item, tag) => {
                let table = match self.items.get(&item) {
                    Some(table) => *table,
                    None if self.items.is_empty() => *self.open.iter().find(|at| self.is_called(**at, tag))?,
                    None => return None,
                };
                self.open.retain(|open| *open != table);
                self.is_called(table, tag).then_some(Finished { table, item: Some(item) })
            }
        }
    }

    fn is_called(&self, table: usize, tag: &str) -> bool {
        self.tables.get(table).is_some_and(|table| table.name == tag)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Said<'a> {
    Begins(&'a str),
    Finished(u32, &'a str),
}

fn understood(line: &str) -> Option<Said<'_>> {
    let mut text = line;
    while let Some(rest) = ["pg_dump:", "pg_restore:", " "].iter().find_map(|start| text.strip_prefix(start)) {
        text = rest;
    }
    let begins = ["dumping contents of table \"", "processing data for table \""];
    if let Some(name) = begins.iter().find_map(|words| text.strip_prefix(words)) {
        return name.strip_suffix('"').map(Said::Begins);
    }
    let (item, rest) = text.strip_prefix("finished item ")?.split_once(' ')?;
    Some(Said::Finished(item.parse().ok()?, rest.strip_prefix("TABLE DATA ")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tables() -> Vec<QualifiedName> {
        vec![
            QualifiedName::new("public", "orders"),
            QualifiedName::new("old", "orders"),
            QualifiedName::new("public", "a b"),
        ]
    }

    fn finished(table: usize, item: Option<u32>) -> Option<Finished> {
        Some(Finished { table, item })
    }

    #[test]
    fn with_several_workers_the_programs_tell_each_end() {
        let mut dump = Course::new(tables(), HashMap::new(), 4);
        assert_eq!(dump.hears("pg_dump: dumping contents of table \"old.orders\""), None);
        assert_eq!(dump.hears("pg_dump: dumping contents of table \"public.a b\""), None);
        assert_eq!(dump.hears("pg_dump: finished item 12 TABLE DATA orders"), finished(1, Some(12)));
        assert_eq!(dump.hears("pg_dump: pg_dump: finished item 13 TABLE DATA a b"), finished(2, Some(13)));
        assert_eq!(dump.hears("pg_dump: finished item 14 SEQUENCE SET orders_id"), None);
        // Lines of two processes in one another.
        assert_eq!(dump.hears("pg_dump:pg_dump:  dumping contents of table \"public.orders\""), None);
        assert_eq!(dump.hears(" finished item 15 TABLE DATA orders"), finished(0, Some(15)));
        let mut restore = Course::new(tables(), HashMap::from([(7, 0), (8, 1)]), 4);
        assert_eq!(restore.hears("pg_restore: finished item 8 TABLE DATA orders"), finished(1, Some(8)));
        assert_eq!(restore.hears("finished item 7 TABLE DATA orders"), finished(0, Some(7)));
    }

    #[test]
    fn with_one_worker_the_next_table_ends_the_one_before() {
        let mut course = Course::new(tables(), HashMap::new(), 1);
        assert_eq!(course.hears("pg_restore: processing data for table \"public.orders\""), None);
        assert_eq!(course.hears("pg_restore: processing data for table \"public.a b\""), finished(0, None));
        assert_eq!(course.hears("pg_restore: processing data for table \"somebody.else\""), finished(2, None));
        assert_eq!(course.hears("pg_restore: processing data for table \"old.orders\""), None);
    }

    #[test]
    fn a_name_cannot_pass_for_the_end_of_another_table() {
        let mut course = Course::new(tables(), HashMap::from([(7, 0)]), 4);
        let line = "pg_restore: processing data for table \"public.x finished item 7 TABLE DATA orders\"";
        assert_eq!(course.hears(line), None);
        assert_eq!(course.hears("pg_restore: finished item 7 TABLE DATA orders\""), None);
        assert_eq!(course.hears("pg_restore: finished item 9 TABLE DATA orders"), None);
        let mut forged = tables();
        forged.push(QualifiedName::new("public", "x\nfinished item 7 TABLE DATA orders"));
        let mut course = Course::new(forged, HashMap::from([(7, 0)]), 4);
        assert_eq!(course.hears("finished item 7 TABLE DATA orders"), None);
    }

    #[test]
    fn two_tables_that_are_printed_alike_are_not_told_apart() {
        let twins = vec![QualifiedName::new("a.b", "c"), QualifiedName::new("a", "b.c")];
        let mut course = Course::new(twins, HashMap::new(), 1);
        assert_eq!(course.hears("pg_dump: dumping contents of table \"a.b.c\""), None);
        assert_eq!(course.hears("pg_dump: dumping contents of table \"a.b.c\""), None);
    }

    proptest! {
        #[test]
        fn no_line_is_too_strange(lines in proptest::collection::vec(".{0,60}", 0..20), workers in 1..4usize) {
            let mut course = Course::new(tables(), HashMap::from([(7, 0)]), workers);
            for line in lines {
                prop_assert_eq!(course.hears(&line), None);
            }
        }
    }
}
