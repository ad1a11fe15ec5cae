//! Who owns what travels, and in which schema it lives: the source's answer, for the checks of the target's roles and schemas.

use std::collections::BTreeSet;

use super::look::Look;
use crate::error::Result;
use crate::postgres::catalog::IS_USER_TABLE;
use crate::postgres::{QualifiedName, provider};

/// Schemas of nobody's but the user's; `n` is pg_namespace.
pub(super) const IS_USER_SCHEMA: &str = r"
    n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast', 'pgtandem')
    AND n.nspname NOT IN ('neon', 'neon_migration', 'google_vacuum_mgmt') AND n.nspname !~ '^pg_(temp|toast_temp)_'";

/// Catalogs of what lives in a schema and has an owner, beside relations and types: catalog, column of the owner, of the schema.
const OWNED_IN_SCHEMAS: [(&str, &str, &str); 9] = [
    ("pg_proc", "proowner", "pronamespace"),
    ("pg_collation", "collowner", "collnamespace"),
    ("pg_conversion", "conowner", "connamespace"),
    ("pg_operator", "oprowner", "oprnamespace"),
    ("pg_opclass", "opcowner", "opcnamespace"),
    ("pg_opfamily", "opfowner", "opfnamespace"),
    ("pg_statistic_ext", "stxowner", "stxnamespace"),
    ("pg_ts_config", "cfgowner", "cfgnamespace"),
    ("pg_ts_dict", "dictowner", "dictnamespace"),
];

/// The same of what stands outside schemas: catalog, column of the owner, the name if it is a schema itself.
const OWNED_OUTSIDE: [(&str, &str, &str); 3] = [
    ("pg_namespace", "nspowner", "o.nspname"),
    ("pg_foreign_server", "srvowner", "''"),
    ("pg_foreign_data_wrapper", "fdwowner", "''"),
];

/// One thing that has an owner: its schema, empty outside any; its name if `[move]` can exclude it; its owner. `$1`: roles of
/// providers, one of which, or the role that initdb made, a database's `public` is born with.
fn owned() -> String {
    let mut parts = vec![
        format!(
            "SELECT n.nspname AS schema, CASE WHEN c.relkind IN ('r', 'p', 'f') THEN c.relname END AS relation, c.relowner AS owner
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind IN ('r', 'p', 'f', 'v', 'm', 'S') AND {IS_USER_TABLE}
               AND NOT (c.relkind = 'S' AND {})",
            of_a_column("c.oid")
        ),
        format!(
            "SELECT n.nspname, NULL, o.typowner
             FROM pg_catalog.pg_type o JOIN pg_catalog.pg_namespace n ON n.oid = o.typnamespace
             LEFT JOIN pg_catalog.pg_class c ON c.oid = o.typrelid
             WHERE {IS_USER_SCHEMA} AND o.typelem = 0 AND COALESCE(c.relkind = 'c', true) AND {}",
            own_thing("pg_type")
        ),
    ];
    for (catalog, owner, schema) in OWNED_IN_SCHEMAS {
        parts.push(format!(
            "SELECT n.nspname, NULL, o.{owner}
             FROM pg_catalog.{catalog} o JOIN pg_catalog.pg_namespace n ON n.oid = o.{schema}
             WHERE {IS_USER_SCHEMA} AND {}",
            own_thing(catalog)
        ));
    }
    for (catalog, owner, name) in OWNED_OUTSIDE {
        parts.push(format!(
            "SELECT '', NULL, o.{owner}
             FROM pg_catalog.{catalog} o JOIN (SELECT 1) one ON true
             JOIN LATERAL (SELECT {name}::text AS nspname) n ON {IS_USER_SCHEMA}
             WHERE {} AND NOT (n.nspname = 'public' AND {IS_BORN_WITH})",
            own_thing(catalog),
            IS_BORN_WITH = format_args!("(o.{owner} = 10 OR pg_catalog.pg_get_userbyid(o.{owner}) = ANY ($1))"),
        ));
    }
    format!(
        "SELECT DISTINCT o.schema::text, o.relation::text, r.rolname::text
         FROM ({}) o JOIN pg_catalog.pg_roles r ON r.oid = o.owner
         WHERE r.rolname !~ '^pg_' ORDER BY 1, 2, 3",
        parts.join("\nUNION ALL\n")
    )
}

/// `o` was made by the user: not by an extension, not along with something else.
fn own_thing(catalog: &str) -> String {
    format!(
        "NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                     WHERE d.classid = 'pg_catalog.{catalog}'::pg_catalog.regclass AND d.objid = o.oid
                       AND d.deptype IN ('e', 'i'))"
    )
}

/// A sequence behind a column shares the fate and the owner of its table.
pub(super) fn of_a_column(oid: &str) -> String {
    format!(
        "EXISTS (SELECT FROM pg_catalog.pg_depend d
                 WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = {oid}
                   AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.deptype IN ('a', 'i'))"
    )
}

/// Schemas of extensions: `CREATE EXTENSION` makes its objects there.
const EXTENSIONS_SCHEMAS: &str = r"
    SELECT DISTINCT n.nspname::text
    FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
    WHERE n.nspname NOT IN ('pg_catalog', 'neon', 'neon_migration', 'google_vacuum_mgmt')";

/// What travels, by its owners and its schemas.
#[derive(Debug, Default)]
pub(super) struct Owned {
    /// Everybody who owns something.
    pub(super) owners: BTreeSet<String>,
    /// Schema and owner of what is in it.
    pub(super) in_schemas: BTreeSet<(String, String)>,
    /// Schemas that something is made in.
    pub(super) schemas: BTreeSet<String>,
}

impl Owned {
    /// Asks the source.
    pub(super) async fn find(look: &Look<'_>) -> Result<Self> {
        let mut found = Self::default();
        found.schemas.extend(look.source.list(EXTENSIONS_SCHEMAS).await?);
        for row in look.source.client.query(&owned(), &[&provider::ROLES.as_slice()]).await? {
            let (schema, owner): (String, String) = (row.try_get(0)?, row.try_get(2)?);
            let relation: Option<String> = row.try_get(1)?;
            if relation.is_some_and(|relation| !look.travels(&QualifiedName::new(schema.as_str(), relation))) {
                continue;
            }
            found.owners.insert(owner.clone());
            if !schema.is_empty() {
                found.schemas.insert(schema.clone());
                found.in_schemas.insert((schema, owner));
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_question_leaves_out_the_same_schemas() {
        let list = provider::SCHEMAS.map(crate::postgres::quote_literal).join(", ");
        assert!(IS_USER_SCHEMA.contains(&list) && EXTENSIONS_SCHEMAS.contains(&list), "{list}");
    }
}
