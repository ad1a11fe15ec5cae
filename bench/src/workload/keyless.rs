//! (e) Updates of a table with REPLICA IDENTITY FULL that has no key, so that the target must find each row by all its values.

use anyhow::Result;

use super::Place;
use crate::options::Options;

const ROWS: u64 = 200_000;
const UPDATES: u64 = 20_000;
/// Updates to a transaction, at most.
const CHUNK: u64 = 1_000;

pub(super) fn title(options: &Options) -> String {
    format!("{} updates on {} rows without a key, REPLICA IDENTITY FULL", options.scaled(UPDATES), options.scaled(ROWS))
}

pub(super) async fn set_up(place: &Place<'_>) -> Result<()> {
    let rows = place.scaled(ROWS);
    place
        .execute_each(&[
            "CREATE TABLE event (number bigint, kind text, amount numeric(10,2), at timestamptz)".to_owned(),
            "ALTER TABLE event REPLICA IDENTITY FULL".to_owned(),
            format!(
                "INSERT INTO event
                 SELECT i, 'kind ' || i % 20, i % 5000 / 100.0, timestamptz '2026-01-01 00:00:00+00' + i * interval '1 second'
                 FROM generate_series(1, {rows}) i"
            ),
        ])
        .await
}

pub(super) async fn make_backlog(place: &Place<'_>) -> Result<()> {
    let (rows, updates) = (place.scaled(ROWS), place.scaled(UPDATES));
    // Every so many rows one is updated, so that they lie all over the table.
    let step = (rows / updates).max(1);
    let mut statements = Vec::new();
    let mut from = 1;
    while from <= updates {
        let to = (from + CHUNK - 1).min(updates);
        statements.push(format!(
            "UPDATE event SET amount = amount + 1, at = clock_timestamp()
             WHERE number IN (SELECT i * {step} FROM generate_series({from}, {to}) i)"
        ));
        from = to + 1;
    }
    place.execute_each(&statements).await
}
