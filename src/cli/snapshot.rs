//! `snapshot`: creates the slot, prints the snapshot's name and holds it.
//!
//! The state is installed on the target and the slot written down in it, so that a later `run` with
//! `copy.method = "none"` knows under which cut the rows were copied by hand.

use std::io::Write as _;

use tokio_util::sync::CancellationToken;

use crate::config::{Config, MoveName};
use crate::copy::by_hand;
use crate::error::{Class, Error, Result};
use crate::postgres::replication::Cut;
use crate::postgres::{Server, Side};
use crate::preflight;
use crate::state::Store;
use crate::telemetry::Telemetry;

/// Create the slot, print the name of its snapshot and hold it, for a pg_dump by hand; then run with copy.method = "none"
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  pgtandem snapshot\n  # and, in another terminal, while it holds:\n  pg_dump --snapshot=NAME_PRINTED --no-publications --no-subscriptions -Fd -j4 -f dump \"$PGTANDEM_SOURCE_URL\"\n  # then end it with ctrl-C, restore the dump into the target, and\n  PGTANDEM_COPY_METHOD=none pgtandem run"
)]
pub struct Args {
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

/// Holds the snapshot until told to stop.
///
/// # Errors
/// Class no: preflight found something that blocks. The slot cannot be made, or the connection that holds the snapshot was lost. Class held: a daemon runs this move.
pub async fn run(config: &Config, args: &Args, stop: &CancellationToken) -> Result<()> {
    let source = Server::new(Side::Source, config.source.clone(), config.name.as_str())?;
    let target = Server::new(Side::Target, config.target.clone(), config.name.as_str())?;
    let store = Store::new(target.clone(), config.name.clone());
    // A move that has its slot is refused below, whatever preflight would say by now.
    if store.find().await?.is_none_or(|record| record.slot_lsn.is_none()) {
        preflight::require(config, &source, &target).await?;
    }
    let identity = preflight::identity(&*source.connect("snapshot").await?).await?;
    store.install(&identity).await?;
    let Some(leadership) = store.try_lead().await? else {
        return Err(Error::new(Class::Held, "held", format!("a daemon runs the move {}", config.name))
            .hint("stop it first; a move that has begun has its slot already"));
    };
    let offered = by_hand::offer(&source, &store, config, &Telemetry::default(), stop).await;
    let (mut walsender, cut) = match offered {
        Err(_) if stop.is_cancelled() => return Ok(()),
        offered => offered?,
    };
    // The cut is written down: `run` may begin while the snapshot is still held.
    drop(leadership);
    print(&config.name, &cut, args.json)?;
    let lost = tokio::select! {
        () = stop.cancelled() => None,
        lost = walsender.closed() => Some(lost),
    };
    match lost {
        None => {
            walsender.close().await;
            Ok(())
        }
        Some(lost) => Err(lost
            .err()
            .unwrap_or_else(|| Error::bug("the walsender ended without an error"))
            .doing("holding the snapshot")
            .hint(
                "a dump that was not complete by now cannot be finished: `pgtandem clean`, then `pgtandem snapshot`",
            )),
    }
}

fn print(name: &MoveName, cut: &Cut, json: bool) -> Result<()> {
    let (snapshot, lsn, slot) = (&cut.snapshot, cut.lsn, name.slot());
    let mut stdout = std::io::stdout().lock();
    if json {
        let document = serde_json::json!({"snapshot": snapshot, "lsn": lsn.to_string(), "slot": slot});
        writeln!(stdout, "{document}")?;
    } else {
        writeln!(
            stdout,
            "snapshot  {snapshot}\nlsn       {lsn}\nslot      {slot}\n\n\
             Copy from it while this runs, for example:\n  \
             pg_dump --snapshot={snapshot} --no-publications --no-subscriptions -Fd -j4 -f dump \"$PGTANDEM_SOURCE_URL\"\n\
             End this with ctrl-C once the dump is complete; restore it into the target; then:\n  \
             PGTANDEM_COPY_METHOD=none pgtandem run"
        )?;
    }
    stdout.flush()?;
    Ok(())
}
