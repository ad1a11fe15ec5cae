//! The cut: a point of the source at which its whole content is known.
//!
//! # Why snapshot and stream meet exactly
//!
//! A logical slot is made by the walsender's snapshot builder. It reads the log until it has seen every transaction
//! that was running begin or end, and calls the position that it then reached the consistent point; that is
//! [`Cut::lsn`]. The snapshot that it exports shows a transaction if and only if its commit record begins before that
//! point. The decision is made from the log and not from who happens to be running, so it is the same one that
//! the stream makes: the slot sends a transaction if and only if its commit record begins at or after that point. A
//! prepared transaction counts by its COMMIT PREPARED; what was rolled back is in neither.
//!
//! A move that was killed while it copied has lost its snapshot, which nothing can bring back. It takes another cut with
//! a temporary slot, and copies what is missing under that. The stream still begins at the first cut, so it carries
//! transactions that a table copied later holds already. Each table remembers its own cut, and the applier skips a
//! table's changes whose commit record begins before it: by the same rule these are exactly the ones that its
//! snapshot showed. Until the stream has passed the newest cut, tables stand at different points of history; that is
//! why the newest cut is written down before any table is committed under it.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::error::{Class, Doing, Error, Result};
use crate::postgres::replication::{Cut, Walsender};
use crate::postgres::{Server, Session};
use crate::state::Store;
use crate::telemetry::Telemetry;

use super::blockers;

/// How long a slot of ours may be in use by someone else before that is an error.
const SLOT_PATIENCE: Duration = Duration::from_secs(60);

/// `$1`: the slot. The backend that uses it, and whether that one is still making it.
const SLOT: &str = "
    SELECT s.active_pid, COALESCE(a.query LIKE 'CREATE_REPLICATION_SLOT%', false),
           s.database = pg_catalog.current_database() AND s.plugin = 'pgoutput'
    FROM pg_catalog.pg_replication_slots s
    LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = s.active_pid
    WHERE s.slot_name = $1";

const DROP_SLOT: &str = "SELECT pg_catalog.pg_drop_replication_slot($1)";

const TERMINATE: &str = "SELECT pg_catalog.pg_terminate_backend($1)";

/// Settings of the walsender that holds a snapshot: it sits idle in a transaction for as long as the copy begins, and
/// nothing set on the role may end it. The last one exists from 17 on.
const PATIENT: [(&str, &str); 4] = [
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("transaction_timeout", "0"),
];

/// Makes the slot of the move, with the first cut, and writes it down.
///
/// A slot that is there already is from a start that was killed before it could write it down. Nothing was copied
/// under it and its snapshot is gone, so it is made again. The publications must be there before this is called: the
/// stream reads the catalog as it stood at each change. The snapshot lives as long as the returned walsender.
///
/// # Errors
/// No free slot, no privilege, a slot of this name that is in use or is not ours; or the connection's. When
/// `cancel` fires while the source's old transactions are waited for: class retry, and nothing is left behind.
pub async fn first(
    source: &Server,
    store: &Store,
    telemetry: &Telemetry,
    cancel: &CancellationToken,
) -> Result<(Walsender, Cut)> {
    let slot = store.name().slot();
    let control = source.connect("cut").await?;
    drop_leftover(&control, &slot).await?;
    let (walsender, cut) = create(source, &control, &slot, false, telemetry, cancel).await?;
    store.record_slot(cut.lsn).await?;
    tracing::info!(%slot, lsn = %cut.lsn, "made the replication slot and took the first cut");
    Ok((walsender, cut))
}

/// Takes a newer cut, for tables that are not copied yet, and writes it down before anything is copied under it.
///
/// The slot behind it is temporary and goes with the returned walsender.
///
/// # Errors
/// As [`first`].
pub async fn another(
    source: &Server,
    store: &Store,
    telemetry: &Telemetry,
    cancel: &CancellationToken,
) -> Result<(Walsender, Cut)> {
    let control = source.connect("cut").await?;
    // The process id keeps it apart from a temporary slot that dies with its daemon just now.
    let pid: i32 = control.query_one("SELECT pg_catalog.pg_backend_pid()", &[]).await?.try_get(0)?;
    let slot = format!("{}_{pid}", store.name().slot());
    let (walsender, cut) = create(source, &control, &slot, true, telemetry, cancel).await?;
    store.record_cut(cut.lsn).await?;
    tracing::info!(lsn = %cut.lsn, "took another cut");
    Ok((walsender, cut))
}

async fn create(
    source: &Server,
    control: &Session,
    slot: &str,
    temporary: bool,
    telemetry: &Telemetry,
    cancel: &CancellationToken,
) -> Result<(Walsender, Cut)> {
    let mut walsender = Walsender::connect_with(source, "cut", known_settings(control).await?).await?;
    let pid = walsender.process_id();
    telemetry.activity("waiting for a consistent point of the source");
    let what = format!("making the replication slot {slot}");
    let cut = tokio::select! {
        biased;
        () = cancel.cancelled() => None,
        cut = blockers::explained(source, pid, &what, telemetry, walsender.create_slot(slot, temporary)) => Some(cut),
    };
    match cut {
        Some(cut) => Ok((walsender, cut?)),
        None => {
            // A walsender that waits for a transaction does not notice that nobody listens any more.
            control.execute(TERMINATE, &[&pid]).await.doing(|| "giving up the replication slot")?;
            Err(super::stopped())
        }
    }
}

/// Those of [`PATIENT`] that the source knows.
async fn known_settings(control: &Session) -> Result<&'static [(&'static str, &'static str)]> {
    let version = super::version(control).await?;
    Ok(if version >= 170_000 { &PATIENT } else { &PATIENT[..3] })
}

/// Removes the slot of a start that was killed.
async fn drop_leftover(control: &Session, slot: &str) -> Result<()> {
    let deadline = tokio::time::Instant::now() + SLOT_PATIENCE;
    loop {
        let Some(row) = control.query_opt(SLOT, &[&slot]).await.doing(|| format!("looking for the slot {slot}"))?
        else {
            return Ok(());
        };
        let (user, being_made, ours): (Option<i32>, bool, Option<bool>) =
            (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        if ours != Some(true) {
            return Err(Error::new(
                Class::Operator,
                "slot_name_taken",
                format!("the source has a replication slot {slot} that belongs to another database or plugin"),
            )
            .hint("choose another name for the move"));
        }
        match user {
            None => {
                tracing::warn!(slot, "dropping a replication slot that an earlier start left without a copy");
                control.execute(DROP_SLOT, &[&slot]).await.doing(|| format!("dropping the slot {slot}"))?;
                return Ok(());
            }
            // Whoever made it is dead: this daemon holds the move.
            Some(pid) if being_made => {
                control.execute(TERMINATE, &[&pid]).await.doing(|| format!("freeing the slot {slot}"))?;
            }
            Some(pid) if tokio::time::Instant::now() >= deadline => {
                return Err(Error::new(
                    Class::Operator,
                    "slot_in_use",
                    format!("the replication slot {slot} is in use by pid {pid} of the source"),
                )
                .hint("another move of this name runs, to another target: choose another name, or stop that one"));
            }
            Some(pid) => tracing::warn!(slot, pid, "waiting for the replication slot, which is in use"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
