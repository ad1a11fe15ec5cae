//! `status`: where the move stands, also when no daemon runs.

use std::io::IsTerminal as _;

use tokio_util::sync::CancellationToken;

use crate::config::{Config, Environment};
use crate::error::Result;
use crate::telemetry::status::{self, Print};

/// Show where the move stands, also when no daemon runs
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pgtandem status --watch\n  pgtandem status --json | jq .lag")]
pub struct Args {
    /// Show it again and again until interrupted
    #[arg(long)]
    pub watch: bool,
    /// One JSON document on stdout; with --watch one object a line
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// The target cannot be reached.
pub async fn run(config: &Config, args: &Args, stop: &CancellationToken) -> Result<()> {
    let how = Print {
        watch: args.watch,
        json: args.json,
        terminal: std::io::stdout().is_terminal(),
        no_colour: Environment::of_process().no_color(),
    };
    status::print(config, how, &mut std::io::stdout(), stop).await
}
