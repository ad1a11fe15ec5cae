//! The table of contents of an archive, as `pg_restore --list` prints it, sorted into the steps of a move.
//!
//! A line reads `215; 1259 16386 TABLE public my table app`: the entry's number, the object's catalog and oid on
//! the source, its kind, its schema (`-` without one), its name, its owner. Kinds, schemas, names and owners
//! may all hold spaces, so schemas and owners are recognised by those that the source has.
//!
//! Pure: no I/O. What is not known here is restored, never dropped.

use std::collections::{HashMap, HashSet};

use crate::postgres::provider;

/// One object of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The whole line, as `pg_restore --use-list` takes it back.
    pub line: String,
    /// The entry's number in its archive.
    pub number: u32,
    /// `pg_depend`'s name of the object on the source: the catalog's oid and the object's; zeroes where it has none.
    pub object: (u32, u32),
    /// Such as `TABLE` or `FK CONSTRAINT`.
    pub kind: String,
    /// `None` for objects outside schemas.
    pub schema: Option<String>,
    /// The name; for what belongs to a table, the table's name comes first.
    pub tag: String,
    /// Empty where there is none.
    pub owner: String,
    /// Numbers of the entries that come before it.
    pub needs: Vec<u32>,
}

/// When an entry is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// What rows need.
    BeforeData,
    /// Keys, indexes, statistics, policies.
    AfterData,
    /// Foreign keys.
    ForeignKeys,
    /// What would react to rows or statements: restored, then disabled until the cutover.
    HeldBack,
}

/// What sorting has to know beside the archive itself.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// Names of the source's schemas.
    pub schemas: HashSet<String>,
    /// Names of the source's roles.
    pub roles: HashSet<String>,
    /// Objects out of scope, and what cannot be without them.
    pub left_out: HashSet<(u32, u32)>,
    /// The source's bootstrap superuser: its ownership of the schema `public` is how a server is born.
    pub bootstrap_role: String,
}

/// An archive's entries by step, in the archive's order, and what stays behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    steps: HashMap<Step, Vec<Entry>>,
    /// Kind and name of each entry that is not restored.
    pub left_out: Vec<String>,
}

impl Contents {
    /// The entries of a step.
    #[must_use]
    pub fn of(&self, step: Step) -> &[Entry] {
        self.steps.get(&step).map_or(&[], Vec::as_slice)
    }

    /// Sorts what `pg_restore --list` printed: `before` with `--section=pre-data`, `after` with `--section=post-data`,
    /// `verbose` with `--verbose`, which tells what depends on what.
    #[must_use]
    pub fn sort(before: &str, after: &str, verbose: &str, context: &Context) -> Self {
        let mut dependencies = dependencies(verbose);
        let mut contents = Self::default();
        let mut steps: HashMap<u32, Option<Step>> = HashMap::new();
        let entries = |list: &str| parse(list, context);
        let both = entries(before)
            .into_iter()
            .map(|e| (e, Step::BeforeData))
            .chain(entries(after).into_iter().map(|e| (e, Step::AfterData)));
        let all: Vec<_> = both.collect();
        // Comments, grants and labels go with their object, so objects are decided first.
        for (entry, section) in all.iter().filter(|(entry, _)| !is_attachment(&entry.kind)) {
            steps.insert(entry.number, step_of(entry, *section, context));
        }
        let mut seen = HashSet::new();
        for (mut entry, section) in all {
            // An entry without a section of its own is listed in both.
            if !seen.insert(entry.number) {
                continue;
            }
            entry.needs = dependencies.remove(&entry.number).unwrap_or_default();
            let step = if is_attachment(&entry.kind) {
                attached_to(&entry, &steps, section)
            } else {
                steps.get(&entry.number).copied().flatten()
            };
            match step {
                Some(step) => contents.steps.entry(step).or_default().push(entry),
                None => contents.left_out.push(format!("{} {}", entry.kind, entry.plain())),
            }
        }
        contents
    }
}

/// Tables that need nothing but their schema, and everything else. The former can be made in any order, and before the latter.
#[must_use]
pub fn plain_tables<'e>(entries: &[&'e Entry]) -> (Vec<&'e Entry>, Vec<&'e Entry>) {
    let others: HashSet<u32> =
        entries.iter().filter(|entry| entry.kind != "SCHEMA").map(|entry| entry.number).collect();
    let is_plain = |entry: &&Entry| entry.kind == "TABLE" && !entry.needs.iter().any(|needed| others.contains(needed));
    entries.iter().partition(|entry| is_plain(entry))
}

