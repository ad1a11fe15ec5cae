//! Whether the target is ready to take what the source has: empty, with the roles and tablespaces that objects name.

use std::collections::BTreeSet;

use super::Finding;
use super::finding::kinds;
use super::look::{Look, Place};
use super::privileges::text;
use crate::config::CopyMethod;
use crate::error::Result;
use crate::postgres::catalog::IS_USER_TABLE;
use crate::postgres::{Side, quote_identifier};

/// Schemas of nobody's but the user's; `n` is pg_namespace.
const IS_USER_SCHEMA: &str = r"
    n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast', 'pgtandem')
    AND n.nspname NOT IN ('neon', 'neon_migration', 'google_vacuum_mgmt') AND n.nspname !~ '^pg_(temp|toast_temp)_'";

/// Tables, views, sequences, functions and types that are there already.
fn contents() -> String {
    format!(
        r"
        SELECT what FROM (
            SELECT pg_catalog.format('%s.%s', n.nspname, c.relname) AS what
            FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND {IS_USER_TABLE}
            UNION ALL
            SELECT pg_catalog.format('%s.%s()', n.nspname, p.proname)
            FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
            WHERE {IS_USER_SCHEMA} AND NOT EXISTS (
                SELECT FROM pg_catalog.pg_depend d
                WHERE d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass AND d.objid = p.oid AND d.deptype IN ('e', 'i'))
            UNION ALL
            SELECT pg_catalog.format('%s.%s', n.nspname, t.typname)
            FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
            LEFT JOIN pg_catalog.pg_class c ON c.oid = t.typrelid
            WHERE {IS_USER_SCHEMA} AND t.typelem = 0 AND COALESCE(c.relkind = 'c', true) AND NOT EXISTS (
                SELECT FROM pg_catalog.pg_depend d
                WHERE d.classid = 'pg_catalog.pg_type'::pg_catalog.regclass AND d.objid = t.oid AND d.deptype IN ('e', 'i'))
        ) there ORDER BY 1"
    )
}

/// Roles that own something of the user or hold a privilege on it: shared dependencies of this database.
/// Providers' own roles are never needed elsewhere.
const ROLES_NEEDED: &str = r"
    SELECT DISTINCT r.rolname::text, bool_or(d.deptype = 'o')
    FROM pg_catalog.pg_shdepend d
    JOIN pg_catalog.pg_roles r ON r.oid = d.refobjid
    WHERE d.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass
      AND d.deptype IN ('o', 'a', 'r')
      AND d.dbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
      AND r.rolname !~ '^(pg_|neon|rds|cloudsql|azure|supabase)' AND r.rolname <> current_user
    GROUP BY 1 ORDER BY 1";

const ROLES_THERE: &str = r"
    SELECT r.rolname::text, pg_catalog.pg_has_role(r.oid, 'MEMBER')
    FROM pg_catalog.pg_roles r WHERE r.rolname = ANY ($1)";

const TABLESPACES_NEEDED: &str = r"
    SELECT DISTINCT t.spcname::text
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_tablespace t ON t.oid = c.reltablespace
    WHERE t.spcname NOT IN ('pg_default', 'pg_global') ORDER BY 1";

const TABLESPACES_THERE: &str = "SELECT spcname::text FROM pg_catalog.pg_tablespace WHERE spcname = ANY ($1)";

const DATABASE_SIZE: &str =
    "SELECT pg_catalog.pg_size_pretty(pg_catalog.pg_database_size(pg_catalog.current_database()))";

kinds! {
    TARGET_NOT_EMPTY = Blocking "target_not_empty" {
        what: "the target database has objects already",
        why: "restoring over them could fail half way, or mix two databases",
        fix: "take an empty database: CREATE DATABASE … TEMPLATE template0",
    }
    ROLES_MISSING = Blocking "roles_missing" {
        what: "the target lacks roles that own objects of the source or have privileges on them",
        why: "roles belong to a server, not to a database: pg_dump does not carry them, and ownership and grants would be lost",
        fix: "CREATE ROLE … NOLOGIN on the target",
    }
    NOT_MEMBER = Warning "not_member_of_owner" {
        what: "the target's role is not a member of roles that own objects of the source",
        why: "it cannot give objects to them; they would stay its own",
        fix: "GRANT owner TO role on the target",
    }
    TABLESPACES_MISSING = Warning "tablespaces_missing" {
        what: "the target lacks tablespaces of the source",
        why: "the objects in them are restored into the target's default tablespace",
        fix: "CREATE TABLESPACE … LOCATION … on the target, if the placement matters",
    }
    TARGET_DISK = Info "target_disk_unseen" {
        what: "the free disk space of the target cannot be seen from SQL",
        why: "the copy needs the size of the database, and about half as much again for building indexes and for WAL",
        fix: "check it by hand or in the provider's console",
    }
}

