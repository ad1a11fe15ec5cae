//! The switch: from "the source is written to" to "the target is".
//!
//! Owns the steps, the fence, the journal of them, and what is undone when one fails. Promises: the fence has a deadline
//! and always lifts; nothing is switched before the target was proven complete; after a death at any point, [`recover`]
//! finds out from the journal and the fence itself whether to undo or to finish.
//!
//! # Steps
//!
//! | step | what happens | writes |
//! |---|---|---|
//! | `ready` | lag below `cutover.max_lag`, nothing blocks | flow |
//! | `prepare` | triggers for the fence, one table at a time | flow |
//! | `fence` | locks on every table: [`fence`] | wait |
//! | `drain` | the marker arrived on the target: [`marker`] | wait |
//! | `sequences` | read and set: [`sequences`] | wait |
//! | `watch` | no table without a replica identity differs: [`unkeyed`] | wait |
//! | `verify` | `cutover.verify` | wait |
//! | `release` | foreign keys, triggers and rules of the target on | wait |
//! | `seal` | the source refuses writes for good | refused |
//! | `switch` | `cutover.hook` | refused, then on the target |
//!
//! # A death at any point
//!
//! - Before `seal`: the fence is a lock of a connection that died; writers go on. The journal says `preparing`, so the
//!   next start disables the triggers on the target again and follows on.
//! - The journal says `switching` before the seal is tried. If the seal did not take hold, the next start sees an open
//!   fence: nobody was let in, and it undoes as above. If it did, nobody can have written to the source since, and the hook
//!   may have run: it finishes the switch, and runs the hook again.
//! - A hook that fails means that nobody was let in. The journal goes back to `preparing` before the fence lifts.

pub mod fence;
mod hook;
mod marker;
mod sequences;

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, CutoverVerify, Fence as FenceKind};
use crate::error::{Class, Doing, Error, Result};
use crate::follow::{Durable, MarkerWatch, unkeyed};
use crate::postgres::{QualifiedName, Server, catalog};
use crate::schema::ForeignKeys;
use crate::state::{CutoverState, StepRecord, Store};
use crate::telemetry::Telemetry;
use crate::verify::{self, Depth};

/// How long undoing is tried before the error is handed up.
const UNDO_PATIENCE: Duration = Duration::from_secs(30);
/// A step that waits for something gives up so much before the deadline, to say itself what it waited for.
const OWN_WORDS: Duration = Duration::from_millis(300);

/// Everything a cutover needs. Following goes on beside it.
pub struct Cutover<'a> {
    /// The move's configuration.
    pub config: &'a Config,
    /// Where the application writes.
    pub source: &'a Server,
    /// Where it will write.
    pub target: &'a Server,
    /// The state of the move.
    pub store: &'a Store,
    /// What the target holds, from following.
    pub durable: watch::Receiver<Durable>,
    /// Where following looks for the marker.
    pub marker: &'a MarkerWatch,
    /// Takes reports, and tells whether the move is ready.
    pub telemetry: &'a Telemetry,
    /// Foreign keys that could not be restored before, because they would fire while following.
    pub foreign_keys: Option<&'a ForeignKeys>,
    /// Gives the cutover up, as long as it is not decided.
    pub cancel: CancellationToken,
}

/// A cutover that happened.
#[derive(Clone, Copy, Debug)]
pub struct Switched {
    /// From the first write that may have waited on the source to the end of the hook.
    pub write_pause: Duration,
}

