//! A look into the stream that changes nothing: what was published from one position of the log to another, without confirming it.

use std::time::Duration;

use super::inflow::Inflow;
use super::spool::{Source, Spooling};
use crate::error::{Error, Result};
use crate::postgres::Lsn;
use crate::postgres::pgoutput::Message;
use crate::postgres::replication::Event;

/// So much is read at once, in bytes.
const GULP: usize = 1 << 20;

/// How often the source hears from us, and is asked how far it is.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// The messages of transactions whose commit record begins at or after one position and before another.
pub(crate) struct Peek {
    stream: Inflow,
    until: Lsn,
    inside_transaction: bool,
    asked: tokio::time::Instant,
    /// There is nothing more before the end.
    ended: bool,
}

impl Peek {
    /// Looks from `since` on, in the spool and in the slot. Until it is closed nobody else may read the slot.
    ///
    /// # Errors
    /// Class operator: they do not reach back as far. Class retry: the slot is in use. The connection's.
    pub(crate) async fn open(spooling: &Spooling, source: Source<'_>, since: Lsn, until: Lsn) -> Result<Self> {
        let stream = Inflow::recall(spooling, source, since).await?;
        let asked = tokio::time::Instant::now();
        Ok(Self { stream, until, inside_transaction: false, asked, ended: false })
    }

    /// The next message; `None` once everything before the end was seen.
    ///
    /// # Errors
    /// The connection's; what came is no message.
    pub(crate) async fn next(&mut self) -> Result<Option<Message>> {
        while !self.ended {
            if self.asked.elapsed() >= ASK_EVERY {
                self.stream.confirm(Lsn::ZERO, Lsn::ZERO, true).await?;
                self.asked = tokio::time::Instant::now();
            }
            match self.stream.buffered()? {
                Some(Event::Keepalive { sent, reply }) => {
                    if reply {
                        self.stream.confirm(Lsn::ZERO, Lsn::ZERO, false).await?;
                    }
                    // Before the end of a transaction, the position is that of its beginning or of a part of it.
                    self.ended = !self.inside_transaction && sent >= self.until;
                }
                Some(Event::Data { payload, .. }) => {
                    let message = Message::decode(&payload).map_err(|e| Error::bug(e.to_string()))?;
                    match message {
                        Message::Begin { commit_lsn, .. } if commit_lsn >= self.until => self.ended = true,
                        Message::Begin { .. } => self.inside_transaction = true,
                        Message::Commit { .. } => self.inside_transaction = false,
                        _ => {}
                    }
                    if !self.ended {
                        return Ok(Some(message));
                    }
                }
                None => {
                    // A timeout is no error: the source is asked again.
                    let until = self.asked + ASK_EVERY;
                    if let Ok(read) = tokio::time::timeout_at(until, self.stream.gulp(GULP)).await {
                        read?;
                    }
                }
            }
        }
        Ok(None)
    }

    /// Lets the slot go.
    pub(crate) async fn close(self) {
        self.stream.close().await;
    }
}
