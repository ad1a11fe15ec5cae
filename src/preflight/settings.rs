//! Settings of either server that would hurt during a move.

use super::Finding;
use super::finding::kinds;
use super::look::{Look, Place};
use super::privileges::text;
use crate::error::Result;
use crate::postgres::catalog::IS_USER_TABLE;
use crate::postgres::{Side, quote_identifier};

/// Everything that a move locks in one transaction: every table at the fence, every relation in pg_dump.
fn relations() -> String {
    format!(
        r"
        SELECT count(*) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND {IS_USER_TABLE}"
    )
}

/// The lock table holds this many locks for all sessions together.
const LOCK_ROOM: &str = r"
    SELECT pg_catalog.current_setting('max_locks_per_transaction')::int8
         * (pg_catalog.current_setting('max_connections')::int8
            + pg_catalog.current_setting('max_prepared_transactions')::int8)";

/// The kind of somebody else's backend is hidden from those without pg_monitor, its database is not. Walsenders count apart,
/// and what 16 and newer reserve is not ours to take.
const CONNECTIONS: &str = r"
    SELECT pg_catalog.current_setting('max_connections')::int8
         - pg_catalog.current_setting('superuser_reserved_connections')::int8
         - COALESCE(pg_catalog.current_setting('reserved_connections', true), '0')::int8
         - (SELECT count(*) FROM pg_catalog.pg_stat_activity
            WHERE COALESCE(backend_type, CASE WHEN datid IS NOT NULL THEN 'client backend' END) = 'client backend'),
           (SELECT r.rolconnlimit::int8 - (SELECT count(*) FROM pg_catalog.pg_stat_activity a WHERE a.usename = r.rolname)
            FROM pg_catalog.pg_roles r WHERE r.rolname = current_user AND r.rolconnlimit >= 0),
           (SELECT d.datconnlimit::int8 - (SELECT count(*) FROM pg_catalog.pg_stat_activity a WHERE a.datname = d.datname)
            FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database() AND d.datconnlimit >= 0)";

/// What is set on our role or database and overridden by every session of ours.
const OVERRIDDEN: &str = r"
    SELECT DISTINCT s.setting
    FROM pg_catalog.pg_db_role_setting r
    LEFT JOIN pg_catalog.pg_roles u ON u.oid = r.setrole
    LEFT JOIN pg_catalog.pg_database d ON d.oid = r.setdatabase
    CROSS JOIN LATERAL unnest(r.setconfig) s(setting)
    WHERE (r.setrole = 0 OR u.rolname = current_user)
      AND (r.setdatabase = 0 OR d.datname = pg_catalog.current_database())
      AND pg_catalog.split_part(s.setting, '=', 1) IN
          ('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout',
           'default_transaction_read_only', 'row_security', 'search_path', 'DateStyle', 'IntervalStyle', 'TimeZone',
           'extra_float_digits', 'bytea_output', 'synchronous_commit')
    ORDER BY 1";

/// A walsender that hears nothing for less than this is not given the time to ride out a busy moment.
const SHORTEST_SENDER_TIMEOUT_MS: i64 = 10_000;

