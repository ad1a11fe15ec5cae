//! Where the servers lie and as whom they run.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::guard::Guard;

/// Who runs the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ServerUser {
    /// Whoever runs this program.
    Same,
    /// An unprivileged user, since this program runs as root.
    Other { uid: u32, gid: u32 },
}

impl ServerUser {
    pub(super) fn choose() -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Ok(Self::Same);
        }
        let passwd = fs::read_to_string("/etc/passwd").context("looking for an unprivileged user")?;
        let named = |name: &str| {
            let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
            let mut numbers = line.split(':').skip(2).map(str::parse::<u32>);
            Some(Self::Other { uid: numbers.next()?.ok()?, gid: numbers.next()?.ok()? })
        };
        ["postgres", "nobody"]
            .into_iter()
            .find_map(named)
            .context("PostgreSQL refuses to run as root, and there is no user postgres or nobody")
    }

    /// A command that this user runs, in a folder that every user may stand in.
    pub(crate) fn command(self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir("/").stdin(Stdio::null());
        if let Self::Other { uid, gid } = self {
            command.uid(uid).gid(gid);
        }
        command
    }

    pub(super) fn give(self, path: &Path) -> Result<()> {
        match self {
            Self::Same => Ok(()),
            Self::Other { uid, gid } => {
                chown(path, Some(uid), Some(gid)).with_context(|| format!("giving {} away", path.display()))
            }
        }
    }
}

/// A folder that the servers' user can pass; removed when dropped.
pub(crate) struct Folder {
    path: PathBuf,
    _guard: Guard,
}

impl Folder {
    pub(super) fn create(user: ServerUser) -> Result<Self> {
        // A TMPDIR of root's own may be closed to others; /tmp is not.
        let parent = if user == ServerUser::Same { std::env::temp_dir() } else { PathBuf::from("/tmp") };
        let made = tempfile::Builder::new().prefix("pgtandem-bench-").tempdir_in(parent).context("making a folder")?;
        let path = made.keep();
        let folder = Self { _guard: Guard::over_folder(path.as_os_str())?, path };
        fs::set_permissions(&folder.path, fs::Permissions::from_mode(0o711)).context("opening the folder")?;
        Ok(folder)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Passwords of all servers, for programs that use libpq.
    pub(crate) fn passfile(&self) -> PathBuf {
        self.path.join("pgpass")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.path).ok();
    }
}

/// The last lines of a file, as one line.
pub(crate) fn tail(file: &Path, lines: usize) -> String {
    let bytes = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    all[all.len().saturating_sub(lines)..].join(" / ")
}

/// Adds to a file that only its owner may read.
pub(super) fn append_private(path: &Path, text: &str) -> Result<()> {
    fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("writing {}", path.display()))
}