impl Entry {
    /// Schema and name for people.
    #[must_use]
    pub fn plain(&self) -> String {
        match &self.schema {
            Some(schema) => format!("{schema}.{}", self.tag),
            None => self.tag.clone(),
        }
    }
}

/// Kinds that say something about another entry.
fn is_attachment(kind: &str) -> bool {
    matches!(kind, "COMMENT" | "ACL" | "SECURITY LABEL")
}

/// The step of an object, or `None` if it stays behind.
fn step_of(entry: &Entry, section: Step, context: &Context) -> Option<Step> {
    if context.left_out.contains(&entry.object) && entry.object != (0, 0) {
        return None;
    }
    match entry.kind.as_str() {
        "PUBLICATION"
        | "PUBLICATION TABLE"
        | "PUBLICATION TABLES IN SCHEMA"
        | "SUBSCRIPTION"
        | "SUBSCRIPTION TABLE" => None,
        // Rows have their own way, and so have the values of sequences.
        "TABLE DATA"
        | "SEQUENCE SET"
        | "MATERIALIZED VIEW DATA"
        | "BLOB"
        | "BLOBS"
        | "BLOB METADATA"
        | "STATISTICS DATA" => None,
        "EXTENSION" if provider::EXTENSIONS.contains(&entry.tag.as_str()) => None,
        "SCHEMA" if provider::SCHEMAS.contains(&entry.tag.as_str()) => None,
        "SCHEMA" if entry.tag == "public" && entry.owner == context.bootstrap_role => None,
        "FK CONSTRAINT" => Some(Step::ForeignKeys),
        "TRIGGER" | "EVENT TRIGGER" => Some(Step::HeldBack),
        // The rule behind a view is the view's query, which pg_dump adds late where views and keys need each other.
        "RULE" if entry.tag.ends_with(" _RETURN") => Some(section),
        "RULE" => Some(Step::HeldBack),
        _ => Some(section),
    }
}

/// Where a comment, grant or label goes: to the object that it depends on, and nowhere if that stays behind.
fn attached_to(entry: &Entry, steps: &HashMap<u32, Option<Step>>, section: Step) -> Option<Step> {
    // Setting the comment of an extension takes its owner, who is often the provider; CREATE EXTENSION set it already.
    if entry.kind == "COMMENT" && entry.tag.starts_with("EXTENSION ") {
        return None;
    }
    let known: Vec<_> = entry.needs.iter().filter_map(|number| steps.get(number).copied()).collect();
    if known.is_empty() || entry.tag.starts_with("SCHEMA ") {
        return Some(section);
    }
    if known.iter().any(Option::is_none) {
        return None;
    }
    known.into_iter().flatten().max_by_key(|step| match step {
        Step::BeforeData => 0,
        Step::AfterData => 1,
        Step::ForeignKeys => 2,
        Step::HeldBack => 3,
    })
}

/// All kinds that pg_dump 13 to 18 write with more than one word.
const LONG_KINDS: &[&str] = &[
    "ACCESS METHOD",
    "ACL LANGUAGE",
    "BLOB COMMENTS",
    "BLOB METADATA",
    "CHECK CONSTRAINT",
    "DATABASE PROPERTIES",
    "DEFAULT ACL",
    "EVENT TRIGGER",
    "FK CONSTRAINT",
    "FOREIGN DATA WRAPPER",
    "FOREIGN SERVER",
    "FOREIGN TABLE",
    "INDEX ATTACH",
    "MATERIALIZED VIEW DATA",
    "MATERIALIZED VIEW",
    "OPERATOR CLASS",
    "OPERATOR FAMILY",
    "PROCEDURAL LANGUAGE",
    "PUBLICATION TABLES IN SCHEMA",
    "PUBLICATION TABLE",
    "ROW SECURITY",
    "SECURITY LABEL",
    "SEQUENCE OWNED BY",
    "SEQUENCE SET",
    "SHELL TYPE",
    "STATISTICS DATA",
    "SUBSCRIPTION TABLE",
    "TABLE ATTACH",
    "TABLE DATA",
    "TEXT SEARCH CONFIGURATION",
    "TEXT SEARCH DICTIONARY",
    "TEXT SEARCH PARSER",
    "TEXT SEARCH TEMPLATE",
    "USER MAPPING",
];

