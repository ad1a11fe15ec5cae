//! What a dead process of ours, or an earlier try of this one, left running on a server.

use std::time::{Duration, Instant};

use crate::error::{Class, Doing, Error, Result};
use crate::postgres::Session;

/// A backend that was told to end does so between two rows; one that builds an index, between two of its checks. Whoever
/// called comes again.
const PATIENCE: Duration = Duration::from_secs(10);

/// Ends all other sessions of this application name, and waits until they are gone: a server notices a dead client only when it
/// next talks to it, and until then goes on with what it was told, a COMMIT included. Whoever calls this holds the move that the
/// name belongs to, so nobody else's can be meant.
///
/// # Errors
/// Class retry: they do not end. The connection's.
pub async fn end(session: &Session, application_name: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut told = false;
    loop {
        let left = session.end_others(application_name).await.doing(|| "ending sessions of an earlier try")?;
        if left == 0 {
            return Ok(());
        }
        if !std::mem::replace(&mut told, true) {
            tracing::info!(sessions = left, name = application_name, "ending sessions of an earlier try");
        }
        if Instant::now() > deadline {
            let message = format!("{left} sessions of an earlier try ({application_name}) do not end");
            return Err(Error::new(Class::Retry, "leftover_backends", message)
                .hint("look in pg_stat_activity for sessions of this application name, and what they wait for"));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
