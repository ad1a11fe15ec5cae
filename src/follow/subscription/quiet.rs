//! Keeping the connection string, which holds a password, out of what the target writes down for others.
//!
//! A server tells of a statement in many ways: its text and its parameters by `log_statement`, `log_min_duration_statement` and
//! their like, and when it fails; and in the context of a message, where it came from. What belongs to the second kind is the
//! statement that a block of ours executes, for there is no CREATE SUBSCRIPTION without the string in its text.
//!
//! - **The first kind** never meets the string, whatever the server's settings are and whoever we are: it travels as data of a
//!   COPY, which no setting logs, into a temporary table that goes with the transaction. A temporary table is in no WAL.
//! - **The second kind** is switched off for the transaction, each setting for which the role may. What it may not, and would
//!   tell for certain, is refused by name. There remains what tells only if the session is ended from outside in that very
//!   moment: of this `check` warns.

use bytes::Bytes;
use futures_util::SinkExt as _;
use std::pin::pin;

use crate::error::{Class, Doing, Error, Result};
use crate::postgres::Session;

/// Begins a transaction in which the server is as quiet as the role may have it. An extension's setting is there only where the
/// extension is loaded.
const BEGIN: &str = "
    BEGIN;
    SET LOCAL client_min_messages = error;
    DO $$ DECLARE quiet record; BEGIN
        FOR quiet IN
            SELECT s.name, q.setting
            FROM (VALUES ('log_statement', 'none'), ('log_min_duration_statement', '-1'), ('log_min_duration_sample', '-1'),
                         ('log_transaction_sample_rate', '0'), ('log_duration', 'off'),
                         ('log_parameter_max_length_on_error', '0'), ('log_error_verbosity', 'terse'),
                         ('log_min_messages', 'error'), ('pg_stat_statements.track', 'top'), ('pgaudit.log', 'none'))
                 AS q (name, setting)
            JOIN pg_catalog.pg_settings s ON s.name = q.name
        LOOP
            BEGIN
                PERFORM pg_catalog.set_config(quiet.name, quiet.setting, true);
            EXCEPTION WHEN insufficient_privilege THEN NULL;
            END;
        END LOOP;
    END $$";

/// The settings that write down what a block of ours executes, and whether the context of a message is told at all.
const TELLING: &str = "
    SELECT ARRAY(SELECT s.name || ' = ' || s.setting FROM pg_catalog.pg_settings s
                 WHERE s.name = 'log_min_messages' AND s.setting LIKE 'debug%' AND v.setting <> 'terse'
                    OR s.name = 'pg_stat_statements.track' AND s.setting = 'all'
                       AND pg_catalog.current_setting('pg_stat_statements.track_utility', true) = 'on'
                    OR s.name = 'pgaudit.log' AND s.setting ~* '(^|,)[ ]*(all|ddl)[ ]*(,|$)' AND s.setting !~* '-[ ]*ddl'
                 ORDER BY 1),
           v.setting <> 'terse'
    FROM pg_catalog.pg_settings v WHERE v.name = 'log_error_verbosity'";

/// An SQL expression: the string that was handed over.
pub(super) const HANDED_OVER: &str = "(SELECT string FROM pg_temp.pgtandem_connection)";

const MAKE_ROOM: &str = "CREATE TEMPORARY TABLE pgtandem_connection (string text) ON COMMIT DROP";

/// The quiet transaction in which a statement with the string is executed.
pub(super) struct Quiet {
    /// Whether a message in the middle would still be logged with the statement around it.
    pub(super) context_is_told: bool,
}

/// Begins it. The caller ends it, or rolls it back after an error.
///
/// # Errors
/// Class operator, `subscription_log_tells`: the target would write the string down. The connection's.
pub(super) async fn begin(session: &Session) -> Result<Quiet> {
    session.batch_execute(BEGIN).await.doing(|| "quieting the target's log")?;
    let row = session.query_one(TELLING, &[]).await.doing(|| "asking what the target's log tells")?;
    let telling: Vec<String> = row.try_get(0)?;
    if telling.is_empty() {
        return Ok(Quiet { context_is_told: row.try_get(1)? });
    }
    let message =
        format!("the target would write down the connection to the source with its password: {}", telling.join(", "));
    Err(Error::new(Class::Operator, "subscription_log_tells", message).hint(
        "have a superuser of the target let the role switch it off (GRANT SET ON PARAMETER … TO …) or set it otherwise for the role \
         (ALTER ROLE … SET …), or use follow.engine = \"stream\"",
    ))
}

/// Hands the string over, as [`HANDED_OVER`] until the transaction ends.
///
/// # Errors
/// The role may not have temporary tables; the connection's.
pub(super) async fn hand_over(session: &Session, string: &str) -> Result<()> {
    session.batch_execute(MAKE_ROOM).await?;
    let mut sink = pin!(session.copy_in("COPY pg_temp.pgtandem_connection FROM STDIN").await?);
    sink.send(Bytes::from(line(string))).await?;
    sink.finish().await?;
    Ok(())
}

/// A line of COPY.
fn line(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r").replace('\t', "\\t");
    format!("{escaped}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_any_string() {
        assert_eq!(line("host=a password='b\\'c'"), "host=a password='b\\\\'c'\n");
        assert_eq!(line("a\tb\r\n"), "a\\tb\\r\\n\n");
    }
}
