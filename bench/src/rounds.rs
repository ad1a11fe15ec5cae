//! Who drains when: every contender once in each round, in an order that rotates, one after another.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::contender::Contender;
use crate::drain::{self, Drain};
use crate::options::Options;
use crate::outcome::Outcome;
use crate::programs::Programs;
use crate::say;
use crate::servers::Servers;
use crate::stage::Stage;
use crate::workload::Kind;

/// A peer's time limit is never shorter: it may take a while to get going.
const LEAST_PATIENCE: Duration = Duration::from_secs(60);

/// What came out of one workload.
pub(crate) struct Results {
    pub(crate) kind: Kind,
    pub(crate) title: String,
    /// Log that the backlog made, in bytes.
    pub(crate) backlog_bytes: u64,
    pub(crate) drains: Vec<Drain>,
}

/// Plays one workload: sets up, lets every contender drain in every round, clears away.
pub(crate) async fn play(kind: Kind, options: &Options, programs: &Programs, servers: &Servers) -> Result<Results> {
    let (title, letter) = (kind.title(options), kind.letter());
    say(format!("({letter}) {title}"));
    let contenders = options.contenders(kind, programs);
    let mut stage = Stage::set_up(kind, &contenders, options, programs, servers).await?;
    let content = stage.make_backlog().await?;

    let mut drains: Vec<Drain> = Vec::new();
    let mut given_up = HashSet::new();
    for round in 0..options.rounds as usize {
        for turn in 0..contenders.len() {
            // Nobody always comes first.
            let contender = contenders[(round + turn) % contenders.len()];
            if given_up.contains(&contender) {
                continue;
            }
            let limit = limit(contender, &drains, options);
            let drain = drain::drain(&stage, contender, &content, limit).await;
            let drain = drain.with_context(|| format!("({letter}) {}", contender.name()))?;
            say(format!("({letter}) round {}: {}", round + 1, drain.line()));
            // Waiting once more for a peer that cannot would tell nothing new.
            if !contender.must_drain() && !drain.is_drained() {
                given_up.insert(contender);
            }
            drains.push(drain);
        }
    }
    let backlog_bytes = stage.backlog_bytes;
    stage.clear_away().await?;
    Ok(Results { kind, title, backlog_bytes, drains })
}

/// How long a drain may take. A peer that may fail gets a multiple of what the native subscription took last.
fn limit(contender: Contender, drains: &[Drain], options: &Options) -> Duration {
    if contender.must_drain() {
        return options.limit();
    }
    let native = drains.iter().rev().find_map(|drain| match drain.outcome {
        Outcome::Done(seconds) if drain.contender == Contender::Native => Some(seconds),
        _ => None,
    });
    let patience = native.map(|seconds| Duration::from_secs_f64(seconds * options.patience).max(LEAST_PATIENCE));
    patience.map_or(options.limit(), |patience| patience.min(options.limit()))
}
