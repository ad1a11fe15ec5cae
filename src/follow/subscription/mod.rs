//! `follow.engine = "subscription"`: the target's own worker follows on our slot, and we watch it.
//!
//! Owns the subscription `pgtandem_<name>` on the target. Promises what the other engine promises: every change exactly
//! once, progress never beyond what the target durably holds, nothing applied behind a closed [`Gate`](super::Gate). Must
//! never run beside our own stream: each of them takes over only where the other has certainly stopped.
//!
//! # Who knows the position
//!
//! The worker remembers in a replication origin up to where it has applied, in the same transaction as the rows. We remember
//! the same in `pgtandem.progress`. Handing over means to carry the position from one memory to the other.
//!
//! The slot is no memory to rely on: after a crash the source may find it at an earlier position. A worker without an
//! origin would begin there, and apply twice what we applied already. So the origin is set before the worker first runs,
//! which takes the right to set it. A worker asks for everything behind its origin, and so does our stream behind progress:
//! in both cases a transaction is sent if its commit record begins there or later.
//!
//! # From our stream to the worker, and a death at any point
//!
//! 1. Sessions of earlier batches of ours are ended, so that none of them commits any more.
//! 2. The subscription is made, disabled. *Death before:* there is none, and the next start makes it. *After:* it does
//!    nothing; the next start finds it disabled.
//! 3. One transaction brings the origin up to progress and enables it. Its COMMIT makes both durable. *Death before:* as
//!    above. *After:* the worker runs, with or without us.
//!
//! Enabling always goes this way, also after a cutover that was given up. Where the origin is ahead of progress, because the
//! worker ran while we did not look, it stays.
//!
//! # From the worker to our stream
//!
//! 1. It is disabled, and no worker of it is left. *Death after:* the next start enables it again, or goes on here.
//! 2. Its walsender is gone, so that the slot's confirmed position moves no more. The worker confirms only what is durable
//!    on the target, and confirms stretches of the log without changes, which the origin does not know. The target
//!    therefore holds everything before the greater of the two, and nothing behind it.
//! 3. That is written as progress, and then, in a transaction of its own, the subscription is dropped with its origin.
//!    *Death between:* it is there, disabled, and progress is exact. A DROP empties the origin at once, whatever becomes of
//!    its transaction; enabling fills it from progress again. *After:* it is as if there had never been one.
//!
//! # Watching
//!
//! Progress is the slot's confirmed position. The marker of a cutover has arrived once that is behind its commit.

pub mod health;
mod object;
mod quiet;

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

pub use self::object::Reached;
use self::object::{Subscription, connection};
use super::ddl::Moved;
use super::slot::{self, Slot};
use super::{Follow, watching};
use crate::config::{Config, MoveName};
use crate::error::{Class, Error, Result};
use crate::postgres::replication::Walsender;
use crate::postgres::{Lsn, Server, Session, leftovers};
use crate::state::Store;

/// How often the slot is looked at, and how often while a marker is on its way.
const LOOK_EVERY: Duration = Duration::from_millis(200);
const LOOK_FOR_MARKER_EVERY: Duration = Duration::from_millis(10);

/// How often progress is written down.
const WRITE_EVERY: Duration = Duration::from_secs(1);

/// How long the source may take to notice that the slot's reader is gone.
const SLOT_FREE: Duration = Duration::from_secs(60);
/// After this its session is ended.
const SLOT_PATIENCE: Duration = Duration::from_secs(2);

impl Follow<'_> {
    /// Follows by the target's own worker until `stop`, or until the error that ends the watching. The worker goes on
    /// without us either way.
    ///
    /// # Errors
    /// Class retry: a connection was lost. Class wait: the target does not reach the source. Class operator: the role may not
    /// have subscriptions; the slot or the source is not ours any more; tables came or went.
    pub async fn run_by_subscription(&self, stop: &CancellationToken) -> Result<()> {
        self.gate.engage(true);
        self.marker.recognise_by_position(true);
        let tables = self.store.tables().await?;
        let moved = Moved::new(tables.into_iter().map(|table| table.name).collect());
        tokio::select! {
            biased;
            () = stop.cancelled() => Ok(()),
            Err(noticed) = watching::watch(self, &moved) => Err(noticed),
            Err(error) = self.take_over_and_watch() => Err(error),
        }
    }

    async fn take_over_and_watch(&self) -> Result<std::convert::Infallible> {
        let progress = self.store.progress().await?;
        self.durable.send_modify(|durable| {
            durable.lsn = progress.lsn;
            durable.commit_micros = progress.commit_micros;
        });
        self.telemetry.applied(progress.lsn, progress.commit_micros);
        let mut walsender = Walsender::connect(self.source, "stream").await?;
        slot::check_identity(self.store.find().await?.as_ref(), &walsender.identify_system().await?)?;
        walsender.close().await;
        let subscription = Subscription::new(self.target, &self.config.name);
        let target = subscription.session().await?;
        self.set_going(&subscription, &target, progress.lsn).await?;
        self.watch_subscription(&subscription, target).await
    }

    /// Whatever is there of it, it runs afterwards.
    async fn set_going(&self, subscription: &Subscription<'_>, session: &Session, progress: Lsn) -> Result<()> {
        let connection = connection(self.config, self.source);
        let found = match subscription.find(session).await? {
            Some(found) => found,
            None => {
                let slot = Slot::new(self.source, &self.config.name);
                // Here progress is all that anybody knows: what the slot has given up behind it is lost.
                slot.check(progress).await?;
                leftovers::end(session, &self.target.application_name("apply")).await?;
                slot_free(self.source, &self.config.name).await?;
                subscription.create(session, &connection, self.epoch).await?;
                tracing::info!(subscription = subscription.name(), "made on the target; its worker takes over");
                object::Found { enabled: false, working: false }
            }
        };
        if !found.enabled && found.working {
            subscription.stop(session, Some(self.epoch)).await?;
        }
        subscription.start(session, &connection, self.epoch, found.enabled).await?;
        tracing::info!(subscription = subscription.name(), "the target's worker follows");
        Ok(())
    }

    /// `target` is a connection for the moment at which writers wait.
    async fn watch_subscription(
        &self,
        subscription: &Subscription<'_>,
        mut target: Session,
    ) -> Result<std::convert::Infallible> {
        let slot = Slot::new(self.source, &self.config.name);
        let session = self.source.connect("watch").await?;
        let mut written = Instant::now();
        let mut unwritten = false;
        loop {
            if !self.gate.is_open() {
                if target.is_closed() {
                    target = subscription.session().await?;
                }
                subscription.stop(&target, Some(self.epoch)).await?;
                self.gate.hold();
                self.gate.changed().await;
                if !self.gate.is_open() {
                    continue;
                }
                let progress = self.durable.borrow().lsn;
                self.set_going(subscription, &target, progress).await?;
            }
            let before = self.durable.borrow().lsn;
            let confirmed = slot.look(&session, before).await?.confirmed.unwrap_or_default().max(before);
            let marker = self.marker.is_within(confirmed);
            unwritten |= confirmed > before;
            if unwritten && (marker.is_some() || written.elapsed() >= WRITE_EVERY) {
                self.store.advance(self.epoch, confirmed).await?;
                (written, unwritten) = (Instant::now(), false);
            }
            self.durable.send_modify(|durable| {
                durable.lsn = confirmed;
                durable.marker = marker.or(durable.marker);
            });
            self.telemetry.applied(confirmed, None);
            self.telemetry.confirmed(confirmed);
            let pause = if self.marker.is_waited_for() { LOOK_FOR_MARKER_EVERY } else { LOOK_EVERY };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.gate.closed() => {}
                () = self.marker.position_said(), if pause == LOOK_EVERY => {}
            }
        }
    }
}

