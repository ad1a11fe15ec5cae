//! `demo`: the whole story on two throw-away servers with live traffic.

use tokio_util::sync::CancellationToken;

use crate::error::Result;

/// Play the whole story on two throw-away servers with live traffic
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pgtandem demo --rows 200000 --keep")]
pub struct Args {
    /// Rows of the largest table
    #[arg(long, value_name = "N")]
    pub rows: Option<u64>,
    /// Leave the servers running and print their URLs
    #[arg(long)]
    pub keep: bool,
}

/// Runs the command.
///
/// # Errors
/// The story did not end well.
pub async fn run(_args: &Args, _stop: &CancellationToken) -> Result<()> {
    Err(super::not_available("demo"))
}