pub(super) async fn empty(look: &Look<'_>) -> Result<Vec<Finding>> {
    if look.begun || look.config.copy.method == CopyMethod::None {
        return Ok(Vec::new());
    }
    let there = look.target.list(&contents()).await?;
    if there.is_empty() {
        return Ok(Vec::new());
    }
    let database = quote_identifier(&look.target.facts.database);
    let what = format!("the target database {} has {} objects already", look.target.facts.database, there.len());
    let fix = format!(
        "DROP DATABASE {database}; CREATE DATABASE {database} TEMPLATE template0;  -- if nothing in it is needed; or name another database in target.url"
    );
    Ok(vec![TARGET_NOT_EMPTY.on(Side::Target, what).fix(fix).objects(there)])
}

pub(super) async fn roles(look: &Look<'_>) -> Result<Vec<Finding>> {
    let mut needed = Vec::new();
    let mut owners = BTreeSet::new();
    for row in look.source.client.query(ROLES_NEEDED, &[]).await? {
        let name = text(&row, 0)?;
        if row.try_get::<_, bool>(1)? {
            owners.insert(name.clone());
        }
        needed.push(name);
    }
    // The source's own role owns what it made, and must be there as well.
    if look.source.count(OWNS_SOMETHING).await? > 0 {
        owners.insert(look.source.facts.user.clone());
        needed.push(look.source.facts.user.clone());
    }
    let mut there = BTreeSet::new();
    let mut strangers = Vec::new();
    for row in look.target.client.query(ROLES_THERE, &[&needed]).await? {
        let name = text(&row, 0)?;
        if owners.contains(&name) && !row.try_get::<_, bool>(1)? {
            strangers.push(name.clone());
        }
        there.insert(name);
    }
    needed.retain(|name| !there.contains(name));
    needed.sort();
    Ok(role_findings(&look.target, needed, strangers))
}

/// Whether the current role owns or may use something of this database by an entry of its own.
const OWNS_SOMETHING: &str = r"
    SELECT count(*) FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_catalog.pg_roles r ON r.oid = c.relowner
    WHERE r.rolname = current_user AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')";

fn role_findings(target: &Place<'_>, missing: Vec<String>, strangers: Vec<String>) -> Vec<Finding> {
    let statements = |names: &[String], statement: &dyn Fn(String) -> String| {
        names.iter().map(|name| statement(quote_identifier(name))).collect::<Vec<_>>().join("\n")
    };
    let mut found = Vec::new();
    if !missing.is_empty() {
        let fix = statements(&missing, &|role| format!("CREATE ROLE {role} NOLOGIN;"));
        let what = format!("the target lacks the roles {}", missing.join(", "));
        found.push(ROLES_MISSING.on(Side::Target, what).fix(fix).objects(missing));
    }
    if !strangers.is_empty() {
        let user = quote_identifier(&target.facts.user);
        let fix = statements(&strangers, &|role| format!("GRANT {role} TO {user};"));
        let what = format!("{} is not a member of {}", target.facts.user, strangers.join(", "));
        found.push(NOT_MEMBER.on(Side::Target, what).fix(fix).objects(strangers));
    }
    found
}

pub(super) async fn tablespaces(look: &Look<'_>) -> Result<Vec<Finding>> {
    let needed = look.source.list(TABLESPACES_NEEDED).await?;
    let rows = look.target.client.query(TABLESPACES_THERE, &[&needed]).await?;
    let there = rows.iter().map(|row| text(row, 0)).collect::<Result<Vec<_>>>()?;
    let missing: Vec<_> = needed.into_iter().filter(|name| !there.contains(name)).collect();
    if missing.is_empty() {
        return Ok(Vec::new());
    }
    let fix = missing
        .iter()
        .map(|name| format!("CREATE TABLESPACE {} LOCATION '…';", quote_identifier(name)))
        .collect::<Vec<_>>();
    let what = format!("the target lacks the tablespaces {}", missing.join(", "));
    Ok(vec![TABLESPACES_MISSING.on(Side::Target, what).fix(fix.join("\n")).objects(missing)])
}

pub(super) async fn disk(look: &Look<'_>) -> Result<Vec<Finding>> {
    let row = look.source.client.query_one(DATABASE_SIZE, &[]).await?;
    let what = format!("the source database is {}; the target's free space cannot be seen from here", text(&row, 0)?);
    Ok(vec![TARGET_DISK.on(Side::Target, what)])
}
