//! The slot, and the source behind it: whether they are the ones that progress belongs to, and whether the source works.
//!
//! Owns the questions to the source outside the stream. Must never follow a source whose history is not the one that the
//! target holds: it would mix two.

use std::time::{Duration, Instant};

use crate::config::MoveName;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::{Lsn, Server, Session};
use crate::state::MoveRecord;

/// How long the source may take to answer whether its walsender works.
const PATIENCE: Duration = Duration::from_secs(20);

/// `$1` slot. The log's head is NULL on a standby, which may be behind for a while.
const SLOT: &str = "
    SELECT plugin::text, confirmed_flush_lsn::text, wal_status = 'lost', database = pg_catalog.current_database(),
           pg_catalog.current_setting('server_version_num')::int4,
           CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_current_wal_lsn()::text END
    FROM pg_catalog.pg_replication_slots WHERE slot_name = $1";

/// `$1` slot. Whether a walsender holds it, and what that waits for.
const WALSENDER: &str = "
    SELECT s.active_pid IS NOT NULL, a.wait_event
    FROM pg_catalog.pg_replication_slots s LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = s.active_pid
    WHERE s.slot_name = $1";

/// `$1` slot. Who reads it, and what it confirmed.
pub(super) const READER: &str =
    "SELECT active_pid, confirmed_flush_lsn::text FROM pg_catalog.pg_replication_slots WHERE slot_name = $1";

/// What a slot that is ours says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub confirmed: Option<Lsn>,
    /// `server_version_num`
    pub version: i32,
}

/// The slot of a move. Cheap to clone.
#[derive(Clone)]
pub(super) struct Slot {
    source: Server,
    name: String,
}

