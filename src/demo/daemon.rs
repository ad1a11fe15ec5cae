//! The move itself, made by the real commands: `pgtandem run` and `pgtandem cutover` as child processes of the demo's own
//! program, and what `/status` says meanwhile.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use super::guard::{Guard, detached};
use super::servers::{free_port, tail, write_private};
use crate::error::{Class, Doing, Error, Result};

/// The name of the demo's move.
pub const MOVE: &str = "demo";

/// How long one look at `/status` may take.
const STATUS_DEADLINE: Duration = Duration::from_secs(2);

/// How long the daemon may take for a clean stop.
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// The generated configuration and the commands that read it.
#[derive(Clone, Debug)]
pub struct Commands {
    program: PathBuf,
    config: PathBuf,
    log: PathBuf,
    http_port: u16,
}

impl Commands {
    /// Writes the configuration of the move into `folder`.
    ///
    /// # Errors
    /// The machine's.
    pub fn prepare(folder: &Path, source_url: &str, target_url: &str, switch: &Path) -> Result<Self> {
        let program = std::env::current_exe().doing(|| "finding the program itself")?;
        let http_port = free_port()?;
        let hook = [program.as_os_str(), OsStr::new("demo"), OsStr::new("--switch"), switch.as_os_str()];
        let config = folder.join("pgtandem.toml");
        write_private(&config, &configuration(source_url, target_url, http_port, &hook.map(OsStr::to_string_lossy)))?;
        Ok(Self { config, log: folder.join("run.log"), http_port, program })
    }

    /// The configuration file.
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// What the daemon wrote.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The end of what the daemon wrote, as one line.
    #[must_use]
    pub fn last_words(&self) -> String {
        tail(&std::fs::read(&self.log).unwrap_or_default(), 6)
    }

    /// The page for people.
    #[must_use]
    pub fn page(&self) -> String {
        format!("http://127.0.0.1:{}/", self.http_port)
    }

    /// Starts `pgtandem run`.
    ///
    /// # Errors
    /// The machine's.
    pub fn run(&self) -> Result<Daemon> {
        let log = std::fs::File::create(&self.log).doing(|| "opening the daemon's log")?;
        let mut command = self.command("run");
        command.stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
        let child = command.spawn().doing(|| "starting pgtandem run")?;
        let guard = child.id().map(Guard::over_process).transpose()?;
        Ok(Daemon { child, _guard: guard })
    }

    /// Runs `pgtandem cutover`; `each` hears every line that it prints, on either output.
    ///
    /// # Errors
    /// The machine's; an answer of no is in the status.
    pub async fn cutover(&self, mut each: impl FnMut(&str)) -> Result<ExitStatus> {
        let mut command = self.command("cutover");
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .doing(|| "starting pgtandem cutover")?;
        let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(Error::bug("the output of pgtandem cutover is not piped"));
        };
        let (mut out, mut err) = (BufReader::new(out).lines(), BufReader::new(err).lines());
        let (mut out_open, mut err_open) = (true, true);
        while out_open || err_open {
            let line = tokio::select! {
                line = out.next_line(), if out_open => line.inspect(|line| out_open = line.is_some()),
                line = err.next_line(), if err_open => line.inspect(|line| err_open = line.is_some()),
            };
            if let Some(line) = line.doing(|| "reading what pgtandem cutover says")? {
                each(&line);
            }
        }
        child.wait().await.doing(|| "waiting for pgtandem cutover")
    }

    /// `pgtandem status --json`, which also answers when no daemon runs.
    ///
    /// # Errors
    /// The command failed, or its answer is not JSON.
    pub async fn status(&self) -> Result<Status> {
        let output = self.command("status").arg("--json").output().await.doing(|| "running pgtandem status")?;
        if !output.status.success() {
            let said = format!("pgtandem status ended with {}: {}", output.status, tail(&output.stderr, 3));
            return Err(Error::new(Class::No, "no_status", said));
        }
        Status::parse(&output.stdout)
    }

    /// `/status` of the running daemon; `None` while it does not answer.
    pub async fn poll(&self) -> Option<Status> {
        let body = tokio::time::timeout(STATUS_DEADLINE, get(self.http_port, "/status")).await.ok()?.ok()?;
        Status::parse(&body).ok()
    }

    fn command(&self, name: &str) -> Command {
        let mut command = detached(self.program.as_os_str());
        command.arg("--config").arg(&self.config).arg(name);
        // The environment goes before the file: what the user has set is for his own moves.
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("PGTANDEM_") {
                command.env_remove(variable);
            }
        }
        Command::from(command)
    }
}

/// A running `pgtandem run`. Dropping it kills it.
pub struct Daemon {
    child: Child,
    _guard: Option<Guard>,
}

impl Daemon {
    /// How it ended, if it did.
    ///
    /// # Errors
    /// The machine's.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().doing(|| "looking after pgtandem run")
    }

    /// Waits for it to end by itself; asks it to after `patience`.
    ///
    /// # Errors
    /// It did not stop although it was asked to.
    pub async fn finish(mut self, patience: Duration) -> Result<ExitStatus> {
        if let Ok(status) = tokio::time::timeout(patience, self.child.wait()).await {
            return status.doing(|| "waiting for pgtandem run");
        }
        if let Some(pid) = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) {
            kill_process(pid, Signal::TERM).map_err(std::io::Error::from).doing(|| "stopping pgtandem run")?;
        }
        tokio::time::timeout(STOP_DEADLINE, self.child.wait())
            .await
            .map_err(|_| Error::new(Class::No, "daemon_stuck", "pgtandem run did not stop when asked to"))?
            .doing(|| "waiting for pgtandem run")
    }
}

