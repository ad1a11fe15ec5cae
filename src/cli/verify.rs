//! `verify`: compares both sides at a cut while changes flow.

use crate::config::Config;
use crate::error::Result;

/// Compare the rows of both sides at a cut, while changes flow
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pgtandem verify --table public.orders --table public.items")]
pub struct Args {
    /// Compare this table only; may be given several times
    #[arg(long = "table", value_name = "TABLE")]
    pub tables: Vec<String>,
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// Class no: the sides differ.
pub async fn run(_config: &Config, _args: &Args) -> Result<()> {
    Err(super::not_available("verify"))
}
