//! `follow.without_identity = "full"`: tables without a replica identity are given one on the source, so that their updates
//! and deletes are in the stream. What they had is written down first, and `clean` brings it back.

use std::collections::HashSet;
use std::time::Duration;

use crate::config::{Config, WithoutIdentity};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::catalog::{ReplicaIdentity, Table};
use crate::postgres::{QualifiedName, Server, Session, quote_identifier};
use crate::state::{GivenIdentity, Store, TableState};

/// How long a table's writers may wait behind us, how often the lock is asked for, and the time that they have between.
const LOCK_TIMEOUT: &str = "SET lock_timeout = '500ms'";
const ATTEMPTS: u32 = 60;
const PAUSE: Duration = Duration::from_secs(1);

/// `$1` schema, `$2` name: the identity of a table in words of ALTER TABLE, and whether FULL would be of use: a virtual
/// column cannot be published, so a whole row that holds one identifies nothing.
const IDENTITY: &str = "
    SELECT c.relreplident::text, i.relname::text,
           NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a
                       WHERE a.attrelid = c.oid AND a.attgenerated = 'v' AND NOT a.attisdropped)
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_catalog.pg_index x ON x.indrelid = c.oid AND x.indisreplident
    LEFT JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
    WHERE n.nspname = $1 AND c.relname = $2";

/// Gives `REPLICA IDENTITY FULL` to those of `tables` that have none and are not copied yet, if the configuration asks for
/// it: of one that is copied, changes were missed already. Returns whether there was one. To be called before a cut.
///
/// # Errors
/// A table stays locked (class wait), is somebody else's (class operator), or the connections'.
pub async fn give(config: &Config, source: &Server, store: &Store, tables: &[Table]) -> Result<bool> {
    if config.follow.without_identity != WithoutIdentity::Full {
        return Ok(false);
    }
    let records = store.tables().await?;
    let copied: HashSet<&QualifiedName> =
        records.iter().filter(|table| table.state == TableState::Copied).map(|table| &table.name).collect();
    let without: Vec<&QualifiedName> = tables
        .iter()
        .filter(|table| table.identity == ReplicaIdentity::Nothing && !copied.contains(&table.name))
        .map(|table| &table.name)
        .collect();
    if without.is_empty() {
        return Ok(false);
    }
    let session = source.connect("identity").await?;
    session.batch_execute(LOCK_TIMEOUT).await?;
    let mut gave = false;
    for table in without {
        let Some(before) = current(&session, table).await? else { continue };
        store.remember_identity(&GivenIdentity { table: table.clone(), before }).await?;
        set(&session, table, "REPLICA IDENTITY FULL").await?;
        tracing::info!(table = %table.plain(), "given REPLICA IDENTITY FULL on the source; `pgtandem clean` takes it back");
        gave = true;
    }
    Ok(gave)
}

/// What would bring the table's identity back; `None` where it has FULL already, where FULL is of no use, or where the table
/// is gone.
async fn current(session: &Session, table: &QualifiedName) -> Result<Option<String>> {
    let row = session
        .query_opt(IDENTITY, &[&table.schema, &table.name])
        .await
        .doing(|| format!("asking for the replica identity of {}", table.plain()))?;
    let Some(row) = row else { return Ok(None) };
    let (index, of_use): (Option<String>, bool) = (row.try_get(1)?, row.try_get(2)?);
    Ok(match (row.try_get::<_, String>(0)?.as_str(), index) {
        ("f", _) => None,
        _ if !of_use => None,
        ("i", Some(index)) => Some(format!("REPLICA IDENTITY USING INDEX {}", quote_identifier(&index))),
        ("d", _) => Some("REPLICA IDENTITY DEFAULT".to_owned()),
        _ => Some("REPLICA IDENTITY NOTHING".to_owned()),
    })
}

async fn set(session: &Session, table: &QualifiedName, identity: &str) -> Result<()> {
    let doing = || format!("ALTER TABLE {table} {identity} on the source");
    for attempt in 1.. {
        let Err(error) = session.batch_execute(&format!("ALTER TABLE {table} {identity}")).await else { return Ok(()) };
        let error = Error::from(error);
        match error.sqlstate() {
            Some("55P03" | "40P01") if attempt < ATTEMPTS => tokio::time::sleep(PAUSE).await,
            Some("55P03" | "40P01") => return Err(error.reclassed(Class::Wait).doing(doing())),
            _ => return Err(error.doing(doing())),
        }
    }
    Ok(())
}

/// Brings back what the tables had, where they still have what they were given.
///
/// # Errors
/// A table stays locked (class wait), or the connection's.
pub async fn take_back(source: &Server, given: &[GivenIdentity]) -> Result<usize> {
    if given.is_empty() {
        return Ok(0);
    }
    let session = source.connect("clean").await?;
    session.batch_execute(LOCK_TIMEOUT).await?;
    let mut count = 0;
    for GivenIdentity { table, before } in given {
        let row = session
            .query_opt(IDENTITY, &[&table.schema, &table.name])
            .await
            .doing(|| format!("asking for the replica identity of {}", table.plain()))?;
        let Some(row) = row else { continue };
        if row.try_get::<_, String>(0)? == "f" {
            set(&session, table, before).await?;
            count += 1;
        }
    }
    Ok(count)
}
