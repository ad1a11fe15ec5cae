//! The journal of cutovers: which step was reached, so that a start after a death knows what to undo or finish.

use super::{Store, json, leadership_lost, leads, unknown_word};
use crate::error::{Doing, Error, Result};

/// How far a cutover is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutoverState {
    /// Before the point of no return: undone after a death.
    Preparing,
    /// The decision is durable. After a death the fence on the source tells whether it took hold: if it stands,
    /// the switch is finished; if not, nobody was let in and it is undone.
    Switching,
    /// Undone; following went on.
    Aborted,
    /// The application is on the target.
    Done,
}

impl CutoverState {
    /// The word in the state and the status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Switching => "switching",
            Self::Aborted => "aborted",
            Self::Done => "done",
        }
    }
}

/// One step of a cutover.
#[derive(Clone, Debug, PartialEq)]
pub struct StepRecord {
    /// `fence`, `drain`, …
    pub name: String,
    /// `running`, `done`, `failed` or `skipped`.
    pub state: String,
    /// How long it took.
    pub seconds: Option<f64>,
    /// What a person may want to know about it.
    pub detail: Option<String>,
}

/// One cutover with its steps.
#[derive(Clone, Debug)]
pub struct CutoverRecord {
    /// Ascending.
    pub id: i64,
    /// The request behind it, if it came from one.
    pub request_id: Option<i64>,
    /// How far it is.
    pub state: CutoverState,
    /// From the first refused write on the source to the first accepted one on the target.
    pub write_pause_seconds: Option<f64>,
    /// Why it was undone.
    pub error: Option<serde_json::Value>,
    /// In order.
    pub steps: Vec<StepRecord>,
}

/// Fails with a division by zero (22012), and with it the transaction, unless the cutover is still `preparing`. Until the
/// transaction ends nobody can give it up, so it stands right before the COMMIT.
#[must_use]
pub fn preparing_sql(cutover: i64) -> String {
    format!(
        "SELECT 1 / count(*) FROM (
             SELECT FROM pgtandem.cutover WHERE id = {cutover} AND state = 'preparing' FOR NO KEY UPDATE) AS open"
    )
}

impl Store {
    /// Opens the journal of a new cutover.
    ///
    /// # Errors
    /// Class retry: another daemon took the move. The connection's.
    pub async fn begin_cutover(&self, request_id: Option<i64>, epoch: i64) -> Result<i64> {
        let session = self.session().await?;
        let row = session
            .get()?
            .query_opt(
                &format!(
                    "INSERT INTO pgtandem.cutover (move, request_id, state)
                     SELECT $1, $2::int8, 'preparing' WHERE {} RETURNING id",
                    leads("$1", "$3")
                ),
                &[&self.name.as_str(), &request_id, &epoch],
            )
            .await
            .doing(|| "opening the journal of the cutover")?;
        row.ok_or_else(leadership_lost)?.try_get(0).map_err(Error::from)
    }

    /// Writes a step, or overwrites it by its ordinal.
    ///
    /// # Errors
    /// The connection's.
    pub async fn journal_step(&self, cutover: i64, ordinal: i32, step: &StepRecord) -> Result<()> {
        let session = self.session().await?;
        session
            .get()?
            .execute(
                "INSERT INTO pgtandem.cutover_step (cutover_id, ordinal, name, state, seconds, detail)
                 VALUES ($1, $2, $3, $4, $5, $6)
                 ON CONFLICT (cutover_id, ordinal)
                 DO UPDATE SET state = excluded.state, seconds = excluded.seconds, detail = excluded.detail",
                &[&cutover, &ordinal, &step.name, &step.state, &step.seconds, &step.detail],
            )
            .await
            .doing(|| format!("journaling the step {}", step.name))?;
        Ok(())
    }

    /// The decision: from `preparing` to `switching`, if this daemon still holds the move. Durable when it returns.
    ///
    /// # Errors
    /// Class retry: another daemon took the move. The connection's.
    pub async fn decide_cutover(&self, cutover: i64, epoch: i64) -> Result<()> {
        self.turn(cutover, epoch, CutoverState::Preparing, CutoverState::Switching, None).await
    }

    /// Takes the decision back: nobody was let in. The next start then undoes, whatever it finds on the source.
    ///
    /// # Errors
    /// As [`Store::decide_cutover`].
    pub async fn reconsider_cutover(&self, cutover: i64, epoch: i64) -> Result<()> {
        self.turn(cutover, epoch, CutoverState::Switching, CutoverState::Preparing, None).await
    }

    /// The application is on the target.
    ///
    /// # Errors
    /// As [`Store::decide_cutover`].
    pub async fn conclude_cutover(&self, cutover: i64, epoch: i64, write_pause_seconds: f64) -> Result<()> {
        self.turn(cutover, epoch, CutoverState::Switching, CutoverState::Done, Some(write_pause_seconds)).await
    }

