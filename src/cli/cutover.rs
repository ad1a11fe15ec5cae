//! `cutover`: asks the daemon to cut over, and prints each step and the write pause.

use std::time::Duration;

use crate::config::Config;
use crate::error::Result;

/// Switch over: fence the source, drain, set sequences, run the hook; prints each step and the write pause
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pgtandem cutover --dry-run\n  pgtandem cutover --timeout 30s")]
pub struct Args {
    /// Lift the fence and go on following if the switch is not done after this; 1s to 1h [default: cutover.timeout]
    #[arg(long, value_name = "DURATION", value_parser = timeout)]
    pub timeout: Option<Duration>,
    /// Say what would be done and what stands in the way; changes nothing
    #[arg(long)]
    pub dry_run: bool,
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// Class no: the cutover did not happen, and writes are back on at the source.
pub async fn run(_config: &Config, _args: &Args) -> Result<()> {
    Err(super::not_available("cutover"))
}

fn timeout(text: &str) -> std::result::Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(given) if (1..=3600).contains(&given.as_secs()) => Ok(given),
        _ => Err("a duration with its unit from 1s to 1h, such as 30s".to_owned()),
    }
}
