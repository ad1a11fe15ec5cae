//! The queue between reader and applier, bounded in bytes.
//!
//! A message of one byte and a row of a gigabyte both pass: an item takes as much of the budget as it weighs, an item
//! heavier than the whole budget takes all of it and travels alone.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// The end that sends.
pub(super) struct Sender<T> {
    items: mpsc::UnboundedSender<(T, Weight)>,
    shared: Arc<Shared>,
}

/// The end that receives.
pub(super) struct Receiver<T> {
    items: mpsc::UnboundedReceiver<(T, Weight)>,
}

struct Shared {
    budget: Arc<Semaphore>,
    total: u32,
    waiting: AtomicU64,
}

/// A part of the budget; given back when dropped.
pub(super) struct Weight {
    _permit: OwnedSemaphorePermit,
    shared: Arc<Shared>,
    bytes: u32,
}

impl Drop for Weight {
    fn drop(&mut self) {
        self.shared.waiting.fetch_sub(u64::from(self.bytes), Ordering::Relaxed);
    }
}

/// A queue that holds at most `bytes`.
pub(super) fn queue<T>(bytes: u64) -> (Sender<T>, Receiver<T>) {
    let total = u32::try_from(bytes).unwrap_or(u32::MAX).max(1);
    let (sender, receiver) = mpsc::unbounded_channel();
    let budget = Arc::new(Semaphore::new(total as usize));
    let shared = Arc::new(Shared { budget, total, waiting: AtomicU64::new(0) });
    (Sender { items: sender, shared }, Receiver { items: receiver })
}

impl<T> Sender<T> {
    /// Waits until the queue has room for so many bytes. Cancellation safe: a dropped wait takes nothing.
    pub(super) fn room(&self, bytes: usize) -> impl Future<Output = Option<Weight>> + use<T> {
        let shared = Arc::clone(&self.shared);
        async move {
            let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).clamp(1, shared.total);
            let permit = Arc::clone(&shared.budget).acquire_many_owned(bytes).await.ok()?;
            shared.waiting.fetch_add(u64::from(bytes), Ordering::Relaxed);
            Some(Weight { _permit: permit, shared, bytes })
        }
    }

    /// Puts an item into the room that was waited for; false if the receiver is gone.
    pub(super) fn send(&self, item: T, weight: Weight) -> bool {
        self.items.send((item, weight)).is_ok()
    }

    /// Bytes in the queue, and in the hands of the receiver.
    pub(super) fn waiting_bytes(&self) -> u64 {
        self.shared.waiting.load(Ordering::Relaxed)
    }

    /// Completes when the receiver is gone.
    pub(super) async fn closed(&self) {
        self.items.closed().await;
    }
}

impl<T> Receiver<T> {
    /// The next item; its weight is given back when the returned guard is dropped. `None` once the sender is gone.
    pub(super) async fn receive(&mut self) -> Option<(T, Weight)> {
        self.items.recv().await
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn room_is_given_back_when_an_item_was_used() {
        let (sender, mut receiver) = queue::<&str>(10);
        let first = sender.room(8).await.unwrap();
        assert!(sender.send("first", first));
        assert!(sender.room(8).now_or_never().is_none(), "eight more do not fit");
        drop(receiver.receive().await.unwrap());
        assert!(sender.room(8).now_or_never().is_some());
        assert_eq!(sender.waiting_bytes(), 0);
    }

    #[tokio::test]
    async fn an_item_heavier_than_the_queue_travels_alone() {
        let (sender, _receiver) = queue::<()>(10);
        let heavy = sender.room(1_000_000).await.unwrap();
        assert!(sender.room(1).now_or_never().is_none());
        drop(heavy);
        assert!(sender.room(1).now_or_never().is_some());
    }
}
