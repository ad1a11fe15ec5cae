//! What the source has done that is to be followed.
//!
//! A workload has two halves. Its first state is made by the same statements on the source and on the native target, so it
//! depends on nothing but the size. Its backlog is what the source then does while nobody follows.

mod bulk;
mod indexed;
mod keyless;
mod large;
mod shop;
pub(crate) mod tpcb;
mod wide;

use std::path::PathBuf;

use anyhow::Result;
use tokio::process::Command;

use crate::contender::Contender;
use crate::options::Options;
use crate::process;
use crate::programs::Programs;
use crate::servers::{Folder, SUPERUSER, Server};
use crate::steady;

/// The workloads, by the letters of the README.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// pgbench's TPC-B transactions
    A,
    /// Inserts, updates and deletes in three large transactions
    B,
    /// Single-row updates on a table with five secondary indexes
    C,
    /// Wide rows with jsonb, arrays and TOAST
    D,
    /// Updates of a table with REPLICA IDENTITY FULL and no key
    E,
    /// A mixed load over 50 tables with foreign keys
    F,
    /// Steady state: the highest rate that is followed, and the lag at half of it
    G,
    /// One large transaction, for the daemon's memory; pgtandem alone
    H,
}

impl Kind {
    pub(crate) fn letter(self) -> char {
        match self {
            Self::A => 'a',
            Self::B => 'b',
            Self::C => 'c',
            Self::D => 'd',
            Self::E => 'e',
            Self::F => 'f',
            Self::G => 'g',
            Self::H => 'h',
        }
    }

    /// Whether it says anything about this contender.
    pub(crate) fn is_for(self, contender: Contender) -> bool {
        match self {
            Self::G => matches!(contender, Contender::Native | Contender::Pgtandem),
            Self::H => contender == Contender::Pgtandem,
            _ => true,
        }
    }

    /// What it is at this size, in a line.
    pub(crate) fn title(self, options: &Options) -> String {
        match self {
            Self::A => tpcb::title(options),
            Self::B => bulk::title(options),
            Self::C => indexed::title(options),
            Self::D => wide::title(options),
            Self::E => keyless::title(options),
            Self::F => shop::title(options),
            Self::G => steady::title(options),
            Self::H => large::title(options),
        }
    }

    /// Makes the first state in an empty database.
    pub(crate) async fn set_up(self, place: &Place<'_>) -> Result<()> {
        match self {
            Self::A => tpcb::set_up(place).await,
            Self::B => bulk::set_up(place).await,
            Self::C => indexed::set_up(place).await,
            Self::D => wide::set_up(place).await,
            Self::E => keyless::set_up(place).await,
            Self::F => shop::set_up(place).await,
            Self::G => steady::set_up(place).await,
            Self::H => large::set_up(place).await,
        }
    }

    /// Does what is to be followed.
    pub(crate) async fn make_backlog(self, place: &Place<'_>) -> Result<()> {
        match self {
            Self::A => tpcb::make_backlog(place).await,
            Self::B => bulk::make_backlog(place).await,
            Self::C => indexed::make_backlog(place).await,
            Self::D => wide::make_backlog(place).await,
            Self::E => keyless::make_backlog(place).await,
            Self::F => shop::make_backlog(place).await,
            // What there is to follow is made while it is followed.
            Self::G => Ok(()),
            Self::H => large::make_backlog(place).await,
        }
    }
}

/// One database, and what it takes to fill it.
pub(crate) struct Place<'a> {
    pub(crate) options: &'a Options,
    pub(crate) programs: &'a Programs,
    pub(crate) folder: &'a Folder,
    pub(crate) server: &'a Server,
    pub(crate) database: &'a str,
}

impl Place<'_> {
    pub(crate) fn scaled(&self, full: u64) -> u64 {
        self.options.scaled(full)
    }

    /// Each statement is a transaction of its own.
    pub(crate) async fn execute_each(&self, statements: &[String]) -> Result<()> {
        let client = self.server.connect(self.database).await?;
        for statement in statements {
            let outcome = client.batch_execute(statement).await;
            anyhow::Context::with_context(outcome, || statement.clone())?;
        }
        Ok(())
    }

    /// pgbench on this database.
    fn pgbench(&self) -> Command {
        let mut command = Command::new(self.programs.pgbench());
        command.args(["-h", "127.0.0.1", "-p", &self.server.port().to_string(), "-U", SUPERUSER]);
        command.env("PGPASSFILE", self.folder.passfile());
        command
    }

    /// pgbench that does not wait for commits: the source makes its log faster, and the log is the same.
    pub(crate) fn pgbench_unsynced(&self) -> Command {
        let mut command = self.pgbench();
        command.env("PGOPTIONS", "-c synchronous_commit=off");
        command
    }

    /// Runs it to its end; what it said is in the file.
    pub(crate) async fn run_pgbench(&self, mut command: Command) -> Result<PathBuf> {
        command.arg(self.database);
        let log = self.folder.path().join("pgbench.log");
        process::run(command, &log).await?;
        Ok(log)
    }

    /// Runs scripts, chosen by their weights, by four clients, so many transactions together.
    pub(crate) async fn run_scripts(&self, transactions: u64, scripts: &[(&str, u32, String)]) -> Result<()> {
        let mut command = self.pgbench_unsynced();
        command.args(["-n", "-c", "4", "-j", "2", "-t", &transactions.div_ceil(4).to_string()]);
        // So that every run does the same.
        command.arg("--random-seed=1");
        for (name, weight, text) in scripts {
            let file: PathBuf = self.folder.path().join(format!("{name}.sql"));
            std::fs::write(&file, text)?;
            command.arg("-f").arg(format!("{}@{weight}", file.display()));
        }
        self.run_pgbench(command).await.map(drop)
    }
}
