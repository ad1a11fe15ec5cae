//! `snapshot`: creates the slot, prints the snapshot's name and holds it.

use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::error::Result;

/// Create the slot, print the name of its snapshot and hold it, for a pg_dump by hand; then run with copy.method = "none"
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pgtandem snapshot &\n  pg_dump --snapshot=NAME_PRINTED …")]
pub struct Args {}

/// Runs the command.
///
/// # Errors
/// The slot cannot be made.
pub async fn run(_config: &Config, _args: &Args, _stop: &CancellationToken) -> Result<()> {
    Err(super::not_available("snapshot"))
}
