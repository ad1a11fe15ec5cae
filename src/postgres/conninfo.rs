//! libpq connection strings, both forms: `postgresql://…` and `host=… dbname=…`.
//! See <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING>.
//!
//! Owns: what a connection string means, with libpq's defaults. Promises: any text is a [`ConnInfo`] or an error;
//! no error, `Debug` or `Display` ever shows the password, nor a piece of the text that could be a part of it.
//! Never reads the environment: what libpq takes from there (the user, the home folder) comes in as [`Ambient`].

mod fields;
mod keywords;
mod syntax;

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

pub use fields::{ChannelBinding, LoadBalance, SessionAttrs, SslMode, SslNegotiation, TlsVersion};

/// What the machine contributes to a connection string: everything libpq would look up by itself.
#[derive(Clone, Debug, Default)]
pub struct Ambient {
    /// The operating system's name of the user: the default of `user`.
    pub user: Option<String>,
    /// The home folder, for `~/.pgpass` and `~/.postgresql`.
    pub home: Option<PathBuf>,
    /// `PGPASSFILE`.
    pub passfile: Option<PathBuf>,
}

/// A password. Printed as `***` by everything but [`Password::expose`].
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    /// Wraps a secret.
    #[must_use]
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// The secret itself: for an authentication exchange or a child's environment, never for a message.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// One place where the server may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// How it is reached.
    pub address: Address,
    /// `hostaddr`: where to connect to instead of looking the name up.
    pub numeric: Option<IpAddr>,
    /// The TCP port, or the number in a socket's name.
    pub port: u16,
}

/// A name to look up or a folder with a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A host name or a numeric address, without brackets.
    Tcp(String),
    /// The folder of the socket.
    Unix(PathBuf),
}

impl Host {
    /// The name as `host` would spell it.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.address {
            Address::Tcp(name) => name.clone(),
            Address::Unix(folder) => folder.display().to_string(),
        }
    }

    /// Whether the way to it stays on this machine's sockets, where TLS does not exist.
    #[must_use]
    pub fn is_unix(&self) -> bool {
        matches!(self.address, Address::Unix(_))
    }
}

impl fmt::Display for Host {
    /// `host:port`, with brackets around an IPv6 address; `folder:port` for a Unix socket.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Tcp(name) if name.contains(':') => write!(f, "[{name}]:{}", self.port),
            Address::Tcp(name) => write!(f, "{name}:{}", self.port),
            Address::Unix(folder) => write!(f, "{}:{}", folder.display(), self.port),
        }
    }
}

/// The keywords that begin with `ssl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SslOptions {
    /// `sslmode`
    pub mode: SslMode,
    /// `sslrootcert`
    pub root: Root,
    /// `sslcert`
    pub certificate: Option<PathBuf>,
    /// `sslkey`
    pub key: Option<PathBuf>,
    /// `sslcertmode=disable`: no client certificate is sent, not even the one of the home folder.
    pub no_certificate: bool,
    /// `sslnegotiation`
    pub negotiation: SslNegotiation,
    /// `sslsni`
    pub sni: bool,
    /// `ssl_min_protocol_version`
    pub min_version: TlsVersion,
    /// `ssl_max_protocol_version`
    pub max_version: TlsVersion,
}

/// `sslrootcert`: which authorities may vouch for the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// Not given: `~/.postgresql/root.crt` if it is there.
    Default,
    /// `system`: the authorities that the operating system trusts.
    System,
    /// A file of certificates.
    File(PathBuf),
}

/// How a dead connection is noticed. A value is `None` where the operating system decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// `keepalives`
    pub enabled: bool,
    /// `keepalives_idle`: silence before the first probe.
    pub idle: Option<Duration>,
    /// `keepalives_interval`: between two probes.
    pub interval: Option<Duration>,
    /// `keepalives_count`: unanswered probes that end the connection.
    pub count: Option<u32>,
    /// `tcp_user_timeout`: sent data unacknowledged for this long ends the connection.
    pub user_timeout: Option<Duration>,
}

/// The default of `connect_timeout`; libpq would wait without end.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A parsed connection string. `Debug` and `Display` never show the password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnInfo {
    hosts: Vec<Host>,
    database: String,
    user: String,
    password: Option<Password>,
    passfile: Option<PathBuf>,
    home: Option<PathBuf>,
    options: Option<String>,
    connect_timeout: Option<Duration>,
    ssl: SslOptions,
    channel_binding: ChannelBinding,
    keepalive: Keepalive,
    session_attrs: SessionAttrs,
    load_balance: LoadBalance,
}

