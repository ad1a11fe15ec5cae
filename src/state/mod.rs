//! The `pgtandem` schema in the target: the only durable memory of a move.
//!
//! Owns every statement that reads or writes it. Promises that what it returns was durable when it returned, and
//! that only the daemon that holds the move ([`Leadership`]) changes it: each write of data carries the daemon's
//! epoch, and an older epoch changes nothing. Must never hold a password or the data of a row.

mod archive;
mod held_back;
mod install;
mod journal;
mod leadership;
mod progress;
mod request;
mod schema_change;
mod tables;
mod units;
mod unkeyed;
mod workers;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use tokio::sync::{Mutex, MutexGuard};

pub use held_back::{HeldBack, hold_back_sql};
pub use journal::{CutoverRecord, CutoverState, StepRecord, preparing_sql};
pub use leadership::Leadership;
pub use progress::progress_sql;
pub use request::{Request, RequestKind, RequestState};
pub use schema_change::{SchemaChange, text_digest};
pub use tables::{TableRecord, TableState, copied_sql, copying_sql, fence_sql};
pub use units::{Begun, FinishedUnit, forget_units_sql, opened_sql, unit_sql, units_at_sql};
pub use unkeyed::GivenIdentity;
pub use workers::{WorkersAhead, split_json};

use crate::config::MoveName;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::{Lsn, Server, Session, quote_literal};

/// Where a move stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Checking both sides.
    Preflight,
    /// Restoring the schema without what the rows would have to pass through.
    Schema,
    /// Copying rows, building keys and indexes.
    Copy,
    /// Following, but the target is not yet a state that the source once had, or lag never reached zero.
    Catchup,
    /// Following.
    Follow,
    /// Switching over.
    Cutover,
    /// Switched over.
    Done,
    /// Stopped by the user.
    Paused,
    /// Stopped by an error that a person must look at.
    Failed,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 9] = [
        Self::Preflight,
        Self::Schema,
        Self::Copy,
        Self::Catchup,
        Self::Follow,
        Self::Cutover,
        Self::Done,
        Self::Paused,
        Self::Failed,
    ];

    /// The word of the contract.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Schema => "schema",
            Self::Copy => "copy",
            Self::Catchup => "catchup",
            Self::Follow => "follow",
            Self::Cutover => "cutover",
            Self::Done => "done",
            Self::Paused => "paused",
            Self::Failed => "failed",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Phase {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|phase| phase.as_str() == text).ok_or_else(|| unknown_word("phase", text))
    }
}

/// A word in the state that this version does not know: written by a newer one, or by hand.
fn unknown_word(what: &str, text: &str) -> Error {
    Error::new(
        Class::Operator,
        "state_unknown_word",
        format!("the state holds the {what} {text:?}, which this version does not know"),
    )
    .hint("run the version of pgtandem that wrote the state, or start over with `pgtandem clean`")
}

fn leadership_lost() -> Error {
    Error::new(Class::Retry, "leadership_lost", "another daemon took this move")
}

/// An SQL condition: the move (a text) is held by the daemon of this epoch.
fn leads(move_name: &str, epoch: &str) -> String {
    format!("EXISTS (SELECT FROM pgtandem.progress WHERE move = {move_name} AND epoch = {epoch})")
}

/// Puts into words what [`fence_sql`] ends a transaction with.
#[must_use]
pub fn only_the_leader(error: Error) -> Error {
    if error.sqlstate() == Some("22012") { leadership_lost() } else { error }
}

/// What the state holds about the move itself.
#[derive(Clone, Debug)]
pub struct MoveRecord {
    /// Where it stands.
    pub phase: Phase,
    /// Since when, as the target's clock says, RFC 3339.
    pub phase_since: String,
    /// What the source was when the move began; see `preflight::identity`.
    pub source_identity: serde_json::Value,
    /// The slot's consistent point; `None` until the slot was made.
    pub slot_lsn: Option<Lsn>,
    /// The newest cut that any table was copied under: a reader sees a state of the source from here on.
    pub last_cut_lsn: Option<Lsn>,
    /// Whether foreign keys are restored and indexes built.
    pub constraints_done: bool,
    /// The error that stopped the daemon last, if it has not been overcome.
    pub error: Option<serde_json::Value>,
    /// What the daemon found to block the move when it looked last.
    pub blockers: Vec<serde_json::Value>,
}

/// Up to where the target holds everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Everything that committed before this position is applied.
    pub lsn: Lsn,
    /// Commit time of the last applied transaction, microseconds since 1970 of the source's clock.
    pub commit_micros: Option<i64>,
    /// Transactions applied since the beginning.
    pub transactions: u64,
    /// Changes applied since the beginning.
    pub changes: u64,
}

/// Access to the state of one move. Cheap to clone; all clones share one connection, which is renewed when lost.
#[derive(Clone)]
pub struct Store {
    target: Server,
    name: MoveName,
    session: Arc<Mutex<Option<Session>>>,
}

