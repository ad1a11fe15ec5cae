//! The marker: a transaction of ours on the source, and the proof that the stream is complete once it arrives.
//!
//! It commits after the fence closed, so every transaction of the application that committed has its commit record
//! before the marker's. The stream is in the order of commit records, so a target that holds the marker holds them all.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use crate::error::{Class, Doing, Error, Result};
use crate::follow::{Durable, Marker, MarkerWatch};
use crate::postgres::Session;
use crate::postgres::lsn::InvalidLsn;

/// Commits a marker on the source; returns its id.
pub(super) async fn emit(session: &mut Session, expected: &MarkerWatch) -> Result<u64> {
    // An id that no earlier run used: a marker of an abandoned cutover may still be on its way.
    let id = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
    let transaction = session.transaction().await.doing(|| "writing the marker on the source")?;
    let xid: i64 = transaction
        .query_one("SELECT pg_catalog.txid_current() & 4294967295", &[])
        .await
        .doing(|| "writing the marker on the source")?
        .try_get(0)?;
    let xid = u32::try_from(xid).map_err(|_| Error::bug(format!("{xid} is no transaction id")))?;
    expected.expect(Marker { id, xid });
    transaction
        .execute("SELECT pg_catalog.pg_logical_emit_message(true, 'pgtandem', $1)", &[&format!("marker {id}")])
        .await
        .doing(|| "writing the marker on the source")?;
    transaction.commit().await.doing(|| "committing the marker on the source")?;
    if expected.wants_position() {
        let position: String = session
            .query_one("SELECT pg_catalog.pg_current_wal_flush_lsn()::text", &[])
            .await
            .doing(|| "asking where the marker was committed")?
            .try_get(0)?;
        expected.committed(id, position.parse().map_err(|e: InvalidLsn| Error::bug(e.to_string()))?);
    }
    Ok(id)
}

/// Waits until the target durably holds the marker.
pub(super) async fn arrival(mut durable: watch::Receiver<Durable>, id: u64, deadline: Instant) -> Result<Durable> {
    let arrived = durable.wait_for(|durable| durable.marker == Some(id));
    match tokio::time::timeout_at(deadline.into(), arrived).await {
        Ok(Ok(durable)) => Ok(*durable),
        Ok(Err(_)) => Err(Error::new(Class::No, "follow_ended", "following ended before the marker arrived")),
        Err(_) => {
            Err(Error::new(Class::No, "drain_timeout", "the marker did not arrive in time: the target lags behind")
                .hint("wait for less lag, or raise cutover.timeout"))
        }
    }
}