impl Slot {
    pub(super) fn new(source: &Server, move_name: &MoveName) -> Self {
        Self { source: source.clone(), name: move_name.slot() }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn source(&self) -> &Server {
        &self.source
    }

    /// The slot must be the one that our progress belongs to: confirmed up to progress at most, for we never confirm
    /// more; where a spool ([`super::spool`]) holds everything from progress on, the end of that stands for progress. A slot that was made again, or moved on by someone else, has lost changes that we do not have. Returns the
    /// source's `server_version_num`.
    pub(super) async fn check(&self, progress: Lsn) -> Result<i32> {
        let session = self.source.connect("slot").await?;
        let seen = self.look(&session, progress).await?;
        match seen.confirmed {
            Some(confirmed) if confirmed > progress => Err(lost(
                "slot_advanced",
                format!("the slot {} stands at {confirmed}, beyond what was received ({progress})", self.name),
            )
            .hint(
                "if the move had a spool, what is missing is there: set follow.spool as it was, and start the daemon where it ran. \
                 Else changes are missing between the target and the source: run `pgtandem clean`, empty the target and begin the \
                 move again",
            )),
            _ => Ok(seen.version),
        }
    }

    /// The slot must be there and ours, and the source's log must reach as far as progress.
    pub(super) async fn look(&self, session: &Session, progress: Lsn) -> Result<Seen> {
        let slot = &self.name;
        let row = session.query_opt(SLOT, &[slot]).await.doing(|| format!("looking for the slot {slot}"))?;
        let Some(row) = row else {
            return Err(lost("slot_missing", format!("the source has no slot {slot} any more")));
        };
        if row.try_get::<_, Option<bool>>(2)? == Some(true) {
            return Err(lost("slot_lost", format!("the source gave up the WAL that the slot {slot} needs")));
        }
        if row.try_get::<_, Option<String>>(0)?.as_deref() != Some("pgoutput")
            || row.try_get::<_, Option<bool>>(3)? != Some(true)
        {
            return Err(lost("slot_foreign", format!("the slot {slot} belongs to another plugin or database")));
        }
        let position = |text: Option<String>| text.and_then(|text| text.parse::<Lsn>().ok());
        check_head(position(row.try_get(5)?), progress)?;
        Ok(Seen { confirmed: position(row.try_get(1)?), version: row.try_get(4)? })
    }

    /// Waits until nobody reads it, but not long: a walsender that is busy sees late that its client is gone.
    pub(super) async fn released(&self) -> Result<()> {
        let session = self.source.connect("slot").await?;
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            let row = session.query_opt(READER, &[&self.name]).await.doing(|| "looking who reads the slot")?;
            let reader: Option<i32> = row.map(|row| row.try_get(0)).transpose()?.flatten();
            if reader.is_none() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Whether the walsender works although it says nothing: it decodes a huge transaction of which nothing is
    /// published, say. An error or no answer is a no.
    pub(super) async fn is_decoding(&self) -> bool {
        let asked = async {
            let session = self.source.connect("slot").await?;
            let row = session.query_opt(WALSENDER, &[&self.name]).await?;
            let Some(row) = row else { return Ok::<bool, Error>(false) };
            Ok(works(row.try_get(0)?, row.try_get::<_, Option<&str>>(1)?))
        };
        matches!(tokio::time::timeout(PATIENCE, asked).await, Ok(Ok(true)))
    }
}

fn lost(code: &'static str, what: String) -> Error {
    Error::new(Class::Operator, code, what).hint(
        "changes are missing between the target and the source: run `pgtandem clean`, empty the target and begin the move \
         again",
    )
}

/// A walsender that waits for more WAL or for its client answers when it is asked; if we hear nothing of that one,
/// the connection between us is dead, whatever the source believes.
fn works(active: bool, wait_event: Option<&str>) -> bool {
    active && !wait_event.is_some_and(|event| event.starts_with("WalSender"))
}

/// Progress comes from the source's log, so a source whose log ends before it has forgotten what the target holds.
fn check_head(head: Option<Lsn>, progress: Lsn) -> Result<()> {
    match head {
        Some(head) if head < progress => Err(Error::new(
            Class::Operator,
            "source_behind",
            format!("the log of the source ends at {head}, before what the target holds ({progress})"),
        )
        .hint(
            "a standby that lagged was promoted, or a backup was restored: the target holds changes that the source has \
             lost. Find the server that has them, or run `pgtandem clean`, empty the target and begin the move again",
        )),
        _ => Ok(()),
    }
}

/// The stream must come from the server that the move began with, whatever the control connections lead to.
///
/// `system_identifier` is what the stream's server says of itself.
pub(super) fn check_identity(record: Option<&MoveRecord>, system_identifier: &str) -> Result<()> {
    let known = record.and_then(|record| record.source_identity.get("system_identifier")?.as_str());
    match known {
        Some(known) if !system_identifier.is_empty() && known != system_identifier => Err(Error::new(
            Class::Operator,
            "source_changed",
            format!("the stream comes from the server {system_identifier}, but the move began with {known}"),
        )
        .hint("correct source.url, or run `pgtandem clean`, empty the target and begin the move again")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Phase;
    use serde_json::{Value, json};

    #[test]
    fn a_log_that_ends_before_progress_is_refused() {
        let progress = Lsn::new(100);
        assert!(check_head(Some(progress), progress).is_ok());
        assert!(check_head(None, progress).is_ok(), "a standby may be behind");
        let behind = check_head(Some(Lsn::new(99)), progress).unwrap_err();
        assert_eq!((behind.code(), behind.class()), ("source_behind", Class::Operator));
    }

    #[test]
    fn a_stream_of_another_server_is_refused() {
        let record = |identity: Value| MoveRecord {
            blockers: Vec::new(),
            phase: Phase::Follow,
            phase_since: String::new(),
            source_identity: identity,
            slot_lsn: None,
            last_cut_lsn: None,
            constraints_done: true,
            error: None,
        };
        let known = record(json!({"system_identifier": "7"}));
        assert!(check_identity(Some(&known), "7").is_ok());
        assert!(check_identity(Some(&known), "").is_ok(), "it may not say");
        assert!(check_identity(Some(&record(json!({"system_identifier": null}))), "8").is_ok());
        let changed = check_identity(Some(&known), "8").unwrap_err();
        assert_eq!((changed.code(), changed.class()), ("source_changed", Class::Operator));
    }

    #[test]
    fn a_walsender_works_unless_it_waits_for_us() {
        assert!(works(true, None));
        assert!(works(true, Some("DataFileRead")));
        assert!(!works(true, Some("WalSenderWaitForWAL")), "it would have answered");
        assert!(!works(false, None));
    }
}
