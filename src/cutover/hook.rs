//! `cutover.hook`: the user's program that points the application to the target.
//!
//! It is run without a shell, in a process group of its own. Its exit status alone says what came of it: 0 means that the
//! application was let in, whatever the programs that it started go on doing; anything else means that it was not, and
//! the fence lifts. Running out of time means the same, and then the whole group is killed before anything is undone, so
//! that nothing of it can still let the application in afterwards. It may be run a second time after a crash, so it must
//! be idempotent. It finds the addresses of both sides in `PGTANDEM_HOOK_*`; no password is among them.

use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use crate::config::Config;
use crate::error::{Class, Error, Result};
use crate::postgres::conninfo::Host;
use crate::postgres::server::REMOVED_FROM_CHILDREN;
use crate::postgres::{ConnInfo, Server};
use crate::telemetry::redact::shown;

/// Lines of its output that are kept for the error.
const KEPT_LINES: usize = 20;
/// How long the rest of its output is waited for once it ended.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Our own variables that may hold a password.
const OUR_URLS: [&str; 3] = ["PGTANDEM_SOURCE_URL", "PGTANDEM_TARGET_URL", "PGTANDEM_CUTOVER_PGBOUNCER"];

/// Where both sides are, of the hosts that their connection strings name.
#[derive(Clone)]
pub(super) struct Addresses {
    source: Host,
    target: Host,
}

impl Addresses {
    /// Asks both: of several hosts, the one that was connected to is the side. One that does not answer is named by the
    /// first of its hosts.
    pub(super) async fn find(source: &Server, target: &Server) -> Self {
        let (source, target) = tokio::join!(host(source), host(target));
        Self { source, target }
    }
}

async fn host(side: &Server) -> Host {
    match side.connect("hook").await {
        Ok(session) => session.host().clone(),
        Err(_) => side.first_host().clone(),
    }
}

/// Runs the hook, if there is one.
pub(super) async fn run(config: &Config, addresses: &Addresses, deadline: Instant) -> Result<()> {
    let Some((program, arguments)) = config.cutover.hook.split_first() else { return Ok(()) };
    let failed = |what: String| {
        Error::new(Class::No, "hook_failed", what)
            .doing(format!("running cutover.hook ({program})"))
            .hint("mend the hook and run `pgtandem cutover` again; writes on the source are back on")
    };
    execute(program, arguments, environment(config, addresses), deadline).await.map_err(failed)
}

/// Runs it to its end; the error is why it did not let the application in.
async fn execute(
    program: &str,
    arguments: &[String],
    environment: Vec<(String, String)>,
    deadline: Instant,
) -> std::result::Result<(), String> {
    let mut command = Command::new(program);
    // It may print its environment; what it prints is logged.
    for secret in REMOVED_FROM_CHILDREN.iter().chain(&OUR_URLS) {
        command.env_remove(secret);
    }
    let child = command
        .args(arguments)
        .envs(environment)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|e| format!("it cannot be started: {e}"))?;
    let mut group = Group { child, ended: false };
    let printed = Output::log(group.child.stdout.take(), "stdout");
    let said = Output::log(group.child.stderr.take(), "stderr");
    let status = match tokio::time::timeout_at(deadline.into(), group.child.wait()).await {
        Ok(Ok(status)) => status,
        Ok(Err(e)) => return Err(format!("its end cannot be waited for: {e}")),
        Err(_) => {
            group.kill().await;
            return Err("it did not end before cutover.timeout and was killed".to_owned());
        }
    };
    group.ended = true;
    let (printed, said) = tokio::join!(printed.kept(), said.kept());
    if status.success() {
        return Ok(());
    }
    // Many programs complain on standard output only.
    let said = if said.is_empty() { printed } else { said };
    Err(format!("{status}; it said: {}", said.join(" / ")))
}

/// The hook and what it started. Dropped before it ended (a timeout further up), it is killed.
struct Group {
    child: Child,
    ended: bool,
}

