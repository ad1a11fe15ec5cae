//! A server of the move and the control connections to it.
//!
//! Every session starts with its settings pinned, so that nothing set on a role, a database or the server
//! changes how values print or whether a statement is allowed to take its time.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio_postgres::{AsyncMessage, Notification};

use crate::error::{Class, Error, Result};
use crate::postgres::conninfo::{ChannelBinding, ConnInfo, Host, LoadBalance, Password, SessionAttrs, SslMode};
use crate::postgres::dial::{self, Dialed, Stream};
use crate::postgres::passfile::{self, Found};
use crate::postgres::tls::Tls;

mod child;
mod prepared;

pub use child::REMOVED_FROM_CHILDREN;
use prepared::PreparedTls;

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
/// `search_path` is empty: every name in our SQL is qualified. `idle_session_timeout` exists from 14 on,
/// `transaction_timeout` from 17 on.
pub const PINNED_SETTINGS: &str = "\
    SET client_min_messages = warning;
    SET search_path = '';
    SET statement_timeout = 0;
    SET lock_timeout = 0;
    SET idle_in_transaction_session_timeout = 0;
    SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings
        WHERE name IN ('idle_session_timeout', 'transaction_timeout');
    SET DateStyle = 'ISO, YMD';
    SET IntervalStyle = 'postgres';
    SET TimeZone = 'UTC';
    SET extra_float_digits = 3;
    SET bytea_output = 'hex';
    SET lc_monetary = 'C';
    SET xmloption = content;
    SET array_nulls = on;
    SET standard_conforming_strings = on;
    SET default_transaction_read_only = off;
    SET default_transaction_isolation = 'read committed';
    SET default_transaction_deferrable = off;
    SET row_security = off;
    SET jit = off;
    SET synchronous_commit = on";

/// How to reach one of the two servers. Cheap to clone.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

struct Inner {
    side: Side,
    conninfo: ConnInfo,
    move_name: String,
    tls: Option<Tls>,
    /// The way that the last control connection found good; every connection tries it first.
    known_good: Mutex<Option<Route>>,
    /// Whether the server was seen to be 17 or later, and so knows `transaction_timeout`.
    knows_transaction_timeout: AtomicBool,
}

/// One thing to try: a host, with or without TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Route {
    host: usize,
    encrypted: bool,
}

