//! One PostgreSQL server, from its data directory to its end.
//!
//! Owns the folder, the port and the postmaster. Promises a server that answers when `start` returns, and that
//! dropping it leaves no process, no file and no shared memory.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use rustix::process::Signal;

use super::database::{Database, Readiness};
use super::guard::{Guard, processes_in, signal, wait_blocking};
use super::port::Port;
use super::provision::{self, User, command, server_bin, versions_under_test};
use super::tls::TlsFiles;
use super::{PATIENCE, identity, wait_until};

/// The password of the role `postgres` on every cluster; no log of the product may ever contain it.
pub const PASSWORD: &str = "secret of the tests";

/// How a server is asked to stop; what `pg_ctl stop -m` calls by the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Ends the sessions, rolls back, writes a checkpoint.
    Fast,
    /// Ends at once; the next start recovers.
    Immediate,
}

/// What a server shall be like. See [`Cluster::builder`].
#[derive(Clone, Debug)]
pub struct ClusterBuilder {
    version: u16,
    settings: BTreeMap<String, String>,
    initdb: Vec<String>,
    tls: bool,
    hba: Option<String>,
}

impl ClusterBuilder {
    /// A line of `postgresql.conf`; the value is quoted here.
    #[must_use]
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.settings.insert(name.to_owned(), value.to_owned());
        self
    }

    /// The server accepts only TLS, with a certificate of its own throw-away authority.
    #[must_use]
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// The text of `pg_hba.conf`, instead of "every role from this machine, by SCRAM".
    #[must_use]
    pub fn hba(mut self, text: &str) -> Self {
        self.hba = Some(text.to_owned());
        self
    }

    /// The encoding of the databases, such as `LATIN1`; default `UTF8`.
    #[must_use]
    pub fn encoding(self, name: &str) -> Self {
        self.initdb(&format!("--encoding={name}"))
    }

    /// The locale of the databases; default `C`.
    #[must_use]
    pub fn locale(self, name: &str) -> Self {
        self.initdb(&format!("--locale={name}"))
    }

    /// Any other option of initdb, such as `--wal-segsize=4`. A later one wins over an earlier one.
    #[must_use]
    pub fn initdb(mut self, option: &str) -> Self {
        self.initdb.push(option.to_owned());
        self
    }

    /// Makes the data directory and starts the server.
    pub async fn start(self) -> Cluster {
        let mut cluster = Cluster::create(self).await;
        cluster.start_again().await;
        cluster
    }
}

/// A server of a test's own.
pub struct Cluster {
    version: u16,
    folder: PathBuf,
    port: Port,
    settings: BTreeMap<String, String>,
    tls: Option<TlsFiles>,
    postmaster: Option<Child>,
    _guard: Guard,
}

impl Cluster {
    /// A server of this major version that is fit to be a source: `wal_level = logical`, ten slots.
    pub fn builder(version: u16) -> ClusterBuilder {
        let settings = [
            ("autovacuum_naptime", "5s"),
            ("dynamic_shared_memory_type", "mmap"),
            ("fsync", "off"),
            ("full_page_writes", "off"),
            ("listen_addresses", "127.0.0.1"),
            ("log_line_prefix", "%m [%p] %q%a "),
            ("max_connections", "60"),
            ("max_replication_slots", "10"),
            ("max_wal_senders", "10"),
            ("shared_buffers", "32MB"),
            ("unix_socket_directories", ""),
            ("wal_level", "logical"),
        ];
        ClusterBuilder {
            version,
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            initdb: vec!["--encoding=UTF8".to_owned(), "--locale=C".to_owned()],
            tls: false,
            hba: None,
        }
    }

    /// A server with nothing special about it.
    pub async fn start(version: u16) -> Self {
        Self::builder(version).start().await
    }

    /// Source and target, of the versions that `TEST_POSTGRES` asks for.
    pub async fn pair() -> (Self, Self) {
        let (source, target) = versions_under_test();
        tokio::join!(Self::start(source), Self::start(target))
    }

