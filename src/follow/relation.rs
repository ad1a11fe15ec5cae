//! A relation of the stream beside its table on the target: which columns are written, what finds a row.
//!
//! [`Plan::new`] is pure: it compares what the stream announces with what the target's catalog says, and refuses
//! whatever would put a value into the wrong place. The statements are text with `$n` for values, which the server
//! reads with each column's own input function: values travel as the source printed them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};

use super::target_table::{Many, TargetColumn, TargetTable};
use crate::error::{Class, Error, Result};
use crate::postgres::pgoutput::{Relation, RelationColumn, Tuple, Value};
use crate::postgres::{QualifiedName, quote_identifier, quote_literal};

/// Types below this oid have the same oid everywhere (`FirstGenbkiObjectId`). From here up to 16383 oids are given out by
/// initdb, and differ between versions (the domains of `information_schema`); the stream names every type from here on.
const FIRST_USER_OID: u32 = 10_000;

/// How a row of the relation is found on the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Finder {
    /// By these columns: positions in the relation.
    Key(Vec<usize>),
    /// By all columns, one row of those that look the same.
    WholeRow,
    /// Not at all: the source publishes inserts only.
    Nothing,
}

/// What to do with the changes of one relation.
#[derive(Debug)]
pub(super) struct Plan {
    /// Tells this shape of the relation from an earlier one, in the names of prepared statements.
    pub generation: u64,
    pub name: QualifiedName,
    pub finder: Finder,
    /// Something on the target reacts to applied rows, so that their order can be noticed.
    pub observed: bool,
    pub(super) columns: Vec<PlannedColumn>,
    partitioned: bool,
    /// How the statements for sets fared.
    pub sets: SetsTried,
}

#[derive(Debug)]
pub(super) struct PlannedColumn {
    /// Quoted.
    pub name: String,
    /// The target computes generated columns itself.
    pub written: bool,
    pub equality: String,
    /// The type that a parameter is read as before it is compared: beside a composite, a bare one would be an anonymous
    /// record, which has no input.
    pub type_name: QualifiedName,
    /// See [`super::target_table::TargetColumn::leads`].
    pub leads: bool,
    /// See [`super::target_table::TargetColumn::parts`].
    pub parts: bool,
    pub many: Many,
}

/// Whether statements for sets are worth another try on a table where they were refused. A refusal costs the work of the whole
/// stretch, and a table whose rows exchange unique values will be refused again: each refusal doubles the pause.
#[derive(Debug, Default)]
pub(super) struct SetsTried {
    /// Stretches for which the table is left to the ordered path.
    pause: AtomicU32,
    /// The length of the last pause.
    last: AtomicU32,
}

impl SetsTried {
    const LONGEST: u32 = 256;

    /// They were refused.
    pub(super) fn refused(&self) {
        let pause = (self.last.load(Ordering::Relaxed) * 2).clamp(1, Self::LONGEST);
        self.last.store(pause, Ordering::Relaxed);
        // The stretch in which it was refused goes by as well.
        self.pause.store(pause + 1, Ordering::Relaxed);
    }

    pub(super) fn are_paused(&self) -> bool {
        self.pause.load(Ordering::Relaxed) > 0
    }

