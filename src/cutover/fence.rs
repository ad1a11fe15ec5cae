//! The fence: what stops writes on the source, certainly and for no longer than it must.
//!
//! It has two stages.
//!
//! 1. **Closed**: one transaction holds `SHARE ROW EXCLUSIVE` on every table of the move. Writers wait, readers do not.
//!    It lifts by itself whatever happens to us: the server rolls the transaction back when the connection ends.
//! 2. **Sealed**: that transaction also makes the trigger function of every table refuse writes, and commits. Waiting
//!    writers wake up, look at the function again, and get an error that says where the database went. Nobody slips
//!    through between the two, because the function changes while the locks are held.
//!
//! The triggers exist before the fence closes, with a function that does nothing, so that sealing is one statement
//! however many tables there are. They are statement-level and `ENABLE ALWAYS`: a session that sets
//! `session_replication_role` or `default_transaction_read_only` for itself is refused like any other. Statement triggers
//! fire for the table that a statement names, so partitioned tables have them as well as their partitions.
//!
//! The seal carries the number of its cutover, and the statement that seals, or lifts, is let through by it: an event trigger of
//! the source may write to a table of the move in answer to it.
//!
//! Lifting a sealed fence is again one statement: the function does nothing. It takes no lock on any table. Before it, every
//! session that may still be about to seal is ended, so that nothing that was given up on takes hold afterwards; and the
//! seal of a later cutover is left alone, for it is not ours.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::tables;
use crate::config::Scope;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::{QualifiedName, Server, Session, quote_identifier, quote_literal};

/// How long one attempt waits for the locks while it holds others: writers queue behind us meanwhile. The first attempts
/// give way soon; the later ones outlast `deadlock_timeout` (1 s), after which an autovacuum worker gives way to us.
const PATIENCE: [Duration; 4] =
    [Duration::from_millis(300), Duration::from_millis(600), Duration::from_millis(1500), Duration::from_millis(2500)];

/// The server ends the fence's session so much after the deadline, if we did not.
const AFTER_DEADLINE: Duration = Duration::from_secs(2);

/// How long making a trigger may keep a table's writers waiting.
const TRIGGER_LOCK: Duration = Duration::from_millis(500);

/// The names that a fence has on the source.
pub(super) struct Names {
    function_name: String,
    trigger_name: String,
}

impl Names {
    pub(super) fn of(move_name: &str) -> Self {
        Self { function_name: format!("fence_{move_name}"), trigger_name: format!("pgtandem_{move_name}_fence") }
    }

    pub(super) fn trigger_name(&self) -> &str {
        &self.trigger_name
    }

    fn function(&self) -> String {
        format!("pgtandem.{}", quote_identifier(&self.function_name))
    }

    fn open_function(&self) -> String {
        self.replace_function("RETURN NULL;")
    }

    /// 25006 is `read_only_sql_transaction`, which connection pools and frameworks know as "reconnect".
    fn refusing_function(&self, move_name: &str, cutover: i64) -> String {
        let message = format!("this database has moved to another server (pgtandem move {move_name})");
        self.replace_function(&format!(
            "-- cutover {cutover}
             IF pg_catalog.current_setting('pgtandem.fence', true) IS DISTINCT FROM 'pass' THEN
                 RAISE EXCEPTION USING ERRCODE = 'read_only_sql_transaction', MESSAGE = {},
                 HINT = 'Reconnect with the address of the new server.';
             END IF;
             RETURN NULL;",
            quote_literal(&message)
        ))
    }

    fn replace_function(&self, body: &str) -> String {
        format!(
            "CREATE OR REPLACE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql SET search_path = '' AS
             $fence$ BEGIN {body} END $fence$",
            self.function()
        )
    }
}