/// Ends following by subscription, so that our stream can go on exactly where its worker stood. Does nothing if there is
/// none. Returns whether there was one.
///
/// # Errors
/// Class operator: the role may not read the position. Class retry: the worker or the walsender does not end. The connections'.
pub async fn leave(source: &Server, target: &Server, store: &Store, epoch: i64) -> Result<bool> {
    let name = store.name();
    let subscription = Subscription::new(target, name);
    let session = subscription.session().await?;
    if subscription.find(&session).await?.is_none() {
        return Ok(false);
    }
    if store.find().await?.is_none_or(|record| record.slot_lsn.is_none()) {
        // Where it stands belongs to another history.
        let message =
            format!("the target has a subscription {}, and this move has not begun to follow", subscription.name());
        return Err(Error::new(Class::Operator, "subscription_exists", message).hint(
            "an earlier move left it, or somebody made it. If nobody needs it, remove it by hand: docs/runbook.md",
        ));
    }
    subscription.stop(&session, Some(epoch)).await?;
    let confirmed = slot_free(source, name).await?;
    subscription.write_position(&session, epoch, confirmed).await?;
    subscription.remove(&session).await?;
    tracing::info!(subscription = subscription.name(), "removed from the target; our own stream goes on");
    Ok(true)
}

/// Whether the target's server connects to the source; nothing lasts. It is not asked where the server's own log could not
/// be kept from telling the password.
///
/// # Errors
/// Code `subscription_unreachable`: it does not. Code `subscription_refused`: the role may not try. Code
/// `subscription_log_tells`: the password would be written down. The connection's.
pub async fn reaches(config: &Config, source: &Server, target: &Server) -> Result<Reached> {
    let subscription = Subscription::new(target, &config.name);
    let session = subscription.session().await?;
    subscription.try_connection(&session, &connection(config, source)).await
}

/// Removes the subscription, whatever it holds: the move is over. Returns whether there was one.
///
/// # Errors
/// The connection's; no right; class retry: its worker does not end.
pub async fn remove(target: &Server, name: &MoveName) -> Result<bool> {
    let subscription = Subscription::new(target, name);
    let session = subscription.session().await?;
    if subscription.find(&session).await?.is_none() {
        return Ok(false);
    }
    subscription.stop(&session, None).await?;
    subscription.remove(&session).await?;
    Ok(true)
}

/// Waits until nobody reads the slot; returns its confirmed position, or nothing if there is no slot.
async fn slot_free(source: &Server, name: &MoveName) -> Result<Option<Lsn>> {
    let session = source.connect("watch").await?;
    let began = Instant::now();
    loop {
        let row = session.query_opt(slot::READER, &[&name.slot()]).await?;
        let Some(row) = row else { return Ok(None) };
        let Some(reader) = row.try_get::<_, Option<i32>>(0)? else {
            return Ok(row.try_get::<_, Option<String>>(1)?.and_then(|text| text.parse().ok()));
        };
        if began.elapsed() > SLOT_FREE {
            return Err(Error::new(
                Class::Retry,
                "slot_in_use",
                format!("the slot {} is still read by process {reader}", name.slot()),
            )
            .hint("end that process on the source, or wait until it notices that its client is gone"));
        }
        if began.elapsed() > SLOT_PATIENCE
            && let Err(error) = session.query("SELECT pg_catalog.pg_terminate_backend($1)", &[&reader]).await
        {
            tracing::debug!(%error, "the slot's reader could not be ended");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