/// Why a text is no connection string. The text itself is not repeated: it may hold a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidConnInfo(pub(super) String);

impl ConnInfo {
    /// Parses either form, with libpq's defaults for what is left out.
    ///
    /// # Errors
    /// A syntax error, an unknown or unsupported keyword, a value that the keyword does not have.
    pub fn parse(text: &str, ambient: &Ambient) -> Result<Self, InvalidConnInfo> {
        fields::from_pairs(&syntax::pairs(text)?, ambient)
    }

    /// The hosts to try, in order; never empty.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// `dbname`
    #[must_use]
    pub fn database(&self) -> &str {
        &self.database
    }

    /// `user`
    #[must_use]
    pub fn user(&self) -> &str {
        &self.user
    }

    /// `password` as written in the string; the password file is asked by [`crate::postgres::Server`].
    #[must_use]
    pub fn password(&self) -> Option<&Password> {
        self.password.as_ref()
    }

    /// The password file: `passfile`, `PGPASSFILE` or `~/.pgpass`, whether it is there or not.
    #[must_use]
    pub fn passfile(&self) -> Option<&Path> {
        self.passfile.as_deref()
    }

    /// The home folder that `~/.postgresql` is looked for in.
    #[must_use]
    pub fn home(&self) -> Option<&Path> {
        self.home.as_deref()
    }

    /// `options`, sent to the server as written (providers route by it, such as `endpoint=…`).
    #[must_use]
    pub fn options(&self) -> Option<&str> {
        self.options.as_deref()
    }

    /// How long one attempt on one host may take; `None` waits without end.
    #[must_use]
    pub fn connect_timeout(&self) -> Option<Duration> {
        self.connect_timeout
    }

    /// Everything about TLS.
    #[must_use]
    pub fn ssl(&self) -> &SslOptions {
        &self.ssl
    }

    /// `channel_binding`
    #[must_use]
    pub fn channel_binding(&self) -> ChannelBinding {
        self.channel_binding
    }

    /// How a dead connection is noticed.
    #[must_use]
    pub fn keepalive(&self) -> &Keepalive {
        &self.keepalive
    }

    /// `target_session_attrs`
    #[must_use]
    pub fn session_attrs(&self) -> SessionAttrs {
        self.session_attrs
    }

    /// `load_balance_hosts`
    #[must_use]
    pub fn load_balance(&self) -> LoadBalance {
        self.load_balance
    }

    /// The same server, another database.
    #[must_use]
    pub fn with_database(mut self, database: impl Into<String>) -> Self {
        self.database = database.into();
        self
    }

    /// The URL with `***` for the password: for logs, status and people. The same as `Display`.
    #[must_use]
    pub fn redacted(&self) -> String {
        syntax::url(self, self.password.as_ref().map(|_| "***"))
    }

    /// The URL by which another server reaches this one: with `password` and the name of its connection in it, without what
    /// only this machine has, its password file. For that server alone: never for a log, an error or a person.
    #[must_use]
    pub fn url_for_server(&self, application_name: &str, password: Option<&Password>) -> String {
        let mut theirs = self.clone();
        theirs.passfile = None;
        let url = syntax::url(&theirs, password.map(|p| syntax::percent_encode(p.expose())).as_deref());
        let joint = if url.contains('?') { '&' } else { '?' };
        // Our default is not libpq's, which would wait without end.
        let timeout = if self.connect_timeout == Some(CONNECT_TIMEOUT) { CONNECT_TIMEOUT.as_secs() } else { 0 };
        let timeout = if timeout > 0 { format!("&connect_timeout={timeout}") } else { String::new() };
        format!("{url}{joint}application_name={}{timeout}", syntax::percent_encode(application_name))
    }

    /// The URL with the password in it: for handing it back to the person who gave it, never for a log.
    #[must_use]
    pub fn url_with_password(&self) -> String {
        syntax::url(self, self.password.as_ref().map(|p| syntax::percent_encode(p.expose())).as_deref())
    }
}

impl fmt::Display for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}

impl FromStr for ConnInfo {
    type Err = InvalidConnInfo;

    /// [`ConnInfo::parse`] on a machine without a user, home folder or password file.
    fn from_str(text: &str) -> Result<Self, InvalidConnInfo> {
        Self::parse(text, &Ambient::default())
    }
}

#[cfg(test)]
mod tests;