/// Makes the function and the triggers that sealing will need. Each table is locked for an instant only.
pub(super) async fn prepare(source: &Server, names: &Names, tables: &[QualifiedName], deadline: Instant) -> Result<()> {
    let session = source.connect("fence").await?;
    // Whoever may write must also be able to call the function, or its refusal would read "permission denied".
    session
        .batch_execute(&format!(
            "SET client_min_messages = error;
             CREATE SCHEMA IF NOT EXISTS pgtandem;
             GRANT USAGE ON SCHEMA pgtandem TO PUBLIC;
             {}; ALTER FUNCTION {}() OWNER TO CURRENT_USER",
            names.open_function(),
            names.function()
        ))
        .await
        .doing(|| "preparing the fence: the schema pgtandem on the source")?;
    let fenced = already_fenced(&session, names).await?;
    for table in tables.iter().filter(|table| !fenced.contains(table)) {
        prepare_table(&session, names, table, deadline)
            .await
            .doing(|| format!("preparing the fence on table {}", table.plain()))?;
    }
    Ok(())
}

async fn prepare_table(session: &Session, names: &Names, table: &QualifiedName, deadline: Instant) -> Result<()> {
    let trigger = quote_identifier(&names.trigger_name);
    loop {
        let made = session
            .batch_execute(&format!(
                "BEGIN; SET LOCAL lock_timeout = '{patience}ms';
                 DROP TRIGGER IF EXISTS {trigger} ON {table};
                 CREATE TRIGGER {trigger} BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON {table}
                     FOR EACH STATEMENT EXECUTE FUNCTION {function}();
                 ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger};
                 COMMIT",
                patience = TRIGGER_LOCK.as_millis(),
                function = names.function(),
            ))
            .await;
        let Err(error) = made else { return Ok(()) };
        let error = Error::from(error);
        session.batch_execute("ROLLBACK").await.doing(|| "giving the lock back")?;
        if !matches!(error.code(), "lock_not_available" | "deadlock_detected") {
            return Err(error);
        }
        if Instant::now() + TRIGGER_LOCK >= deadline {
            return Err(not_in_time(session).await);
        }
        tracing::info!(table = %table.plain(), "the table is locked; trying again to prepare its fence");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn already_fenced(session: &Session, names: &Names) -> Result<HashSet<QualifiedName>> {
    let rows = session
        .query(
            "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_trigger t
             JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE t.tgname = $1 AND t.tgenabled = 'A'",
            &[&names.trigger_name],
        )
        .await
        .doing(|| "looking for the fence's triggers")?;
    rows.iter().map(|row| Ok(QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? })).collect()
}

/// Lets the transaction at hand through a sealed fence.
const PASS: &str = "SET LOCAL pgtandem.fence = 'pass'";

/// How long the server may take to give the locks back before we let it find out by itself.
const OPENING: Duration = Duration::from_secs(1);

/// How long the end of sessions that may still seal is waited for.
const ENDING: Duration = Duration::from_secs(5);

/// The server gives this lock back at the end of a statement, so who made one before and has not committed is not waited for.
/// Whoever makes or removes a large object, or changes its rights, writes to this. The content is elsewhere, but a lock there would
/// keep readers waiting, for they lock it like writers.
const LARGE_OBJECTS: &str = "pg_catalog.pg_largeobject_metadata";

/// A closed fence; drops open.
pub(super) struct Fence {
    session: Session,
    /// Since when writers may have waited.
    pub closed_at: Instant,
}

