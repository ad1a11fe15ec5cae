//! What a copy begins with: a source that is filled and at rest, and a target with an empty database.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio_postgres::Client;

use super::CopyOptions;
use super::contender::pgcopydb::Peers;
use super::dataset::Dataset;
use crate::options::Options;
use crate::programs::Programs;
use crate::same::{Content, Shape};
use crate::say;
use crate::servers::Pair;
use crate::stage::{DATABASE, TEMPLATE};
use crate::workload::Place;

/// A database that is smaller is kept until the end of its data set, in bytes.
const SMALL: u64 = 1 << 30;

/// What the names of such databases begin with.
const KEPT: &str = "kept_";

/// How long a slot may stay in use after its reader was stopped.
const SLOT_DEADLINE: Duration = Duration::from_secs(60);

/// What the tables of the source take on disk, with their indexes and all that lies out of line.
const SIZE: &str = "
    SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::int8
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname = 'public'";

/// See the module's first lines.
pub(crate) struct Ground<'a> {
    pub(crate) dataset: Dataset,
    pub(crate) options: &'a Options,
    pub(crate) copy: &'a CopyOptions,
    pub(crate) programs: &'a Programs,
    pub(crate) peers: &'a Peers,
    pub(crate) pair: &'a Pair,
    /// What the source holds, as long as nobody writes to it.
    pub(crate) content: Content,
    shape: Shape,
    /// What it takes on disk there.
    pub(crate) bytes: u64,
}

impl<'a> Ground<'a> {
    /// Fills the source. Reading all of it brings it into memory, and writes down once and for all who may see its rows.
    pub(crate) async fn prepare(
        dataset: Dataset,
        options: &'a Options,
        copy: &'a CopyOptions,
        programs: &'a Programs,
        peers: &'a Peers,
        pair: &'a Pair,
    ) -> Result<Self> {
        say("filling the source");
        let source = &pair.source;
        source.execute("postgres", &format!("CREATE DATABASE {DATABASE} TEMPLATE template0")).await?;
        dataset.fill(&Place { options, programs, folder: &pair.folder, server: source, database: DATABASE }).await?;
        let client = source.connect(DATABASE).await?;
        client.batch_execute("VACUUM (ANALYZE)").await.context("vacuuming the source")?;
        client.batch_execute("CHECKPOINT").await.context("the source's checkpoint")?;
        let content = Content::of(&client).await.context("summing up the source")?;
        let shape = Shape::of(&client).await?;
        let bytes: i64 = client.query_one(SIZE, &[]).await.context("measuring the source")?.try_get(0)?;
        drop(client);
        if dataset.is_busy() {
            source.execute("postgres", &format!("ALTER DATABASE {DATABASE} RENAME TO {TEMPLATE}")).await?;
        }
        let bytes = u64::try_from(bytes).context("a size below zero")?;
        Ok(Self { dataset, options, copy, programs, peers, pair, content, shape, bytes })
    }

    /// An empty database on the target, and nothing left to write on both sides. A source that was written to is as it was.
    pub(crate) async fn reset(&self) -> Result<()> {
        let (source, target) = (&self.pair.source, &self.pair.target);
        let client = target.connect("postgres").await?;
        self.put_aside(&client).await?;
        for statement in [format!("CREATE DATABASE {DATABASE} TEMPLATE template0"), "CHECKPOINT".to_owned()] {
            client.batch_execute(&statement).await.with_context(|| statement.clone())?;
        }
        if self.dataset.is_busy() {
            let strategy = if source.major >= 15 { " STRATEGY file_copy" } else { "" };
            let client = source.connect("postgres").await?;
            for statement in [
                format!("DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)"),
                format!("CREATE DATABASE {DATABASE} TEMPLATE {TEMPLATE}{strategy}"),
            ] {
                client.batch_execute(&statement).await.with_context(|| statement.clone())?;
            }
        }
        source.execute("postgres", "CHECKPOINT").await
    }

    /// Makes room for a new database of the target. A small one stays until the end: ext4 does not take the place of a file that was
    /// deleted in the last minutes, and whoever makes thousands of files then pays for looking past thousands of such places.
    async fn put_aside(&self, client: &Client) -> Result<()> {
        let exists = !client.query("SELECT FROM pg_database WHERE datname = $1", &[&DATABASE]).await?.is_empty();
        if !exists {
            return Ok(());
        }
        let statement = if self.bytes < SMALL {
            let kept = client.query_one("SELECT count(*) FROM pg_database", &[]).await?.try_get::<_, i64>(0)?;
            let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1";
            while !client.query(others, &[&DATABASE]).await.context("ending sessions")?.is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            format!("ALTER DATABASE {DATABASE} RENAME TO {KEPT}{kept}")
        } else {
            format!("DROP DATABASE {DATABASE} WITH (FORCE)")
        };
        client.batch_execute(&statement).await.with_context(|| statement.clone())
    }

    /// What differs on the target; the source's content is asked for anew where it has changed.
    pub(crate) async fn differences(&self) -> Result<Vec<String>> {
        let target = self.pair.target.connect(DATABASE).await?;
        let (theirs, their_shape) = (Content::of(&target).await?, Shape::of(&target).await?);
        let mut found = if self.dataset.is_busy() {
            Content::of(&self.pair.source.connect(DATABASE).await?).await?.differences(&theirs)
        } else {
            self.content.differences(&theirs)
        };
        found.extend(self.shape.differences(&their_shape));
        Ok(found)
    }

    /// The database of the source, for libpq and for pgtandem.
    pub(crate) fn source_url(&self) -> String {
        self.pair.source.url(DATABASE)
    }

    /// The database of the target.
    pub(crate) fn target_url(&self) -> String {
        self.pair.target.url(DATABASE)
    }

    /// Drops the slots that are left, once their readers have let them go.
    pub(crate) async fn drop_slots(&self) -> Result<()> {
        let client = self.pair.source.connect("postgres").await?;
        let began = Instant::now();
        loop {
            let drop = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active";
            client.query(drop, &[]).await.context("dropping slots")?;
            if client.query("SELECT FROM pg_replication_slots", &[]).await?.is_empty() {
                return Ok(());
            }
            if began.elapsed() > SLOT_DEADLINE {
                bail!("a slot is still in use");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Removes the databases.
    pub(crate) async fn clear_away(self) -> Result<()> {
        for server in [&self.pair.source, &self.pair.target] {
            let client = server.connect("postgres").await?;
            let kept = client
                .query("SELECT datname::text FROM pg_database WHERE starts_with(datname::text, $1)", &[&KEPT])
                .await?;
            let kept = kept.iter().map(|row| row.try_get(0)).collect::<std::result::Result<Vec<String>, _>>()?;
            for database in kept.iter().map(String::as_str).chain([DATABASE, TEMPLATE]) {
                let drop = format!("DROP DATABASE IF EXISTS {database} WITH (FORCE)");
                client.batch_execute(&drop).await.with_context(|| drop.clone())?;
            }
            client.batch_execute("CHECKPOINT").await.context("clearing away")?;
        }
        Ok(())
    }
}