kinds! {
    SENDER_TIMEOUT_OFF = Info "wal_sender_timeout_off" {
        what: "wal_sender_timeout is 0",
        why: "a connection that died without a word keeps its slot occupied until TCP notices, which can take hours",
        fix: "ALTER SYSTEM SET wal_sender_timeout = '60s'; SELECT pg_reload_conf();",
    }
    SENDER_TIMEOUT_SHORT = Warning "wal_sender_timeout_short" {
        what: "wal_sender_timeout is short",
        why: "a pause of the network or of the daemon breaks the stream, which then begins anew from its last confirmed position",
        fix: "ALTER SYSTEM SET wal_sender_timeout = '60s'; SELECT pg_reload_conf();",
    }
    IDLE_SLOT_TIMEOUT = Warning "idle_slot_timeout" {
        what: "idle_replication_slot_timeout is set",
        why: "a slot whose daemon is stopped for longer is invalidated, and everything must be copied again",
        fix: "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf();",
    }
    LOCK_TABLE_SMALL = Warning "lock_table_small" {
        what: "the lock table may be too small for a transaction that locks every table",
        why: "pg_dump and the fence of a cutover lock all tables at once, and fail with \"out of shared memory\"",
        fix: "raise max_locks_per_transaction and restart the server",
    }
    FEW_CONNECTIONS = Blocking "few_connections" {
        what: "too few connections are free",
        why: "the move could not open its sessions, or would take the last ones from the application",
        fix: "raise max_connections, end some sessions, or lower copy.workers",
    }
    FEW_WORKER_PROCESSES = Blocking "few_worker_processes" {
        what: "the target has too few worker processes for a subscription",
        why: "the subscription engine runs inside the target's logical replication workers",
        fix: "raise max_logical_replication_workers and max_worker_processes, then restart the target",
    }
    SYNCHRONOUS_STANDBYS = Warning "synchronous_standbys" {
        what: "commits wait for synchronous standbys",
        why: "the fence's and the marker's commits on the source, or each batch on the target, wait for them too; one that is down stops the move",
        fix: "make sure that the standbys are up before the cutover",
    }
    DECODING_MEMORY = Info "decoding_memory" {
        what: "logical_decoding_work_mem is small",
        why: "larger transactions are spilled to the source's disk while they are decoded, which is slower",
        fix: "",
    }
    SETTINGS_OVERRIDDEN = Info "settings_overridden" {
        what: "settings of the role or the database would change what our sessions do",
        why: "every session of a move overrides them, so they change nothing; they are named so that nobody wonders",
        fix: "",
    }
}

pub(super) async fn walsender_timeout(source: &Place<'_>) -> Result<Vec<Finding>> {
    Ok(match source.number("wal_sender_timeout").await? {
        Some(0) => {
            vec![SENDER_TIMEOUT_OFF.on(Side::Source, "wal_sender_timeout is 0: it never ends a dead connection")]
        }
        Some(ms) if ms < SHORTEST_SENDER_TIMEOUT_MS => {
            vec![SENDER_TIMEOUT_SHORT.on(Side::Source, format!("wal_sender_timeout is {ms} ms"))]
        }
        _ => Vec::new(),
    })
}

pub(super) async fn idle_slot_timeout(source: &Place<'_>) -> Result<Vec<Finding>> {
    let timeout = source.setting("idle_replication_slot_timeout").await?;
    Ok(match timeout.as_deref() {
        None | Some("0") => Vec::new(),
        Some(set) => vec![IDLE_SLOT_TIMEOUT.on(Side::Source, format!("idle_replication_slot_timeout is {set}"))],
    })
}

/// The source's own lock table, and the target's for the same relations once they are restored.
pub(super) async fn lock_table(look: &Look<'_>) -> Result<Vec<Finding>> {
    let relations = look.source.count(&relations()).await?;
    let mut found = Vec::new();
    for place in look.places() {
        let room = place.count(LOCK_ROOM).await?;
        // Other sessions hold locks as well, and each relation brings its indexes and its TOAST table.
        if relations.saturating_mul(3) <= room {
            continue;
        }
        let per_transaction = place.number("max_locks_per_transaction").await?.unwrap_or(64);
        let enough = per_transaction * (relations.saturating_mul(3) / room.max(1) + 1);
        let what = format!("{relations} relations, and room for {room} locks on the {}", place.side.as_str());
        let fix = format!(
            "ALTER SYSTEM SET max_locks_per_transaction = {enough};  -- then restart the {}",
            place.side.as_str()
        );
        found.push(LOCK_TABLE_SMALL.on(place.side, what).fix(fix));
    }
    Ok(found)
}

/// Sessions that a move opens at once: copying workers, and a handful for control, state, lock and the stream.
fn connections_needed(look: &Look<'_>, side: Side) -> i64 {
    let workers = look.config.copy.workers.get();
    let own = match side {
        Side::Source => workers + 4,
        // Beside the workers, one applies what is in progress.
        Side::Target => workers.max(look.config.copy.index_workers.get()).max(look.config.follow.workers.get() + 1) + 4,
    };
    i64::try_from(own).unwrap_or(i64::MAX)
}

