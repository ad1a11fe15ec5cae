//! Whether the source can be followed: WAL decoded, a slot and a walsender free, the right to use them, names not
//! taken, and nothing in progress that would hold up the cut.

use tokio_postgres::error::SqlState;

use super::Finding;
use super::finding::kinds;
use super::look::{Look, Place};
use crate::error::Result;
use crate::postgres::wire::{Mode, Wire};
use crate::postgres::{Server, Side, quote_identifier, quote_literal};

const SLOTS: &str = r"
    SELECT pg_catalog.current_setting('max_replication_slots')::int8, count(*),
           count(*) FILTER (WHERE slot_name = $1), bool_or(active) FILTER (WHERE slot_name = $1)
    FROM pg_catalog.pg_replication_slots";

const WALSENDERS: &str = r"
    SELECT pg_catalog.current_setting('max_wal_senders')::int8, count(*) FROM pg_catalog.pg_stat_replication";

const PUBLICATIONS: &str = "SELECT pubname::text FROM pg_catalog.pg_publication WHERE pubname = ANY ($1) ORDER BY 1";

/// The right is looked at first, wal_level second and the name third, so this names the first of the
/// three that is missing and, as no slot can have such a name, never makes one.
const REPLICATION_RIGHT: &str = "SELECT pg_catalog.pg_create_logical_replication_slot('NOT A SLOT', 'pgoutput', true)";

/// Transactions that hold an xid, of every database: a slot's first snapshot waits for them all. The age of others'
/// is hidden from a role without pg_monitor; that they are there is not.
const OLD_TRANSACTIONS: &str = r"
    SELECT a.pid, COALESCE(a.usename::text, 'unknown'), COALESCE(a.datname::text, 'unknown'),
           extract(epoch FROM pg_catalog.clock_timestamp() - a.xact_start)::int8
    FROM pg_catalog.pg_stat_activity a
    WHERE a.backend_xid IS NOT NULL AND a.pid <> pg_catalog.pg_backend_pid()
      AND (a.xact_start IS NULL OR a.xact_start < pg_catalog.clock_timestamp() - interval '60 seconds')
    ORDER BY a.xact_start";

const PREPARED: &str = r"
    SELECT gid, owner::text, database::text,
           extract(epoch FROM pg_catalog.clock_timestamp() - prepared)::int8
    FROM pg_catalog.pg_prepared_xacts ORDER BY prepared";

kinds! {
    WAL_LEVEL = Blocking "wal_level" {
        what: "wal_level is not logical",
        why: "without it the source's WAL holds too little to follow its changes",
        fix: "ALTER SYSTEM SET wal_level = 'logical';  -- then restart the source; providers have a switch for it (rds.logical_replication, cloudsql.logical_decoding, Neon's Logical Replication)",
    }
    NO_SLOT_FREE = Blocking "no_slot_free" {
        what: "every replication slot is taken",
        why: "the move needs one slot, which keeps the WAL that the target has not received yet",
        fix: "drop a slot that nobody needs, or raise max_replication_slots and restart the source",
    }
    NO_WALSENDER_FREE = Blocking "no_walsender_free" {
        what: "every walsender is taken",
        why: "the stream of changes is served by one",
        fix: "raise max_wal_senders and restart the source",
    }
    SLOT_EXISTS = Blocking "slot_exists" {
        what: "a slot of the move's name is there, but the target knows nothing of the move",
        why: "it belongs to an earlier or another move; what it kept is not what a new copy needs",
        fix: "drop it, or choose another --name",
    }
    SLOT_ACTIVE = Blocking "slot_active" {
        what: "a slot of the move's name is in use, but the target knows nothing of the move",
        why: "another move of this name, to another target, is following right now",
        fix: "choose another --name",
    }
    PUBLICATION_EXISTS = Blocking "publication_exists" {
        what: "a publication of the move's name is there, but the target knows nothing of the move",
        why: "it belongs to an earlier or another move, and may list other tables",
        fix: "drop it, or choose another --name",
    }
    NO_REPLICATION_RIGHT = Blocking "no_replication_right" {
        what: "the source's role may not replicate",
        why: "it can neither make the slot nor read from it",
        fix: "ALTER ROLE … REPLICATION; on RDS: GRANT rds_replication TO …",
    }
    REPLICATION_REFUSED = Blocking "replication_refused" {
        what: "the source refuses a replication connection",
        why: "the changes are streamed over one; it passes rules of its own (pg_hba.conf, the role's attributes, poolers)",
        fix: "let the role connect for logical replication: REPLICATION on the role, a line of pg_hba.conf, the server's own address",
    }
    OLD_TRANSACTION = Warning "old_transaction" {
        what: "a transaction that writes has been open for more than a minute",
        why: "the cut waits for every transaction that is in progress when the slot is made",
        fix: "let it finish, or end it: SELECT pg_terminate_backend(pid);",
    }
    PREPARED_TRANSACTION = Warning "prepared_transaction" {
        what: "a prepared transaction waits for its COMMIT PREPARED",
        why: "the cut waits for it, without end if nobody commits it; a cutover's fence waits for it too",
        fix: "COMMIT PREPARED or ROLLBACK PREPARED it",
    }
}

pub(super) async fn wal_level(source: &Place<'_>) -> Result<Vec<Finding>> {
    let level = source.setting("wal_level").await?.unwrap_or_default();
    if level == "logical" {
        return Ok(Vec::new());
    }
    Ok(vec![WAL_LEVEL.on(Side::Source, format!("wal_level is {level}, logical is needed"))])
}

