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
///
/// Detail and context may hold data of rows, so they stay apart from the error's text and are logged at level debug
/// only; of the context the text tells the place, where that holds no values.
#[must_use]
pub fn from_server(server: ServerError) -> Error {
    let (class, code, hint) = meaning(&server.sqlstate);
    let mut message = server.message;
    if let Some(place) = server.context.as_deref().and_then(place) {
        message.push_str("; ");
        message.push_str(place);
    }
    let details: Vec<String> = [server.detail, server.context].into_iter().flatten().collect();
    let mut error = Error::new(class, code, message).sqlstate_code(server.sqlstate);
    if !details.is_empty() {
        let detail = details.join("; ").replace('\n', " / ");
        tracing::debug!(error = %error, detail, "the server said more");
        error = error.with_detail(detail);
    }
    match server.hint.as_deref().or(hint) {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// The first line of a context as far as it holds no values: table, line and column of a COPY, function and line.
/// Whatever else it may be, such as the parameters or the text of a statement, is left out.
fn place(context: &str) -> Option<&str> {
    let first = context.lines().next()?;
    if first.starts_with("COPY ") {
        return first.split(": ").next();
    }
    (first.starts_with("PL/pgSQL function ") || first.starts_with("SQL function ")).then_some(first)
}

/// Classifies what went wrong on a control connection without an answer of the server: no route, a TLS refusal, a
/// connection that ended; or an answer that we read as what it is not, which is a defect.
#[must_use]
pub fn from_connection(error: tokio_postgres::Error) -> Error {
    let mut text = error.to_string();
    let ours = is_ours(&text);
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        let more = inner.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = inner.source();
    }
    let ours_or_not = if ours { Error::bug(text) } else { Error::new(Class::Retry, "connection", text) };
    ours_or_not.because(error)
}

/// Whether a statement and the code around it do not fit each other. tokio-postgres keeps the kind of its errors to
/// itself, so the beginning of their text has to tell.
fn is_ours(text: &str) -> bool {
    const OURS: [&str; 8] = [
        "error serializing parameter",
        "error deserializing column",
        "invalid column",
        "expected ",
        "error encoding message to server",
        "query returned an unexpected number of",
        "invalid connection string",
        "invalid configuration",
    ];
    OURS.iter().any(|beginning| text.starts_with(beginning))
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
        "25P03" | "25P04" | "57P05" => (Class::Retry, "session_timeout", None),
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
        "08P01" => (
            Class::Bug,
            "protocol",
            Some("the server does not understand what was sent: look what stands between; report it if nothing does"),
        ),
        "XX001" | "XX002" => (
            Class::Operator,
            "data_corrupted",
            Some("the server found broken pages or a broken index: look at its log, and restore or repair it first"),
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

    fn server_error(sqlstate: &str, detail: Option<&str>, context: Option<&str>) -> Error {
        from_server(ServerError {
            sqlstate: sqlstate.into(),
            message: "refused".into(),
            detail: detail.map(str::to_owned),
            context: context.map(str::to_owned),
            ..ServerError::default()
        })
    }

    #[test]
    fn a_refused_statement_gets_a_class_and_keeps_data_of_rows_apart() {
        let error = server_error("23505", Some("Key (email)=(a@b)\nalready exists."), None);
        assert_eq!(error.class(), Class::Operator);
        assert_eq!(error.to_string(), "refused (SQLSTATE 23505)");
        assert_eq!(error.detail(), Some("Key (email)=(a@b) / already exists."));
    }

    #[test]
    fn of_a_context_the_place_is_told_and_no_value() {
        for (context, told) in [
            ("COPY users, line 3, column id: \"secret\"", "refused; COPY users, line 3, column id"),
            ("COPY users, line 3: \"1\tsecret: x\"", "refused; COPY users, line 3"),
            (
                "PL/pgSQL function f(text) line 2 at RAISE\nSQL statement \"secret\"",
                "refused; PL/pgSQL function f(text) line 2 at RAISE",
            ),
            ("SQL statement \"SELECT 'secret'\"\nPL/pgSQL function f() line 2", "refused"),
            ("unnamed portal parameter $1 = 'secret'", "refused"),
            ("", "refused"),
        ] {
            let error = server_error("22P02", None, Some(context));
            assert_eq!(error.to_string(), format!("{told} (SQLSTATE 22P02)"), "{context}");
        }
    }

    #[test]
    fn the_sqlstate_tells_the_class() {
        for (sqlstate, class) in [
            ("40P01", Class::Retry),
            ("08006", Class::Retry),
            ("08P01", Class::Bug),
            ("XX000", Class::Wait),
            ("58030", Class::Wait),
            ("XX001", Class::Operator),
            ("XX002", Class::Operator),
            ("22P02", Class::Operator),
        ] {
            assert_eq!(meaning(sqlstate).0, class, "{sqlstate}");
        }
    }

    #[test]
    fn an_answer_read_as_what_it_is_not_is_a_defect() {
        let of_ours = "nonsense".parse::<tokio_postgres::Config>().unwrap_err();
        assert_eq!(from_connection(of_ours).class(), Class::Bug);
        assert_eq!(from_connection(tokio_postgres::Error::__private_api_timeout()).class(), Class::Retry);
        for (text, ours) in [
            ("error deserializing column 3", true),
            ("invalid column `x`", true),
            ("error serializing parameter 0", true),
            ("expected 2 parameters but got 1", true),
            ("connection closed", false),
            ("error communicating with the server", false),
            ("error performing TLS handshake", false),
        ] {
            assert_eq!(is_ours(text), ours, "{text}");
        }
    }
}
