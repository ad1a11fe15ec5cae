//! One walk through the phases, from where the move stands to its end.
//!
//! Each phase begins by asking the state and the servers what is there; none of its steps minds being repeated.

mod catching_up;
mod copying;

use std::collections::HashSet;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::steer::{Decision, Steering};
use super::{End, Supervisor, drop_slot};
use crate::config::{Ddl, Engine};
use crate::copy::{self, publication};
use crate::error::{Doing, Result};
use crate::follow::ddl::capture::Capture;
use crate::follow::{Follow, TABLES_TO_COPY, spool, subscription, watching};
use crate::postgres::catalog::{self, Table};
use crate::postgres::{Lsn, QualifiedName, Session};
use crate::schema::{self, Archive, DumpRequest, ForeignKeys, Programs, Restorer};
use crate::state::{Phase, TableState};

/// One walk through the phases; what is expensive to find out is kept from one phase to the next.
pub(super) struct Walk<'a> {
    supervisor: &'a Supervisor<'a>,
    epoch: i64,
    kit: Option<Arc<Kit>>,
    /// Tables of the move that neither side has any more, while the stream may still bring changes of them.
    gone: HashSet<QualifiedName>,
    /// Completes tables, from the copy on.
    finish: Option<Arc<copy::Finish>>,
}

/// The schema of the source, and what can restore it.
struct Kit {
    programs: Programs,
    archive: Archive,
    /// The foreign keys of the source right before it was dumped.
    foreign_keys: ForeignKeys,
    /// Whether our sessions on the target may keep triggers and foreign keys from firing.
    replica_role: bool,
}

impl<'a> Walk<'a> {
    pub(super) fn new(supervisor: &'a Supervisor<'a>, epoch: i64) -> Self {
        Self { supervisor, epoch, kit: None, gone: HashSet::new(), finish: None }
    }

    /// pg_dump and pg_restore, and a fresh dump of the schema: the archive of an earlier start is gone with its container.
    async fn kit(&mut self) -> Result<Arc<Kit>> {
        let s = self.supervisor;
        if let Some(kit) = &self.kit {
            return Ok(Arc::clone(kit));
        }
        let (source, target) = tokio::try_join!(s.source.connect("schema"), s.target.connect("schema"))?;
        let (from, to) = (major(&source).await?, major(&target).await?);
        let programs = Programs::find(from, to).await?;
        s.telemetry.activity("dumping the schema");
        let request = DumpRequest { source: &s.source, programs: &programs, scope: &s.config.scope, snapshot: None };
        let foreign_keys = ForeignKeys::all(&source).await?;
        let archive = schema::dump(request).await?;
        for what in archive.left_out() {
            tracing::info!("left out: {what}");
        }
        let replica_role = schema::can_set_replica_role(&target).await?;
        let kit = Arc::new(Kit { programs, archive, foreign_keys, replica_role });
        self.kit = Some(Arc::clone(&kit));
        Ok(kit)
    }

    fn restorer<'k>(&'k self, kit: &'k Kit) -> Restorer<'k> {
        let s = self.supervisor;
        Restorer {
            target: &s.target,
            store: &s.store,
            programs: &kit.programs,
            archive: &kit.archive,
            telemetry: &s.telemetry,
        }
    }

    async fn tables(&self) -> Result<Vec<Table>> {
        let s = self.supervisor;
        let session = s.source.connect("copy").await?;
        catalog::tables_in_scope(&*session, &s.config.scope).await
    }

    pub(super) async fn schema(&mut self) -> Result<Option<End>> {
        let s = self.supervisor;
        s.telemetry.phase(Phase::Schema);
        let restored = async {
            let kit = self.kit().await?;
            let restorer = self.restorer(&kit);
            if !restorer.is_restored().await? {
                restorer.before_data(s.config.copy.workers).await?;
            }
            Ok(())
        };
        if s.unless_stopped(restored).await?.is_none() {
            return Ok(Some(End::Stopped));
        }
        s.enter_phase(Phase::Copy).await?;
        Ok(None)
    }

