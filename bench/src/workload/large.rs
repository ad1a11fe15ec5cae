//! (h) One transaction of many rows of 1 kB: what a daemon keeps in memory must not grow with it.

use anyhow::Result;

use super::Place;
use crate::options::Options;

pub(super) fn title(options: &Options) -> String {
    format!("one transaction of {} rows of 1 kB", options.scaled(options.rows))
}

pub(super) async fn set_up(place: &Place<'_>) -> Result<()> {
    place.execute_each(&["CREATE TABLE large (id bigint PRIMARY KEY, content text NOT NULL)".to_owned()]).await
}

pub(super) async fn make_backlog(place: &Place<'_>) -> Result<()> {
    let rows = place.scaled(place.options.rows);
    // Short enough to stay in its row, uncompressed.
    let insert = format!("INSERT INTO large SELECT i, repeat(md5(i::text), 31) FROM generate_series(1, {rows}) i");
    place.execute_each(&[insert]).await
}
