//! Following the source: stream → transaction → batch → apply.
//!
//! Owns the stream from the slot and the connection that applies. Promises: every change is applied exactly once and
//! in the order of commit, progress and data commit together, and nothing is confirmed to the source before that. Must
//! never go on past something that it does not understand.
//!
//! [`run`] is two tasks with a queue between them, the reader ([`reader`]) and the applier ([`apply`]), and a look now and
//! then at what the stream does not tell ([`watching`]).

mod apply;
pub mod lookout;
mod pipeline;
mod queue;
mod reader;
mod relation;
pub mod scope;
pub mod unkeyed;
pub(crate) mod watching;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, MissingRow, MoveName};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::replication::{ReplicationStream, Walsender};
use crate::postgres::wire::{Mode, Wire};
use crate::postgres::{Lsn, QualifiedName, Server, Side};
use crate::state::Store;
use crate::telemetry::Telemetry;

/// How often progress is written for a source that has nothing for us.
const IDLE_PROGRESS_EVERY: Duration = Duration::from_secs(1);

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

/// Where a cutover leaves the marker that it waits for.
///
/// A marker is a transaction on the source whose id is known before it commits, so it is recognised by that id on every
/// version; PostgreSQL 13 does not send logical messages through pgoutput, but it sends their transactions.
#[derive(Clone, Default)]
pub struct MarkerWatch(Arc<Mutex<Option<Marker>>>);

/// A transaction that stands for a point of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marker {
    /// Counts up, to tell one marker from another.
    pub id: u64,
    /// Its transaction id, as the stream shows it.
    pub xid: u32,
}

impl MarkerWatch {
    /// From now on `marker` is looked for. To be called before its transaction commits.
    pub fn expect(&self, marker: Marker) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(marker);
    }

    /// The marker's id, if this is its transaction; it is expected once.
    fn is_expected(&self, xid: u32) -> Option<u64> {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slot.take_if(|marker| marker.xid == xid).map(|marker| marker.id)
    }
}

/// What the applier needs to know; fixed for one run.
#[derive(Clone, Debug)]
struct Settings {
    move_name: MoveName,
    epoch: i64,
    batch_max_delay: Duration,
    batch_max_bytes: u64,
    missing_row: MissingRow,
    /// Up to this commit each source transaction is a batch of its own.
    one_by_one: Lsn,
    /// The cut of each table.
    cuts: HashMap<QualifiedName, Lsn>,
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
    /// Takes reports.
    pub telemetry: &'a Telemetry,
}

