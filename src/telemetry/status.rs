//! The status document: what `status --json`, `/status` and `/events` say, field by field as promised to scripts.
//!
//! Additive only: fields are never renamed, removed or reordered. What is unknown is null. The daemon and the
//! command `status` build it from the same model: the daemon's is fed by reports, the command's from the state in
//! the target and one look at the source, so it works also when no daemon runs.

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::redact::shown;
use super::sampler;
use super::{Recorded, Telemetry};
use crate::config::Config;
use crate::error::{Doing, Result};
use crate::postgres::{Server, Side};
use crate::state::Store;

pub use super::text::{Style, render_text};

/// Where a move stands.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Status {
    /// The move.
    pub name: String,
    /// The word of [`crate::state::Phase`].
    pub phase: &'static str,
    /// RFC 3339.
    pub phase_since: Option<String>,
    /// The server that the application uses today.
    pub source: SourceStatus,
    /// The server that it will use.
    pub target: TargetStatus,
    /// Between the source's head and progress.
    pub lag: LagStatus,
    /// The first copy as a whole.
    pub copy: CopyStatus,
    /// Every table of the move, by name.
    pub tables: Vec<TableStatus>,
    /// What was applied since the move began.
    pub apply: ApplyStatus,
    /// Whether a cutover may begin.
    pub ready: bool,
    /// What keeps the move from going on or from a cutover.
    pub blockers: Vec<Problem>,
    /// The last cutover.
    pub cutover: CutoverStatus,
    /// The error that the move stands on.
    pub error: Option<Problem>,
    /// What may become a reason to act, and blocks nothing yet.
    pub warnings: Vec<Problem>,
    /// Why `ready` is false, in a sentence.
    #[serde(skip)]
    pub not_ready_because: Option<String>,
    /// Whether a daemon holds the move.
    #[serde(skip)]
    pub daemon: bool,
    /// What the daemon does next to copying rows.
    #[serde(skip)]
    pub activity: Option<String>,
}

/// All null while the source cannot be reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SourceStatus {
    /// `server_version`
    pub version: Option<String>,
    /// The end of the source's log.
    pub head_lsn: Option<String>,
    /// Null while the source cannot be reached or the slot is not there.
    pub slot: Option<SlotStatus>,
}

/// The replication slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SlotStatus {
    /// `pgtandem_<name>`
    pub name: String,
    /// Whether a connection reads it.
    pub active: bool,
    /// What the source was told that it may forget.
    pub confirmed_lsn: Option<String>,
    /// What the source keeps because of it.
    pub retained_wal_bytes: Option<u64>,
    /// reserved, extended, unreserved, lost.
    pub wal_status: Option<String>,
}

/// The target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TargetStatus {
    /// `server_version`
    pub version: Option<String>,
    /// The source's position up to which the target holds everything.
    pub progress_lsn: Option<String>,
}

/// Null while unknown.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LagStatus {
    /// Of WAL.
    pub bytes: Option<u64>,
    /// Of the source's clock.
    pub seconds: Option<f64>,
}

/// Sums over all tables.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CopyStatus {
    /// How many.
    pub tables_total: u64,
    /// How many are copied.
    pub tables_done: u64,
    /// The source's size of them.
    pub bytes_total: u64,
    /// As COPY printed them: into the target, or while an archive is written, into that.
    pub bytes_done: u64,
    /// Rows sent.
    pub rows_done: u64,
    /// Null while unknown.
    pub eta_seconds: Option<u64>,
}

/// One table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TableStatus {
    /// As the catalog holds it.
    pub schema: String,
    /// As the catalog holds it.
    pub name: String,
    /// The word of [`crate::state::TableState`].
    pub state: &'static str,
    /// Sent so far.
    pub rows: u64,
    /// Sent so far.
    pub bytes: u64,
}

/// Totals since the move began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ApplyStatus {
    /// Source transactions.
    pub transactions: u64,
    /// Row events and truncates.
    pub changes: u64,
}

/// A blocker, an error or a warning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Stable snake_case word.
    pub code: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// The last cutover; `state` is null if there was none.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CutoverStatus {
    /// preparing, switching, aborted, done.
    pub state: Option<String>,
    /// In order.
    pub steps: Vec<StepStatus>,
    /// From the first refused write on the source to the first accepted one on the target.
    pub write_pause_seconds: Option<f64>,
}

/// A step of a cutover.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepStatus {
    /// `fence`, `drain`, …
    pub name: String,
    /// running, done, failed, skipped.
    pub state: String,
    /// How long it took.
    pub seconds: Option<f64>,
}

/// Asks the target and the source, without the daemon's help. Kept for `--watch`: connections and rates live on.
pub struct Collector {
    store: Store,
    source: sampler::Source,
    target: Server,
    telemetry: Telemetry,
}

