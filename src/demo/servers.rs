//! A throw-away PostgreSQL server: a data directory of its own, a free port on the loopback, a random password.
//!
//! PostgreSQL refuses to run as root; started by root, the server runs as `postgres` or, where there is none, as
//! `nobody`. Dropping a [`Cluster`] stops the server at once; its folder belongs to the [`Folder`] of the demo.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio_postgres::{Client, Config, NoTls};

use super::guard::Guard;
use super::installation::Installation;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::Side;
use crate::postgres::server::PINNED_SETTINGS;

/// The superuser of both servers, as whom the move connects.
pub const SUPERUSER: &str = "postgres";

/// How long a server may take to start.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Another program may take a port between our look and the server's start; then another one is tried.
const START_ATTEMPTS: usize = 3;

/// What both servers are started with, beside their port.
const SETTINGS: [&str; 14] = [
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "wal_level=logical",
    "max_wal_senders=10",
    "max_replication_slots=10",
    "max_connections=60",
    "shared_buffers=256MB",
    "maintenance_work_mem=128MB",
    "max_wal_size=4GB",
    "checkpoint_timeout=15min",
    "autovacuum_naptime=10s",
    "log_line_prefix=%m [%p] %q%a ",
    "log_min_messages=warning",
    "logging_collector=off",
];

/// Who runs the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerUser {
    /// Whoever runs the demo.
    Same,
    /// An unprivileged user, since the demo runs as root.
    Other {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
}

impl ServerUser {
    /// Chooses the user: root's servers run as `postgres` or `nobody`.
    ///
    /// # Errors
    /// Class usage: root, and neither user exists.
    pub fn choose() -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Ok(Self::Same);
        }
        let passwd = fs::read_to_string("/etc/passwd").doing(|| "looking for an unprivileged user")?;
        ["postgres", "nobody"].into_iter().find_map(|name| Self::named(&passwd, name)).ok_or_else(|| {
            Error::new(Class::Usage, "no_unprivileged_user", "PostgreSQL refuses to run as root")
                .hint("run the demo as an ordinary user, or create a user postgres")
        })
    }

    fn named(passwd: &str, name: &str) -> Option<Self> {
        let fields: Vec<&str> =
            passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|f| f[0] == name)?;
        Some(Self::Other { uid: fields.get(2)?.parse().ok()?, gid: fields.get(3)?.parse().ok()? })
    }

    /// A command that this user runs, in a folder that every user may stand in.
    #[must_use]
    pub fn command(self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir("/").stdin(Stdio::null());
        if let Self::Other { uid, gid } = self {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// Hands a file or an empty folder over.
    fn give(self, path: &Path) -> Result<()> {
        match self {
            Self::Same => Ok(()),
            Self::Other { uid, gid } => {
                chown(path, Some(uid), Some(gid)).doing(|| format!("giving {} away", path.display()))
            }
        }
    }
}

/// The folder of a demo, removed when dropped, and with it the servers' data.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    guard: Option<Guard>,
}

impl Folder {
    /// A new folder that the servers' user can reach.
    ///
    /// # Errors
    /// The machine's: no room, no permission.
    pub fn create(user: ServerUser) -> Result<Self> {
        // A TMPDIR of root's own may be closed to others; /tmp is not.
        let parent = if user == ServerUser::Same { std::env::temp_dir() } else { PathBuf::from("/tmp") };
        let made = tempfile::Builder::new().prefix("pgtandem-demo-").tempdir_in(parent).doing(|| "making a folder")?;
        let path = made.keep();
        let guard = Guard::over_folder(path.as_os_str())?;
        let folder = Self { path, guard: Some(guard) };
        // Others may pass, not list: the folders of the two servers belong to the servers' user.
        fs::set_permissions(&folder.path, fs::Permissions::from_mode(0o711)).doing(|| "opening the folder")?;
        Ok(folder)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves it in place.
    pub fn keep(mut self) -> PathBuf {
        self.guard = None;
        std::mem::take(&mut self.path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            fs::remove_dir_all(&self.path).ok();
        }
    }
}

/// A running server; stopped when dropped.
pub struct Cluster {
    side: Side,
    installation: Installation,
    user: ServerUser,
    data: PathBuf,
    port: u16,
    password: String,
    passfile: PathBuf,
    /// `None` once it is kept.
    running: Option<Running>,
}

struct Running {
    postmaster: Child,
    _guard: Guard,
}

impl Cluster {
    /// Initialises and starts a server in `folder`.
    ///
    /// # Errors
    /// initdb or the server refuse; the end of what they said is part of the message.
    pub async fn start(side: Side, installation: &Installation, user: ServerUser, folder: &Folder) -> Result<Self> {
        let room = folder.path().join(side.as_str());
        fs::create_dir(&room).doing(|| format!("making {}", room.display()))?;
        user.give(&room)?;
        let password = random_password()?;
        let mut cluster = Self {
            side,
            installation: installation.clone(),
            user,
            data: room.join("data"),
            port: 0,
            password,
            passfile: folder.path().join("pgpass"),
            running: None,
        };
        cluster.initialise(&room).await.doing(|| format!("initialising the {} server", side.as_str()))?;
        cluster.launch().await.doing(|| format!("starting the {} server", side.as_str()))?;
        cluster.write_passfile()?;
        Ok(cluster)
    }

