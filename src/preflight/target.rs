//! Whether the target is ready to take what the source has: empty, with the tablespaces that objects name.

use super::Finding;
use super::finding::kinds;
use super::look::Look;
use super::owned::IS_USER_SCHEMA;
use super::privileges::text;
use crate::config::CopyMethod;
use crate::error::Result;
use crate::postgres::catalog::IS_USER_TABLE;
use crate::postgres::{Side, quote_identifier};

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