impl Follow<'_> {
    /// Follows from durable progress until `stop`; returns early with the error that ended it. Either way nothing is
    /// lost: calling it again goes on from what is durable.
    ///
    /// # Errors
    /// Class retry: a connection or the target's transaction was lost. Class operator: the sides differ, the slot is not
    /// ours any more, a table has another shape.
    pub async fn run(&self, stop: &CancellationToken) -> Result<()> {
        let reached = watch::channel(Lsn::ZERO).0;
        let outcome = self.attempt(stop, Lsn::ZERO, &reached).await;
        let met_at = *reached.borrow();
        match outcome {
            // A person is to find everything before the transaction in question on the target, and nothing of it: what
            // they then change there must not meet changes that came before.
            Err(error) if error.class() == Class::Operator && met_at > Lsn::ZERO && !stop.is_cancelled() => {
                tracing::warn!(%error, "going on one by one up to the transaction in question");
                self.attempt(stop, met_at, &reached).await
            }
            other => other,
        }
    }

    async fn attempt(&self, stop: &CancellationToken, one_by_one: Lsn, reached: &watch::Sender<Lsn>) -> Result<()> {
        let progress = self.store.progress().await?;
        let version = self.check_slot(progress.lsn).await?;
        self.durable.send_modify(|durable| {
            durable.lsn = progress.lsn;
            durable.commit_micros = progress.commit_micros;
        });
        self.telemetry.applied(progress.lsn, progress.commit_micros);

        let pipeline = pipeline::Pipeline::new(self.apply_connection().await?);
        let catalog = self.target.connect("catalog").await?;
        let tables = self.store.tables().await?;
        let moved: HashSet<QualifiedName> = tables.iter().map(|table| table.name.clone()).collect();
        let stream = self.stream(progress.lsn, version).await?;
        let (sender, receiver) = queue::queue(self.config.follow.batch_max_bytes.max(1 << 20) * 2);
        let reader = reader::Reader::new(stream, sender, self.durable.subscribe(), self.telemetry.clone());
        let applier = apply::Applier {
            settings: Settings {
                move_name: self.config.name.clone(),
                epoch: self.epoch,
                batch_max_delay: self.config.follow.batch_max_delay,
                batch_max_bytes: self.config.follow.batch_max_bytes,
                missing_row: self.config.follow.missing_row,
                one_by_one,
                cuts: apply::cuts(&tables)?,
            },
            pipeline,
            catalog,
            queue: receiver,
            durable: self.durable.clone(),
            marker: self.marker.clone(),
            telemetry: self.telemetry.clone(),
            reached: reached.clone(),
            relations: HashMap::new(),
            types: HashMap::new(),
            generations: 0,
            transaction: None,
            batch: None,
            idle: None,
            idle_written: Instant::now(),
        };
        // The applier stops first and commits what is complete; the reader then sees the queue closed, confirms once
        // more and lets the slot go. If the reader fails, the applier sees the queue end and commits what is complete.
        let reader_stop = CancellationToken::new();
        let applier_stop = stop.child_token();
        let applied = async {
            let outcome = applier.run(applier_stop.clone()).await;
            reader_stop.cancel();
            outcome
        };
        let reading = tokio::spawn(reader.run(reader_stop.clone()));
        let mut applied = std::pin::pin!(applied);
        let mut noticed = None;
        let applied = tokio::select! {
            applied = &mut applied => applied,
            Err(error) = watching::watch(self.source, self.config, self.publications, &moved) => {
                noticed = Some(error);
                applier_stop.cancel();
                applied.await
            }
        };
        let read = match reading.await {
            Ok(read) => read,
            Err(panicked) => Err(Error::bug(format!("the reader ended: {panicked}"))),
        };
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
                Err(error.doing("reading the stream of the source"))
            }
            _ => Ok(()),
        }
    }

    /// A connection that has to be made again is counted for its side.
    fn lost(&self, error: &Error, side: Side) {
        if error.class() == Class::Retry {
            self.telemetry.reconnected(side);
        }
    }

    async fn apply_connection(&self) -> Result<Wire> {
        let mut wire = Wire::connect(self.target, "apply", Mode::Sql, &[]).await?;
        if self.replica_role {
            wire.query("SET session_replication_role = replica").await.doing(|| "switching off triggers for apply")?;
        }
        Ok(wire)
    }

    async fn stream(&self, from: Lsn, version: i32) -> Result<ReplicationStream> {
        let walsender = Walsender::connect(self.source, "stream").await?;
        let publications: Vec<String> =
            self.publications.iter().map(|name| crate::postgres::quote_identifier(name)).collect();
        let mut options = vec![("proto_version", "1".to_owned()), ("publication_names", publications.join(","))];
        // From 15 on a transaction in which nothing is published is not sent at all, and the marker is such a one: only
        // its message makes it travel. 13 knows no messages and sends every transaction.
        if version >= 140_000 {
            options.push(("messages", "true".to_owned()));
        }
        walsender.stream(&self.config.name.slot(), from, &options).await
    }

    /// The slot must be the one that our progress belongs to: confirmed up to progress at most, for we never confirm
    /// more. A slot that was made again, or moved on by someone else, has lost changes that we do not have. Returns the
    /// source's `server_version_num`.
    async fn check_slot(&self, progress: Lsn) -> Result<i32> {
        let slot = self.config.name.slot();
        let session = self.source.connect("slot").await?;
        let row = session
            .query_opt(
                "SELECT plugin::text, confirmed_flush_lsn::text, wal_status = 'lost',
                        database = pg_catalog.current_database(),
                        pg_catalog.current_setting('server_version_num')::int4
                 FROM pg_catalog.pg_replication_slots WHERE slot_name = $1",
                &[&slot],
            )
            .await
            .doing(|| format!("looking for the slot {slot}"))?;
        let lost = |code: &'static str, what: String| {
            Error::new(Class::Operator, code, what).hint(
                "changes are missing between the target and the source: run `pgtandem clean`, empty the target and \
                 begin the move again",
            )
        };
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
        let confirmed: Option<String> = row.try_get(1)?;
        let confirmed: Option<Lsn> = confirmed.and_then(|text| text.parse().ok());
        match confirmed {
            Some(confirmed) if confirmed > progress => Err(lost(
                "slot_advanced",
                format!("the slot {slot} stands at {confirmed}, beyond what the target holds ({progress})"),
            )),
            _ => Ok(row.try_get(4)?),
        }
    }
}
