//! pgcopydb as Debian has it, with its decoding plugin wal2json: `pgcopydb follow`.
//!
//! It writes what it receives into files, turns those into SQL, and applies a file once the log's segment is complete, unless it
//! knows where the end is. So it is told, as its users tell it before they switch over.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tokio::process::Command;

use crate::process::{self, Background};
use crate::programs::Programs;
use crate::servers::Folder;
use crate::stage::{DATABASE, Stage};

/// The decoding plugin that its slot needs.
pub(crate) const PLUGIN: &str = "wal2json";

/// Where it keeps its progress in the target.
const ORIGIN: &str = "bench";

/// `pgcopydb follow`, ready to be started.
pub(crate) struct Follow {
    command: Command,
    log: PathBuf,
}

impl Follow {
    /// Makes what it expects to find: its table on the source, and its progress on the target, where the slot begins.
    pub(crate) async fn prepare(stage: &Stage<'_>, slot: &str) -> Result<Self> {
        let servers = stage.servers;
        let log = servers.folder.path().join("pgcopydb.log");
        let begin = stage.slot_position(slot).await?;
        for arguments in [&["create", "--startpos", &begin][..], &["set", "apply"]] {
            let mut command = of(stage)?;
            command.args(["stream", "sentinel"]).args(arguments).args(["--source", &servers.source.url(DATABASE)]);
            process::run(command, &log).await.context("preparing pgcopydb")?;
        }
        let origin = format!(
            "SELECT pg_replication_origin_drop(roname) FROM pg_replication_origin WHERE roname = '{ORIGIN}';
             SELECT pg_replication_origin_create('{ORIGIN}');
             SELECT pg_replication_origin_advance('{ORIGIN}', '{begin}')"
        );
        servers.target.execute(DATABASE, &origin).await?;

        let work = servers.folder.path().join("pgcopydb");
        if work.exists() {
            std::fs::remove_dir_all(&work).context("removing the files of an earlier drain")?;
        }
        let mut command = of(stage)?;
        command.args(["follow", "--resume", "--not-consistent", "--slot-name", slot, "--origin", ORIGIN]);
        command.args(["--source", &servers.source.url(DATABASE), "--target", &servers.target.url(DATABASE)]);
        command.args(["--endpos", &stage.end]).arg("--dir").arg(&work);
        Ok(Self { command, log })
    }

    pub(crate) fn start(self) -> Result<Background> {
        Background::start(self.command, &self.log)
    }
}

fn of(stage: &Stage<'_>) -> Result<Command> {
    let peer = stage.programs.pgcopydb.as_ref().context("there is no pgcopydb")?;
    command(&peer.program, stage.programs, &stage.servers.folder)
}

/// The program, with all that it writes going into our folder.
pub(crate) fn command(program: &Path, programs: &Programs, folder: &Folder) -> Result<Command> {
    let room = folder.path();
    let mut command = Command::new(program);
    command.env("PATH", programs.search_path()?).env("PGPASSFILE", folder.passfile());
    command.env("HOME", room).env("XDG_DATA_HOME", room).env("TMPDIR", room);
    Ok(command)
}
