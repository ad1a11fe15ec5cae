//! One workload, set up: the source with its backlog, the targets as they stood before it, and slots to copy.
//!
//! The backlog is made once. A logical slot that was there before keeps its log; every drain reads a copy of that slot, and
//! applies to a copy of the target.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio_postgres::Client;

use crate::contender::{Contender, pgtandem};
use crate::options::Options;
use crate::programs::Programs;
use crate::same::{Content, TABLES};
use crate::say;
use crate::servers::{Server, Servers};
use crate::workload::{Kind, Place};

/// The database, on all three servers.
pub(crate) const DATABASE: &str = "bench";
/// The target as it stood before the backlog.
pub(crate) const TEMPLATE: &str = "bench_template";
pub(crate) const PUBLICATION: &str = "bench";
/// The last transaction of the backlog writes into this table.
pub(crate) const DONE: &str = "public.bench_done";
/// The slot that was there before the backlog.
const KEPT_SLOT: &str = "kept";

/// How long a slot may stay in use after its reader was stopped.
const SLOT_DEADLINE: Duration = Duration::from_secs(60);

/// See the module's first lines.
pub(crate) struct Stage<'a> {
    pub(crate) options: &'a Options,
    pub(crate) programs: &'a Programs,
    pub(crate) servers: &'a Servers,
    kind: Kind,
    control: Client,
    /// The commit record of the backlog's last transaction lies here or behind.
    pub(crate) done_after: u64,
    /// And it ends before this.
    pub(crate) end: String,
    /// Log that the backlog made, in bytes.
    pub(crate) backlog_bytes: u64,
}

impl<'a> Stage<'a> {
    /// Makes the first state on both sides. pgtandem copies it to its own target, if it takes part.
    pub(crate) async fn set_up(
        kind: Kind,
        contenders: &[Contender],
        options: &'a Options,
        programs: &'a Programs,
        servers: &'a Servers,
    ) -> Result<Self> {
        say("setting up source and target");
        for (server, database) in [(&servers.source, DATABASE), (&servers.target, TEMPLATE)] {
            server.execute("postgres", &format!("CREATE DATABASE {database} TEMPLATE template0")).await?;
            kind.set_up(&Place { options, programs, folder: &servers.folder, server, database }).await?;
            server.execute(database, &format!("CREATE TABLE {DONE} (id int PRIMARY KEY); ANALYZE")).await?;
        }
        let control = servers.source.connect(DATABASE).await?;
        let stage =
            Self { options, programs, servers, kind, control, done_after: 0, end: String::new(), backlog_bytes: 0 };
        stage.publish().await?;
        if contenders.iter().any(|contender| contender.is_pgtandem()) {
            say("pgtandem copies");
            pgtandem::bring_up(&stage).await?;
        }
        let slot = format!("SELECT pg_create_logical_replication_slot('{KEPT_SLOT}', 'pgoutput')");
        stage.control.batch_execute(&slot).await.context("making the slot")?;
        Ok(stage)
    }

    /// Table by table, since pgtandem may make tables of its own on the source.
    async fn publish(&self) -> Result<()> {
        let rows = self.control.query(TABLES, &[]).await.context("listing tables")?;
        let tables = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<String>, _>>()?;
        let create = format!("CREATE PUBLICATION {PUBLICATION} FOR TABLE {}", tables.join(", "));
        self.control.batch_execute(&create).await.context("publishing")
    }

    /// Makes the backlog; what the source then holds.
    pub(crate) async fn make_backlog(&mut self) -> Result<Content> {
        say("making the backlog");
        let (options, programs, servers) = (self.options, self.programs, self.servers);
        let before = self.position().await?;
        let place = Place { options, programs, folder: &servers.folder, server: &servers.source, database: DATABASE };
        self.kind.make_backlog(&place).await?;
        self.done_after = self.position().await?;
        self.backlog_bytes = self.done_after - before;
        self.finish().await?;
        // So that nothing of it is written while somebody drains.
        self.control.batch_execute("CHECKPOINT").await.context("the source's checkpoint")?;
        self.content().await
    }

