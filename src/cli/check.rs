//! `check`: preflight on both sides; writes nothing.

use std::io::{IsTerminal as _, Write as _};

use crate::config::Config;
use crate::error::{Class, Error, Result};
use crate::postgres::{Server, Side};
use crate::preflight::{self, Report};

/// Look at both servers and say everything that would stand in the way; writes nothing
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  pgtandem check --config pgtandem.toml\n  pgtandem check --json | jq -r '.findings[].fix'"
)]
pub struct Args {
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

/// Prints everything that preflight found.
///
/// # Errors
/// Class no: there are blocking findings. Class retry: a server cannot be reached; the findings say which, and why.
pub async fn run(config: &Config, args: &Args) -> Result<()> {
    let source = Server::new(Side::Source, config.source.clone(), config.name.as_str())?;
    let target = Server::new(Side::Target, config.target.clone(), config.name.as_str())?;
    let report = preflight::run(config, &source, &target).await;
    print(&report, args.json)?;
    verdict(&report)
}

fn print(report: &Report, json: bool) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    if json {
        writeln!(stdout, "{}", report.to_json())?;
    } else {
        write!(stdout, "{}", report.to_text(stdout.is_terminal()))?;
    }
    Ok(())
}

/// What the process ends with.
fn verdict(report: &Report) -> Result<()> {
    let silent: Vec<_> = report.unreachable_sides().collect();
    if !silent.is_empty() {
        let message = format!("cannot ask the {}", silent.join(" and the "));
        return Err(Error::new(Class::Retry, "connection_failed", message).hint("the findings say why, and what to do"));
    }
    let blocking: Vec<_> = report.blocking().map(|finding| finding.code).collect();
    if blocking.is_empty() {
        return Ok(());
    }
    Err(Error::new(Class::No, "preflight_failed", format!("the move cannot begin: {}", blocking.join(", ")))
        .hint("mend what the findings name, then check again"))
}
