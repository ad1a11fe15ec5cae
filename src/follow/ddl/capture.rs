//! Event triggers on the source that write each schema change into the stream.
//!
//! Owns, on the source: the table `pgtandem.ddl_<name>`, the functions `pgtandem.capture_<name>`, `role_<name>`, `table_<name>` and
//! `publish_<name>`, and the event triggers `!pgtandem_<name>_…`. Promises that a statement of the application never fails because of
//! them: whatever goes wrong is caught, and said in the stream. Where the role may not make event triggers, nothing is made, and
//! the move goes on without.
//!
//! # How a schema change gets into the stream
//!
//! The trigger inserts a description of the statement into the table, in the transaction of the statement, and deletes it
//! again at once. The table is published for inserts only, so the stream carries the description in its place between the
//! rows, and the table stays empty. A logical message would do the same without a table, but PostgreSQL 13 sends none, and
//! every role may write one: it could have the target run any statement. Into the table only its owner writes.
//!
//! A table that is new is published by the same trigger, so that its rows travel from the first one on; one whose
//! replica identity came or went moves to the publication that fits, before the source could refuse an UPDATE.
//!
//! # The order of the triggers
//!
//! Event triggers fire in the order of their names. Ours sort before those that people make, since one of theirs that changes the
//! schema itself must be captured after the statement that it reacts to. Each of ours is a pair: the first one leaves the role that
//! acts in a setting, the second one captures. No name of a move holds `!`, so nothing comes between the two.

use super::describing::{self, PRINTING, Parts};
use super::publishing;
use crate::config::{MoveName, Scope};
use crate::error::{Doing, Error, Result};
use crate::postgres::{QualifiedName, Session, quote_identifier, quote_literal};

/// The triggers: event, end of the name, function.
const TRIGGERS: [(&str, &str, &str); 5] = [
    ("ddl_command_end", "!command", "role"),
    ("ddl_command_end", "command", "capture"),
    ("sql_drop", "!drop", "role"),
    ("sql_drop", "drop", "capture"),
    ("table_rewrite", "rewrite", "capture"),
];

/// `$1`: schema, `$2`: function. Whether it is called for all three events, by triggers of whatever name.
const INSTALLED: &str = "
    SELECT count(DISTINCT e.evtevent) = 3
    FROM pg_catalog.pg_event_trigger e
    JOIN pg_catalog.pg_proc p ON p.oid = e.evtfoid
    JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname = $1 AND p.proname = $2 AND e.evtenabled = 'A'";

/// What the capture of a move is called on the source.
#[derive(Clone, Debug)]
pub struct Capture {
    name: MoveName,
}

/// So long the removal waits for the table at a time, …
const REMOVAL_PATIENCE: &str = "2s";
/// … and so often.
const REMOVAL_TRIES: u32 = 15;

impl Capture {
    /// Of this move.
    #[must_use]
    pub fn of(name: &MoveName) -> Self {
        Self { name: name.clone() }
    }

    /// The table through which descriptions pass.
    #[must_use]
    pub fn table(&self) -> QualifiedName {
        QualifiedName::new("pgtandem", format!("ddl_{}", self.name))
    }

    fn function(&self, what: &str) -> QualifiedName {
        QualifiedName::new("pgtandem", format!("{what}_{}", self.name))
    }

    /// Quoted.
    fn trigger(&self, suffix: &str) -> String {
        quote_identifier(&format!("!pgtandem_{}_{suffix}", self.name))
    }

    /// As it was called before the order of the triggers was settled; quoted.
    fn earlier_trigger(&self, suffix: &str) -> String {
        quote_identifier(&format!("pgtandem_{}_{suffix}", self.name))
    }

    /// The setting that holds the role which acts.
    fn role_setting(&self) -> String {
        format!("pgtandem.role_{}", self.name)
    }

    /// Makes everything, or makes it anew; false where the role may not.
    ///
    /// # Errors
    /// The connection's.
    pub async fn install(&self, source: &Session, scope: &Scope) -> Result<bool> {
        let made = source.batch_execute(&self.install_sql(scope)).await;
        let Err(error) = made else { return Ok(true) };
        source.batch_execute("ROLLBACK").await.doing(|| "giving up the capture of schema changes")?;
        let error = Error::from(error);
        if error.sqlstate() == Some("42501") {
            tracing::info!("the source's role may not make event triggers; schema changes are looked for instead");
            return Ok(false);
        }
        Err(error.doing("installing the capture of schema changes on the source"))
    }

    /// Whether schema changes are captured.
    ///
    /// # Errors
    /// The connection's.
    pub async fn is_installed(&self, source: &Session) -> Result<bool> {
        let row = source
            .query_one(INSTALLED, &[&"pgtandem", &self.function("capture").name])
            .await
            .doing(|| "looking for the capture of schema changes")?;
        Ok(row.try_get(0)?)
    }

