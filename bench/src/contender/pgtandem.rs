//! The released program with its default configuration: the real copy once, then `pgtandem run` for each drain.
//!
//! Its memory is the schema `pgtandem` of its target and its slot on the source. Both are kept as they stand after the copy, and
//! every drain begins with a copy of them.

use std::path::PathBuf;

use anyhow::{Context, Result};
use tokio::process::Command;

use crate::process::{self, Background};
use crate::programs::Programs;
use crate::servers::{Folder, free_port};
use crate::stage::{DATABASE, Stage, TEMPLATE};

/// The slot that a move of this name has.
pub(crate) const SLOT: &str = "pgtandem_bench";

/// What its slot is kept as.
pub(crate) const KEPT_SLOT: &str = "kept_pgtandem";

/// The configuration of the move, and the commands that read it.
pub(crate) struct Commands {
    program: PathBuf,
    search_path: std::ffi::OsString,
    config: PathBuf,
    pub(crate) log: PathBuf,
    /// Where its daemon listens, on the loopback.
    pub(crate) port: u16,
}

impl Commands {
    /// Writes the configuration: both ends, a port that nobody else uses, and the number of workers, of which 1 is the default.
    pub(crate) fn of(stage: &Stage<'_>, workers: u16) -> Result<Self> {
        let ends = (stage.servers.source.url(DATABASE), stage.servers.pgtandem_target.url(DATABASE));
        let more = format!("[follow]\nworkers = {workers}\n");
        Self::write(stage.programs, &stage.servers.folder, (&ends.0, &ends.1), &more)
    }

    /// Writes a configuration with both ends, a port that nobody else uses, and more sections.
    pub(crate) fn write(
        programs: &Programs,
        folder: &Folder,
        (source, target): (&str, &str),
        more: &str,
    ) -> Result<Self> {
        let config = folder.path().join("pgtandem.toml");
        let port = free_port()?;
        let text = format!(
            "[move]\nname = \"bench\"\n\n[source]\nurl = \"{source}\"\n\n[target]\nurl = \"{target}\"\n\n[http]\nlisten = \"127.0.0.1:{port}\"\n\n{more}"
        );
        std::fs::write(&config, text).context("writing the configuration of pgtandem")?;
        Ok(Self {
            program: programs.pgtandem.clone(),
            search_path: programs.search_path()?,
            config,
            log: folder.path().join("pgtandem.log"),
            port,
        })
    }

    /// `pgtandem run`
    pub(crate) fn run(self) -> Result<Background> {
        Background::start(self.command(&["run"]), &self.log)
    }

    /// `pgtandem` with these arguments.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(&self.config).args(arguments).env("PATH", &self.search_path);
        // The environment goes before the file: what the user has set is for other moves.
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("PGTANDEM_") {
                command.env_remove(variable);
            }
        }
        command
    }
}

/// Copies the database, until the move follows; then keeps its target and its slot.
pub(crate) async fn bring_up(stage: &Stage<'_>) -> Result<()> {
    let target = &stage.servers.pgtandem_target;
    target.execute("postgres", &format!("CREATE DATABASE {DATABASE} TEMPLATE template0")).await?;
    let commands = Commands::of(stage, 1)?;
    process::run(commands.command(&["run", "--until", "follow"]), &commands.log).await.context("the first copy")?;
    target.execute("postgres", &format!("ALTER DATABASE {DATABASE} RENAME TO {TEMPLATE}")).await?;
    stage.copy_slot(SLOT, KEPT_SLOT, "pgoutput").await
}
