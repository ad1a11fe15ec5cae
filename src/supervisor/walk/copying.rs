//! The phase `copy`: rows by our own COPYs or through an archive, then keys, indexes and statistics.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::super::{End, Until};
use super::{Kit, Walk};
use crate::config::CopyMethod;
use crate::copy::{self, by_hand, cut, publication};
use crate::error::Result;
use crate::follow::{unkeyed, watching};
use crate::leftover::identity;
use crate::postgres::QualifiedName;
use crate::postgres::catalog::{self, Table};
use crate::postgres::replication::{Cut, Walsender};
use crate::schema::{self, DataArchive, DumpRequest, Listeners, Loading, Programs};
use crate::state::{Phase, TableState};
use crate::telemetry::Way;

impl Walk<'_> {
    pub(in crate::supervisor) async fn copy(&mut self) -> Result<Option<End>> {
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
}
