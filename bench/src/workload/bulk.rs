//! (b) Three transactions: 2 million inserts, then 1 million updates, then half a million deletes.

use anyhow::Result;

use super::Place;
use crate::options::Options;

const INSERTS: u64 = 2_000_000;
const UPDATES: u64 = 1_000_000;
const DELETES: u64 = 500_000;

pub(super) fn title(options: &Options) -> String {
    format!(
        "{} inserts, {} updates, {} deletes in three transactions",
        options.scaled(INSERTS),
        options.scaled(UPDATES),
        options.scaled(DELETES)
    )
}

pub(super) async fn set_up(place: &Place<'_>) -> Result<()> {
    let table = "CREATE TABLE item (
        id bigint PRIMARY KEY, name text NOT NULL, price numeric(12,2) NOT NULL, quantity int NOT NULL,
        changed_at timestamptz NOT NULL)";
    place.execute_each(&[table.to_owned()]).await
}

pub(super) async fn make_backlog(place: &Place<'_>) -> Result<()> {
    let (inserts, updates, deletes) = (place.scaled(INSERTS), place.scaled(UPDATES), place.scaled(DELETES));
    place
        .execute_each(&[
            format!(
                "INSERT INTO item
                 SELECT i, 'item ' || md5(i::text), i % 100000 / 100.0, i % 1000, clock_timestamp()
                 FROM generate_series(1, {inserts}) i"
            ),
            format!("UPDATE item SET quantity = quantity + 1, changed_at = clock_timestamp() WHERE id <= {updates}"),
            // Half of them were updated before.
            format!(
                "DELETE FROM item WHERE id > {updates} - {deletes} / 2 AND id <= {updates} - {deletes} / 2 + {deletes}"
            ),
        ])
        .await
}
