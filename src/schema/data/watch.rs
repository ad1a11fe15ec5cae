//! Asks a server how far pg_dump or pg_restore is with the tables that it is at.
//!
//! From 14 on a server shows what each COPY has processed, also to roles that see nothing else of others, for the session is
//! their own. Older ones show nothing, so nothing is in flight there, and only finished tables count. A server that does not answer holds nothing up.

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::copy;
use crate::error::{Error, Result};
use crate::postgres::{QualifiedName, Server, Session};

const EVERY: Duration = Duration::from_secs(1);
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// After a failure.
const REST: Duration = Duration::from_secs(15);

/// `pg_stat_progress_copy`
const COPIES_SHOWN: i32 = 140_000;

/// `$1` is what the program's sessions are called.
const COPIES: &str = "
    SELECT n.nspname, c.relname, p.tuples_processed, p.bytes_processed
    FROM pg_catalog.pg_stat_progress_copy p
    JOIN pg_catalog.pg_stat_activity a ON a.pid = p.pid AND a.application_name = $1
    JOIN pg_catalog.pg_class c ON c.oid = p.relid
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE p.datname = pg_catalog.current_database()";

/// A table that is being read or written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct InFlight {
    pub(super) table: QualifiedName,
    pub(super) rows: u64,
    pub(super) bytes: u64,
}

/// Hands over what the sessions called `role` are at, each second. Never ends.
pub(super) async fn watch(server: &Server, role: &str, mut seen: impl AsyncFnMut(Vec<InFlight>)) -> Infallible {
    loop {
        match look_on(server, role, &mut seen).await {
            Ok(never) => match never {},
            Err(error) => tracing::debug!(%error, "cannot see how far the tables are"),
        }
        sleep(REST).await;
    }
}

async fn look_on(server: &Server, role: &str, seen: &mut impl AsyncFnMut(Vec<InFlight>)) -> Result<Infallible> {
    let session = server.connect("progress").await?;
    if copy::version(&session).await? < COPIES_SHOWN {
        drop(session);
        loop {
            sleep(EVERY).await;
            seen(Vec::new()).await;
        }
    }
    let name = server.application_name(role);
    loop {
        sleep(EVERY).await;
        let answer = timeout(ANSWER_WITHIN, copies(&session, &name)).await;
        seen(answer.map_err(|_| Error::bug("no answer about the tables in flight"))??).await;
    }
}

async fn copies(session: &Session, name: &str) -> Result<Vec<InFlight>> {
    let rows = session.query(COPIES, &[&name]).await?;
    let count = |number: i64| u64::try_from(number).unwrap_or(0);
    rows.iter()
        .map(|row| {
            let table = QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? };
            Ok(InFlight { table, rows: count(row.try_get(2)?), bytes: count(row.try_get(3)?) })
        })
        .collect()
}
