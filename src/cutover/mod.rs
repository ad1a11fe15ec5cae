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
//! | `connect` | every connection that is needed behind the fence | flow |
//! | `estimate` | whether `cutover.verify` fits into the time | flow |
//! | `prepare` | triggers for the fence, one table at a time | flow |
//! | `fence` | locks on every table: [`fence`] | wait |
//! | `drain` | the marker arrived on the target: [`marker`] | wait |
//! | `sequences` | read and set: [`sequences`] | wait |
//! | `watch` | no table without a replica identity differs: [`unkeyed`] | wait |
//! | `verify` | `cutover.verify` | wait |
//! | `release` | foreign keys, triggers and rules of the target on | wait |
//! | `decide` | the journal says `switching` | wait |
//! | `seal` | the source refuses writes for good | refused |
//! | `switch` | `cutover.hook` | refused, then on the target |
//!
//! # While writers wait
//!
//! Nothing may make them wait longer than the timeout says: not a target that hangs, not a lock on it, not the journal.
//! So every connection is made before the fence closes; the journal is written by a task of its own; what runs on the
//! target has its own limits there; and when a step fails, the fence opens before anything else is done.
//! If all of us vanish without a word, the server ends the fence's session a little after the timeout.
//!
//! # A death at any point
//!
//! - Before `seal`: the fence is a lock of a connection that died; writers go on. The journal says `preparing`, so the
//!   next start disables the triggers on the target again and follows on.
//! - The journal says `switching` before the seal is tried. If the seal did not take hold, the next start sees an open
//!   fence: nobody was let in, and it undoes as above. If it did, nobody can have written to the source since, and the hook
//!   may have run: it finishes the switch, and runs the hook again.
//! - A seal or a hook that fails means that nobody was let in. The fence is lifted first, whatever state the target is in;
//!   a death after that is again an open fence.
//! - Once the hook has said that the application was let in, nothing is undone any more. What is left to write down is
//!   written down, by the next start if need be.

pub mod fence;
mod hook;
mod marker;
mod sequences;

use std::collections::HashSet;
use std::future::Future;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, CutoverVerify, Fence as FenceKind};
use crate::error::{Class, Doing, Error, Result};
use crate::follow::{Durable, Gate, MarkerWatch, unkeyed};
use crate::postgres::{QualifiedName, Server, Session, catalog, quote_identifier};
use crate::state::{CutoverRecord, CutoverState, Phase, StepRecord, Store};
use crate::telemetry::Telemetry;
use crate::verify::{Comparison, Depth};
use sequences::Sequences;

