//! What pg_dump and pg_restore say when they fail, made into an error that a person can act on.
//!
//! Both print the server's message without its SQLSTATE, so the message is what there is to go by:
//!
//! ```text
//! pg_restore: from TOC entry 215; 1259 16386 TABLE t app
//! pg_restore: error: could not execute query: ERROR:  role "app" does not exist
//! Command was: ALTER TABLE public.t OWNER TO app;
//! ```
//!
//! A statement may hold a password (user mappings, servers), so it is shown without its literals.

use crate::error::{Class, Error};
use crate::postgres::quote_identifier;

/// The longest statement that is shown.
const MAX_STATEMENT: usize = 200;

/// What a failed run of `program` means; `ended` says how it ended, `stderr` is what it said.
#[must_use]
pub fn read(program: &str, ended: &str, stderr: &str) -> Error {
    let first = First::find(stderr);
    let message = first.message.as_deref().unwrap_or("it gave no reason");
    let meaning = meaning(message);
    let mut text = format!("{program}: {}", without_literals_in_connection(message));
    if let Some(object) = &first.object {
        text.push_str(&format!("; object: {object}"));
    }
    if let Some(statement) = &first.statement {
        text.push_str(&format!("; statement: {statement}"));
    }
    if first.message.is_none() {
        text.push_str(&format!(" ({ended})"));
    }
    let error = Error::new(meaning.class, meaning.code, text);
    match meaning.hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// The first failure in the output; what follows it is mostly its consequence.
#[derive(Debug, Default, PartialEq, Eq)]
struct First {
    message: Option<String>,
    object: Option<String>,
    statement: Option<String>,
}

impl First {
    fn find(stderr: &str) -> Self {
        let mut first = Self::default();
        let mut lines = stderr.lines();
        for line in lines.by_ref() {
            if let Some((_, entry)) = line.split_once(": from TOC entry ") {
                first.object = entry.splitn(4, ' ').nth(3).map(str::to_owned);
            } else if let Some(message) = error_of(line) {
                first.message = Some(message.to_owned());
                break;
            }
        }
        for line in lines {
            if let Some(statement) = line.strip_prefix("Command was: ") {
                first.statement = Some(shorten(statement));
                break;
            }
            if let Some(detail) = line.strip_prefix("DETAIL:  ").or_else(|| line.strip_prefix("HINT:  ")) {
                if let Some(message) = &mut first.message {
                    message.push_str("; ");
                    message.push_str(detail);
                }
            } else if line.contains(": error: ") || line.contains(": from TOC entry ") {
                break;
            }
        }
        first
    }
}

/// The server's message if there is one in the line, else the program's.
fn error_of(line: &str) -> Option<&str> {
    let (_, said) = line.split_once(": error: ").or_else(|| line.split_once(": fatal: "))?;
    let server = ["ERROR:  ", "FATAL:  ", "PANIC:  "].iter().find_map(|word| said.split_once(word));
    Some(server.map_or(said, |(_, message)| message))
}

struct Meaning {
    class: Class,
    code: &'static str,
    hint: Option<String>,
}

/// Class, code and hint of a message. Order matters: the most telling first.
fn meaning(message: &str) -> Meaning {
    let says = |text: &str| message.contains(text);
    let new = |class, code, hint: Option<String>| Meaning { class, code, hint };
    if let Some(role) = quoted_between(message, "role ", " does not exist") {
        let hint = format!("create it on the target: CREATE ROLE {} NOLOGIN;", quote_identifier(role));
        new(Class::Operator, "role_missing", Some(hint))
    } else if says("must be member of role") || says("must be able to SET ROLE") {
        let role = after_quoted(message).map_or_else(|| "the owner".to_owned(), quote_identifier);
        new(Class::Operator, "role_not_granted", Some(format!("on the target, run: GRANT {role} TO CURRENT_USER;")))
    } else if says("extension control file") || says("is not available") && says("extension") {
        let name = after_quoted(message).unwrap_or("of that name");
        let hint = format!(
            "install the extension {name} on the target's machine, or choose a service that offers it, or drop it on the source"
        );
        new(Class::Operator, "extension_missing", Some(hint))
    } else if says("must be owner of") || says("must be superuser") || says("permission denied") {
        let hint = "the target's role may not do this: grant it the privilege, or create the object by hand and drop it from the move";
        new(Class::Operator, "insufficient_privilege", Some(hint.into()))
    } else if says("out of shared memory") || says("max_locks_per_transaction") {
        let hint = "raise max_locks_per_transaction on the server and restart it";
        new(Class::Wait, "out_of_locks", Some(hint.into()))
    } else if says("already exists") {
        let hint = "the target is not empty: drop the object there, or start with an empty database";
        new(Class::Operator, "object_exists", Some(hint.into()))
    } else if says("lock timeout") || says("could not obtain lock") {
        new(
            Class::Retry,
            "lock_not_available",
            Some("a session on the source holds a lock for long; pgtandem tries again".into()),
        )
    } else if says("deadlock detected") {
        new(Class::Retry, "deadlock_detected", None)
    } else if says("No space left on device") || says("could not extend file") {
        new(Class::Wait, "disk_full", Some("make room; pgtandem goes on by itself".into()))
    } else if says("too many clients") || says("remaining connection slots") {
        new(Class::Wait, "too_many_connections", Some("raise max_connections or free some connections".into()))
    } else if says("password authentication failed") || says("no password supplied") {
        new(Class::Wait, "invalid_password", Some("check the user and the password of the connection string".into()))
    } else if says("server version mismatch") {
        new(Class::Operator, "client_programs_missing", Some("install client programs as new as the source".into()))
    } else if says("connection to server") || says("server closed the connection") || says("terminating connection") {
        new(Class::Retry, "connection", None)
    } else if says("snapshot") && says("does not exist") {
        new(Class::Retry, "snapshot_lost", None)
    } else {
        new(Class::Operator, "schema_refused", None)
    }
}

/// `app` in `role "app" does not exist`.
fn quoted_between<'a>(message: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let start = message.find(&format!("{before}\""))? + before.len() + 1;
    let rest = message.get(start..)?;
    rest.find(&format!("\"{after}")).and_then(|end| rest.get(..end))
}

