//! `cutover`: asks the daemon to cut over, and prints each step and the write pause.
//!
//! The daemon does the work. Interrupting this command takes the request back if no daemon has begun it; once begun, the
//! cutover goes on without anyone who watches.

use std::io::Write as _;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::End;
use crate::config::Config;
use crate::cutover::UNHURRIED_STEPS;
use crate::error::{Class, Error, Result};
use crate::postgres::{Server, Side};
use crate::state::{MoveRecord, Phase, Request, RequestKind, RequestState, Store};

/// Switch over: fence the source, drain, set sequences, run the hook; prints each step and the write pause
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pgtandem cutover --dry-run\n  pgtandem cutover --timeout 30s")]
pub struct Args {
    /// Lift the fence and go on following if the switch is not done after this, counted from when all that can be carried
    /// before was carried; 1s to 1h [default: cutover.timeout]
    #[arg(long, value_name = "DURATION", value_parser = timeout)]
    pub timeout: Option<Duration>,
    /// Say what would be done and what stands in the way; changes nothing
    #[arg(long)]
    pub dry_run: bool,
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

/// How often the journal is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a daemon may take to notice the request.
const NOTICE: Duration = Duration::from_secs(10);
/// How long taking the request back may take.
const WITHDRAW: Duration = Duration::from_secs(5);

/// Runs the command.
///
/// # Errors
/// Class no: the cutover did not happen, and writes are back on at the source.
pub async fn run(config: &Config, args: &Args, stop: &CancellationToken) -> Result<End> {
    let target = Server::new(Side::Target, config.target.clone(), config.name.as_str())?;
    let store = Store::new(target, config.name.clone());
    let timeout = args.timeout.unwrap_or(config.cutover.timeout);
    let Some(checked) = stop.run_until_cancelled(check_phase(config, &store)).await else { return Ok(End::BrokenOff) };
    checked?;
    let arguments = serde_json::json!({
        "timeout_ms": u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        "dry_run": args.dry_run,
    });
    let id = store.submit(RequestKind::Cutover, &arguments, NOTICE).await?;
    let request = match stop.run_until_cancelled(watch(&store, id, timeout, args)).await {
        Some(answered) => answered?,
        None => match break_off(&store, id, args.dry_run).await? {
            Some(answered) => answered,
            None => return Ok(End::BrokenOff),
        },
    };
    report(&store, &request, args).await.map(|()| End::Done)
}

/// Takes the request back, or says what goes on without us. Returns the answer if it came in the meantime.
async fn break_off(store: &Store, id: i64, dry_run: bool) -> Result<Option<Request>> {
    let what = if dry_run { "rehearsal" } else { "cutover" };
    let withdrawn = async {
        if store.withdraw(id).await? {
            return Ok((true, None));
        }
        store.request(id).await.map(|request| (false, request))
    };
    let said = match tokio::time::timeout(WITHDRAW, withdrawn).await {
        Ok(Ok((true, _))) => format!("the {what} was called off; no daemon had begun it"),
        Ok(Ok((false, Some(request)))) if matches!(request.state, RequestState::Succeeded | RequestState::Failed) => {
            return Ok(Some(request));
        }
        Ok(Ok((false, _))) => format!("the {what} goes on in the daemon; `pgtandem status --watch` shows it"),
        Ok(Err(error)) => {
            format!("the {what} could not be called off ({error}); a daemon may have begun it: `pgtandem status` tells")
        }
        Err(_) => format!(
            "the {what} could not be called off, the target does not answer; a daemon may have begun it: \
             `pgtandem status` tells"
        ),
    };
    writeln!(std::io::stderr(), "{said}")?;
    Ok(None)
}

/// Says at once what would only time out.
async fn check_phase(config: &Config, store: &Store) -> Result<()> {
    let no = |code: &'static str, message: String, hint: &str| Err(Error::new(Class::No, code, message).hint(hint));
    let name = &config.name;
    match store.find().await? {
        None => no("no_move", format!("the target knows no move {name}"), "begin it with `pgtandem run`"),
        Some(record) if record.phase == Phase::Done => {
            no("already_done", format!("the move {name} was cut over already"), "`pgtandem status` shows how")
        }
        Some(record) if record.phase != Phase::Follow => no(
            "not_following",
            format!("the move {name} is in phase {}, not following", record.phase),
            "`pgtandem status --watch` shows when it follows",
        ),
        Some(_) if !store.is_led().await? => {
            no("no_daemon", format!("no daemon runs the move {name}"), "start it with `pgtandem run`")
        }
        // What stopped it goes from the state when it follows again.
        Some(MoveRecord { error: Some(error), .. }) => {
            let text = |what: &str| error.get(what).and_then(serde_json::Value::as_str);
            let message = format!("the daemon waits before it tries again: {}", text("message").unwrap_or("an error"));
            no("not_following", message, text("hint").unwrap_or("`pgtandem status` says more"))
        }
        Some(_) => Ok(()),
    }
}

/// Waits for the answer, and prints the steps as they happen.
async fn watch(store: &Store, id: i64, timeout: Duration, args: &Args) -> Result<Request> {
    // The daemon keeps to the timeout itself, and then has to undo.
    let patience = NOTICE + timeout + timeout + Duration::from_secs(60);
    let mut deadline = Instant::now() + patience;
    let mut printed = 0;
    let mut lost = None;
    loop {
        match store.request(id).await {
            Ok(Some(request)) => {
                if !args.dry_run {
                    match follow_steps(store, id, printed, args.json).await {
                        Ok(seen) => {
                            printed = seen.printed;
                            if seen.unhurried {
                                deadline = Instant::now() + patience;
                            }
                        }
                        Err(error) => lost = Some(error),
                    }
                }
                match request.state {
                    RequestState::Succeeded | RequestState::Failed => return Ok(request),
                    RequestState::Expired => {
                        return Err(Error::new(Class::No, "not_noticed", "no daemon took the request in time")
                            .hint("look at the daemon's log; nothing was done"));
                    }
                    RequestState::Waiting | RequestState::Running => {}
                }
            }
            Ok(None) => return Err(Error::new(Class::No, "request_gone", "the request vanished from the state")),
            Err(error) => lost = Some(error),
        }
        if Instant::now() >= deadline {
            let unknown =
                Error::new(Class::No, "no_answer", "the daemon did not answer; whether it cut over is not known here")
                    .hint("`pgtandem status` tells");
            return Err(lost.map_or(unknown, |error| error.doing("waiting for the daemon's answer")));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What a look at the steps found.
struct Seen {
    /// How many are printed now.
    printed: usize,
    /// One is under way that may take as long as it takes: no timeout counts.
    unhurried: bool,
}

/// Prints the steps that ended since, unless nobody is to read them.
async fn follow_steps(store: &Store, request: i64, printed: usize, silent: bool) -> Result<Seen> {
    let Some(cutover) = store.last_cutover().await?.filter(|cutover| cutover.request_id == Some(request)) else {
        return Ok(Seen { printed, unhurried: false });
    };
    let running = cutover.steps.iter().find(|step| step.state == "running");
    let unhurried = running.is_some_and(|step| UNHURRIED_STEPS.contains(&step.name.as_str()));
    if silent {
        return Ok(Seen { printed, unhurried });
    }
    let ended = cutover.steps.iter().take_while(|step| step.state != "running").collect::<Vec<_>>();
    let mut out = std::io::stdout().lock();
    for step in ended.iter().skip(printed) {
        let seconds = step.seconds.map(|seconds| format!("{seconds:.3} s")).unwrap_or_default();
        writeln!(out, "{:<10} {:<8} {seconds:>10}  {}", step.name, step.state, step.detail.as_deref().unwrap_or(""))?;
    }
    Ok(Seen { printed: ended.len().max(printed), unhurried })
}

async fn report(store: &Store, request: &Request, args: &Args) -> Result<()> {
    let answer = request.answer.clone().unwrap_or_default();
    if args.json {
        let steps = match store.last_cutover().await? {
            Some(cutover) if cutover.request_id == Some(request.id) => cutover.steps,
            _ => Vec::new(),
        };
        let steps: Vec<_> = steps
            .iter()
            .map(|step| serde_json::json!({"name": step.name, "state": step.state, "seconds": step.seconds}))
            .collect();
        let mut document = serde_json::json!({"ok": request.state == RequestState::Succeeded, "dry_run": args.dry_run, "steps": steps});
        if let (Some(document), Some(answer)) = (document.as_object_mut(), answer.as_object()) {
            document.extend(answer.clone());
        }
        writeln!(std::io::stdout(), "{document}")?;
    }
    let text = |name: &str| answer.pointer(name).and_then(serde_json::Value::as_str).map(str::to_owned);
    let seconds = |name: &str| answer.get(name).and_then(serde_json::Value::as_f64);
    if request.state == RequestState::Succeeded {
        match (args.json, seconds("write_pause_seconds"), seconds("drain_seconds")) {
            (false, Some(pause), _) => writeln!(std::io::stdout(), "switched over; write pause {pause:.3} s")?,
            (false, None, Some(drain)) => {
                writeln!(
                    std::io::stdout(),
                    "ready: a marker took {drain:.3} s to reach the target; nothing was changed"
                )?;
            }
            _ => {}
        }
        return Ok(());
    }
    let message = text("/error/message").unwrap_or_else(|| "the daemon gave no reason".to_owned());
    let error = Error::new(Class::No, "cutover_not_done", message);
    Err(match text("/error/hint") {
        Some(hint) => error.hint(hint),
        None => error,
    })
}

fn timeout(text: &str) -> std::result::Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(given) if (1..=3600).contains(&given.as_secs()) => Ok(given),
        _ => Err("a duration with its unit from 1s to 1h, such as 30s".to_owned()),
    }
}
