//! Statistics on the target, once the rows are there: without them the first plans after the switch are guesses.

use std::collections::{BTreeSet, VecDeque};
use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};

use crate::error::{Doing, Result};
use crate::postgres::catalog::Table;
use crate::postgres::{QualifiedName, Server};
use crate::telemetry::Telemetry;

/// Gathers the statistics of `tables`, largest first, `workers` at a time. A partitioned table is analyzed from its root,
/// which reaches the partitions and which autovacuum never does.
///
/// # Errors
/// The connection's; no right to analyze a table.
pub async fn analyze(target: &Server, tables: &[Table], workers: NonZeroUsize, telemetry: &Telemetry) -> Result<()> {
    telemetry.activity("gathering statistics");
    let mut seen = BTreeSet::new();
    let names = tables.iter().map(|table| table.root().unwrap_or(&table.name));
    let queue: Mutex<VecDeque<&QualifiedName>> = Mutex::new(names.filter(|name| seen.insert(*name)).collect());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let work = || async {
        let session = target.connect("analyze").await?;
        while let Some(name) = next() {
            session
                .batch_execute(&format!("ANALYZE {name}"))
                .await
                .doing(|| format!("gathering statistics of {}", name.plain()))?;
        }
        Ok::<(), crate::error::Error>(())
    };
    let workers = workers.get().min(seen.len());
    futures_util::future::try_join_all((0..workers).map(|_| work())).await?;
    Ok(())
}