    /// With `follow.spool` and once there is a slot: changes are kept here from now on, so that the source need not keep their WAL.
    /// Following goes on from there, and ends it.
    async fn keep_changes(&self) -> Result<()> {
        let s = self.supervisor;
        let publications = self.publications();
        s.spooling.begin(spool::Source { source: &s.source, store: &s.store, publications: &publications }).await
    }

    /// The first copy is complete, so everything that the schema becomes from then on is carried: a dump of today's schema would be ahead
    /// of what the target holds.
    async fn schema_comes_with_the_stream(&self) -> Result<bool> {
        Ok(self.supervisor.record().await?.constraints_done && self.is_captured().await?)
    }

    /// Whether our sessions on the target may keep triggers and foreign keys from firing.
    async fn can_set_replica_role(&self) -> Result<bool> {
        let session = self.supervisor.target.connect("control").await?;
        schema::can_set_replica_role(&session).await
    }

    /// Where schema changes come with the stream. False if told to stop.
    async fn follow_up_to(&self, lsn: Lsn, stop: &CancellationToken) -> Result<bool> {
        let replica_role = self.can_set_replica_role().await?;
        let publications = self.publications();
        let follow = Follow { until: Some(lsn), ..self.follower(replica_role, true, &publications) };
        follow.run(stop).await?;
        Ok(!stop.is_cancelled())
    }

    /// The worker of a subscription cannot read what was captured, and once nothing is captured any more, tables that came or
    /// went are taken for a difference that a person has to settle. So before the capture is removed, our stream goes up to
    /// here. What is captured in the moment in between, before a death, is left to that person. False if told to stop.
    async fn pass_what_was_captured(&self, stop: &CancellationToken) -> Result<bool> {
        let s = self.supervisor;
        if s.config.follow.engine != Engine::Subscription || !self.schema_comes_with_the_stream().await? {
            return Ok(true);
        }
        let head = catalog::end_of_log(&*s.source.connect("catalog").await?).await?;
        tracing::info!(lsn = %head, "following past the schema changes that are in the stream");
        self.follow_up_to(head, stop).await
    }

    /// Has the source write schema changes into the stream, where they are to be carried and both sides allow it.
    async fn capture(&self) -> Result<()> {
        let s = self.supervisor;
        let (source, target) = tokio::try_join!(s.source.connect("publication"), s.target.connect("schema"))?;
        let capture = Capture::of(&s.config.name);
        let carried = s.config.follow.ddl == Ddl::Replicate && s.config.follow.engine == Engine::Stream;
        if carried && schema::can_set_replica_role(&target).await? {
            capture.install(&source, &s.config.scope).await?;
        } else {
            capture.remove(&source).await?;
        }
        Ok(())
    }

    async fn forget_capture(&self) -> Result<()> {
        let s = self.supervisor;
        let session = s.source.connect("clean").await?;
        Capture::of(&s.config.name).remove(&session).await.map(drop)
    }

    /// Whether schema changes come with the stream. Those that came before the setting changed have their place in it still.
    async fn is_captured(&self) -> Result<bool> {
        let s = self.supervisor;
        let session = s.source.connect("catalog").await?;
        Capture::of(&s.config.name).is_installed(&session).await
    }

    async fn nothing_to_copy(&self) -> Result<bool> {
        Ok(self.supervisor.store.tables().await?.iter().all(|table| table.state == TableState::Copied))
    }

    /// Follows, and ends following in an orderly way once `enough` completes or `stop` is cancelled.
    async fn follow_while(
        &self,
        replica_role: bool,
        stop: &CancellationToken,
        enough: impl Future<Output = ()>,
    ) -> Result<()> {
        let publications = self.publications();
        let follow = self.follower(replica_role, self.is_captured().await?, &publications);
        let mut following = std::pin::pin!(follow.run(stop));
        tokio::select! {
            ended = &mut following => return ended,
            () = enough => stop.cancel(),
        }
        following.await
    }

