//! `run`: the daemon.

use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::error::Result;
use crate::supervisor::{self, Options};
use crate::telemetry::progress::Terminal;

/// `run --until`
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Until {
    /// The copy is complete.
    Copy,
    /// The lag first reached zero.
    Follow,
}

/// Move the database: schema, copy, catchup, follow; waits for a cutover and resumes wherever it was
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pgtandem run --until copy\n  pgtandem run")]
pub struct Args {
    /// Stop cleanly once the copy is complete, or once the lag first reached zero; a later run goes on
    #[arg(long, value_name = "PHASE", conflicts_with = "cutover_when_ready")]
    pub until: Option<Until>,
    /// Cut over as soon as the lag is below cutover.max_lag: the whole move in one go
    #[arg(long)]
    pub cutover_when_ready: bool,
    /// Exit with code 5 if another daemon holds this move, instead of waiting as a standby
    #[arg(long)]
    pub no_standby: bool,
}

/// Runs the command.
///
/// # Errors
/// Whatever ended the move; a clean stop is none.
pub async fn run(config: &Config, args: &Args, terminal: &Terminal, stop: &CancellationToken) -> Result<()> {
    let options = Options {
        until: match args.until {
            None => supervisor::Until::Cutover,
            Some(Until::Copy) => supervisor::Until::Copy,
            Some(Until::Follow) => supervisor::Until::Follow,
        },
        cutover_when_ready: args.cutover_when_ready,
        standby: !args.no_standby,
    };
    supervisor::run(config, options, terminal, stop).await
}
