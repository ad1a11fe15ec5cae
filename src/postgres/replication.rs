//! The replication sub-protocol: slots with exported snapshots, and the stream.
//! See <https://www.postgresql.org/docs/current/protocol-replication.html>.
//!
//! Owns the framing of the stream and nothing of its meaning. Its owner decides when to read and what to confirm.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{Buf, BufMut, Bytes};
use futures_util::FutureExt;

use crate::error::{Class, Doing, Error, Result};
use crate::postgres::wire::{self, Mode, Wire};
use crate::postgres::{Lsn, Server, quote_identifier};

const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;

/// A connection to a walsender that is not streaming.
pub struct Walsender {
    wire: Wire,
}

/// A cut: a position of the source, and the name of a snapshot that shows exactly what committed before it. The
/// snapshot lives until the walsender that made it runs another command or ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Transactions whose commit record begins before this are in the snapshot; the others are in the stream.
    pub lsn: Lsn,
    /// For SET TRANSACTION SNAPSHOT and pg_dump --snapshot.
    pub snapshot: String,
}

impl Walsender {
    /// Connects as `pgtandem <name> <role>`.
    ///
    /// # Errors
    /// As [`Server::connect`]; also without the REPLICATION privilege.
    pub async fn connect(server: &Server, role: &str) -> Result<Self> {
        Self::connect_with(server, role, &[]).await
    }

    /// The same with settings for the session.
    ///
    /// # Errors
    /// As [`Walsender::connect`].
    pub async fn connect_with(server: &Server, role: &str, options: &[(&str, &str)]) -> Result<Self> {
        Ok(Self { wire: Wire::connect(server, role, Mode::Replication, options).await? })
    }

    /// The backend's process id, to find what it waits for.
    #[must_use]
    pub fn process_id(&self) -> i32 {
        self.wire.process_id()
    }

    /// The server's system identifier, which is made by initdb and stays with a cluster and its standbys.
    ///
    /// # Errors
    /// The server's, or the connection's.
    pub async fn identify_system(&mut self) -> Result<String> {
        let rows = self.wire.query("IDENTIFY_SYSTEM").await.doing(|| "asking the source for its identity")?;
        let first = rows.into_iter().next().and_then(|row| row.into_iter().next());
        first.flatten().ok_or_else(|| Error::bug("IDENTIFY_SYSTEM returned an unexpected row"))
    }

    /// Makes a logical slot for pgoutput and exports the snapshot of its consistent point. Waits for every
    /// transaction that was running when it began. A temporary slot goes with this connection.
    ///
    /// The syntax is that of PostgreSQL 13, which later versions still take.
    ///
    /// # Errors
    /// No free slot, the name is taken, no privilege, or the connection's.
    pub async fn create_slot(&mut self, name: &str, temporary: bool) -> Result<Cut> {
        let temporary = if temporary { "TEMPORARY " } else { "" };
        let sql =
            format!("CREATE_REPLICATION_SLOT {} {temporary}LOGICAL pgoutput EXPORT_SNAPSHOT", quote_identifier(name));
        let rows = self.wire.query(&sql).await.doing(|| format!("creating the replication slot {name}"))?;
        let malformed = || Error::bug("CREATE_REPLICATION_SLOT returned an unexpected row");
        let row = rows.into_iter().next().ok_or_else(malformed)?;
        let column = |at: usize| row.get(at).and_then(Option::as_deref).ok_or_else(malformed);
        Ok(Cut { lsn: column(1)?.parse().map_err(|_| malformed())?, snapshot: column(2)?.to_owned() })
    }

    /// Begins to stream from a slot. Transactions whose commit record begins before `from` are not sent.
    ///
    /// # Errors
    /// The slot is in use, gone or invalid, a publication is missing, or the connection's.
    pub async fn stream(mut self, slot: &str, from: Lsn, options: &[(&str, String)]) -> Result<ReplicationStream> {
        let options = options
            .iter()
            // The replication grammar knows no escape strings: only quotes are doubled.
            .map(|(name, value)| format!("{} '{}'", quote_identifier(name), value.replace('\'', "''")))
            .collect::<Vec<_>>()
            .join(", ");
        let sql = format!("START_REPLICATION SLOT {} LOGICAL {from} ({options})", quote_identifier(slot));
        self.wire.enter_copy(&sql).await.doing(|| format!("streaming from the slot {slot} at {from}"))?;
        Ok(ReplicationStream { wire: self.wire })
    }

    /// Whether the connection still stands, as far as a look at what arrived tells.
    ///
    /// # Errors
    /// It ended.
    pub async fn closed(&mut self) -> Result<()> {
        loop {
            let frame = self.wire.frame().await?;
            if frame.tag == b'E' {
                return Err(wire::error_of(&frame.body));
            }
        }
    }

