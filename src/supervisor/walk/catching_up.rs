//! The phase `catchup`: until the target is a state that the source once had, and has its foreign keys.

use std::time::Duration;

use super::super::End;
use super::{Kit, Walk};
use crate::config::Engine;
use crate::error::{Error, Result};
use crate::follow::TABLES_TO_COPY;
use crate::postgres::{Lsn, catalog};
use crate::schema::ForeignKeys;
use crate::state::Phase;

/// In bytes of WAL: a busy source is never at exactly zero.
const NEARLY_NOTHING: u64 = 16 * 1024 * 1024;

impl Walk<'_> {
    /// Follows until the target is a state that the source once had, then adds the foreign keys, which only such a
    /// state satisfies. Nothing is applied while they are checked.
    pub(in crate::supervisor) async fn catch_up(&mut self) -> Result<Option<End>> {
        let s = self.supervisor;
        s.telemetry.phase(Phase::Catchup);
        self.only_our_stream().await?;
        if self.take_in_changes().await? {
            s.enter_phase(Phase::Copy).await?;
            return Ok(None);
        }
        let complete = self.schema_comes_with_the_stream().await?;
        let record = s.record().await?;
        let replica_role = self.can_set_replica_role().await?;
        let mut beyond = record.last_cut_lsn.unwrap_or_default();
        let stop = s.stop.child_token();
        if !self.pass_what_was_captured(&stop).await? {
            return Ok(Some(End::Stopped));
        }
        if !self.nothing_to_copy().await? {
            s.enter_phase(Phase::Copy).await?;
            return Ok(None);
        }
        if !complete {
            beyond = beyond.max(self.kit_of_today().await?);
        }
        if s.config.follow.engine == Engine::Subscription {
            // A worker cannot read what was captured: our stream goes past the last of it. The end of the log is asked each
            // time, for a death may have come between the two.
            self.capture().await?;
            beyond = beyond.max(catalog::end_of_log(&*s.source.connect("catalog").await?).await?);
        }
        let mut durable = s.durable.subscribe();
        let caught_up = async {
            loop {
                let progress = durable.borrow_and_update().lsn;
                let is_near = s.telemetry.overview().lag.bytes.is_some_and(|bytes| bytes < NEARLY_NOTHING);
                // A spool is behind us then: a worker of the target could not read it.
                if progress >= beyond && is_near && s.spooling.is_behind(progress).await {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        match self.follow_while(replica_role, &stop, caught_up).await {
            Err(error) if error.code() == TABLES_TO_COPY => {
                s.enter_phase(Phase::Copy).await?;
                return Ok(None);
            }
            other => other?,
        }
        if s.stop.is_cancelled() {
            return Ok(Some(End::Stopped));
        }
        if !complete {
            if self.foreign_keys_changed().await? {
                tracing::info!("foreign keys of the source changed meanwhile; following on before they are added");
                return Ok(None);
            }
            // Nothing is applied while they are checked.
            self.keep_changes().await?;
            let kit = self.kit.as_ref().ok_or_else(|| Error::bug("no schema archive"))?;
            if s.unless_stopped(self.complete_constraints(kit)).await?.is_none() {
                return Ok(Some(End::Stopped));
            }
        }
        s.enter_phase(Phase::Follow).await?;
        Ok(None)
    }

    /// A dump with the foreign keys of this moment, and a point of the source's log behind it.
    ///
    /// The target has none of them yet, so one that is dropped on the source meanwhile is carried as one that was not there, and
    /// the dump would bring it back. Therefore: the keys are read, then the schema is dumped, then everything up to the end of the log
    /// is followed, and the keys are read again. If they are the same, those of the dump are those that the target must have
    /// where it stands; if not, all of this is done again.
    async fn kit_of_today(&mut self) -> Result<Lsn> {
        if self.kit.is_some() && self.foreign_keys_changed().await? {
            self.kit = None;
        }
        self.kit().await?;
        catalog::end_of_log(&*self.supervisor.source.connect("catalog").await?).await
    }

    /// Whether the source has other foreign keys than when the schema was dumped.
    async fn foreign_keys_changed(&self) -> Result<bool> {
        let kit = self.kit.as_ref().ok_or_else(|| Error::bug("no schema archive"))?;
        let session = self.supervisor.source.connect("catalog").await?;
        Ok(ForeignKeys::all(&session).await? != kit.foreign_keys)
    }

    /// What only a state that the source once had satisfies.
    async fn complete_constraints(&self, kit: &Kit) -> Result<()> {
        let s = self.supervisor;
        let restorer = self.restorer(kit);
        if kit.replica_role {
            restorer.foreign_keys(s.config.copy.index_workers).await?;
        } else {
            let known = s.store.held_back().await?;
            let session = s.target.connect("schema").await?;
            let mut keys = kit.archive.foreign_keys().held_back(&session).await?;
            keys.retain(|key| !known.contains(&key.what));
            s.store.hold_back(&keys).await?;
        }
        restorer.refresh_materialized_views().await?;
        s.store.record_constraints_done().await
    }
}
