//! Whether our roles may do what a move does. Asked by doing wherever that leaves no trace: inside a transaction
//! that is rolled back, with a short lock timeout.

use tokio_postgres::error::SqlState;

use super::finding::kinds;
use super::look::{Attempt, Look, Place};
use super::{Finding, Kind};
use crate::config::Fence;
use crate::error::{Error, Result};
use crate::postgres::catalog::IS_USER_TABLE;
use crate::postgres::{QualifiedName, Side, quote_identifier};

const PROBE_PUBLICATION: &str = "CREATE PUBLICATION pgtandem_probe";
const PROBE_SCHEMA: &str = "CREATE SCHEMA pgtandem_probe";
const PROBE_REPLICATION_ROLE: &str = "SET LOCAL session_replication_role = replica";

/// Publishing a table takes its ownership, and so does the fence's trigger, of a partitioned or unlogged one as well; these
/// are the tables of somebody else, with their owner. One that can be published comes first, to be tried.
fn not_owned() -> String {
    format!(
        r"
        SELECT n.nspname::text, c.relname::text, pg_catalog.pg_get_userbyid(c.relowner)::text
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
          AND NOT pg_catalog.pg_has_role(c.relowner, 'USAGE') AND {IS_USER_TABLE}
        ORDER BY c.relpersistence, 1, 2"
    )
}

/// COPY reads every table that writes WAL, pg_dump locks the others as well, LOCK takes a right to write.
fn without(privilege: &str, which: &str) -> String {
    format!(
        r"
        SELECT n.nspname::text, c.relname::text
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE {which} AND NOT ({privilege}) AND {IS_USER_TABLE}
        ORDER BY 1, 2"
    )
}

const READ: &str = "c.relkind IN ('r', 'p', 'S')";
const LOCKED_BY_THE_FENCE: &str = "c.relkind IN ('r', 'p') AND c.relpersistence <> 't'";
const MAY_READ: &str = "pg_catalog.has_table_privilege(c.oid, 'SELECT')";
const MAY_LOCK: &str = "pg_catalog.has_table_privilege(c.oid, 'UPDATE, DELETE, TRUNCATE')";

/// Schemas that hold something of the move and that we may not look into.
fn closed_schemas() -> String {
    format!(
        r"
        SELECT DISTINCT n.nspname::text
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'S') AND NOT pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND {IS_USER_TABLE}
        ORDER BY 1"
    )
}

/// Tables whose row-level security applies to us: COPY under row_security=off is refused there.
fn row_security() -> String {
    format!(
        r"
        SELECT n.nspname::text, c.relname::text
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND c.relrowsecurity
          AND pg_catalog.row_security_active(c.oid) AND {IS_USER_TABLE}
        ORDER BY 1, 2"
    )
}

/// Row-level security that applies to owners too, and so to everybody who acts for them on the target.
fn forced_row_security() -> String {
    format!(
        r"
        SELECT n.nspname::text, c.relname::text
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND c.relrowsecurity AND c.relforcerowsecurity AND {IS_USER_TABLE}
        ORDER BY 1, 2"
    )
}

/// Reads a table of one's own whose row-level security is forced, as every session of ours does: with row_security off.
const PROBE_ROW_SECURITY: &str = "
    CREATE SCHEMA pgtandem_probe;
    CREATE TABLE pgtandem_probe.probe ();
    ALTER TABLE pgtandem_probe.probe ENABLE ROW LEVEL SECURITY;
    ALTER TABLE pgtandem_probe.probe FORCE ROW LEVEL SECURITY;
    SET LOCAL row_security = off;
    SELECT FROM pgtandem_probe.probe";

