//! Long values: texts out of line that compress and that do not, jsonb in its row, arrays.

use anyhow::Result;

use crate::options::Options;
use crate::workload::Place;

const ARTICLES: u64 = 60_000;
const BLOBS: u64 = 40_000;
const EVENTS: u64 = 600_000;

pub(super) fn title(options: &Options) -> String {
    format!(
        "{} texts that compress, {} that do not, {} rows of jsonb",
        options.scaled(ARTICLES),
        options.scaled(BLOBS),
        options.scaled(EVENTS)
    )
}

pub(super) async fn fill(place: &Place<'_>) -> Result<()> {
    place
        .execute_each(&[
            "CREATE TABLE article (id bigint PRIMARY KEY, title text NOT NULL, tags text[] NOT NULL, body text NOT NULL)"
                .to_owned(),
            // 4 to 20 kB: sentences that come back with other numbers in them, quotes, tabs and ends of lines.
            format!(
                "INSERT INTO article
                 SELECT i, 'article ' || md5(i::text), ARRAY['tag ' || i % 10, 'a \"quoted\" tag', NULL],
                        (SELECT string_agg(E'Line ' || n || E':\\tthe café said \"' || md5((i * n)::text)
                                           || E'\" and c:\\\\path was ' || i % n || E' long.\\n', '')
                         FROM generate_series(1, 40 + i % 160) n)
                 FROM generate_series(1, {}::int8) i",
                place.scaled(ARTICLES)
            ),
            "CREATE INDEX ON article (title)".to_owned(),
            "CREATE TABLE blob (id bigint PRIMARY KEY, content bytea NOT NULL)".to_owned(),
            // 6 kB each.
            format!(
                "INSERT INTO blob
                 SELECT i, (SELECT string_agg(sha512((i || '/' || n)::bytea), '') FROM generate_series(1, 96) n)
                 FROM generate_series(1, {}::int8) i",
                place.scaled(BLOBS)
            ),
            "CREATE TABLE event (id bigint PRIMARY KEY, at timestamptz NOT NULL, data jsonb NOT NULL, scores float8[])"
                .to_owned(),
            format!(
                "INSERT INTO event
                 SELECT i, timestamptz '2026-01-01 00:00:00+00' + i * interval '3 seconds',
                        jsonb_build_object('kind', 'kind ' || i % 20, 'user', jsonb_build_object('id', i % 50000, 'name', md5(i::text)),
                                           'items', jsonb_build_array(i, i / 7.0, 'three', NULL, jsonb_build_object('deep', true)),
                                           'note', repeat('a line of a note, ', (i % 12)::int), 'trace', md5((i * 3)::text)),
                        CASE WHEN i % 2 = 0 THEN ARRAY[i / 3.0, sqrt(i::float8), NULL] END
                 FROM generate_series(1, {}::int8) i",
                place.scaled(EVENTS)
            ),
            "CREATE INDEX ON event ((data ->> 'kind'), at)".to_owned(),
        ])
        .await
}
