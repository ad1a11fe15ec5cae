//! Following the source: stream → transaction → batch → apply.
//!
//! Owns the stream from the slot and the connection that applies. Promises: every change is applied exactly once and
//! in the order of commit, progress and data commit together, and nothing is confirmed to the source before that. Must
//! never go on past something that it does not understand.
//!
//! [`subscription`] is the other engine: the target server's own worker follows, and we watch it.
//!
//! [`spool`] keeps what comes while nothing can be applied; [`inflow`] is it and the stream in one.
//!
//! [`run`] is two tasks with a queue between them, the reader ([`reader`]) and the applier ([`apply`]), and a look now and
//! then at what the stream does not tell ([`watching`]).

mod announced;
mod apply;
mod change;
pub mod ddl;
mod early;
mod executor;
mod executors;
mod gate;
mod inflow;
mod lane;
mod lanes;
pub mod lookout;
mod marker;
mod messages;
mod net;
pub(crate) mod peek;
mod pipeline;
mod queue;
mod reader;
mod reading;
mod relation;
mod rhythm;
mod row;
mod sets;
mod shares;
mod slot;
pub mod spool;
mod streamed;
pub mod subscription;
mod target_table;
pub mod unkeyed;
pub(crate) mod watching;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::announced::Announced;
use self::ddl::capture::Capture;
use self::ddl::{Moved, SchemaChanges};
use self::early::Early;
use self::executors::Executors;
pub use self::gate::Gate;
pub use self::inflow::Inflow;
pub use self::marker::{Marker, MarkerWatch};
use self::reading::{Opening, Reading};
use self::slot::Slot;
use self::spool::Spooling;
use self::streamed::{Bounds, SPILL_FAILED, STREAMING_FAILED, Streamed};
use crate::config::{Config, Ddl, MoveName, Scope};
use crate::error::{Class, Error, Result};
use crate::postgres::pgoutput::Protocol;
use crate::postgres::{Lsn, QualifiedName, Server, Side};
use crate::state::Store;
use crate::telemetry::Telemetry;

/// The code of the error with which following ends because the state has tables to copy. The caller copies them, and follows on.
pub const TABLES_TO_COPY: &str = "tables_to_copy";

/// How often progress is written for a source that has nothing for us.
const IDLE_PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// After a stop, so long may each end take to finish what it has begun: the target its batch, the source our last word.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// What the target durably holds, as the applier last committed it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Durable {
    /// Progress.
    pub lsn: Lsn,
    /// Commit time of the last applied transaction, microseconds since 1970 of the source's clock.
    pub commit_micros: Option<i64>,
    /// The newest marker that is in the target.
    pub marker: Option<u64>,
}

/// What the applier needs to know; fixed for one run.
#[derive(Clone, Debug)]
struct Settings {
    move_name: MoveName,
    batch_max_delay: Duration,
    batch_max_bytes: u64,
    /// Up to this commit each source transaction is a batch of its own.
    one_by_one: Lsn,
    /// Nothing that committed here or later is applied.
    until: Option<Lsn>,
    /// The cut of each table.
    cuts: HashMap<QualifiedName, Lsn>,
    ddl: Ddl,
    /// Which tables move.
    scope: Scope,
    /// The table through which schema changes come.
    capture: QualifiedName,
}

/// Everything a run of following needs.
pub struct Follow<'a> {
    /// The move's configuration.
    pub config: &'a Config,
    /// Where changes come from.
    pub source: &'a Server,
    /// Where they go.
    pub target: &'a Server,
    /// The state of the move.
    pub store: &'a Store,
    /// Of the daemon that runs.
    pub epoch: i64,
    /// The publications to stream.
    pub publications: &'a [String],
    /// Whether the applying session may set `session_replication_role = replica`.
    pub replica_role: bool,
    /// Takes what is durable.
    pub durable: &'a watch::Sender<Durable>,
    /// Where a cutover leaves its marker.
    pub marker: &'a MarkerWatch,
    /// What a cutover keeps following waiting with.
    pub gate: &'a Gate,
    /// Tables of the move that neither side has any more.
    pub gone: &'a HashSet<QualifiedName>,
    /// Schema changes come with the stream.
    pub captured: bool,
    /// Ends once everything that committed before is applied, and applies nothing beyond.
    pub until: Option<Lsn>,
    /// What was kept of the stream before, and whoever fills it.
    pub spooling: &'a Spooling,
    /// Takes reports.
    pub telemetry: &'a Telemetry,
}

