//! `cutover.hook`: the user's program that points the application to the target.
//!
//! It is run without a shell. Exit status 0 means that the application was let in; anything else, or running out of
//! time, means that it was not, and the fence lifts. It may be run a second time after a crash, so it must be
//! idempotent. It finds the addresses of both sides in `PGTANDEM_HOOK_*`; no password is among them.

use std::process::Stdio;
use std::time::Instant;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;

use crate::config::Config;
use crate::error::{Class, Error, Result};
use crate::postgres::ConnInfo;
use crate::postgres::server::REMOVED_FROM_CHILDREN;
use crate::telemetry::redact::shown;

/// Lines of its output that are kept for the error.
const KEPT_LINES: usize = 20;

/// Our own variables that may hold a password.
const OUR_URLS: [&str; 3] = ["PGTANDEM_SOURCE_URL", "PGTANDEM_TARGET_URL", "PGTANDEM_CUTOVER_PGBOUNCER"];

/// Runs the hook, if there is one.
pub(super) async fn run(config: &Config, deadline: Instant) -> Result<()> {
    let Some((program, arguments)) = config.cutover.hook.split_first() else { return Ok(()) };
    let failed = |what: String| {
        Error::new(Class::No, "hook_failed", what)
            .doing(format!("running cutover.hook ({program})"))
            .hint("mend the hook and run `pgtandem cutover` again; writes on the source are back on")
    };
    let mut command = Command::new(program);
    // It may print its environment; what it prints is logged.
    for secret in REMOVED_FROM_CHILDREN.iter().chain(&OUR_URLS) {
        command.env_remove(secret);
    }
    let mut child = command
        .args(arguments)
        .envs(environment(config))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| failed(format!("it cannot be started: {e}")))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let ended = async { tokio::join!(child.wait(), log(stdout, "stdout"), log(stderr, "stderr")) };
    let (status, printed, said) = tokio::time::timeout_at(deadline.into(), ended)
        .await
        .map_err(|_| failed("it did not end before cutover.timeout and was killed".to_owned()))?;
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => {
            // Many programs complain on standard output only.
            let said = if said.is_empty() { printed } else { said };
            Err(failed(format!("{status}; it said: {}", said.join(" / "))))
        }
        Err(e) => Err(failed(format!("its end cannot be waited for: {e}"))),
    }
}

/// Logs each line of the output as it comes; returns the last ones.
async fn log(output: Option<impl AsyncRead + Unpin>, name: &'static str) -> Vec<String> {
    let Some(output) = output else { return Vec::new() };
    let mut lines = BufReader::new(output).lines();
    let mut kept = Vec::new();
    while let Ok(Some(line)) = lines.next_line().await {
        let line = shown(&line);
        tracing::info!(output = name, "cutover.hook: {line}");
        if kept.len() == KEPT_LINES {
            kept.remove(0);
        }
        kept.push(line);
    }
    kept
}

fn environment(config: &Config) -> Vec<(String, String)> {
    let mut variables = vec![("PGTANDEM_MOVE_NAME".to_owned(), config.name.as_str().to_owned())];
    for (side, info) in [("SOURCE", &config.source), ("TARGET", &config.target)] {
        variables
            .extend(address(info).into_iter().map(|(what, value)| (format!("PGTANDEM_HOOK_{side}_{what}"), value)));
    }
    variables
}

fn address(info: &ConnInfo) -> Vec<(&'static str, String)> {
    let mut address = vec![("DATABASE", info.database().to_owned()), ("USER", info.user().to_owned())];
    if let Some(host) = info.hosts().first() {
        address.push(("HOST", host.name()));
        address.push(("PORT", host.port.to_string()));
    }
    address
}
