//! ANALYZE, for contenders that leave it to their user: each table that has no statistics gets them, the largest first.
//!
//! What a contender has gathered is seen in the target's catalog, so nobody has to say who gathers and who does not.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use tokio::task::JoinSet;

use crate::servers::Server;
use crate::stage::DATABASE;

const WITHOUT: &str = "
    SELECT format('%I.%I', n.nspname, c.relname)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pgtandem', 'pgcopydb')
      AND pg_relation_size(c.oid) > 0 AND NOT EXISTS (SELECT FROM pg_statistic s WHERE s.starelid = c.oid)
    ORDER BY pg_relation_size(c.oid)";

/// Gathers what is missing, in so many sessions at once; for how many tables.
pub(crate) async fn gather(target: &Server, sessions: u16) -> Result<usize> {
    let client = target.connect(DATABASE).await?;
    let rows = client.query(WITHOUT, &[]).await.context("looking for tables without statistics")?;
    let tables = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<String>, _>>()?;
    let (count, left) = (tables.len(), Arc::new(Mutex::new(tables)));
    let mut working = JoinSet::new();
    for _ in 0..count.min(usize::from(sessions)) {
        let (session, left) = (target.connect(DATABASE).await?, Arc::clone(&left));
        working.spawn(async move {
            loop {
                let next = left.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let Some(table) = next else { return anyhow::Ok(()) };
                session
                    .batch_execute(&format!("ANALYZE {table}"))
                    .await
                    .with_context(|| format!("analyzing {table}"))?;
            }
        });
    }
    while let Some(done) = working.join_next().await {
        done.context("a session that analyzes")??;
    }
    Ok(count)
}