/// The entries of a list; comment lines and what cannot be an entry are passed over.
#[must_use]
pub fn parse(list: &str, context: &Context) -> Vec<Entry> {
    list.lines().filter_map(|line| entry(line, context)).collect()
}

fn entry(line: &str, context: &Context) -> Option<Entry> {
    let (number, rest) = line.split_once("; ")?;
    let (catalog, rest) = rest.split_once(' ')?;
    let (oid, rest) = rest.split_once(' ')?;
    let (kind, rest) = split_kind(rest)?;
    let (schema, rest) = split_schema(rest, &context.schemas)?;
    let (tag, owner) = split_owner(rest, &context.roles);
    Some(Entry {
        line: line.to_owned(),
        number: number.parse().ok()?,
        object: (catalog.parse().ok()?, oid.parse().ok()?),
        kind: kind.to_owned(),
        schema: schema.map(str::to_owned),
        tag: tag.to_owned(),
        owner: owner.to_owned(),
        needs: Vec::new(),
    })
}

fn split_kind(rest: &str) -> Option<(&str, &str)> {
    LONG_KINDS
        .iter()
        .find_map(|kind| rest.strip_prefix(kind)?.strip_prefix(' ').map(|rest| (*kind, rest)))
        .or_else(|| rest.split_once(' '))
}

/// The longest schema that fits; the first word if none is known.
fn split_schema<'a>(rest: &'a str, schemas: &HashSet<String>) -> Option<(Option<&'a str>, &'a str)> {
    if let Some(rest) = rest.strip_prefix("- ") {
        return Some((None, rest));
    }
    let known = rest
        .rmatch_indices(' ')
        .map(|(at, _)| rest.split_at(at))
        .find(|(schema, _)| schemas.contains(*schema))
        .map(|(schema, rest)| (schema, rest.get(1..).unwrap_or_default()));
    let (schema, rest) = known.or_else(|| rest.split_once(' '))?;
    Some((Some(schema), rest))
}

/// The longest owner that fits; the last word if none is known. An entry without an owner ends with a space.
fn split_owner<'a>(rest: &'a str, roles: &HashSet<String>) -> (&'a str, &'a str) {
    let split = |at: usize| (rest.get(..at).unwrap_or_default(), rest.get(at + 1..).unwrap_or_default());
    rest.match_indices(' ')
        .map(|(at, _)| split(at))
        .find(|(_, owner)| roles.contains(*owner))
        .or_else(|| rest.rsplit_once(' '))
        .unwrap_or((rest, ""))
}

