//! Who copies when: every contender once in each round, in an order that rotates, one after another.

use anyhow::{Context, Result};

use super::CopyOptions;
use super::contender::Contender;
use super::contender::pgcopydb::Peers;
use super::dataset::Dataset;
use super::ground::Ground;
use super::trial::{self, Trial};
use crate::options::Options;
use crate::programs::Programs;
use crate::say;
use crate::servers::Pair;

/// What came out of one data set.
pub(crate) struct Results {
    pub(crate) dataset: Dataset,
    pub(crate) title: String,
    /// What it takes on the source's disk.
    pub(crate) bytes: u64,
    /// Those who took part, in the order of the tables.
    pub(crate) contenders: Vec<Contender>,
    pub(crate) trials: Vec<Trial>,
}

/// Plays one data set: fills the source, lets every contender copy it in every round, clears away.
pub(crate) async fn play(
    dataset: Dataset,
    options: &Options,
    copy: &CopyOptions,
    programs: &Programs,
    peers: &Peers,
    pair: &Pair,
) -> Result<Results> {
    let (title, name) = (dataset.title(options), dataset.name());
    say(format!("{name}: {title}"));
    let contenders = copy.contenders(dataset, peers);
    let &first = contenders.first().with_context(|| format!("{name}: nobody takes part"))?;
    let ground = Ground::prepare(dataset, options, copy, programs, peers, pair).await?;
    // The target's server has written as much log once before anybody is measured: writing it anew, the files are there already.
    if dataset.is_warmed_up() {
        let warm_up = trial::play(&ground, first).await.with_context(|| format!("{name}: warming up"))?;
        say(format!("{name}: not counted: {}", warm_up.line()));
    }

    let mut trials: Vec<Trial> = Vec::new();
    for round in 0..options.rounds as usize {
        for turn in 0..contenders.len() {
            // Nobody always comes first.
            let contender = contenders[(round + turn) % contenders.len()];
            let trial = trial::play(&ground, contender).await;
            let trial = trial.with_context(|| format!("{name}: {}", contender.name()))?;
            say(format!("{name}, round {}: {}", round + 1, trial.line()));
            trials.push(trial);
        }
    }
    let bytes = ground.bytes;
    ground.clear_away().await?;
    Ok(Results { dataset, title, bytes, contenders, trials })
}
