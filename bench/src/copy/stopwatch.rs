//! The clock of one copy, and a look at all processes while it runs.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::process::Command;
use tokio::time::{Interval, MissedTickBehavior};

use crate::measure::{Costs, Role, Watch};
use crate::process::Background;
use crate::servers::Pair;

/// How often processes are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Runs from its making on.
pub(crate) struct Stopwatch<'a> {
    pair: &'a Pair,
    watch: Watch,
    ticks: Interval,
    began: Instant,
}

impl<'a> Stopwatch<'a> {
    pub(crate) fn start(pair: &'a Pair) -> Result<Self> {
        let mut watch = Watch::begin(Some(pair.target.postmaster()))?;
        watch.server(Role::Source, pair.source.postmaster())?;
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self { pair, watch, ticks, began: Instant::now() })
    }

    /// Seconds so far.
    pub(crate) fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// What was used so far.
    pub(crate) fn costs(&self) -> Costs {
        self.watch.costs()
    }

    /// Runs a program of the contender's to its end.
    pub(crate) async fn run(&mut self, command: Command) -> Result<()> {
        let log = self.log();
        self.run_logged(command, &log).await
    }

    /// The same, with its output going where the contender wants it.
    pub(crate) async fn run_logged(&mut self, command: Command, log: &Path) -> Result<()> {
        let mut program = self.start_logged(command, log)?;
        self.during(program.finish()).await
    }

    /// Starts a program of the contender's that is looked at from now on.
    pub(crate) fn start_logged(&mut self, command: Command, log: &Path) -> Result<Background> {
        let program = Background::start(command, log)?;
        self.watch.daemon(program.id());
        Ok(program)
    }

    /// Looks at the processes while something is done.
    pub(crate) async fn during<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = self.ticks.tick() => self.watch.look()?,
            }
        }
    }

    fn log(&self) -> PathBuf {
        self.pair.folder.path().join("contender.log")
    }
}
