//! The daemon: takes the move, and drives it from phase to phase.
//!
//! Owns the tasks, the one token that ends them, and the decision what an error means for the whole: try again, wait, or
//! stop for a person. Promises that a start goes on from what is durable, whatever the last one died of: each phase begins
//! by asking the state and the servers what is there, and none of its steps minds being repeated.
//!
//! - [`Walk`](walk::Walk) walks the phases once; an error ends the walk.
//! - [`steer`](steer::Steering) listens for requests while following.

mod steer;
mod walk;

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Ddl};
use crate::cutover::{self, Recovered, error_json};
use crate::error::{Class, Error, Result};
use crate::follow::spool::Spooling;
use crate::follow::{Durable, Gate, MarkerWatch, watching};
use crate::postgres::{Server, Side};
use crate::preflight;
use crate::state::{Leadership, MoveRecord, Phase, RequestKind, Store};
use crate::telemetry::Recorded;
use crate::telemetry::progress::{self, Terminal};
use crate::telemetry::{Telemetry, http, sampler};
use walk::Walk;

/// How long a daemon waits before it looks again whether the move is free.
const STANDBY_EVERY: Duration = Duration::from_secs(1);
/// The first wait after an error; each one doubles, up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// How often a daemon that waits for a person looks whether it was asked for something.
const LOOK_FOR_REQUESTS_EVERY: Duration = Duration::from_millis(500);

/// When to stop by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// After a cutover.
    Cutover,
    /// The copy is complete.
    Copy,
    /// The lag first reached zero.
    Follow,
}

/// How `run` was called.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// When to stop by itself.
    pub until: Until,
    /// Cut over as soon as the move is ready.
    pub cutover_when_ready: bool,
    /// Wait while another daemon holds the move.
    pub standby: bool,
}

/// Why a walk through the phases ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Told to stop.
    Stopped,
    /// What `until` asks for is reached.
    Reached,
    /// The application is on the target.
    Done,
}

/// Runs the daemon until the move is done, `until` is reached or `stop` is cancelled.
///
/// # Errors
/// Class no: preflight found something that blocks. Class operator: a person must decide. Class held: another daemon has
/// the move and `standby` is off. Classes retry and wait: a server could not be reached at the beginning.
pub async fn run(config: &Config, options: Options, terminal: &Terminal, stop: &CancellationToken) -> Result<()> {
    let source = Server::new(Side::Source, config.source.clone(), config.name.as_str())?;
    let target = Server::new(Side::Target, config.target.clone(), config.name.as_str())?;
    let telemetry = Telemetry::new(&config.name, config.cutover.max_lag);
    let store = Store::new(target.clone(), config.name.clone());
    let (durable, _) = watch::channel(Durable::default());
    let spooling = Spooling::new(config, &telemetry);
    let supervisor = Supervisor {
        config,
        options,
        source,
        target,
        store,
        telemetry,
        durable,
        marker: MarkerWatch::default(),
        gate: Gate::default(),
        spooling,
        stop: stop.clone(),
    };
    let beside = CancellationToken::new();
    let tasks = supervisor.start_beside(terminal, &beside).await?;
    let outcome = supervisor.supervise().await;
    if let Err(error) = &outcome {
        supervisor.telemetry.standing_error(Some(error));
    }
    http::linger(&supervisor.telemetry, stop).await;
    beside.cancel();
    tasks.close();
    tasks.wait().await;
    outcome
}

struct Supervisor<'a> {
    config: &'a Config,
    options: Options,
    source: Server,
    target: Server,
    store: Store,
    telemetry: Telemetry,
    durable: watch::Sender<Durable>,
    marker: MarkerWatch,
    gate: Gate,
    spooling: Spooling,
    stop: CancellationToken,
}