    async fn create(wanted: ClusterBuilder) -> Self {
        let folder = provision::cluster_folder();
        // From here on the folder is removed however this ends.
        let mut cluster = Self {
            version: wanted.version,
            _guard: Guard::over_cluster(&folder),
            folder,
            port: Port::take(),
            settings: wanted.settings,
            tls: None,
            postmaster: None,
        };
        let data = cluster.data();
        provision::copy_template(wanted.version, &wanted.initdb, &data).await;
        identity::renew(&data);
        let own_settings = "\ninclude_if_exists = 'harness.conf'\n";
        append(&data.join("postgresql.conf"), own_settings);
        if wanted.tls {
            cluster.enable_tls();
        }
        let connection = if wanted.tls { "hostssl" } else { "host" };
        let hba = wanted.hba.unwrap_or_else(|| {
            format!(
                "{connection} all all 127.0.0.1/32 scram-sha-256\n\
                 {connection} replication all 127.0.0.1/32 scram-sha-256\n"
            )
        });
        cluster.set_hba(&hba);
        cluster
    }

    fn enable_tls(&mut self) {
        let files = TlsFiles::create(&self.folder.join("tls"));
        self.set("ssl", "on");
        self.set("ssl_ca_file", &files.ca.to_string_lossy());
        self.set("ssl_cert_file", &files.server_certificate.to_string_lossy());
        self.set("ssl_key_file", &files.server_key.to_string_lossy());
        self.tls = Some(files);
    }

    /// The major version.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// The TCP port, on 127.0.0.1; it stays the same over restarts.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// The certificates of a server that was built with [`ClusterBuilder::tls`].
    pub fn tls(&self) -> &TlsFiles {
        self.tls.as_ref().expect("the cluster was built without tls()")
    }

    /// What the server has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    // --- databases ------------------------------------------------------------------------------------------

    /// A database as the superuser `postgres` sees it; it need not exist.
    pub fn database(&self, name: &str) -> Database {
        Database::new(name, self.port(), self.tls.clone())
    }

    /// Creates a database, empty but for what `template0` has.
    pub async fn create_database(&self, name: &str) -> Database {
        let quoted = name.replace('"', "\"\"");
        self.execute(&format!("create database \"{quoted}\" template template0")).await;
        self.database(name)
    }

    /// The URL of a database for the role `user` with [`PASSWORD`].
    pub fn url(&self, database: &str, user: &str) -> String {
        self.database(database).with_user(user, PASSWORD).url()
    }

    /// A connection to the database `postgres`.
    pub async fn connect(&self) -> tokio_postgres::Client {
        self.database("postgres").connect().await
    }

    /// Runs statements in the database `postgres`.
    pub async fn execute(&self, sql: &str) {
        self.database("postgres").execute(sql).await;
    }

    /// Rows of a query in the database `postgres`, as `psql -At` prints them.
    pub async fn query_strings(&self, sql: &str) -> Vec<String> {
        self.database("postgres").query_strings(sql).await
    }

    // --- configuration --------------------------------------------------------------------------------------

