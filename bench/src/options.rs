//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::contender::Contender;
use crate::copy::CopyOptions;
use crate::programs::Programs;
use crate::workload::Kind;

/// Measures how fast a backlog is followed, side by side on throw-away servers: the native subscription, pgtandem, pgcopydb,
/// and a reader that applies nothing.
#[derive(Debug, Parser)]
#[command(name = "bench", subcommand_precedence_over_arg = true)]
#[command(after_help = "Example:\n  make bench BENCH=\"a c --rounds 3 --scale 0.05\"")]
pub(crate) struct Options {
    #[command(subcommand)]
    pub(crate) command: Option<Task>,
    /// The workloads, by letter; all of them if none is given
    #[arg(value_enum)]
    workloads: Vec<Kind>,
    /// How often each contender drains each backlog, or copies each data set
    #[arg(long, global = true, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) rounds: u32,
    /// The size of every workload or data set, 1 being the size that the README tells
    #[arg(long, global = true, default_value_t = 1.0, value_parser = positive)]
    pub(crate) scale: f64,
    /// The major version of the source
    #[arg(long, global = true, default_value_t = 15, value_parser = clap::value_parser!(u16).range(13..=18))]
    pub(crate) source: u16,
    /// The major version of every target
    #[arg(long, global = true, default_value_t = 15, value_parser = clap::value_parser!(u16).range(13..=18))]
    pub(crate) target: u16,
    /// Who takes part
    #[arg(long, value_enum, value_delimiter = ',', default_value = "native,pgtandem,pgtandem-2,pgcopydb,null")]
    contenders: Vec<Contender>,
    /// The rows of workload h, before the scale
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub(crate) rows: u64,
    /// How long each rate of workload g is held, in seconds
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(2..=3600))]
    pub(crate) seconds: u32,
    /// How long any drain or copy may take, in seconds
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// How often the native subscription's time pgcopydb may take
    #[arg(long, value_name = "FACTOR", default_value_t = 10.0, value_parser = positive)]
    pub(crate) patience: f64,
    /// Writes every measurement into this file, too
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// The pgtandem to measure; the release build of this checkout if none is given
    #[arg(long, global = true, value_name = "PROGRAM")]
    pub(crate) pgtandem: Option<PathBuf>,
    /// Reads a slot named on stdin and applies nothing: one of the contenders.
    #[arg(long, hide = true)]
    pub(crate) null_reader: bool,
}

/// What is measured instead.
#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    Copy(CopyOptions),
}

impl Options {
    /// The workloads in the order of their letters, each once.
    pub(crate) fn workloads(&self) -> Vec<Kind> {
        let all = <Kind as clap::ValueEnum>::value_variants();
        all.iter().copied().filter(|kind| self.workloads.is_empty() || self.workloads.contains(kind)).collect()
    }

    /// Those who take part in a workload, and can.
    pub(crate) fn contenders(&self, kind: Kind, programs: &Programs) -> Vec<Contender> {
        let all = <Contender as clap::ValueEnum>::value_variants();
        let can = |contender: &Contender| match contender {
            Contender::Pgcopydb => programs.pgcopydb.is_some(),
            _ => true,
        };
        let wanted = |contender: &Contender| self.contenders.contains(contender) && kind.is_for(*contender);
        all.iter().copied().filter(|contender| wanted(contender) && can(contender)).collect()
    }

    /// Whether pgcopydb is to take part.
    pub(crate) fn wants(&self, contender: Contender) -> bool {
        self.contenders.contains(&contender)
    }

    pub(crate) fn limit(&self) -> Duration {
        Duration::from_secs(self.limit)
    }

    /// A number of rows or transactions at this scale; at least one.
    pub(crate) fn scaled(&self, full: u64) -> u64 {
        // Sizes of workloads are far below the integers that a float holds exactly.
        ((full as f64 * self.scale).round() as u64).max(1)
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err("a number above 0 is wanted".to_owned()),
    }
}
