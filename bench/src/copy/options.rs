//! The command line of the copy.

use clap::{Args, ValueEnum};

use super::contender::Contender;
use super::contender::pgcopydb::Peers;
use super::dataset::Dataset;

/// Measures the first copy instead, side by side on throw-away servers: pg_dump and pg_restore, pgcopydb, the native
/// subscription, and pgtandem.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  make bench-copy BENCH=\"mixed small --rounds 3 --scale 0.05\"")]
pub(crate) struct CopyOptions {
    /// The data sets; all of them if none is given
    #[arg(value_enum)]
    datasets: Vec<Dataset>,
    /// Who takes part; if none is given, all who say something about the data set
    #[arg(long, value_enum, value_delimiter = ',')]
    contenders: Vec<Contender>,
    /// How many tables are copied at once, by whoever can
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) jobs: u16,
    /// How many indexes are built at once, by those who tell it apart
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) index_jobs: u16,
    /// For how long pgbench's undisturbed rate is measured before each copy of busy, in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub(crate) seconds: u32,
}

impl CopyOptions {
    /// The data sets in their own order, each once.
    pub(crate) fn datasets(&self) -> Vec<Dataset> {
        let all = Dataset::value_variants().iter().copied();
        all.filter(|dataset| self.datasets.is_empty() || self.datasets.contains(dataset)).collect()
    }

    /// Those who copy a data set, and can.
    pub(crate) fn contenders(&self, dataset: Dataset, peers: &Peers) -> Vec<Contender> {
        let wanted = |contender: &Contender| {
            dataset.is_for(*contender)
                && if self.contenders.is_empty() { dataset.asks(*contender) } else { self.names(*contender) }
        };
        Contender::ALL.into_iter().filter(|contender| wanted(contender) && contender.can(peers)).collect()
    }

    /// Whether anybody may ask for this one.
    pub(crate) fn wants(&self, contender: Contender) -> bool {
        self.contenders.is_empty() || self.names(contender)
    }

    /// Whether it was named. Who is killed is pgtandem, too.
    fn names(&self, contender: Contender) -> bool {
        let named = if contender == Contender::PgtandemKilled { Contender::Pgtandem } else { contender };
        self.contenders.contains(&named)
    }
}