    /// Changes a setting from the next [`Cluster::reload`] or start on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.settings.insert(name.to_owned(), value.to_owned());
    }

    /// Replaces `pg_hba.conf` from the next [`Cluster::reload`] or start on.
    pub fn set_hba(&self, text: &str) {
        fs::write(self.data().join("pg_hba.conf"), text).expect("write pg_hba.conf");
    }

    /// Has the server read its configuration again; sessions that begin after this see it.
    pub async fn reload(&self) {
        let seen = || self.log().matches("received SIGHUP").count();
        let before = seen();
        self.write_settings();
        signal(self.postmaster_id(), Signal::HUP);
        wait_until("the server reads its configuration", PATIENCE, async || seen() > before).await;
    }

    fn write_settings(&self) {
        let mut text = format!("port = {}\n", self.port());
        for (name, value) in &self.settings {
            text += &format!("{name} = '{}'\n", value.replace('\'', "''"));
        }
        let path = self.data().join("harness.conf");
        fs::write(&path, text).expect("write the settings");
        User::give(&path);
    }

    // --- life -----------------------------------------------------------------------------------------------

    /// Starts a stopped or crashed server and waits until it answers.
    pub async fn start_again(&mut self) {
        assert!(self.postmaster.is_none(), "the server is running already");
        self.write_settings();
        let log = OpenOptions::new().create(true).append(true).open(self.log_path()).expect("open the log");
        self.postmaster = Some(self.spawn_postmaster(&log));
        let database = self.database("postgres");
        let started = std::time::Instant::now();
        while database.readiness().await == Readiness::NotYet {
            let exit = self.postmaster.as_mut().expect("just started").try_wait().expect("wait for the postmaster");
            if let Some(status) = exit {
                self.postmaster = None;
                panic!("PostgreSQL {} ended with {status} at its start:\n{}", self.version, self.log_tail());
            }
            assert!(started.elapsed() < PATIENCE, "PostgreSQL {} does not start:\n{}", self.version, self.log_tail());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn spawn_postmaster(&self, log: &File) -> Child {
        use std::os::unix::process::CommandExt;
        let output = || log.try_clone().expect("share the log");
        command(server_bin(self.version).join("postgres"))
            .arg("-D")
            .arg(self.data())
            .stdout(output())
            .stderr(output())
            .process_group(0)
            .spawn()
            .expect("start postgres")
    }

    /// Stops the server and waits for its end.
    pub async fn stop(&mut self, how: Stop) {
        let mut postmaster = self.postmaster.take().expect("the server is not running");
        let how_signal = match how {
            Stop::Fast => Signal::INT,
            Stop::Immediate => Signal::QUIT,
        };
        signal(postmaster.id(), how_signal);
        let exited = async || postmaster.try_wait().expect("wait for the postmaster").is_some();
        wait_until("the server stops", PATIENCE, exited).await;
    }

    /// Stops the server and starts it.
    pub async fn restart(&mut self) {
        self.stop(Stop::Fast).await;
        self.start_again().await;
    }

    /// Ends every process of the server at once, as a power failure does; the next start recovers.
    pub async fn crash(&mut self) {
        let mut postmaster = self.postmaster.take().expect("the server is not running");
        // First held, so that it starts no process while the others are counted.
        signal(postmaster.id(), Signal::STOP);
        let data = self.data();
        for id in processes_in(&data) {
            signal(id, Signal::KILL);
        }
        postmaster.wait().expect("wait for the postmaster");
        wait_until("every process of the server is gone", PATIENCE, async || processes_in(&data).is_empty()).await;
    }

    fn postmaster_id(&self) -> u32 {
        self.postmaster.as_ref().expect("the server is not running").id()
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join("server.log")
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// A server that was killed leaves its shared memory segment; the seventh line of its pid file names it.
    fn free_shared_memory(&self) {
        let Ok(text) = fs::read_to_string(self.data().join("postmaster.pid")) else { return };
        if let Some(id) = text.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)) {
            command("ipcrm").args(["-m", id]).stderr(std::process::Stdio::null()).status().ok();
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of PostgreSQL {} on port {}:\n{}", self.version, self.port(), self.log_tail());
        }
        if let Some(mut postmaster) = self.postmaster.take() {
            signal(postmaster.id(), Signal::QUIT);
            let exited = || postmaster.try_wait().is_ok_and(|status| status.is_some());
            if !wait_blocking(Duration::from_secs(10), exited) {
                postmaster.kill().ok();
                postmaster.wait().ok();
            }
        }
        let data = self.data();
        let gone = wait_blocking(Duration::from_secs(10), || {
            let left = processes_in(&data);
            left.iter().for_each(|&id| signal(id, Signal::KILL));
            left.is_empty()
        });
        self.free_shared_memory();
        let removed = fs::remove_dir_all(&self.folder);
        if !gone || removed.is_err() {
            eprintln!("{} could not be cleaned up: {removed:?}", self.folder.display());
        }
    }
}

fn append(path: &Path, text: &str) {
    use std::io::Write;
    let mut file = OpenOptions::new().append(true).open(path).expect("open a configuration file");
    file.write_all(text.as_bytes()).expect("write a configuration file");
}