    /// A stretch went by.
    pub(super) fn next(&self) {
        // Only one session works with a plan at a time.
        self.pause.store(self.pause.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
    }
}

impl Plan {
    /// Matches columns by name. `types` are the names of the source's types that are not built in.
    ///
    /// # Errors
    /// Class operator: the target's table is missing, misses a column, or has one of another type.
    pub(super) fn new(
        relation: &Relation,
        target: Option<&TargetTable>,
        types: &HashMap<u32, QualifiedName>,
        generation: u64,
    ) -> Result<Self> {
        let table = relation.name.plain();
        let Some(target) = target else {
            return Err(Error::new(Class::Operator, "table_missing", format!("the target has no table {table}"))
                .hint(format!("create {} on the target as it is on the source, then start again", relation.name)));
        };
        let mut columns = Vec::with_capacity(relation.columns.len());
        for column in &relation.columns {
            let Some(found) = target.columns.iter().find(|c| c.name == column.name) else {
                return Err(shape(&table, &format!("column {:?} is missing on the target", column.name)));
            };
            if !is_same_type(column, found, types) {
                return Err(shape(&table, &format!("column {:?} has another type on the target", column.name)));
            }
            columns.push(PlannedColumn {
                name: quote_identifier(&column.name),
                written: !found.generated,
                equality: found.equality.clone().unwrap_or_else(|| "OPERATOR(pg_catalog.=)".to_owned()),
                type_name: found.type_name.clone(),
                leads: found.leads,
                parts: found.parts && !target.partitioned,
                many: found.many,
            });
        }
        Ok(Self {
            generation,
            name: relation.name.clone(),
            finder: finder(relation, target),
            observed: target.observed,
            columns,
            partitioned: target.partitioned,
            sets: SetsTried::default(),
        })
    }

    /// Whether many of its rows can be changed by one statement.
    pub(super) fn takes_sets(&self) -> bool {
        !self.observed
            && self.columns.iter().any(|column| column.written)
            && self.columns.iter().all(|column| column.many != Many::Never)
    }

    /// Whether two of its rows can be changed at the same time, if their keys differ; see [`super::shares`].
    pub(super) fn splits(&self) -> bool {
        let parts = |at: &usize| self.columns.get(*at).is_some_and(|column| column.parts);
        matches!(&self.finder, Finder::Key(key) if key.iter().all(parts))
    }

    /// Positions of the columns that an update to this row writes, without those that find it.
    pub(super) fn set_by(&self, row: &Tuple) -> Vec<usize> {
        let key: &[usize] = match &self.finder {
            Finder::Key(key) => key,
            Finder::WholeRow | Finder::Nothing => &[],
        };
        row.values()
            .enumerate()
            .filter(|(at, value)| *value != Value::Unchanged && self.is_written(*at) && !key.contains(at))
            .map(|(at, _)| at)
            .collect()
    }

    /// How many values a row of the stream has.
    pub(super) fn width(&self) -> usize {
        self.columns.len()
    }

    /// Whether the column at this position is written at all.
    pub(super) fn is_written(&self, at: usize) -> bool {
        self.columns.get(at).is_some_and(|c| c.written)
    }

    /// `INSERT` of all written columns, in the relation's order.
    pub(super) fn insert(&self) -> String {
        let names: Vec<_> = self.columns.iter().filter(|c| c.written).map(|c| c.name.as_str()).collect();
        if names.is_empty() {
            return format!("INSERT INTO {} DEFAULT VALUES", self.name);
        }
        let values: Vec<_> = (1..=names.len()).map(|n| format!("${n}")).collect();
        // Values of identity columns come from the source, GENERATED ALWAYS or not.
        format!(
            "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({})",
            self.name,
            names.join(", "),
            values.join(", ")
        )
    }

    /// `UPDATE` of the columns at `set`, in that order, then what finds the row.
    ///
    /// `nulls` tells, for [`Finder::WholeRow`], which columns of the old row are NULL and take no parameter.
    pub(super) fn update(&self, set: &[usize], nulls: &[bool]) -> String {
        let mut next = 0;
        let mut parameter = || {
            next += 1;
            format!("${next}")
        };
        let mut assignments: Vec<String> = set
            .iter()
            .filter_map(|&at| self.columns.get(at))
            .map(|column| format!("{} = {}", column.name, parameter()))
            .collect();
        if assignments.is_empty() {
            // Nothing that we write changed, but the row must be there all the same.
            let any = self.columns.iter().find(|c| c.written).map_or("ctid", |c| c.name.as_str());
            assignments.push(format!("{any} = {any}"));
        }
        let condition = self.condition(&mut parameter, nulls);
        format!("UPDATE {}{} SET {} WHERE {condition}", self.only(), self.name, assignments.join(", "))
    }

