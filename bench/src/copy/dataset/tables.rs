//! Many small tables: what a contender does once for each table is what counts.

use anyhow::Result;

use crate::options::Options;
use crate::workload::Place;

const SMALL: u64 = 2_000;
const SMALL_ROWS: u64 = 100;
const MANY: u64 = 10_000;
const MANY_ROWS: u64 = 10;
/// Tables to a transaction: each of them takes some locks.
const CHUNK: u64 = 100;

pub(super) fn small_title(options: &Options) -> String {
    format!("{} tables of {SMALL_ROWS} rows with a primary key and one more index", options.scaled(SMALL))
}

pub(super) fn many_title(options: &Options) -> String {
    format!("{} tables of {MANY_ROWS} rows with a primary key", options.scaled(MANY))
}

pub(super) async fn fill_small(place: &Place<'_>) -> Result<()> {
    fill(place, place.scaled(SMALL), SMALL_ROWS, true).await
}

pub(super) async fn fill_many(place: &Place<'_>) -> Result<()> {
    fill(place, place.scaled(MANY), MANY_ROWS, false).await
}

async fn fill(place: &Place<'_>, tables: u64, rows: u64, indexed: bool) -> Result<()> {
    let index = if indexed { "EXECUTE format('CREATE INDEX ON %I (kind, made_at)', name);" } else { "" };
    let chunks = (1..=tables).step_by(CHUNK as usize).map(|from| (from, (from + CHUNK - 1).min(tables)));
    let statements: Vec<String> = chunks
        .map(|(from, to)| {
            format!(
                "DO $$
                 DECLARE name text;
                 BEGIN
                     FOR at IN {from}..{to} LOOP
                         name := 'small_' || at;
                         EXECUTE format('CREATE TABLE %I (id bigint PRIMARY KEY, kind int NOT NULL, name text NOT NULL,
                                         made_at timestamptz NOT NULL)', name);
                         EXECUTE format('INSERT INTO %I SELECT i, i %% 10, md5((i * %s)::text),
                                         timestamptz ''2026-01-01 00:00:00+00'' + i * interval ''1 minute''
                                         FROM generate_series(1, {rows}) i', name, at);
                         {index}
                     END LOOP;
                 END $$"
            )
        })
        .collect();
    place.execute_each(&statements).await
}
