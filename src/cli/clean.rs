//! `clean`: removes what this move made on both servers, and only that.
//!
//! A subscription goes before all, for its worker reads the slot. Else the source comes first: whatever became of the target, WAL must not pile up behind a slot and writes must be let in
//! again. What was disabled on the target until the cutover comes back before the state that remembers it goes.

use std::io::{IsTerminal as _, Write as _};

use crate::config::{Config, MoveName};
use crate::cutover::fence;
use crate::error::{Class, Doing as _, Error, Result};
use crate::follow::ddl::capture::Capture;
use crate::follow::{spool, subscription};
use crate::leftover::identity;
use crate::postgres::{Server, Side, quote_identifier};
use crate::state::{MoveRecord, Phase, Store};
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
/// The source cannot be reached. Class no: a daemon is running, or the question was answered with no. Class wait: the
/// source is clean, but the target could not be asked.
pub async fn run(config: &Config, args: &Args) -> Result<()> {
    let source = Server::new(Side::Source, config.source.clone(), config.name.as_str())?;
    let target = Server::new(Side::Target, config.target.clone(), config.name.as_str())?;
    let store = Store::new(target, config.name.clone());
    let known = Known::of(&store).await;
    let left = Left::on(&source, &config.name).await?;
    refuse_beside_a_daemon(config, &known, &left)?;
    agree(config, args, &known, &left).await?;
    // Its worker reads the slot.
    if let Known::Move { .. } = known
        && subscription::remove(store.target(), &config.name).await?
    {
        say(&format!("target: removed the subscription {}", config.name.slot()))?;
    }
    clean_source(&source, &config.name, &left).await?;
    // What it holds belongs to the slot that is gone.
    match spool::clean(config) {
        Ok(Some(folder)) => say(&format!("here: removed the spool {}", folder.display()))?,
        Ok(None) => {}
        Err(error) => writeln!(std::io::stderr(), "warning: the spool remains: {error}")?,
    }
    if let Known::Move { .. } = known {
        let given = store.given_identities().await?;
        let taken = identity::take_back(&source, &given).await?;
        if taken.count > 0 {
            say(&format!("source: brought back the replica identity of {} tables", taken.count))?;
        }
        // Nothing that another try would change, so the rest is cleaned all the same.
        for kept in taken.kept {
            writeln!(
                std::io::stderr(),
                "warning: {kept}; give it what it should have by ALTER TABLE … REPLICA IDENTITY"
            )?;
        }
    }
    match known {
        Known::Move { record, .. } => clean_target(&store, &record).await?,
        Known::Nothing if left.is_nothing() => say(&format!("nothing of the move {} is there", config.name))?,
        Known::Nothing => {}
        Known::Unasked(error) => return Err(target_remains(&error)),
    }
    say("tables and rows were not touched")
}

/// What the target knows of the move.
enum Known {
    Move {
        record: Box<MoveRecord>,
        led: bool,
    },
    Nothing,
    /// It cannot be asked.
    Unasked(Error),
}

impl Known {
    async fn of(store: &Store) -> Self {
        let asked = async {
            let Some(record) = store.find().await? else { return Ok(Self::Nothing) };
            Ok(Self::Move { record: Box::new(record), led: store.is_led().await? })
        };
        asked.await.unwrap_or_else(Self::Unasked)
    }
}

/// What the source has of the move.
struct Left {
    /// Whether there is a slot, and whether somebody reads it.
    slot: Option<bool>,
    /// Whether there is a fence, and whether it refuses writes.
    fence: Option<bool>,
    publications: Vec<String>,
}

/// `$1`: the slot; `$2`: the fence's function; `$3`: the publications.
const LEFT: &str = "
    SELECT (SELECT active FROM pg_catalog.pg_replication_slots WHERE slot_name = $1),
           (SELECT p.prosrc LIKE '%RAISE EXCEPTION%'
            FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
            WHERE n.nspname = 'pgtandem' AND p.proname = $2),
           ARRAY(SELECT pubname::text FROM pg_catalog.pg_publication WHERE pubname = ANY ($3) ORDER BY 1)";

impl Left {
    async fn on(source: &Server, name: &MoveName) -> Result<Self> {
        let session = source.connect("clean").await?;
        let publications = name.publications();
        let row = session
            .query_one(LEFT, &[&name.slot(), &format!("fence_{name}"), &publications.as_slice()])
            .await
            .doing(|| "looking for what the move left on the source")?;
        Ok(Self { slot: row.try_get(0)?, fence: row.try_get(1)?, publications: row.try_get(2)? })
    }

    fn is_nothing(&self) -> bool {
        self.slot.is_none() && self.fence.is_none() && self.publications.is_empty()
    }

    /// For people.
    fn words(&self, name: &MoveName) -> String {
        let slot = self.slot.map(|_| format!("the slot {}", name.slot()));
        let fence = self.fence.map(|sealed| {
            if sealed { "the fence, which refuses writes".to_owned() } else { "the fence, which is open".to_owned() }
        });
        let publications = self.publications.iter().map(|publication| format!("the publication {publication}"));
        slot.into_iter().chain(fence).chain(publications).collect::<Vec<_>>().join(", ")
    }
}

