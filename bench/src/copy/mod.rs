//! The first copy, side by side: how long each contender takes to bring a whole database to an empty target, and what that costs.
//!
//! | file | what it owns |
//! |---|---|
//! | [`options`] | what is asked on the command line beside what both benches are asked |
//! | [`dataset`] | what there is to copy |
//! | [`contender`] | who copies |
//! | [`ground`] | the source filled, the target empty |
//! | [`stopwatch`] | the clock, and the processes while it runs |
//! | [`trial`] | one contender copies once |
//! | [`statistics`] | ANALYZE, where the contender leaves it to its user |
//! | [`killed`] | pgtandem, killed twice on its way |
//! | [`planning`] | how long pgtandem takes until the first row is on its way |
//! | [`traffic`] | pgbench on the source meanwhile, and what it loses |
//! | [`rounds`] | who copies when |
//! | [`report`] | tables for people, JSON for programs |

mod contender;
mod dataset;
mod ground;
mod killed;
mod options;
mod planning;
mod report;
mod rounds;
mod statistics;
mod stopwatch;
mod traffic;
mod trial;

use anyhow::Result;

use self::contender::pgcopydb::Peers;
pub(crate) use self::options::CopyOptions;
use self::report::Report;
use crate::options::Options;
use crate::programs::Programs;
use crate::say;
use crate::servers::Pair;

/// Copies every data set; false if a target was not identical to the source, or a contender failed.
pub(crate) async fn run(options: &Options, copy: &CopyOptions) -> Result<bool> {
    let programs = Programs::find(options)?;
    let peers = Peers::find(&programs).await?;
    peers.say_who_is_missing(copy);
    let settings = settings(copy);
    let mut report = Report::begin(options, copy, &programs, &peers, settings.clone()).await?;
    let pair = Pair::start(&programs, &settings).await?;
    report.print_head();
    for dataset in copy.datasets() {
        if copy.contenders(dataset, &peers).is_empty() {
            say(format!("{}: nobody of those who are named takes part", dataset.name()));
            continue;
        }
        report.add(rounds::play(dataset, options, copy, &programs, &peers, &pair).await?);
        // Whatever comes next may fail.
        report.write_json()?;
    }
    report.print_verdict();
    Ok(report.all_good())
}

/// What both servers need beside the settings of every bench: room for the locks of a dump of many tables, and for as many
/// workers of a subscription as everybody else has.
fn settings(copy: &CopyOptions) -> Vec<(&'static str, String)> {
    vec![
        ("max_locks_per_transaction", "512".to_owned()),
        ("max_sync_workers_per_subscription", copy.jobs.to_string()),
        ("max_logical_replication_workers", (copy.jobs + 4).to_string()),
        ("max_worker_processes", (copy.jobs + 12).to_string()),
    ]
}