kinds! {
    NO_PUBLICATION_RIGHT = Blocking "no_publication_right" {
        what: "the source's role may not make a publication",
        why: "the publication says which tables the stream carries",
        fix: "GRANT CREATE ON DATABASE … TO …",
    }
    NOT_OWNER = Blocking "not_owner" {
        what: "tables are owned by a role that the source's role is not a member of",
        why: "only its owner may publish a table, and give it the trigger of the fence",
        fix: "GRANT owner TO role",
    }
    NO_SELECT = Blocking "no_select" {
        what: "tables or sequences of the source cannot be read",
        why: "their content cannot be copied",
        fix: "GRANT SELECT ON … TO …",
    }
    NO_SCHEMA_USAGE = Blocking "no_schema_usage" {
        what: "schemas of the source cannot be entered",
        why: "nothing in them can be read",
        fix: "GRANT USAGE ON SCHEMA … TO …",
    }
    NO_LOCK_RIGHT = Blocking "no_lock_right" {
        what: "tables of the source cannot be locked",
        why: "the fence of a cutover stops writes by locking every table",
        fix: "GRANT UPDATE ON … TO …, or cutover.fence = \"none\" and stop the writers yourself",
    }
    ROW_SECURITY = Blocking "row_security" {
        what: "row-level security of the source would hide rows from the copy",
        why: "a filtered copy is a wrong copy; PostgreSQL refuses it under row_security = off, and so do we",
        fix: "ALTER ROLE … BYPASSRLS",
    }
    TARGET_ROW_SECURITY = Blocking "target_row_security" {
        what: "forced row-level security of the source would apply to the target's role",
        why: "every session of a move works under row_security = off, so that nothing is filtered: the target would refuse each change of these tables",
        fix: "ALTER ROLE … BYPASSRLS on the target, or ALTER TABLE … NO FORCE ROW LEVEL SECURITY on the source until after the cutover",
    }
    TARGET_NO_CREATE = Blocking "target_no_create" {
        what: "the target's role may not make schemas",
        why: "neither the schema of the source nor pgtandem's own state can be made",
        fix: "GRANT CREATE ON DATABASE … TO …",
    }
    NO_REPLICATION_ROLE = Info "no_session_replication_role" {
        what: "the target refuses session_replication_role",
        why: "triggers and foreign keys cannot be silenced by it, so they are held back until the cutover instead",
        fix: "",
    }
}

/// Whether the source lets us make a publication, and publish each table.
pub(super) async fn publishing(look: &Look<'_>) -> Result<Vec<Finding>> {
    let source = &look.source;
    if let Attempt::Refused(words) = source.attempt(PROBE_PUBLICATION).await? {
        let fix = format!(
            "GRANT CREATE ON DATABASE {} TO {};",
            quote_identifier(&source.facts.database),
            quote_identifier(&source.facts.user)
        );
        return Ok(vec![NO_PUBLICATION_RIGHT.on(Side::Source, words).fix(fix)]);
    }
    Ok(Vec::new())
}

/// Tables that belong to somebody else. The catalog decides except where it says no: some providers let their
/// administrator publish what it does not own, so one such table is tried.
pub(super) async fn ownership(look: &Look<'_>) -> Result<Vec<Finding>> {
    let source = &look.source;
    let foreign = look.in_scope(source.client.query(&not_owned(), &[]).await?)?;
    let Some((first, _)) = foreign.first() else { return Ok(Vec::new()) };
    let probe = format!("{PROBE_PUBLICATION} FOR TABLE ONLY {first}");
    if matches!(source.attempt(&probe).await, Ok(Attempt::Allowed)) {
        return Ok(Vec::new());
    }
    let user = quote_identifier(&source.facts.user);
    let mut owners = Vec::new();
    for (_, row) in &foreign {
        owners.push(row.try_get::<_, String>(2)?);
    }
    owners.sort();
    owners.dedup();
    let fix = owners.iter().map(|owner| format!("GRANT {} TO {user};", quote_identifier(owner))).collect::<Vec<_>>();
    let what = format!("{} belong to {}, not to {}", tables(foreign.len()), owners.join(", "), source.facts.user);
    let objects = foreign.iter().map(|(name, _)| name.plain()).collect();
    Ok(vec![NOT_OWNER.on(Side::Source, what).fix(fix.join("\n")).objects(objects)])
}

/// Whether everything in scope can be read.
pub(super) async fn reading(look: &Look<'_>) -> Result<Vec<Finding>> {
    let source = &look.source;
    let unreadable = look.names_in_scope(source.client.query(&without(MAY_READ, READ), &[]).await?)?;
    let what = format!("{} tables and sequences cannot be read by {}", unreadable.len(), source.facts.user);
    Ok(refused(&NO_SELECT, source, what, "SELECT", &unreadable))
}

pub(super) async fn schemas(look: &Look<'_>) -> Result<Vec<Finding>> {
    let closed = look.source.list(&closed_schemas()).await?;
    if closed.is_empty() {
        return Ok(Vec::new());
    }
    let user = quote_identifier(&look.source.facts.user);
    let fix = closed.iter().map(|name| format!("GRANT USAGE ON SCHEMA {} TO {user};", quote_identifier(name)));
    let fix = fix.collect::<Vec<_>>().join("\n");
    let what = format!("{} may not enter {}", look.source.facts.user, closed.join(", "));
    Ok(vec![NO_SCHEMA_USAGE.on(Side::Source, what).fix(fix).objects(closed)])
}

