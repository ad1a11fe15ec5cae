//! pgbench on the source while somebody copies, and the transactions that this costs it: those that its undisturbed rate, measured
//! right before, would have brought in that time, without those that it got through.
//!
//! Its commits are not waited for, or the source's disk would be what is measured. Its history has a row for each transaction.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio_postgres::Client;

use super::ground::Ground;
use crate::process::Background;
use crate::stage::DATABASE;
use crate::workload::Place;

/// pgbench connects and gets warm before anything is counted.
const WARM_UP: Duration = Duration::from_secs(2);

/// What a copy did to the traffic.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loss {
    /// Transactions a second before.
    pub(crate) undisturbed: f64,
    /// For so long it was disturbed, in seconds.
    pub(crate) seconds: f64,
    /// Transactions in that time.
    pub(crate) done: u64,
}

impl Loss {
    /// Transactions that did not take place.
    pub(crate) fn lost(&self) -> f64 {
        self.undisturbed * self.seconds - self.done as f64
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "undisturbed_per_second": self.undisturbed, "seconds": self.seconds, "done": self.done, "lost": self.lost(),
        })
    }
}

/// Four clients of pgbench that work until they are stopped.
pub(crate) struct Traffic {
    pgbench: Background,
    counting: Client,
    undisturbed: f64,
    counted: u64,
    since: Instant,
}

impl Traffic {
    /// Starts them, and measures how much they do undisturbed.
    pub(crate) async fn begin(ground: &Ground<'_>) -> Result<Self> {
        let (options, programs, pair) = (ground.options, ground.programs, ground.pair);
        let place = Place { options, programs, folder: &pair.folder, server: &pair.source, database: DATABASE };
        let mut command = place.pgbench_unsynced();
        command.args(["-n", "-c", "4", "-j", "2", "-T", "1000000", DATABASE]);
        let pgbench = Background::start(command, &pair.folder.path().join("pgbench.log"))?;
        let counting = pair.source.connect(DATABASE).await?;
        let mut traffic = Self { pgbench, counting, undisturbed: 0.0, counted: 0, since: Instant::now() };
        tokio::time::sleep(WARM_UP).await;
        traffic.start_over().await?;
        tokio::time::sleep(Duration::from_secs(ground.copy.seconds.into())).await;
        let before = traffic.so_far().await?;
        traffic.undisturbed = before.done as f64 / before.seconds;
        Ok(traffic)
    }

    /// Counts from now on.
    pub(crate) async fn start_over(&mut self) -> Result<()> {
        // The moment of the look, which sees what is committed at its beginning.
        let now = Instant::now();
        (self.counted, self.since) = (self.count().await?, now);
        Ok(())
    }

    /// What was done since.
    pub(crate) async fn so_far(&mut self) -> Result<Loss> {
        if let Some(status) = self.pgbench.ended()? {
            bail!("pgbench ended with {status}: {}", self.pgbench.last_words());
        }
        let seconds = self.since.elapsed().as_secs_f64();
        let done = self.count().await? - self.counted;
        Ok(Loss { undisturbed: self.undisturbed, seconds, done })
    }

    /// Ends it, and with it all that is written on the source.
    pub(crate) async fn end(self) -> Result<()> {
        self.pgbench.stop().await.context("stopping pgbench")?;
        // Its sessions end soon after it.
        let sessions = "SELECT FROM pg_stat_activity WHERE application_name = 'pgbench'";
        while self.counting.query_opt(&format!("{sessions} LIMIT 1"), &[]).await?.is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    async fn count(&self) -> Result<u64> {
        let row = self.counting.query_one("SELECT count(*) FROM pgbench_history", &[]).await;
        u64::try_from(row.context("counting transactions")?.try_get::<_, i64>(0)?).context("a count below zero")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost() {
        let loss = Loss { undisturbed: 100.0, seconds: 2.5, done: 180 };
        assert!((loss.lost() - 70.0).abs() < 1e-9);
    }
}
