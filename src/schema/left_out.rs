//! What `[move] include` and `exclude` leave behind: the tables themselves, and what cannot be without them, such as views
//! on them, their sequences, and foreign keys towards them.

use std::collections::{BTreeMap, HashSet};

use tokio_postgres::GenericClient;

use crate::config::Scope;
use crate::error::{Doing, Result};
use crate::postgres::{QualifiedName, catalog, quote_identifier};

/// Beyond this length an argument of a program is split; the kernel refuses 128 KiB.
const MAX_ARGUMENT: usize = 64 << 10;

/// Objects of the source that do not travel.
#[derive(Clone, Debug, Default)]
pub(super) struct LeftOut {
    /// Relations, for `pg_dump --exclude-table`.
    pub(super) relations: Vec<QualifiedName>,
    /// Every object, as `pg_depend` names it.
    pub(super) objects: HashSet<(u32, u32)>,
}

impl LeftOut {
    /// Asks the source.
    ///
    /// A partition is in scope with the partitioned tables above it, and takes them along where they are not.
    pub(super) async fn find(client: &impl GenericClient, scope: &Scope) -> Result<Self> {
        let mut left_out = Self::default();
        for row in client.query(OUR_EVENT_TRIGGERS, &[]).await.doing(|| "looking for event triggers of moves")? {
            left_out.objects.insert((row.try_get(0)?, row.try_get(1)?));
        }
        let members = catalog::members(client, scope).await?;
        let outside: Vec<u32> = members.values().filter(|table| !table.travels).map(|table| table.oid).collect();
        if outside.is_empty() {
            return Ok(left_out);
        }
        let rows = client.query(CLOSURE, &[&outside]).await.doing(|| "finding what depends on tables out of scope")?;
        for row in &rows {
            left_out.objects.insert((row.try_get(0)?, row.try_get(1)?));
            if let (Some(schema), Some(name)) =
                (row.try_get::<_, Option<String>>(2)?, row.try_get::<_, Option<String>>(3)?)
            {
                left_out.relations.push(QualifiedName { schema, name });
            }
        }
        Ok(left_out)
    }

    /// `--exclude-table` arguments: one pattern for each schema, `"schema".("a"|"b")`, split where it grows too long.
    pub(super) fn arguments(&self) -> Vec<String> {
        let mut by_schema: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for relation in &self.relations {
            by_schema.entry(&relation.schema).or_default().push(quote_identifier(&relation.name));
        }
        let mut arguments = Vec::new();
        for (schema, names) in by_schema {
            let mut chunk: Vec<String> = Vec::new();
            for name in names {
                if chunk.iter().map(|name| name.len() + 1).sum::<usize>() + name.len() > MAX_ARGUMENT {
                    arguments.push(exclude_table(schema, &chunk));
                    chunk.clear();
                }
                chunk.push(name);
            }
            arguments.push(exclude_table(schema, &chunk));
        }
        arguments
    }
}

fn exclude_table(schema: &str, names: &[String]) -> String {
    format!("--exclude-table={}.({})", quote_identifier(schema), names.join("|"))
}

/// Event triggers that moves made on the source: a dump that is made after a restart sees them, and their function stays behind
/// with its schema.
const OUR_EVENT_TRIGGERS: &str = "
    SELECT 'pg_catalog.pg_event_trigger'::pg_catalog.regclass::oid, e.oid
    FROM pg_catalog.pg_event_trigger e
    JOIN pg_catalog.pg_proc p ON p.oid = e.evtfoid
    JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname = 'pgtandem'";

/// `$1`: oids of tables. Returns catalog and oid of these and of everything that depends on them, with the name of each
/// that is a relation of its own. A table in scope is never taken along: pg_restore then says what it misses.
const CLOSURE: &str = r"
    WITH RECURSIVE gone (classid, objid) AS (
        SELECT 'pg_catalog.pg_class'::pg_catalog.regclass::oid, oid FROM unnest($1::oid[]) AS oid
        UNION
        SELECT more.classid, more.objid
        FROM gone
        CROSS JOIN LATERAL (
            SELECT d.classid, d.objid
            FROM pg_catalog.pg_depend d
            WHERE d.refclassid = gone.classid AND d.refobjid = gone.objid
              AND NOT EXISTS (
                SELECT FROM pg_catalog.pg_class t
                WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND t.oid = d.objid
                  AND t.relkind IN ('r', 'p', 'f'))
            UNION ALL
            SELECT 'pg_catalog.pg_class'::pg_catalog.regclass, r.ev_class
            FROM pg_catalog.pg_rewrite r
            WHERE gone.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass AND r.oid = gone.objid
              AND r.rulename = '_RETURN') more)
    SELECT gone.classid, gone.objid, n.nspname, c.relname
    FROM gone
    LEFT JOIN pg_catalog.pg_class c
      ON gone.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND c.oid = gone.objid
     AND c.relkind IN ('r', 'p', 'f', 'v', 'm', 'S')
    LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_exact_and_never_too_long() {
        let relations = (0..3000).map(|at| QualifiedName::new("s.x", format!("{at:0>60}\"*"))).collect();
        let arguments = LeftOut { relations, ..LeftOut::default() }.arguments();
        assert!(arguments.len() > 1 && arguments.iter().all(|argument| argument.len() < 2 * MAX_ARGUMENT));
        assert!(arguments[0].starts_with(r#"--exclude-table="s.x".("000"#));
        assert!(arguments[0].ends_with(r#""""*")"#) || arguments[0].contains(r#""*""#));
        let count: usize = arguments.iter().map(|argument| argument.matches('|').count() + 1).sum();
        assert_eq!(count, 3000);
    }
}
