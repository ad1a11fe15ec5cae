//! Asks the source once a second how far its log is.
//!
//! Owns the connection `monitor`. Promises that nothing it meets ends the daemon: a source that does not answer is
//! asked again, each time a little later. Every question has a deadline. Never writes to the source.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::{SourceSample, Telemetry, redact};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::lsn::InvalidLsn;
use crate::postgres::{Lsn, Server, Session};

const EVERY: Duration = Duration::from_secs(1);
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const LONGEST_WAIT: Duration = Duration::from_secs(15);

/// `$1` is the slot. The clock is the statement's start, before the head is read: what was committed by then lies
/// before the head. `sent_lsn` is null for a role without pg_monitor.
const SAMPLE: &str = r"
    SELECT pg_catalog.current_setting('server_version'),
           head.lsn::text,
           (extract(epoch FROM pg_catalog.statement_timestamp()) * 1000000)::int8,
           COALESCE(slot.active, false),
           slot.confirmed_flush_lsn::text,
           GREATEST(pg_catalog.pg_wal_lsn_diff(head.lsn, slot.restart_lsn), 0)::int8,
           slot.safe_wal_size,
           slot.wal_status,
           sender.sent_lsn::text,
           pg_catalog.pg_size_bytes(pg_catalog.current_setting('max_slot_wal_keep_size'))
    FROM (SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn()
                      ELSE pg_catalog.pg_current_wal_lsn() END AS lsn) head
    LEFT JOIN pg_catalog.pg_replication_slots slot ON slot.slot_name = $1
    LEFT JOIN pg_catalog.pg_stat_replication sender ON sender.pid = slot.active_pid";

/// The source, asked over a control connection that is renewed when lost.
pub struct Source {
    server: Server,
    slot: String,
    role: &'static str,
    session: Option<Session>,
}

impl Source {
    /// Does not connect yet. `role` names the connection in `pg_stat_activity`.
    #[must_use]
    pub fn new(server: Server, slot: String, role: &'static str) -> Self {
        Self { server, slot, role, session: None }
    }

    /// Asks once.
    ///
    /// # Errors
    /// The connection's; class retry when no answer came in time.
    pub async fn sample(&mut self) -> Result<SourceSample> {
        // Taken out: a session whose answer did not come is not used again.
        let session = match self.session.take().filter(|session| !session.is_closed()) {
            Some(session) => session,
            None => {
                within(CONNECT_WITHIN, self.server.connect(self.role)).await.doing(|| "connecting to the source")?
            }
        };
        let sample =
            within(ANSWER_WITHIN, ask(&session, &self.slot)).await.doing(|| "asking the source for its head")?;
        self.session = Some(session);
        Ok(sample)
    }
}

async fn ask(session: &Session, slot: &str) -> Result<SourceSample> {
    let row = session.query_one(SAMPLE, &[&slot]).await?;
    Ok(SourceSample {
        version: row.try_get(0)?,
        head: position(row.try_get(1)?)?.unwrap_or_default(),
        now_micros: row.try_get(2)?,
        slot: slot.to_owned(),
        slot_active: row.try_get(3)?,
        confirmed: position(row.try_get(4)?)?,
        retained_wal_bytes: row.try_get::<_, Option<i64>>(5)?.and_then(|bytes| u64::try_from(bytes).ok()),
        safe_wal_bytes: row.try_get(6)?,
        wal_status: row.try_get(7)?,
        sent: position(row.try_get(8)?)?,
        // -1 is no limit.
        wal_limit_bytes: row.try_get::<_, Option<i64>>(9)?.and_then(|bytes| u64::try_from(bytes).ok()),
    })
}

fn position(text: Option<String>) -> Result<Option<Lsn>> {
    text.map(|text| text.parse().map_err(|e: InvalidLsn| Error::bug(e.to_string()))).transpose()
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(limit, work).await.unwrap_or_else(|_| {
        Err(Error::new(Class::Retry, "no_answer", format!("no answer within {} s", limit.as_secs())))
    })
}

/// A server's `server_version`, if it says it in time.
pub async fn server_version(server: &Server) -> Option<String> {
    let asked = async {
        let session = server.connect("status").await?;
        let row = session.query_one("SELECT pg_catalog.current_setting('server_version')", &[]).await?;
        Ok(row.try_get(0)?)
    };
    within(CONNECT_WITHIN, asked).await.ok()
}

/// Samples the source until cancelled.
pub async fn run(server: Server, slot: String, telemetry: Telemetry, cancel: CancellationToken) {
    cancel.run_until_cancelled(watch(Source::new(server, slot, "monitor"), &telemetry)).await;
}

/// An outage is one error: its repetitions are for the debug log.
async fn watch(mut source: Source, telemetry: &Telemetry) -> std::convert::Infallible {
    let mut wait = EVERY;
    let mut failing = false;
    loop {
        let began = Instant::now();
        match source.sample().await {
            Ok(sample) => {
                telemetry.source(sample);
                telemetry.warn_of_wal();
                (failing, wait) = (false, EVERY);
            }
            Err(error) if failing => {
                tracing::debug!(error = redact::shown(&error.to_string()), "the source still does not answer");
                wait = (wait * 2).min(LONGEST_WAIT);
            }
            Err(error) => {
                telemetry.error(&error);
                failing = true;
            }
        }
        tokio::time::sleep_until(began + wait).await;
    }
}
