//! One walk through the phases, from where the move stands to its end.
//!
//! Each phase begins by asking the state and the servers what is there; none of its steps minds being repeated.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::steer::{Decision, Steering};
use super::{End, Supervisor, Until, drop_slot};
use crate::config::{CopyMethod, Ddl, Engine};
use crate::copy::{self, by_hand, cut, publication};
use crate::error::{Doing, Error, Result};
use crate::follow::ddl::capture::Capture;
use crate::follow::{Follow, TABLES_TO_COPY, spool, subscription, unkeyed, watching};
use crate::leftover::identity;
use crate::postgres::catalog::{self, Table};
use crate::postgres::replication::{Cut, Walsender};
use crate::postgres::{Lsn, QualifiedName, Session};
use crate::schema::{self, Archive, DataArchive, DumpRequest, ForeignKeys, Listeners, Loading, Programs, Restorer};
use crate::state::{Phase, TableState};
use crate::telemetry::Way;

/// In bytes of WAL: a busy source is never at exactly zero.
const NEARLY_NOTHING: u64 = 16 * 1024 * 1024;

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
        let kit = self.kit().await?;
        let restorer = self.restorer(&kit);
        if !restorer.is_restored().await? {
            restorer.before_data(s.config.copy.workers).await?;
        }
        s.enter_phase(Phase::Copy).await?;
        Ok(None)
    }

    pub(super) async fn copy(&mut self) -> Result<Option<End>> {
        let spooling = self.supervisor.spooling.clone();
        // What is copied without its changes is copied for nothing.
        tokio::select! {
            biased;
            copied = self.copy_tables() => copied,
            error = spooling.failed() => Err(error),
        }
    }

    async fn copy_tables(&mut self) -> Result<Option<End>> {
        let s = self.supervisor;
        s.telemetry.phase(Phase::Copy);
        self.only_our_stream().await?;
        self.keep_changes().await?;
        self.finish = None;
        // Tables that came to the move later are in no archive and in nobody's copy by hand.
        let first = !self.has_followed().await?;
        if first {
            match s.config.copy.method {
                CopyMethod::Dump => {
                    if s.unless_stopped(self.copy_by_dump()).await?.is_none() {
                        return Ok(Some(End::Stopped));
                    }
                }
                CopyMethod::None if self.nothing_copied().await? => by_hand::accept(&s.store).await?,
                CopyMethod::Copy | CopyMethod::None => {}
            }
        }
        if self.copy_rows().await? == copy::Outcome::Stopped {
            return Ok(Some(End::Stopped));
        }
        if first && s.config.copy.method == CopyMethod::Dump && !s.config.copy.keep_archive {
            self.remove_archive().await?;
        }
        self.keep_changes().await?;
        if s.unless_stopped(self.complete_tables()).await?.is_none() {
            return Ok(Some(End::Stopped));
        }
        s.enter_phase(Phase::Catchup).await?;
        Ok((s.options.until == Until::Copy).then_some(End::Reached))
    }

    /// Finds out what tables need once they are copied. Where the schema comes with the stream, and there is no kit, they have it.
    async fn to_finish(&self, kit: Option<&Kit>) -> Result<Arc<copy::Finish>> {
        let s = self.supervisor;
        copy::Finish::end_leftovers(&s.target).await?;
        let missing = match kit {
            None => HashMap::new(),
            Some(kit) => {
                let (source, target) = tokio::try_join!(s.source.connect("schema"), s.target.connect("schema"))?;
                schema::indexes::missing(&source, &target, &kit.archive).await?
            }
        };
        Ok(Arc::new(copy::Finish::new(&s.target, s.config.copy.index_workers, missing)))
    }

    /// Keys, indexes and statistics, once the rows are there.
    async fn complete_tables(&mut self) -> Result<()> {
        let s = self.supervisor;
        if self.schema_comes_with_the_stream().await? {
            let tables = self.tables_there().await?;
            return copy::analyze(&s.target, &tables, s.config.copy.index_workers, &s.telemetry).await;
        }
        let kit = self.kit().await?;
        s.telemetry.activity("building keys and indexes");
        let finish = match self.finish.take() {
            Some(finish) => finish,
            None => self.to_finish(Some(&kit)).await?,
        };
        let restorer = self.restorer(&kit);
        let building = async {
            let mut analyzed = finish.rest().await;
            if finish.has_put_off() {
                analyzed.extend(self.to_finish(Some(&kit)).await?.rest().await);
            }
            restorer.after_data(s.config.copy.index_workers).await?;
            Ok(analyzed)
        };
        let (mut tables, analyzed) = tokio::try_join!(self.tables(), building)?;
        tables.retain(|table| !analyzed.contains(&table.name));
        copy::analyze(&s.target, &tables, s.config.copy.index_workers, &s.telemetry).await?;
        restorer.hold_back().await
    }

    /// With `follow.spool` and once there is a slot: changes are kept here from now on, so that the source need not keep their WAL.
    /// Following goes on from there, and ends it.
    async fn keep_changes(&self) -> Result<()> {
        let s = self.supervisor;
        let publications = self.publications();
        s.spooling.begin(spool::Source { source: &s.source, store: &s.store, publications: &publications }).await
    }

    /// Under the move's first cut, or, where some tables were copied before, the rest under a newer one.
    async fn copy_rows(&mut self) -> Result<copy::Outcome> {
        let s = self.supervisor;
        if self.all_copied().await? {
            return Ok(copy::Outcome::Complete);
        }
        let cancel = s.stop.child_token();
        if !self.pass_what_was_captured(&cancel).await? {
            return Ok(copy::Outcome::Stopped);
        }
        let kit = if self.schema_comes_with_the_stream().await? {
            None
        } else {
            let Some(kit) = s.unless_stopped(self.kit()).await? else { return Ok(copy::Outcome::Stopped) };
            Some(kit)
        };
        // With thousands of tables each of them takes its time.
        let ready = async { tokio::try_join!(self.to_finish(kit.as_deref()), self.publish()) };
        let Some((finish, ())) = s.unless_stopped(ready).await? else { return Ok(copy::Outcome::Stopped) };
        self.finish = Some(Arc::clone(&finish));
        s.telemetry.copy_way(Way::Direct);
        s.telemetry.activity(
            "copying rows; keys and indexes are built as tables are complete, and the last of them after all rows",
        );
        let (exporter, cut) = self.cut(&cancel).await?;
        if !self.schema_stands_at(&cut, &cancel).await? {
            return Ok(copy::Outcome::Stopped);
        }
        self.keep_changes().await?;
        let context = copy::Context {
            source: s.source.clone(),
            target: s.target.clone(),
            store: s.store.clone(),
            epoch: self.epoch,
            scope: s.config.scope.clone(),
            settings: s.config.copy.clone(),
            telemetry: s.telemetry.clone(),
            captured: self.is_captured().await?,
            spooling: s.spooling.clone(),
            finish,
            cancel,
        };
        copy::run(&context, exporter, &cut).await
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

    /// The tables of the move that both sides have.
    async fn tables_there(&self) -> Result<Vec<Table>> {
        let session = self.supervisor.target.connect("catalog").await?;
        let there: HashSet<QualifiedName> =
            catalog::tables(&*session).await?.into_iter().map(|table| table.name).collect();
        let mut tables = self.tables().await?;
        tables.retain(|table| there.contains(&table.name));
        Ok(tables)
    }

    /// A table that is copied again needs the schema that it has at the cut. Where schema changes come with the stream, they are
    /// applied up to there, with everything else before them; what the tables that are to be copied hold does not matter
    /// meanwhile. Before the first copy is complete, nothing can be applied. False if told to stop.
    async fn schema_stands_at(&self, cut: &Cut, stop: &CancellationToken) -> Result<bool> {
        if !self.schema_comes_with_the_stream().await? {
            return Ok(true);
        }
        tracing::info!(lsn = %cut.lsn, "following up to the cut");
        self.follow_up_to(cut.lsn, stop).await
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

    /// What a cut needs on the source before it.
    async fn publish(&self) -> Result<()> {
        let s = self.supervisor;
        let mut tables = self.tables().await?;
        if identity::give(s.config, &s.source, &s.store, &tables).await? {
            tables = self.tables().await?;
        }
        let records = s.store.tables().await?;
        let copied: HashSet<&QualifiedName> =
            records.iter().filter(|table| table.state == TableState::Copied).map(|table| &table.name).collect();
        // One that was copied, and is another table of the same name by now: its changes up to here went nowhere, and
        // publishing it would hide that.
        let copied: Vec<Table> = tables.iter().filter(|table| copied.contains(&table.name)).cloned().collect();
        let session = s.source.connect("publication").await?;
        // Where schema changes come with the stream, names here are ahead of those in the state; the watch does it then.
        if !self.is_captured().await?
            && let Some(table) = publication::unpublished(&*session, self.publications(), &copied).await?.first()
        {
            return Err(watching::unpublished(table));
        }
        // The same of one that is there in part: the stream does not tell what changed in it.
        let begun = s.store.begun().await?;
        let begun: Vec<Table> = tables.iter().filter(|table| begun.contains_key(&table.name)).cloned().collect();
        for table in publication::unpublished(&*session, self.publications(), &begun).await? {
            s.store.forget_units(&table).await?;
        }
        drop(session);
        self.capture().await?;
        publication::ensure(&s.source, s.config, &tables, &s.telemetry).await?;
        unkeyed::remember(&s.source, &s.store, &tables).await
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

    async fn cut(&self, cancel: &CancellationToken) -> Result<(Walsender, Cut)> {
        let s = self.supervisor;
        match s.record().await?.slot_lsn {
            None => cut::first(&s.source, &s.store, &s.telemetry, cancel).await,
            Some(_) => cut::another(&s.source, &s.store, &s.telemetry, cancel).await,
        }
    }

    /// Whether a cut was taken and every table was copied under one.
    async fn all_copied(&self) -> Result<bool> {
        let s = self.supervisor;
        let tables = s.store.tables().await?;
        Ok(s.record().await?.slot_lsn.is_some()
            && !tables.is_empty()
            && tables.iter().all(|table| table.state == TableState::Copied))
    }

    async fn nothing_to_copy(&self) -> Result<bool> {
        Ok(self.supervisor.store.tables().await?.iter().all(|table| table.state == TableState::Copied))
    }

    /// Whether anything was followed. Until then, what was dumped, or copied by hand, under the first cut is what the stream
    /// goes on from.
    async fn has_followed(&self) -> Result<bool> {
        let s = self.supervisor;
        let progress = s.store.progress().await?.lsn;
        Ok(s.record().await?.slot_lsn.is_some_and(|slot| progress > slot))
    }

    async fn nothing_copied(&self) -> Result<bool> {
        Ok(self.supervisor.store.tables().await?.iter().all(|table| table.state != TableState::Copied))
    }

    /// `copy.method = "dump"`: the archive is complete or made, then restored, or what is left of it. Where it is gone and some
    /// of its tables are on the target, the others are copied from the source, under another cut.
    async fn copy_by_dump(&mut self) -> Result<()> {
        let s = self.supervisor;
        let begun = !self.nothing_copied().await?;
        if begun && (self.all_copied().await? || !DataArchive::default_folder(&s.config.name).exists()) {
            return Ok(());
        }
        let kit = self.kit().await?;
        let mut archive = self.archive().await?;
        let holds = match s.record().await?.last_cut_lsn {
            Some(cut) => archive.holds(cut)?,
            None => false,
        };
        if !holds && begun {
            tracing::warn!("the archive cannot be gone on with; tables that are not copied come from the source");
            return Ok(());
        }
        if !holds {
            self.dump_rows(&mut archive, &kit.programs).await?;
        }
        let folder = DataArchive::default_folder(&s.config.name);
        s.telemetry.activity(&format!(
            "restoring rows from {} (step 2 of 2); keys and indexes are built after them",
            folder.display()
        ));
        let (epoch, workers) = (self.epoch, s.config.copy.workers);
        let (target, store, programs, telemetry) = (&s.target, &s.store, &kit.programs, &s.telemetry);
        archive.restore(Loading { target, store, programs, telemetry, epoch, workers }).await
    }

    async fn archive(&self) -> Result<DataArchive> {
        let s = self.supervisor;
        let owner = format!("{} of {}", s.config.name, s.record().await?.source_identity);
        DataArchive::open(&DataArchive::default_folder(&s.config.name), &s.config.name, &owner)
    }

    /// The archive has done its work. One that cannot be removed is left to whoever reads the log.
    async fn remove_archive(&self) -> Result<()> {
        let folder = DataArchive::default_folder(&self.supervisor.config.name);
        if !folder.exists() {
            return Ok(());
        }
        match self.archive().await?.remove() {
            Ok(()) => tracing::info!("removed the archive {}; copy.keep_archive would keep it", folder.display()),
            Err(error) => tracing::warn!(code = error.code(), "{error}; remove it by hand: it holds all rows"),
        }
        Ok(())
    }

    async fn dump_rows(&self, archive: &mut DataArchive, programs: &Programs) -> Result<()> {
        let s = self.supervisor;
        archive.invalidate()?;
        self.publish().await?;
        let (exporter, cut) = self.cut(&s.stop.child_token()).await?;
        self.keep_changes().await?;
        let tables = copy::tables_of_cut(&s.source, &s.config.scope, &s.config.name, &cut).await?;
        let sizes: Vec<_> = tables.iter().map(|table| (table.name.clone(), table.bytes)).collect();
        s.store.plan_tables(&sizes).await?;
        let folder = DataArchive::default_folder(&s.config.name);
        s.telemetry.activity(&format!("dumping rows into {} (step 1 of 2)", folder.display()));
        let request =
            DumpRequest { source: &s.source, programs, scope: &s.config.scope, snapshot: Some(&cut.snapshot) };
        let listeners = Listeners { telemetry: &s.telemetry, store: &s.store };
        archive.dump(request, cut.lsn, &tables, s.config.copy.workers, listeners).await?;
        exporter.close().await;
        Ok(())
    }

    /// Follows until the target is a state that the source once had, then adds the foreign keys, which only such a
    /// state satisfies. Nothing is applied while they are checked.
    pub(super) async fn catch_up(&mut self) -> Result<Option<End>> {
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