/// From `;<tab>depends on: 215 3158` below an entry's line to the numbers that the entry needs.
fn dependencies(verbose: &str) -> HashMap<u32, Vec<u32>> {
    let mut found = HashMap::new();
    let mut current = None;
    for line in verbose.lines() {
        if let Some(list) = line.strip_prefix(";\tdepends on:") {
            if let Some(number) = current {
                let numbers = list.split_whitespace().filter_map(|number| number.parse().ok()).collect();
                found.insert(number, numbers);
            }
        } else if let Some((number, _)) = line.split_once("; ") {
            current = number.parse::<u32>().ok();
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn context() -> Context {
        let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        Context {
            schemas: set(&["public", "my app", "my"]),
            roles: set(&["postgres", "the owner", "owner"]),
            left_out: [(1259, 99), (2606, 77)].into(),
            bootstrap_role: "postgres".into(),
        }
    }

    fn one(line: &str) -> Entry {
        parse(line, &context()).remove(0)
    }

    #[test]
    fn names_with_spaces_are_split_by_what_the_source_has() {
        let entry = one("215; 1259 16386 TABLE my app odd name the owner");
        assert_eq!(entry.schema.as_deref(), Some("my app"));
        assert_eq!((entry.tag.as_str(), entry.owner.as_str()), ("odd name", "the owner"));
        assert_eq!(entry.object, (1259, 16386));
    }

    #[test]
    fn entries_without_schema_or_owner() {
        let extension = one("2; 3079 16385 EXTENSION - citext ");
        assert_eq!((extension.schema, extension.tag.as_str(), extension.owner.as_str()), (None, "citext", ""));
        assert_eq!(one("9; 0 0 ACL - SCHEMA public postgres").tag, "SCHEMA public");
    }

    const BEFORE: &str = "\
;
; Archive created at 2026-01-01
5; 2615 2200 SCHEMA - public postgres
6; 2615 3000 SCHEMA - neon_migration postgres
7; 2615 3001 SCHEMA - neon_auth postgres
2; 3079 16385 EXTENSION - citext \n\
10; 0 0 COMMENT - EXTENSION citext \n\
215; 1259 16386 TABLE public t owner
216; 0 0 COMMENT public TABLE t owner
217; 1259 99 TABLE public out_of_scope owner
218; 0 0 ACL public TABLE out_of_scope owner
400; 6104 50 PUBLICATION - everything owner
";
    const AFTER: &str = "\
300; 2606 70 CONSTRAINT public t t_pkey owner
301; 2606 71 FK CONSTRAINT public t t_fk owner
302; 0 0 COMMENT public CONSTRAINT t_fk ON t owner
303; 2606 77 FK CONSTRAINT public t to_out_of_scope owner
304; 2620 72 TRIGGER public t touch owner
305; 2618 73 RULE public t redirect owner
306; 2618 74 RULE public v _RETURN owner
307; 3466 75 EVENT TRIGGER - audit postgres
308; 0 0 ROW SECURITY public t owner
";
    const VERBOSE: &str = "\
216; 0 0 COMMENT public TABLE t owner
;\tdepends on: 215
218; 0 0 ACL public TABLE out_of_scope owner
;\tdepends on: 217
302; 0 0 COMMENT public CONSTRAINT t_fk ON t owner
;\tdepends on: 301
";

    #[test]
    fn tables_that_need_only_their_schema_are_plain() {
        let before = "\
6; 2615 3000 SCHEMA - my owner
7; 1247 3001 TYPE my mood owner
10; 1259 30 TABLE my alone owner
11; 1259 31 TABLE my moody owner
12; 1259 32 TABLE my child owner
13; 1259 33 SEQUENCE my alone_seq owner
";
        let verbose = "\
10; 1259 30 TABLE my alone owner
;\tdepends on: 6
11; 1259 31 TABLE my moody owner
;\tdepends on: 6 7
12; 1259 32 TABLE my child owner
;\tdepends on: 10 6
13; 1259 33 SEQUENCE my alone_seq owner
;\tdepends on: 10
";
        let contents = Contents::sort(before, "", verbose, &context());
        let entries: Vec<&Entry> = contents.of(Step::BeforeData).iter().collect();
        let (plain, others) = plain_tables(&entries);
        let numbers = |entries: Vec<&Entry>| entries.iter().map(|entry| entry.number).collect::<Vec<_>>();
        assert_eq!((numbers(plain), numbers(others)), (vec![10], vec![6, 7, 11, 12, 13]));
    }

    #[test]
    fn each_entry_goes_to_its_step() {
        let contents = Contents::sort(BEFORE, AFTER, VERBOSE, &context());
        let numbers = |step| contents.of(step).iter().map(|entry| entry.number).collect::<Vec<_>>();
        assert_eq!(numbers(Step::BeforeData), [7, 2, 215, 216]);
        assert_eq!(numbers(Step::AfterData), [300, 306, 308]);
        assert_eq!(numbers(Step::ForeignKeys), [301, 302]);
        assert_eq!(numbers(Step::HeldBack), [304, 305, 307]);
        assert_eq!(contents.left_out.len(), 7, "{:?}", contents.left_out);
    }

    proptest! {
        #[test]
        fn any_list_is_read_without_a_panic(list: String) {
            let contents = Contents::sort(&list, &list, &list, &context());
            prop_assert!(contents.left_out.len() <= list.lines().count());
        }

        #[test]
        fn every_entry_is_restored_or_named(kinds in proptest::collection::vec("[A-Z ]{1,12}", 0..20)) {
            let list: String = kinds.iter().enumerate().map(|(at, kind)| format!("{at}; 0 0 {kind}X public n owner\n")).collect();
            let contents = Contents::sort(&list, "", "", &context());
            let all = parse(&list, &context()).len();
            let placed: usize = [Step::BeforeData, Step::AfterData, Step::ForeignKeys, Step::HeldBack]
                .iter().map(|&step| contents.of(step).len()).sum();
            prop_assert_eq!(placed + contents.left_out.len(), all);
        }
    }
}
