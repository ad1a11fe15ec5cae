//! The password file, as libpq reads it.
//! See <https://www.postgresql.org/docs/current/libpq-pgpass.html>.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::postgres::conninfo::{Address, ConnInfo, Host, Password};

/// What the file had for a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// A line fits.
    Password(Password),
    /// No file, or no line that fits.
    Nothing,
    /// There is a file, but it cannot be used; the text says why and what to do.
    Unusable(String),
}

/// Asks the file at `path` for the password of a connection. Read each time: passwords rotate.
#[must_use]
pub fn ask(path: &Path, host: &Host, database: &str, user: &str) -> Found {
    let Ok(meta) = fs::metadata(path) else { return Found::Nothing };
    let shown = path.display();
    if !meta.is_file() {
        return Found::Unusable(format!("the password file {shown} is not a plain file and was not read"));
    }
    if meta.mode() & 0o077 != 0 {
        return Found::Unusable(format!(
            "the password file {shown} was not read because others can read it too (mode {:04o}): chmod 0600 {shown}",
            meta.mode() & 0o7777
        ));
    }
    match fs::read(path) {
        Ok(bytes) => match lookup(&String::from_utf8_lossy(&bytes), host, database, user) {
            Some(password) => Found::Password(password),
            None => Found::Nothing,
        },
        Err(e) => Found::Unusable(format!("the password file {shown} cannot be read: {e}")),
    }
}

/// The password of a connection string: its own, or what the password file has for its first host.
#[must_use]
pub fn resolve(conninfo: &ConnInfo) -> Option<Password> {
    if let Some(password) = conninfo.password() {
        return Some(password.clone());
    }
    match ask(conninfo.passfile()?, conninfo.hosts().first()?, conninfo.database(), conninfo.user()) {
        Found::Password(password) => Some(password),
        Found::Nothing => None,
        Found::Unusable(why) => {
            tracing::warn!("{why}");
            None
        }
    }
}

/// The first line that fits, of `hostname:port:database:username:password`.
fn lookup(text: &str, host: &Host, database: &str, user: &str) -> Option<Password> {
    let name = match &host.address {
        // The default socket folder goes by the name of this machine.
        Address::Unix(folder)
            if matches!(folder.to_str(), Some("/var/run/postgresql" | "/run/postgresql" | "/tmp")) =>
        {
            "localhost".to_owned()
        }
        _ => host.name(),
    };
    let port = host.port.to_string();
    let wanted = [name.as_str(), &port, database, user];
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = split(line.trim_end_matches('\r'));
        let (password, pattern) = fields.split_last()?;
        let fits = pattern.len() == wanted.len()
            && pattern.iter().zip(wanted).all(|(field, wanted)| field.raw == "*" || field.text == wanted);
        (fits && !password.text.is_empty()).then(|| Password::new(password.text.clone()))
    })
}

struct Field {
    raw: String,
    text: String,
}

/// Splits at colons that no backslash protects; the fifth field is the rest of the line.
fn split(line: &str) -> Vec<Field> {
    let mut fields = vec![Field { raw: String::new(), text: String::new() }];
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        let full = fields.len() == 5;
        let Some(field) = fields.last_mut() else { break };
        match c {
            '\\' => {
                field.raw.push(c);
                if let Some(escaped) = chars.next() {
                    field.raw.push(escaped);
                    field.text.push(escaped);
                }
            }
            ':' if !full => fields.push(Field { raw: String::new(), text: String::new() }),
            c => {
                field.raw.push(c);
                field.text.push(c);
            }
        }
    }
    if fields.len() == 5 { fields } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn host(name: &str) -> Host {
        let address = if name.starts_with('/') { Address::Unix(name.into()) } else { Address::Tcp(name.into()) };
        Host { address, numeric: None, port: 5432 }
    }

    fn secret(text: &str, host: &Host) -> Option<String> {
        lookup(text, host, "shop", "app:1").map(|password| password.expose().to_owned())
    }

    #[test]
    fn the_first_line_that_fits_counts() {
        let text =
            "# db:5432:shop:app\\:1:comment\nother:*:*:*:no\ndb:5432:shop:app\\:1:it\\:s \\\\ me:too\n*:*:*:*:late";
        assert_eq!(secret(text, &host("db")).unwrap(), "it:s \\ me:too");
        assert_eq!(secret(text, &host("elsewhere")).unwrap(), "late");
    }

    #[test]
    fn wildcards_are_whole_fields_and_escaped_ones_are_stars() {
        assert_eq!(secret("d*:*:*:*:x", &host("db")), None);
        assert_eq!(secret("\\*:*:*:*:x", &host("db")), None);
        assert_eq!(secret("localhost:*:*:*:x", &host("/var/run/postgresql")).unwrap(), "x");
        assert_eq!(secret("/srv/pg:*:*:*:x", &host("/srv/pg")).unwrap(), "x");
        assert_eq!(secret("db:5432:shop:app\\:1", &host("db")), None);
    }

    #[test]
    fn a_file_that_others_can_read_is_not_used() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "*:*:*:*:x").unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o644)).unwrap();
        let Found::Unusable(why) = ask(file.path(), &host("db"), "d", "u") else { panic!("it was read") };
        assert!(why.contains("chmod 0600"), "{why}");
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(ask(file.path(), &host("db"), "d", "u"), Found::Password(Password::new("x")));
        assert_eq!(ask(Path::new("/nowhere"), &host("db"), "d", "u"), Found::Nothing);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text: String) {
            let _found = secret(&text, &host("db"));
        }

        #[test]
        fn any_password_can_be_written(password in "[^\r\n]{1,20}") {
            let line = format!("*:*:*:*:{}", password.replace('\\', "\\\\").replace(':', "\\:"));
            prop_assert_eq!(secret(&line, &host("db")), Some(password));
        }
    }
}
