//! (a) pgbench's own transactions: three updates, and an insert into a table without a key.

use anyhow::Result;

use super::Place;
use crate::options::Options;

/// pgbench's scale: 5 million accounts, so that the rows of a transaction are rarely those of the one before.
const SCALE: u64 = 50;
const TRANSACTIONS: u64 = 200_000;

pub(super) fn title(options: &Options) -> String {
    format!("{} pgbench TPC-B transactions, scale {}", options.scaled(TRANSACTIONS), scale(options))
}

/// pgbench's scale, at this scale of ours.
pub(crate) fn scale(options: &Options) -> u64 {
    options.scaled(SCALE)
}

pub(crate) async fn set_up(place: &Place<'_>) -> Result<()> {
    let mut command = place.pgbench_unsynced();
    command.args(["-i", "-q", "-s", &scale(place.options).to_string()]);
    place.run_pgbench(command).await.map(drop)
}

pub(super) async fn make_backlog(place: &Place<'_>) -> Result<()> {
    let mut command = place.pgbench_unsynced();
    command.args(["-n", "-c", "4", "-j", "2", "-t", &place.scaled(TRANSACTIONS).div_ceil(4).to_string()]);
    place.run_pgbench(command).await.map(drop)
}