    async fn initialise(&self, room: &Path) -> Result<()> {
        let password_file = room.join("password");
        write_private(&password_file, &self.password)?;
        self.user.give(&password_file)?;
        let mut initdb = self.user.command(self.program("initdb"));
        initdb.args(["--username", SUPERUSER, "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"]);
        initdb.arg("--pwfile").arg(&password_file).arg("--pgdata").arg(&self.data);
        let output = tokio::process::Command::from(initdb).output().await.doing(|| "running initdb")?;
        fs::remove_file(&password_file).doing(|| "removing the password file")?;
        if output.status.success() {
            return Ok(());
        }
        Err(Error::new(Class::Wait, "initdb_failed", format!("initdb: {}", tail(&output.stderr, 5)))
            .hint("the message is initdb's; often the disk is full, or the server's user may not read its programs"))
    }

    async fn launch(&mut self) -> Result<()> {
        for attempt in 1.. {
            self.port = free_port()?;
            self.running = Some(self.spawn()?);
            match self.wait_until_up().await {
                Ok(()) => break,
                Err(error) if attempt == START_ATTEMPTS => return Err(error),
                Err(_) => self.stop(),
            }
        }
        Ok(())
    }

    fn spawn(&self) -> Result<Running> {
        let log = fs::File::create(self.log()).doing(|| "opening the server's log")?;
        let mut postgres = self.user.command(self.program("postgres"));
        postgres.arg("-D").arg(&self.data).arg("-p").arg(self.port.to_string());
        for setting in SETTINGS {
            postgres.args(["-c", setting]);
        }
        // A group of its own: an interrupt from the terminal is the demo's to handle.
        postgres.process_group(0).stdout(log.try_clone()?).stderr(log);
        let postmaster = postgres.spawn().doing(|| "starting postgres")?;
        let guard = Guard::over_server(self.user, self.program("pg_ctl").as_os_str(), self.data.as_os_str())?;
        Ok(Running { postmaster, _guard: guard })
    }

