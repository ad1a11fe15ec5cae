//! One table of rows of 1 kB with a primary key. The texts are hexadecimal digits of hashes: they do not compress well, and do not
//! leave their rows.

use anyhow::Result;

use crate::options::Options;
use crate::workload::Place;

/// Seven rows fill a page of 8 kB.
const ROWS: u64 = (4 << 30) / 8192 * 7;

pub(super) fn title(options: &Options) -> String {
    let gibibytes = options.scaled(ROWS) as f64 / ROWS as f64 * 4.0;
    format!("one table of {gibibytes:.2} GiB with a primary key")
}

pub(super) async fn fill(place: &Place<'_>) -> Result<()> {
    let hash = |salt: char| format!("encode(sha512((i || '{salt}')::bytea), 'hex')");
    let hashes: Vec<String> = ('a'..='h').map(hash).collect();
    place
        .execute_each(&[
            "CREATE TABLE large (id bigint NOT NULL, kind int NOT NULL, made_at timestamptz NOT NULL, content text NOT NULL)"
                .to_owned(),
            // With its own length the row must fit seven times.
            format!(
                "INSERT INTO large
                 SELECT i, i % 1000, timestamptz '2026-01-01 00:00:00+00' + i * interval '1 second', {}
                 FROM generate_series(1, {}::int8) i",
                hashes.join(" || "),
                place.scaled(ROWS)
            ),
            "ALTER TABLE large ADD PRIMARY KEY (id)".to_owned(),
        ])
        .await
}