impl Follow<'_> {
    /// Follows from durable progress until `stop`; returns early with the error that ended it. Either way nothing is
    /// lost: calling it again goes on from what is durable.
    ///
    /// A stop waits for the batch in progress, but not long: a target whose table is locked, or that is gone behind
    /// a connection that does not know it yet, might answer in hours. Then the batch is abandoned, which is the same as
    /// a death: the target holds all of it or nothing, and progress tells which.
    ///
    /// # Errors
    /// Class retry: a connection or the target's transaction was lost. Class operator: the sides differ, the slot or the
    /// source is not ours any more, a table has another shape.
    pub async fn run(&self, stop: &CancellationToken) -> Result<()> {
        self.gate.engage(false);
        self.marker.recognise_by_position(false);
        let reached = watch::channel(Lsn::ZERO).0;
        let streamed = self.config.follow.spill_max_bytes > 0;
        let mut manner = Manner { one_by_one: Lsn::ZERO, for_a_person: false, streamed };
        loop {
            let outcome = self.attempt(stop, manner, &reached).await;
            let met_at = *reached.borrow();
            match outcome {
                // What was here of transactions in progress is gone, and the source still has all of it.
                Err(error)
                    if [SPILL_FAILED, STREAMING_FAILED].contains(&error.code())
                        && manner.streamed
                        && !stop.is_cancelled() =>
                {
                    tracing::warn!(
                        %error,
                        code = error.code(),
                        hint = error.hint_text(),
                        "from here on the source keeps large transactions itself until they commit"
                    );
                    manner.streamed = false;
                    let slot = Slot::new(self.source, &self.config.name);
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => return Ok(()),
                        released = slot.released() => released?,
                    }
                }
                // A person is to find everything before the transaction in question on the target, and nothing of it: what
                // they then change there must not meet changes that came before. And what makes several workers wait, the
                // first can wait for alone.
                Err(error)
                    if (error.class() == Class::Operator && !manner.for_a_person || self.waited_in_vain(&error))
                        && met_at > manner.one_by_one
                        && !stop.is_cancelled() =>
                {
                    tracing::warn!(%error, "going on one by one up to the transaction in question");
                    // What a person is called for must not come from the source's way of decoding what is in progress.
                    let for_a_person = manner.for_a_person || error.class() == Class::Operator;
                    manner = Manner { one_by_one: met_at, for_a_person, streamed: manner.streamed && !for_a_person };
                }
                other => return other,
            }
        }
    }

    /// Whether one of several workers gave up waiting for a lock, or was made to.
    fn waited_in_vain(&self, error: &Error) -> bool {
        self.config.follow.workers.get() > 1 && matches!(error.sqlstate(), Some("55P03" | "40P01"))
    }

    async fn attempt(&self, stop: &CancellationToken, manner: Manner, reached: &watch::Sender<Lsn>) -> Result<()> {
        // Until the stream stands, nothing has begun that a stop would have to finish.
        let Ends { reading, reader_stop, applier, executors, moved, streamed } = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            ends = self.begin(stop, manner, reached) => ends?,
        };
        // The applier stops first and commits what is complete; the reader then sees the queue closed, confirms once
        // more and lets the slot go. If the reader fails, the applier sees the queue end and commits what is complete.
        let applier_stop = applier.stop.clone();
        let mut applying = Box::pin(applier.run());
        let mut watching = std::pin::pin!(watching::watch(self, &moved));
        let mut noticed = None;
        let applied = loop {
            tokio::select! {
                biased;
                applied = &mut applying => break applied,
                Err(error) = &mut watching, if noticed.is_none() => {
                    noticed = Some(error);
                    applier_stop.cancel();
                }
                () = grace_after(&applier_stop) => {
                    reader_stop.cancel();
                    tracing::info!(
                        "the target did not finish the batch in time; it is abandoned, and applied again at the next start"
                    );
                    executors.end_all().await;
                    break Ok(());
                }
            }
        };
        // With the applier goes its end of the queue: the reader may be waiting for room that nobody would make.
        drop(applying);
        reader_stop.cancel();
        let read = tokio::time::timeout(STOP_GRACE, reading.ended()).await.unwrap_or_else(|_| {
            Err(Error::new(Class::Retry, "source_silent", "the source does not take the last confirmation"))
        });
        // What the applier says counts more: the reader's error is often only its echo.
        if let Err(error) = applied {
            self.lost(&error, Side::Target);
            return Err(error.doing("applying changes on the target"));
        }
        if let Some(noticed) = noticed {
            return Err(noticed);
        }
        match read {
            Err(error) if !stop.is_cancelled() => {
                self.lost(&error, Side::Source);
                let error = error.doing("reading the stream of the source");
                Err(if streamed { streamed::failed_on_the_source(error) } else { error })
            }
            _ => Ok(()),
        }
    }

    /// Opens what both ends need, from durable progress on.
    async fn begin(&self, stop: &CancellationToken, manner: Manner, reached: &watch::Sender<Lsn>) -> Result<Ends> {
        let slot = Slot::new(self.source, &self.config.name);
        // What an earlier batch still commits would not be in what is read next.
        let executors = Executors {
            target: self.target.clone(),
            move_name: self.config.name.clone(),
            epoch: self.epoch,
            missing_row: self.config.follow.missing_row,
            replica_role: self.replica_role,
            telemetry: self.telemetry.clone(),
            backends: Arc::default(),
        };
        executors.end_earlier().await?;
        // It is confirmed to the source from here on.
        let progress = self.store.durable_progress().await?;
        let record = self.store.find().await?;
        let (version, spool) = self.spooling.join(&slot, record.as_ref(), self.publications, progress.lsn).await?;
        self.durable.send_modify(|durable| {
            durable.lsn = progress.lsn;
            durable.commit_micros = progress.commit_micros;
        });
        self.telemetry.applied(progress.lsn, progress.commit_micros);

        let ahead = self.store.workers_ahead().await?.map(shares::Ahead::from);
        let first = executors.open(0).await?;
        let mut beside = Vec::new();
        for worker in 1..self.config.follow.workers.get() {
            beside.push(executors.open(u16::try_from(worker).unwrap_or(u16::MAX)).await?);
        }
        let lane = lanes::Lanes::new(first, beside);
        let tables = self.store.tables().await?;
        let moved = tables.iter().map(|table| table.name.clone()).filter(|name| !self.gone.contains(name));
        let moved = Moved::new(moved.collect());
        let (sender, receiver) = queue::queue((self.config.follow.batch_max_bytes / 2).max(1 << 20));
        let protocol = reading::protocol(version, manner.streamed);
        let streamed = Streamed::new(protocol, Bounds::with_disk(self.config.follow.spill_max_bytes));
        let opening = Opening {
            source: self.source.clone(),
            role: "stream",
            slot: slot.clone(),
            record,
            publications: self.publications.to_vec(),
            version,
            from: progress.lsn,
            protocol,
        };
        let (durable, telemetry) = (self.durable.subscribe(), self.telemetry.clone());
        let inflow = Inflow::open(opening, spool.map(|spool| (spool, self.spooling.clone())));
        let reader = move |stream| reader::Reader::new(stream, slot, sender, durable, telemetry, streamed);
        let reader_stop = CancellationToken::new();
        let reading = Reading::start(inflow, reader, reader_stop.clone()).await?;
        let applier = apply::Applier {
            settings: Settings {
                move_name: self.config.name.clone(),
                batch_max_delay: self.config.follow.batch_max_delay,
                batch_max_bytes: self.config.follow.batch_max_bytes,
                one_by_one: manner.one_by_one,
                until: self.until,
                cuts: apply::cuts(&tables, self.until)?,
                ddl: self.config.follow.ddl,
                scope: self.config.scope.clone(),
                capture: Capture::of(&self.config.name).table(),
            },
            lane,
            early: Early::new(executors.clone()),
            ahead,
            store: self.store.clone(),
            schema: SchemaChanges::default(),
            moved: moved.clone(),
            queue: receiver,
            durable: self.durable.clone(),
            marker: self.marker.clone(),
            gate: self.gate.clone(),
            telemetry: self.telemetry.clone(),
            reached: reached.clone(),
            announced: Announced::default(),
            generations: 0,
            transaction: None,
            batch: None,
            idle: None,
            idle_written: Instant::now(),
            volatile: None,
            durable_at: Instant::now(),
            stop: stop.child_token(),
        };
        Ok(Ends { reading, reader_stop, applier, executors, moved, streamed: protocol > Protocol::V1 })
    }

    /// A connection that has to be made again is counted for its side.
    fn lost(&self, error: &Error, side: Side) {
        if error.class() == Class::Retry && error.code() != TABLES_TO_COPY {
            self.telemetry.reconnected(side);
        }
    }
}

/// The two ends of a run, ready to go.
struct Ends {
    reading: Reading,
    reader_stop: CancellationToken,
    applier: apply::Applier,
    /// The tables of the move.
    moved: Moved,
    /// They know the sessions on the target.
    executors: Executors,
    /// The source sends large transactions while they are in progress.
    streamed: bool,
}

/// How an attempt follows.
#[derive(Clone, Copy)]
struct Manner {
    /// [`Settings::one_by_one`]
    one_by_one: Lsn,
    /// An error that calls for a person was met, once.
    for_a_person: bool,
    /// The source sends large transactions while they are in progress, if it can.
    streamed: bool,
}

/// Completes [`STOP_GRACE`] after the stop.
async fn grace_after(stop: &CancellationToken) {
    stop.cancelled().await;
    tokio::time::sleep(STOP_GRACE).await;
}