/// A daemon would go on writing to what is being removed. A target that does not know the move cannot tell; the slot does.
fn refuse_beside_a_daemon(config: &Config, known: &Known, left: &Left) -> Result<()> {
    let (message, hint) = match known {
        Known::Move { led: true, .. } => ("a daemon runs this move".to_owned(), "stop it first"),
        Known::Nothing | Known::Unasked(_) if left.slot == Some(true) => (
            format!("somebody reads the slot {}, so a daemon runs a move of this name", config.name.slot()),
            "check move.name and target.url; if they are right, stop that daemon first, or with follow.engine = \"subscription\" \
             make the target reachable, for its own worker reads the slot",
        ),
        Known::Move { .. } | Known::Nothing | Known::Unasked(_) => return Ok(()),
    };
    Err(Error::new(Class::No, "daemon_running", message).hint(hint))
}

/// Asks for what is about to be lost. If the target does not know the move, the addresses may be wrong: then the name is
/// to be typed, and `--yes` is warned.
async fn agree(config: &Config, args: &Args, known: &Known, left: &Left) -> Result<()> {
    let name = config.name.as_str();
    let stranger = match known {
        Known::Move { record, .. } => {
            let consequence = match record.phase {
                Phase::Done => "The source will take writes again.",
                _ => "Following cannot be taken up again: the move begins anew.",
            };
            let question =
                format!("Remove slot, publications, triggers and state of the move {name}? {consequence} [y/N] ");
            return if args.yes { Ok(()) } else { confirm(question, &["y", "Y", "yes"]).await };
        }
        _ if left.is_nothing() => return Ok(()),
        Known::Nothing => format!("the target knows no move {name}"),
        Known::Unasked(error) => format!("the target cannot be asked about the move {name} ({error})"),
    };
    let found = left.words(&config.name);
    if args.yes {
        writeln!(std::io::stderr(), "warning: {stranger}; on the source goes what has its name: {found}")?;
        return Ok(());
    }
    let question = format!(
        "{stranger}.\nThe source has {found}. If another target belongs to them, they are not yours to remove.\n\
         Type the name of the move to remove them from the source: "
    );
    confirm(question, &[name]).await
}

/// Asks on the terminal; without one, the answer is no.
async fn confirm(question: String, accepted: &[&str]) -> Result<()> {
    let refused = |message: &str| Err(Error::new(Class::No, "not_confirmed", message).hint("--yes answers beforehand"));
    if !std::io::stdin().is_terminal() {
        return refused("nobody is there to confirm");
    }
    // On a thread of its own, so that an interruption is heard while nobody answers.
    let asked = tokio::task::spawn_blocking(move || {
        let mut out = std::io::stderr().lock();
        write!(out, "{question}")?;
        out.flush()?;
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer).map(|_| answer)
    });
    let answer = asked.await.map_err(|e| Error::bug(format!("asking for a confirmation: {e}")))??;
    if accepted.contains(&answer.trim()) { Ok(()) } else { refused("not removed") }
}

/// The slot first: it is what fills the disk.
async fn clean_source(source: &Server, name: &MoveName, left: &Left) -> Result<()> {
    supervisor::drop_slot(source, &name.slot()).await?;
    if left.slot.is_some() {
        say(&format!("source: removed the slot {}", name.slot()))?;
    }
    let session = source.connect("clean").await?;
    if Capture::of(name).remove(&session).await? {
        say("source: removed the capture of schema changes")?;
    }
    drop(session);
    fence::remove(source, name.as_str()).await?;
    match left.fence {
        Some(true) => say("source: removed the fence; writes are let in again")?,
        Some(false) => say("source: removed the fence; it was open")?,
        None => {}
    }
    let session = source.connect("clean").await?;
    for publication in &left.publications {
        session
            .batch_execute(&format!(
                "SET client_min_messages = error; DROP PUBLICATION IF EXISTS {}",
                quote_identifier(publication)
            ))
            .await
            .doing(|| format!("dropping the publication {publication}"))?;
        say(&format!("source: removed the publication {publication}"))?;
    }
    Ok(())
}

/// The state goes last: whatever fails before can be cleaned again. After a cutover everything is back already, and what
/// the new owner disabled since then stays so.
async fn clean_target(store: &Store, record: &MoveRecord) -> Result<()> {
    if record.phase != Phase::Done {
        let held_back = store.held_back().await?;
        store.release_held_back().await?;
        for what in held_back {
            say(&format!("target: brought back the {what}"))?;
        }
    }
    store.remove().await?;
    say("target: removed the state of the move")
}

fn target_remains(error: &Error) -> Error {
    Error::new(
        Class::Wait,
        "target_not_cleaned",
        format!(
            "the source is clean, but the target could not be asked ({error}). There remain the state of the move in the \
             schema pgtandem and, before a cutover, disabled triggers, rules, event triggers and GENERATED ALWAYS. \
             Tables of the source that were given REPLICA IDENTITY FULL keep it (follow.without_identity)"
        ),
    )
    .hint("run `pgtandem clean` again once the target answers; a target that is thrown away needs nothing")
}

/// One line for people.
fn say(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}
