//! A source and two targets, or one: throw-away servers on the loopback, with the same settings for everyone.
//!
//! PostgreSQL refuses to run as root; started by root, the servers run as `postgres` or, where there is none, as `nobody`.
//! Nothing is left of them, also when this program is killed.

mod room;

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio_postgres::{Client, Config, NoTls};

use self::room::append_private;
pub(crate) use self::room::{Folder, ServerUser, tail};
use crate::guard::Guard;
use crate::programs::{Installation, Programs};
use crate::say;

pub(crate) const SUPERUSER: &str = "postgres";

/// How long a server may take to start.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// What all servers are started with, beside their port. Everything else is PostgreSQL's default, `fsync` included.
pub(crate) const SETTINGS: [(&str, &str); 13] = [
    ("listen_addresses", "127.0.0.1"),
    ("unix_socket_directories", ""),
    ("wal_level", "logical"),
    ("max_wal_senders", "20"),
    ("max_replication_slots", "20"),
    ("max_slot_wal_keep_size", "-1"),
    ("shared_buffers", "512MB"),
    ("maintenance_work_mem", "256MB"),
    ("max_wal_size", "64GB"),
    ("checkpoint_timeout", "1d"),
    ("autovacuum", "off"),
    ("log_min_messages", "warning"),
    ("log_line_prefix", "%m [%p] %q%a "),
];

/// The three servers and the folder that they lie in.
pub(crate) struct Servers {
    // In this order they are dropped: the servers are stopped before their folder goes.
    pub(crate) source: Server,
    /// Where everyone but pgtandem applies.
    pub(crate) target: Server,
    /// Where pgtandem applies: its state is part of the target.
    pub(crate) pgtandem_target: Server,
    pub(crate) folder: Folder,
}

impl Servers {
    pub(crate) async fn start(programs: &Programs) -> Result<Self> {
        say(format!("starting a source {} and two targets {}", programs.source.major, programs.target.major));
        let user = ServerUser::choose()?;
        let folder = Folder::create(user)?;
        let plugins: Vec<_> = programs.plugins().map(library_path).into_iter().collect();
        let source = Server::start("source", &programs.source, &plugins, user, &folder).await?;
        let target = Server::start("target", &programs.target, &[], user, &folder).await?;
        let pgtandem_target = Server::start("pgtandem-target", &programs.target, &[], user, &folder).await?;
        Ok(Self { source, target, pgtandem_target, folder })
    }
}

/// Where the server finds decoding plugins beside its own.
fn library_path(plugins: &Path) -> (&'static str, String) {
    ("dynamic_library_path", format!("$libdir:{}", plugins.display()))
}

/// A source and a target for whatever begins with an empty target.
pub(crate) struct Pair {
    // In this order they are dropped, as above.
    pub(crate) source: Server,
    pub(crate) target: Server,
    pub(crate) folder: Folder,
}

impl Pair {
    /// `settings` are for both, beside [`SETTINGS`].
    pub(crate) async fn start(programs: &Programs, settings: &[(&str, String)]) -> Result<Self> {
        say(format!("starting a source {} and a target {}", programs.source.major, programs.target.major));
        let user = ServerUser::choose()?;
        let folder = Folder::create(user)?;
        let source = Server::start("source", &programs.source, settings, user, &folder).await?;
        let target = Server::start("target", &programs.target, settings, user, &folder).await?;
        Ok(Self { source, target, folder })
    }
}

/// A running server; stopped when dropped.
pub(crate) struct Server {
    name: &'static str,
    pub(crate) major: u16,
    bin: PathBuf,
    user: ServerUser,
    data: PathBuf,
    port: u16,
    password: String,
    passfile: PathBuf,
    postmaster: Child,
    _guard: Guard,
}

