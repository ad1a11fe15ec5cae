//! `clean`: removes what this move made on both servers, and only that.

use crate::config::Config;
use crate::error::Result;

/// Remove slot, publication, triggers and state that this move made, and only that
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pgtandem clean --yes")]
pub struct Args {
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

/// Runs the command.
///
/// # Errors
/// A server cannot be reached; a daemon is running.
pub async fn run(_config: &Config, _args: &Args) -> Result<()> {
    Err(super::not_available("clean"))
}
