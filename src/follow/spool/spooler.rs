//! Fills the spool: receives from the slot, writes, and confirms to the source what is durable here.
//!
//! On a thread of its own, as the reader of a stream ([`super::super::reading`]): for the sake of its pauses, and because it
//! waits for the disk.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::super::reading::{Opening, no_thread};
use super::super::rhythm::Rhythm;
use super::files::{SPOOL_UNUSABLE, Spool};
use super::writer::{SPOOL_FULL, Writer};
use crate::error::{Class, Error, Result};
use crate::postgres::replication::{Event, ReplicationStream};
use crate::postgres::{Lsn, Side};
use crate::telemetry::Telemetry;

/// How often what was received is made durable and confirmed, also when little comes.
const SYNC_EVERY: Duration = Duration::from_secs(1);

/// The same for much, in bytes.
const SYNC_AT: u64 = 16 << 20;

/// So much is read at once, in bytes.
const GULP: usize = 4 << 20;

/// A source that says nothing for so long, though it was asked, is gone, unless its walsender is seen to work.
const SILENCE: Duration = Duration::from_secs(60);

/// The first wait after an error; each one doubles, up to the last.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(15);

/// How often a spool without room is looked at, and how long a disk that refused is left alone.
const LOOK_FOR_ROOM_EVERY: Duration = Duration::from_secs(1);
const DISK_PATIENCE: Duration = Duration::from_secs(60);

/// See the module's first lines.
pub(super) struct Spooler {
    pub spool: Arc<Spool>,
    /// `follow.spool_max_bytes`
    pub most: u64,
    /// The stream, but for its beginning.
    pub opening: Opening,
    pub telemetry: Telemetry,
}