impl Supervisor<'_> {
    /// What is seen from outside: HTTP, the sampler, the bars.
    async fn start_beside(
        &self,
        terminal: &Terminal,
        cancel: &CancellationToken,
    ) -> Result<tokio_util::task::TaskTracker> {
        let tasks = tokio_util::task::TaskTracker::new();
        if let Some(address) = self.config.http {
            let server = http::Listener::bind(address).await?;
            tracing::info!(address = %server.address(), "serving /metrics, /status, /healthz and /readyz");
            let (telemetry, cancel) = (self.telemetry.clone(), cancel.clone());
            tasks.spawn(async move {
                if let Err(error) = server.serve(telemetry, cancel).await {
                    tracing::error!(%error, "the HTTP server ended");
                }
            });
        }
        tasks.spawn(sampler::run(self.source.clone(), self.config.name.slot(), self.telemetry.clone(), cancel.clone()));
        tasks.spawn(progress::show(self.telemetry.clone(), terminal.clone(), cancel.clone()));
        Ok(tasks)
    }

    async fn supervise(&self) -> Result<()> {
        self.enter().await?;
        let mut wait = FIRST_WAIT;
        let mut held = None;
        loop {
            let Some(mut leadership) = self.lead_on(held.take()).await? else { return Ok(()) };
            let epoch = leadership.epoch();
            let began = std::time::Instant::now();
            let walked = tokio::select! {
                walked = self.advance(epoch) => walked,
                lost = leadership.lost() => Err(lost),
            };
            // However it ended: whoever comes next begins with what is durable.
            self.spooling.close().await;
            let error = match walked {
                Ok(End::Stopped) => {
                    tracing::info!("stopped; `pgtandem run` goes on from here");
                    return Ok(());
                }
                Ok(End::Reached) => return Ok(()),
                Ok(End::Done) => {
                    tracing::info!("the move is done");
                    return Ok(());
                }
                Err(error) => error,
            };
            if self.stop.is_cancelled() {
                return Ok(());
            }
            let error = self.wait_for_the_schema(error);
            self.telemetry.error(&error);
            self.telemetry.standing_error(Some(&error));
            if !matches!(error.class(), Class::Retry | Class::Wait) {
                self.telemetry.phase(Phase::Failed);
                return Err(self.remember(error).await);
            }
            if began.elapsed() > LONGEST_WAIT {
                wait = FIRST_WAIT;
            }
            let hint = error.hint_text().map(|hint| format!(" ({hint})")).unwrap_or_default();
            tracing::warn!(code = error.code(), "{error}{hint}; trying again in {wait:?}");
            let error = if error.class() == Class::Wait { self.remember(error).await } else { error };
            if watching::is_schema_change(&error) {
                self.telemetry.phase(Phase::Paused);
            }
            // What waits for a person may wait for just that: a table that is to be copied again.
            let rest = async {
                if error.class() == Class::Wait {
                    self.listen_for_resync(wait, epoch).await;
                } else {
                    tokio::time::sleep(wait).await;
                }
            };
            if self.stop.run_until_cancelled(rest).await.is_none() {
                return Ok(());
            }
            wait = (wait * 2).min(LONGEST_WAIT);
            // Whoever waits for the next try still has the move: nobody is to clean it away meanwhile, nor be told that no
            // daemon runs.
            held = Some(leadership);
        }
    }

    /// Lets the time pass until the next try, or until somebody asked to copy tables again.
    async fn listen_for_resync(&self, wait: Duration, epoch: i64) {
        let until = std::time::Instant::now() + wait;
        loop {
            match self.take_resync(epoch).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::debug!(%error, "requests cannot be taken"),
            }
            let left = until.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(LOOK_FOR_REQUESTS_EVERY)).await;
        }
    }

    async fn take_resync(&self, epoch: i64) -> Result<bool> {
        let Some(request) = self.store.take_request_for(epoch, RequestKind::Resync).await? else { return Ok(false) };
        // Whoever asked takes an error in the state for one that came after.
        self.store.set_error(None).await?;
        steer::mark_for_copying(&self.store, epoch, &request).await?;
        Ok(true)
    }

    /// The lead for another try: that of the last one, if it still stands.
    async fn lead_on(&self, held: Option<Leadership>) -> Result<Option<Leadership>> {
        if let Some(mut leadership) = held {
            match leadership.renew(&self.store).await {
                Ok(()) => return Ok(Some(leadership)),
                Err(error) => tracing::debug!(%error, "the lead of the move is gone; taking it anew"),
            }
        }
        let leadership = self.lead().await?;
        // What stopped the daemon before is no reason any more; it is said again if it is still so.
        if leadership.is_some()
            && let Err(error) = self.store.set_error(None).await
        {
            tracing::debug!(%error, "the last error could not be taken out of the state");
        }
        Ok(leadership)
    }

    /// Under `follow.ddl = "replicate"` a schema change that is not carried is waited for: a person makes it on the target, or
    /// copies the table again, while the daemon looks again and again.
    fn wait_for_the_schema(&self, error: Error) -> Error {
        let waits = self.config.follow.ddl == Ddl::Replicate && watching::is_schema_change(&error);
        if waits { error.reclassed(Class::Wait) } else { error }
    }

    /// Keeps the error for `status`, if the target still takes it.
    async fn remember(&self, error: Error) -> Error {
        let kept = tokio::time::timeout(Duration::from_secs(5), self.store.set_error(Some(&error_json(&error)))).await;
        if !matches!(kept, Ok(Ok(()))) {
            tracing::warn!("the error could not be kept in the state");
        }
        error
    }

    /// Makes sure that the state is there: of a move that began before, or of one that may begin.
    async fn enter(&self) -> Result<()> {
        let found = self.store.find().await?;
        if found.as_ref().is_some_and(|record| record.phase == Phase::Done) {
            // The source may be switched off by now.
            return Ok(());
        }
        let source = self.source.connect("control").await?;
        let identity = preflight::identity(&source).await?;
        match found.filter(|record| record.phase != Phase::Preflight) {
            Some(record) => {
                self.same_source(&record, &identity)?;
                tracing::info!(name = %self.config.name, phase = %record.phase, "going on with the move");
            }
            None => {
                self.telemetry.phase(Phase::Preflight);
                preflight::require(self.config, &self.source, &self.target).await?;
            }
        }
        // Also for a move that began before: a newer version may keep more.
        self.store.install(&identity).await
    }

    /// A source that was replaced has another history; following it would mix two.
    fn same_source(&self, record: &MoveRecord, identity: &serde_json::Value) -> Result<()> {
        if preflight::same_server(&record.source_identity, identity) != Some(false) {
            return Ok(());
        }
        Err(Error::new(
            Class::Operator,
            "source_changed",
            format!(
                "the source is not the database that the move {} began with (it was {}, it is {identity})",
                self.config.name, record.source_identity
            ),
        )
        .hint("correct source.url, or run `pgtandem clean`, empty the target and begin the move again"))
    }

    /// Waits until no other daemon holds the move; `None` if told to stop.
    async fn lead(&self) -> Result<Option<Leadership>> {
        let mut waiting = false;
        loop {
            match self.store.try_lead().await {
                Ok(Some(leadership)) => return Ok(Some(leadership)),
                Ok(None) if !self.options.standby => {
                    return Err(Error::new(Class::Held, "held", "another daemon holds this move")
                        .hint("stop it, or leave --no-standby out to wait until it ends"));
                }
                Ok(None) => {
                    if !std::mem::replace(&mut waiting, true) {
                        tracing::info!("another daemon holds this move; waiting as a standby");
                    }
                }
                Err(error) if matches!(error.class(), Class::Retry | Class::Wait) => {
                    self.telemetry.error(&error);
                    tracing::warn!(code = error.code(), "{error}");
                }
                Err(error) => return Err(error),
            }
            if self.stop.run_until_cancelled(tokio::time::sleep(STANDBY_EVERY)).await.is_none() {
                return Ok(None);
            }
        }
    }

    /// Walks the phases from where the move stands to its end.
    async fn advance(&self, epoch: i64) -> Result<End> {
        if let Some(recorded) = Recorded::load(&self.store).await? {
            self.telemetry.resumed(&recorded);
        }
        // What a cutover of this very process left is undone here.
        let recovered = cutover::recover(self.config, &self.source, &self.target, &self.store, epoch).await?;
        self.gate.open();
        let mut walk = Walk::new(self, epoch);
        if recovered == Recovered::Finished {
            walk.finish().await?;
            return Ok(End::Done);
        }
        if recovered == Recovered::Undone {
            self.enter_phase(Phase::Follow).await?;
        }
        loop {
            let record = self.record().await?;
            let end = match record.phase {
                Phase::Preflight => {
                    self.store.begin(&record.source_identity).await?;
                    self.telemetry.phase(Phase::Schema);
                    None
                }
                Phase::Schema => walk.schema().await?,
                Phase::Copy => walk.copy().await?,
                Phase::Catchup => walk.catch_up().await?,
                Phase::Follow | Phase::Cutover | Phase::Paused | Phase::Failed => walk.follow().await?,
                Phase::Done => Some(End::Done),
            };
            match end {
                Some(end) => return Ok(end),
                None if self.stop.is_cancelled() => return Ok(End::Stopped),
                None => {}
            }
        }
    }

    async fn record(&self) -> Result<MoveRecord> {
        self.store.find().await?.ok_or_else(|| {
            Error::new(Class::Operator, "state_gone", "the state of the move vanished from the target")
                .hint("someone ran `pgtandem clean` or dropped the schema pgtandem; begin the move again")
        })
    }

    /// Work that takes long and minds being broken off no more than a death; `None` if told to stop meanwhile.
    async fn unless_stopped<T>(&self, work: impl Future<Output = Result<T>>) -> Result<Option<T>> {
        self.stop.run_until_cancelled(work).await.transpose()
    }

    async fn enter_phase(&self, phase: Phase) -> Result<()> {
        self.store.set_phase(phase).await?;
        self.telemetry.phase(phase);
        self.telemetry.standing_error(None);
        Ok(())
    }
}

/// Drops a slot once nobody streams from it.
///
/// # Errors
/// It stays in use, or the connection's.
pub async fn drop_slot(source: &Server, slot: &str) -> Result<()> {
    let session = source.connect("slot").await?;
    for attempt in 0..50 {
        let dropped = session
            .execute(
                "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots
                 WHERE slot_name = $1",
                &[&slot],
            )
            .await;
        match dropped.map_err(Error::from) {
            Ok(_) => return Ok(()),
            Err(error) if error.code() == "object_in_use" && attempt < 49 => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(error) => return Err(error.doing(format!("dropping the slot {slot}"))),
        }
    }
    Ok(())
}
