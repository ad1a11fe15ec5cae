//! What every check looks with: a session on each side, who we are there, and what is being moved.

use std::collections::HashMap;

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Row};

use crate::config::Config;
use crate::error::{Doing, Error, Result};
use crate::postgres::catalog::Member;
use crate::postgres::{QualifiedName, Side};

/// A check never holds a lock for long, never waits long for one, and never leaves a transaction behind.
/// Less than deadlock_timeout: an autovacuum in our way is not cancelled.
pub(super) const CAREFUL_SETTINGS: &str = "
    SET lock_timeout = '500ms';
    SET statement_timeout = '60s';
    SET idle_in_transaction_session_timeout = '60s';";

/// Who and what is at the other end of a session.
const FACTS: &str = r"
    SELECT pg_catalog.current_setting('server_version_num')::int4,
           pg_catalog.current_setting('server_version'),
           current_user::text,
           pg_catalog.pg_is_in_recovery(),
           pg_catalog.current_database()::text,
           r.rolsuper
    FROM pg_catalog.pg_roles r WHERE r.rolname = current_user";

/// One side, as the checks see it.
pub(super) struct Place<'a> {
    pub(super) side: Side,
    pub(super) client: &'a Client,
    pub(super) facts: Facts,
}

/// What many checks need to know.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// `server_version_num`: 150004 for 15.4.
    pub(super) version_num: i32,
    pub(super) version: String,
    pub(super) user: String,
    pub(super) in_recovery: bool,
    pub(super) database: String,
    /// For the wording of a fix only: what the role may do is tried or asked.
    pub(super) superuser: bool,
}

impl Facts {
    /// 15 for 15.4.
    pub(super) fn major(&self) -> i32 {
        self.version_num / 10_000
    }
}

/// Both sides and the move.
pub(super) struct Look<'a> {
    pub(super) config: &'a Config,
    pub(super) source: Place<'a>,
    pub(super) target: Place<'a>,
    /// The state in the target says that this move has begun.
    pub(super) begun: bool,
    /// The tables of the source.
    pub(super) tables: HashMap<QualifiedName, Member>,
}

impl Look<'_> {
    /// Both sides, for what is asked of each.
    pub(super) fn places(&self) -> [&Place<'_>; 2] {
        [&self.source, &self.target]
    }

    /// Whether a table, or another relation of this name, is part of the move.
    pub(super) fn travels(&self, name: &QualifiedName) -> bool {
        match self.tables.get(name) {
            Some(table) => table.travels,
            None => self.config.scope.contains(name, &[]),
        }
    }

    /// The rows whose first two columns name a table of the move, or another relation in its scope.
    pub(super) fn in_scope(&self, rows: Vec<Row>) -> Result<Vec<(QualifiedName, Row)>> {
        let mut kept = Vec::with_capacity(rows.len());
        for row in rows {
            let name = QualifiedName::new(row.try_get::<_, String>(0)?, row.try_get::<_, String>(1)?);
            if self.travels(&name) {
                kept.push((name, row));
            }
        }
        Ok(kept)
    }

    /// The names alone.
    pub(super) fn names_in_scope(&self, rows: Vec<Row>) -> Result<Vec<QualifiedName>> {
        Ok(self.in_scope(rows)?.into_iter().map(|(name, _)| name).collect())
    }
}

impl<'a> Place<'a> {
    /// Asks who we are there.
    pub(super) async fn new(side: Side, client: &'a Client) -> Result<Self> {
        client.batch_execute(CAREFUL_SETTINGS).await?;
        let row = client.query_one(FACTS, &[]).await.doing(|| format!("asking the {} who we are", side.as_str()))?;
        let facts = Facts {
            version_num: row.try_get(0)?,
            version: row.try_get(1)?,
            user: row.try_get(2)?,
            in_recovery: row.try_get(3)?,
            database: row.try_get(4)?,
            superuser: row.try_get(5)?,
        };
        Ok(Self { side, client, facts })
    }

    /// A setting, or `None` where this server does not know it.
    pub(super) async fn setting(&self, name: &str) -> Result<Option<String>> {
        Ok(self.client.query_one("SELECT pg_catalog.current_setting($1, true)", &[&name]).await?.try_get(0)?)
    }

    /// A whole number in the setting's base unit (`pg_settings.setting`), or `None` where it is not known.
    pub(super) async fn number(&self, name: &str) -> Result<Option<i64>> {
        let row =
            self.client.query_opt("SELECT setting::int8 FROM pg_catalog.pg_settings WHERE name = $1", &[&name]).await?;
        row.map(|row| row.try_get(0)).transpose().map_err(Error::from)
    }

    /// One whole number.
    pub(super) async fn count(&self, sql: &str) -> Result<i64> {
        Ok(self.client.query_one(sql, &[]).await?.try_get(0)?)
    }

    /// The first column of every row.
    pub(super) async fn list(&self, sql: &str) -> Result<Vec<String>> {
        let rows = self.client.query(sql, &[]).await?;
        rows.iter().map(|row| row.try_get(0).map_err(Error::from)).collect()
    }

    /// Does something inside a transaction that is rolled back: whether we may, without a trace.
    ///
    /// Whatever happened, the transaction is over afterwards.
    pub(super) async fn attempt(&self, sql: &str) -> Result<Attempt> {
        self.client.batch_execute("BEGIN").await?;
        let outcome = self.client.batch_execute(sql).await;
        self.client.batch_execute("ROLLBACK").await?;
        match outcome {
            Ok(()) => Ok(Attempt::Allowed),
            Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
                Ok(Attempt::Refused(Error::from(error).to_string()))
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// What came of [`Place::attempt`].
pub(super) enum Attempt {
    /// It would work.
    Allowed,
    /// The server's words.
    Refused(String),
}