impl Cutover<'_> {
    /// Switches over within `timeout`, counted from here.
    ///
    /// # Errors
    /// Class no: it did not happen, writes on the source are on and following goes on. Any other class: it could not
    /// even be undone yet; [`recover`] must be called until it succeeds.
    pub async fn run(&self, request: Option<i64>, timeout: Duration) -> Result<Switched> {
        let deadline = Instant::now() + timeout;
        let id = self.store.begin_cutover(request).await?;
        self.telemetry.cutover(None);
        let cancel = self.cancel.clone();
        let mut journal = Journal { store: self.store, telemetry: self.telemetry, id, ordinal: 0, cancel };
        match self.steps(&mut journal, deadline, timeout).await {
            Ok(switched) => {
                let seconds = switched.write_pause.as_secs_f64();
                self.store.set_cutover(id, CutoverState::Done, Some(seconds), None).await?;
                self.telemetry.write_pause(switched.write_pause);
                self.telemetry.cutover(Some(CutoverState::Done.as_str()));
                Ok(switched)
            }
            Err(error) => {
                tracing::warn!(%error, "the cutover did not happen; undoing it");
                self.undo(id, &error).await?;
                Err(error.reclassed(Class::No))
            }
        }
    }

    async fn steps(&self, journal: &mut Journal<'_>, deadline: Instant, timeout: Duration) -> Result<Switched> {
        let name = self.config.name.as_str();
        let names = fence::Names::of(name);
        journal.step("ready", deadline, self.ready(deadline)).await?;
        let moved = self.moved().await?;
        let tables = fence::tables(self.source, &moved).await?;
        let locking = self.config.cutover.fence == FenceKind::Lock;
        let closed = if locking {
            let patience = deadline.checked_sub(OWN_WORDS).unwrap_or(deadline);
            journal.step("prepare", deadline, fence::prepare(self.source, &names, &tables, patience)).await?;
            Some(journal.step("fence", deadline, fence::close(self.source, &tables, patience)).await?)
        } else {
            journal.skip("fence", "cutover.fence = \"none\": you have stopped the writes").await?;
            None
        };
        let began = closed.as_ref().map_or_else(Instant::now, |fence| fence.closed_at);
        let fenced = self.behind_the_fence(journal, deadline).await;
        if let Err(error) = fenced {
            if let Some(closed) = closed {
                closed.open().await;
            }
            return Err(error);
        }
        // The decision. From here on `recover` asks the fence itself what became of it.
        self.store.set_cutover(journal.id, CutoverState::Switching, None, None).await?;
        journal.cancel = CancellationToken::new();
        match closed {
            Some(closed) => journal.step("seal", deadline, self.seal(closed, &names)).await?,
            None => journal.skip("seal", "cutover.fence = \"none\"").await?,
        }
        if self.config.cutover.hook.is_empty() {
            journal.skip("switch", "no cutover.hook: point the application to the target now").await?;
        } else {
            journal.step("switch", deadline, hook::run(self.config, deadline)).await?;
        }
        tracing::info!(timeout = ?timeout, "the target takes writes");
        Ok(Switched { write_pause: began.elapsed() })
    }

    /// What happens while writers wait.
    async fn behind_the_fence(&self, journal: &mut Journal<'_>, deadline: Instant) -> Result<()> {
        journal.step("drain", deadline, self.drain(deadline)).await?;
        let everything = self.config.scope.include.is_empty() && self.config.scope.exclude.is_empty();
        journal.step("sequences", deadline, sequences::carry(self.source, self.target, everything)).await?;
        journal.step("watch", deadline, unkeyed::prove(self.source, self.target, self.store)).await?;
        match self.config.cutover.verify {
            CutoverVerify::Off => journal.skip("verify", "cutover.verify = \"off\"").await?,
            CutoverVerify::Counts => journal.step("verify", deadline, self.verify(Depth::Counts)).await?,
            CutoverVerify::Full => journal.step("verify", deadline, self.verify(Depth::Full)).await?,
        }
        journal.step("release", deadline, self.release()).await?;
        if self.config.cutover.reverse {
            journal.skip("reverse", "this version arms no way back").await?;
        }
        Ok(())
    }

    /// Checks without changing anything, and measures how long a marker takes.
    ///
    /// # Errors
    /// Class no: it would not happen now.
    pub async fn rehearse(&self, timeout: Duration) -> Result<Duration> {
        let deadline = Instant::now() + timeout;
        self.ready(deadline).await?;
        let began = Instant::now();
        self.drain(deadline).await?;
        Ok(began.elapsed())
    }

    async fn ready(&self, deadline: Instant) -> Result<()> {
        loop {
            let Err(reason) = self.telemetry.readiness() else { return Ok(()) };
            if Instant::now() + OWN_WORDS >= deadline {
                let message = format!("the move did not become ready for the cutover in time: {reason}");
                return Err(Error::new(Class::No, "not_ready", message)
                    .hint("`pgtandem status` says what blocks it, and how large the lag is"));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn moved(&self) -> Result<Vec<QualifiedName>> {
        Ok(self.store.tables().await?.into_iter().map(|table| table.name).collect())
    }

    async fn drain(&self, deadline: Instant) -> Result<()> {
        let id = marker::emit(self.source, self.marker).await?;
        let durable = marker::arrival(self.durable.clone(), id, deadline).await?;
        tracing::info!(progress = %durable.lsn, "the target holds everything up to the marker");
        Ok(())
    }

    async fn verify(&self, depth: Depth) -> Result<()> {
        let moved: std::collections::HashSet<QualifiedName> = self.moved().await?.into_iter().collect();
        let session = self.source.connect("verify").await?;
        let tables: Vec<_> = catalog::tables(&*session)
            .await?
            .into_iter()
            .filter(|table| moved.contains(&table.name))
            .map(|table| (table.name, table.columns.into_iter().map(|column| column.name).collect()))
            .collect();
        let differences = verify::compare(self.source, self.target, &tables, depth, self.config.copy.workers).await?;
        let Some(first) = differences.first() else { return Ok(()) };
        Err(Error::new(
            Class::No,
            "verify_differs",
            format!(
                "{} of {} tables differ; {} has {} rows on the source and {} on the target",
                differences.len(),
                tables.len(),
                first.table.plain(),
                first.source.rows,
                first.target.rows
            ),
        )
        .hint("find out who wrote to the target, or begin the move again"))
    }

    async fn release(&self) -> Result<()> {
        if let Some(foreign_keys) = self.foreign_keys {
            foreign_keys.add_at_cutover(self.target).await?;
        }
        self.store.release_held_back().await
    }

    /// If the answer to the seal is lost, the fence itself tells whether it stands.
    async fn seal(&self, closed: fence::Fence, names: &fence::Names) -> Result<()> {
        let Err(error) = closed.seal(names, self.config.name.as_str()).await else { return Ok(()) };
        if fence::is_sealed(self.source, self.config.name.as_str()).await? { Ok(()) } else { Err(error) }
    }

    /// Writes on the source come back, the target's triggers go off.
    async fn undo(&self, id: i64, cause: &Error) -> Result<()> {
        let began = Instant::now();
        loop {
            let undone = undo(self.config, self.source, self.store, id, cause).await;
            match undone {
                Ok(()) => {
                    self.telemetry.cutover(Some(CutoverState::Aborted.as_str()));
                    return Ok(());
                }
                Err(error) if began.elapsed() > UNDO_PATIENCE => return Err(error),
                Err(error) => {
                    tracing::error!(%error, "the cutover could not be undone yet; trying again");
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
        }
    }
}

async fn undo(config: &Config, source: &Server, store: &Store, id: i64, cause: &Error) -> Result<()> {
    let error = error_json(cause);
    // First the word, then the deed: a death in between must not leave a fence that looks like a decision.
    store.set_cutover(id, CutoverState::Preparing, None, Some(&error)).await?;
    if config.cutover.fence == FenceKind::Lock {
        fence::lift(source, config.name.as_str()).await?;
    }
    store.hold_back_again().await?;
    store.set_cutover(id, CutoverState::Aborted, None, Some(&error)).await
}

/// What a start found of an earlier cutover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovered {
    /// There was nothing unfinished.
    Nothing,
    /// It was undone; following goes on.
    Undone,
    /// It was finished: the application is on the target.
    Finished,
}

/// Undoes or finishes what an earlier daemon left in the middle. See the module's first lines.
///
/// # Errors
/// The connections'; class no if the hook failed, after which the cutover is undone.
pub async fn recover(config: &Config, source: &Server, store: &Store) -> Result<Recovered> {
    let Some(last) = store.last_cutover().await? else { return Ok(Recovered::Nothing) };
    let died = Error::new(Class::No, "daemon_ended", "the daemon ended in the middle of the cutover");
    let recovered = match last.state {
        CutoverState::Aborted => Recovered::Nothing,
        CutoverState::Done => Recovered::Finished,
        CutoverState::Preparing => Recovered::Undone,
        CutoverState::Switching if config.cutover.fence != FenceKind::Lock => Recovered::Finished,
        CutoverState::Switching if fence::is_sealed(source, config.name.as_str()).await? => Recovered::Finished,
        CutoverState::Switching => Recovered::Undone,
    };
    match recovered {
        Recovered::Undone => {
            undo(config, source, store, last.id, &died).await.doing(|| "undoing the cutover that was under way")?;
            store.fail_running_steps(last.id, "the daemon ended").await?;
            store.answer_running(false, &refusal(&died)).await?;
            tracing::warn!("a cutover was under way when the daemon ended; it was undone, writes on the source are on");
        }
        Recovered::Finished => {
            if last.state == CutoverState::Switching {
                tracing::warn!("a cutover was past its decision when the daemon ended; finishing it");
                let switched = hook::run(config, Instant::now() + config.cutover.timeout).await;
                if let Err(error) = switched {
                    undo(config, source, store, last.id, &error).await?;
                    store.fail_running_steps(last.id, "the daemon ended").await?;
                    store.answer_running(false, &refusal(&error)).await?;
                    return Ok(Recovered::Undone);
                }
            }
            // Also for a cutover that was done already: its daemon may have ended before it answered.
            let pause = store.finish_cutover(last.id).await?;
            store.answer_running(true, &serde_json::json!({"write_pause_seconds": pause})).await?;
        }
        Recovered::Nothing => {}
    }
    Ok(recovered)
}

/// The answer to a request that came to nothing.
#[must_use]
pub fn refusal(error: &Error) -> serde_json::Value {
    serde_json::json!({"error": error_json(error)})
}

/// An error as it stands in the state and in answers.
#[must_use]
pub fn error_json(error: &Error) -> serde_json::Value {
    serde_json::json!({
        "code": error.code(),
        "message": error.to_string(),
        "hint": error.hint_text(),
    })
}

/// Writes each step down before and after, for the log, the state and the metrics alike.
struct Journal<'a> {
    store: &'a Store,
    telemetry: &'a Telemetry,
    id: i64,
    ordinal: i32,
    /// Ends the step that is under way.
    cancel: CancellationToken,
}

impl Journal<'_> {
    async fn step<T>(&mut self, name: &str, deadline: Instant, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.ordinal += 1;
        let began = Instant::now();
        self.write(name, "running", None, None).await?;
        let outcome = tokio::select! {
            outcome = work => outcome,
            () = self.cancel.cancelled() => Err(Error::new(Class::No, "stopped", "the daemon was told to stop")),
            () = tokio::time::sleep_until(deadline.into()) => {
                Err(Error::new(Class::No, "cutover_timeout", "cutover.timeout ran out")
                    .hint("raise cutover.timeout, or find out what made this step slow"))
            }
        };
        let seconds = Some(began.elapsed().as_secs_f64());
        match outcome {
            Ok(value) => {
                self.write(name, "done", seconds, None).await?;
                Ok(value)
            }
            Err(error) => {
                let error = error.doing(format!("cutover step {name}"));
                // The step's own error counts more than one of the journal.
                if let Err(second) = self.write(name, "failed", seconds, Some(error.to_string())).await {
                    tracing::error!(error = %second, "the journal could not be written");
                }
                Err(error)
            }
        }
    }

    async fn skip(&mut self, name: &str, why: &str) -> Result<()> {
        self.ordinal += 1;
        self.write(name, "skipped", None, Some(why.to_owned())).await
    }

    async fn write(&self, name: &str, state: &str, seconds: Option<f64>, detail: Option<String>) -> Result<()> {
        self.telemetry.cutover_step(name, state, seconds);
        let step = StepRecord { name: name.to_owned(), state: state.to_owned(), seconds, detail };
        self.store.journal_step(self.id, self.ordinal, &step).await
    }
}