impl Server {
    /// Reads the TLS material that `conninfo` names; does not connect. The password file is read at each connection.
    ///
    /// # Errors
    /// Class usage: a certificate or key that cannot be read, a file with the wrong permissions.
    pub fn new(side: Side, conninfo: ConnInfo, move_name: &str) -> Result<Self> {
        let tls = Tls::new(&conninfo).map_err(|e| e.doing(format!("{}.url", side.as_str())))?;
        let move_name = move_name.to_owned();
        Ok(Self(Arc::new(Inner {
            side,
            conninfo,
            move_name,
            tls,
            known_good: Mutex::new(None),
            knows_transaction_timeout: AtomicBool::new(false),
        })))
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

    /// The same server, another database; the TLS material is shared.
    #[must_use]
    pub fn with_database(&self, database: &str) -> Self {
        Self(Arc::new(Inner {
            side: self.0.side,
            conninfo: self.0.conninfo.clone().with_database(database),
            move_name: self.0.move_name.clone(),
            tls: self.0.tls.clone(),
            known_good: Mutex::new(*self.0.known_good.lock().unwrap_or_else(PoisonError::into_inner)),
            knows_transaction_timeout: AtomicBool::new(self.0.knows_transaction_timeout.load(Ordering::Relaxed)),
        }))
    }

    /// `pgtandem <name> <role>`: what every connection of ours is called in `pg_stat_activity`.
    #[must_use]
    pub fn application_name(&self, role: &str) -> String {
        format!("pgtandem {} {role}", self.0.move_name)
    }

    /// The password for `host`: that of the connection string, else that of the password file, read anew.
    #[must_use]
    pub fn password(&self, host: &Host) -> Option<Password> {
        match self.ask_password(host) {
            Found::Password(password) => Some(password),
            Found::Nothing => None,
            Found::Unusable(why) => {
                tracing::warn!("{why}");
                None
            }
        }
    }

    fn ask_password(&self, host: &Host) -> Found {
        let conninfo = self.conninfo();
        match (conninfo.password(), conninfo.passfile()) {
            (Some(password), _) => Found::Password(password.clone()),
            (None, Some(file)) => passfile::ask(file, host, conninfo.database(), conninfo.user()),
            (None, None) => Found::Nothing,
        }
    }

    /// A control connection with [`PINNED_SETTINGS`].
    ///
    /// # Errors
    /// Classes retry and wait, as [`crate::postgres::failure`] reads them; the message names side, host, port,
    /// database and user, never the password.
    pub async fn connect(&self, role: &str) -> Result<Session> {
        let wanted = self.conninfo().session_attrs();
        if wanted == SessionAttrs::PreferStandby {
            if let Ok(session) = self.connect_to(role, SessionAttrs::Standby).await {
                return Ok(session);
            }
            return self.connect_to(role, SessionAttrs::Any).await;
        }
        self.connect_to(role, wanted).await
    }

    async fn connect_to(&self, role: &str, wanted: SessionAttrs) -> Result<Session> {
        let mut failures = Vec::new();
        for route in self.routes() {
            if is_settled(&failures, route) {
                continue;
            }
            match self.in_time(route, self.start_session(role, route, wanted)).await {
                Ok(session) => {
                    self.warn_of_plain_text(&failures, route);
                    *self.0.known_good.lock().unwrap_or_else(PoisonError::into_inner) = Some(route);
                    return Ok(session);
                }
                Err(error) => failures.push((route, error)),
            }
        }
        Err(summary(failures))
    }

    /// Falling back to plain text under `prefer` is what libpq does, but nobody should learn of it by chance.
    fn warn_of_plain_text(&self, failures: &[(Route, Error)], taken: Route) {
        let tls = failures.iter().find(|(route, _)| route.encrypted && route.host == taken.host);
        if let (false, Some((_, error))) = (taken.encrypted, tls) {
            tracing::warn!(side = self.side().as_str(), "not encrypted (sslmode=prefer), because TLS failed: {error}");
        }
    }

    /// A stream on which the server waits for the startup message, the certificate's `tls-server-end-point` for SCRAM, and
    /// the host that answered, whose password is to be asked for; the raw connections sit on it. Prefers the way that the last control connection found good.
    ///
    /// # Errors
    /// As [`Server::connect`], except for what the server says about the login.
    pub async fn open_stream(&self) -> Result<(Stream, Option<Vec<u8>>, Host)> {
        let (dialed, route) = self.open().await?;
        Ok((dialed.stream, dialed.end_point, self.host(route).clone()))
    }

    async fn open(&self) -> Result<(Dialed, Route)> {
        let mut failures = Vec::new();
        for route in self.routes() {
            if is_settled(&failures, route) {
                continue;
            }
            match self.in_time(route, self.dial(route)).await {
                Ok(dialed) => return Ok((dialed, route)),
                Err(error) => failures.push((route, error)),
            }
        }
        Err(summary(failures))
    }

    /// `connecting to source (host:port, database d, user u)`: the context for errors of either kind of connection.
    #[must_use]
    pub fn context(&self, host: &Host) -> String {
        let conninfo = self.conninfo();
        let side = self.side().as_str();
        format!("connecting to the {side} ({host}, database {:?}, user {:?})", conninfo.database(), conninfo.user())
    }

    fn host(&self, route: Route) -> &Host {
        let hosts = self.conninfo().hosts();
        // Routes are made from this very list, which is never empty.
        &hosts[route.host.min(hosts.len() - 1)]
    }

    /// The first host of the connection string; which of several is in use, only a [`Session`] knows.
    #[must_use]
    pub fn first_host(&self) -> &Host {
        self.host(Route { host: 0, encrypted: false })
    }

    /// Every way to try, in order.
    fn routes(&self) -> Vec<Route> {
        let conninfo = self.conninfo();
        let mut order: Vec<usize> = (0..conninfo.hosts().len()).collect();
        if conninfo.load_balance() == LoadBalance::Random {
            use std::hash::{BuildHasher as _, RandomState};
            order.sort_by_cached_key(|index| RandomState::new().hash_one(index));
        }
        let mut routes: Vec<Route> = order
            .into_iter()
            .flat_map(|host| {
                let unix = conninfo.hosts().get(host).is_some_and(Host::is_unix);
                let kinds: &[bool] = match conninfo.ssl().mode {
                    _ if unix => &[false],
                    SslMode::Disable => &[false],
                    SslMode::Allow => &[false, true],
                    SslMode::Prefer => &[true, false],
                    SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[true],
                };
                kinds.iter().map(move |encrypted| Route { host, encrypted: *encrypted })
            })
            .collect();
        let known_good = *self.0.known_good.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = routes.iter().position(|route| Some(*route) == known_good) {
            routes[..=at].rotate_right(1);
        }
        routes
    }

    /// `connect_timeout` around one attempt, and the context of its error.
    async fn in_time<T>(&self, route: Route, attempt: impl Future<Output = Result<T>>) -> Result<T> {
        let done = match self.conninfo().connect_timeout() {
            None => attempt.await,
            Some(limit) => match tokio::time::timeout(limit, attempt).await {
                Ok(done) => done,
                Err(_) => Err(Error::new(
                    Class::Retry,
                    "connect_timeout",
                    format!("no answer within {}", humantime::format_duration(limit)),
                )
                .hint(
                    "check the host, the port, the route and the firewalls between; connect_timeout=… sets the limit",
                )),
            },
        };
        done.map_err(|e| e.doing(self.context(self.host(route))))
    }

    async fn dial(&self, route: Route) -> Result<Dialed> {
        let tls = self.0.tls.as_ref().filter(|_| route.encrypted);
        dial::dial(self.host(route), self.conninfo(), tls).await
    }

    async fn start_session(&self, role: &str, route: Route, wanted: SessionAttrs) -> Result<Session> {
        let Dialed { stream, end_point } = self.dial(route).await?;
        let host = self.host(route);
        let mut config = prepared::config(stream.is_encrypted());
        let conninfo = self.conninfo();
        config.user(conninfo.user()).dbname(conninfo.database()).application_name(self.application_name(role));
        config.channel_binding(match conninfo.channel_binding() {
            ChannelBinding::Disable => tokio_postgres::config::ChannelBinding::Disable,
            ChannelBinding::Prefer => tokio_postgres::config::ChannelBinding::Prefer,
            ChannelBinding::Require => tokio_postgres::config::ChannelBinding::Require,
        });
        if let Some(options) = conninfo.options() {
            config.options(options);
        }
        if let Some(password) = self.password(host) {
            config.password(password.expose());
        }
        let (client, connection) =
            config.connect_raw(stream, PreparedTls::new(end_point)).await.map_err(|e| self.refused(host, e))?;
        let major =
            connection.parameter("server_version").and_then(|version| version.split(['.', ' ']).next()?.parse().ok());
        self.0.knows_transaction_timeout.store(major.is_some_and(|major: u32| major >= 17), Ordering::Relaxed);
        let session = Session::start(client, connection, self.clone(), route);
        check_attrs(&session, wanted).await?;
        session.batch_execute(PINNED_SETTINGS).await.map_err(|e| Error::from(e).doing("pinning the settings"))?;
        Ok(session)
    }

    /// What a refused login means.
    fn refused(&self, host: &Host, error: tokio_postgres::Error) -> Error {
        if error.as_db_error().is_some() {
            let error = Error::from(error);
            return match self.ask_password(host) {
                Found::Unusable(why) => error.hint(why),
                _ => error,
            };
        }
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        let text = format!("{error}: {cause}");
        if text.contains("password missing") {
            let hint = match self.ask_password(host) {
                Found::Unusable(why) => why,
                _ => "put it into the URL, PGPASSFILE or ~/.pgpass (host:port:database:user:password)".to_owned(),
            };
            return Error::new(Class::Wait, "password_missing", "the server asks for a password and none is given")
                .hint(hint)
                .because(error);
        }
        if text.contains("channel binding") || text.contains("authentication") {
            return Error::new(Class::Wait, "authentication_refused", format!("the login cannot go on: {cause}"))
                .hint("channel_binding=require needs TLS and a password stored as SCRAM; GSSAPI and SSPI are not supported")
                .because(error);
        }
        Error::from(error)
    }
}

/// After a login was refused the other hosts are not tried, as with libpq; the same host without (or with) TLS is,
/// if it was `pg_hba.conf` that refused (28000).
fn is_settled(failures: &[(Route, Error)], next: Route) -> bool {
    let Some((route, error)) = failures.last() else { return false };
    let same_host = route.host == next.host;
    match error.sqlstate() {
        Some("28000") => !same_host,
        // It cannot take connections now, or is of the wrong kind: another host may.
        Some("57P03" | "53300") | None if !same_host => false,
        Some(_) => true,
        // Without TLS the same refusal would come again; only a failed handshake is worth another try.
        None => same_host && !error.code().starts_with("tls_"),
    }
}

/// One error for all attempts: the last one's class and hint, everyone's text.
fn summary(mut failures: Vec<(Route, Error)>) -> Error {
    let Some((_, last)) = failures.pop() else { return Error::bug("a connection string without a host") };
    if failures.is_empty() {
        return last;
    }
    let text = failures.iter().map(|(_, error)| format!("{error}; then ")).collect::<String>() + &last.to_string();
    let error = Error::new(last.class(), last.code(), text);
    match last.hint_text().map(str::to_owned) {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// `target_session_attrs`. Asked before the settings are pinned: they hide `default_transaction_read_only`.
async fn check_attrs(session: &Session, wanted: SessionAttrs) -> Result<()> {
    if matches!(wanted, SessionAttrs::Any | SessionAttrs::PreferStandby) {
        return Ok(());
    }
    let row = session
        .query_one(
            "SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('default_transaction_read_only') = 'on'",
            &[],
        )
        .await?;
    let (standby, read_only): (bool, bool) = (row.try_get(0)?, row.try_get(1)?);
    let fits = match wanted {
        SessionAttrs::Any | SessionAttrs::PreferStandby => true,
        SessionAttrs::ReadWrite => !standby && !read_only,
        SessionAttrs::ReadOnly => standby || read_only,
        SessionAttrs::Primary => !standby,
        SessionAttrs::Standby => standby,
    };
    if fits {
        return Ok(());
    }
    let message = format!("the server is not what target_session_attrs={} asks for", wanted.as_str());
    Err(Error::new(Class::Retry, "session_attrs", message)
        .hint("name the right host, or wait until the failover is done"))
}

/// A control connection; ends when dropped.
pub struct Session {
    client: tokio_postgres::Client,
    notifications: mpsc::UnboundedReceiver<Notification>,
    server: Server,
    route: Route,
    /// Dropped after `client`: tells the driver that nobody is left.
    _alive: oneshot::Sender<()>,
}

/// How long the driver may take to say goodbye to the server.
const GOODBYE: Duration = Duration::from_secs(1);

impl Session {
    fn start(client: tokio_postgres::Client, connection: prepared::Connection, server: Server, route: Route) -> Self {
        let (sender, notifications) = mpsc::unbounded_channel();
        let (alive, gone) = oneshot::channel();
        let side = server.side().as_str();
        tokio::spawn(async move {
            let mut drive = std::pin::pin!(drive(connection, sender, side));
            tokio::select! {
                () = &mut drive => {}
                // The client is dropped: what is under way is cut off if it does not end by itself.
                _ = gone => drop(tokio::time::timeout(GOODBYE, drive).await),
            }
        });
        Self { client, notifications, server, route, _alive: alive }
    }

    /// The next NOTIFY for a channel this session listens on; `None` once the connection ended.
    pub async fn notification(&mut self) -> Option<Notification> {
        self.notifications.recv().await
    }

    /// The host that this session is connected to.
    #[must_use]
    pub fn host(&self) -> &Host {
        self.server.host(self.route)
    }

    /// Ends every other session of this name, role and database on the server; returns how many were told to end.
    ///
    /// # Errors
    /// The connection's.
    pub async fn end_others(&self, application_name: &str) -> Result<usize> {
        let ended = self
            .client
            .query(
                "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
                 WHERE application_name = $1 AND usename = CURRENT_USER AND pid <> pg_catalog.pg_backend_pid()
                   AND datname = pg_catalog.current_database()",
                &[&application_name],
            )
            .await?;
        Ok(ended.len())
    }

    /// A handle that cancels whatever this session is executing, from another task.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        Canceller { token: self.client.cancel_token(), server: self.server.clone(), route: self.route }
    }
}

/// Cancels the statement that a session is executing.
#[derive(Clone)]
pub struct Canceller {
    token: tokio_postgres::CancelToken,
    server: Server,
    route: Route,
}

impl Canceller {
    /// Asks the server; whether anything was cancelled shows in the session only.
    ///
    /// # Errors
    /// The server cannot be reached.
    pub async fn cancel(&self) -> Result<()> {
        let ask = async {
            let Dialed { stream, end_point } = self.server.dial(self.route).await?;
            Ok(self.token.cancel_query_raw(stream, PreparedTls::new(end_point)).await?)
        };
        self.server.in_time(self.route, ask).await
    }
}

/// Runs the connection until it ends: notifications to the session, notices to the log.
async fn drive(mut connection: prepared::Connection, sender: mpsc::UnboundedSender<Notification>, side: &'static str) {
    loop {
        match std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            // Nobody may be listening, and that is fine.
            Some(Ok(AsyncMessage::Notification(notification))) => drop(sender.send(notification)),
            Some(Ok(AsyncMessage::Notice(notice))) => {
                tracing::debug!(
                    side,
                    severity = notice.severity(),
                    sqlstate = notice.code().code(),
                    "{}",
                    notice.message()
                );
            }
            Some(Ok(_)) => {}
            // Whoever waits on the session gets the error too, and handles it.
            Some(Err(error)) => return tracing::debug!(side, %error, "a control connection ended"),
            None => return,
        }
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
