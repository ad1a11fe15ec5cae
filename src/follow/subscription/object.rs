//! The subscription in the target's catalog: made, started, stopped, removed.
//!
//! Owns every statement about it. Each one that matters is fenced by the daemon's epoch. The connection string holds a
//! password, so no statement of ours has it in its text or its parameters ([`quiet`]): it is put together inside the server, where an
//! error's words are repeated without the statement that they came from.

use std::time::{Duration, Instant};

use super::quiet::{self, HANDED_OVER};
use crate::config::Config;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::passfile;
use crate::postgres::{Lsn, Server, Session, quote_identifier, quote_literal};
use crate::state::{fence_sql, only_the_leader, progress_sql};

/// How long a worker that was told to end may take.
const ENDING: Duration = Duration::from_secs(20);

/// `$1`: the subscription. Asked by every move, so by roles as well that on 13 may not read its oid; that one of the same name
/// in another database may seem to be this one does no harm.
const FIND: &str = "
    SELECT s.subenabled,
           EXISTS (SELECT FROM pg_catalog.pg_stat_subscription w WHERE w.subname = s.subname AND w.pid IS NOT NULL)
    FROM pg_catalog.pg_subscription s
    WHERE s.subname = $1
      AND s.subdbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())";

/// `$1`: the subscription. Ends its workers; there are none left once it returns no row. A worker registers itself before
/// it reads whether the subscription is enabled, so one that is not seen here will read what was committed before.
const END_WORKERS: &str = "
    SELECT pg_catalog.pg_terminate_backend(w.pid)
    FROM pg_catalog.pg_stat_subscription w JOIN pg_catalog.pg_subscription s ON s.oid = w.subid
    WHERE s.subname = $1 AND w.pid IS NOT NULL
      AND s.subdbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())";

/// The subscription of a move.
pub(super) struct Subscription<'a> {
    target: &'a Server,
    move_name: &'a str,
    name: String,
}

/// Whether the target's server was seen to connect to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// It does.
    Yes,
    /// It was not tried, for a warning on the way would be logged with the password.
    Untried,
}

/// What the catalog and the views say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub enabled: bool,
    /// A worker runs.
    pub working: bool,
}

impl<'a> Subscription<'a> {
    /// It has the name of the move's slot.
    pub(super) fn new(target: &'a Server, move_name: &'a crate::config::MoveName) -> Self {
        Self { target, move_name: move_name.as_str(), name: move_name.slot() }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) async fn session(&self) -> Result<Session> {
        self.target.connect("subscription").await
    }

    pub(super) async fn find(&self, session: &Session) -> Result<Option<Found>> {
        let row = session.query_opt(FIND, &[&self.name]).await.doing(|| self.doing("looking for"))?;
        row.map(|row| Ok(Found { enabled: row.try_get(0)?, working: row.try_get(1)? })).transpose()
    }