impl Server {
    /// `more` are settings beside [`SETTINGS`].
    async fn start(
        name: &'static str,
        installed: &Installation,
        more: &[(&str, String)],
        user: ServerUser,
        folder: &Folder,
    ) -> Result<Self> {
        let starting = || format!("starting the {name} (PostgreSQL {})", installed.major);
        let room = folder.path().join(name);
        fs::create_dir(&room).with_context(starting)?;
        user.give(&room)?;
        let (data, password, port) = (room.join("data"), random_password()?, free_port()?);
        initialise(installed, user, &room, &data, &password).await.with_context(starting)?;
        let log = fs::File::create(room.join("log")).with_context(starting)?;
        let mut postgres = user.command(installed.bin.join("postgres"));
        postgres.arg("-D").arg(&data).arg("-p").arg(port.to_string());
        for (setting, value) in SETTINGS {
            postgres.arg("-c").arg(format!("{setting}={value}"));
        }
        for (setting, value) in more {
            postgres.arg("-c").arg(format!("{setting}={value}"));
        }
        // A group of its own: an interrupt from the terminal is for this program.
        postgres.process_group(0).stdout(log.try_clone()?).stderr(log);
        let guard = Guard::over_server(user, installed.bin.join("pg_ctl").as_os_str(), data.as_os_str())?;
        let postmaster = postgres.spawn().with_context(starting)?;
        let mut server = Self {
            name,
            major: installed.major,
            bin: installed.bin.clone(),
            user,
            data,
            port,
            password,
            passfile: folder.passfile(),
            postmaster,
            _guard: guard,
        };
        server.wait_until_up().await.with_context(starting)?;
        append_private(&server.passfile, &format!("127.0.0.1:{port}:*:*:{}\n", server.password))?;
        Ok(server)
    }

    async fn wait_until_up(&mut self) -> Result<()> {
        let started = Instant::now();
        loop {
            let Err(error) = self.connect("postgres").await else { return Ok(()) };
            if let Some(status) = self.postmaster.try_wait().context("looking after postgres")? {
                bail!("postgres ended with {status}: {}", self.last_words());
            }
            if started.elapsed() > START_DEADLINE {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The process whose children are all others of the server.
    pub(crate) fn postmaster(&self) -> u32 {
        self.postmaster.id()
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn password(&self) -> &str {
        &self.password
    }

    /// The end of the server's log.
    pub(crate) fn last_words(&self) -> String {
        tail(&self.data.with_file_name("log"), 5)
    }

    pub(crate) async fn connect(&self, database: &str) -> Result<Client> {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.port).user(SUPERUSER).password(&self.password).dbname(database);
        config.application_name("bench").connect_timeout(Duration::from_secs(5));
        let (client, connection) =
            config.connect(NoTls).await.with_context(|| format!("connecting to {database} of the {}", self.name))?;
        tokio::spawn(async move {
            // What ends a connection is told to the client's next call as well.
            connection.await.ok();
        });
        Ok(client)
    }

    /// Runs statements in a session of their own.
    pub(crate) async fn execute(&self, database: &str, sql: &str) -> Result<()> {
        let client = self.connect(database).await?;
        client.batch_execute(sql).await.with_context(|| format!("{database} of the {}: {}", self.name, shortened(sql)))
    }

    /// A connection string without a password in it: libpq, and pgtandem, read the file that it names.
    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgresql://{SUPERUSER}@127.0.0.1:{}/{database}?passfile={}", self.port, self.passfile.display())
    }

    /// The keyword form with the password, for a subscription on a server of another user.
    pub(crate) fn conninfo_with_password(&self, database: &str) -> String {
        format!("host=127.0.0.1 port={} user={SUPERUSER} dbname={database} password={}", self.port, self.password)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut pg_ctl = self.user.command(self.bin.join("pg_ctl"));
        pg_ctl.args(["stop", "-s", "-m", "immediate", "-D"]).arg(&self.data);
        if !pg_ctl.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
            self.postmaster.kill().ok();
        }
        self.postmaster.wait().ok();
    }
}

async fn initialise(
    installed: &Installation,
    user: ServerUser,
    room: &Path,
    data: &Path,
    password: &str,
) -> Result<()> {
    let password_file = room.join("password");
    append_private(&password_file, password)?;
    user.give(&password_file)?;
    let mut initdb = user.command(installed.bin.join("initdb"));
    initdb.args(["--username", SUPERUSER, "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"]);
    initdb.arg("--pwfile").arg(&password_file).arg("--pgdata").arg(data);
    let output = tokio::process::Command::from(initdb).output().await.context("running initdb")?;
    fs::remove_file(&password_file).context("removing the password file")?;
    if !output.status.success() {
        bail!("initdb: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("looking for a free port")?;
    Ok(listener.local_addr().context("looking for a free port")?.port())
}

fn random_password() -> Result<String> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).context("making a password")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn shortened(sql: &str) -> String {
    let words: Vec<&str> = sql.split_whitespace().take(12).collect();
    words.join(" ")
}
