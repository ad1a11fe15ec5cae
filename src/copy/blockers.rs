//! Who holds us up: a wait for a lock is never silent.

use std::time::Duration;

use crate::error::{Doing, Result};
use crate::postgres::{Server, Session};
use crate::telemetry::Telemetry;

/// A wait that is shorter is not worth a word.
const WORTH_A_WORD: Duration = Duration::from_secs(1);

/// How often a wait is explained again.
const REPEAT: Duration = Duration::from_secs(5);

/// `$1`: the process id of the backend that waits. Holders of any lock, also of a transaction's end; a prepared
/// transaction has no process and is found through the lock. The text of their statements stays out: it may hold data.
const BLOCKERS: &str = "
    SELECT pg_catalog.format('pid %s (user %s, database %s, application %s, %s, transaction open for %s)',
               b.pid, a.usename, a.datname, pg_catalog.quote_literal(a.application_name), COALESCE(a.state, 'state unknown'),
               COALESCE(pg_catalog.date_trunc('second', pg_catalog.clock_timestamp() - a.xact_start)::text, 'an unknown time'))
    FROM pg_catalog.unnest(pg_catalog.pg_blocking_pids($1)) AS b (pid)
    LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = b.pid
    WHERE b.pid <> 0
    UNION
    SELECT pg_catalog.format('the prepared transaction %s (owner %s, database %s, prepared %s ago)',
               pg_catalog.quote_literal(p.gid), p.owner, p.database,
               pg_catalog.date_trunc('second', pg_catalog.clock_timestamp() - p.prepared))
    FROM pg_catalog.pg_locks w
    JOIN pg_catalog.pg_locks h ON h.granted AND h.pid IS NULL AND h.locktype = w.locktype
        AND (h.transactionid = w.transactionid OR (h.database = w.database AND h.relation = w.relation))
    JOIN pg_catalog.pg_prepared_xacts p ON p.transaction = h.transactionid
        OR h.virtualtransaction = '-1/' || p.transaction::text
    WHERE w.pid = $1 AND NOT w.granted";

/// Describes every session and prepared transaction that the backend `pid` waits for; empty if it does not wait.
///
/// # Errors
/// The connection's.
pub(super) async fn of(session: &Session, pid: i32) -> Result<Vec<String>> {
    let rows = session.query(BLOCKERS, &[&pid]).await.doing(|| "asking who holds a lock")?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

/// Does `work` on a connection of `server` whose backend is `pid`. While that takes long, log and telemetry say who
/// holds it up. `what` reads like "locking public.orders on the source".
pub(super) async fn explained<T>(
    server: &Server,
    pid: i32,
    what: &str,
    telemetry: &Telemetry,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        biased;
        done = &mut work => return done,
        () = tokio::time::sleep(WORTH_A_WORD) => {}
    }
    tokio::select! {
        biased;
        done = &mut work => done,
        never = explain(server, pid, what, telemetry) => match never {},
    }
}

/// Never ends: a look that fails is tried again, for the wait itself goes on.
async fn explain(server: &Server, pid: i32, what: &str, telemetry: &Telemetry) -> std::convert::Infallible {
    let mut session = None;
    loop {
        let look = async {
            if session.as_ref().is_none_or(|session: &Session| session.is_closed()) {
                session = Some(server.connect("watch").await?);
            }
            match &session {
                Some(session) => of(session, pid).await,
                None => Ok(Vec::new()),
            }
        };
        match look.await {
            Ok(blockers) if blockers.is_empty() => tracing::debug!("{what}: waiting for the server"),
            Ok(blockers) => {
                let text = format!("{what}: waiting for {}", blockers.join("; "));
                tracing::warn!("{text}");
                telemetry.activity(&text);
            }
            Err(error) => tracing::debug!(%error, "cannot see who holds us up"),
        }
        tokio::time::sleep(REPEAT).await;
    }
}