    /// `DELETE` of what is found. For `nulls` see [`Plan::update`].
    pub(super) fn delete(&self, nulls: &[bool]) -> String {
        let mut next = 0;
        let mut parameter = || {
            next += 1;
            format!("${next}")
        };
        let condition = self.condition(&mut parameter, nulls);
        format!("DELETE FROM {}{} WHERE {condition}", self.only(), self.name)
    }

    /// The name as TRUNCATE wants it.
    pub(super) fn truncated(&self) -> String {
        format!("{}{}", self.only(), self.name)
    }

    /// Children of an inheritance parent are relations of their own in the stream.
    pub(super) fn only(&self) -> &'static str {
        if self.partitioned { "" } else { "ONLY " }
    }

    fn condition(&self, parameter: &mut impl FnMut() -> String, nulls: &[bool]) -> String {
        match &self.finder {
            Finder::Key(key) => key
                .iter()
                .filter_map(|&at| self.columns.get(at))
                .map(|column| format!("{} {} {}::{}", column.name, column.equality, parameter(), column.type_name))
                .collect::<Vec<_>>()
                .join(" AND "),
            Finder::WholeRow => {
                // Compared as printed: works for types without equality, and tells 1.0 from 1.00. Of rows that look
                // the same any one will do, but only one; a collation of the column may hold more of them for the same.
                // IS NULL would also find a composite whose fields are all NULL.
                let mut alike = Vec::with_capacity(self.columns.len() + 1);
                let mut by_index = None;
                for (at, column) in self.columns.iter().enumerate() {
                    if nulls.get(at).copied().unwrap_or(false) {
                        alike.push(format!("{} IS NOT DISTINCT FROM NULL", column.name));
                        continue;
                    }
                    let parameter = parameter();
                    alike.push(format!(
                        "pg_catalog.format('%s', {0}) COLLATE \"C\" = {parameter}::text AND {0} IS DISTINCT FROM NULL",
                        column.name
                    ));
                    // What looks the same is equal, and by that an index finds the rows to look at.
                    if column.leads && by_index.is_none() {
                        let value = format!("{parameter}::text::{}", column.type_name);
                        by_index = Some(format!("{} {} {value}", column.name, column.equality));
                    }
                }
                alike.extend(by_index);
                let alike = if alike.is_empty() { "true".to_owned() } else { alike.join(" AND ") };
                format!(
                    "(tableoid, ctid) = (SELECT tableoid, ctid FROM {}{} WHERE {alike} LIMIT 1)",
                    self.only(),
                    self.name
                )
            }
            Finder::Nothing => "false".to_owned(),
        }
    }
}

/// Asks the target for the names of the relation's types: built-in ones have the same oid everywhere, and those of extensions
/// and users are known by name from the stream. [`mending`] reads the answer.
pub(super) fn type_names_query(relation: &Relation, types: &HashMap<u32, QualifiedName>) -> String {
    let names = relation.columns.iter().map(|column| match types.get(&column.type_oid) {
        Some(name) => quote_literal(&name.to_string()),
        None => format!("pg_catalog.format_type({}, {})", column.type_oid, column.type_modifier),
    });
    format!("SELECT unnest(ARRAY[{}]::text[])", names.collect::<Vec<_>>().join(", "))
}

/// The statements that give the target's table the columns and types that the source announces. Pure.
pub(super) fn mending(
    relation: &Relation,
    target: &TargetTable,
    types: &HashMap<u32, QualifiedName>,
    names: &[String],
) -> String {
    let statements = relation.columns.iter().zip(names).filter_map(|(column, name)| {
        let quoted = quote_identifier(&column.name);
        match target.columns.iter().find(|found| found.name == column.name) {
            None => Some(format!("ADD COLUMN {quoted} {name}")),
            Some(found) if !is_same_type(column, found, types) => Some(format!("ALTER COLUMN {quoted} TYPE {name}")),
            Some(_) => None,
        }
    });
    format!("ALTER TABLE {} {}", relation.name, statements.collect::<Vec<_>>().join(", "))
}

