//! Which PostgreSQL servers this machine has.
//!
//! Looked for: `.provision/server/<major>/bin` (what `scripts/provision.sh` brings) in the working folder, in the
//! folders above it and above the program; then where the packages of distributions put them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Class, Error, Result};

/// The oldest major version that the demo runs.
const OLDEST: u16 = 13;

/// What a server needs; client programs are not looked for.
const PROGRAMS: [&str; 3] = ["initdb", "pg_ctl", "postgres"];

/// Where packages put servers: the folder and what stands before and after the major version.
const PACKAGES: [(&str, &str, &str); 4] = [
    ("/usr/lib/postgresql", "", "bin"),
    ("/usr", "pgsql-", "bin"),
    ("/opt/homebrew/opt", "postgresql@", "bin"),
    ("/usr/local/opt", "postgresql@", "bin"),
];

/// One version of PostgreSQL on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    /// `13` … `18`
    pub major: u16,
    /// The folder with `initdb`, `pg_ctl` and `postgres`, with links resolved.
    pub bin: PathBuf,
}

/// The versions of the demo: the lowest as the source, the highest as the target; one version plays both if it is alone.
///
/// # Errors
/// Class usage, if there is no PostgreSQL.
pub fn choose(found: &BTreeMap<u16, Installation>) -> Result<(Installation, Installation)> {
    match (found.first_key_value(), found.last_key_value()) {
        (Some((_, lowest)), Some((_, highest))) => Ok((lowest.clone(), highest.clone())),
        _ => Err(Error::new(Class::Usage, "no_postgresql", "no PostgreSQL server programs were found on this machine")
            .hint(
                "in a checkout run `make demo`, which brings them; or install the package postgresql \
                 (Debian, Ubuntu) or postgresql-server (Fedora, RHEL) and start the demo again",
            )),
    }
}

/// Every version found, by major version. What was provisioned goes before what a package installed.
#[must_use]
pub fn find(starting_points: &[PathBuf]) -> BTreeMap<u16, Installation> {
    let mut found = BTreeMap::new();
    let provisioned = starting_points.iter().flat_map(|start| start.ancestors()).map(|f| f.join(".provision/server"));
    for folder in provisioned {
        add_all(&mut found, &folder, "", "bin");
    }
    for (folder, before, after) in PACKAGES {
        add_all(&mut found, Path::new(folder), before, after);
    }
    found
}

/// Where the search for `.provision` starts: the working folder and the folder of the program.
#[must_use]
pub fn starting_points() -> Vec<PathBuf> {
    [std::env::current_dir(), std::env::current_exe()].into_iter().flatten().collect()
}

fn add_all(found: &mut BTreeMap<u16, Installation>, folder: &Path, before: &str, after: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let Some(major) = entry.file_name().to_str().and_then(|name| name.strip_prefix(before)?.parse::<u16>().ok())
        else {
            continue;
        };
        let Ok(bin) = fs::canonicalize(entry.path().join(after)) else { continue };
        if major >= OLDEST && PROGRAMS.iter().all(|program| bin.join(program).is_file()) {
            found.entry(major).or_insert(Installation { major, bin });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(root: &Path, major: &str, programs: &[&str]) {
        let bin = root.join(".provision/server").join(major).join("bin");
        fs::create_dir_all(&bin).unwrap();
        for program in programs {
            fs::write(bin.join(program), "").unwrap();
        }
    }

    #[test]
    fn provisioned_servers_are_found_from_a_folder_below() {
        let root = tempfile::tempdir().unwrap();
        install(root.path(), "14", &PROGRAMS);
        install(root.path(), "12", &PROGRAMS);
        install(root.path(), "99", &["postgres"]);
        let below = root.path().join("target/release");
        fs::create_dir_all(&below).unwrap();

        let found = find(&[below]);

        let bin = fs::canonicalize(root.path().join(".provision/server/14/bin")).unwrap();
        assert_eq!(found.get(&14), Some(&Installation { major: 14, bin }));
        assert!(!found.contains_key(&12), "too old");
        assert!(!found.contains_key(&99), "initdb is missing");
    }

    #[test]
    fn the_lowest_version_is_the_source_and_none_is_an_error_that_helps() {
        let of = |major| (major, Installation { major, bin: PathBuf::from("/x") });
        let (source, target) = choose(&[of(15), of(13), of(18)].into()).unwrap();
        assert_eq!((source.major, target.major), (13, 18));
        let error = choose(&BTreeMap::new()).unwrap_err();
        assert_eq!(error.class(), Class::Usage);
        assert!(error.hint_text().unwrap().contains("make demo"));
    }
}