/// The first text in double quotes.
fn after_quoted(message: &str) -> Option<&str> {
    message.split('"').nth(1)
}

/// One line, no literals, not too long.
fn shorten(statement: &str) -> String {
    let plain = without_literals(statement);
    match plain.char_indices().nth(MAX_STATEMENT) {
        Some((end, _)) => format!("{}…", plain.get(..end).unwrap_or_default()),
        None => plain,
    }
}

/// Everything between single quotes, and everything from a dollar quote on, becomes `…`. A quote without its partner (the
/// program prints the first line only) hides the rest.
fn without_literals(statement: &str) -> String {
    let statement = statement.find("$").map_or(statement, |at| statement.get(..at).unwrap_or_default());
    statement.split('\'').enumerate().fold(String::new(), |mut text, (at, part)| {
        text.push_str(if at % 2 == 0 { part } else { "'…'" });
        text
    })
}

/// libpq never prints a password, but it does print a connection string that it could not read.
fn without_literals_in_connection(message: &str) -> String {
    if message.contains("password=") || message.contains("://") {
        return "the connection was refused (the text is withheld: it quotes the connection string)".into();
    }
    message.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MISSING_ROLE: &str = "\
pg_restore: while PROCESSING TOC:
pg_restore: from TOC entry 215; 1259 16386 TABLE my table app
pg_restore: error: could not execute query: ERROR:  role \"App\" does not exist
Command was: ALTER TABLE public.\"my table\" OWNER TO \"App\";


pg_restore: error: could not execute query: ERROR:  second
";

    #[test]
    fn a_missing_role_comes_with_the_statement_that_makes_it() {
        let error = read("pg_restore", "exit status: 1", MISSING_ROLE);
        assert_eq!(error.code(), "role_missing");
        assert_eq!(error.class(), Class::Operator);
        assert_eq!(error.hint_text(), Some("create it on the target: CREATE ROLE \"App\" NOLOGIN;"));
        assert_eq!(
            error.to_string(),
            "pg_restore: role \"App\" does not exist; object: TABLE my table app; \
             statement: ALTER TABLE public.\"my table\" OWNER TO \"App\";"
        );
    }

    #[test]
    fn a_statement_never_shows_its_literals() {
        let stderr = "pg_restore: error: could not execute query: ERROR:  server \"s\" does not exist\n\
                      Command was: CREATE USER MAPPING FOR app SERVER s OPTIONS (password 'geheim', \"user\" 'x''y');\n";
        let text = read("pg_restore", "exit status: 1", stderr).to_string();
        assert!(!text.contains("geheim") && text.contains("password '…'"), "{text}");
        assert_eq!(without_literals("DO $x$ secret $x$"), "DO ");
        assert_eq!(without_literals("a 'cut off sec"), "a '…'");
    }

    #[test]
    fn each_kind_of_refusal_has_its_code() {
        for (message, code, class) in [
            ("ERROR:  extension \"postgis\" is not available", "extension_missing", Class::Operator),
            ("ERROR:  must be owner of extension citext", "insufficient_privilege", Class::Operator),
            ("ERROR:  permission denied to create extension \"x\"", "insufficient_privilege", Class::Operator),
            ("ERROR:  must be able to SET ROLE \"boss\"", "role_not_granted", Class::Operator),
            ("ERROR:  out of shared memory", "out_of_locks", Class::Wait),
            ("ERROR:  relation \"t\" already exists", "object_exists", Class::Operator),
            ("ERROR:  canceling statement due to lock timeout", "lock_not_available", Class::Retry),
            ("connection to server at \"h\", port 1 failed: Connection refused", "connection", Class::Retry),
            ("FATAL:  password authentication failed for user \"u\"", "invalid_password", Class::Wait),
            ("ERROR:  syntax error", "schema_refused", Class::Operator),
        ] {
            let error = read("pg_dump", "exit status: 1", &format!("pg_dump: error: {message}\n"));
            assert_eq!((error.code(), error.class()), (code, class), "{message}");
        }
    }

    #[test]
    fn silence_is_an_error_too() {
        assert!(read("pg_dump", "signal: 9 (SIGKILL)", "").to_string().contains("SIGKILL"));
    }
}
