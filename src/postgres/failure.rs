//! What an error of a server means: SQLSTATE to class, code and hint.
//! See <https://www.postgresql.org/docs/current/errcodes-appendix.html>.

use crate::error::{Class, Error};

/// The fields of an ErrorResponse that matter to us, from either kind of connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerError {
    /// ERROR, FATAL or PANIC.
    pub severity: String,
    /// Five characters.
    pub sqlstate: String,
    /// The primary message.
    pub message: String,
    /// The detail, which may quote data of a row.
    pub detail: Option<String>,
    /// The server's own hint.
    pub hint: Option<String>,
    /// The call stack, for errors inside functions and COPY (it names the table and the line).
    pub context: Option<String>,
    /// The table, where the server says it.
    pub table: Option<String>,
    /// The constraint, where the server says it.
    pub constraint: Option<String>,
}

/// Classifies what a server said.
#[must_use]
pub fn from_server(server: ServerError) -> Error {
    let (class, code, hint) = meaning(&server.sqlstate);
    let mut message = server.message;
    for more in [server.detail, server.context].into_iter().flatten() {
        message.push_str("; ");
        message.push_str(&more.replace('\n', " / "));
    }
    let error = Error::new(class, code, message).sqlstate_code(server.sqlstate);
    match server.hint.as_deref().or(hint) {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// Classifies a failure below SQL: no route, no name, a TLS refusal, a connection that ended.
#[must_use]
pub fn from_connection(error: tokio_postgres::Error) -> Error {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        let more = inner.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = inner.source();
    }
    Error::new(Class::Retry, "connection", text).because(error)
}

/// Class, code and hint of a SQLSTATE.
fn meaning(sqlstate: &str) -> (Class, &'static str, Option<&'static str>) {
    match sqlstate {
        "40001" => (Class::Retry, "serialization_failure", None),
        "40P01" => (Class::Retry, "deadlock_detected", None),
        "55P03" => (Class::Retry, "lock_not_available", None),
        "57P01" | "57P02" => (Class::Retry, "connection_terminated", None),
        "57P03" => (Class::Retry, "cannot_connect_now", None),
        "57014" => (Class::Retry, "query_canceled", None),
        "25P03" | "57P05" => (Class::Retry, "session_timeout", None),
        "53100" => (Class::Wait, "disk_full", Some("make room on the server; pgtandem goes on by itself")),
        "53200" => (Class::Wait, "out_of_memory", None),
        "53300" => (
            Class::Wait,
            "too_many_connections",
            Some("raise max_connections or free some connections; pgtandem goes on by itself"),
        ),
        "53400" => (Class::Wait, "configuration_limit_exceeded", None),
        "25006" => (
            Class::Wait,
            "read_only",
            Some(
                "the server or the session is read-only: a standby, a full disk guard, or default_transaction_read_only",
            ),
        ),
        "28P01" => (
            Class::Wait,
            "invalid_password",
            Some("check the user and the password of the connection string, PGPASSFILE or ~/.pgpass"),
        ),
        "28000" => (Class::Wait, "invalid_authorization", Some("check pg_hba.conf, the user name and the sslmode")),
        "3D000" => (
            Class::Wait,
            "database_not_found",
            Some("check the database name of the connection string, or create the database"),
        ),
        "55006" => (Class::Retry, "object_in_use", None),
        "42501" => (
            Class::Operator,
            "insufficient_privilege",
            Some("grant the privilege to the role of the connection string"),
        ),
        _ if sqlstate.starts_with("08") => (Class::Retry, "connection", None),
        _ if sqlstate.starts_with("53") => (Class::Wait, "insufficient_resources", None),
        _ if sqlstate.starts_with("58") || sqlstate.starts_with("XX") => (Class::Wait, "server_fault", None),
        _ => (Class::Operator, "server_error", None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_statement_keeps_its_text_and_gets_a_class() {
        let error = from_server(ServerError {
            sqlstate: "40P01".into(),
            message: "deadlock detected".into(),
            detail: Some("Process 1 waits\nfor 2".into()),
            ..ServerError::default()
        });
        assert_eq!(error.class(), Class::Retry);
        assert_eq!(error.to_string(), "deadlock detected; Process 1 waits / for 2 (SQLSTATE 40P01)");
    }
}
