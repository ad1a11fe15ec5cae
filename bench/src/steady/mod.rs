//! (g) Following while the source works: the highest rate at which the lag stays below a second, and the lag at half of it.
//!
//! pgbench holds a rate on the source for a while, and the lag is watched. A rate is followed if no lag of that while reached a
//! second, and pgbench did get that many transactions through. The first try has no rate: what the source does with all its
//! strength beside the contender is the upper end of the search, and the answer if even that is followed.

mod lag;
mod trial;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use self::lag::LagWatch;
pub(crate) use self::lag::Lags;
use self::trial::Trial;
use crate::contender::{Contender, Running};
use crate::options::Options;
use crate::programs::Programs;
use crate::same::Content;
use crate::say;
use crate::servers::{Server, Servers};
use crate::stage::{DATABASE, Stage};
use crate::workload::{Kind, Place, tpcb};

/// A rate is followed while every lag is below this.
const BOUND: Duration = Duration::from_secs(1);

/// Halvings of the range of rates: the answer is within a thirtieth of the source's strength.
const HALVINGS: u32 = 5;

/// Between two tries the lag must have come down to this.
const RECOVERED: Duration = Duration::from_millis(300);

/// What a contender can do.
#[derive(Clone, Debug)]
pub(crate) struct Steady {
    pub(crate) contender: Contender,
    /// Transactions a second; none if no rate that was tried was followed.
    pub(crate) rate: Option<f64>,
    /// What kept the next higher rate from being followed: the source did not reach it, although no lag was too long.
    pub(crate) bound_by_source: bool,
    /// The lags at half that rate.
    pub(crate) at_half: Option<(f64, Lags)>,
    pub(crate) trials: Vec<Trial>,
    pub(crate) differences: Vec<String>,
}

impl Steady {
    pub(crate) fn json(&self) -> Value {
        let half = self.at_half.as_ref().map(|(rate, lags)| {
            json!({"rate": rate, "p50_seconds": lags.percentile(50.0), "p99_seconds": lags.percentile(99.0),
                   "worst_seconds": lags.worst(), "samples": lags.count()})
        });
        json!({
            "contender": self.contender.name(), "rate": self.rate, "bound_by_source": self.bound_by_source, "at_half": half,
            "trials": self.trials.iter().map(Trial::json).collect::<Vec<_>>(), "differences": self.differences,
        })
    }
}

pub(crate) fn title(options: &Options) -> String {
    format!("steady state: pgbench at a rate, {} s each, scale {}", options.seconds, tpcb::scale(options))
}

/// pgbench's tables, and one row that says when it was written.
pub(crate) async fn set_up(place: &Place<'_>) -> Result<()> {
    tpcb::set_up(place).await?;
    let heartbeat = "CREATE TABLE heartbeat (id int PRIMARY KEY, at timestamptz NOT NULL) WITH (fillfactor = 10)";
    place.execute_each(&[heartbeat.to_owned(), "INSERT INTO heartbeat VALUES (1, clock_timestamp())".to_owned()]).await
}

/// Tries every contender, each on a database of its own.
pub(crate) async fn play(options: &Options, programs: &Programs, servers: &Servers) -> Result<Vec<Steady>> {
    say(format!("(g) {}", title(options)));
    let mut all = Vec::new();
    for contender in options.contenders(Kind::G, programs) {
        let mut stage = Stage::set_up(Kind::G, &[contender], options, programs, servers).await?;
        let steady = follow(&mut stage, contender).await.with_context(|| format!("(g) {}", contender.name()))?;
        stage.clear_away().await?;
        all.push(steady);
    }
    Ok(all)
}

async fn follow(stage: &mut Stage<'_>, contender: Contender) -> Result<Steady> {
    let target = contender.target(stage.servers).context("it has no target")?;
    stage.reset(target).await?;
    stage.give_slot(contender).await?;
    let mut running = contender.prepare(stage).await?.start().await?;
    let watch = LagWatch::begin(&stage.servers.source, target).await?;
    let found = search(stage, contender, &mut running, &watch, target).await;
    watch.end().await;
    let mut steady = match found {
        Ok(steady) => steady,
        Err(error) => return Err(error.context(format!("it last said: {}", running.last_words()))),
    };
    steady.differences = compare(stage, &mut running, target).await?;
    running.stop().await.context("stopping it")?;
    Ok(steady)
}

async fn search(
    stage: &Stage<'_>,
    contender: Contender,
    running: &mut Running<'_>,
    watch: &LagWatch,
    target: &Server,
) -> Result<Steady> {
    let mut steady = Steady {
        contender,
        rate: None,
        bound_by_source: false,
        at_half: None,
        trials: Vec::new(),
        differences: Vec::new(),
    };
    let looking = target.connect(DATABASE).await?;
    let mut attempt = async |rate: Option<f64>, steady: &mut Steady| {
        recover(stage.options, running, &looking, watch).await?;
        let (trial, lags) = trial::run(stage, watch, rate).await?;
        say(format!("(g) {}: {}", contender.name(), trial.line()));
        steady.trials.push(trial.clone());
        Ok::<_, anyhow::Error>((trial, lags))
    };
    let (all_out, _) = attempt(None, &mut steady).await?;
    let (mut followed, mut too_much) = (all_out.followed.then_some(all_out.reached), all_out.reached);
    steady.bound_by_source = all_out.followed;
    let halvings = if all_out.followed { 0 } else { HALVINGS };
    for _ in 0..halvings {
        let rate = f64::midpoint(followed.unwrap_or(0.0), too_much);
        let (trial, _) = attempt(Some(rate), &mut steady).await?;
        if trial.followed {
            followed = Some(trial.reached);
        } else {
            too_much = rate;
            steady.bound_by_source = trial.worst_lag < BOUND.as_secs_f64();
        }
    }
    steady.rate = followed;
    if let Some(rate) = followed {
        let (trial, lags) = attempt(Some(rate / 2.0), &mut steady).await?;
        steady.at_half = Some((trial.reached, lags));
    }
    Ok(steady)
}

/// Waits until the lag of the try before has gone.
async fn recover(
    options: &Options,
    running: &mut Running<'_>,
    looking: &tokio_postgres::Client,
    watch: &LagWatch,
) -> Result<()> {
    let began = Instant::now();
    loop {
        // Nothing is done yet; but a program that has ended says so.
        running.is_done(Some(looking)).await?;
        if watch.newest()?.is_some_and(|lag| lag < RECOVERED) {
            return Ok(());
        }
        if began.elapsed() > options.limit() {
            bail!("the lag did not go back below {RECOVERED:?} within {:?}", options.limit());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits for the last transaction, and compares.
async fn compare(stage: &mut Stage<'_>, running: &mut Running<'_>, target: &Server) -> Result<Vec<String>> {
    stage.finish().await?;
    let looking = target.connect(DATABASE).await?;
    let began = Instant::now();
    while !running.is_done(Some(&looking)).await? {
        if began.elapsed() > stage.options.limit() {
            bail!("the last transaction did not arrive within {:?}", stage.options.limit());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let source = stage.content().await?;
    Ok(source.differences(&Content::of(&looking).await?))
}
