//! (a) pgbench's own transactions: three updates, and an insert into a table without a key.

use anyhow::Result;

use super::Place;
use crate::options::Options;

/// pgbench's scale: 5 million accounts, so that the rows of a transaction are rarely those of the one before.
const SCALE: u64 = 50;
const TRANSACTIONS: u64 = 200_000;

pub(super) fn title(options: &Options) -> String {
    format!("{} pgbench TPC-B transactions, scale {}", options.scaled(TRANSACTIONS), options.scaled(SCALE))
}

pub(super) async fn set_up(place: &Place<'_>) -> Result<()> {
    let mut command = place.pgbench();
    command.args(["-i", "-q", "-s", &place.scaled(SCALE).to_string()]);
    place.run_pgbench(command).await
}

pub(super) async fn make_backlog(place: &Place<'_>) -> Result<()> {
    let mut command = place.pgbench();
    command.args(["-n", "-c", "4", "-j", "2", "-t", &place.scaled(TRANSACTIONS).div_ceil(4).to_string()]);
    place.run_pgbench(command).await
}
