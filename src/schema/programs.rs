//! Finding the pg_dump and pg_restore that fit both servers.
//!
//! The rule, for a source and a target of given major versions:
//!
//! - pg_dump refuses a server newer than itself, so it must not be older than the source;
//! - pg_restore from 17 on begins with `SET transaction_timeout`, which a server before 17 refuses: 17 and later are
//!   only for targets of 17 and later. Apart from that both read and write every version that can be moved;
//! - among what is left, the target's own major version comes first, then the nearest older one, then the
//!   nearest newer one: the closer to the target, the fewer statements that it does not know.
//!
//! An archive is always read by the pg_restore that belongs to the pg_dump which wrote it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use tokio::process::Command;

use crate::error::{Class, Error, Result};

/// A pair of client programs of one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    /// Major version, such as 15.
    pub major: u32,
    /// The folder that holds them.
    pub folder: PathBuf,
}

impl Programs {
    /// Looks in `PATH` and where PostgreSQL's packages put their programs, and chooses by the rule of this module.
    ///
    /// # Errors
    /// Class operator: nothing fits; the message names what was found, the hint the package to install.
    pub async fn find(source_major: u32, target_major: u32) -> Result<Self> {
        let mut found = Vec::new();
        for folder in folders() {
            if let Some(major) = version(&folder).await {
                found.push(Self { major, folder });
            }
        }
        choose(&found, source_major, target_major)
    }

    /// The path of pg_dump.
    #[must_use]
    pub fn pg_dump(&self) -> PathBuf {
        self.folder.join("pg_dump")
    }

    /// The path of pg_restore.
    #[must_use]
    pub fn pg_restore(&self) -> PathBuf {
        self.folder.join("pg_restore")
    }
}

/// Picks the best of `found`; the first of equals wins, so `PATH` goes before the well-known folders.
fn choose(found: &[Programs], source: u32, target: u32) -> Result<Programs> {
    found
        .iter()
        .filter(|programs| programs.major >= source && understood_by(programs.major, target))
        .min_by_key(|programs| rank(programs.major, target))
        .cloned()
        .ok_or_else(|| none_fits(found, source, target))
}

/// Whether a target takes what pg_restore of `major` sends before the first object.
const fn understood_by(major: u32, target: u32) -> bool {
    major <= target || major < 17 || target >= 17
}

/// The target's own version, then older ones from near to far, then newer ones.
const fn rank(major: u32, target: u32) -> (bool, u32) {
    (major > target, major.abs_diff(target))
}

fn none_fits(found: &[Programs], source: u32, target: u32) -> Error {
    let wanted = source.max(target);
    let message = if found.is_empty() {
        format!("pg_dump and pg_restore were not found; moving from {source} to {target} needs version {wanted}")
    } else {
        let list = found
            .iter()
            .map(|programs| format!("{} in {}", programs.major, programs.folder.display()))
            .collect::<Vec<_>>()
            .join(", ");
        format!("no pg_dump and pg_restore fit a move from {source} to {target}; found: {list}")
    };
    Error::new(Class::Operator, "client_programs_missing", message).hint(format!(
        "install the client programs of PostgreSQL {wanted} (Debian and Ubuntu: `apt-get install postgresql-client-{wanted}` \
         from apt.postgresql.org) or put their folder into PATH"
    ))
}

/// Major version of the pair in `folder`; `None` unless both are there, answer, and agree.
async fn version(folder: &Path) -> Option<u32> {
    let dump = ask_version(&folder.join("pg_dump")).await?;
    let restore = ask_version(&folder.join("pg_restore")).await?;
    (dump == restore).then_some(dump)
}

async fn ask_version(program: &Path) -> Option<u32> {
    // Debian's /usr/bin/pg_dump is a script that picks a version by the servers of the machine; the real programs
    // are found in their own folders.
    if program.canonicalize().ok()?.file_name() == Some(OsStr::new("pg_wrapper")) {
        return None;
    }
    let output = Command::new(program).arg("--version").kill_on_drop(true).output().await.ok()?;
    output.status.success().then(|| parse_version(&String::from_utf8_lossy(&output.stdout))).flatten()
}

/// `pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)` is 15; `18beta1` is 18.
fn parse_version(text: &str) -> Option<u32> {
    let number = text.split_once("(PostgreSQL)")?.1.trim_start();
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// Every folder to look into, each once.
fn folders() -> Vec<PathBuf> {
    // PATH belongs to the operating system, not to our configuration.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut all: Vec<PathBuf> = std::env::split_paths(&path).collect();
    if let Some(home) = std::env::current_exe().ok().as_deref().and_then(Path::parent) {
        all.extend(versions(&home.join("../client"), "", "bin"));
    }
    all.extend(versions(Path::new(".provision/client"), "", "bin"));
    all.extend(versions(Path::new("/usr/lib/postgresql"), "", "bin"));
    all.extend(versions(Path::new("/usr"), "pgsql-", "bin"));
    all.extend(versions(Path::new("/usr/libexec"), "postgresql", ""));
    all.extend(versions(Path::new("/opt/homebrew/opt"), "postgresql@", "bin"));
    all.extend(["/opt/homebrew/opt/libpq/bin", "/usr/local/pgsql/bin"].map(PathBuf::from));
    let mut seen = std::collections::HashSet::new();
    all.retain(|folder| folder.join("pg_restore").is_file() && seen.insert(folder.clone()));
    all
}

/// `<parent>/<prefix>*/<inner>`, sorted by name.
fn versions(parent: &Path, prefix: &str, inner: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(parent) else { return Vec::new() };
    let mut folders: Vec<PathBuf> = entries
        .filter_map(std::result::Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path().join(inner))
        .collect();
    folders.sort();
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(majors: &[u32], source: u32, target: u32) -> Option<u32> {
        let found: Vec<_> =
            majors.iter().map(|&major| Programs { major, folder: format!("/{major}").into() }).collect();
        choose(&found, source, target).ok().map(|programs| programs.major)
    }

    #[test]
    fn the_targets_own_version_comes_first() {
        assert_eq!(chosen(&[15, 16, 18], 13, 16), Some(16));
        assert_eq!(chosen(&[15, 16, 18], 15, 15), Some(15));
    }

    #[test]
    fn without_it_the_nearest_that_can_read_the_source() {
        assert_eq!(chosen(&[15, 16, 18], 13, 17), Some(16));
        assert_eq!(chosen(&[15, 16, 18], 16, 17), Some(16));
        assert_eq!(chosen(&[15, 18], 16, 17), Some(18));
        assert_eq!(chosen(&[15, 16, 18], 13, 13), Some(15));
    }

    #[test]
    fn what_the_target_would_refuse_is_no_choice() {
        assert_eq!(chosen(&[17, 18], 13, 15), None);
        assert_eq!(chosen(&[15], 16, 16), None);
    }

    #[test]
    fn the_refusal_names_what_was_found_and_what_to_install() {
        let found = [Programs { major: 13, folder: "/opt/13".into() }];
        let error = choose(&found, 16, 17).unwrap_err();
        assert!(error.to_string().contains("13 in /opt/13"), "{error}");
        assert!(error.hint_text().unwrap().contains("postgresql-client-17"));
    }

    #[test]
    fn versions_are_read_as_the_programs_print_them() {
        assert_eq!(parse_version("pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"), Some(15));
        assert_eq!(parse_version("pg_restore (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(parse_version("pg_dump (EnterpriseDB)"), None);
    }
}
