//! What is done before writers wait, and the proofs behind the fence that it prepared.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::sequences::Sequences;
use super::{Cutover, OWN_WORDS, hook, marker};
use crate::config::{CutoverVerify, Fence as FenceKind};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::{QualifiedName, Session, catalog, quote_identifier};
use crate::state::Store;
use crate::verify::{Comparison, Depth};

/// What is ready before writers wait: connections, names, plans.
pub(super) struct Ahead {
    pub(super) moved: Vec<QualifiedName>,
    pub(super) marker: Session,
    pub(super) sequences: Sequences,
    pub(super) comparison: Option<Comparison>,
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

    /// Everything that can be had before writers wait.
    pub(super) async fn connect_ahead(&self) -> Result<Ahead> {
        let moved: Vec<QualifiedName> = self.store.tables().await?.into_iter().map(|table| table.name).collect();
        let comparison = match self.config.cutover.verify {
            CutoverVerify::Off => None,
            CutoverVerify::Counts => Some(self.comparison(&moved, Depth::Counts).await?),
            CutoverVerify::Full => Some(self.comparison(&moved, Depth::Full).await?),
        };
        let release = Store::new(self.target.clone(), self.config.name.clone());
        release.exists().await?;
        Ok(Ahead {
            marker: self.source.connect("marker").await?,
            sequences: Sequences::prepare(self.source, self.target, &self.config.scope).await?,
            comparison,
            release,
            moved,
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
