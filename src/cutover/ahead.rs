//! What is done before writers wait, and the proofs behind the fence that it prepared.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::journal::Journal;
use super::sequences::Sequences;
use super::{Cutover, OWN_WORDS, UNHURRIED, fence, hook, marker, tables};
use crate::config::{CutoverVerify, Fence as FenceKind, WithoutIdentity};
use crate::error::{Class, Doing, Error, Result};
use crate::follow::unkeyed;
use crate::leftover;
use crate::postgres::{QualifiedName, Session, catalog, quote_identifier};
use crate::schema::hold_back;
use crate::state::{HeldBack, Store};
use crate::verify::{Comparison, Depth};

/// What is ready before writers wait: connections, names, plans.
pub(super) struct Ahead {
    /// The tables that all of this is for.
    pub(super) listed: Vec<QualifiedName>,
    /// Whether the fence can and shall stop writes to large objects too.
    pub(super) lock_objects: bool,
    /// What is carried behind the fence.
    pub(super) rest: leftover::Rest,
    pub(super) marker: Session,
    pub(super) sequences: Sequences,
    pub(super) comparison: Option<Comparison>,
    /// To ask the target which triggers and rules it has.
    pub(super) catalog: Session,
    /// On a connection of its own: a lock that it waits for must not keep the journal waiting.
    pub(super) release: Store,
    pub(super) addresses: hook::Addresses,
}

