//! How fast a backlog is followed, and what that costs: pgtandem beside the native subscription, pgcopydb, and a reader that
//! applies nothing. With `copy` as its first word, how fast a database is copied first: pgtandem beside pg_dump, pgcopydb and
//! the native subscription. `bench/README.md` says what is measured and how to read it.
//!
//! | file | what it owns |
//! |---|---|
//! | [`options`] | the command line |
//! | [`programs`] | where the programs are: servers, clients, pgtandem, pgcopydb |
//! | [`servers`] | a source and two targets, thrown away at the end |
//! | [`process`] | programs that are run: to their end, or until they are stopped |
//! | [`guard`] | ending what was started when this program itself cannot |
//! | [`workload`] | what the source has done that is to be followed |
//! | [`contender`] | who follows it |
//! | [`stage`] | one workload set up: databases, slots, the backlog |
//! | [`rounds`] | who drains when, and how long anyone may take |
//! | [`drain`] | one contender drains one backlog |
//! | [`outcome`] | how that went |
//! | [`copy`] | the first copy: data sets, contenders, and all that the rows above say, for it |
//! | [`steady`] | following while the source works: the highest rate, the lag at half of it |
//! | [`measure`] | processor time and memory of processes |
//! | [`same`] | whether a target holds what the source holds |
//! | [`report`] | tables for people, JSON for programs |
//! | [`machine`] | what all this ran on |

mod contender;
mod copy;
mod drain;
mod guard;
mod machine;
mod measure;
mod options;
mod outcome;
mod process;
mod programs;
mod report;
mod rounds;
mod same;
mod servers;
mod stage;
mod steady;
mod workload;

use std::process::ExitCode;

use clap::Parser;

use crate::options::{Options, Task};
use crate::workload::Kind;

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = match &options.command {
        _ if options.null_reader => contender::null::read().await.map(|()| true),
        Some(Task::Copy(copy)) => copy::run(&options, copy).await,
        None => run(&options).await,
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs every workload; false if a target was not identical to the source, or a contender that must drain did not.
async fn run(options: &Options) -> anyhow::Result<bool> {
    let programs = programs::Programs::find(options)?;
    if options.wants(contender::Contender::Pgcopydb) && programs.pgcopydb.is_none() {
        say(format!(
            "pgcopydb does not take part: this machine has none, or no wal2json for PostgreSQL {}",
            options.source
        ));
    }
    let mut report = report::Report::begin(options, &programs).await?;
    let servers = servers::Servers::start(&programs).await?;
    report.print_head();
    for kind in options.workloads() {
        if kind == Kind::G {
            report.add_steady(&kind.title(options), steady::play(options, &programs, &servers).await?);
        } else {
            report.add(rounds::play(kind, options, &programs, &servers).await?);
        }
        // Whatever comes next may fail.
        report.write_json(options)?;
    }
    report.print_verdict();
    Ok(report.all_good())
}

/// Says on stderr what happens.
pub(crate) fn say(text: impl std::fmt::Display) {
    eprintln!("bench: {text}");
}