    /// Makes it, not enabled. The server connects to the source for this.
    pub(super) async fn create(&self, session: &Session, connection: &str, epoch: i64) -> Result<()> {
        let version = version(session).await?;
        let mut options = format!(
            "create_slot = false, slot_name = {}, copy_data = false, enabled = false",
            quote_identifier(&self.name)
        );
        if version >= 140_000 {
            options.push_str(", streaming = off");
        }
        if version >= 160_000 {
            // With the rights that copied the rows, as the other engine applies, and as 15 does.
            options.push_str(", run_as_owner = true");
        }
        let create = format!(
            "format('CREATE SUBSCRIPTION %I CONNECTION %L PUBLICATION %I, %I WITH (%s)', {name},
                    {HANDED_OVER}, {name}, {inserts}, {options})",
            name = quote_literal(&self.name),
            inserts = quote_literal(&format!("{}_inserts", self.name)),
            options = quote_literal(&options),
        );
        let fence = fence_sql(self.move_name, epoch);
        self.with_connection(session, connection, &create, &format!("{fence}; COMMIT"))
            .await
            .map_err(|error| self.explain(error))
            .doing(|| self.doing("making"))
    }

    /// Has the server connect to the source, in a transaction that is rolled back. It asks there for a publication that does
    /// not exist: a complaint about that is a success, and a warning about it would go into the log with its statement.
    pub(super) async fn try_connection(&self, session: &Session, connection: &str) -> Result<Reached> {
        let tried = async {
            if quiet::begin(session).await?.context_is_told {
                return Ok(Reached::Untried);
            }
            session.batch_execute("SET LOCAL statement_timeout = '60s'").await?;
            quiet::hand_over(session, connection).await?;
            let create = format!(
                "format('CREATE SUBSCRIPTION %I CONNECTION %L PUBLICATION {NO_PUBLICATION} WITH
                         (create_slot = false, slot_name = pgtandem_probe, copy_data = false, enabled = false)',
                        'pgtandem_probe', {HANDED_OVER})"
            );
            session.batch_execute(&without_statement(&create)).await?;
            Ok(Reached::Yes)
        };
        let tried: Result<Reached> = tried.await;
        session.batch_execute("ROLLBACK").await?;
        match tried {
            Err(error) if error.to_string().contains(NO_PUBLICATION) => Ok(Reached::Yes),
            Err(error) => Err(self.explain(error)),
            Ok(reached) => Ok(reached),
        }
    }

    /// Brings the connection string up to date, and if it stands still, sets it going behind `pgtandem.progress`.
    ///
    /// The origin, its durable memory of where it is, is brought up to progress in the same transaction. Progress is never
    /// beyond what the target holds, so this only ever tells the worker what it may have lost or never known.
    pub(super) async fn start(&self, session: &Session, connection: &str, epoch: i64, enabled: bool) -> Result<()> {
        let alter =
            format!("format('ALTER SUBSCRIPTION %I CONNECTION %L', {}, {HANDED_OVER})", quote_literal(&self.name));
        let fence = fence_sql(self.move_name, epoch);
        let enable = if enabled {
            String::new()
        } else {
            format!(
                "DO $$ DECLARE
                     origin text := {origin};
                     held pg_lsn := (SELECT lsn FROM pgtandem.progress WHERE move = {move_name});
                 BEGIN
                     IF COALESCE(pg_catalog.pg_replication_origin_progress(origin, false), '0/0') < held THEN
                         PERFORM pg_catalog.pg_replication_origin_advance(origin, held);
                     END IF;
                 END $$;
                 ALTER SUBSCRIPTION {name} ENABLE;",
                origin = self.origin(),
                move_name = quote_literal(self.move_name),
                name = quote_identifier(&self.name),
            )
        };
        self.with_connection(session, connection, &alter, &format!("{fence}; {enable} COMMIT"))
            .await
            .map_err(|error| self.explain(error))
            .doing(|| self.doing("starting"))
    }

    /// Executes what the SQL expression `statement` comes to, and `rest`, in one transaction.
    async fn with_connection(&self, session: &Session, connection: &str, statement: &str, rest: &str) -> Result<()> {
        let work = async {
            quiet::begin(session).await?;
            quiet::hand_over(session, connection).await?;
            session.batch_execute(&format!("{}; {rest}", without_statement(statement))).await.map_err(Error::from)
        };
        let worked = work.await.map_err(only_the_leader);
        if worked.is_err() {
            // An error of this would only say that the session is gone, and its transaction with it.
            drop(session.batch_execute("ROLLBACK").await);
        }
        worked
    }

    /// Disables it and returns once no worker of it is left. `fence` goes into the transaction.
    pub(super) async fn stop(&self, session: &Session, epoch: Option<i64>) -> Result<()> {
        let fence = epoch.map(|epoch| format!("{};", fence_sql(self.move_name, epoch))).unwrap_or_default();
        let disabled = session
            .batch_execute(&format!(
                "BEGIN; {fence} ALTER SUBSCRIPTION {} DISABLE; COMMIT",
                quote_identifier(&self.name)
            ))
            .await;
        if let Err(error) = disabled {
            drop(session.batch_execute("ROLLBACK").await);
            return Err(only_the_leader(error.into()).doing(self.doing("stopping")));
        }
        let began = Instant::now();
        loop {
            let ended = session.query(END_WORKERS, &[&self.name]).await.doing(|| self.doing("stopping"))?;
            if ended.is_empty() {
                return Ok(());
            }
            if began.elapsed() > ENDING {
                return Err(Error::new(Class::Retry, "worker_stays", "a worker of the subscription does not end")
                    .hint("the target's log says what it waits for"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Writes down where a stopped one stands: the position that it remembers, or the one that the source was told,
    /// whichever is further.
    pub(super) async fn write_position(&self, session: &Session, epoch: i64, confirmed: Option<Lsn>) -> Result<()> {
        let position = format!(
            "COALESCE(pg_catalog.pg_replication_origin_progress({}, true), '0/0'), '{}'",
            self.origin(),
            confirmed.unwrap_or_default()
        );
        let (fence, advance) = (fence_sql(self.move_name, epoch), progress_sql(self.move_name, &position));
        let written = session.batch_execute(&format!("BEGIN; {fence}; {advance}; COMMIT")).await;
        let written = written.map_err(|error| self.explain(only_the_leader(error.into())));
        if written.is_err() {
            drop(session.batch_execute("ROLLBACK").await);
        }
        written.doing(|| format!("asking where the subscription {} stands", self.name))
    }

    /// Removes a stopped one.
    pub(super) async fn remove(&self, session: &Session) -> Result<()> {
        session.batch_execute(&format!("BEGIN; {}; COMMIT", self.drop_sql())).await.doing(|| self.doing("removing"))
    }

    /// The slot is not the subscription's to drop.
    fn drop_sql(&self) -> String {
        let name = quote_identifier(&self.name);
        format!("ALTER SUBSCRIPTION {name} SET (slot_name = NONE); DROP SUBSCRIPTION {name}")
    }

    /// An SQL expression.
    fn origin(&self) -> String {
        format!(
            "(SELECT 'pg_' || s.oid FROM pg_catalog.pg_subscription s WHERE s.subname = {} AND s.subdbid =
                 (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))",
            quote_literal(&self.name)
        )
    }

    fn doing(&self, what: &str) -> String {
        format!("{what} the subscription {} on the target", self.name)
    }

    /// What the server's refusal means.
    fn explain(&self, error: Error) -> Error {
        let said = |code: &'static str, class: Class| {
            // Without the place in a block of ours.
            let text = error.to_string();
            let words = text.split("; PL/pgSQL function inline_code_block").next().unwrap_or(&text);
            Error::new(class, code, words.split_whitespace().collect::<Vec<_>>().join(" "))
                .sqlstate_code(error.sqlstate().unwrap_or_default())
        };
        match error.sqlstate() {
            Some("42501") => said("subscription_refused", Class::Operator).hint(RIGHTS),
            // Before 14 an unreachable source had no code of its own.
            Some("08006" | "08001") => said("subscription_unreachable", Class::Wait).hint(REACH),
            Some("XX000") if error.to_string().contains("could not connect to the publisher") => {
                said("subscription_unreachable", Class::Wait).hint(REACH)
            }
            Some("2F003") => said("subscription_password_required", Class::Operator).hint(
                "a role that is no superuser needs a password in the connection to the source, and the source must ask for \
                 it: put it into source.url_from_target, or use follow.engine = \"stream\"",
            ),
            _ => error,
        }
    }
}

const RIGHTS: &str = "follow.engine = \"subscription\" needs a superuser on the target or, from 16 on, GRANT pg_create_subscription, \
     GRANT CREATE, TEMPORARY ON DATABASE, and GRANT EXECUTE ON FUNCTION pg_replication_origin_advance(text, pg_lsn), \
     pg_replication_origin_progress(text, boolean); without them use \"stream\"";

const REACH: &str = "the target server itself connects to the source: set source.url_from_target to an address, a password and \
     certificates that work from there, and let it in by firewall and pg_hba.conf";

/// No publication is called so.
const NO_PUBLICATION: &str = "pgtandem_probe_publication";

/// Executes the statement that an SQL expression comes to; an error has its words, and not the statement's. OTHERS alone would
/// leave out a statement that is cancelled while the source does not answer.
fn without_statement(expression: &str) -> String {
    format!(
        "DO $$ DECLARE said text; code text; BEGIN
             EXECUTE {expression};
         EXCEPTION WHEN query_canceled OR OTHERS THEN
             GET STACKED DIAGNOSTICS said = MESSAGE_TEXT, code = RETURNED_SQLSTATE;
             RAISE EXCEPTION USING ERRCODE = code, MESSAGE = said;
         END $$"
    )
}

async fn version(session: &Session) -> Result<i32> {
    let row = session
        .query_one("SELECT pg_catalog.current_setting('server_version_num')::int4", &[])
        .await
        .doing(|| "asking for the target's version")?;
    Ok(row.try_get(0)?)
}

/// How the target's server reaches the source; holds a password.
pub(super) fn connection(config: &Config, source: &Server) -> String {
    let conninfo = config.source_from_target.as_ref().unwrap_or(&config.source);
    conninfo.url_for_server(&source.application_name("subscription"), passfile::resolve(conninfo).as_ref())
}