/// A slot to be had, or the one that is ours already.
pub(super) async fn slots(look: &Look<'_>) -> Result<Vec<Finding>> {
    let name = look.config.name.slot();
    let row = look.source.client.query_one(SLOTS, &[&name]).await?;
    let (most, used, ours): (i64, i64, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let active = row.try_get::<_, Option<bool>>(3)?.unwrap_or(false);
    let mut found = Vec::new();
    if ours > 0 {
        if !look.begun {
            found.push(slot_in_the_way(&name, active));
        }
        return Ok(found);
    }
    if used >= most {
        let what = format!("{used} of {most} replication slots are taken");
        let fix = format!(
            "SELECT pg_drop_replication_slot('…');  -- one that nobody needs, or:\nALTER SYSTEM SET max_replication_slots = {};  -- then restart the source",
            most + 4
        );
        found.push(NO_SLOT_FREE.on(Side::Source, what).fix(fix));
    }
    Ok(found)
}

fn slot_in_the_way(name: &str, active: bool) -> Finding {
    if active {
        let what = format!("the slot {name} is in use, and the target knows nothing of this move");
        return SLOT_ACTIVE.on(Side::Source, what).objects(vec![name.to_owned()]);
    }
    SLOT_EXISTS
        .on(Side::Source, format!("the slot {name} is there, and the target knows nothing of this move"))
        .fix(format!("SELECT pg_drop_replication_slot({});", quote_literal(name)))
        .objects(vec![name.to_owned()])
}

pub(super) async fn walsenders(source: &Place<'_>) -> Result<Vec<Finding>> {
    let row = source.client.query_one(WALSENDERS, &[]).await?;
    let (most, used): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    if used < most {
        return Ok(Vec::new());
    }
    let fix = format!("ALTER SYSTEM SET max_wal_senders = {};  -- then restart the source", most + 4);
    Ok(vec![NO_WALSENDER_FREE.on(Side::Source, format!("{used} of {most} walsenders are taken")).fix(fix)])
}

pub(super) async fn publications(look: &Look<'_>) -> Result<Vec<Finding>> {
    if look.begun {
        return Ok(Vec::new());
    }
    let ours = look.config.name.publications().to_vec();
    let rows = look.source.client.query(PUBLICATIONS, &[&ours]).await?;
    let there = rows.iter().map(|row| Ok(row.try_get(0)?)).collect::<Result<Vec<String>>>()?;
    if there.is_empty() {
        return Ok(Vec::new());
    }
    let fix = there.iter().map(|name| format!("DROP PUBLICATION {};", quote_identifier(name))).collect::<Vec<_>>();
    let what = format!("the publication {} is there, and the target knows nothing of this move", there.join(", "));
    Ok(vec![PUBLICATION_EXISTS.on(Side::Source, what).fix(fix.join("\n")).objects(there)])
}

/// Asked by doing, as providers grant the right in ways of their own (`rolreplication` may read false).
pub(super) async fn right(source: &Place<'_>) -> Result<Vec<Finding>> {
    let Err(error) = source.client.query(REPLICATION_RIGHT, &[]).await else { return Ok(Vec::new()) };
    match error.code() {
        Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            let user = quote_identifier(&source.facts.user);
            let what = format!("the role {} may not use replication slots", source.facts.user);
            let fix = format!("ALTER ROLE {user} REPLICATION;  -- on RDS: GRANT rds_replication TO {user};");
            Ok(vec![NO_REPLICATION_RIGHT.on(Side::Source, what).fix(fix)])
        }
        // The name was refused, so the right is there; or wal_level was, which has a check of its own.
        Some(&SqlState::INVALID_NAME | &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) => Ok(Vec::new()),
        _ => Err(error.into()),
    }
}

/// Opens a replication connection and closes it again: nothing is started on it.
pub(super) async fn connection(source: &Server) -> Result<Vec<Finding>> {
    match Wire::connect(source, "check", Mode::Replication, &[]).await {
        Ok(wire) => {
            wire.close().await;
            Ok(Vec::new())
        }
        // Lack of the attribute and of a free walsender have checks of their own.
        Err(error) if matches!(error.sqlstate(), Some("42501" | "53300")) => Ok(Vec::new()),
        Err(error) => Ok(vec![REPLICATION_REFUSED.on(Side::Source, error.to_string())]),
    }
}

/// What the cut would have to wait for.
pub(super) async fn in_progress(source: &Place<'_>) -> Result<Vec<Finding>> {
    let mut found = Vec::new();
    for row in source.client.query(OLD_TRANSACTIONS, &[]).await? {
        let (pid, user, database): (i32, String, String) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let since = row.try_get::<_, Option<i64>>(3)?.map_or_else(
            || "since a time that only pg_monitor may see".to_owned(),
            |seconds| format!("for {seconds} s"),
        );
        let what = format!("session {pid} of {user} in {database} has a transaction open {since}");
        let fix = format!("let it finish, or: SELECT pg_terminate_backend({pid});");
        found.push(OLD_TRANSACTION.on(Side::Source, what).fix(fix).objects(vec![format!("pid {pid}")]));
    }
    for row in source.client.query(PREPARED, &[]).await? {
        let (gid, owner, database): (String, String, String) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let seconds: i64 = row.try_get(3)?;
        let literal = quote_literal(&gid);
        let what = format!("{owner} prepared the transaction {gid} in {database} {seconds} s ago");
        let fix = format!(
            "COMMIT PREPARED {literal};  -- or ROLLBACK PREPARED {literal}; connected to {database} as {owner}"
        );
        found.push(PREPARED_TRANSACTION.on(Side::Source, what).fix(fix).objects(vec![gid]));
    }
    Ok(found)
}
