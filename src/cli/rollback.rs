//! `rollback`: after a cutover with the way back armed, the same in the other direction.

use crate::config::Config;
use crate::error::Result;

/// After a cutover with the way back armed: switch back to the old source
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pgtandem rollback")]
pub struct Args {
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// Class no: the way back was not taken.
pub async fn run(_config: &Config, _args: &Args) -> Result<()> {
    Err(super::not_available("rollback"))
}