/// Under REPLICA IDENTITY FULL the target's primary key finds the row faster than the whole row, if the old row that
/// the stream brings holds all of it.
fn finder(relation: &Relation, target: &TargetTable) -> Finder {
    let position = |name: &str| relation.columns.iter().position(|c| c.name == name);
    let flagged: Vec<usize> = relation.columns.iter().enumerate().filter(|(_, c)| c.key).map(|(at, _)| at).collect();
    match relation.identity {
        b'f' => {
            let key: Option<Vec<usize>> =
                target.columns.iter().filter(|c| c.primary_key).map(|c| position(&c.name)).collect();
            match key {
                Some(key) if !key.is_empty() => Finder::Key(key),
                _ => Finder::WholeRow,
            }
        }
        _ if flagged.is_empty() => Finder::Nothing,
        _ => Finder::Key(flagged),
    }
}

fn is_same_type(column: &RelationColumn, found: &TargetColumn, types: &HashMap<u32, QualifiedName>) -> bool {
    let same_type = if column.type_oid < FIRST_USER_OID {
        column.type_oid == found.type_oid
    } else {
        types.get(&column.type_oid).is_none_or(|name| *name == found.type_name)
    };
    // The modifier of an extension's type, such as geometry(Point), says as much as that of varchar(10).
    same_type && column.type_modifier == found.type_modifier
}

