//! `status`: where the move stands, also when no daemon runs.

use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::error::Result;

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
pub async fn run(_config: &Config, _args: &Args, _stop: &CancellationToken) -> Result<()> {
    Err(super::not_available("status"))
}