    fn publications(&self) -> [String; 2] {
        self.supervisor.config.name.publications()
    }

    fn follower<'f>(&'f self, replica_role: bool, captured: bool, publications: &'f [String]) -> Follow<'f> {
        let s = self.supervisor;
        Follow {
            config: s.config,
            source: &s.source,
            target: &s.target,
            store: &s.store,
            epoch: self.epoch,
            publications,
            replica_role,
            durable: &s.durable,
            marker: &s.marker,
            gate: &s.gate,
            gone: &self.gone,
            captured,
            until: None,
            spooling: &s.spooling,
            telemetry: &s.telemetry,
        }
    }

    /// Tables may have come or gone on the source since the last start, and a person may have done the same on the
    /// target; and a person may have asked for some to be copied again. Returns whether there is one to copy.
    async fn take_in_changes(&mut self) -> Result<bool> {
        let s = self.supervisor;
        let (source, target) = tokio::try_join!(s.source.connect("catalog"), s.target.connect("catalog"))?;
        self.gone.clear();
        let captured = self.is_captured().await?;
        let head = catalog::end_of_log(&*source).await?;
        let progress = s.store.progress().await?.lsn;
        let target: HashSet<QualifiedName> =
            catalog::tables(&*target).await?.into_iter().map(|table| table.name).collect();
        let mut known: HashSet<QualifiedName> = s.store.tables().await?.into_iter().map(|table| table.name).collect();
        known.retain(|name| !s.config.scope.excludes(name));
        let mut new = Vec::new();
        for table in catalog::tables(&*source).await? {
            if known.remove(&table.name) || !s.config.scope.contains(&table.name, &table.above) {
                continue;
            }
            if !target.contains(&table.name) {
                if captured {
                    // The stream brings it, if it was made since schema changes are captured; else the watch finds it.
                    continue;
                }
                return Err(watching::added(&table.name));
            }
            new.push((table.name, table.bytes));
        }
        for gone in known {
            if target.contains(&gone) {
                if captured {
                    continue;
                }
                return Err(watching::dropped(&gone));
            }
            tracing::info!(table = %gone.plain(), "neither side has the table any more");
            if progress < head {
                // What the stream still brings of it came before this moment, and has no place any more.
                s.store.record_gone(&gone, head).await?;
                self.gone.insert(gone);
            } else {
                s.store.forget_table(&gone).await?;
            }
        }
        s.store.plan_tables(&new).await?;
        if captured {
            self.copy_unpublished().await?;
        }
        Ok(!self.nothing_to_copy().await?)
    }

    /// Where schema changes come with the stream, a table that could not be published in its own transaction is published by the
    /// next copy, before its cut; what changed until then is in that copy. One that has another name by now may be meant by
    /// an old name: then a table is copied that did not need it, and the other one when it is known by its name.
    async fn copy_unpublished(&self) -> Result<()> {
        let s = self.supervisor;
        let records = s.store.tables().await?;
        let copied: HashSet<QualifiedName> = records
            .into_iter()
            .filter(|table| table.state == TableState::Copied && !self.gone.contains(&table.name))
            .map(|table| table.name)
            .collect();
        let mut tables = self.tables().await?;
        tables.retain(|table| copied.contains(&table.name));
        let session = s.source.connect("catalog").await?;
        let unpublished = publication::unpublished(&*session, self.publications(), &tables).await?;
        for table in &unpublished {
            tracing::warn!(table = %table.plain(), "changes of the table were not published; it is published and copied again");
        }
        if unpublished.is_empty() { Ok(()) } else { s.store.copy_again(self.epoch, &unpublished).await }
    }

