//! `check`: preflight on both sides; writes nothing.

use crate::config::Config;
use crate::error::Result;

/// Look at both servers and say everything that would stand in the way; writes nothing
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pgtandem check --config pgtandem.toml")]
pub struct Args {
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// Class no: there are blocking findings.
pub async fn run(_config: &Config, _args: &Args) -> Result<()> {
    Err(super::not_available("check"))
}
