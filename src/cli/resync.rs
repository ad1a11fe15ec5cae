//! `resync`: copies tables again while following.

use crate::config::Config;
use crate::error::Result;

/// Copy tables again while following
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pgtandem resync public.orders public.items")]
pub struct Args {
    /// schema.table; without a schema, public
    #[arg(required = true, value_name = "TABLE")]
    pub tables: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// A table is not part of the move; no daemon holds it.
pub async fn run(_config: &Config, _args: &Args) -> Result<()> {
    Err(super::not_available("resync"))
}
