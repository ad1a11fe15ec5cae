//! (c) Single-row updates, each a transaction, of a table with five secondary indexes of which two get a new entry.

use anyhow::Result;

use super::Place;
use crate::options::Options;

const ROWS: u64 = 1_000_000;
const UPDATES: u64 = 200_000;

pub(super) fn title(options: &Options) -> String {
    format!(
        "{} single-row updates on a table of {} rows with five secondary indexes",
        options.scaled(UPDATES),
        options.scaled(ROWS)
    )
}

pub(super) async fn set_up(place: &Place<'_>) -> Result<()> {
    let rows = place.scaled(ROWS);
    place
        .execute_each(&[
            "CREATE TABLE parcel (
                id bigint NOT NULL, customer int NOT NULL, status smallint NOT NULL, city text NOT NULL,
                weight int NOT NULL, sent_at timestamptz NOT NULL, note text NOT NULL)"
                .to_owned(),
            format!(
                "INSERT INTO parcel
                 SELECT i, i % 50000, i % 7, 'city ' || i % 3000, i::int8 * 7919 % 20000,
                        timestamptz '2026-01-01 00:00:00+00' + i * interval '7 seconds', md5(i::text)
                 FROM generate_series(1, {rows}) i"
            ),
            "ALTER TABLE parcel ADD PRIMARY KEY (id)".to_owned(),
            "CREATE INDEX ON parcel (customer)".to_owned(),
            "CREATE INDEX ON parcel (status, sent_at)".to_owned(),
            "CREATE INDEX ON parcel (city)".to_owned(),
            "CREATE INDEX ON parcel (weight)".to_owned(),
            "CREATE INDEX ON parcel (sent_at)".to_owned(),
        ])
        .await
}

pub(super) async fn make_backlog(place: &Place<'_>) -> Result<()> {
    let script = format!(
        "\\set id random(1, {})\n\\set weight random(1, 20000)\n\
         UPDATE parcel SET status = (status + 1) % 7, weight = :weight WHERE id = :id;\n",
        place.scaled(ROWS)
    );
    place.run_scripts(place.scaled(UPDATES), &[("parcel", 1, script)]).await
}