impl Collector {
    /// Does not connect yet.
    ///
    /// # Errors
    /// Class usage: TLS material that cannot be read.
    pub fn new(config: &Config) -> Result<Self> {
        let name = config.name.as_str();
        let target = Server::new(Side::Target, config.target.clone(), name)?;
        let source = Server::new(Side::Source, config.source.clone(), name)?;
        Ok(Self {
            store: Store::new(target.clone(), config.name.clone()),
            source: sampler::Source::new(source, config.name.slot(), "status"),
            target,
            telemetry: Telemetry::new(&config.name, config.cutover.max_lag),
        })
    }

    /// One look at both sides. A source that cannot be reached is part of the answer, not a failure.
    ///
    /// # Errors
    /// The target's: without it nothing is known about the move.
    pub async fn collect(&mut self) -> Result<Status> {
        let (recorded, sampled) = tokio::join!(Recorded::load(&self.store), self.source.sample());
        let recorded = recorded?;
        if let Some(recorded) = &recorded {
            self.telemetry.resumed(recorded);
        }
        let unreachable = match sampled {
            Ok(sample) => {
                self.telemetry.source(sample);
                None
            }
            Err(error) => {
                self.telemetry.source_lost();
                Some(Problem::from(&error))
            }
        };
        if let Some(version) = sampler::server_version(&self.target).await {
            self.telemetry.target_version(&version);
        }
        let mut status = self.telemetry.status();
        status.daemon = recorded.is_some_and(|recorded| recorded.daemon);
        status.error = status.error.or(unreachable);
        if !status.daemon {
            status.say_that_no_daemon_runs();
        }
        Ok(status)
    }
}

/// One look at both sides; see [`Collector`].
///
/// # Errors
/// The target's: without it nothing is known about the move.
pub async fn collect(config: &Config) -> Result<Status> {
    Collector::new(config)?.collect().await
}

/// How often `--watch` and `/events` say something.
pub const REFRESH: Duration = Duration::from_secs(1);

/// How the command `status` prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Print {
    /// Again and again until stopped.
    pub watch: bool,
    /// JSON, one document a line, instead of text.
    pub json: bool,
    /// Whether the reader is a terminal: with colour, and a watched text replaces the one before.
    pub terminal: bool,
    /// `NO_COLOR` was set.
    pub no_colour: bool,
}

/// The command `status`: prints to `out` once, or each second until `stop` or until nobody reads any more.
///
/// # Errors
/// The target cannot be reached at first. Once watching, it is waited for.
pub async fn print(config: &Config, how: Print, out: &mut (impl Write + Send), stop: &CancellationToken) -> Result<()> {
    let mut collector = Collector::new(config)?;
    let mut status = collector.collect().await?;
    loop {
        let written = write_one(&status, how, out);
        match written {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            other => other.doing(|| "printing the status")?,
        }
        if !how.watch {
            return Ok(());
        }
        match next(&mut collector, stop).await {
            Some(seen) => status = seen,
            None => return Ok(()),
        }
    }
}

/// The next look, a second later or once the target answers again; `None` when stopped.
async fn next(collector: &mut Collector, stop: &CancellationToken) -> Option<Status> {
    loop {
        stop.run_until_cancelled(tokio::time::sleep(REFRESH)).await?;
        match stop.run_until_cancelled(collector.collect()).await? {
            Ok(status) => return Some(status),
            Err(error) => tracing::warn!(code = error.code(), "{}", shown(&error.to_string())),
        }
    }
}

fn write_one(status: &Status, how: Print, out: &mut impl Write) -> io::Result<()> {
    const CLEAR: &str = "\u{1b}[H\u{1b}[2J";
    if how.json {
        serde_json::to_writer(&mut *out, status)?;
        writeln!(out)?;
    } else {
        let text = render_text(status, Style { colour: how.terminal && !how.no_colour });
        match (how.watch, how.terminal) {
            (true, true) => write!(out, "{CLEAR}{text}")?,
            (true, false) => writeln!(out, "{text}")?,
            (false, _) => write!(out, "{text}")?,
        }
    }
    out.flush()
}

impl Status {
    /// The document as one line of JSON.
    ///
    /// # Errors
    /// None that data can cause.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|e| crate::Error::bug(format!("the status cannot be written as JSON: {e}")))
    }

    /// Without a daemon nothing goes on, whatever the lag says.
    fn say_that_no_daemon_runs(&mut self) {
        self.ready = false;
        if self.phase == crate::state::Phase::Done.as_str() {
            return;
        }
        self.not_ready_because = Some("no daemon runs".to_owned());
        self.blockers.push(Problem {
            code: "no_daemon".to_owned(),
            message: "no daemon holds this move, so nothing goes on".to_owned(),
            hint: Some("start `pgtandem run`; it goes on from where the move stands".to_owned()),
        });
    }
}
