//! `pgcopydb clone`: as Debian has it, and a newer one where the user has it on the search path.
//!
//! It copies tables and builds their indexes as soon as each is there, and gathers statistics as it goes.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tokio::process::Command;

use super::Contender;
use crate::contender::pgcopydb::command;
use crate::copy::CopyOptions;
use crate::copy::ground::Ground;
use crate::copy::stopwatch::Stopwatch;
use crate::programs::Programs;
use crate::report::head::version;
use crate::say;

/// What asks for COPY in binary.
const BINARY: &str = "--use-copy-binary";

/// What lets several jobs copy one table: above the size above which pgtandem does so by default.
const SPLIT: [&str; 2] = ["--split-tables-larger-than", "1GB"];

/// Which of them, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Debian,
    NewestSplit,
    Newer,
    NewerBinary,
}

/// The pgcopydbs of this machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peers {
    debian: Option<PathBuf>,
    newer: Option<PathBuf>,
    /// Whether the newer one can copy in binary.
    binary: bool,
}

impl Peers {
    /// Asks each for its version, and the newer one for what it can.
    pub(crate) async fn find(programs: &Programs) -> Result<Self> {
        let debian = programs.debian_pgcopydb.clone();
        let known = match &debian {
            Some(program) => number(&version(program).await?),
            None => None,
        };
        let mut peers = Self { debian, ..Self::default() };
        if let Some(other) = &programs.other_pgcopydb
            && number(&version(other).await?) > known
        {
            peers.binary = knows_binary(other).await?;
            peers.newer = Some(other.clone());
        }
        Ok(peers)
    }

    pub(crate) fn program(&self, which: Which) -> Option<&Path> {
        match which {
            Which::Debian => self.debian.as_deref(),
            Which::NewestSplit => self.newer.as_deref().or(self.debian.as_deref()),
            Which::Newer => self.newer.as_deref(),
            Which::NewerBinary => self.newer.as_deref().filter(|_| self.binary),
        }
    }

    /// A note for each that is wanted and not there.
    pub(crate) fn say_who_is_missing(&self, copy: &CopyOptions) {
        if copy.wants(Contender::Pgcopydb) && self.debian.is_none() {
            say("pgcopydb does not take part: this machine has none");
        }
        match &self.newer {
            None if copy.wants(Contender::PgcopydbNew) || copy.wants(Contender::PgcopydbBinary) => {
                say("no newer pgcopydb takes part: there is none on the search path");
            }
            Some(program) if copy.wants(Contender::PgcopydbBinary) && !self.binary => {
                say(format!("{} does not know {BINARY}", program.display()));
            }
            _ => {}
        }
    }
}

async fn knows_binary(program: &Path) -> Result<bool> {
    let output = Command::new(program).args(["clone", "--help"]).output().await;
    let output = output.with_context(|| format!("asking {} for its options", program.display()))?;
    Ok([output.stdout, output.stderr].iter().any(|text| String::from_utf8_lossy(text).contains(BINARY)))
}

/// The first two parts of a version such as `pgcopydb version 0.10-1`.
fn number(version: &str) -> Option<(u32, u32)> {
    let text = version.split_whitespace().find(|word| word.starts_with(|first: char| first.is_ascii_digit()))?;
    let mut parts = text.split(|other: char| !other.is_ascii_digit()).map(str::parse::<u32>);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

/// `pgcopydb clone`
pub(super) async fn clone(ground: &Ground<'_>, clock: &mut Stopwatch<'_>, which: Which) -> Result<()> {
    let program = ground.peers.program(which).context("there is no such pgcopydb")?;
    let mut command = command(program, ground.programs, &ground.pair.folder)?;
    command.args(["clone", "--source", &ground.source_url(), "--target", &ground.target_url()]);
    command.args(["--table-jobs", &ground.copy.jobs.to_string(), "--index-jobs", &ground.copy.index_jobs.to_string()]);
    command.arg("--dir").arg(folder(ground));
    match which {
        Which::NewestSplit => command.args(SPLIT),
        Which::NewerBinary => command.arg(BINARY),
        Which::Debian | Which::Newer => &mut command,
    };
    clock.run(command).await
}

fn folder(ground: &Ground<'_>) -> PathBuf {
    ground.pair.folder.path().join("pgcopydb")
}

pub(super) fn clean(ground: &Ground<'_>) -> Result<()> {
    let folder = folder(ground);
    if folder.exists() { std::fs::remove_dir_all(folder).context("removing the files of pgcopydb") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_apart() {
        assert_eq!(number("pgcopydb version 0.10-1"), Some((0, 10)));
        assert_eq!(number("pgcopydb version 0.17.1.g1234"), Some((0, 17)));
        assert_eq!(number("nonsense"), None);
        assert!(number("pgcopydb version 0.17") > number("pgcopydb version 0.10-1"));
    }
}