    /// Ends the connection, and with it the exported snapshot and a temporary slot.
    pub async fn close(self) {
        self.wire.close().await;
    }
}

/// What a walsender sends while it streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// One message of the plugin.
    Data {
        /// Where it begins in the log; zero for messages that stand for no record.
        start: Lsn,
        /// The content.
        payload: Bytes,
    },
    /// The server is alive, and everything before `sent` was sent.
    Keepalive {
        /// The server's position in decoding.
        sent: Lsn,
        /// It wants an answer at once.
        reply: bool,
    },
}

/// A stream of changes from one slot.
pub struct ReplicationStream {
    wire: Wire,
}

impl ReplicationStream {
    /// The next event, if it was read already.
    ///
    /// # Errors
    /// The server ended the stream, or the bytes are no events.
    pub fn buffered(&mut self) -> Result<Option<Event>> {
        let Some(frame) = self.wire.buffered_frame()? else { return Ok(None) };
        match frame.tag {
            b'd' => event(frame.body).map(Some),
            b'E' => Err(wire::error_of(&frame.body)),
            // CopyDone: the server shuts down in an orderly way.
            b'c' | b'C' | b'Z' => Err(Error::new(Class::Retry, "stream_ended", "the server ended the stream")),
            tag => Err(wire::unexpected(tag, "streaming")),
        }
    }

    /// Reads whatever has arrived, and waits if nothing has. Cancellation safe.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn fill(&mut self) -> Result<usize> {
        self.wire.fill().await
    }

    /// The same, and then whatever else has arrived, up to about so many bytes. Cancellation safe.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn gulp(&mut self, most: usize) -> Result<usize> {
        let mut read = self.wire.fill().await?;
        while read < most {
            match self.wire.fill().now_or_never() {
                Some(Ok(more)) => read += more,
                // The end of the connection is met again by the next read; what was read before it may hold the server's last word.
                Some(Err(_)) | None => break,
            }
        }
        Ok(read)
    }

    /// Bytes read and not yet taken.
    #[must_use]
    pub fn waiting_bytes(&mut self) -> usize {
        self.wire.inbound().len()
    }

    /// Tells the server how far we are: what was received, and what is durable in the target. The server forgets
    /// everything before `durable`.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn confirm(&mut self, received: Lsn, durable: Lsn, ask_for_reply: bool) -> Result<()> {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let clock = i64::try_from(unix).unwrap_or(0).saturating_sub(POSTGRES_EPOCH_MICROS);
        let out = self.wire.outbound();
        out.put_u8(b'd');
        out.put_i32(4 + 1 + 8 * 4 + 1);
        out.put_u8(b'r');
        out.put_u64(received.max(durable).as_u64());
        out.put_u64(durable.as_u64());
        out.put_u64(durable.as_u64());
        out.put_i64(clock);
        out.put_u8(u8::from(ask_for_reply));
        self.wire.flush().await
    }

    /// Ends the stream so that the slot is free at once.
    pub async fn close(mut self) {
        self.wire.outbound().put_slice(b"c\0\0\0\x04");
        self.wire.close().await;
    }
}

fn event(mut body: Bytes) -> Result<Event> {
    let short = |_| Error::new(Class::Bug, "protocol", "the stream holds a message that ends too early");
    match body.try_get_u8().map_err(short)? {
        b'w' => {
            let start = body.try_get_u64().map_err(short)?;
            body.try_get_u64().map_err(short)?;
            body.try_get_i64().map_err(short)?;
            Ok(Event::Data { start: Lsn::new(start), payload: body })
        }
        b'k' => {
            let sent = body.try_get_u64().map_err(short)?;
            body.try_get_i64().map_err(short)?;
            let reply = body.try_get_u8().map_err(short)? != 0;
            Ok(Event::Keepalive { sent: Lsn::new(sent), reply })
        }
        kind => Err(Error::new(Class::Bug, "protocol", format!("the stream holds a message of kind {kind:#04x}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_event_brings_us_down(bytes: Vec<u8>) {
            drop(event(Bytes::from(bytes)));
        }
    }

    #[test]
    fn a_keepalive_is_read() {
        let mut bytes = vec![b'k'];
        bytes.extend_from_slice(&7u64.to_be_bytes());
        bytes.extend_from_slice(&0i64.to_be_bytes());
        bytes.push(1);
        assert_eq!(event(Bytes::from(bytes)).unwrap(), Event::Keepalive { sent: Lsn::new(7), reply: true });
    }
}