pub(super) async fn connections(look: &Look<'_>, place: &Place<'_>) -> Result<Vec<Finding>> {
    let needed = connections_needed(look, place.side);
    let row = place.client.query_one(CONNECTIONS, &[]).await?;
    let limits: [Option<i64>; 3] = [row.try_get(0)?, row.try_get(1)?, row.try_get(2)?];
    let (free, limit) = limits
        .into_iter()
        .zip(["max_connections", "the role's CONNECTION LIMIT", "the database's CONNECTION LIMIT"])
        .filter_map(|(free, limit)| free.map(|free| (free, limit)))
        .min()
        .unwrap_or((i64::MAX, ""));
    if free >= needed {
        return Ok(Vec::new());
    }
    let what = format!("{} connections are free under {limit}, a move opens up to {needed}", free.max(0));
    let fix = match limit {
        "max_connections" => "raise max_connections and restart, end some sessions, or lower copy.workers".to_owned(),
        "the role's CONNECTION LIMIT" => {
            format!("ALTER ROLE {} CONNECTION LIMIT -1;", quote_identifier(&place.facts.user))
        }
        _ => format!("ALTER DATABASE {} CONNECTION LIMIT -1;", quote_identifier(&place.facts.database)),
    };
    Ok(vec![FEW_CONNECTIONS.on(place.side, what).fix(fix)])
}

pub(super) async fn worker_processes(look: &Look<'_>) -> Result<Vec<Finding>> {
    if look.config.follow.engine != crate::config::Engine::Subscription {
        return Ok(Vec::new());
    }
    let target = &look.target;
    let running = target.count("SELECT count(*) FROM pg_catalog.pg_stat_subscription WHERE pid IS NOT NULL").await?;
    let workers = target.number("max_logical_replication_workers").await?.unwrap_or(0);
    if !look.begun && workers >= 2 && workers <= running {
        let what = format!("all {workers} of max_logical_replication_workers are at work for other subscriptions");
        let fix =
            format!("ALTER SYSTEM SET max_logical_replication_workers = {};  -- then restart the target", workers + 2);
        return Ok(vec![FEW_WORKER_PROCESSES.on(Side::Target, what).fix(fix)]);
    }
    for name in ["max_worker_processes", "max_logical_replication_workers"] {
        let value = target.number(name).await?.unwrap_or(0);
        if value < 2 {
            let what = format!("{name} is {value}, a subscription needs 2");
            let fix = format!("ALTER SYSTEM SET {name} = 4;  -- then restart the target");
            return Ok(vec![FEW_WORKER_PROCESSES.on(Side::Target, what).fix(fix)]);
        }
    }
    Ok(Vec::new())
}

pub(super) async fn synchronous_standbys(place: &Place<'_>) -> Result<Vec<Finding>> {
    let names = place.setting("synchronous_standby_names").await?.unwrap_or_default();
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let what = format!("synchronous_standby_names is {names}");
    Ok(vec![SYNCHRONOUS_STANDBYS.on(place.side, what)])
}

pub(super) async fn decoding_memory(source: &Place<'_>) -> Result<Vec<Finding>> {
    let kilobytes = source.number("logical_decoding_work_mem").await?.unwrap_or(i64::MAX);
    if kilobytes >= 64 * 1024 {
        return Ok(Vec::new());
    }
    Ok(vec![DECODING_MEMORY.on(Side::Source, format!("logical_decoding_work_mem is {kilobytes} kB"))])
}

pub(super) async fn overridden(place: &Place<'_>) -> Result<Vec<Finding>> {
    let rows = place.client.query(OVERRIDDEN, &[]).await?;
    let settings = rows.iter().map(|row| text(row, 0)).collect::<Result<Vec<_>>>()?;
    if settings.is_empty() {
        return Ok(Vec::new());
    }
    let what = format!("set on the role or the database: {}", settings.join(", "));
    Ok(vec![SETTINGS_OVERRIDDEN.on(place.side, what).objects(settings)])
}
