//! The thread that reads the stream.
//!
//! The reader has a thread and a runtime of its own, for the sake of its pauses ([`super::rhythm`]). An asynchronous runtime
//! waits for all its sockets at once, and wakes for each packet that arrives on any of them, whether somebody wants it or not; a
//! walsender sends a packet for every change. A thread that sleeps is not woken.

use tokio::sync::oneshot;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::inflow::Inflow;
use super::reader::Reader;
use super::slot::{self, Slot};
use crate::error::{Class, Error, Result};
use crate::postgres::pgoutput::Protocol;
use crate::postgres::replication::{ReplicationStream, Walsender};
use crate::postgres::{Lsn, Server, quote_identifier};
use crate::state::MoveRecord;

/// What the stream is opened with.
#[derive(Clone)]
pub(super) struct Opening {
    pub source: Server,
    /// What the connection calls itself in the source's `pg_stat_activity`.
    pub role: &'static str,
    pub slot: Slot,
    pub record: Option<MoveRecord>,
    pub publications: Vec<String>,
    /// `server_version_num` of the source.
    pub version: i32,
    pub from: Lsn,
    /// [`protocol`]
    pub protocol: Protocol,
}

/// What to agree on with a source of this version: whether it sends large transactions while they are in progress. 13 cannot.
pub(super) fn protocol(version: i32, streamed: bool) -> Protocol {
    if streamed && version >= 140_000 { Protocol::V2 } else { Protocol::V1 }
}

impl Opening {
    /// Opens the stream.
    ///
    /// # Errors
    /// Those of [`Walsender::connect`] and [`Walsender::stream`]; class operator: it is another server.
    pub(super) async fn open(&self) -> Result<ReplicationStream> {
        let mut walsender = Walsender::connect(&self.source, self.role).await?;
        slot::check_identity(self.record.as_ref(), &walsender.identify_system().await?)?;
        let publications: Vec<String> = self.publications.iter().map(|name| quote_identifier(name)).collect();
        let mut options = vec![("publication_names", publications.join(","))];
        match self.protocol {
            Protocol::V1 => options.push(("proto_version", "1".to_owned())),
            // Nothing of the later ones is wanted: prepared transactions come when they commit, and one applier needs no hints for
            // several.
            _ => options.extend([("proto_version", "2".to_owned()), ("streaming", "on".to_owned())]),
        }
        // From 15 on a transaction in which nothing is published is not sent at all, and the marker is such a one: only
        // its message makes it travel. 13 knows no messages and sends every transaction.
        if self.version >= 140_000 {
            options.push(("messages", "true".to_owned()));
        }
        walsender.stream(self.slot.name(), self.from, &options).await
    }
}

/// A reader at work. Dropped, it ends without a last word to the source.
pub(super) struct Reading {
    outcome: oneshot::Receiver<Result<()>>,
    _ended_with_us: DropGuard,
}

impl Reading {
    /// Opens the inflow and reads it, until `stop`. Returns once it stands.
    ///
    /// # Errors
    /// Those of opening it.
    pub(super) async fn start(
        inflow: impl Future<Output = Result<Inflow>> + Send + 'static,
        reader: impl FnOnce(Inflow) -> Reader + Send + 'static,
        stop: CancellationToken,
    ) -> Result<Self> {
        let (opened, stands) = oneshot::channel();
        let (ended, outcome) = oneshot::channel();
        let dropped = CancellationToken::new();
        let given_up = dropped.clone();
        let work = async move {
            match inflow.await {
                Ok(inflow) => {
                    // Whoever waited for this may have given up; then `given_up` ends all of it.
                    drop(opened.send(Ok(())));
                    reader(inflow).run(stop).await
                }
                Err(error) => {
                    drop(opened.send(Err(error)));
                    Ok(())
                }
            }
        };
        let thread = move || {
            let outcome = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime.block_on(async {
                    tokio::select! {
                        outcome = work => outcome,
                        () = given_up.cancelled() => Ok(()),
                    }
                }),
                Err(error) => Err(no_thread(&error)),
            };
            drop(ended.send(outcome));
        };
        std::thread::Builder::new().name("stream".to_owned()).spawn(thread).map_err(|error| no_thread(&error))?;
        let reading = Self { outcome, _ended_with_us: dropped.drop_guard() };
        match stands.await {
            Ok(opened) => opened.map(|()| reading),
            Err(_) => Err(reading.ended().await.err().unwrap_or_else(gone)),
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Those of reading.
    pub(super) async fn ended(self) -> Result<()> {
        self.outcome.await.unwrap_or_else(|_| Err(gone()))
    }
}

fn gone() -> Error {
    Error::bug("the thread that reads the stream ended without a word")
}

pub(super) fn no_thread(error: &std::io::Error) -> Error {
    Error::new(Class::Wait, "no_thread", format!("no thread could be started to read the stream: {error}"))
        .hint("raise the limit of processes or of memory of the daemon")
}
