//! (d) Rows of 24 columns with jsonb, arrays, and a text of 8 kB that lies out of line. Most updates leave that text alone,
//! and the source does not send it with them.

use anyhow::Result;

use super::Place;
use crate::options::Options;

const ROWS: u64 = 20_000;
const INSERTS: u64 = 20_000;
const UPDATES: u64 = 40_000;
const TEXT_UPDATES: u64 = 10_000;
const DELETES: u64 = 5_000;
/// Changes to a transaction.
const CHUNK: u64 = 50;

pub(super) fn title(options: &Options) -> String {
    format!(
        "wide rows with jsonb, arrays and 8 kB out of line: {} inserts, {} updates beside the 8 kB, {} of them, {} deletes",
        options.scaled(INSERTS),
        options.scaled(UPDATES),
        options.scaled(TEXT_UPDATES),
        options.scaled(DELETES)
    )
}

pub(super) async fn set_up(place: &Place<'_>) -> Result<()> {
    let numbers: Vec<String> = (1..=12).map(|at| format!("n{at} int NOT NULL")).collect();
    let texts: Vec<String> = (1..=6).map(|at| format!("t{at} text")).collect();
    place
        .execute_each(&[
            format!(
                "CREATE TABLE document (
                     id bigint PRIMARY KEY, attributes jsonb NOT NULL, tags text[] NOT NULL, scores float8[] NOT NULL,
                     body text NOT NULL, changed_at timestamptz, {}, {})",
                numbers.join(", "),
                texts.join(", ")
            ),
            rows(1, place.scaled(ROWS), "0"),
            "CREATE INDEX ON document USING gin (attributes)".to_owned(),
        ])
        .await
}

pub(super) async fn make_backlog(place: &Place<'_>) -> Result<()> {
    let first = place.scaled(ROWS);
    let all = first + place.scaled(INSERTS);
    let mut statements = Vec::new();
    in_chunks(place.scaled(INSERTS), |from, to| {
        statements.push(rows(first + from, first + to, "extract(epoch FROM clock_timestamp())"));
    });
    in_chunks(place.scaled(UPDATES), |from, to| {
        statements.push(format!(
            "UPDATE document SET attributes = attributes || jsonb_build_object('seen', {from}, 'by', md5(id::text)),
                    tags = tags[2:] || ARRAY['tag ' || {from}], n1 = n1 + 1, n2 = n2 + id::int % 5, t1 = md5(t1),
                    changed_at = clock_timestamp()
             WHERE id IN (SELECT 1 + i::int8 * 7919 % {all} FROM generate_series({from}, {to}) i)"
        ));
    });
    in_chunks(place.scaled(TEXT_UPDATES), |from, to| {
        statements.push(format!(
            "UPDATE document SET body = (SELECT string_agg(md5(id || '/' || n || '/new'), '') FROM generate_series(1, 256) n)
             WHERE id IN (SELECT 1 + i::int8 * 104729 % {all} FROM generate_series({from}, {to}) i)"
        ));
    });
    in_chunks(place.scaled(DELETES), |from, to| {
        statements.push(format!("DELETE FROM document WHERE id BETWEEN {from} AND {to}"));
    });
    place.execute_each(&statements).await
}

/// Rows from one id to another. `salt` is an expression that makes numbers differ.
fn rows(from: u64, to: u64, salt: &str) -> String {
    let numbers: Vec<String> = (1..=12).map(|at| format!("i::int % {}", at * 97)).collect();
    let texts: Vec<String> = (1..=6).map(|at| format!("nullif(md5((i * {at})::text), '')")).collect();
    format!(
        "INSERT INTO document
         SELECT i, jsonb_build_object('name', md5(i::text), 'size', i % 1000, 'nested', jsonb_build_object(
                    'list', jsonb_build_array(i, i + 1, 'three'), 'flag', i % 2 = 0), 'salt', {salt}),
                ARRAY['tag ' || i % 10, 'tag ' || i % 100, NULL], ARRAY[i / 3.0, i * 1.5, sqrt(i::float8)],
                (SELECT string_agg(md5(i || '/' || n), '') FROM generate_series(1, 256) n), NULL, {}, {}
         FROM generate_series({from}, {to}) i",
        numbers.join(", "),
        texts.join(", ")
    )
}

/// Calls with the first and the last of every chunk, counted from 1.
fn in_chunks(count: u64, mut each: impl FnMut(u64, u64)) {
    let mut from = 1;
    while from <= count {
        let to = (from + CHUNK - 1).min(count);
        each(from, to);
        from = to + 1;
    }
}