    async fn wait_until_up(&mut self) -> Result<()> {
        let started = Instant::now();
        loop {
            let Err(error) = self.connect(SUPERUSER, "postgres").await else { return Ok(()) };
            let ended = match &mut self.running {
                Some(running) => running.postmaster.try_wait().doing(|| "looking after postgres")?,
                None => None,
            };
            if let Some(status) = ended {
                let log = fs::read(self.log()).unwrap_or_default();
                let said = format!("postgres ended with {status}: {}", tail(&log, 5));
                return Err(Error::new(Class::Wait, "server_did_not_start", said));
            }
            if started.elapsed() > START_DEADLINE {
                return Err(error.doing(format!("waiting {START_DEADLINE:?} for postgres")));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// One line a server in libpq's password file, so that no printed URL and no configuration holds a password.
    fn write_passfile(&self) -> Result<()> {
        let mut text = fs::read_to_string(&self.passfile).unwrap_or_default();
        text.push_str(&format!("127.0.0.1:{}:*:*:{}\n", self.port, self.password));
        write_private(&self.passfile, &text)
    }

    /// A session of the given role, under the settings that every reader of rows pins.
    ///
    /// # Errors
    /// The connection's.
    pub async fn connect(&self, role: &str, database: &str) -> Result<Client> {
        let client = connect(&self.config(role, database)).await.doing(|| format!("connecting to {self}"))?;
        client.batch_execute(PINNED_SETTINGS).await.doing(|| "pinning settings")?;
        Ok(client)
    }

    /// How a client of the application connects. All roles have the superuser's password.
    #[must_use]
    pub fn config(&self, role: &str, database: &str) -> Config {
        let mut config = Config::new();
        config
            .host("127.0.0.1")
            .port(self.port)
            .user(role)
            .password(&self.password)
            .dbname(database)
            .application_name("pgtandem demo")
            .connect_timeout(Duration::from_secs(5));
        config
    }

    /// A connection string that works without a password in it: libpq reads the file that it names.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        format!(
            "postgresql://{SUPERUSER}@127.0.0.1:{}/{database}?passfile={}",
            self.port,
            percent_encoded(&self.passfile.to_string_lossy())
        )
    }

    /// Which side it plays.
    #[must_use]
    pub fn side(&self) -> Side {
        self.side
    }

    /// The TCP port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The password of every role; for `CREATE ROLE` only.
    #[must_use]
    pub fn password(&self) -> &str {
        &self.password
    }

    /// `13`, `18`
    #[must_use]
    pub fn major(&self) -> u16 {
        self.installation.major
    }

    /// Lets the server run on after the demo; its process id.
    pub fn keep(mut self) -> Option<u32> {
        self.running.take().map(|running| running.postmaster.id())
    }

    fn program(&self, name: &str) -> PathBuf {
        self.installation.bin.join(name)
    }

    fn log(&self) -> PathBuf {
        self.data.with_file_name("log")
    }

    fn stop(&mut self) {
        let Some(mut running) = self.running.take() else { return };
        let mut pg_ctl = self.user.command(self.program("pg_ctl"));
        pg_ctl
            .args(["stop", "-s", "-m", "immediate", "-D"])
            .arg(&self.data)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if !pg_ctl.status().is_ok_and(|status| status.success()) {
            running.postmaster.kill().ok();
        }
        running.postmaster.wait().ok();
    }
}

impl std::fmt::Display for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the {} (PostgreSQL {}, port {})", self.side.as_str(), self.installation.major, self.port)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Connects, and lets the connection's task run until the client is dropped.
///
/// # Errors
/// The connection's.
pub async fn connect(config: &Config) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(async move {
        // What ends a connection is told to the client's next call as well.
        connection.await.ok();
    });
    Ok(client)
}

/// A port that was free a moment ago.
///
/// # Errors
/// The machine's.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).doing(|| "looking for a free port")?;
    Ok(listener.local_addr().doing(|| "looking for a free port")?.port())
}

/// Writes a file that only its owner may read.
///
/// # Errors
/// The machine's.
pub fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .doing(|| format!("writing {}", path.display()))
}

/// The last lines of what a program said, as one line.
#[must_use]
pub fn tail(said: &[u8], lines: usize) -> String {
    let text = String::from_utf8_lossy(said);
    let all: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    all[all.len().saturating_sub(lines)..].join(" / ")
}

fn random_password() -> Result<String> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).doing(|| "making a password")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn percent_encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_comes_from_the_password_file() {
        let passwd = "root:x:0:0::/root:/bin/sh\npostgres:x:101:104:,,,:/var/lib/postgresql:/bin/bash\n";
        assert_eq!(ServerUser::named(passwd, "postgres"), Some(ServerUser::Other { uid: 101, gid: 104 }));
        assert_eq!(ServerUser::named(passwd, "nobody"), None);
    }

    #[test]
    fn a_folder_goes_with_its_owner_and_stays_when_kept() {
        let gone = Folder::create(ServerUser::Same).unwrap();
        let path = gone.path().to_owned();
        drop(gone);
        assert!(!path.exists());

        let path = Folder::create(ServerUser::Same).unwrap().keep();
        assert!(path.exists());
        fs::remove_dir(path).unwrap();
    }

    #[test]
    fn the_end_of_a_log_is_one_line() {
        assert_eq!(tail(b"one\ntwo\n\n three \n", 2), "two / three");
        assert_eq!(tail(b"", 2), "");
    }

    #[test]
    fn a_path_fits_into_a_url() {
        assert_eq!(percent_encoded("/tmp/a b?&/pgpass"), "/tmp/a%20b%3F%26/pgpass");
    }
}
