//! The environment of the process, read once. Nothing else in pgtandem reads it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use crate::postgres::Ambient;

/// The variables of a process, and who runs it.
#[derive(Clone, Default)]
pub struct Environment {
    variables: BTreeMap<OsString, OsString>,
    user: Option<String>,
}

impl Environment {
    /// Those of this process.
    #[must_use]
    pub fn of_process() -> Self {
        Self { variables: std::env::vars_os().collect(), user: whoami::username().ok() }
    }

    /// Made up, for tests.
    #[must_use]
    pub fn of<const N: usize>(variables: [(&str, &str); N]) -> Self {
        let variables = variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        Self { variables, user: Some("tester".to_owned()) }
    }

    /// A variable, if it is set, is not empty and is text.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(&OsString::from(name)).and_then(|value| value.to_str()).filter(|value| !value.is_empty())
    }

    /// Variables whose name begins with `prefix`; `Err` holds the name of one whose value is not UTF-8.
    pub(super) fn with_prefix<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = Result<(&'a str, &'a str), &'a str>> {
        self.variables
            .iter()
            .filter_map(move |(name, value)| name.to_str().filter(|n| n.starts_with(prefix)).map(|name| (name, value)))
            .map(|(name, value)| value.to_str().map(|value| (name, value)).ok_or(name))
    }

    /// What connection strings take from the machine: `PGPASSFILE`, the home folder and the user. The other `PG*`
    /// variables are left alone: they belong to whoever started us, and would reach both servers.
    #[must_use]
    pub fn ambient(&self) -> Ambient {
        Ambient {
            user: self.user.clone(),
            home: self.get("HOME").map(PathBuf::from),
            passfile: self.get("PGPASSFILE").map(PathBuf::from),
        }
    }

    /// `NO_COLOR` is set to anything: <https://no-color.org>.
    #[must_use]
    pub fn no_color(&self) -> bool {
        self.get("NO_COLOR").is_some()
    }
}