    pub(super) async fn follow(&mut self) -> Result<Option<End>> {
        let s = self.supervisor;
        if self.take_in_changes().await? {
            s.enter_phase(Phase::Copy).await?;
            return Ok(None);
        }
        let engine = s.config.follow.engine;
        // What the stream may still bring of tables that are gone, or of the schema, a worker could not pass over; nor what some of our
        // own workers committed beyond progress; and what the spool holds, it does not know.
        if engine == Engine::Subscription
            && (!self.gone.is_empty()
                || self.is_captured().await?
                || s.store.workers_ahead().await?.is_some()
                || s.spooling.is_ahead(&s.store).await?)
        {
            s.enter_phase(Phase::Catchup).await?;
            return Ok(None);
        }
        s.enter_phase(Phase::Follow).await?;
        if engine == Engine::Stream {
            self.only_our_stream().await?;
        }
        let replica_role = self.can_set_replica_role().await?;
        let steering = Steering::new(s, self.epoch);
        let publications = self.publications();
        let follow = self.follower(replica_role, self.is_captured().await?, &publications);
        let stop = s.stop.child_token();
        let following = async {
            match engine {
                Engine::Stream => follow.run(&stop).await,
                Engine::Subscription => follow.run_by_subscription(&stop).await,
            }
        };
        let decision = match steering.beside(following, &stop).await {
            Err(error) if error.code() == TABLES_TO_COPY => Decision::CopyAgain,
            other => other?,
        };
        match decision {
            Decision::Stopped => Ok(Some(End::Stopped)),
            Decision::Reached => Ok(Some(End::Reached)),
            Decision::CopyAgain => {
                s.enter_phase(Phase::Copy).await?;
                Ok(None)
            }
            Decision::Switched => {
                self.finish().await?;
                Ok(Some(End::Done))
            }
        }
    }

    /// Before our stream: the worker of a subscription has ended, and progress says where it stood.
    async fn only_our_stream(&self) -> Result<()> {
        let s = self.supervisor;
        subscription::leave(&s.source, &s.target, &s.store, self.epoch).await.map(drop)
    }

    /// After the switch: lets the source forget us, and checks what could not be checked under the fence.
    pub(super) async fn finish(&mut self) -> Result<()> {
        let s = self.supervisor;
        s.enter_phase(Phase::Done).await?;
        // First, for it would be pulling from a source that may be switched off.
        if let Err(error) = subscription::remove(&s.target, &s.config.name).await {
            tracing::warn!(%error, "the subscription could not be removed; `pgtandem clean` does it later");
        }
        // The source keeps WAL until then. It may be switched off already; its slot goes with it then.
        if let Err(error) = drop_slot(&s.source, &s.config.name.slot()).await {
            tracing::warn!(%error, "the slot could not be dropped; `pgtandem clean` does it later");
        }
        // It was read to its end; what is left are its note and its lock.
        s.spooling.close().await;
        if let Err(error) = spool::clean(s.config) {
            tracing::warn!(%error, "the spool's folder could not be removed; `pgtandem clean` does it later");
        }
        if let Err(error) = self.forget_capture().await {
            tracing::warn!(%error, "the capture of schema changes could not be removed; `pgtandem clean` does it later");
        }
        let session = s.target.connect("control").await?;
        if !schema::can_set_replica_role(&session).await? {
            // The definitions are asked of the source, before it may be switched off.
            match self.kit().await {
                Ok(kit) => kit.archive.foreign_keys().validate(&s.target, &s.store).await,
                Err(error) => tracing::warn!(
                    %error,
                    "foreign keys that were added at the cutover may not be validated yet, and the source cannot be asked \
                     which; ALTER TABLE … VALIDATE CONSTRAINT does it"
                ),
            }
        }
        Ok(())
    }
}

async fn major(session: &Session) -> Result<u32> {
    let row = session
        .query_one("SELECT pg_catalog.current_setting('server_version_num')::int4 / 10000", &[])
        .await
        .doing(|| "asking for the version")?;
    Ok(u32::try_from(row.try_get::<_, i32>(0)?).unwrap_or(0))
}
