//! A server of the move and the control connections to it.
//!
//! Every session starts with its settings pinned, so that nothing set on a role, a database or the server
//! changes how values print or whether a statement is allowed to take its time.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::postgres::ConnInfo;

/// Which of the two servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The server that the application uses today.
    Source,
    /// The server that it will use.
    Target,
}

impl Side {
    /// `source` or `target`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

/// Sent on every connection of both kinds before anything else; values then print the same everywhere.
///
/// `search_path` is empty: every name in our SQL is qualified.
pub const PINNED_SETTINGS: &str = "\
    SET client_min_messages = warning;
    SET search_path = '';
    SET DateStyle = 'ISO, YMD';
    SET IntervalStyle = 'postgres';
    SET TimeZone = 'UTC';
    SET extra_float_digits = 3;
    SET bytea_output = 'hex';
    SET standard_conforming_strings = on;
    SET statement_timeout = 0;
    SET lock_timeout = 0;
    SET idle_in_transaction_session_timeout = 0;
    SET default_transaction_read_only = off;
    SET default_transaction_isolation = 'read committed';
    SET default_transaction_deferrable = off;
    SET row_security = off;
    SET synchronous_commit = on;";

/// How to reach one of the two servers. Cheap to clone.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

struct Inner {
    side: Side,
    conninfo: ConnInfo,
    move_name: String,
}

impl Server {
    /// Reads the TLS material and the password file that `conninfo` names; does not connect.
    ///
    /// # Errors
    /// Class usage: a certificate or key that cannot be read, a file with the wrong permissions.
    pub fn new(side: Side, conninfo: ConnInfo, move_name: &str) -> Result<Self> {
        Ok(Self(Arc::new(Inner { side, conninfo, move_name: move_name.to_owned() })))
    }

    /// Which side this is.
    #[must_use]
    pub fn side(&self) -> Side {
        self.0.side
    }

    /// The connection string behind it.
    #[must_use]
    pub fn conninfo(&self) -> &ConnInfo {
        &self.0.conninfo
    }

    /// `pgtandem <name> <role>`: what every connection of ours is called in `pg_stat_activity`.
    #[must_use]
    pub fn application_name(&self, role: &str) -> String {
        format!("pgtandem {} {role}", self.0.move_name)
    }

    /// A control connection with [`PINNED_SETTINGS`].
    ///
    /// # Errors
    /// Classes retry and wait, as [`crate::postgres::failure`] reads them; the message names side, host and port.
    pub async fn connect(&self, role: &str) -> Result<Session> {
        Err(Error::bug(format!("connecting as {role} is not built")))
    }

    /// The environment (`PGHOST`, `PGPASSWORD`, …) with which pg_dump, pg_restore and psql reach this server.
    /// It is for a child process only: it holds the password.
    #[must_use]
    pub fn child_environment(&self, role: &str) -> Vec<(String, String)> {
        vec![("PGAPPNAME".into(), self.application_name(role))]
    }
}

/// A control connection; ends when dropped.
pub struct Session {
    client: tokio_postgres::Client,
    driver: tokio::task::JoinHandle<()>,
    notifications: tokio::sync::mpsc::UnboundedReceiver<tokio_postgres::Notification>,
}

impl Session {
    /// The next NOTIFY for a channel this session listens on; `None` once the connection ended.
    pub async fn notification(&mut self) -> Option<tokio_postgres::Notification> {
        self.notifications.recv().await
    }
}

impl Deref for Session {
    type Target = tokio_postgres::Client;
    fn deref(&self) -> &Self::Target {
        &self.client
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.client
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.driver.abort();
    }
}
