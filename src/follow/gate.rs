//! The gate between following and a target whose triggers are on.

use tokio::sync::watch;

/// Keeps following from beginning anything on the target while a cutover has brought back there what must not react to
/// applied rows. A cutover closes it, and opens it once all that is held back again.
///
/// Our own applier looks at it before each transaction, so it holds at once. The worker of a subscription must be stopped
/// first: [`Gate::holds`] waits for that.
#[derive(Clone)]
pub struct Gate(watch::Sender<Door>);

#[derive(Clone, Copy)]
struct Door {
    open: bool,
    /// Closing it takes effect only once the engine says so.
    slow: bool,
    /// Nothing is applied.
    held: bool,
}

impl Default for Gate {
    fn default() -> Self {
        Self(watch::Sender::new(Door { open: true, slow: false, held: false }))
    }
}

impl Gate {
    /// From now on nothing is begun, or soon nothing more.
    pub fn close(&self) {
        self.0.send_modify(|door| (door.open, door.held) = (false, door.held || !door.slow));
    }

    /// Waits until nothing is applied any more behind the closed gate.
    pub async fn holds(&self) {
        // An error would mean that it is gone; it is held here.
        drop(self.0.subscribe().wait_for(|door| door.held).await);
    }

    /// Following goes on.
    pub fn open(&self) {
        self.0.send_modify(|door| (door.open, door.held) = (true, false));
    }

    /// What kind of engine stands behind it.
    pub(super) fn engage(&self, slow: bool) {
        self.0.send_modify(|door| (door.slow, door.held) = (slow, !slow && !door.open));
    }

    /// The engine has stopped.
    pub(super) fn hold(&self) {
        self.0.send_modify(|door| door.held = true);
    }

    pub(super) fn is_open(&self) -> bool {
        self.0.borrow().open
    }

    /// Waits until it is open.
    pub(super) async fn pass(&self) {
        drop(self.0.subscribe().wait_for(|door| door.open).await);
    }

    /// For an engine that holds: waits until the gate is open, or was open and is closed again.
    pub(super) async fn changed(&self) {
        drop(self.0.subscribe().wait_for(|door| door.open || !door.held).await);
    }

    /// Waits until it is closed.
    pub(super) async fn closed(&self) {
        drop(self.0.subscribe().wait_for(|door| !door.open).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(gate: &Gate) -> bool {
        gate.0.borrow().held
    }

    #[test]
    fn our_applier_holds_at_once_and_a_worker_once_it_says_so() {
        let gate = Gate::default();
        gate.engage(false);
        gate.close();
        assert!(holds(&gate));
        gate.open();
        gate.engage(true);
        gate.close();
        assert!(!holds(&gate));
        gate.hold();
        assert!(holds(&gate));
    }

    #[test]
    fn a_gate_that_is_closed_again_waits_for_the_worker_again() {
        let gate = Gate::default();
        gate.engage(true);
        gate.close();
        gate.hold();
        gate.open();
        gate.close();
        assert!(!holds(&gate), "the worker may be on its way back");
    }
}