/// Closes the fence: gets every lock in one statement, or gives all of them back and tries again.
///
/// `objects`: large objects as well. No trigger can refuse writes to them, so for them it opens when it is sealed.
pub(super) async fn close(
    source: &Server,
    tables: &[QualifiedName],
    objects: bool,
    deadline: Instant,
) -> Result<Fence> {
    let session = source.connect("fence").await?;
    limit(&session, deadline).await?;
    let mut list: Vec<String> = tables.iter().map(|table| format!("ONLY {table}")).collect();
    if objects {
        list.push(LARGE_OBJECTS.to_owned());
    }
    let lock = match list.join(", ") {
        list if list.is_empty() => list,
        list => format!("LOCK TABLE {list} IN SHARE ROW EXCLUSIVE MODE"),
    };
    for attempt in 0.. {
        let patience = PATIENCE.get(attempt).or(PATIENCE.last()).copied().unwrap_or_default();
        let patience = patience.min(deadline.saturating_duration_since(Instant::now()));
        if patience.is_zero() {
            break;
        }
        let closed_at = Instant::now();
        // `lock_timeout` would count for each table anew; and should we vanish, the server counts from here.
        let (patience, rest) = (patience.as_millis().max(1), deadline.saturating_duration_since(closed_at));
        let locked = session
            .batch_execute(&format!(
                "BEGIN; SET LOCAL statement_timeout = {patience};
                 SET LOCAL idle_in_transaction_session_timeout = {};
                 {lock}; SET LOCAL statement_timeout = 0",
                (rest + AFTER_DEADLINE).as_millis()
            ))
            .await;
        let Err(error) = locked else { return Ok(Fence { session, closed_at }) };
        let error = Error::from(error);
        session.batch_execute("ROLLBACK").await.doing(|| "giving the locks of the fence back")?;
        if !matches!(error.code(), "lock_not_available" | "deadlock_detected" | "query_canceled") {
            return Err(error.doing("closing the fence"));
        }
        tracing::info!(attempt, holders = %holders(&session).await, "the fence is not closed yet; writers are let through");
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    Err(not_in_time(&session).await)
}

async fn not_in_time(session: &Session) -> Error {
    let message = format!("the tables could not be locked in time; locks are held by {}", holders(session).await);
    Error::new(Class::No, "fence_timeout", message)
        .hint("end these transactions or wait for them, or raise the timeout; writes on the source go on")
}

/// What the server itself holds the fence's session to, should we vanish without a word: a frozen machine, a cut line.
async fn limit(session: &Session, deadline: Instant) -> Result<()> {
    let millis = (deadline.saturating_duration_since(Instant::now()) + AFTER_DEADLINE).as_millis();
    session
        .batch_execute(&format!(
            "SELECT pg_catalog.set_config(name, '{millis}', false) FROM pg_catalog.pg_settings
                 WHERE name = 'transaction_timeout';
             SET tcp_keepalives_idle = 2; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3"
        ))
        .await
        .doing(|| "limiting the fence")
}

/// `$1`: nothing. Locks that keep the fence open, with those who hold them.
const HOLDERS: &str = r"
    SELECT DISTINCT
        CASE WHEN l.pid IS NULL THEN 'prepared transaction ' || COALESCE(pg_catalog.quote_literal(p.gid), '?')
             ELSE 'pid ' || l.pid || ' (' || COALESCE(a.usename::text, '?') || ', ' || COALESCE(a.application_name, '')
                  || ', ' || COALESCE(a.state, '?') || ', transaction open for '
                  || COALESCE(pg_catalog.date_trunc('seconds', pg_catalog.now() - a.xact_start)::text, '?') || ')' END
    FROM pg_catalog.pg_locks l
    LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
    LEFT JOIN pg_catalog.pg_prepared_xacts p ON l.virtualtransaction = '-1/' || p.transaction::text
    WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()
      AND l.mode NOT IN ('AccessShareLock', 'RowShareLock')
      AND (l.relation >= 16384 OR l.relation = 'pg_catalog.pg_largeobject_metadata'::pg_catalog.regclass)
      AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
    LIMIT 10";

/// Who holds locks that keep the fence open, as far as we may see.
async fn holders(session: &Session) -> String {
    match session.query(HOLDERS, &[]).await {
        Ok(rows) if rows.is_empty() => "nobody any more".to_owned(),
        Ok(rows) => {
            let named = rows.iter().filter_map(|row| row.try_get::<_, Option<String>>(0).ok().flatten());
            named.collect::<Vec<_>>().join(", ")
        }
        Err(error) => format!("sessions that could not be listed ({})", Error::from(error)),
    }
}

impl Fence {
    /// Refuses a table in scope that the cutover was not prepared for, or that is not behind the fence.
    pub(super) async fn covers_all(&self, names: &Names, scope: &Scope, listed: &[QualifiedName]) -> Result<()> {
        tables::all_listed(&self.session, scope, listed).await?;
        tables::all_covered(&self.session, names, listed).await
    }

    /// Refuses writes from now on, and lets the waiting writers have their refusal. After an error nobody knows
    /// whether it took hold; [`is_sealed`] tells.
    pub(super) async fn seal(self, names: &Names, move_name: &str, cutover: i64) -> Result<()> {
        self.session
            .batch_execute(&format!("{PASS}; {}; COMMIT", names.refusing_function(move_name, cutover)))
            .await
            .doing(|| "sealing the fence")
    }

    /// Lets the writers go on.
    pub(super) async fn open(self) {
        if !matches!(tokio::time::timeout(OPENING, self.session.batch_execute("ROLLBACK")).await, Ok(Ok(()))) {
            tracing::warn!("the fence's connection does not answer; its locks go with it");
        }
    }
}

/// Whether writes on the source are refused.
pub(super) async fn is_sealed(source: &Server, move_name: &str) -> Result<bool> {
    let session = source.connect("fence").await?;
    Ok(sealed_by(&session, &Names::of(move_name)).await?.is_some_and(|cutover| cutover > 0))
}

/// Lets writes on the source happen again. Does nothing if no fence was ever prepared, or if a later cutover than this one
/// sealed it.
pub(super) async fn lift(source: &Server, move_name: &str, cutover: i64) -> Result<()> {
    let names = Names::of(move_name);
    let session = source.connect("lift").await?;
    end_sealers(&session, &source.application_name("fence")).await?;
    let Some(sealed_by) = sealed_by(&session, &names).await? else { return Ok(()) };
    if sealed_by > cutover {
        tracing::warn!(sealed_by, cutover, "a later cutover sealed the fence; it stays");
        return Ok(());
    }
    session
        .batch_execute(&format!("BEGIN; {PASS}; {}; COMMIT", names.open_function()))
        .await
        .doing(|| "lifting the fence on the source")
}

/// Ends the sessions of the fence, of this daemon or an earlier one: what they were sent and did not execute yet must not be
/// executed any more. Returns once they are gone.
async fn end_sealers(session: &Session, application_name: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        if session.end_others(application_name).await.doing(|| "ending the sessions of the fence")? == 0 {
            return Ok(());
        }
        if began.elapsed() > ENDING {
            return Err(Error::new(Class::Retry, "fence_session_stays", "a session of the fence does not end"));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The cutover that sealed the fence, 0 if it is open; `None` if there is none.
async fn sealed_by(session: &Session, names: &Names) -> Result<Option<i64>> {
    let row = session
        .query_opt(
            "SELECT COALESCE(substring(p.prosrc FROM '-- cutover ([0-9]+)')::int8, 0)
             FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
             WHERE n.nspname = 'pgtandem' AND p.proname = $1",
            &[&names.function_name],
        )
        .await
        .doing(|| "looking for the fence")?;
    row.map(|row| row.try_get(0).map_err(Error::from)).transpose()
}

/// Removes triggers, function and, if nothing else is in it, the schema. Writes are let in again.
///
/// # Errors
/// The connection's, or a table stayed locked.
pub async fn remove(source: &Server, move_name: &str) -> Result<()> {
    let names = Names::of(move_name);
    let session = source.connect("fence").await?;
    if sealed_by(&session, &names).await?.is_some() {
        session
            .batch_execute(&format!(
                "BEGIN; {PASS}; {}; COMMIT;
                 SET lock_timeout = '10s'; SET client_min_messages = error; DROP FUNCTION {}() CASCADE",
                names.open_function(),
                names.function()
            ))
            .await
            .doing(|| "removing the fence from the source")?;
    }
    let empty: bool = session
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace n WHERE n.nspname = 'pgtandem'
                 AND NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.relnamespace = n.oid)
                 AND NOT EXISTS (SELECT FROM pg_catalog.pg_proc p WHERE p.pronamespace = n.oid))",
            &[],
        )
        .await
        .doing(|| "looking for the schema pgtandem on the source")?
        .try_get(0)?;
    if empty {
        session.batch_execute("DROP SCHEMA pgtandem").await.doing(|| "removing the schema pgtandem from the source")?;
    }
    Ok(())
}