fn shape(table: &str, what: &str) -> Error {
    Error::new(Class::Operator, "shape_differs", format!("table {table} differs between the sides: {what}"))
        .hint("make the same change to the table on the target; nothing of the change was applied")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The plan of a table of so many columns of text.
    pub(in crate::follow) fn planned(finder: Finder, columns: usize) -> Plan {
        let column = |at| PlannedColumn {
            name: quote_identifier(&format!("c{at}")),
            written: true,
            equality: "OPERATOR(pg_catalog.=)".into(),
            type_name: QualifiedName::new("pg_catalog", "text"),
            leads: false,
            parts: false,
            many: Many::Array { delimiter: b',' },
        };
        Plan {
            generation: 1,
            name: QualifiedName::new("public", "t"),
            finder,
            observed: false,
            columns: (0..columns).map(column).collect(),
            partitioned: false,
            sets: SetsTried::default(),
        }
    }

    fn relation(identity: u8, columns: &[(&str, bool, u32)]) -> Relation {
        Relation {
            oid: 1,
            name: QualifiedName::new("public", "t"),
            identity,
            columns: columns
                .iter()
                .map(|(name, key, type_oid)| RelationColumn {
                    name: (*name).into(),
                    key: *key,
                    type_oid: *type_oid,
                    type_modifier: -1,
                })
                .collect(),
        }
    }

    fn target(columns: &[(&str, u32, bool, bool)]) -> TargetTable {
        TargetTable {
            partitioned: false,
            observed: false,
            columns: columns
                .iter()
                .map(|(name, type_oid, primary_key, generated)| TargetColumn {
                    name: (*name).into(),
                    type_oid: *type_oid,
                    type_name: QualifiedName::new("pg_catalog", "int4"),
                    type_modifier: -1,
                    generated: *generated,
                    primary_key: *primary_key,
                    equality: Some("OPERATOR(pg_catalog.=)".into()),
                    leads: false,
                    parts: false,
                    many: Many::Array { delimiter: b',' },
                })
                .collect(),
        }
    }

    fn plan(relation: &Relation, target: &TargetTable) -> Result<Plan> {
        Plan::new(relation, Some(target), &HashMap::new(), 0)
    }

    #[test]
    fn rows_are_found_by_their_key() {
        let plan = plan(
            &relation(b'd', &[("id", true, 23), ("v", false, 25)]),
            &target(&[("v", 25, false, false), ("id", 23, true, false)]),
        )
        .unwrap();
        assert_eq!(plan.insert(), r#"INSERT INTO "public"."t" ("id", "v") OVERRIDING SYSTEM VALUE VALUES ($1, $2)"#);
        assert_eq!(
            plan.update(&[1], &[]),
            r#"UPDATE ONLY "public"."t" SET "v" = $1 WHERE "id" OPERATOR(pg_catalog.=) $2::"pg_catalog"."int4""#
        );
        assert_eq!(
            plan.delete(&[]),
            r#"DELETE FROM ONLY "public"."t" WHERE "id" OPERATOR(pg_catalog.=) $1::"pg_catalog"."int4""#
        );
    }

    #[test]
    fn a_full_identity_uses_the_primary_key_of_the_target_if_there_is_one() {
        let full = relation(b'f', &[("id", true, 23), ("v", true, 25)]);
        let keyed = target(&[("id", 23, true, false), ("v", 25, false, false)]);
        assert_eq!(plan(&full, &keyed).unwrap().finder, Finder::Key(vec![0]));
        let keyless = target(&[("id", 23, false, false), ("v", 25, false, false)]);
        let whole = plan(&full, &keyless).unwrap();
        assert_eq!(whole.finder, Finder::WholeRow);
        let sql = whole.delete(&[false, true]);
        assert!(
            sql.contains("LIMIT 1")
                && sql.contains(r#""v" IS NOT DISTINCT FROM NULL"#)
                && sql.contains("$1")
                && !sql.contains("$2")
        );
    }

    #[test]
    fn generated_columns_are_left_to_the_target() {
        let plan = plan(
            &relation(b'd', &[("id", true, 23), ("sum", false, 23)]),
            &target(&[("id", 23, true, false), ("sum", 23, false, true)]),
        )
        .unwrap();
        assert!(!plan.insert().contains("sum"));
    }

    #[test]
    fn types_made_by_initdb_are_known_by_name_and_modifier() {
        // information_schema.sql_identifier has another oid on each version, and is a domain over name.
        let source = relation(b'd', &[("id", true, 23), ("v", false, 13_300)]);
        let mut other = target(&[("id", 23, true, false), ("v", 14_200, false, false)]);
        other.columns[1].type_name = QualifiedName::new("pg_catalog", "name");
        let named = |name| HashMap::from([(13_300, QualifiedName::new("pg_catalog", name))]);
        let with = |target: &TargetTable, name| Plan::new(&source, Some(target), &named(name), 0);
        assert!(with(&other, "name").is_ok());
        assert_eq!(with(&other, "text").unwrap_err().code(), "shape_differs");
        other.columns[1].type_modifier = 14;
        assert_eq!(with(&other, "name").unwrap_err().code(), "shape_differs");
    }

    #[test]
    fn a_key_is_compared_as_the_type_of_its_column() {
        let mut keyed = target(&[("id", 16_400, true, false)]);
        keyed.columns[0].type_name = QualifiedName::new("app", "pair");
        let plan = plan(&relation(b'd', &[("id", true, 16_500)]), &keyed).unwrap();
        assert!(plan.delete(&[]).ends_with(r#""id" OPERATOR(pg_catalog.=) $1::"app"."pair""#), "{}", plan.delete(&[]));
    }

    #[test]
    fn another_shape_is_refused_before_a_row_is_applied() {
        let source = relation(b'd', &[("id", true, 23), ("v", false, 25)]);
        let missing = plan(&source, &target(&[("id", 23, true, false)])).unwrap_err();
        assert_eq!((missing.code(), missing.class()), ("shape_differs", Class::Operator));
        let other = plan(&source, &target(&[("id", 20, true, false), ("v", 25, false, false)])).unwrap_err();
        assert_eq!(other.code(), "shape_differs");
        let gone = Plan::new(&source, None, &HashMap::new(), 0).unwrap_err();
        assert_eq!(gone.code(), "table_missing");
    }

    #[test]
    fn what_is_to_be_done_to_the_target_is_said() {
        let relation = relation(b'd', &[("id", true, 23), ("v", false, 20), ("new", false, 16_400)]);
        let target = target(&[("id", 23, true, false), ("v", 23, false, false)]);
        let types = HashMap::from([(16_400, QualifiedName::new("app", "mood"))]);
        let names = ["integer", "bigint", "\"app\".\"mood\""].map(str::to_owned);
        assert_eq!(
            mending(&relation, &target, &types, &names),
            r#"ALTER TABLE "public"."t" ALTER COLUMN "v" TYPE bigint, ADD COLUMN "new" "app"."mood""#
        );
    }
}
