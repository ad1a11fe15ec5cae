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

/// `$1` oid, or 0 and `$2` schema, `$3` name: the identity of a table in words of ALTER TABLE, whether FULL would be of use (a
/// virtual column cannot be published, so a whole row that holds one identifies nothing), whether we may alter it, and what it is
/// called.
const IDENTITY: &str = "
    SELECT c.relreplident::text, i.relname::text,
           NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a
                       WHERE a.attrelid = c.oid AND a.attgenerated = 'v' AND NOT a.attisdropped),
           pg_catalog.pg_has_role(c.relowner, 'USAGE'), n.nspname::text, c.relname::text
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_catalog.pg_index x ON x.indrelid = c.oid AND x.indisreplident
    LEFT JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
    WHERE c.relkind = 'r' AND (c.oid = $1 OR $1 = 0 AND n.nspname = $2 AND c.relname = $3)";

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
    let without: Vec<&Table> = tables
        .iter()
        .filter(|table| table.identity == ReplicaIdentity::Nothing && !copied.contains(&table.name))
        .collect();
    if without.is_empty() {
        return Ok(false);
    }
    let session = source.connect("identity").await?;
    session.batch_execute(LOCK_TIMEOUT).await?;
    let mut gave = false;
    for Table { oid, name, .. } in without {
        let Some(before) = identity(&session, *oid, name).await?.and_then(Identity::before_full) else { continue };
        store.remember_identity(&GivenIdentity { table: name.clone(), oid: *oid, before }).await?;
        set(&session, name, "REPLICA IDENTITY FULL").await?;
        tracing::info!(table = %name.plain(), "given REPLICA IDENTITY FULL on the source; `pgtandem clean` takes it back");
        gave = true;
    }
    Ok(gave)
}

/// Tables that came with the stream after the newest cut, without a replica identity and ours to alter. What is updated there is in
/// no stream, since their first row: they are to be copied, which gives them one. A table that was copied before keeps what it
/// has until a person asks for another copy.
///
/// # Errors
/// The connections'.
pub async fn came_without(config: &Config, source: &Server, store: &Store) -> Result<Vec<QualifiedName>> {
    if config.follow.without_identity != WithoutIdentity::Full {
        return Ok(Vec::new());
    }
    let watched: HashSet<QualifiedName> = store.unkeyed().await?.into_iter().map(|(name, _)| name).collect();
    if watched.is_empty() {
        return Ok(Vec::new());
    }
    let newest = store.find().await?.and_then(|record| record.last_cut_lsn);
    let came =
        store.tables().await?.into_iter().filter(|table| {
            table.state == TableState::Copied && table.cut_lsn > newest && watched.contains(&table.name)
        });
    let session = source.connect("identity").await?;
    let mut found = Vec::new();
    for table in came {
        let identity = identity(&session, 0, &table.name).await?;
        if identity.is_some_and(|identity| identity.ours && identity.before_full().is_some()) {
            found.push(table.name);
        }
    }
    Ok(found)
}

/// What the source's catalog says of a table.
struct Identity {
    name: QualifiedName,
    full: bool,
    /// What would bring back what it has; `None` where FULL is of no use.
    clause: Option<String>,
    /// We may alter it.
    ours: bool,
}

impl Identity {
    /// What would bring it back after FULL was given; `None` where it has FULL already, or where that is of no use.
    fn before_full(self) -> Option<String> {
        self.clause.filter(|_| !self.full)
    }
}

/// `None` where the table is gone. It is looked for by its name where its oid is not known.
async fn identity(session: &Session, oid: u32, name: &QualifiedName) -> Result<Option<Identity>> {
    let row = session
        .query_opt(IDENTITY, &[&oid, &name.schema, &name.name])
        .await
        .doing(|| format!("asking for the replica identity of {}", name.plain()))?;
    let Some(row) = row else { return Ok(None) };
    let (letter, index, of_use): (String, Option<String>, bool) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let clause = match (letter.as_str(), index) {
        ("i", Some(index)) => format!("REPLICA IDENTITY USING INDEX {}", quote_identifier(&index)),
        ("d", _) => "REPLICA IDENTITY DEFAULT".to_owned(),
        _ => "REPLICA IDENTITY NOTHING".to_owned(),
    };
    Ok(Some(Identity {
        name: QualifiedName { schema: row.try_get(4)?, name: row.try_get(5)? },
        full: letter == "f",
        clause: of_use.then_some(clause),
        ours: row.try_get(3)?,
    }))
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

/// What became of the tables that had been given an identity.
#[derive(Debug, Default)]
pub struct TakenBack {
    /// So many have again what they had.
    pub count: usize,
    /// For people: each table that keeps FULL, because the source refuses for good to bring back what it had.
    pub kept: Vec<String>,
}

/// Brings back what the tables had, where they still have what they were given. A table is known by its oid, for it may have
/// another name by now.
///
/// # Errors
/// A table stays locked (class wait), or the connection's.
pub async fn take_back(source: &Server, given: &[GivenIdentity]) -> Result<TakenBack> {
    let mut taken = TakenBack::default();
    if given.is_empty() {
        return Ok(taken);
    }
    let session = source.connect("clean").await?;
    session.batch_execute(LOCK_TIMEOUT).await?;
    for GivenIdentity { table, oid, before } in given {
        let Some(Identity { name, full: true, .. }) = identity(&session, *oid, table).await? else { continue };
        match set(&session, &name, before).await {
            Ok(()) => taken.count += 1,
            // The index is gone or identifies nothing any more, the table is somebody else's: asking again changes nothing.
            Err(error) if error.sqlstate().is_some_and(|code| code.starts_with("42") || code == "55000") => {
                taken.kept.push(format!("table {} keeps REPLICA IDENTITY FULL ({error})", name.plain()));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(taken)
}
