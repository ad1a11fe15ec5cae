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
//! | `carry` | what the stream does not carry, as near as it gets: [`leftover`](crate::leftover) | flow |
//! | `refresh` | the materialized views of the target | flow |
//! | `connect` | ready still, `rest` fits into the time; every connection that is needed behind the fence | flow |
//! | `estimate` | whether `cutover.verify` fits into the time | flow |
//! | `prepare` | triggers for the fence, one table at a time | flow |
//! | `fence` | locks on every table: [`fence`] | wait |
//! | `drain` | the marker arrived on the target: [`marker`] | wait |
//! | `tables` | no table came since `connect`: [`tables`] | wait |
//! | `sequences` | read and set: [`sequences`] | wait |
//! | `rest` | what the stream does not carry, exactly: [`leftover`](crate::leftover) | wait |
//! | `watch` | no table without a replica identity differs: [`unkeyed`](crate::follow::unkeyed) | wait |
//! | `verify` | `cutover.verify` | wait |
//! | `release` | foreign keys, triggers and rules of the target on | wait |
//! | `decide` | the journal says `switching` | wait |
//! | `seal` | no table came, asked again; the source refuses writes for good | refused |
//! | `switch` | `cutover.hook` | refused, then on the target |
//!
//! `carry` and `refresh` take as long as they take: they may move gigabytes, and nobody waits for them. So the timeout
//! counts for `ready` alone at first, and anew from `connect` on, where it bounds all that writers could notice.
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

mod ahead;
pub mod fence;
mod hook;
mod journal;
mod marker;
mod recovery;
mod sequences;
mod tables;

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use recovery::{Recovered, error_json, recover, refusal};

use crate::config::{Config, Fence as FenceKind};
use crate::error::{Class, Error, Result};
use crate::follow::{Durable, Gate, MarkerWatch};
use crate::postgres::Server;
use crate::state::{CutoverState, Phase, Store};
use crate::telemetry::Telemetry;
use ahead::Ahead;
use journal::Journal;
use recovery::persistently;

/// A step that waits for something, the hook too, gives up so much before the deadline, to say itself what it waited for.
const OWN_WORDS: Duration = Duration::from_millis(300);
/// How long the release waits for a lock on the target while writers wait on the source.
const RELEASE_LOCKS: Duration = Duration::from_millis(1500);
/// How long the last words of the journal may take.
const JOURNAL_PATIENCE: Duration = Duration::from_secs(5);

/// Steps for which nobody waits: they take as long as they take.
pub const UNHURRIED_STEPS: [&str; 2] = ["carry", "refresh"];
/// Their limit.
const UNHURRIED: Duration = Duration::from_secs(365 * 24 * 3600);

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
    /// Switches over. `timeout` is how long it waits to be ready, and then, once what can be carried before was carried,
    /// counts for all the rest.
    ///
    /// # Errors
    /// Class no: it did not happen, writes on the source are on and following goes on. Any other class: what it left must
    /// be undone or finished by [`recover`], which is to be called until it succeeds.
    pub async fn run(&self, request: Option<i64>, timeout: Duration) -> Result<Switched> {
        let id = self.store.begin_cutover(request, self.epoch).await?;
        self.telemetry.cutover(None);
        let (mut journal, writer) = Journal::begin(self, id);
        let outcome = self.steps(&mut journal, timeout).await;
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

    async fn steps(&self, journal: &mut Journal, timeout: Duration) -> Result<Switched> {
        let name = self.config.name.as_str();
        let names = fence::Names::of(name);
        let deadline = Instant::now() + timeout;
        journal.step("ready", deadline, self.ready(deadline)).await?;
        let left = self.carry_ahead(journal).await?;
        // From here on the time counts that writers could notice.
        let deadline = Instant::now() + timeout;
        let patience = deadline.checked_sub(OWN_WORDS).unwrap_or(deadline);
        let ahead = journal.step("connect", deadline, self.connect_ahead(journal.id, left, deadline)).await?;
        // Not before: readiness is a matter of following.
        self.telemetry.phase(Phase::Cutover);
        if let Some(comparison) = &ahead.comparison {
            journal.step("estimate", deadline, self.estimate(comparison, deadline)).await?;
        }
        let closed = if self.config.cutover.fence == FenceKind::Lock {
            let prepared = async {
                let session = self.source.connect("fence").await?;
                let tables = tables::to_fence(&session, &ahead.listed).await?;
                let tables: Vec<_> = tables.into_iter().map(|(name, _)| name).collect();
                fence::prepare(self.source, &names, &tables, patience).await.map(|()| tables)
            };
            let tables = journal.step("prepare", deadline, prepared).await?;
            Some(
                journal
                    .step("fence", deadline, fence::close(self.source, &tables, ahead.lock_objects, patience))
                    .await?,
            )
        } else {
            journal.skip("fence", "cutover.fence = \"none\": you have stopped the writes");
            None
        };
        let began = closed.as_ref().map_or_else(Instant::now, |fence| fence.closed_at);
        let (id, release, addresses) = (journal.id, ahead.release.clone(), ahead.addresses.clone());
        let listed = ahead.listed.clone();
        let fenced = self.behind_the_fence(journal, ahead, closed.as_ref(), deadline).await;
        if let Err(error) = fenced {
            if let Some(closed) = closed {
                closed.open().await;
            }
            return Err(error);
        }
        match closed {
            Some(closed) => {
                let sealed = async {
                    closed.covers_all(&names, &self.config.scope, &listed).await?;
                    closed.seal(&names, name, id).await
                };
                journal.step("seal", deadline, sealed).await?;
            }
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
    async fn behind_the_fence(
        &self,
        journal: &mut Journal,
        mut ahead: Ahead,
        closed: Option<&fence::Fence>,
        deadline: Instant,
    ) -> Result<()> {
        journal.step("drain", deadline, self.drain(&mut ahead.marker, deadline)).await?;
        journal.step("tables", deadline, self.nothing_came(&ahead, closed)).await?;
        journal.step("sequences", deadline, ahead.sequences.carry()).await?;
        let rest = ahead.rest;
        if rest.is_nothing() {
            journal.skip("rest", "the stream carries everything");
        } else {
            let context = self.leftover(journal.id);
            let carried = async { Ok(((), Some(rest.carry(&context, deadline).await?.to_string()))) };
            journal.step_told("rest", deadline, carried).await?;
        }
        self.watch(journal, deadline).await?;
        match ahead.comparison {
            Some(comparison) => journal.step("verify", deadline, self.verify(comparison)).await?,
            None => journal.skip("verify", "cutover.verify = \"off\""),
        }
        // What follows from here on must not be applied by the same rules.
        self.gate.close();
        let id = journal.id;
        let released = async {
            self.gate.holds().await;
            self.hold_back_as_on_the_source([&ahead.marker, &ahead.catalog], &ahead.release, id).await?;
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

    /// Writes on the source come back, the target's triggers go off, following goes on.
    async fn undo(&self, id: i64, cause: &Error) -> Result<()> {
        persistently("undone", async || {
            recovery::undo(self.config, self.source, self.store, id, self.epoch, cause).await
        })
        .await?;
        self.gate.open();
        self.telemetry.cutover(Some(CutoverState::Aborted.as_str()));
        Ok(())
    }
}
