//! One daemon at a time.
//!
//! An advisory lock in the target keeps a second daemon waiting. A lock alone is not enough: a daemon whose lock
//! session died does not know it yet, and could commit one more batch beside its successor. So each daemon that
//! takes the lock also raises the *epoch* of the move, and every batch advances progress only `WHERE epoch = mine`;
//! the old daemon's batch then matches no row and is rolled back whole.

use super::Store;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::{Session, quote_literal};

/// Held for as long as it lives; the lock goes with its session.
pub struct Leadership {
    session: Session,
    epoch: i64,
}

impl Leadership {
    /// The number that every batch of this daemon carries.
    #[must_use]
    pub fn epoch(&self) -> i64 {
        self.epoch
    }

    /// Raises the epoch again, for another try under the same lock: what the last one left on its way changes nothing any more.
    ///
    /// # Errors
    /// The connection's, and with it the lock is gone.
    pub async fn renew(&mut self, store: &Store) -> Result<()> {
        self.epoch = store.raise_epoch(&self.session).await?;
        Ok(())
    }

    /// Completes once the lock's session ended, and with it the right to go on.
    pub async fn lost(&mut self) -> Error {
        while self.session.notification().await.is_some() {}
        Error::new(Class::Retry, "leadership_lost", "the connection that holds this move ended")
    }
}

impl Store {
    /// Takes the move, or `None` if another daemon holds it.
    ///
    /// # Errors
    /// The connection's.
    pub async fn try_lead(&self) -> Result<Option<Leadership>> {
        let session = self.target.connect("lock").await.doing(|| "taking the move")?;
        let taken: bool = session
            .query_one(&format!("SELECT pg_catalog.pg_try_advisory_lock({})", self.lock_key()), &[])
            .await
            .doing(|| "taking the move")?
            .try_get(0)?;
        if !taken {
            return Ok(None);
        }
        // A daemon whose machine vanished must not hold the move for as long as the server's own settings say.
        session
            .batch_execute(
                "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3",
            )
            .await
            .doing(|| "taking the move")?;
        let epoch = self.raise_epoch(&session).await?;
        Ok(Some(Leadership { session, epoch }))
    }

    async fn raise_epoch(&self, session: &Session) -> Result<i64> {
        let row = session
            .query_one(
                "UPDATE pgtandem.progress SET epoch = epoch + 1 WHERE move = $1 RETURNING epoch",
                &[&self.name.as_str()],
            )
            .await
            .doing(|| "raising the epoch of the move")?;
        Ok(row.try_get(0)?)
    }

    /// Whether some daemon holds the move right now.
    ///
    /// # Errors
    /// The connection's.
    pub async fn is_led(&self) -> Result<bool> {
        let session = self.session().await?;
        let row = session
            .get()?
            .query_one(
                &format!(
                    "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks l, (SELECT {} AS key) k
                     WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
                       AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
                       AND l.classid = ((k.key >> 32) & 4294967295)::oid AND l.objid = (k.key & 4294967295)::oid)",
                    self.lock_key()
                ),
                &[],
            )
            .await
            .doing(|| "looking for a daemon")?;
        Ok(row.try_get(0)?)
    }

    fn lock_key(&self) -> String {
        format!("pg_catalog.hashtextextended({}, 0)", quote_literal(&format!("pgtandem move {}", self.name)))
    }
}
