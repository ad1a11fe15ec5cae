//! PostgreSQL's own tools: a custom archive through a pipe, or a directory of files that several jobs write and read.

use std::path::PathBuf;

use anyhow::{Context, Result};
use tokio::process::Command;

use crate::copy::ground::Ground;
use crate::copy::stopwatch::Stopwatch;

/// Both formats compress unless they are told not to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Default,
    None,
}

impl Compression {
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Default => &[],
            Self::None => &["-Z", "0"],
        }
    }
}

/// `pg_dump -Fc | pg_restore`. An archive that ends early is an error of pg_restore's, so what becomes of pg_dump need not be asked.
const PIPE: &str = r#"dump=$1; restore=$2; source=$3; target=$4; shift 4
"$dump" -Fc "$@" -d "$source" | "$restore" -d "$target""#;

pub(super) async fn pipe(ground: &Ground<'_>, clock: &mut Stopwatch<'_>, compression: Compression) -> Result<()> {
    let client = &ground.programs.client;
    let mut command = Command::new("sh");
    command.args(["-c", PIPE, "pipe"]).arg(client.join("pg_dump")).arg(client.join("pg_restore"));
    command.args([ground.source_url(), ground.target_url()]).args(compression.arguments());
    clock.run(command).await
}

/// `pg_dump -Fd -j`, then `pg_restore -j`.
pub(super) async fn directory(ground: &Ground<'_>, clock: &mut Stopwatch<'_>, compression: Compression) -> Result<()> {
    let (client, jobs) = (&ground.programs.client, ground.copy.jobs.to_string());
    let mut dump = Command::new(client.join("pg_dump"));
    dump.args(["-Fd", "-j", &jobs, "-d", &ground.source_url(), "-f"]).arg(folder(ground)).args(compression.arguments());
    clock.run(dump).await?;
    let mut restore = Command::new(client.join("pg_restore"));
    restore.args(["-j", &jobs, "-d", &ground.target_url()]).arg(folder(ground));
    clock.run(restore).await
}

fn folder(ground: &Ground<'_>) -> PathBuf {
    ground.pair.folder.path().join("dump")
}

pub(super) fn clean(ground: &Ground<'_>) -> Result<()> {
    let folder = folder(ground);
    if folder.exists() { std::fs::remove_dir_all(folder).context("removing the dump") } else { Ok(()) }
}
