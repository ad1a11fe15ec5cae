//! The one error type.
//!
//! An error says its class (who can do something about it), a stable code, what was being done to
//! which object, the cause, and a hint that a tired person can act on. It is logged once, where it is
//! handled. It never contains a secret: connection strings are redacted before they get here.

use std::error::Error as StdError;
use std::fmt;

/// The result of everything that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Who can do something about an error; decides between another try, a wait and an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Trying again soon is expected to help: a lost connection, a serialization failure, a deadlock.
    Retry,
    /// Trying again helps only once something changed elsewhere: full disk, no free connection, wrong password.
    Wait,
    /// A person must decide: divergence, a lost slot, a schema that no longer fits.
    Operator,
    /// The command line, the environment or the configuration file is wrong.
    Usage,
    /// The question was answered, and the answer is no: findings, differences, a cutover that did not happen.
    No,
    /// Another daemon holds this move.
    Held,
    /// A defect of pgtandem.
    Bug,
}

impl Class {
    /// The lower-case word used in logs, metrics (`class` label) and JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Wait => "wait",
            Self::Operator => "operator",
            Self::Usage => "usage",
            Self::No => "no",
            Self::Held => "held",
            Self::Bug => "bug",
        }
    }

    /// The exit code of the process when an error of this class ends it.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::No => 1,
            Self::Usage => 2,
            Self::Retry | Self::Wait => 3,
            Self::Operator => 4,
            Self::Held => 5,
            Self::Bug => 70,
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What went wrong, for a person and for a program. See the module's first lines.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    class: Class,
    code: &'static str,
    message: String,
    /// What was being done, innermost first.
    doing: Vec<String>,
    hint: Option<String>,
    sqlstate: Option<String>,
    detail: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// A new error; `code` is a stable snake_case word, `message` says what is wrong in one sentence.
    #[must_use]
    pub fn new(class: Class, code: &'static str, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            class,
            code,
            message: message.into(),
            doing: Vec::new(),
            hint: None,
            sqlstate: None,
            detail: None,
            source: None,
        }))
    }

    /// A defect of pgtandem: a state that its own code should have made impossible.
    #[must_use]
    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(Class::Bug, "bug", message)
            .hint("this is a defect of pgtandem; please report it with the log around this line")
    }

    /// Adds what was being done to which object; the outermost is said first.
    #[must_use]
    pub fn doing(mut self, what: impl Into<String>) -> Self {
        self.0.doing.push(what.into());
        self
    }

    /// Sets what the reader can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Sets the five-character SQLSTATE that the server gave.
    #[must_use]
    pub fn sqlstate_code(mut self, code: impl Into<String>) -> Self {
        self.0.sqlstate = Some(code.into());
        self
    }

    /// Sets what the server said beyond its message. It may hold data of rows, so it is no part of the error's text,
    /// which goes into logs, the state and the status.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.0.detail = Some(detail.into());
        self
    }

    /// Attaches the underlying error, for programs; its text should already be part of the message.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The same error under another class.
    #[must_use]
    pub fn reclassed(mut self, class: Class) -> Self {
        self.0.class = class;
        self
    }

    /// The same under another class and code: what a server says means something else where it is said.
    #[must_use]
    pub fn recoded(mut self, class: Class, code: &'static str) -> Self {
        self.0.class = class;
        self.0.code = code;
        self
    }

    /// Who can do something about it.
    #[must_use]
    pub fn class(&self) -> Class {
        self.0.class
    }

    /// The stable word for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.0.code
    }

    /// What the reader can do, if known.
    #[must_use]
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The SQLSTATE, if the server gave one.
    #[must_use]
    pub fn sqlstate(&self) -> Option<&str> {
        self.0.sqlstate.as_deref()
    }

    /// What the server said beyond its message, if anything; may hold data of rows.
    #[must_use]
    pub fn detail(&self) -> Option<&str> {
        self.0.detail.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for what in self.0.doing.iter().rev() {
            write!(f, "{what}: ")?;
        }
        f.write_str(&self.0.message)?;
        if let Some(code) = &self.0.sqlstate {
            write!(f, " (SQLSTATE {code})")?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|s| s as &(dyn StdError + 'static))
    }
}

/// Adds what was being done to the error of a result.
pub trait Doing<T> {
    /// `what` reads like "copying table public.orders".
    ///
    /// # Errors
    /// The same error, with the context added.
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Error>> Doing<T> for std::result::Result<T, E> {
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| e.into().doing(what()))
    }
}

/// Every error of a control connection becomes ours through its SQLSTATE.
impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(db) => crate::postgres::failure::from_server(crate::postgres::failure::ServerError {
                severity: db.severity().to_owned(),
                sqlstate: db.code().code().to_owned(),
                message: db.message().to_owned(),
                detail: db.detail().map(str::to_owned),
                hint: db.hint().map(str::to_owned),
                context: db.where_().map(str::to_owned),
                table: db.table().map(str::to_owned),
                constraint: db.constraint().map(str::to_owned),
            }),
            None => crate::postgres::failure::from_connection(error),
        }
    }
}

/// An I/O error outside any server: always the local machine.
impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::new(Class::Retry, "io", error.to_string()).because(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_reads_from_the_outside_in() {
        let error = Error::new(Class::Retry, "connection_lost", "connection reset by peer")
            .doing("reading the stream")
            .doing("following source");
        assert_eq!(error.to_string(), "following source: reading the stream: connection reset by peer");
        assert_eq!(error.class().exit_code(), 3);
    }
}
