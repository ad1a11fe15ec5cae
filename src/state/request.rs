//! Control goes through the target: a row in `pgtandem.request` and a NOTIFY on `pgtandem_<name>`.

use std::time::Duration;

use super::{Store, json, leads, unknown_word};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::Session;

/// What can be asked of a running daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// `{"timeout_ms": n, "dry_run": bool}`
    Cutover,
    /// `{"tables": ["schema.name", …]}`
    Verify,
    /// `{"tables": [["schema", "name"], …]}`
    Resync,
}

impl RequestKind {
    const ALL: [Self; 3] = [Self::Cutover, Self::Verify, Self::Resync];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Cutover => "cutover",
            Self::Verify => "verify",
            Self::Resync => "resync",
        }
    }

    fn named(word: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word).ok_or_else(|| unknown_word("request kind", word))
    }
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestState {
    /// No daemon has seen it.
    Waiting,
    /// A daemon works on it.
    Running,
    /// Answered: yes.
    Succeeded,
    /// Answered: no.
    Failed,
    /// Withdrawn before a daemon took it, or too old when one came.
    Expired,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Ascending.
    pub id: i64,
    /// What is asked.
    pub kind: RequestKind,
    /// See [`RequestKind`].
    pub arguments: serde_json::Value,
    /// How far it is.
    pub state: RequestState,
    /// What came of it.
    pub answer: Option<serde_json::Value>,
}

const COLUMNS: &str = "id, kind, arguments::text, state, answer::text";

fn request(row: &tokio_postgres::Row) -> Result<Request> {
    Ok(Request {
        id: row.try_get(0)?,
        kind: RequestKind::named(&row.try_get::<_, String>(1)?)?,
        arguments: json(&row.try_get::<_, String>(2)?)?,
        state: match row.try_get::<_, String>(3)?.as_str() {
            "waiting" => RequestState::Waiting,
            "running" => RequestState::Running,
            "succeeded" => RequestState::Succeeded,
            "failed" => RequestState::Failed,
            "expired" => RequestState::Expired,
            other => return Err(unknown_word("request state", other)),
        },
        answer: row.try_get::<_, Option<String>>(4)?.as_deref().map(json).transpose()?,
    })
}

