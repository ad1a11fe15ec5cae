//! Programs that are run: to their end, or in the background until they are stopped.
//!
//! Promises: none outlives this program; what a program said is part of the error if it failed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, Command};

use crate::guard::Guard;
use crate::servers::tail;

/// How long a program may take to stop after it was asked to.
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// How many of a program's last lines an error shows.
const LAST_WORDS: usize = 6;

/// Runs a program to its end. Its output goes to `log`, over whatever was there.
pub(crate) async fn run(command: Command, log: &Path) -> Result<()> {
    Background::start(command, log)?.finish().await
}

/// A program that runs beside us. Dropping it kills it, and all that it started.
pub(crate) struct Background {
    name: String,
    pub(crate) child: Child,
    log: PathBuf,
    _guard: Option<Guard>,
}

impl Background {
    /// Starts it with its output going to `log`; streams that the command has set up otherwise are left alone.
    pub(crate) fn start(mut command: Command, log: &Path) -> Result<Self> {
        let output = File::create(log).with_context(|| format!("opening {}", log.display()))?;
        command.stdout(output.try_clone()?).stderr(output).stdin(Stdio::null());
        Self::spawn(command, log)
    }

    /// Starts it with pipes to both sides of a conversation, and its complaints going to `log`.
    pub(crate) fn start_conversation(mut command: Command, log: &Path) -> Result<Self> {
        let output = File::create(log).with_context(|| format!("opening {}", log.display()))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(output);
        Self::spawn(command, log)
    }

    fn spawn(mut command: Command, log: &Path) -> Result<Self> {
        let program = Path::new(command.as_std().get_program());
        let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
        // A group of its own: an interrupt from the terminal is for this program, and its children are stopped with it.
        let child = command.process_group(0).kill_on_drop(true).spawn().with_context(|| format!("starting {name}"))?;
        let guard = child.id().map(Guard::over_process).transpose()?;
        Ok(Self { name, child, log: log.to_owned(), _guard: guard })
    }

    pub(crate) fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// How it ended, if it did.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("looking after {}", self.name))
    }

    /// The end of what it wrote.
    pub(crate) fn last_words(&self) -> String {
        tail(&self.log, LAST_WORDS)
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// It failed, with what it last said.
    pub(crate) async fn finish(&mut self) -> Result<()> {
        let status = self.child.wait().await.with_context(|| format!("waiting for {}", self.name))?;
        if !status.success() {
            bail!("{} ended with {status}: {}", self.name, self.last_words());
        }
        Ok(())
    }

    /// Kills it and all that it started, as a power cut would, and waits until it is gone.
    pub(crate) async fn kill(mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.child.wait().await.with_context(|| format!("waiting for {}", self.name)).map(drop)
    }

    /// Asks it to stop, and waits until it has.
    pub(crate) async fn stop(mut self) -> Result<ExitStatus> {
        if self.ended()?.is_none() {
            self.signal(Signal::TERM)?;
        }
        tokio::time::timeout(STOP_DEADLINE, self.child.wait())
            .await
            .with_context(|| format!("{} did not stop when asked to: {}", self.name, self.last_words()))?
            .with_context(|| format!("waiting for {}", self.name))
    }

    /// To its process group. One that was waited for has no id any more, and gets none.
    fn signal(&self, signal: Signal) -> Result<()> {
        let Some(group) = self.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) else {
            return Ok(());
        };
        kill_process_group(group, signal).with_context(|| format!("stopping {}", self.name))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // It may have ended meanwhile.
        self.signal(Signal::KILL).ok();
    }
}