impl Spooler {
    /// Works until `stop`, or until an error that calls for a person; `ended` hears of either, when all is over.
    pub(super) fn start(self, stop: CancellationToken, ended: impl FnOnce(Result<()>) + Send + 'static) -> Result<()> {
        let thread = move || {
            let outcome = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime.block_on(self.run(&stop)),
                Err(error) => Err(no_thread(&error)),
            };
            ended(outcome);
        };
        std::thread::Builder::new().name("spool".to_owned()).spawn(thread).map(drop).map_err(|error| no_thread(&error))
    }

    async fn run(self, stop: &CancellationToken) -> Result<()> {
        let mut wait = FIRST_WAIT;
        let mut is_told = false;
        loop {
            let began = Instant::now();
            let Err(error) = self.receive(stop).await else { return Ok(()) };
            if stop.is_cancelled() {
                return Ok(());
            }
            if !matches!(error.class(), Class::Retry | Class::Wait) {
                return Err(error.doing("keeping changes in the spool"));
            }
            if began.elapsed() > LONGEST_WAIT {
                wait = FIRST_WAIT;
            }
            if [SPOOL_FULL, SPOOL_UNUSABLE].contains(&error.code()) {
                if !std::mem::replace(&mut is_told, true) {
                    self.telemetry.error(&error);
                    let (code, hint) = (error.code(), error.hint_text());
                    tracing::warn!(code, hint, "{error}; from {} on the source keeps its WAL itself", self.spool.end());
                }
                if stop.run_until_cancelled(self.room(&error)).await.is_none() {
                    return Ok(());
                }
                continue;
            }
            // Whoever read before may be on its way out.
            if error.code() == "object_in_use" {
                tracing::info!("{error}; trying again");
            } else {
                self.telemetry.error(&error);
                tracing::warn!(code = error.code(), "{error}; the spool is filled again in {wait:?}");
            }
            if error.class() == Class::Retry {
                self.telemetry.reconnected(Side::Source);
            }
            if stop.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
                return Ok(());
            }
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    /// Waits until half of a full spool was let go of: each try has the source decode again what did not fit. A disk that refused is
    /// left alone for a while.
    async fn room(&self, error: &Error) {
        if error.code() == SPOOL_UNUSABLE {
            return tokio::time::sleep(DISK_PATIENCE).await;
        }
        let then = self.spool.bytes();
        while self.spool.bytes() > then / 2 {
            tokio::time::sleep(LOOK_FOR_ROOM_EVERY).await;
        }
    }

    /// One connection, until `stop` or its end.
    async fn receive(&self, stop: &CancellationToken) -> Result<()> {
        let mut writer = Writer::open(Arc::clone(&self.spool), self.most)?;
        let opening = Opening { from: writer.end(), ..self.opening.clone() };
        let opened = async {
            // The source sends from where the slot stands, if that is further on, and says nothing of what is between.
            opening.slot.check(opening.from).await?;
            opening.open().await
        };
        let Some(stream) = stop.run_until_cancelled(opened).await else { return Ok(()) };
        let mut stream = stream?;
        let outcome = self.fill(&mut stream, &mut writer, stop).await;
        // So that the source knows exactly where the spool is, and the slot is free.
        let last_word = match &outcome {
            Ok(()) => Some(writer.sync()),
            Err(error) if error.code() == SPOOL_FULL => Some(writer.settle()),
            Err(_) => None,
        };
        if let Some(Ok(end)) = last_word
            && self.confirm(&mut stream, end, false).await.is_ok()
        {
            stream.close().await;
        }
        writer.cut_back();
        outcome
    }

    async fn fill(&self, stream: &mut ReplicationStream, writer: &mut Writer, stop: &CancellationToken) -> Result<()> {
        let mut tick = interval(SYNC_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut rhythm = Rhythm::default();
        let mut rest = None;
        let mut last_heard = Instant::now();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                _ = tick.tick() => {
                    if last_heard.elapsed() > SILENCE {
                        self.is_alive().await?;
                        last_heard = Instant::now();
                    }
                    let end = writer.sync()?;
                    // An answer tells how far an idle source decoded.
                    self.confirm(stream, end, true).await?;
                }
                read = gulp(stream, rest) => {
                    last_heard = Instant::now();
                    rest = Some(last_heard + rhythm.read(read?, last_heard));
                    if take(stream, writer)? {
                        self.confirm(stream, writer.end(), false).await?;
                    }
                }
            }
        }
    }

    /// A walsender that decodes a huge transaction may say nothing for long.
    async fn is_alive(&self) -> Result<()> {
        if self.opening.slot.is_decoding().await {
            return Ok(());
        }
        let why = format!("the source said nothing for {} seconds though it was asked", SILENCE.as_secs());
        Err(Error::new(Class::Retry, "source_silent", why))
    }

    async fn confirm(&self, stream: &mut ReplicationStream, end: Lsn, ask_for_reply: bool) -> Result<()> {
        stream.confirm(end, end, ask_for_reply).await?;
        self.telemetry.confirmed(end);
        Ok(())
    }
}

/// Reads what has arrived, once it is time to; see [`super::super::reader`].
#[allow(clippy::disallowed_methods, reason = "the thread and its runtime serve this task alone")]
async fn gulp(stream: &mut ReplicationStream, rest: Option<Instant>) -> Result<usize> {
    if let Some(rest) = rest.and_then(|rest| rest.checked_duration_since(Instant::now())) {
        std::thread::sleep(rest);
    }
    stream.gulp(GULP).await
}

/// Writes everything that was read. Whether the source is to hear of it.
fn take(stream: &mut ReplicationStream, writer: &mut Writer) -> Result<bool> {
    let mut answer = false;
    while let Some(event) = stream.buffered()? {
        match event {
            Event::Data { start, payload } => writer.append(start, &payload)?,
            Event::Keepalive { sent, reply } => {
                writer.passed(sent);
                answer |= reply;
            }
        }
        if writer.unsynced() >= SYNC_AT {
            writer.sync()?;
            answer = true;
        }
    }
    Ok(answer)
}
