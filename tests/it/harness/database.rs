//! One database of a cluster, as one role sees it.

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::cluster::PASSWORD;
use super::tls::TlsFiles;

/// Whether a server that was just started answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    NotYet,
    /// It answers; a refusal of the login is an answer too.
    Ready,
}

/// The address of a database; each call below opens a connection of its own.
#[derive(Clone, Debug)]
pub struct Database {
    name: String,
    user: String,
    password: String,
    port: u16,
    tls: Option<TlsFiles>,
}

impl Database {
    pub(super) fn new(name: &str, port: u16, tls: Option<TlsFiles>) -> Self {
        Self { name: name.to_owned(), user: "postgres".to_owned(), password: PASSWORD.to_owned(), port, tls }
    }

    /// The same database for another role.
    #[must_use]
    pub fn with_user(&self, user: &str, password: &str) -> Self {
        Self { user: user.to_owned(), password: password.to_owned(), ..self.clone() }
    }

    /// The database's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A libpq URL with the password in it; under TLS with `sslmode=verify-full`.
    pub fn url(&self) -> String {
        let tls = self.tls.as_ref().map_or_else(String::new, |files| {
            format!("?sslmode=verify-full&sslrootcert={}", escape(&files.ca.to_string_lossy()))
        });
        format!(
            "postgresql://{}:{}@{}:{}/{}{tls}",
            escape(&self.user),
            escape(&self.password),
            self.host(),
            self.port,
            escape(&self.name)
        )
    }

    /// The certificate is made out to both; the name is what clients are usually given.
    fn host(&self) -> &'static str {
        if self.tls.is_some() { "localhost" } else { "127.0.0.1" }
    }

    /// A connection; the server's refusal is returned.
    pub async fn try_connect(&self) -> Result<Client, tokio_postgres::Error> {
        let mut config = Config::new();
        config.host(self.host()).port(self.port).dbname(&self.name).user(&self.user).password(&self.password);
        match &self.tls {
            None => {
                let (client, connection) = config.connect(NoTls).await?;
                // Its end is seen by the client, as an error of the next call.
                tokio::spawn(connection);
                Ok(client)
            }
            Some(files) => {
                config.ssl_mode(tokio_postgres::config::SslMode::Require);
                let (client, connection) = config.connect(MakeRustlsConnect::new(files.client_config())).await?;
                tokio::spawn(connection);
                Ok(client)
            }
        }
    }

    /// A connection.
    pub async fn connect(&self) -> Client {
        self.try_connect().await.unwrap_or_else(|error| panic!("connect to {}: {}", self.name, explain(&error)))
    }

    /// Runs one or more statements.
    pub async fn execute(&self, sql: &str) {
        let client = self.connect().await;
        client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{}\nin {}: {sql}", explain(&error), self.name));
    }

    /// Rows as `psql -At` prints them: columns joined by `|`, NULL as nothing.
    pub async fn query_strings(&self, sql: &str) -> Vec<String> {
        let client = self.connect().await;
        rows(&client, sql).await
    }

    /// The only value of the only row.
    pub async fn query_string(&self, sql: &str) -> String {
        let mut rows = self.query_strings(sql).await;
        assert_eq!(rows.len(), 1, "one row expected of: {sql}");
        rows.remove(0)
    }

    pub(super) async fn readiness(&self) -> Readiness {
        match self.try_connect().await {
            Ok(_) => Readiness::Ready,
            Err(error) => match error.code() {
                Some(code) if *code != SqlState::CANNOT_CONNECT_NOW => Readiness::Ready,
                _ => Readiness::NotYet,
            },
        }
    }
}

/// Rows as `psql -At` prints them, on a connection that is there already.
pub(super) async fn rows(client: &Client, sql: &str) -> Vec<String> {
    let messages = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{}\nin: {sql}", explain(&error)));
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    rows.map(|row| (0..row.len()).map(|column| row.get(column).unwrap_or("")).collect::<Vec<_>>().join("|")).collect()
}

/// The server's own words, which the error's `Display` keeps to itself.
fn explain(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(|| format!("{error:?}"), |db| format!("{db:?}"))
}

/// Percent-encoding of all that is not plainly allowed in every part of a URL.
fn escape(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}
