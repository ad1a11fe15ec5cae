//! Whether the source has room for the WAL that a slot keeps while the copy runs.

use super::Finding;
use super::finding::kinds;
use super::look::Place;
use crate::error::Result;
use crate::postgres::Side;

const DATABASE_SIZE: &str = "SELECT pg_catalog.pg_database_size(pg_catalog.current_database())";

/// Takes pg_monitor.
const WAL_ON_DISK: &str = "SELECT COALESCE(sum(size), 0)::int8 FROM pg_catalog.pg_ls_waldir()";

kinds! {
    WAL_LIMIT_SMALL = Warning "wal_limit_small" {
        what: "max_slot_wal_keep_size is small for a database of this size",
        why: "the slot keeps all WAL written during the copy; beyond this limit the server invalidates it, and everything must be copied again",
        fix: "ALTER SYSTEM SET max_slot_wal_keep_size = …; SELECT pg_reload_conf();",
    }
    WAL_UNLIMITED = Info "wal_unlimited" {
        what: "max_slot_wal_keep_size is not set",
        why: "a slot that nobody reads keeps WAL until the source's disk is full; `pgtandem clean` drops it when a move is given up",
        fix: "",
    }
    WAL_ALREADY_LARGE = Warning "wal_already_large" {
        what: "the source holds more WAL than data",
        why: "some slot or a failing archive_command keeps it; a disk that is nearly full does not survive a copy",
        fix: "look at pg_replication_slots (restart_lsn) and pg_stat_archiver",
    }
}

/// The limit against the size of the database: a busy source writes about its own size during a copy.
pub(super) async fn limit(source: &Place<'_>) -> Result<Vec<Finding>> {
    let Some(megabytes) = source.number("max_slot_wal_keep_size").await? else { return Ok(Vec::new()) };
    if megabytes < 0 {
        return Ok(vec![
            WAL_UNLIMITED.on(Side::Source, "max_slot_wal_keep_size is -1: a slot keeps as much WAL as it needs"),
        ]);
    }
    let limit = megabytes.saturating_mul(1 << 20);
    let database = source.count(DATABASE_SIZE).await?;
    if limit >= database.max(1 << 30) {
        return Ok(Vec::new());
    }
    let enough = (database.max(1 << 30) >> 30) + 1;
    let what = format!("max_slot_wal_keep_size is {megabytes} MB, the database {} MB", database >> 20);
    let fix = format!("ALTER SYSTEM SET max_slot_wal_keep_size = '{enough}GB'; SELECT pg_reload_conf();");
    Ok(vec![WAL_LIMIT_SMALL.on(Side::Source, what).fix(fix)])
}

/// More WAL than `max_wal_size` and than data is kept by something.
pub(super) async fn on_disk(source: &Place<'_>) -> Result<Vec<Finding>> {
    let wal = source.count(WAL_ON_DISK).await?;
    let database = source.count(DATABASE_SIZE).await?;
    let usual = source.number("max_wal_size").await?.unwrap_or(1024).saturating_mul(2 << 20);
    if wal <= database.max(usual) {
        return Ok(Vec::new());
    }
    let what = format!("{} MB of WAL beside {} MB of data", wal >> 20, database >> 20);
    Ok(vec![WAL_ALREADY_LARGE.on(Side::Source, what)])
}
