//! Which database this is, whatever its address: so that a target that is the source, or a source that is no longer
//! the one the move began with, is refused.
//!
//! A cluster has a system identifier, given by initdb and kept by its standbys and backups; a database has an
//! oid in it. Branches of a Neon project share both, and differ in `neon.timeline_id`.

use serde_json::{Value, json};
use tokio_postgres::Client;

use super::Finding;
use super::finding::kinds;
use super::look::{Look, Place};
use crate::error::{Doing, Result};
use crate::postgres::Side;

const DATABASE: &str = r"
    SELECT d.oid, d.datname::text, pg_catalog.current_setting('neon.timeline_id', true)
    FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()";

/// Some providers refuse these two to a role of ours.
const SYSTEM_IDENTIFIER: &str = "SELECT system_identifier::text FROM pg_catalog.pg_control_system()";
const TIMELINE: &str = "SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()";

/// Advisory locks belong to a database: what is taken on one side and seen on the other is the same one.
const TAKE_LOCK: &str = r"
    SELECT key, pg_catalog.pg_advisory_xact_lock(key)::text
    FROM (SELECT pg_catalog.hashtextextended('pgtandem check ' || pg_catalog.random()::text, 0) AS key) k";
const TRY_LOCK: &str = "SELECT pg_catalog.pg_try_advisory_xact_lock($1)";

kinds! {
    SAME_SERVER = Blocking "same_server" {
        what: "the target is the source",
        why: "the database would be moved onto itself",
        fix: "correct source.url or target.url: both reach the same database",
    }
    IDENTITY_UNKNOWN = Warning "identity_unknown" {
        what: "the source does not tell its system identifier",
        why: "a source that was replaced or restored from a backup can then only be recognised by its slot",
        fix: "GRANT EXECUTE ON FUNCTION pg_catalog.pg_control_system() TO the role of source.url",
    }
}

/// What makes this database recognisable: `system_identifier`, `database`, `database_oid`, `timeline`,
/// `neon_timeline`; null where the server does not tell.
///
/// # Errors
/// The connection's.
pub async fn identity(client: &Client) -> Result<Value> {
    let row = client.query_one(DATABASE, &[]).await.doing(|| "asking which database this is")?;
    let oid: u32 = row.try_get(0)?;
    let database: String = row.try_get(1)?;
    let neon_timeline: Option<String> = row.try_get(2)?;
    let system_identifier: Option<String> = optional(client, SYSTEM_IDENTIFIER).await?;
    let timeline: Option<i32> = optional(client, TIMELINE).await?;
    Ok(json!({
        "system_identifier": system_identifier,
        "database": database,
        "database_oid": oid,
        "timeline": timeline,
        "neon_timeline": neon_timeline.filter(|id| !id.is_empty()),
    }))
}

/// One value, or `None` where the server refuses to tell.
async fn optional<T: for<'a> tokio_postgres::types::FromSql<'a>>(client: &Client, sql: &str) -> Result<Option<T>> {
    match client.query_one(sql, &[]).await {
        Ok(row) => Ok(Some(row.try_get(0)?)),
        Err(error) if error.as_db_error().is_some() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether two identities are of the same database; `None` where one of them does not tell.
///
/// The timeline is left out: after a failover, the same database goes on under a new one.
#[must_use]
pub fn same_server(a: &Value, b: &Value) -> Option<bool> {
    let field = |identity: &Value, name: &str| identity.get(name).filter(|value| !value.is_null()).cloned();
    if field(a, "neon_timeline") != field(b, "neon_timeline") || field(a, "database_oid") != field(b, "database_oid") {
        return Some(false);
    }
    match (field(a, "system_identifier"), field(b, "system_identifier")) {
        (Some(a), Some(b)) => Some(a == b),
        _ => None,
    }
}

/// Refuses a target that is the source, by its identity and by a lock that both sides see.
pub(super) async fn same(look: &Look<'_>) -> Result<Vec<Finding>> {
    let source = identity(look.source.client).await?;
    let target = identity(look.target.client).await?;
    let mut found = Vec::new();
    if source["system_identifier"].is_null() {
        found.push(IDENTITY_UNKNOWN.on(Side::Source, "the source does not tell its system identifier"));
    }
    let same = same_server(&source, &target) == Some(true) || share_locks(&look.source, &look.target).await?;
    if same {
        let database = look.target.facts.database.clone();
        let what = format!("source and target are the same database, {database}, of the same server");
        found.push(SAME_SERVER.on(Side::Target, what).objects(vec![database]));
    }
    Ok(found)
}

async fn share_locks(source: &Place<'_>, target: &Place<'_>) -> Result<bool> {
    source.client.batch_execute("BEGIN").await?;
    let seen = async {
        let key: i64 = source.client.query_one(TAKE_LOCK, &[]).await?.try_get(0)?;
        let free: bool = target.client.query_one(TRY_LOCK, &[&key]).await?.try_get(0)?;
        Ok(!free)
    }
    .await;
    source.client.batch_execute("ROLLBACK").await?;
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(system: &str, oid: u32, neon: Option<&str>) -> Value {
        json!({"system_identifier": system, "database_oid": oid, "neon_timeline": neon, "timeline": 1})
    }

    #[test]
    fn a_database_is_recognised_by_cluster_oid_and_branch() {
        assert_eq!(same_server(&known("1", 5, None), &known("1", 5, None)), Some(true));
        assert_eq!(same_server(&known("1", 5, None), &known("1", 6, None)), Some(false));
        assert_eq!(same_server(&known("1", 5, None), &known("2", 5, None)), Some(false));
        assert_eq!(same_server(&known("1", 5, Some("a")), &known("1", 5, Some("b"))), Some(false));
    }

    #[test]
    fn a_failover_keeps_the_identity() {
        let mut after = known("1", 5, None);
        after["timeline"] = json!(2);
        assert_eq!(same_server(&known("1", 5, None), &after), Some(true));
    }

    #[test]
    fn an_untold_identifier_proves_nothing() {
        let mut silent = known("1", 5, None);
        silent["system_identifier"] = Value::Null;
        assert_eq!(same_server(&silent, &known("1", 5, None)), None);
    }
}