/// The locks of the fence, which any one of three rights allows.
pub(super) async fn locking(look: &Look<'_>) -> Result<Vec<Finding>> {
    if look.config.cutover.fence != Fence::Lock {
        return Ok(Vec::new());
    }
    let source = &look.source;
    let unlockable = look.names_in_scope(source.client.query(&without(MAY_LOCK, LOCKED_BY_THE_FENCE), &[]).await?)?;
    let what = format!("{} cannot be locked against writes", tables(unlockable.len()));
    Ok(refused(&NO_LOCK_RIGHT, source, what, "UPDATE", &unlockable))
}

pub(super) async fn row_level_security(look: &Look<'_>) -> Result<Vec<Finding>> {
    let hidden = look.names_in_scope(look.source.client.query(&row_security(), &[]).await?)?;
    if hidden.is_empty() {
        return Ok(Vec::new());
    }
    let what = format!("row-level security of {} applies to {}", tables(hidden.len()), look.source.facts.user);
    let fix = format!("ALTER ROLE {} BYPASSRLS;", quote_identifier(&look.source.facts.user));
    Ok(vec![ROW_SECURITY.on(Side::Source, what).fix(fix).objects(plain(&hidden))])
}

/// Whether the target lets its role write to tables whose row-level security is forced.
pub(super) async fn target_row_level_security(look: &Look<'_>) -> Result<Vec<Finding>> {
    let forced = look.names_in_scope(look.source.client.query(&forced_row_security(), &[]).await?)?;
    let target = &look.target;
    // Where not even a schema can be made, this is unknown, and another finding says why.
    if forced.is_empty() || matches!(attempt_write(target, PROBE_SCHEMA).await?, Attempt::Refused(_)) {
        return Ok(Vec::new());
    }
    let Attempt::Refused(words) = attempt_write(target, PROBE_ROW_SECURITY).await? else { return Ok(Vec::new()) };
    let what =
        format!("forced row-level security of {} would apply to {}: {words}", tables(forced.len()), target.facts.user);
    let fix = format!("ALTER ROLE {} BYPASSRLS;", quote_identifier(&target.facts.user));
    Ok(vec![TARGET_ROW_SECURITY.on(Side::Target, what).fix(fix).objects(plain(&forced))])
}

/// Making schemas on the target.
pub(super) async fn creating(look: &Look<'_>) -> Result<Vec<Finding>> {
    let target = &look.target;
    let Attempt::Refused(words) = attempt_write(target, PROBE_SCHEMA).await? else { return Ok(Vec::new()) };
    let fix = format!(
        "GRANT CREATE ON DATABASE {} TO {};",
        quote_identifier(&target.facts.database),
        quote_identifier(&target.facts.user)
    );
    Ok(vec![TARGET_NO_CREATE.on(Side::Target, words).fix(fix)])
}

pub(super) async fn replication_role(target: &Place<'_>) -> Result<Vec<Finding>> {
    match target.attempt(PROBE_REPLICATION_ROLE).await? {
        Attempt::Allowed => Ok(Vec::new()),
        Attempt::Refused(words) => Ok(vec![NO_REPLICATION_ROLE.on(Side::Target, words)]),
    }
}

/// A read-only target has a finding of its own; it says nothing about rights.
pub(super) async fn attempt_write(target: &Place<'_>, sql: &str) -> Result<Attempt> {
    match target.attempt(sql).await {
        Err(error) if error.sqlstate() == Some(SqlState::READ_ONLY_SQL_TRANSACTION.code()) => Ok(Attempt::Allowed),
        other => other,
    }
}

fn refused(kind: &Kind, place: &Place<'_>, what: String, privilege: &str, names: &[QualifiedName]) -> Vec<Finding> {
    if names.is_empty() {
        return Vec::new();
    }
    let user = quote_identifier(&place.facts.user);
    let fix = names.iter().map(|name| format!("GRANT {privilege} ON {name} TO {user};")).collect::<Vec<_>>();
    vec![kind.on(place.side, what).fix(fix.join("\n")).objects(plain(names))]
}

/// Names for people.
pub(super) fn plain(names: &[QualifiedName]) -> Vec<String> {
    names.iter().map(QualifiedName::plain).collect()
}

/// `1 table`, `7 tables`.
pub(super) fn tables(count: usize) -> String {
    if count == 1 { "1 table".to_owned() } else { format!("{count} tables") }
}

/// A row of text columns becomes an error of ours, not a panic.
pub(super) fn text(row: &tokio_postgres::Row, at: usize) -> Result<String> {
    row.try_get::<_, String>(at).map_err(Error::from)
}
