//! `resync`: copies tables again while following.
//!
//! With a daemon, it is asked. Without one, what it shall do is written down for the next start: the command holds the
//! move for that moment, so that no daemon begins in between.

use std::io::Write as _;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::copy::again;
use crate::error::{Class, Error, Result};
use crate::postgres::{QualifiedName, Server, Side};
use crate::state::{MoveRecord, Phase, RequestKind, RequestState, Store, TableState};

/// Copy tables again while following
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pgtandem resync public.orders public.items")]
pub struct Args {
    /// schema.table; without a schema, public; * stands for any run of characters
    #[arg(required = true, value_name = "TABLE")]
    pub tables: Vec<String>,
}

/// How often the state is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long a daemon may take to notice the request.
const NOTICE: Duration = Duration::from_secs(20);

/// Runs the command: ends once the tables are copied and the target follows again. Interrupting it does not stop the daemon.
///
/// # Errors
/// Class no: a table is not part of the move, or the move does not follow.
pub async fn run(config: &Config, args: &Args) -> Result<()> {
    let source = Server::new(Side::Source, config.source.clone(), config.name.as_str())?;
    let target = Server::new(Side::Target, config.target.clone(), config.name.as_str())?;
    let store = Store::new(target, config.name.clone());
    let record = refuse_too_early_or_late(&store).await?;
    let tables = again::named(&source, &store, &args.tables).await?;
    if let Some(leadership) = store.try_lead().await? {
        store.copy_again(leadership.epoch(), &tables).await?;
        writeln!(std::io::stdout(), "{}: no daemon runs, the next one copies them again", list(&tables))?;
        return Ok(());
    }
    // A daemon that waits for a person takes the request between two tries; what it waits for stands in the state.
    if record.phase != Phase::Follow && record.error.is_none() {
        return Err(no("not_following", format!("the move is in phase {}, not following", record.phase))
            .hint("`pgtandem status --watch` shows when it follows; then ask again"));
    }
    let names: Vec<[&str; 2]> = tables.iter().map(|table| [table.schema.as_str(), table.name.as_str()]).collect();
    let id = store.submit(RequestKind::Resync, &serde_json::json!({"tables": names}), NOTICE).await?;
    accepted(&store, id).await?;
    writeln!(std::io::stdout(), "{}: being copied again", list(&tables))?;
    copied(&store, &tables).await?;
    writeln!(std::io::stdout(), "copied again; the target follows")?;
    Ok(())
}

async fn refuse_too_early_or_late(store: &Store) -> Result<MoveRecord> {
    let name = store.name();
    match store.find().await? {
        None => Err(no("no_move", format!("the target knows no move {name}")).hint("begin it with `pgtandem run`")),
        Some(record) => match record.phase {
            Phase::Done => Err(no("already_done", format!("the move {name} was cut over already"))),
            Phase::Preflight | Phase::Schema => {
                Err(no("not_following", format!("the move {name} has copied nothing yet"))
                    .hint("begin it with `pgtandem run`"))
            }
            _ => Ok(record),
        },
    }
}

/// Waits until the daemon has taken the request.
async fn accepted(store: &Store, id: i64) -> Result<()> {
    let deadline = Instant::now() + NOTICE + Duration::from_secs(5);
    loop {
        let request = store.request(id).await?;
        match request.as_ref().map(|request| request.state) {
            Some(RequestState::Succeeded) => return Ok(()),
            Some(RequestState::Failed) => {
                let answer = request.and_then(|request| request.answer).unwrap_or_default();
                let text = |name: &str| answer.pointer(name).and_then(serde_json::Value::as_str).map(str::to_owned);
                let error = no(
                    "resync_refused",
                    text("/error/message").unwrap_or_else(|| "the daemon gave no reason".to_owned()),
                );
                return Err(match text("/error/hint") {
                    Some(hint) => error.hint(hint),
                    None => error,
                });
            }
            Some(RequestState::Waiting | RequestState::Running) if Instant::now() < deadline => {}
            _ => {
                // One that was begun in this very moment is carried out all the same.
                store.withdraw(id).await?;
                return Err(no("not_noticed", "no daemon took the request in time".to_owned())
                    .hint("look at the daemon's log, and at `pgtandem status`"));
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Waits until all are copied and the move follows.
async fn copied(store: &Store, tables: &[QualifiedName]) -> Result<()> {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Some(record) = store.find().await? else {
            return Err(no("no_move", "the state of the move vanished".to_owned()));
        };
        if let Some(error) = record.error.as_ref().filter(|_| record.phase != Phase::Follow) {
            let message = error.get("message").and_then(serde_json::Value::as_str).unwrap_or("an error");
            return Err(no("resync_stopped", format!("the daemon stopped before the tables were copied: {message}"))
                .hint("`pgtandem status` shows more; the next `pgtandem run` goes on copying them"));
        }
        let open = store.tables().await?.into_iter().any(|t| t.state != TableState::Copied && tables.contains(&t.name));
        if !open && matches!(record.phase, Phase::Follow | Phase::Cutover | Phase::Done) {
            return Ok(());
        }
    }
}

fn list(tables: &[QualifiedName]) -> String {
    tables.iter().map(QualifiedName::plain).collect::<Vec<_>>().join(", ")
}

fn no(code: &'static str, message: String) -> Error {
    Error::new(Class::No, code, message)
}
