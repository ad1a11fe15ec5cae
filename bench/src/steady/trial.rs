//! One try: pgbench at a rate for a while, and the lag meanwhile.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::BOUND;
use super::lag::{LagWatch, Lags};
use crate::stage::{DATABASE, Stage};
use crate::workload::Place;

/// pgbench must get this part of the wanted rate through, or the source was the one that could not.
const REACHED: f64 = 0.95;

/// How it went.
#[derive(Clone, Debug)]
pub(crate) struct Trial {
    /// Transactions a second; none for as many as the source can.
    pub(crate) wanted: Option<f64>,
    pub(crate) reached: f64,
    pub(crate) worst_lag: f64,
    pub(crate) followed: bool,
}

impl Trial {
    pub(crate) fn line(&self) -> String {
        let wanted = self.wanted.map_or("as many as the source can".to_owned(), |rate| format!("{rate:.0} wanted"));
        let verdict = if self.followed { "followed" } else { "not followed" };
        format!("{:.0} transactions a second ({wanted}), worst lag {:.2} s: {verdict}", self.reached, self.worst_lag)
    }

    pub(crate) fn json(&self) -> Value {
        json!({"wanted": self.wanted, "reached": self.reached, "worst_lag_seconds": self.worst_lag, "followed": self.followed})
    }
}

/// Runs pgbench. Its commits are not waited for, or the source's disk would be what is measured; the heartbeat's are, so that the log
/// is written out at every beat.
pub(crate) async fn run(stage: &Stage<'_>, watch: &LagWatch, wanted: Option<f64>) -> Result<(Trial, Lags)> {
    let (options, programs, servers) = (stage.options, stage.programs, stage.servers);
    let place = Place { options, programs, folder: &servers.folder, server: &servers.source, database: DATABASE };
    let mut command = place.pgbench_unsynced();
    command.args(["-n", "-c", "4", "-j", "2", "-T", &options.seconds.to_string()]);
    if let Some(rate) = wanted {
        command.args(["-R", &format!("{rate:.3}")]);
    }
    let began = Instant::now();
    let log = place.run_pgbench(command).await?;
    let reached = rate_of(&log)?;
    watch.newest()?;
    let lags = watch.since(began);
    let worst_lag = lags.worst().context("no lag was seen")?;
    let enough = wanted.is_none_or(|wanted| reached >= wanted * REACHED);
    let followed = worst_lag < BOUND.as_secs_f64() && enough;
    Ok((Trial { wanted, reached, worst_lag, followed }, lags))
}

/// What pgbench says it reached.
fn rate_of(log: &Path) -> Result<f64> {
    let text = std::fs::read_to_string(log).with_context(|| format!("reading {}", log.display()))?;
    let found = text.lines().find_map(|line| line.strip_prefix("tps = ")?.split_whitespace().next()?.parse().ok());
    found.context("pgbench did not say what rate it reached")
}