/// A step that waits for something, the hook too, gives up so much before the deadline, to say itself what it waited for.
const OWN_WORDS: Duration = Duration::from_millis(300);
/// How long the release waits for a lock on the target while writers wait on the source.
const RELEASE_LOCKS: Duration = Duration::from_millis(1500);
/// How long the last words of the journal may take.
const JOURNAL_PATIENCE: Duration = Duration::from_secs(5);
/// How long undoing, or writing down the end, is tried before the error is handed up, and how long each time.
const UNDO_PATIENCE: Duration = Duration::from_secs(30);
const ATTEMPT: Duration = Duration::from_secs(10);

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
    /// Of the daemon that runs.
    pub epoch: i64,
    /// What the target holds, from following.
    pub durable: watch::Receiver<Durable>,
    /// Where following looks for the marker.
    pub marker: &'a MarkerWatch,
    /// Keeps following from applying to a target whose triggers are on.
    pub gate: &'a Gate,
    /// Takes reports, and tells whether the move is ready.
    pub telemetry: &'a Telemetry,
    /// Gives the cutover up, as long as it is not decided: the daemon stops, or following ended.
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
    /// Class no: it did not happen, writes on the source are on and following goes on. Any other class: what it left must
    /// be undone or finished by [`recover`], which is to be called until it succeeds.
    pub async fn run(&self, request: Option<i64>, timeout: Duration) -> Result<Switched> {
        let deadline = Instant::now() + timeout;
        let id = self.store.begin_cutover(request, self.epoch).await?;
        self.telemetry.cutover(None);
        let (mut journal, writer) = Journal::begin(self, id);
        let outcome = self.steps(&mut journal, deadline).await;
        drop(journal);
        // Before the journal's last words: a death from here on must not run the hook again.
        let concluded = match &outcome {
            Ok(switched) => self.conclude(id, switched.write_pause).await,
            Err(error) => {
                tracing::warn!(%error, "the cutover did not happen; undoing it");
                self.undo(id, error).await
            }
        };
        if tokio::time::timeout(JOURNAL_PATIENCE, writer).await.is_err() {
            tracing::warn!("the journal of the cutover could not be written to its end");
        }
        concluded?;
        outcome.map_err(|error| error.reclassed(Class::No))
    }

    /// Writes down that the application is on the target. It is tried for a while, for what would try it next is the next
    /// walk, which knows only what is written.
    async fn conclude(&self, id: i64, write_pause: Duration) -> Result<()> {
        self.telemetry.write_pause(write_pause);
        self.telemetry.cutover(Some(CutoverState::Done.as_str()));
        let seconds = write_pause.as_secs_f64();
        persistently("written down as done", async || self.store.conclude_cutover(id, self.epoch, seconds).await).await
    }

    async fn steps(&self, journal: &mut Journal, deadline: Instant) -> Result<Switched> {
        let name = self.config.name.as_str();
        let names = fence::Names::of(name);
        let patience = deadline.checked_sub(OWN_WORDS).unwrap_or(deadline);
        journal.step("ready", deadline, self.ready(deadline)).await?;
        // Not before: readiness is a matter of following.
        self.telemetry.phase(Phase::Cutover);
        let ahead = journal.step("connect", deadline, self.connect_ahead()).await?;
        if let Some(comparison) = &ahead.comparison {
            journal.step("estimate", deadline, self.estimate(comparison, deadline)).await?;
        }
        let closed = if self.config.cutover.fence == FenceKind::Lock {
            let prepared = async {
                let tables = fence::tables(self.source, &ahead.moved).await?;
                fence::prepare(self.source, &names, &tables, patience).await.map(|()| tables)
            };
            let tables = journal.step("prepare", deadline, prepared).await?;
            Some(journal.step("fence", deadline, fence::close(self.source, &tables, patience)).await?)
        } else {
            journal.skip("fence", "cutover.fence = \"none\": you have stopped the writes");
            None
        };
        let began = closed.as_ref().map_or_else(Instant::now, |fence| fence.closed_at);
        let (id, release, addresses) = (journal.id, ahead.release.clone(), ahead.addresses.clone());
        let fenced = self.behind_the_fence(journal, ahead, deadline).await;
        if let Err(error) = fenced {
            if let Some(closed) = closed {
                closed.open().await;
            }
            return Err(error);
        }
        match closed {
            Some(closed) => journal.step("seal", deadline, closed.seal(&names, name, id)).await?,
            None => journal.skip("seal", "cutover.fence = \"none\""),
        }
        if self.config.cutover.hook.is_empty() {
            journal.skip("switch", "no cutover.hook: point the application to the target now");
        } else {
            let switched = async {
                // A daemon that was frozen may have been succeeded meanwhile, by one that undid all this.
                release.confirm_cutover(id, self.epoch).await?;
                hook::run(self.config, &addresses, patience).await
            };
            journal.step("switch", deadline, switched).await?;
        }
        tracing::info!("the target takes writes");
        Ok(Switched { write_pause: began.elapsed() })
    }

    /// What happens while writers wait.
    async fn behind_the_fence(&self, journal: &mut Journal, mut ahead: Ahead, deadline: Instant) -> Result<()> {
        journal.step("drain", deadline, self.drain(&mut ahead.marker, deadline)).await?;
        journal.step("sequences", deadline, ahead.sequences.carry()).await?;
        journal.step("watch", deadline, unkeyed::prove(self.source, self.target, self.store)).await?;
        match ahead.comparison {
            Some(comparison) => journal.step("verify", deadline, self.verify(comparison)).await?,
            None => journal.skip("verify", "cutover.verify = \"off\""),
        }
        // What follows from here on must not be applied by the same rules.
        self.gate.close();
        let id = journal.id;
        let released = async {
            self.gate.holds().await;
            ahead.release.release_in_cutover(id, self.epoch, RELEASE_LOCKS, deadline).await
        };
        journal.step("release", deadline, released).await?;
        if self.config.cutover.reverse {
            journal.skip("reverse", "this version arms no way back");
        }
        // From here on `recover` asks the fence itself what became of the decision.
        journal.step("decide", deadline, ahead.release.decide_cutover(id, self.epoch)).await?;
        journal.cancel = CancellationToken::new();
        Ok(())
    }

    /// Checks without changing anything, and measures how long a marker takes.
    ///
    /// # Errors
    /// Class no: it would not happen now.
    pub async fn rehearse(&self, timeout: Duration) -> Result<Duration> {
        let deadline = Instant::now() + timeout;
        self.ready(deadline).await?;
        let mut session = self.source.connect("marker").await?;
        let began = Instant::now();
        self.drain(&mut session, deadline).await?;
        Ok(began.elapsed())
    }

    async fn ready(&self, deadline: Instant) -> Result<()> {
        if self.config.cutover.fence == FenceKind::Lock {
            self.no_apply_workers().await?;
        }
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

    /// The worker of a subscription writes without firing statement triggers: the seal would not hold it.
    async fn no_apply_workers(&self) -> Result<()> {
        let session = self.source.connect("fence").await?;
        let rows = session
            .query(
                "SELECT subname::text FROM pg_catalog.pg_subscription WHERE subenabled AND subdbid =
                     (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())",
                &[],
            )
            .await
            .doing(|| "looking for subscriptions of the source")?;
        let Some(row) = rows.first() else { return Ok(()) };
        let name: String = row.try_get(0)?;
        Err(Error::new(Class::No, "source_is_subscriber", format!("the subscription {name} writes into the source"))
            .hint(format!("ALTER SUBSCRIPTION {} DISABLE, then cut over", quote_identifier(&name))))
    }

    /// Everything that can be had before writers wait.
    async fn connect_ahead(&self) -> Result<Ahead> {
        let moved: Vec<QualifiedName> = self.store.tables().await?.into_iter().map(|table| table.name).collect();
        let comparison = match self.config.cutover.verify {
            CutoverVerify::Off => None,
            CutoverVerify::Counts => Some(self.comparison(&moved, Depth::Counts).await?),
            CutoverVerify::Full => Some(self.comparison(&moved, Depth::Full).await?),
        };
        let release = Store::new(self.target.clone(), self.config.name.clone());
        release.exists().await?;
        Ok(Ahead {
            marker: self.source.connect("marker").await?,
            sequences: Sequences::prepare(self.source, self.target, &self.config.scope).await?,
            comparison,
            release,
            moved,
            addresses: hook::Addresses::find(self.source, self.target).await,
        })
    }

    async fn comparison(&self, moved: &[QualifiedName], depth: Depth) -> Result<Comparison> {
        let moved: HashSet<&QualifiedName> = moved.iter().collect();
        let session = self.source.connect("verify").await?;
        let tables = catalog::tables(&*session)
            .await?
            .into_iter()
            .filter(|table| moved.contains(&table.name))
            .map(|table| (table.name, table.columns.into_iter().map(|column| column.name).collect()))
            .collect();
        Comparison::prepare(self.source, self.target, tables, depth, self.config.copy.workers).await
    }

    async fn drain(&self, session: &mut Session, deadline: Instant) -> Result<()> {
        let id = marker::emit(session, self.marker).await?;
        let durable = marker::arrival(self.durable.clone(), id, deadline).await?;
        tracing::info!(progress = %durable.lsn, "the target holds everything up to the marker");
        Ok(())
    }

    /// Reads the source once as the comparison will: one that cannot be done in a third of the time that is left is
    /// refused before anybody waits for it.
    async fn estimate(&self, comparison: &Comparison, deadline: Instant) -> Result<()> {
        let budget = deadline.saturating_duration_since(Instant::now()) / 3;
        match tokio::time::timeout(budget, comparison.rehearse()).await {
            Ok(done) => done,
            Err(_) => Err(Error::new(
                Class::No,
                "verify_too_slow",
                format!("cutover.verify = {:?} needs more than {budget:?} on the source alone", comparison.depth()),
            )
            .hint("raise cutover.timeout, or set cutover.verify = \"off\"")),
        }
    }

    async fn verify(&self, comparison: Comparison) -> Result<()> {
        let compared: Vec<QualifiedName> = comparison.tables().iter().map(|(table, _)| table.clone()).collect();
        let count = compared.len();
        let differences = comparison.run().await?;
        // An earlier comparison may have found a difference.
        for table in &compared {
            self.telemetry.compared(table, 0);
        }
        for difference in &differences {
            self.telemetry.compared(&difference.table, difference.rows());
        }
        let Some(first) = differences.first() else {
            self.telemetry.verified();
            return Ok(());
        };
        Err(Error::new(
            Class::No,
            "verify_differs",
            format!(
                "{} of {count} tables differ; {} has {} rows on the source and {} on the target",
                differences.len(),
                first.table.plain(),
                first.source.rows,
                first.target.rows
            ),
        )
        .hint("find out who wrote to the target, or begin the move again"))
    }

    /// Writes on the source come back, the target's triggers go off, following goes on.
    async fn undo(&self, id: i64, cause: &Error) -> Result<()> {
        persistently("undone", async || undo(self.config, self.source, self.store, id, self.epoch, cause).await)
            .await?;
        self.gate.open();
        self.telemetry.cutover(Some(CutoverState::Aborted.as_str()));
        Ok(())
    }
}

