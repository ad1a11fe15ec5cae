//! One contender copies once.
//!
//! Measured is the time from the start of its program until it has ended, or until every table of the subscription is in step; and
//! the ANALYZE that it leaves to its user. What comes before (an empty target, a checkpoint) and after (comparing, cleaning) is not.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::contender::Contender;
use super::contender::pgtandem;
use super::dataset::Dataset;
use super::ground::Ground;
use super::planning;
use super::statistics;
use super::stopwatch::Stopwatch;
use super::traffic::{Loss, Traffic};
use crate::measure::Costs;
use crate::outcome::Outcome;
use crate::say;

/// One copy.
#[derive(Clone, Debug)]
pub(crate) struct Trial {
    pub(crate) contender: Contender,
    pub(crate) outcome: Outcome,
    /// Of the time: what gathering statistics took after the contender had ended.
    pub(crate) statistics: Option<f64>,
    pub(crate) costs: Costs,
    /// What differs on the target; none if it was not done, or cannot be compared.
    pub(crate) differences: Option<Vec<String>>,
    /// Seconds from the copy's start until the first row was on its way.
    pub(crate) planning: Option<f64>,
    /// What it cost the traffic on the source.
    pub(crate) loss: Option<Loss>,
}

impl Trial {
    /// How it went, for people.
    pub(crate) fn line(&self) -> String {
        let name = self.contender.name();
        match (&self.outcome, &self.differences) {
            (Outcome::Failed(reason), _) => format!("{name} failed: {reason}"),
            (Outcome::Over(seconds), _) => format!("{name} was not done after {seconds:.0} s"),
            (Outcome::Done(seconds), None) => format!("{name} {seconds:.2} s, not compared"),
            (Outcome::Done(seconds), Some(found)) if found.is_empty() => {
                format!("{name} {seconds:.2} s, identical to the source")
            }
            (Outcome::Done(seconds), Some(found)) => {
                format!("{name} {seconds:.2} s, DIFFERENT from the source: {}", found.join("; "))
            }
        }
    }

    /// Done, and not found to differ. Only such a copy has a time worth comparing.
    pub(crate) fn seconds(&self) -> Option<f64> {
        match self.outcome {
            Outcome::Done(seconds) if !self.differs() => Some(seconds),
            _ => None,
        }
    }

    /// The target was compared, and holds something else.
    pub(crate) fn differs(&self) -> bool {
        self.differences.as_ref().is_some_and(|found| !found.is_empty())
    }

    pub(crate) fn json(&self) -> Value {
        let (outcome, seconds, reason) = match &self.outcome {
            Outcome::Done(seconds) => ("done", Some(seconds), None),
            Outcome::Over(seconds) => ("over", Some(seconds), None),
            Outcome::Failed(reason) => ("failed", None, Some(reason)),
        };
        json!({
            "contender": self.contender.name(), "outcome": outcome, "seconds": seconds, "reason": reason,
            "statistics_seconds": self.statistics, "costs": self.costs.json(), "differences": self.differences,
            "planning_seconds": self.planning, "traffic": self.loss.as_ref().map(Loss::json),
        })
    }
}

/// Copies once, and leaves the source as it was.
///
/// # Errors
/// Of what is around it. What the contender itself cannot do is an outcome.
pub(crate) async fn play(ground: &Ground<'_>, contender: Contender) -> Result<Trial> {
    ground.reset().await?;
    let mut traffic = if ground.dataset.is_busy() { Some(Traffic::begin(ground).await?) } else { None };
    let mut trial = copy(ground, contender, traffic.as_mut()).await?;
    if let Some(traffic) = traffic {
        traffic.end().await?;
    }
    if let Outcome::Done(_) = trial.outcome {
        // Traffic has moved the source on since the copy began.
        if !ground.dataset.is_busy() || contender.catch_up(ground).await? {
            trial.differences = Some(ground.differences().await?);
        }
    }
    contender.clean(ground).await.with_context(|| format!("cleaning up after {}", contender.name()))?;
    ground.drop_slots().await?;
    Ok(trial)
}

async fn copy(ground: &Ground<'_>, contender: Contender, mut traffic: Option<&mut Traffic>) -> Result<Trial> {
    let limit = ground.options.limit();
    if let Some(traffic) = &mut traffic {
        traffic.start_over().await?;
    }
    let mut clock = Stopwatch::start(ground.pair)?;
    let work = async {
        contender.copy(ground, &mut clock).await?;
        let copied = clock.seconds();
        let sessions = contender.analyzed_by(ground.copy.jobs);
        let analyzed = clock.during(statistics::gather(&ground.pair.target, sessions)).await?;
        let all = clock.seconds();
        anyhow::Ok((all, (analyzed > 0).then_some(all - copied)))
    };
    let done = tokio::time::timeout(limit, work).await;
    let costs = clock.costs();
    let loss = match traffic {
        Some(traffic) => Some(traffic.so_far().await?),
        None => None,
    };
    let (outcome, statistics) = match done {
        Ok(Ok((seconds, statistics))) => (Outcome::Done(seconds), statistics),
        Ok(Err(reason)) => (Outcome::Failed(format!("{reason:#}")), None),
        Err(_) => (Outcome::Over(limit.as_secs_f64()), None),
    };
    let planning = match outcome {
        Outcome::Done(_) if ground.dataset == Dataset::Many => Some(planned(ground).await?),
        _ => None,
    };
    Ok(Trial { contender, outcome, statistics, costs, differences: None, planning, loss })
}

/// How long pgtandem took to plan.
async fn planned(ground: &Ground<'_>) -> Result<f64> {
    let log = pgtandem::commands(ground)?.log;
    let seconds = planning::seconds(&log, &ground.pair.target.connect("postgres").await?).await?;
    say(format!("the first row was on its way {seconds:.2} s after the copy's start"));
    Ok(seconds)
}