impl Store {
    /// Does not connect yet.
    #[must_use]
    pub fn new(target: Server, name: MoveName) -> Self {
        Self { target, name, session: Arc::default() }
    }

    /// The server that it lives on.
    #[must_use]
    pub fn target(&self) -> &Server {
        &self.target
    }

    /// The move.
    #[must_use]
    pub fn name(&self) -> &MoveName {
        &self.name
    }

    /// A live session on the target; the guard keeps others waiting, so it is held for one statement or
    /// transaction only.
    async fn session(&self) -> Result<SessionGuard<'_>> {
        let mut slot = self.session.lock().await;
        if slot.as_ref().is_none_or(|session| session.is_closed()) {
            *slot = Some(self.target.connect("state").await.doing(|| "opening the state")?);
        }
        Ok(SessionGuard(slot))
    }

    /// Whether the schema `pgtandem` is there at all.
    ///
    /// # Errors
    /// The connection's.
    pub async fn exists(&self) -> Result<bool> {
        let session = self.session().await?;
        let row = session
            .get()?
            .query_one("SELECT pg_catalog.to_regclass('pgtandem.move') IS NOT NULL", &[])
            .await
            .doing(|| "looking for the state")?;
        Ok(row.try_get(0)?)
    }

    /// The move, or `None` if this target knows nothing of it.
    ///
    /// # Errors
    /// The connection's; class operator for a state of another version.
    pub async fn find(&self) -> Result<Option<MoveRecord>> {
        if !self.exists().await? {
            return Ok(None);
        }
        let session = self.session().await?;
        let row = session
            .get()?
            .query_opt(
                r#"SELECT phase, to_char(phase_since AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
                          source_identity::text, slot_lsn::text, last_cut_lsn::text, constraints_done, error::text,
                          ARRAY(SELECT b::text FROM pg_catalog.jsonb_array_elements(blockers) b)
                   FROM pgtandem.move WHERE name = $1"#,
                &[&self.name.as_str()],
            )
            .await
            .doing(|| "reading the state of the move")?;
        row.map(|row| {
            Ok(MoveRecord {
                phase: row.try_get::<_, String>(0)?.parse()?,
                phase_since: row.try_get(1)?,
                source_identity: json(&row.try_get::<_, String>(2)?)?,
                slot_lsn: lsn(row.try_get(3)?)?,
                last_cut_lsn: lsn(row.try_get(4)?)?,
                constraints_done: row.try_get(5)?,
                error: row.try_get::<_, Option<String>>(6)?.as_deref().map(json).transpose()?,
                blockers: row.try_get::<_, Vec<String>>(7)?.iter().map(|text| json(text)).collect::<Result<_>>()?,
            })
        })
        .transpose()
    }

    /// Writes the move down for the first time, in phase `schema`. Changes nothing if it is there already.
    ///
    /// # Errors
    /// The connection's.
    pub async fn begin(&self, source_identity: &serde_json::Value) -> Result<()> {
        self.execute(&format!(
            "INSERT INTO pgtandem.move (name, phase, source_identity) VALUES ({name}, 'schema', {identity})
             ON CONFLICT (name) DO UPDATE SET phase = 'schema', phase_since = now(), source_identity = excluded.source_identity
             WHERE move.phase = 'preflight'",
            name = quote_literal(self.name.as_str()),
            identity = quote_literal(&source_identity.to_string()),
        ))
        .await
        .doing(|| "beginning the move")
    }

    /// Enters a phase and forgets the last error.
    ///
    /// # Errors
    /// The connection's.
    pub async fn set_phase(&self, phase: Phase) -> Result<()> {
        self.update(&format!(
            "phase = {phase}, error = NULL, phase_since = CASE WHEN phase = {phase} THEN phase_since ELSE now() END",
            phase = quote_literal(phase.as_str())
        ))
        .await
    }

    /// Keeps what stopped the daemon, for `status`. The phase stays, so that the next start goes on from it.
    ///
    /// # Errors
    /// The connection's.
    pub async fn set_error(&self, error: Option<&serde_json::Value>) -> Result<()> {
        let value = error.map_or_else(|| "NULL".to_owned(), |error| quote_literal(&error.to_string()));
        self.update(&format!("error = {value}")).await
    }

    /// Keeps what blocks the move, for `status`.
    ///
    /// # Errors
    /// The connection's.
    pub async fn set_blockers(&self, blockers: &[serde_json::Value]) -> Result<()> {
        let value = serde_json::Value::from(blockers.to_vec());
        self.update(&format!("blockers = {}", quote_literal(&value.to_string()))).await
    }

    /// The slot was made and the first cut is known; progress begins at it.
    ///
    /// # Errors
    /// The connection's.
    pub async fn record_slot(&self, consistent_point: Lsn) -> Result<()> {
        self.execute(&format!(
            "BEGIN;
             UPDATE pgtandem.move SET slot_lsn = '{consistent_point}', last_cut_lsn = '{consistent_point}' WHERE name = {name};
             UPDATE pgtandem.progress SET lsn = '{consistent_point}' WHERE move = {name} AND lsn < '{consistent_point}';
             COMMIT",
            name = quote_literal(self.name.as_str())
        ))
        .await
        .doing(|| "recording the slot")
    }

    /// Tables are about to be copied under this cut.
    ///
    /// # Errors
    /// The connection's.
    pub async fn record_cut(&self, lsn: Lsn) -> Result<()> {
        self.update(&format!("last_cut_lsn = GREATEST(last_cut_lsn, '{lsn}')")).await
    }

    /// Keys, indexes, foreign keys and statistics are in place.
    ///
    /// # Errors
    /// The connection's.
    pub async fn record_constraints_done(&self) -> Result<()> {
        self.update("constraints_done = true").await
    }

    /// Up to where the target holds everything.
    ///
    /// # Errors
    /// The connection's.
    pub async fn progress(&self) -> Result<Progress> {
        let session = self.session().await?;
        let row = session
            .get()?
            .query_opt(
                "SELECT lsn::text, (extract(epoch FROM commit_time) * 1000000)::int8, transactions, changes
                 FROM pgtandem.progress WHERE move = $1",
                &[&self.name.as_str()],
            )
            .await
            .doing(|| "reading progress")?;
        let Some(row) = row else { return Ok(Progress::default()) };
        Ok(Progress {
            lsn: lsn(row.try_get(0)?)?.unwrap_or_default(),
            commit_micros: row.try_get(1)?,
            transactions: u64::try_from(row.try_get::<_, i64>(2)?).unwrap_or(0),
            changes: u64::try_from(row.try_get::<_, i64>(3)?).unwrap_or(0),
        })
    }

    /// The same, but what it returns is not lost any more if the target crashes: the commit of this waits for the target's disk, and what
    /// it reads was committed before. The applier's own commits do not always wait.
    ///
    /// # Errors
    /// The connection's.
    pub async fn durable_progress(&self) -> Result<Progress> {
        let sql = "UPDATE pgtandem.progress SET lsn = lsn WHERE move = $1";
        let session = self.session().await?;
        session.get()?.execute(sql, &[&self.name.as_str()]).await.doing(|| "making progress durable")?;
        drop(session);
        self.progress().await
    }

    /// Removes every row of this move; with the last one the tables, and the schema if nothing else is in it: the target
    /// may be the source of another move, whose fence lives there as well.
    ///
    /// # Errors
    /// The connection's.
    pub async fn remove(&self) -> Result<()> {
        self.execute(&format!(
            "BEGIN;
             DELETE FROM pgtandem.move WHERE name = {name};
             DO $$ BEGIN
                 IF NOT EXISTS (SELECT FROM pgtandem.move) THEN
                     DROP TABLE IF EXISTS {tables};
                     IF NOT EXISTS (SELECT FROM pg_catalog.pg_proc WHERE pronamespace = 'pgtandem'::regnamespace)
                        AND NOT EXISTS (SELECT FROM pg_catalog.pg_class WHERE relnamespace = 'pgtandem'::regnamespace) THEN
                         DROP SCHEMA pgtandem;
                     END IF;
                 END IF;
             END $$;
             COMMIT",
            name = quote_literal(self.name.as_str()),
            tables = install::TABLES.map(|table| format!("pgtandem.{table}")).join(", ")
        ))
        .await
        .doing(|| "removing the state of the move")
    }

    async fn update(&self, assignments: &str) -> Result<()> {
        self.execute(&format!(
            "UPDATE pgtandem.move SET {assignments} WHERE name = {}",
            quote_literal(self.name.as_str())
        ))
        .await
        .doing(|| "writing the state of the move")
    }

    /// One simple-protocol batch. On an error inside a transaction block the session is thrown away, so that
    /// the next user never finds itself in an aborted transaction.
    async fn execute(&self, sql: &str) -> Result<()> {
        let mut session = self.session().await?;
        let outcome = session.get()?.batch_execute(sql).await;
        if outcome.is_err() {
            *session.0 = None;
        }
        Ok(outcome?)
    }
}

struct SessionGuard<'a>(MutexGuard<'a, Option<Session>>);

impl SessionGuard<'_> {
    fn get(&self) -> Result<&Session> {
        self.0.as_ref().ok_or_else(|| Error::bug("the state's session went away while it was held"))
    }

    fn get_mut(&mut self) -> Result<&mut Session> {
        self.0.as_mut().ok_or_else(|| Error::bug("the state's session went away while it was held"))
    }
}

fn lsn(text: Option<String>) -> Result<Option<Lsn>> {
    text.map(|text| text.parse().map_err(|e: crate::postgres::lsn::InvalidLsn| Error::bug(e.to_string()))).transpose()
}

fn json(text: &str) -> Result<serde_json::Value> {
    serde_json::from_str(text).map_err(|e| unknown_word("document", text).because(e))
}
