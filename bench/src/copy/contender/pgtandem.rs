//! The released program: `pgtandem run --until copy`. Afterwards its slot and its state go by `pgtandem clean`.

use anyhow::{Context, Result};

use crate::contender::pgtandem::Commands;
use crate::copy::dataset::Dataset;
use crate::copy::ground::Ground;
use crate::copy::stopwatch::Stopwatch;
use crate::process;

/// What a copy is started with.
pub(in crate::copy) const UNTIL_COPY: [&str; 3] = ["run", "--until", "copy"];

/// The configuration: its defaults, which are the bench's defaults too, unless other numbers of jobs are asked for.
pub(in crate::copy) fn commands(ground: &Ground<'_>) -> Result<Commands> {
    let (workers, index_workers) = (ground.copy.jobs, ground.copy.index_jobs);
    // Where its log is read, it is read by a program.
    let format = if ground.dataset == Dataset::Many { "json" } else { "text" };
    let more = format!(
        "[copy]\nworkers = {workers}\nindex_workers = {index_workers}\n\n[log]\nlevel = \"info\"\nformat = \"{format}\"\n"
    );
    let (source, target) = (ground.source_url(), ground.target_url());
    Commands::write(ground.programs, &ground.pair.folder, (&source, &target), &more)
}

pub(super) async fn copy(ground: &Ground<'_>, clock: &mut Stopwatch<'_>) -> Result<()> {
    let commands = commands(ground)?;
    clock.run_logged(commands.command(&UNTIL_COPY), &commands.log).await
}

/// Follows until the lag is zero.
pub(super) async fn catch_up(ground: &Ground<'_>) -> Result<()> {
    let commands = commands(ground)?;
    process::run(commands.command(&["run", "--until", "follow"]), &commands.log).await.context("catching up")
}

pub(super) async fn clean(ground: &Ground<'_>) -> Result<()> {
    let commands = commands(ground)?;
    let log = ground.pair.folder.path().join("pgtandem-clean.log");
    process::run(commands.command(&["clean", "--yes"]), &log).await
}
