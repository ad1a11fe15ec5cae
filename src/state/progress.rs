//! Progress that the engine `subscription` reports: the target's worker applies, so no batch of ours carries it.

use super::{Store, leadership_lost};
use crate::error::{Doing, Result};
use crate::postgres::{Lsn, quote_literal};

/// The statement that says that the target holds everything before `position`, an SQL expression of type pg_lsn. Progress
/// never goes back. It belongs behind [`super::fence_sql`].
#[must_use]
pub fn progress_sql(move_name: &str, position: &str) -> String {
    format!("UPDATE pgtandem.progress SET lsn = GREATEST(lsn, {position}) WHERE move = {}", quote_literal(move_name))
}

impl Store {
    /// The target durably holds everything before this position.
    ///
    /// # Errors
    /// Class retry: another daemon took the move. The connection's.
    pub async fn advance(&self, epoch: i64, lsn: Lsn) -> Result<()> {
        let session = self.session().await?;
        let advanced = session
            .get()?
            .execute(
                "UPDATE pgtandem.progress SET lsn = GREATEST(lsn, $3::text::pg_lsn) WHERE move = $1 AND epoch = $2",
                &[&self.name.as_str(), &epoch, &lsn.to_string()],
            )
            .await
            .doing(|| "writing progress")?;
        if advanced == 1 { Ok(()) } else { Err(leadership_lost()) }
    }
}