    /// The last transaction.
    pub(crate) async fn finish(&mut self) -> Result<()> {
        self.control.batch_execute(&format!("INSERT INTO {DONE} VALUES (1)")).await.context("the last transaction")?;
        let row = self.control.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await?;
        self.end = row.try_get(0)?;
        Ok(())
    }

    /// What the source holds.
    pub(crate) async fn content(&self) -> Result<Content> {
        Content::of(&self.servers.source.connect(DATABASE).await?).await.context("summing up the source")
    }

    async fn position(&self) -> Result<u64> {
        let row = self.control.query_one("SELECT (pg_current_wal_insert_lsn() - '0/0')::int8", &[]).await?;
        u64::try_from(row.try_get::<_, i64>(0)?).context("a position of the log below zero")
    }

    /// A target as it stood before the backlog, with nothing left to write.
    pub(crate) async fn reset(&self, target: &Server) -> Result<()> {
        let client = target.connect("postgres").await?;
        // From 15 on the default writes every page into the log, too.
        let strategy = if target.major >= 15 { " STRATEGY file_copy" } else { "" };
        for statement in [
            format!("DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)"),
            format!("CREATE DATABASE {DATABASE} TEMPLATE {TEMPLATE}{strategy}"),
            "CHECKPOINT".to_owned(),
        ] {
            client.batch_execute(&statement).await.with_context(|| statement.clone())?;
        }
        Ok(())
    }

    /// The slot that a contender is to read: what was kept for it, under the name that it wants.
    pub(crate) async fn give_slot(&self, contender: Contender) -> Result<()> {
        self.drop_slot(contender.slot()).await?;
        let kept = if contender.is_pgtandem() { pgtandem::KEPT_SLOT } else { KEPT_SLOT };
        self.copy_slot(kept, contender.slot(), contender.plugin()).await
    }

    pub(crate) async fn copy_slot(&self, from: &str, to: &str, plugin: &str) -> Result<()> {
        let copy = format!("SELECT pg_copy_logical_replication_slot('{from}', '{to}', false, '{plugin}')");
        self.control.batch_execute(&copy).await.with_context(|| format!("copying the slot {from} to {to}"))
    }

    /// Drops a slot if it is there, once its reader has let it go.
    pub(crate) async fn drop_slot(&self, slot: &str) -> Result<()> {
        let began = Instant::now();
        while self.slot_reader(slot).await?.is_some() {
            if began.elapsed() > SLOT_DEADLINE {
                bail!("the slot {slot} is still in use");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let drop = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1";
        self.control.query(drop, &[&slot]).await.with_context(|| format!("dropping the slot {slot}"))?;
        Ok(())
    }

    /// The walsender that reads a slot.
    pub(crate) async fn slot_reader(&self, slot: &str) -> Result<Option<u32>> {
        let sql = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1";
        let row = self.control.query_opt(sql, &[&slot]).await.context("looking for the walsender")?;
        let pid = row.map(|row| row.try_get::<_, Option<i32>>(0)).transpose()?.flatten();
        pid.map(u32::try_from).transpose().context("a process id below zero")
    }

    /// Where a slot begins.
    pub(crate) async fn slot_position(&self, slot: &str) -> Result<String> {
        let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
        let row = self.control.query_one(sql, &[&slot]).await.with_context(|| format!("looking at the slot {slot}"))?;
        Ok(row.try_get(0)?)
    }

    /// Removes databases and slots, and with them the log that was kept.
    pub(crate) async fn clear_away(self) -> Result<()> {
        for row in self.control.query("SELECT slot_name::text FROM pg_replication_slots", &[]).await? {
            self.drop_slot(row.try_get(0)?).await?;
        }
        let servers = self.servers;
        drop(self.control);
        for server in [&servers.source, &servers.target, &servers.pgtandem_target] {
            let client = server.connect("postgres").await?;
            for database in [DATABASE, TEMPLATE] {
                let drop = format!("DROP DATABASE IF EXISTS {database} WITH (FORCE)");
                client.batch_execute(&drop).await.with_context(|| drop.clone())?;
            }
            client.batch_execute("CHECKPOINT").await.context("clearing away")?;
        }
        Ok(())
    }
}
