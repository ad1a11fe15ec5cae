//! One contender drains one backlog.
//!
//! Measured is the time from its start (the command that enables the subscription, or the start of the program) until the row
//! of the backlog's last transaction is visible on the target. What comes before (a fresh target, a slot, the checkpoint) and
//! after (stopping, comparing) is not.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::contender::Contender;
use crate::measure::{Costs, Watch};
use crate::outcome::Outcome;
use crate::same::Content;
use crate::servers::Server;
use crate::stage::{DATABASE, Stage};

/// How often the target is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// How many looks at the target there are to one look at the processes.
const PROCESSES_EVERY: u32 = 10;

/// One drain.
#[derive(Clone, Debug)]
pub(crate) struct Drain {
    pub(crate) contender: Contender,
    pub(crate) outcome: Outcome,
    /// How long after its start it held its slot, in seconds: what it took to get going.
    pub(crate) streaming_after: Option<f64>,
    pub(crate) costs: Costs,
    /// What differs on the target; none for who has no target, or was not done.
    pub(crate) differences: Option<Vec<String>>,
}

impl Drain {
    /// How it went, for people.
    pub(crate) fn line(&self) -> String {
        let name = self.contender.name();
        match (&self.outcome, &self.differences) {
            (Outcome::Done(seconds), Some(found)) if !self.is_drained() => {
                format!("{name} {seconds:.2} s, DIFFERENT from the source: {}", found.join("; "))
            }
            (Outcome::Failed(reason), _) => format!("{name} failed: {reason}"),
            (Outcome::Over(seconds), _) => format!("{name} was not done after {seconds:.0} s"),
            (Outcome::Done(seconds), None) => format!("{name} {seconds:.2} s"),
            (Outcome::Done(seconds), Some(_)) => format!("{name} {seconds:.2} s, identical to the source"),
        }
    }

    /// The target holds what the source holds, as far as there is a target. Only such a drain has a time worth comparing.
    pub(crate) fn is_drained(&self) -> bool {
        matches!(self.outcome, Outcome::Done(_)) && !self.differs()
    }

    /// The target was compared, and holds something else.
    pub(crate) fn differs(&self) -> bool {
        self.differences.as_ref().is_some_and(|found| !found.is_empty())
    }

    pub(crate) fn json(&self) -> Value {
        let (outcome, seconds, reason) = match &self.outcome {
            Outcome::Done(seconds) => ("drained", Some(seconds), None),
            Outcome::Over(seconds) => ("over", Some(seconds), None),
            Outcome::Failed(reason) => ("failed", None, Some(reason)),
        };
        json!({
            "contender": self.contender.name(), "outcome": outcome, "seconds": seconds, "reason": reason,
            "streaming_after_seconds": self.streaming_after, "costs": self.costs.json(), "differences": self.differences,
        })
    }
}

/// Drains the backlog once.
///
/// # Errors
/// Of what is around it. What the contender itself cannot do is an outcome.
pub(crate) async fn drain(stage: &Stage<'_>, contender: Contender, source: &Content, limit: Duration) -> Result<Drain> {
    let target = contender.target(stage.servers);
    if let Some(target) = target {
        stage.reset(target).await?;
    }
    stage.give_slot(contender).await?;
    let looking = match target {
        Some(target) => Some(target.connect(DATABASE).await?),
        None => None,
    };
    let ready = match contender.prepare(stage).await {
        Ok(ready) => ready,
        Err(reason) if !contender.must_drain() => {
            return Ok(Drain {
                contender,
                outcome: Outcome::Failed(format!("{reason:#}")),
                streaming_after: None,
                costs: Costs::default(),
                differences: None,
            });
        }
        Err(reason) => return Err(reason),
    };

    let mut watch = Watch::begin(target.map(Server::postmaster))?;
    let began = Instant::now();
    let mut running = ready.start().await?;
    watch.daemon(running.process_id());
    let mut streaming_after = None;
    let mut looks: u32 = 0;
    let outcome = loop {
        match running.is_done(looking.as_ref()).await {
            Ok(true) => break Outcome::Done(began.elapsed().as_secs_f64()),
            Ok(false) => {}
            Err(reason) => break Outcome::Failed(format!("{reason:#}")),
        }
        if began.elapsed() > limit {
            break Outcome::Over(limit.as_secs_f64());
        }
        if streaming_after.is_none() || looks.is_multiple_of(PROCESSES_EVERY) {
            if let Some(walsender) = stage.slot_reader(contender.slot()).await? {
                streaming_after.get_or_insert_with(|| began.elapsed().as_secs_f64());
                watch.walsender(walsender);
            }
            watch.look()?;
        }
        looks += 1;
        tokio::time::sleep(LOOK_EVERY).await;
    };
    watch.look()?;
    let costs = watch.costs();

    if let Outcome::Over(_) = outcome {
        crate::say(format!("{} last said: {}", contender.name(), running.last_words()));
    }
    running.stop().await.context("stopping it")?;
    drop(looking);
    let differences = match (target, &outcome) {
        (Some(target), Outcome::Done(_)) => {
            Some(source.differences(&Content::of(&target.connect(DATABASE).await?).await?))
        }
        _ => None,
    };
    stage.drop_slot(contender.slot()).await?;
    Ok(Drain { contender, outcome, streaming_after, costs, differences })
}
