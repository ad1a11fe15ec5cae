//! How far the target is behind, in time: a row on the source says when it was written, 50 times a second, and the target is
//! asked what it says there. Both clocks are the machine's. A lag is at most one beat too long.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use tokio_postgres::Client;

use crate::servers::Server;
use crate::stage::DATABASE;

/// How often the row is written.
const BEAT: Duration = Duration::from_millis(20);
/// How often the target is asked.
const LOOK: Duration = Duration::from_millis(5);

const WRITE: &str = "UPDATE heartbeat SET at = clock_timestamp() WHERE id = 1";
const READ: &str = "SELECT at FROM heartbeat WHERE id = 1";

/// A beating heart on the source, and an ear on the target.
pub(crate) struct LagWatch {
    /// When looked, and what the lag then was.
    seen: Arc<Mutex<Vec<(Instant, Duration)>>>,
    beating: JoinHandle<Result<()>>,
    looking: JoinHandle<Result<()>>,
}

impl LagWatch {
    pub(crate) async fn begin(source: &Server, target: &Server) -> Result<Self> {
        let (writer, reader) = (source.connect(DATABASE).await?, target.connect(DATABASE).await?);
        let seen = Arc::new(Mutex::new(Vec::new()));
        Ok(Self { beating: tokio::spawn(beat(writer)), looking: tokio::spawn(look(reader, Arc::clone(&seen))), seen })
    }

    /// The lag as it was last seen.
    ///
    /// # Errors
    /// One of the two connections was lost.
    pub(crate) fn newest(&self) -> Result<Option<Duration>> {
        if self.beating.is_finished() || self.looking.is_finished() {
            bail!("the heartbeat or the look at the target has ended");
        }
        Ok(self.seen.lock().unwrap_or_else(PoisonError::into_inner).last().map(|(_, lag)| *lag))
    }

    /// All lags that were seen since a moment.
    pub(crate) fn since(&self, moment: Instant) -> Lags {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Lags::of(seen.iter().rev().take_while(|(at, _)| *at >= moment).map(|(_, lag)| lag.as_secs_f64()).collect())
    }

    /// Stops the heart, so that nothing is written any more.
    pub(crate) async fn end(self) {
        self.beating.abort();
        self.looking.abort();
        // What they end with is that they were told to.
        self.beating.await.ok();
        self.looking.await.ok();
    }
}

async fn beat(client: Client) -> Result<()> {
    let write = client.prepare(WRITE).await.context("preparing the heartbeat")?;
    let mut beats = interval(BEAT);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beats.tick().await;
        client.execute(&write, &[]).await.context("writing the heartbeat")?;
    }
}

async fn look(client: Client, seen: Arc<Mutex<Vec<(Instant, Duration)>>>) -> Result<()> {
    let read = client.prepare(READ).await.context("preparing to read the heartbeat")?;
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let written: SystemTime = client.query_one(&read, &[]).await.context("reading the heartbeat")?.try_get(0)?;
        let lag = SystemTime::now().duration_since(written.max(UNIX_EPOCH)).unwrap_or_default();
        seen.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), lag));
    }
}

/// Lags in seconds, sorted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lags(Vec<f64>);

impl Lags {
    fn of(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        Self(seconds)
    }

    /// The smallest lag that so many percent of all do not exceed.
    pub(crate) fn percentile(&self, percent: f64) -> Option<f64> {
        let rank = (percent / 100.0 * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.saturating_sub(1)).copied()
    }

    pub(crate) fn worst(&self) -> Option<f64> {
        self.0.last().copied()
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let lags = Lags::of((1..=100).rev().map(f64::from).collect());
        assert_eq!((lags.percentile(50.0), lags.percentile(99.0), lags.worst()), (Some(50.0), Some(99.0), Some(100.0)));
        assert_eq!(Lags::default().percentile(50.0), None);
    }
}