impl Group {
    fn signal(&self) {
        let id = self.child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(group) = id
            && let Err(error) = kill_process_group(group, Signal::KILL)
        {
            tracing::warn!(%error, "cutover.hook could not be killed");
        }
    }

    /// Returns once the hook itself is gone.
    async fn kill(&mut self) {
        self.signal();
        if let Err(error) = self.child.wait().await {
            tracing::warn!(%error, "the end of cutover.hook cannot be waited for");
        }
        self.ended = true;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.ended {
            self.signal();
        }
    }
}

/// One of its outputs, logged line by line as it comes.
struct Output {
    task: JoinHandle<()>,
    last: Arc<Mutex<Vec<String>>>,
}

impl Output {
    fn log(output: Option<impl AsyncRead + Send + Unpin + 'static>, name: &'static str) -> Self {
        let last = Arc::<Mutex<Vec<String>>>::default();
        let kept = Arc::clone(&last);
        let task = tokio::spawn(async move {
            let Some(output) = output else { return };
            let mut lines = BufReader::new(output).split(b'\n');
            while let Ok(Some(line)) = lines.next_segment().await {
                let line = shown(String::from_utf8_lossy(&line).trim_end_matches('\r'));
                tracing::info!(output = name, "cutover.hook: {line}");
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() == KEPT_LINES {
                    kept.remove(0);
                }
                kept.push(line);
            }
        });
        Self { task, last }
    }

    /// The last lines. A program that the hook left behind may hold the pipe for as long as it likes: it is listened to on
    /// and not waited for.
    async fn kept(self) -> Vec<String> {
        drop(tokio::time::timeout(LAST_WORDS, self.task).await);
        std::mem::take(&mut *self.last.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn environment(config: &Config, addresses: &Addresses) -> Vec<(String, String)> {
    let mut variables = vec![("PGTANDEM_MOVE_NAME".to_owned(), config.name.as_str().to_owned())];
    for (side, info, host) in
        [("SOURCE", &config.source, &addresses.source), ("TARGET", &config.target, &addresses.target)]
    {
        let address = address(info, host).into_iter();
        variables.extend(address.map(|(what, value)| (format!("PGTANDEM_HOOK_{side}_{what}"), value)));
    }
    variables
}

fn address(info: &ConnInfo, host: &Host) -> [(&'static str, String); 4] {
    [
        ("DATABASE", info.database().to_owned()),
        ("USER", info.user().to_owned()),
        ("HOST", host.name()),
        ("PORT", host.port.to_string()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn shell(script: &str, patience: Duration) -> std::result::Result<(), String> {
        execute("sh", &["-c".to_owned(), script.to_owned()], Vec::new(), Instant::now() + patience).await
    }

    #[tokio::test]
    async fn a_program_that_it_leaves_behind_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script = format!("sleep 600 & echo $! > '{}'; exit 0", file.display());
        assert_eq!(shell(&script, Duration::from_secs(60)).await, Ok(()));
        let left: i32 = std::fs::read_to_string(file).unwrap().trim().parse().unwrap();
        rustix::process::kill_process(Pid::from_raw(left).unwrap(), Signal::KILL).unwrap();
    }

    #[tokio::test]
    async fn out_of_time_all_that_it_started_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script = format!("sleep 600 & echo $! > '{}'; wait", file.display());
        let error = shell(&script, Duration::from_secs(1)).await.unwrap_err();
        assert!(error.contains("was killed"), "{error}");
        let process = format!("/proc/{}/stat", std::fs::read_to_string(file).unwrap().trim());
        // Whoever inherits it may take his time to fetch its end.
        let runs = || std::fs::read_to_string(&process).is_ok_and(|stat| !stat.contains(") Z"));
        let began = Instant::now();
        while runs() {
            assert!(began.elapsed() < Duration::from_secs(60), "it still runs");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn what_it_says_in_another_encoding_is_no_reason_to_break_it_off() {
        let error = shell(r"printf 'caf\351\n' >&2; sleep 0.1; echo more >&2; exit 3", Duration::from_secs(60)).await;
        assert_eq!(error, Err("exit status: 3; it said: caf\u{fffd} / more".to_owned()));
    }
}
