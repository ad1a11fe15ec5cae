//! `clean`: removes what this move made on both servers, and only that.

use std::io::{IsTerminal as _, Write as _};

use crate::config::Config;
use crate::cutover::fence;
use crate::error::{Class, Doing as _, Error, Result};
use crate::postgres::{Server, Side, quote_identifier};
use crate::state::{Phase, Store};
use crate::supervisor;

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
/// A server cannot be reached; class no: a daemon is running, or the question was answered with no.
pub async fn run(config: &Config, args: &Args) -> Result<()> {
    let source = Server::new(Side::Source, config.source.clone(), config.name.as_str())?;
    let target = Server::new(Side::Target, config.target.clone(), config.name.as_str())?;
    let store = Store::new(target, config.name.clone());
    let record = store.find().await?;
    if record.is_some() && store.is_led().await? {
        return Err(Error::new(Class::No, "daemon_running", "a daemon runs this move").hint("stop it first"));
    }
    if !args.yes {
        confirm(config, record.as_ref().map(|record| record.phase))?;
    }
    // The state goes last: whatever fails before can be cleaned again.
    let slot = config.name.slot();
    supervisor::drop_slot(&source, &slot).await?;
    fence::remove(&source, config.name.as_str()).await?;
    let session = source.connect("clean").await?;
    for publication in [config.name.publication(), config.name.insert_publication()] {
        session
            .batch_execute(&format!(
                "SET client_min_messages = error; DROP PUBLICATION IF EXISTS {}",
                quote_identifier(&publication)
            ))
            .await
            .doing(|| format!("dropping the publication {publication}"))?;
    }
    if record.is_some() {
        store.remove().await?;
    }
    writeln!(
        std::io::stdout(),
        "removed what the move {} made on both servers; tables and rows were not touched",
        config.name
    )?;
    Ok(())
}

/// Asks on the terminal; without one, the answer is no.
fn confirm(config: &Config, phase: Option<Phase>) -> Result<()> {
    let refused = |message: &str| Err(Error::new(Class::No, "not_confirmed", message).hint("--yes answers beforehand"));
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return refused("nobody is there to confirm");
    }
    let consequence = match phase {
        Some(Phase::Done) => "The source will take writes again.",
        Some(_) => "Following cannot be taken up again: the move begins anew.",
        None => "The target knows nothing of this move.",
    };
    let mut out = std::io::stderr().lock();
    write!(out, "Remove slot, publications, triggers and state of the move {}? {consequence} [y/N] ", config.name)?;
    out.flush()?;
    let mut answer = String::new();
    stdin.read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { refused("not removed") }
}
