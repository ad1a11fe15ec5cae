//! A look into the stream that changes nothing: what was published from one position of the log to another, without confirming it.

use std::time::Duration;

use super::reading::{Opening, protocol};
use super::slot::Slot;
use crate::error::{Error, Result};
use crate::postgres::pgoutput::Message;
use crate::postgres::replication::{Event, ReplicationStream};
use crate::postgres::{Lsn, Server};
use crate::state::Store;

/// How often the source hears from us, and is asked how far it is.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// The messages of transactions whose commit record begins at or after one position and before another.
pub(crate) struct Peek {
    stream: ReplicationStream,
    until: Lsn,
    inside_transaction: bool,
    asked: tokio::time::Instant,
    /// There is nothing more before the end.
    ended: bool,
}

impl Peek {
    /// Opens the stream of the move's slot, which nobody else may read. Its position must not be beyond `since`.
    ///
    /// # Errors
    /// As following from there: the slot is in use, gone, or not ours any more.
    pub(crate) async fn open(source: &Server, store: &Store, since: Lsn, until: Lsn) -> Result<Self> {
        let slot = Slot::new(source, store.name());
        slot.released().await?;
        let version = slot.check(since).await?;
        let opening = Opening {
            source: source.clone(),
            slot,
            record: store.find().await?,
            publications: vec![store.name().publication(), store.name().insert_publication()],
            version,
            from: since,
            protocol: protocol(version, false),
        };
        let stream = opening.open().await?;
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
                    if let Ok(read) = tokio::time::timeout_at(until, self.stream.fill()).await {
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
