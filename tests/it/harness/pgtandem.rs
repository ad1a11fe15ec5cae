//! The real binary, run as its users run it.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use pgtandem::config::{Config, Environment, Flags, Settings};
use rustix::process::Signal;
use tempfile::TempDir;

use super::database::Database;
use super::guard::{Guard, signal};
use super::provision::client_program;
use super::{PATIENCE, wait_until};

/// The configuration of the move `app` that the binary would get from these URLs and nothing else.
pub fn config(source: &str, target: &str) -> Config {
    let flags = Flags {
        source: Some(source.to_owned()),
        target: Some(target.to_owned()),
        name: Some("app".to_owned()),
        ..Flags::default()
    };
    Settings::gather(&flags, Environment::of([])).and_then(|settings| settings.config()).expect("a configuration")
}

/// The binary under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_pgtandem");

/// How to call the program for one move. The URLs go through the environment, as the docs advise.
#[derive(Clone, Debug)]
pub struct Pgtandem {
    environment: Vec<(OsString, OsString)>,
    config: Option<String>,
    working_folder: Option<PathBuf>,
}

impl Pgtandem {
    /// The move `name` from `source` to `target`, with `pg_dump` and its kin of 18 and 16 on the `PATH`.
    pub fn new(source: &Database, target: &Database, name: &str) -> Self {
        Self::nowhere()
            .env("PGTANDEM_SOURCE_URL", source.url())
            .env("PGTANDEM_TARGET_URL", target.url())
            .env("PGTANDEM_MOVE_NAME", name)
            .env("PGTANDEM_HTTP_LISTEN", "")
            .clients(&[18, 16])
    }

    /// The program without a word about its servers.
    pub fn nowhere() -> Self {
        Self { environment: Vec::new(), config: None, working_folder: None }
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// The text of `pgtandem.toml` in the working folder.
    #[must_use]
    pub fn config(mut self, text: &str) -> Self {
        self.config = Some(text.to_owned());
        self
    }

    /// Works in this folder, instead of one that comes and goes with each command.
    #[must_use]
    pub fn working_in(mut self, folder: &Path) -> Self {
        self.working_folder = Some(folder.to_owned());
        self
    }

    /// Which provided client programs come first on the `PATH`.
    #[must_use]
    pub fn clients(self, versions: &[u16]) -> Self {
        let folder = |&version: &u16| client_program(version, "pg_dump").parent().map(Path::to_path_buf);
        let inherited = std::env::var_os("PATH").unwrap_or_default();
        let folders = versions.iter().filter_map(folder).chain(std::env::split_paths(&inherited));
        let path = std::env::join_paths(folders).expect("a PATH");
        self.env("PATH", path)
    }

    /// Runs a command to its end, which must come within [`PATIENCE`].
    pub async fn run(&self, arguments: &[&str]) -> Finished {
        self.spawn(arguments).wait(PATIENCE).await
    }

    /// Starts a command.
    pub fn spawn(&self, arguments: &[&str]) -> Running {
        let folder = tempfile::Builder::new().prefix("pgtandem-run-").tempdir().expect("a temporary folder");
        let working_folder = self.working_folder.as_deref().unwrap_or(folder.path());
        if let Some(text) = &self.config {
            fs::write(working_folder.join("pgtandem.toml"), text).expect("write pgtandem.toml");
        }
        let output = |name: &str| File::create(folder.path().join(name)).expect("file for the output");
        let process = Command::new(PROGRAM)
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(working_folder)
            .stdin(Stdio::null())
            .stdout(output("stdout"))
            .stderr(output("stderr"))
            .spawn()
            .expect("start pgtandem");
        let program = fs::canonicalize(PROGRAM).expect("path of the program");
        let guard = Guard::over_program(process.id(), &program, folder.path());
        Running { command: arguments.join(" "), process, guard, folder }
    }
}

/// A command that runs. Dropping it kills it.
pub struct Running {
    command: String,
    process: Child,
    guard: Guard,
    folder: TempDir,
}

impl Running {
    /// The process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// What it has printed so far.
    pub fn stdout(&self) -> String {
        self.read("stdout")
    }

    /// What it has logged so far.
    pub fn stderr(&self) -> String {
        self.read("stderr")
    }

    fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.file(name)).unwrap_or_default()).into_owned()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.process.try_wait().expect("wait for pgtandem").is_none()
    }

    /// SIGTERM: it shall stop cleanly.
    pub fn terminate(&self) {
        signal(self.id(), Signal::TERM);
    }

    /// SIGKILL, and its end.
    pub fn kill(mut self) -> Finished {
        self.process.kill().expect("kill pgtandem");
        let status = self.process.wait().expect("wait for pgtandem");
        self.finished(status)
    }

    /// Waits until standard error contains `text`; panics if the command ends before.
    pub async fn wait_for_log(&mut self, text: &str, patience: Duration) {
        let started = std::time::Instant::now();
        while !self.stderr().contains(text) {
            let alive = self.is_running() || self.stderr().contains(text);
            let waiting = started.elapsed() < patience;
            assert!(alive && waiting, "pgtandem {} never logged {text:?}:\n{}", self.command, self.stderr());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits for its end.
    pub async fn wait(mut self, patience: Duration) -> Finished {
        let started = std::time::Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().expect("wait for pgtandem") {
                return self.finished(status);
            }
            assert!(
                started.elapsed() < patience,
                "pgtandem {} still runs after {patience:?}:\n{}{}",
                self.command,
                self.stdout(),
                self.stderr()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn finished(&self, status: ExitStatus) -> Finished {
        Finished {
            command: self.command.clone(),
            code: status.code(),
            status,
            stdout: self.stdout(),
            stderr: self.stderr(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- pgtandem {}:\n{}{}", self.command, self.stdout(), self.stderr());
        }
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// How a command ended. `Display` shows all of it, for messages of assertions.
#[derive(Clone, Debug)]
pub struct Finished {
    command: String,
    /// The exit code; none after a signal.
    pub code: Option<i32>,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { command, status, stdout, stderr, .. } = self;
        write!(f, "pgtandem {command}: {status}\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
    }
}
