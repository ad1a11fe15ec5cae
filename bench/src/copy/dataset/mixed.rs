//! pgbench's tables, of which one is large and has one index, and a table of wide rows with four.

use anyhow::Result;

use crate::options::Options;
use crate::workload::{Place, tpcb};

const WIDE_ROWS: u64 = 2_000_000;

pub(super) fn title(options: &Options) -> String {
    format!("pgbench scale {}, and {} wide rows with four indexes", tpcb::scale(options), options.scaled(WIDE_ROWS))
}

pub(super) async fn fill(place: &Place<'_>) -> Result<()> {
    tpcb::set_up(place).await?;
    place
        .execute_each(&[
            "CREATE TABLE wide (
                 id bigint NOT NULL, customer int NOT NULL, status smallint NOT NULL, amount numeric(12,2) NOT NULL,
                 city text NOT NULL, mail text NOT NULL, note text, token text NOT NULL, flags boolean[],
                 made_at timestamptz NOT NULL, changed_at timestamptz)"
                .to_owned(),
            format!(
                "INSERT INTO wide
                 SELECT i, i * 7919 % 100000, i % 7, i % 1000000 / 100.0, 'city ' || i % 3000,
                        'someone.' || i || '@example.com', CASE WHEN i % 3 > 0 THEN md5(i::text) || ' ' || md5((i * 3)::text) END,
                        md5((i * 7)::text), CASE WHEN i % 5 = 0 THEN ARRAY[i % 2 = 0, NULL, true] END,
                        timestamptz '2026-01-01 00:00:00+00' + i * interval '7 seconds',
                        CASE WHEN i % 4 = 0 THEN timestamptz '2026-06-01 00:00:00+00' + i * interval '1 second' END
                 FROM generate_series(1, {}::int8) i",
                place.scaled(WIDE_ROWS)
            ),
            "ALTER TABLE wide ADD PRIMARY KEY (id)".to_owned(),
            "CREATE INDEX ON wide (customer, made_at)".to_owned(),
            "CREATE INDEX ON wide (city)".to_owned(),
            "CREATE UNIQUE INDEX ON wide (mail)".to_owned(),
        ])
        .await
}