impl Cutover<'_> {
    /// Checks without changing anything, and measures how long a marker takes.
    ///
    /// # Errors
    /// Class no: it would not happen now.
    pub async fn rehearse(&self, timeout: Duration) -> Result<Duration> {
        let deadline = Instant::now() + timeout;
        self.ready(deadline).await?;
        leftover::Ahead::find(&self.leftover(0)).await?;
        let mut session = self.source.connect("marker").await?;
        let began = Instant::now();
        self.drain(&mut session, deadline).await?;
        Ok(began.elapsed())
    }

    pub(super) async fn ready(&self, deadline: Instant) -> Result<()> {
        if self.config.cutover.fence == FenceKind::Lock {
            self.no_apply_workers().await?;
        }
        loop {
            let Err(reason) = self.telemetry.readiness() else { return Ok(()) };
            if Instant::now() + OWN_WORDS >= deadline {
                let message = format!("the move did not become ready for the cutover in time: {reason}");
                return Err(Error::new(Class::No, "not_ready", message)
                    .hint("`pgtandem status` says what blocks it, and how large the lag is"));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The worker of a subscription writes without firing statement triggers: the seal would not hold it.
    async fn no_apply_workers(&self) -> Result<()> {
        let session = self.source.connect("fence").await?;
        let rows = session
            .query(
                "SELECT subname::text FROM pg_catalog.pg_subscription WHERE subenabled AND subdbid =
                     (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())",
                &[],
            )
            .await
            .doing(|| "looking for subscriptions of the source")?;
        let Some(row) = rows.first() else { return Ok(()) };
        let name: String = row.try_get(0)?;
        Err(Error::new(Class::No, "source_is_subscriber", format!("the subscription {name} writes into the source"))
            .hint(format!("ALTER SUBSCRIPTION {} DISABLE, then cut over", quote_identifier(&name))))
    }

    /// What carrying needs to know.
    pub(super) fn leftover(&self, cutover: i64) -> leftover::Context<'_> {
        leftover::Context {
            config: self.config,
            source: self.source,
            target: self.target,
            store: self.store,
            epoch: self.epoch,
            cutover,
        }
    }

    /// The steps that take as long as they take: what the stream does not carry, and then the materialized views, which may
    /// read it.
    pub(super) async fn carry_ahead(&self, journal: &mut Journal) -> Result<leftover::Ahead> {
        let context = self.leftover(journal.id);
        let unhurried = Instant::now() + UNHURRIED;
        let carry = async {
            let mut ahead = leftover::Ahead::find(&context).await?;
            let told = if ahead.is_nothing() {
                "the stream carries everything".to_owned()
            } else {
                ahead.carry(&context, self.telemetry).await?.to_string()
            };
            Ok((ahead, Some(told)))
        };
        let ahead = journal.step_told("carry", unhurried, carry).await?;
        if self.config.cutover.refresh {
            let refresh = async {
                let count = leftover::refresh(&context, self.telemetry).await?;
                Ok(((), Some(format!("{count} materialized views"))))
            };
            journal.step_told("refresh", unhurried, refresh).await?;
        } else {
            journal.skip("refresh", "cutover.refresh = false");
        }
        Ok(ahead)
    }

    /// Everything that can be had before writers wait.
    pub(super) async fn connect_ahead(&self, id: i64, left: leftover::Ahead, deadline: Instant) -> Result<Ahead> {
        Self::fits(&left, deadline)?;
        // What came before may have taken long, and the target may lag behind by now.
        self.ready(deadline).await?;
        let context = self.leftover(id);
        left.still(&context).await?;
        let moved: Vec<QualifiedName> = self.store.tables().await?.into_iter().map(|table| table.name).collect();
        let comparison = match self.config.cutover.verify {
            CutoverVerify::Off => None,
            CutoverVerify::Counts => Some(self.comparison(&moved, Depth::Counts).await?),
            CutoverVerify::Full => Some(self.comparison(&moved, Depth::Full).await?),
        };
        let release = Store::new(self.target.clone(), self.config.name.clone());
        release.exists().await?;
        let rest = left.connect(&context).await?;
        let lock_objects = left.carries_objects() && self.may_lock_objects(left.has_objects()).await?;
        let listed: Vec<QualifiedName> = moved.iter().chain(left.unlogged()).cloned().collect();
        let marker = self.source.connect("marker").await?;
        // Better now than while writers wait.
        tables::all_listed(&marker, &self.config.scope, &listed).await?;
        Ok(Ahead {
            rest,
            lock_objects,
            listed,
            marker,
            sequences: Sequences::prepare(self.source, self.target, &self.config.scope).await?,
            comparison,
            catalog: self.target.connect("catalog").await?,
            release,
            addresses: hook::Addresses::find(self.source, self.target).await,
        })
    }

    async fn comparison(&self, moved: &[QualifiedName], depth: Depth) -> Result<Comparison> {
        let moved: HashSet<&QualifiedName> = moved.iter().collect();
        let session = self.source.connect("verify").await?;
        let tables = catalog::tables(&*session)
            .await?
            .into_iter()
            .filter(|table| moved.contains(&table.name))
            .map(|table| (table.name, table.columns.into_iter().map(|column| column.name).collect()))
            .collect();
        Comparison::prepare(self.source, self.target, tables, depth, self.config.copy.workers).await
    }

    pub(super) async fn drain(&self, session: &mut Session, deadline: Instant) -> Result<()> {
        let id = marker::emit(session, self.marker).await?;
        let durable = marker::arrival(self.durable.clone(), id, deadline).await?;
        tracing::info!(progress = %durable.lsn, "the target holds everything up to the marker");
        Ok(())
    }

    /// Refuses if there is more by now than all of this was prepared for. After the drain, so that the target has the schema
    /// that the source had when the fence closed, and before anything is brought to it.
    pub(super) async fn nothing_came(&self, ahead: &Ahead, closed: Option<&fence::Fence>) -> Result<()> {
        let (scope, names) = (&self.config.scope, fence::Names::of(self.config.name.as_str()));
        match closed {
            Some(closed) => closed.covers_all(&names, scope, &ahead.listed).await?,
            None => tables::all_listed(&ahead.marker, scope, &ahead.listed).await?,
        }
        ahead.rest.still(self.config, self.store).await
    }

    /// Whether the source lets us lock large objects against writes, which takes a superuser.
    async fn may_lock_objects(&self, some: bool) -> Result<bool> {
        let session = self.source.connect("fence").await?;
        let may: bool = session
            .query_one("SELECT pg_catalog.has_table_privilege('pg_catalog.pg_largeobject_metadata', 'UPDATE')", &[])
            .await
            .doing(|| "asking whether large objects can be locked")?
            .try_get(0)?;
        if !may && some {
            tracing::warn!(
                "the source's role may not lock large objects: the fence does not keep others from making and removing them"
            );
        }
        Ok(may)
    }

    /// What cannot be done in a third of the time is refused before anybody waits for it.
    fn fits(left: &leftover::Ahead, deadline: Instant) -> Result<()> {
        let budget = deadline.saturating_duration_since(Instant::now()) / 3;
        if left.expected() <= budget {
            return Ok(());
        }
        let message = format!(
            "comparing what the stream does not carry takes about {:.1} s; a third of the time is {:.1} s",
            left.expected().as_secs_f64(),
            budget.as_secs_f64()
        );
        Err(Error::new(Class::No, "carry_too_slow", message).hint(
            "raise cutover.timeout, exclude the largest unlogged tables, set move.large_objects = false, or give tables \
             without a replica identity one",
        ))
    }

    /// The proof for tables without a replica identity whose differences are not carried.
    pub(super) async fn watch(&self, journal: &mut Journal, deadline: Instant) -> Result<()> {
        if self.config.follow.without_identity == WithoutIdentity::Copy {
            journal.skip("watch", "follow.without_identity = \"copy\": what differed was carried");
            return Ok(());
        }
        journal.step("watch", deadline, unkeyed::prove(self.source, self.target, self.store)).await
    }

    /// Triggers and rules may have been enabled, disabled or renamed on the source since they were restored, until the fence
    /// closed: its locks are in the way of that. So what the release brings back is asked behind it, and where nothing is applied
    /// any more. It is written down before it is brought back, so that whoever undoes this knows of it.
    pub(super) async fn hold_back_as_on_the_source(
        &self,
        [source, target]: [&Session; 2],
        state: &Store,
        id: i64,
    ) -> Result<()> {
        let (objects, known) = hold_back::as_on_the_source(source, target).await?;
        let held = state.held_back_objects().await?;
        let before: HashSet<&HeldBack> = held.iter().filter(|object| known.contains(&object.what)).collect();
        if before == objects.iter().collect() {
            // As nearly always, and writers wait.
            return Ok(());
        }
        state.hold_back_instead(id, self.epoch, &objects, &known).await
    }

    /// Reads the source once as the comparison will: one that cannot be done in a third of the time that is left is
    /// refused before anybody waits for it.
    pub(super) async fn estimate(&self, comparison: &Comparison, deadline: Instant) -> Result<()> {
        let budget = deadline.saturating_duration_since(Instant::now()) / 3;
        match tokio::time::timeout(budget, comparison.rehearse()).await {
            Ok(done) => done,
            Err(_) => Err(Error::new(
                Class::No,
                "verify_too_slow",
                format!("cutover.verify = {:?} needs more than {budget:?} on the source alone", comparison.depth()),
            )
            .hint("raise cutover.timeout, or set cutover.verify = \"off\"")),
        }
    }

    pub(super) async fn verify(&self, comparison: Comparison) -> Result<()> {
        let compared: Vec<QualifiedName> = comparison.tables().iter().map(|(table, _)| table.clone()).collect();
        let count = compared.len();
        let differences = comparison.run().await?;
        // An earlier comparison may have found a difference.
        for table in &compared {
            self.telemetry.compared(table, 0);
        }
        for difference in &differences {
            self.telemetry.compared(&difference.table, difference.rows());
        }
        let Some(first) = differences.first() else {
            self.telemetry.verified();
            return Ok(());
        };
        Err(Error::new(
            Class::No,
            "verify_differs",
            format!(
                "{} of {count} tables differ; {} has {} rows on the source and {} on the target",
                differences.len(),
                first.table.plain(),
                first.source.rows,
                first.target.rows
            ),
        )
        .hint("find out who wrote to the target, or begin the move again"))
    }
}
