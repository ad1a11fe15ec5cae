//! The reading end: takes messages off the stream, decodes them, hands them on in order, and confirms.
//!
//! Promises: never confirms more than the applier made durable; keeps talking to the source while the target makes it
//! wait, so that `wal_sender_timeout` does not strike; notices a source that went silent.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::Durable;
use super::queue::{Sender, Weight};
use super::rhythm::Rhythm;
use super::slot::Slot;
use crate::error::{Class, Error, Result};
use crate::postgres::Lsn;
use crate::postgres::pgoutput::Message;
use crate::postgres::replication::{Event, ReplicationStream};
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
    /// Nothing committed up to here beyond what was delivered.
    Idle(Lsn),
}

/// See the module's first lines.
pub(super) struct Reader {
    stream: ReplicationStream,
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
}

/// Reads what has arrived, once it is time to. Cancellation safe.
///
/// Asleep, the thread is not woken by what arrives; that is what the thread is for. It sleeps for some milliseconds, and
/// whatever else the reader waits for comes late by so much.
#[allow(clippy::disallowed_methods, reason = "the thread and its runtime serve this reader alone")]
async fn gulp(stream: &mut ReplicationStream, rest: Option<Instant>) -> Result<usize> {
    if let Some(rest) = rest.and_then(|rest| rest.checked_duration_since(Instant::now())) {
        std::thread::sleep(rest);
    }
    stream.gulp(GULP).await
}

impl Reader {
    pub(super) fn new(
        stream: ReplicationStream,
        slot: Slot,
        queue: Sender<Vec<Delivery>>,
        durable: watch::Receiver<Durable>,
        telemetry: Telemetry,
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
        }
    }

    /// Reads until told to stop, or until the applier is gone; then confirms once more, so that the source knows
    /// exactly where the target is.
    pub(super) async fn run(mut self, stop: CancellationToken) -> Result<()> {
        let outcome = self.read(&stop).await;
        if outcome.is_ok() {
            self.confirm(false).await?;
            self.stream.close().await;
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
                    self.rest = Some(self.last_heard + self.rhythm.read(read?, self.last_heard));
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
            let mut chunk = Vec::new();
            let mut bytes = 0;
            while bytes < CHUNK {
                let Some(event) = self.stream.buffered()? else { break };
                match event {
                    Event::Data { start, payload } => {
                        // Bookkeeping of a message costs memory too; small rows must not slip past the bound.
                        bytes += payload.len() + 128;
                        chunk.push(Delivery::Message(self.decode(start, &payload)?));
                    }
                    Event::Keepalive { sent, reply: asked } => {
                        reply |= asked;
                        self.received = self.received.max(sent);
                        if !self.inside_transaction {
                            bytes += 16;
                            chunk.push(Delivery::Idle(sent));
                        }
                    }
                }
            }
            self.telemetry.received(self.received);
            if chunk.is_empty() {
                if reply {
                    self.confirm(false).await?;
                }
                return Ok(true);
            }
            let Some(weight) = self.room(bytes).await? else { return Ok(false) };
            if !self.queue.send(chunk, weight) {
                return Ok(false);
            }
            self.telemetry.queue("apply", self.queue.waiting_bytes());
        }
    }

    fn decode(&mut self, start: Lsn, payload: &bytes::Bytes) -> Result<Message> {
        let message = Message::decode(payload).map_err(|malformed| {
            Error::new(Class::Bug, "stream_malformed", format!("the message at {start} cannot be read: {malformed}"))
                .hint("nothing was applied beyond the last progress; please report this with the source's version")
        })?;
        match &message {
            Message::Begin { .. } => self.inside_transaction = true,
            Message::Commit { end_lsn, .. } => {
                self.inside_transaction = false;
                self.received = self.received.max(*end_lsn);
            }
            _ => self.received = self.received.max(start),
        }
        Ok(message)
    }

    /// Waits for room in the queue, and keeps the source company meanwhile.
    async fn room(&mut self, bytes: usize) -> Result<Option<Weight>> {
        loop {
            tokio::select! {
                biased;
                () = self.queue.closed() => return Ok(None),
                weight = self.queue.room(bytes) => return Ok(weight),
                changed = self.durable.changed() => match changed {
                    Ok(()) => self.confirm(false).await?,
                    Err(_) => return Ok(None),
                },
                _ = self.status.tick() => {
                    // While we do not read, silence is ours.
                    self.last_heard = Instant::now();
                    self.confirm(false).await?;
                }
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
        self.stream.confirm(self.received, durable, ask_for_reply).await?;
        if durable > self.confirmed {
            self.confirmed = durable;
            self.telemetry.confirmed(durable);
        }
        Ok(())
    }
}
