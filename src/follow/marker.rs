//! What the cutover's marker is recognised by, in either engine. Nothing here talks to a server.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::postgres::Lsn;

/// Where a cutover leaves the marker that it waits for.
///
/// A marker is a transaction on the source whose id is known before it commits, so it is recognised by that id on every
/// version; PostgreSQL 13 does not send logical messages through pgoutput, but it sends their transactions.
///
/// The engine `subscription` sees no transactions. It recognises the marker by the position behind its commit, which the
/// cutover then says as well.
#[derive(Clone, Default)]
pub struct MarkerWatch(Arc<(Mutex<Expected>, Notify)>);

#[derive(Default)]
struct Expected {
    marker: Option<Marker>,
    /// Where the source's log stood after the marker's commit.
    committed: Option<Lsn>,
    by_position: bool,
}

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
        let mut expected = self.lock();
        (expected.marker, expected.committed) = (Some(marker), None);
    }

    /// Whether the position behind the marker's commit is to be said.
    #[must_use]
    pub fn wants_position(&self) -> bool {
        self.lock().by_position
    }

    /// The marker has committed before this position.
    pub fn committed(&self, id: u64, before: Lsn) {
        let mut expected = self.lock();
        if expected.marker.is_some_and(|marker| marker.id == id) {
            expected.committed = Some(before);
            self.0.1.notify_one();
        }
    }

    /// The marker's id, if this is its transaction; it is expected once.
    pub(super) fn is_expected(&self, xid: u32) -> Option<u64> {
        self.lock().marker.take_if(|marker| marker.xid == xid).map(|marker| marker.id)
    }

    /// From now on it is recognised by its position, or by its transaction.
    pub(super) fn recognise_by_position(&self, by_position: bool) {
        self.lock().by_position = by_position;
    }

    /// Whether one is looked for by its position.
    pub(super) fn is_waited_for(&self) -> bool {
        let expected = self.lock();
        expected.marker.is_some() && expected.committed.is_some()
    }

    /// Waits until the position of a marker is said.
    pub(super) async fn position_said(&self) {
        self.0.1.notified().await;
    }

    /// The marker's id, if everything before `lsn` holds it; it is expected once.
    pub(super) fn is_within(&self, lsn: Lsn) -> Option<u64> {
        let mut expected = self.lock();
        let committed = expected.committed?;
        expected.marker.take_if(|_| committed <= lsn).map(|marker| marker.id)
    }

    fn lock(&self) -> MutexGuard<'_, Expected> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