/// What the demo reads from the status document. What is missing there reads as nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// `copy`, `follow`, …
    pub phase: String,
    /// Whether a cutover may begin.
    pub ready: bool,
    /// WAL between the source's head and progress.
    pub lag_bytes: Option<u64>,
    /// The same in commit time.
    pub lag_seconds: Option<f64>,
    /// Bytes of table data copied.
    pub bytes_done: u64,
    /// Bytes of table data to copy, as far as known.
    pub bytes_total: u64,
    /// Rows copied.
    pub rows_done: u64,
    /// Tables copied.
    pub tables_done: u64,
    /// Tables to copy.
    pub tables_total: u64,
    /// Source transactions applied while following.
    pub transactions: u64,
    /// Row changes applied while following.
    pub changes: u64,
    /// From the first refused write on the source to the first accepted one on the target.
    pub write_pause_seconds: Option<f64>,
    /// What the move stands on.
    pub error: Option<String>,
}

impl Status {
    fn parse(document: &[u8]) -> Result<Self> {
        let json: Value =
            serde_json::from_slice(document).map_err(|error| Error::bug(format!("the status is not JSON: {error}")))?;
        let number = |pointer: &str| json.pointer(pointer).and_then(Value::as_u64);
        let real = |pointer: &str| json.pointer(pointer).and_then(Value::as_f64);
        let text = |pointer: &str| json.pointer(pointer).and_then(Value::as_str);
        Ok(Self {
            phase: text("/phase").unwrap_or_default().to_owned(),
            ready: json.pointer("/ready").and_then(Value::as_bool).unwrap_or(false),
            lag_bytes: number("/lag/bytes"),
            lag_seconds: real("/lag/seconds"),
            bytes_done: number("/copy/bytes_done").unwrap_or(0),
            bytes_total: number("/copy/bytes_total").unwrap_or(0),
            rows_done: number("/copy/rows_done").unwrap_or(0),
            tables_done: number("/copy/tables_done").unwrap_or(0),
            tables_total: number("/copy/tables_total").unwrap_or(0),
            transactions: number("/apply/transactions").unwrap_or(0),
            changes: number("/apply/changes").unwrap_or(0),
            write_pause_seconds: real("/cutover/write_pause_seconds"),
            error: text("/error/message").map(|message| match text("/error/hint") {
                Some(hint) => format!("{message} (hint: {hint})"),
                None => message.to_owned(),
            }),
        })
    }
}

/// The body of a GET over plain HTTP/1.0: the answer ends with the connection.
async fn get(port: u16, path: &str) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    body_of(&answer).map(<[u8]>::to_vec).ok_or_else(|| Error::new(Class::Retry, "http", "not a 200 answer"))
}

fn body_of(answer: &[u8]) -> Option<&[u8]> {
    let status_line = answer.split(|byte| *byte == b'\n').next()?;
    let good =
        status_line.starts_with(b"HTTP/1.") && status_line.split(|byte| *byte == b' ').nth(1)?.starts_with(b"200");
    let body = answer.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    good.then(|| &answer[body..])
}

fn configuration(source_url: &str, target_url: &str, http_port: u16, hook: &[impl AsRef<str>]) -> String {
    let hook: Vec<String> = hook.iter().map(|argument| toml_string(argument.as_ref())).collect();
    format!(
        "# The move of the demo. It holds no password: the connection strings name a password file.\n\
         [move]\nname = \"{MOVE}\"\n\n\
         [source]\nurl = {}\n\n\
         [target]\nurl = {}\n\n\
         [copy]\nworkers = 2\n\n\
         [cutover]\nhook = [{}]\n\n\
         [http]\nlisten = \"127.0.0.1:{http_port}\"\n",
        toml_string(source_url),
        toml_string(target_url),
        hook.join(", ")
    )
}

fn toml_string(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_toml_whatever_the_paths_hold() {
        let text = configuration("postgresql://a?passfile=/x", "host='b \"c\"'", 8432, &["/bin/pg\"tandem", "demo"]);
        let parsed: toml::Table = text.parse().unwrap();
        assert_eq!(parsed["target"]["url"].as_str(), Some("host='b \"c\"'"));
        assert_eq!(parsed["cutover"]["hook"][0].as_str(), Some("/bin/pg\"tandem"));
        assert_eq!(parsed["http"]["listen"].as_str(), Some("127.0.0.1:8432"));
    }

    #[test]
    fn a_status_is_read_as_far_as_it_goes() {
        let status = Status::parse(
            br#"{"phase":"follow","ready":true,"lag":{"bytes":12,"seconds":0.5},"copy":{"bytes_done":7},
                 "cutover":{"write_pause_seconds":0.25},"error":{"code":"x","message":"m","hint":"h"}}"#,
        )
        .unwrap();
        assert_eq!((status.phase.as_str(), status.ready, status.lag_bytes), ("follow", true, Some(12)));
        assert_eq!((status.bytes_done, status.write_pause_seconds), (7, Some(0.25)));
        assert_eq!(status.error.as_deref(), Some("m (hint: h)"));
        assert_eq!(Status::parse(b"{}").unwrap(), Status::default());
        assert!(Status::parse(b"<html>").is_err());
    }

    #[test]
    fn only_a_good_answer_has_a_body() {
        assert_eq!(body_of(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}"), Some(&b"{}"[..]));
        assert_eq!(body_of(b"HTTP/1.1 503 Service Unavailable\r\n\r\n{}"), None);
        assert_eq!(body_of(b"HTTP/1.0 200 OK\r\n"), None);
    }
}
