//! The reading end: takes messages off the stream, decodes them, hands them on in order, and confirms.
//!
//! Promises: never confirms more than the applier, or the spool ([`super::spool`]), made durable; keeps talking to the source while the target makes it
//! wait, so that `wal_sender_timeout` does not strike; notices a source that went silent; hands on whole transactions that
//! committed, also where the source sends them before ([`super::streamed`]).

use std::future::Future;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::sync::{oneshot, watch};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::Durable;
use super::early::Part;
use super::inflow::Inflow;
use super::queue::Sender;
use super::rhythm::Rhythm;
use super::slot::Slot;
use super::streamed::{SPILL_FAILED, Streamed, Taken};
use crate::error::{Class, Error, Result};
use crate::postgres::Lsn;
use crate::postgres::pgoutput::Message;
use crate::postgres::replication::Event;
use crate::telemetry::Telemetry;

/// How often the source hears from us, also when nothing happens.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// A source that says nothing for so long, though it was asked, is gone, unless its walsender is seen to work. The default
/// `wal_sender_timeout`.
const SILENCE: Duration = Duration::from_secs(60);

/// A chunk is handed on once it holds so much, even if more was read already, in bytes.
const CHUNK: usize = 1024 * 1024;

/// So much is read at once, in bytes.
const GULP: usize = 4 * 1024 * 1024;

/// What the applier receives, in the order of the stream.
#[derive(Debug)]
pub(super) enum Delivery {
    /// A message of the plugin.
    Message(Message),
    /// Of a transaction in progress that is applied early.
    Early(Part),
    /// Nothing committed up to here beyond what was delivered.
    Idle(Lsn),
}

/// See the module's first lines.
pub(super) struct Reader {
    stream: Inflow,
    slot: Slot,
    queue: Sender<Vec<Delivery>>,
    durable: watch::Receiver<Durable>,
    telemetry: Telemetry,
    status: Interval,
    received: Lsn,
    confirmed: Lsn,
    inside_transaction: bool,
    /// When the source last said something, or was last seen to work.
    last_heard: Instant,
    rhythm: Rhythm,
    /// Nothing is read before.
    rest: Option<Instant>,
    streamed: Streamed,
}

/// What is handed on at once.
#[derive(Default)]
struct Chunk {
    deliveries: Vec<Delivery>,
    bytes: usize,
    /// What was looked at, also what is not handed on.
    work: usize,
    /// There is nothing more to look at.
    last: bool,
    /// Comes when the applier knows whether it applied a transaction early. What comes next depends on it.
    answer: Option<oneshot::Receiver<bool>>,
}

impl Chunk {
    fn push(&mut self, delivery: Delivery, bytes: usize) {
        self.deliveries.push(delivery);
        self.bytes += bytes;
        self.work += bytes;
    }
}

/// Reads what has arrived, once it is time to. Cancellation safe.
///
/// Asleep, the thread is not woken by what arrives; that is what the thread is for. It sleeps for some milliseconds, and
/// whatever else the reader waits for comes late by so much.
#[allow(clippy::disallowed_methods, reason = "the thread and its runtime serve this reader alone")]
async fn gulp(stream: &mut Inflow, rest: Option<Instant>) -> Result<usize> {
    if let Some(rest) = rest.and_then(|rest| rest.checked_duration_since(Instant::now())) {
        std::thread::sleep(rest);
    }
    stream.gulp(GULP).await
}

impl Reader {
    pub(super) fn new(
        stream: Inflow,
        slot: Slot,
        queue: Sender<Vec<Delivery>>,
        durable: watch::Receiver<Durable>,
        telemetry: Telemetry,
        streamed: Streamed,
    ) -> Self {
        let mut status = interval(STATUS_EVERY);
        status.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let from = durable.borrow().lsn;
        Self {
            stream,
            slot,
            queue,
            durable,
            telemetry,
            status,
            received: from,
            confirmed: Lsn::ZERO,
            inside_transaction: false,
            last_heard: Instant::now(),
            rhythm: Rhythm::default(),
            rest: None,
            streamed,
        }
    }

    /// Reads until told to stop, or until the applier is gone; then confirms once more, so that the source knows
    /// exactly where the target is.
    pub(super) async fn run(mut self, stop: CancellationToken) -> Result<()> {
        let outcome = self.read(&stop).await;
        match &outcome {
            Ok(()) => {
                self.confirm(false).await?;
                self.stream.close().await;
            }
            // The caller reads on in another way, and needs the slot for that.
            Err(error) if error.code() == SPILL_FAILED => self.stream.close().await,
            Err(_) => {}
        }
        outcome
    }