impl Store {
    /// Asks the daemon for something. A daemon that comes after `patience` does not do it any more.
    ///
    /// # Errors
    /// The connection's.
    pub async fn submit(&self, kind: RequestKind, arguments: &serde_json::Value, patience: Duration) -> Result<i64> {
        let session = self.session().await?;
        let row = session
            .get()?
            .query_one(
                "WITH asked AS (
                     INSERT INTO pgtandem.request (move, kind, arguments, expires_at)
                     VALUES ($1, $2, $3::text::jsonb, now() + $4::float8 * interval '1 second') RETURNING id)
                 SELECT id, pg_catalog.pg_notify('pgtandem_' || $1, id::text) FROM asked",
                &[&self.name.as_str(), &kind.as_str(), &arguments.to_string(), &patience.as_secs_f64()],
            )
            .await
            .doing(|| "asking the daemon")?;
        Ok(row.try_get(0)?)
    }

    /// A session that hears of new requests; see [`Session::notification`].
    ///
    /// # Errors
    /// The connection's.
    pub async fn listen(&self) -> Result<Session> {
        let session = self.target.connect("requests").await.doing(|| "listening for requests")?;
        session
            .batch_execute(&format!("LISTEN {}", crate::postgres::quote_identifier(&format!("pgtandem_{}", self.name))))
            .await
            .doing(|| "listening for requests")?;
        Ok(session)
    }

    /// Takes the oldest waiting request, if the move is of this epoch, and turns down those that are too old and those that this version does not know.
    ///
    /// # Errors
    /// The connection's.
    pub async fn take_request(&self, epoch: i64) -> Result<Option<Request>> {
        self.take(epoch, None).await
    }

    /// The same, of one kind alone; others stay where they are.
    ///
    /// # Errors
    /// The connection's.
    pub async fn take_request_for(&self, epoch: i64, kind: RequestKind) -> Result<Option<Request>> {
        self.take(epoch, Some(kind)).await
    }

    async fn take(&self, epoch: i64, kind: Option<RequestKind>) -> Result<Option<Request>> {
        self.refuse_unknown_requests().await?;
        let session = self.session().await?;
        let client = session.get()?;
        client
            .execute(
                "UPDATE pgtandem.request SET state = 'expired' WHERE move = $1 AND state = 'waiting' AND expires_at < now()",
                &[&self.name.as_str()],
            )
            .await
            .doing(|| "turning down old requests")?;
        let row = client
            .query_opt(
                &format!(
                    "UPDATE pgtandem.request SET state = 'running' WHERE id = (
                         SELECT id FROM pgtandem.request
                         WHERE move = $1 AND state = 'waiting' AND kind = COALESCE($3, kind) ORDER BY id LIMIT 1)
                     AND {} RETURNING {COLUMNS}",
                    leads("$1", "$2")
                ),
                &[&self.name.as_str(), &epoch, &kind.map(RequestKind::as_str)],
            )
            .await
            .doing(|| "taking a request")?;
        row.as_ref().map(request).transpose()
    }

    /// A newer client may ask for what this daemon cannot do. That is answered with no; it must not end the move.
    async fn refuse_unknown_requests(&self) -> Result<()> {
        let error =
            Error::new(Class::No, "unknown_request", "the daemon is of a version that does not know this request")
                .hint("run the daemon in the version of the command that asks");
        let answer = serde_json::json!({
            "error": {"code": error.code(), "message": error.to_string(), "hint": error.hint_text()},
        });
        let known: Vec<&str> = RequestKind::ALL.iter().map(|kind| kind.as_str()).collect();
        let session = self.session().await?;
        let refused = session
            .get()?
            .execute(
                "UPDATE pgtandem.request SET state = 'failed', answer = $3::text::jsonb
                 WHERE move = $1 AND state = 'waiting' AND kind <> ALL ($2)",
                &[&self.name.as_str(), &known, &answer.to_string()],
            )
            .await
            .doing(|| "turning down unknown requests")?;
        if refused > 0 {
            tracing::warn!(code = error.code(), refused, "{error}");
        }
        Ok(())
    }

    /// Answers a request.
    ///
    /// # Errors
    /// The connection's.
    pub async fn answer(&self, id: i64, yes: bool, answer: &serde_json::Value) -> Result<()> {
        let session = self.session().await?;
        session
            .get()?
            .execute(
                "UPDATE pgtandem.request SET state = $2, answer = $3::text::jsonb WHERE id = $1",
                &[&id, &if yes { "succeeded" } else { "failed" }, &answer.to_string()],
            )
            .await
            .doing(|| "answering a request")?;
        Ok(())
    }

    /// What became of a request so far.
    ///
    /// # Errors
    /// The connection's.
    pub async fn request(&self, id: i64) -> Result<Option<Request>> {
        let session = self.session().await?;
        let row = session
            .get()?
            .query_opt(&format!("SELECT {COLUMNS} FROM pgtandem.request WHERE id = $1"), &[&id])
            .await
            .doing(|| "reading a request")?;
        row.as_ref().map(request).transpose()
    }

    /// Takes a request back if no daemon has begun it; false if one has.
    ///
    /// # Errors
    /// The connection's.
    pub async fn withdraw(&self, id: i64) -> Result<bool> {
        let session = self.session().await?;
        let count = session
            .get()?
            .execute("UPDATE pgtandem.request SET state = 'expired' WHERE id = $1 AND state = 'waiting'", &[&id])
            .await
            .doing(|| "withdrawing a request")?;
        Ok(count == 1)
    }

    /// Requests that a daemon had begun when it ended are answered by the next start.
    ///
    /// # Errors
    /// The connection's.
    pub async fn answer_running(&self, yes: bool, answer: &serde_json::Value) -> Result<()> {
        let session = self.session().await?;
        session
            .get()?
            .execute(
                "UPDATE pgtandem.request SET state = $2, answer = $3::text::jsonb WHERE move = $1 AND state = 'running'",
                &[&self.name.as_str(), &if yes { "succeeded" } else { "failed" }, &answer.to_string()],
            )
            .await
            .doing(|| "answering old requests")?;
        Ok(())
    }
}