    /// Whether the decision stands and is still this daemon's.
    ///
    /// # Errors
    /// Class retry if not. The connection's.
    pub async fn confirm_cutover(&self, cutover: i64, epoch: i64) -> Result<()> {
        self.turn(cutover, epoch, CutoverState::Switching, CutoverState::Switching, None).await
    }

    async fn turn(
        &self,
        cutover: i64,
        epoch: i64,
        from: CutoverState,
        to: CutoverState,
        write_pause_seconds: Option<f64>,
    ) -> Result<()> {
        let session = self.session().await?;
        let turned = session
            .get()?
            .execute(
                &format!(
                    "UPDATE pgtandem.cutover SET state = $4, write_pause_seconds = COALESCE($5, write_pause_seconds)
                     WHERE id = $1 AND state IN ($3, $4) AND {}",
                    leads("$2", "$6")
                ),
                &[&cutover, &self.name.as_str(), &from.as_str(), &to.as_str(), &write_pause_seconds, &epoch],
            )
            .await
            .doing(|| format!("journaling the cutover as {}", to.as_str()))?;
        if turned == 1 { Ok(()) } else { Err(leadership_lost()) }
    }

    /// Closes a cutover that another daemon began, as done; returns the write pause. That daemon took the time with it, so
    /// the pause is counted by the target's clock from the end of the steps during which writes still flowed; where it
    /// was written down, it stays.
    ///
    /// # Errors
    /// The connection's.
    pub async fn finish_cutover(&self, cutover: i64) -> Result<Option<f64>> {
        let session = self.session().await?;
        let row = session
            .get()?
            .query_one(
                "WITH ended AS (
                     UPDATE pgtandem.cutover_step SET state = 'done' WHERE cutover_id = $1 AND state = 'running')
                 UPDATE pgtandem.cutover c SET state = 'done', error = NULL,
                     write_pause_seconds = COALESCE(write_pause_seconds,
                         extract(epoch FROM clock_timestamp() - started_at)::float8
                         - (SELECT COALESCE(sum(s.seconds), 0) FROM pgtandem.cutover_step s
                            WHERE s.cutover_id = c.id AND s.name IN ('ready', 'carry', 'refresh', 'connect', 'estimate', 'prepare')))
                 WHERE id = $1 RETURNING write_pause_seconds",
                &[&cutover],
            )
            .await
            .doing(|| "journaling the cutover as done")?;
        Ok(row.try_get(0)?)
    }

    /// The step that was under way when its daemon ended has failed.
    ///
    /// # Errors
    /// The connection's.
    pub async fn fail_running_steps(&self, cutover: i64, detail: &str) -> Result<()> {
        let session = self.session().await?;
        session
            .get()?
            .execute(
                "UPDATE pgtandem.cutover_step SET state = 'failed', detail = $2
                 WHERE cutover_id = $1 AND state = 'running'",
                &[&cutover, &detail],
            )
            .await
            .doing(|| "journaling the step that was under way")?;
        Ok(())
    }

    /// The newest cutover of the move, if there was one.
    ///
    /// # Errors
    /// The connection's.
    pub async fn last_cutover(&self) -> Result<Option<CutoverRecord>> {
        let mut session = self.session().await?;
        // One snapshot for both statements.
        let transaction = session
            .get_mut()?
            .build_transaction()
            .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
            .read_only(true)
            .start()
            .await
            .doing(|| "reading the journal")?;
        let row = transaction
            .query_opt(
                "SELECT id, request_id, state, write_pause_seconds, error::text FROM pgtandem.cutover
                 WHERE move = $1 ORDER BY id DESC LIMIT 1",
                &[&self.name.as_str()],
            )
            .await
            .doing(|| "reading the journal")?;
        let Some(row) = row else { return Ok(None) };
        let id: i64 = row.try_get(0)?;
        let steps = transaction
            .query(
                "SELECT name, state, seconds, detail FROM pgtandem.cutover_step WHERE cutover_id = $1 ORDER BY ordinal",
                &[&id],
            )
            .await
            .doing(|| "reading the journal")?;
        Ok(Some(CutoverRecord {
            id,
            request_id: row.try_get(1)?,
            state: match row.try_get::<_, String>(2)?.as_str() {
                "preparing" => CutoverState::Preparing,
                "switching" => CutoverState::Switching,
                "aborted" => CutoverState::Aborted,
                "done" => CutoverState::Done,
                other => return Err(unknown_word("cutover state", other)),
            },
            write_pause_seconds: row.try_get(3)?,
            error: row.try_get::<_, Option<String>>(4)?.as_deref().map(json).transpose()?,
            steps: steps
                .iter()
                .map(|row| {
                    Ok(StepRecord {
                        name: row.try_get(0)?,
                        state: row.try_get(1)?,
                        seconds: row.try_get(2)?,
                        detail: row.try_get(3)?,
                    })
                })
                .collect::<Result<_>>()?,
        }))
    }
}