    async fn read(&mut self, stop: &CancellationToken) -> Result<()> {
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = self.queue.closed() => return Ok(()),
                changed = self.durable.changed() => match changed {
                    Ok(()) => self.confirm(false).await?,
                    Err(_) => return Ok(()),
                },
                _ = self.status.tick() => self.report().await?,
                read = gulp(&mut self.stream, self.rest) => {
                    self.last_heard = Instant::now();
                    let read = read?;
                    // Files have no walsender behind them that would work the less for a pause.
                    let pause = self.stream.is_live().then(|| self.rhythm.read(read, self.last_heard));
                    self.rest = pause.map(|pause| self.last_heard + pause);
                    if !self.hand_on().await? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Decodes everything that was read and hands it on; false once the applier is gone.
    async fn hand_on(&mut self) -> Result<bool> {
        let mut reply = false;
        loop {
            let chunk = self.chunk(&mut reply)?;
            self.telemetry.received(self.received);
            let held = self.streamed.held();
            self.telemetry.queue("unfinished", held.memory as u64);
            self.telemetry.queue("spill", held.disk);
            if chunk.deliveries.is_empty() && chunk.last {
                if reply {
                    self.confirm(false).await?;
                }
                return Ok(true);
            }
            // Also where all of it was rolled back: gigabytes of that must not keep us from the source.
            let room = self.queue.room(chunk.bytes);
            let Some(weight) = self.meanwhile(room).await? else { return Ok(false) };
            if !chunk.deliveries.is_empty() && !self.queue.send(chunk.deliveries, weight) {
                return Ok(false);
            }
            self.telemetry.queue("apply", self.queue.waiting_bytes());
            if let Some(answer) = chunk.answer {
                let Some(applied) = self.meanwhile(answer.map(Result::ok)).await? else { return Ok(false) };
                self.streamed.settle_early(applied)?;
            }
        }
    }

    /// The next chunk of what was read. What a transaction on its way out still holds comes before the next message.
    fn chunk(&mut self, reply: &mut bool) -> Result<Chunk> {
        let mut chunk = Chunk::default();
        while chunk.work < CHUNK {
            // Bookkeeping of a message costs memory too; small rows must not slip past the bound.
            if let Some(step) = self.streamed.step()? {
                match step.message {
                    Some(message) => chunk.push(Delivery::Message(message), step.bytes + 128),
                    None => chunk.work += step.bytes,
                }
                continue;
            }
            let Some(event) = self.stream.buffered()? else {
                chunk.last = true;
                break;
            };
            match event {
                Event::Data { start, payload } => match self.take(start, &payload)? {
                    Taken::Passed(message) => chunk.push(Delivery::Message(message), payload.len() + 128),
                    Taken::Early(part) => chunk.push(Delivery::Early(part), payload.len() + 128),
                    Taken::EarlyCommits(commit_lsn) => {
                        let (applied, answer) = oneshot::channel();
                        chunk.push(Delivery::Early(Part::Commits { commit_lsn, applied }), 128);
                        chunk.answer = Some(answer);
                        break;
                    }
                    Taken::Kept => {}
                },
                Event::Keepalive { sent, reply: asked } => {
                    *reply |= asked;
                    self.received = self.received.max(sent);
                    // Between blocks: whatever is in progress commits later than this, and would be sent again from its beginning.
                    // Inside one, as inside a transaction, what the position belongs to is not complete here.
                    if !self.inside_transaction && !self.streamed.in_block() {
                        chunk.push(Delivery::Idle(sent), 16);
                    }
                }
            }
        }
        Ok(chunk)
    }

    fn take(&mut self, start: Lsn, payload: &Bytes) -> Result<Taken> {
        let taken = self.streamed.take(start, payload)?;
        match &taken {
            Taken::Passed(Message::Begin { .. }) => self.inside_transaction = true,
            Taken::Passed(Message::Commit { end_lsn, .. }) => {
                self.inside_transaction = false;
                self.received = self.received.max(*end_lsn);
            }
            _ => self.received = self.received.max(start),
        }
        Ok(taken)
    }

    /// Waits for something of the applier, and keeps the source company meanwhile. `None` once the applier is gone.
    async fn meanwhile<T>(&mut self, waited: impl Future<Output = Option<T>>) -> Result<Option<T>> {
        let mut waited = std::pin::pin!(waited);
        loop {
            tokio::select! {
                biased;
                () = self.queue.closed() => return Ok(None),
                changed = self.durable.changed() => match changed {
                    Ok(()) => self.confirm(false).await?,
                    Err(_) => return Ok(None),
                },
                _ = self.status.tick() => {
                    // While we do not read, silence is ours.
                    self.last_heard = Instant::now();
                    self.confirm(false).await?;
                }
                // The last, so that the source hears from us also where there is nothing to wait for.
                outcome = &mut waited => return Ok(outcome),
            }
        }
    }

    /// The regular word to the source. It is asked for an answer, which tells how far an idle source decoded, and
    /// that it lives.
    async fn report(&mut self) -> Result<()> {
        if self.last_heard.elapsed() > SILENCE {
            // While it decodes a huge transaction for which it has nothing to send, a walsender may not answer. To begin
            // again would make it decode from the start, and never get through.
            if !self.slot.is_decoding().await {
                return Err(Error::new(
                    Class::Retry,
                    "source_silent",
                    format!("the source said nothing for {} seconds though it was asked", SILENCE.as_secs()),
                ));
            }
            tracing::info!(slot = self.slot.name(), "the source says nothing, but it decodes: waiting for it");
            self.last_heard = Instant::now();
        }
        self.confirm(true).await
    }

    async fn confirm(&mut self, ask_for_reply: bool) -> Result<()> {
        let durable = self.durable.borrow_and_update().lsn;
        let Some(confirmed) = self.stream.confirm(self.received, durable, ask_for_reply).await? else { return Ok(()) };
        if confirmed > self.confirmed {
            self.confirmed = confirmed;
            self.telemetry.confirmed(confirmed);
        }
        Ok(())
    }
}