/// Tries again what fails, for [`UNDO_PATIENCE`]: a connection may be lost, a server may restart.
async fn persistently(what: &str, attempt: impl AsyncFn() -> Result<()>) -> Result<()> {
    let began = Instant::now();
    loop {
        let error = match tokio::time::timeout(ATTEMPT, attempt()).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => {
                Error::new(Class::Retry, "cutover_stuck", format!("the cutover could not be {what} within {ATTEMPT:?}"))
            }
        };
        if began.elapsed() > UNDO_PATIENCE || error.code() == "leadership_lost" {
            return Err(error);
        }
        tracing::error!(%error, "the cutover could not be {what} yet; trying again");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// What is ready before writers wait: connections, names, plans.
struct Ahead {
    moved: Vec<QualifiedName>,
    marker: Session,
    sequences: Sequences,
    comparison: Option<Comparison>,
    /// On a connection of its own: a lock that it waits for must not keep the journal waiting.
    release: Store,
    addresses: hook::Addresses,
}

async fn undo(config: &Config, source: &Server, store: &Store, id: i64, epoch: i64, cause: &Error) -> Result<()> {
    if config.cutover.fence == FenceKind::Lock {
        // The deed beside the word: an open fence means "undone" whatever the journal says, and the source must not wait
        // for the target to come back. Nor must a source that does not come back leave the word standing, for the next
        // start would find a seal and finish what was given up here.
        let (lifted, reconsidered) =
            tokio::join!(fence::lift(source, config.name.as_str(), id), store.reconsider_cutover(id, epoch));
        lifted?;
        if let Err(error) = reconsidered {
            tracing::debug!(%error, "the decision could not be taken back yet");
        }
    }
    store.abort_cutover(id, epoch, &error_json(cause)).await
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

/// Undoes or finishes what an earlier daemon left in the middle, and answers who asked it for something. See the module's
/// first lines.
///
/// # Errors
/// The connections'; class no if the hook failed, after which the cutover is undone.
pub async fn recover(
    config: &Config,
    source: &Server,
    target: &Server,
    store: &Store,
    epoch: i64,
) -> Result<Recovered> {
    let died = Error::new(Class::No, "daemon_ended", "the daemon ended before it answered");
    let recovered = match store.last_cutover().await? {
        Some(last) => recover_from(config, source, target, store, epoch, &last).await?,
        None => Recovered::Nothing,
    };
    if recovered != Recovered::Finished {
        store.answer_running(false, &refusal(&died)).await?;
    }
    Ok(recovered)
}

async fn recover_from(
    config: &Config,
    source: &Server,
    target: &Server,
    store: &Store,
    epoch: i64,
    last: &CutoverRecord,
) -> Result<Recovered> {
    let died = Error::new(Class::No, "daemon_ended", "the daemon ended in the middle of the cutover");
    let undone_for = async |error: &Error| {
        undo(config, source, store, last.id, epoch, error).await.doing(|| "undoing the cutover that was under way")?;
        store.fail_running_steps(last.id, "the daemon ended").await?;
        store.answer_running(false, &refusal(error)).await?;
        tracing::warn!("a cutover was under way when the daemon ended; it was undone, writes on the source are on");
        Ok(Recovered::Undone)
    };
    match last.state {
        CutoverState::Aborted => return Ok(Recovered::Nothing),
        CutoverState::Done => {}
        CutoverState::Preparing => return undone_for(&died).await,
        CutoverState::Switching => {
            let stands =
                config.cutover.fence != FenceKind::Lock || fence::is_sealed(source, config.name.as_str()).await?;
            if !stands {
                return undone_for(&died).await;
            }
            tracing::warn!("a cutover was past its decision when the daemon ended; finishing it");
            // A hook that said yes is believed.
            if !last.steps.iter().any(|step| step.name == "switch" && step.state == "done") {
                let addresses = hook::Addresses::find(source, target).await;
                let deadline = Instant::now() + config.cutover.timeout;
                if let Err(error) = hook::run(config, &addresses, deadline).await {
                    return undone_for(&error).await;
                }
            }
        }
    }
    // Also for a cutover that was done already: its daemon may have ended before it answered.
    let pause = store.finish_cutover(last.id).await?;
    store.answer_running(true, &serde_json::json!({"write_pause_seconds": pause})).await?;
    Ok(Recovered::Finished)
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

/// Tells each step to the log and the metrics as it happens, and to a task that writes it to the state.
struct Journal {
    telemetry: Telemetry,
    id: i64,
    ordinal: i32,
    writer: mpsc::UnboundedSender<(i32, StepRecord)>,
    /// Ends the step that is under way.
    cancel: CancellationToken,
}

impl Journal {
    fn begin(cutover: &Cutover<'_>, id: i64) -> (Self, JoinHandle<()>) {
        let (writer, mut steps) = mpsc::unbounded_channel::<(i32, StepRecord)>();
        let store = Store::new(cutover.target.clone(), cutover.config.name.clone());
        let task = tokio::spawn(async move {
            while let Some((ordinal, step)) = steps.recv().await {
                if let Err(error) = store.journal_step(id, ordinal, &step).await {
                    tracing::warn!(%error, step = step.name, "a step could not be written to the journal");
                }
            }
        });
        let (telemetry, cancel) = (cutover.telemetry.clone(), cutover.cancel.clone());
        (Self { telemetry, id, ordinal: 0, writer, cancel }, task)
    }

    async fn step<T>(&mut self, name: &str, deadline: Instant, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.ordinal += 1;
        let began = Instant::now();
        self.write(name, "running", None, None);
        let outcome = tokio::select! {
            outcome = work => outcome,
            () = self.cancel.cancelled() => {
                Err(Error::new(Class::No, "given_up", "the daemon was told to stop, or following ended")
                    .hint("ask again once `pgtandem status` says that the target follows"))
            }
            () = tokio::time::sleep_until(deadline.into()) => {
                Err(Error::new(Class::No, "cutover_timeout", "cutover.timeout ran out")
                    .hint("raise cutover.timeout, or find out what made this step slow"))
            }
        };
        let seconds = Some(began.elapsed().as_secs_f64());
        match outcome {
            Ok(value) => {
                self.write(name, "done", seconds, None);
                Ok(value)
            }
            Err(error) => {
                let error = error.doing(format!("cutover step {name}"));
                self.write(name, "failed", seconds, Some(error.to_string()));
                Err(error)
            }
        }
    }

    fn skip(&mut self, name: &str, why: &str) {
        self.ordinal += 1;
        self.write(name, "skipped", None, Some(why.to_owned()));
    }

    fn write(&self, name: &str, state: &str, seconds: Option<f64>, detail: Option<String>) {
        self.telemetry.cutover_step(name, state, seconds);
        let step = StepRecord { name: name.to_owned(), state: state.to_owned(), seconds, detail };
        if self.writer.send((self.ordinal, step)).is_err() {
            tracing::debug!("nobody writes the journal any more");
        }
    }
}