    /// Removes everything; returns whether there was anything. The table leaves the publication with it.
    ///
    /// # Errors
    /// The connection's, or a role that does not own it.
    pub async fn remove(&self, source: &Session) -> Result<bool> {
        let row = source
            .query_one("SELECT pg_catalog.to_regclass($1) IS NOT NULL", &[&self.table().to_string()])
            .await
            .doing(|| "looking for the capture of schema changes")?;
        if !row.try_get::<_, bool>(0)? {
            return Ok(false);
        }
        // First the triggers, by themselves: the table is locked by each transaction that changed the schema and is still open, and
        // while we waited for it with the triggers in place, every other change of the schema would wait behind us.
        let doing = || "removing the capture of schema changes from the source";
        source
            .batch_execute(&format!(
                "SET client_min_messages = error; {}; RESET client_min_messages",
                self.drop_triggers()
            ))
            .await
            .doing(doing)?;
        let rest = format!(
            "BEGIN; SET LOCAL client_min_messages = error; SET LOCAL lock_timeout = '{REMOVAL_PATIENCE}';
             {}; DROP TABLE IF EXISTS {}; COMMIT",
            self.drop_functions(),
            self.table()
        );
        for _ in 1..REMOVAL_TRIES {
            match source.batch_execute(&rest).await.map_err(Error::from) {
                Err(error) if error.sqlstate() == Some("55P03") => {
                    source.batch_execute("ROLLBACK").await.doing(doing)?;
                    tracing::info!(
                        "an open transaction of the source changed the schema: waiting for it to remove the capture"
                    );
                }
                other => return other.map(|()| true).doing(doing),
            }
        }
        source.batch_execute(&rest).await.map_err(Error::from).map(|()| true).doing(doing)
    }

    /// All but the table and the functions of today, under every name that it ever had.
    fn drop_triggers(&self) -> String {
        let triggers = TRIGGERS.iter().map(|(_, suffix, _)| self.trigger(suffix));
        let earlier = ["command", "drop", "rewrite"].map(|suffix| self.earlier_trigger(suffix));
        let triggers = triggers.chain(earlier).map(|trigger| format!("DROP EVENT TRIGGER IF EXISTS {trigger}"));
        let earlier = format!("DROP FUNCTION IF EXISTS {}()", self.function("publish"));
        triggers.chain([earlier]).collect::<Vec<_>>().join("; ")
    }

    fn drop_functions(&self) -> String {
        let [role, capture, describe, publish] =
            ["role", "capture", "table", "publish"].map(|what| self.function(what));
        format!("DROP FUNCTION IF EXISTS {role}(), {capture}(), {describe}(oid, text), {publish}(oid[])")
    }

    /// What is in the table is run on the target, so nobody but its owner may write into it. Default privileges may have given that to
    /// others, and pg_write_all_data gives it: row security without a policy takes it from all of them. A table that a
    /// stranger made beforehand may have triggers of theirs, which would run with our rights.
    fn own_table(&self) -> String {
        let table = self.table();
        let literal = quote_literal(&table.to_string());
        let body = format!(
            "DECLARE k pg_catalog.pg_class; BEGIN
                SELECT * INTO k FROM pg_catalog.pg_class WHERE oid = {literal}::pg_catalog.regclass;
                IF k.relowner <> (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
                    RAISE insufficient_privilege USING MESSAGE = pg_catalog.format(
                        'table %s belongs to the role %s, and what is written into it is run on the target', {literal}, k.relowner::pg_catalog.regrole),
                        HINT = 'connect to the source as that role, or drop the table if it is not of this move';
                END IF;
                IF NOT k.relrowsecurity THEN
                    ALTER TABLE {table} ENABLE ROW LEVEL SECURITY;
                END IF;
            END"
        );
        format!("DO {}", quote_literal(&body))
    }

    /// The functions keep their identity where they are there already: a statement of the application may be inside one of
    /// them at this moment, and would find that the next one is gone.
    fn install_sql(&self, scope: &Scope) -> String {
        let [role, capture, describe, publish] =
            ["role", "capture", "table", "publish"].map(|what| self.function(what));
        let table = self.table();
        let setting = self.role_setting();
        let parts = Parts { table: &table, describe: &describe, publish: &publish, role: &setting };
        let triggers: String = TRIGGERS
            .iter()
            .map(|(event, suffix, what)| {
                let (trigger, function) = (self.trigger(suffix), self.function(what));
                format!(
                    "CREATE EVENT TRIGGER {trigger} ON {event} EXECUTE FUNCTION {function}();
                     ALTER EVENT TRIGGER {trigger} ENABLE ALWAYS;\n"
                )
            })
            .collect();
        format!(
            "BEGIN;
             SET LOCAL client_min_messages = error;
             CREATE SCHEMA IF NOT EXISTS pgtandem;
             CREATE TABLE IF NOT EXISTS {table} (event text NOT NULL);
             {own_table};
             {drop};
             CREATE OR REPLACE FUNCTION {publish}(touched oid[]) RETURNS jsonb LANGUAGE plpgsql SECURITY DEFINER
                 SET search_path = pg_catalog, pg_temp SET lock_timeout = '{patience}' AS {publish_body};
             CREATE OR REPLACE FUNCTION {describe}(relation oid, tag text) RETURNS jsonb LANGUAGE plpgsql {PRINTING} AS {table_body};
             CREATE OR REPLACE FUNCTION {role}() RETURNS event_trigger LANGUAGE plpgsql AS {role_body};
             CREATE OR REPLACE FUNCTION {capture}() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS {capture_body};
             {own_functions};
             REVOKE ALL ON FUNCTION {role}(), {capture}(), {describe}(oid, text), {publish}(oid[]) FROM PUBLIC;
             {triggers}
             COMMIT",
            own_table = self.own_table(),
            own_functions = [format!("{role}()"), format!("{capture}()"), format!("{describe}(oid, text)"), format!("{publish}(oid[])")]
                .map(|function| format!("ALTER FUNCTION {function} OWNER TO CURRENT_USER"))
                .join("; "),
            drop = self.drop_triggers(),
            patience = publishing::PATIENCE,
            publish_body = quote_literal(&publishing::body(&self.name, scope)),
            table_body = quote_literal(&describing::table_body()),
            role_body = quote_literal(&describing::role_body(&setting)),
            capture_body = quote_literal(&describing::capture_body(&parts)),
        )
    }
}
