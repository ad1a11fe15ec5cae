//! The layers: defaults, then the file, then the environment, then the flags; the last one wins.
//!
//! What is wrong is collected, not thrown: a person mends all of it at once.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::environment::Environment;
use super::keys::{self, KEYS, Key, Kind, OTHER_VARIABLES, PREFIX};
use crate::error::{Class, Error, Result};

/// The flags that stand for keys, and `--config`.
#[derive(Clone, Default)]
pub struct Flags {
    /// `--config`
    pub config: Option<PathBuf>,
    /// `--source`
    pub source: Option<String>,
    /// `--target`
    pub target: Option<String>,
    /// `--name`
    pub name: Option<String>,
    /// `--log-level`
    pub log_level: Option<String>,
    /// `--log-format`
    pub log_format: Option<String>,
}

/// Who said it; for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Default,
    File { path: PathBuf, line: usize },
    Environment(String),
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{} line {line}", path.display()),
            Self::Environment(name) => f.write_str(name),
            Self::Flag(name) => f.write_str(name),
        }
    }
}

/// A value, not yet judged.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Value {
    Text(String),
    Number(i64),
    Switch(bool),
    List(Vec<String>),
}

#[derive(Clone)]
pub(super) struct Setting {
    pub(super) value: Value,
    pub(super) origin: Origin,
}

/// Every key's value with who said it; [`Settings::config`] judges them.
#[derive(Clone)]
pub struct Settings {
    values: BTreeMap<String, Setting>,
    pub(super) environment: Environment,
}

/// The file that is read if no other is named.
const DEFAULT_FILE: &str = "pgtandem.toml";

impl Settings {
    /// Reads the file, the environment and the flags.
    ///
    /// # Errors
    /// Class usage: the file cannot be read or is not TOML, a key or a variable is unknown or has the wrong type.
    pub fn gather(flags: &Flags, environment: Environment) -> Result<Self> {
        let mut problems = Problems::default();
        let mut settings = Self { values: defaults(&mut problems), environment };
        let default = Path::new(DEFAULT_FILE);
        // Only a file that is surely not there is left out; anything else is an error that reading it will name.
        let file = match &flags.config {
            Some(file) => Some(file.as_path()),
            None => Some(default).filter(|file| !matches!(file.try_exists(), Ok(false))),
        };
        if let Some(file) = file {
            settings.read_file(file, &mut problems)?;
        }
        settings.read_environment(&mut problems);
        let flag = [
            ("source", "url", &flags.source, "--source"),
            ("target", "url", &flags.target, "--target"),
            ("move", "name", &flags.name, "--name"),
            ("log", "level", &flags.log_level, "--log-level"),
            ("log", "format", &flags.log_format, "--log-format"),
        ];
        for (section, name, value, flag) in flag {
            if let Some(value) = value {
                settings.put(section, name, Value::Text(value.clone()), Origin::Flag(flag));
            }
        }
        problems.into_result()?;
        Ok(settings)
    }

    /// Sets both connection strings, as if they had been flags: for the demo, which makes its own servers.
    #[must_use]
    pub fn with_urls(mut self, source: &str, target: &str) -> Self {
        self.put("source", "url", Value::Text(source.to_owned()), Origin::Flag("--source"));
        self.put("target", "url", Value::Text(target.to_owned()), Origin::Flag("--target"));
        self
    }

    pub(super) fn get(&self, path: &str) -> Option<&Setting> {
        self.values.get(path)
    }

    fn put(&mut self, section: &str, name: &str, value: Value, origin: Origin) {
        self.values.insert(format!("{section}.{name}"), Setting { value, origin });
    }

    fn read_file(&mut self, path: &Path, problems: &mut Problems) -> Result<()> {
        let text = read_text(path)?;
        let line_at = |at: usize| text.get(..at).map_or(1, |before| before.matches('\n').count() + 1);
        // The parser's own report quotes the line, which may hold a password: its message and place have to do.
        let table = DeTable::parse(&text).map_err(|e| {
            let line = e.span().map(|span| format!(" line {}", line_at(span.start))).unwrap_or_default();
            Error::new(Class::Usage, "config_syntax", format!("{}{line}: not TOML: {}", path.display(), e.message()))
                .hint("config/pgtandem.toml is an annotated example of every key")
        })?;
        for (section, body) in table.get_ref() {
            let origin = |at: usize| Origin::File { path: path.to_owned(), line: line_at(at) };
            let (name, at) = (section.get_ref().as_ref(), section.span().start);
            let Some(body) = body.get_ref().as_table() else {
                problems.unknown_key(name, &origin(at));
                continue;
            };
            if !KEYS.iter().any(|key| key.section == name) {
                problems.unknown_section(name, &origin(at));
                continue;
            }
            for (key, value) in body {
                let origin = origin(key.span().start);
                let path = format!("{name}.{}", key.get_ref());
                match keys::find(name, key.get_ref()) {
                    None => problems.unknown_key(&path, &origin),
                    Some(known) => match from_toml(known.kind, value.get_ref()) {
                        Some(value) => self.put(known.section, known.name, value, origin),
                        None => problems.wrong_type(known, &origin),
                    },
                }
            }
        }
        Ok(())
    }

    fn read_environment(&mut self, problems: &mut Problems) {
        let environment = self.environment.clone();
        for variable in environment.with_prefix(PREFIX) {
            let (name, value) = match variable {
                Ok(found) => found,
                Err(name) => {
                    problems.add(format!("{name} is not UTF-8"));
                    continue;
                }
            };
            let other = |known: &&&str| name == **known || (known.ends_with('_') && name.starts_with(**known));
            if OTHER_VARIABLES.iter().find(other).is_some() {
                continue;
            }
            let origin = Origin::Environment(name.to_owned());
            match KEYS.iter().find(|key| key.environment() == name) {
                None => problems.unknown_variable(name),
                Some(key) => match from_text(key.kind, value) {
                    Some(value) => self.put(key.section, key.name, value, origin),
                    None => problems.wrong_type(key, &origin),
                },
            }
        }
    }
}

/// The table's defaults are TOML; a mistake there is found by the first test.
fn defaults(problems: &mut Problems) -> BTreeMap<String, Setting> {
    let mut values = BTreeMap::new();
    for key in KEYS {
        let Some(default) = key.default else { continue };
        match DeValue::parse(default).ok().and_then(|value| from_toml(key.kind, value.get_ref())) {
            Some(value) => drop(values.insert(key.path(), Setting { value, origin: Origin::Default })),
            None => problems.wrong_type(key, &Origin::Default),
        }
    }
    values
}

fn read_text(path: &Path) -> Result<String> {
    let shown = path.display();
    let unreadable =
        |why: String| Error::new(Class::Usage, "config_unreadable", format!("the configuration {shown}: {why}"));
    if path.is_dir() {
        return Err(unreadable("this is a directory, not a file".into()).hint("name the file: --config pgtandem.toml"));
    }
    let bytes = fs::read(path).map_err(|e| {
        let hint = match e.kind() {
            io::ErrorKind::NotFound => "check the path; config/pgtandem.toml is an annotated example",
            _ => "check the permissions of the file and of its folder",
        };
        unreadable(e.to_string()).hint(hint).because(e)
    })?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let line = e.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1;
        unreadable(format!("line {line} is not UTF-8")).hint("save it as UTF-8 text")
    })
}

fn from_toml(kind: Kind, value: &DeValue<'_>) -> Option<Value> {
    match (kind, value) {
        (Kind::Text | Kind::Secret, DeValue::String(text)) => Some(Value::Text(text.to_string())),
        // A size may be plain bytes.
        (Kind::Number | Kind::Text, DeValue::Integer(number)) => {
            i64::from_str_radix(number.as_str(), number.radix()).ok().map(Value::Number)
        }
        (Kind::Switch, DeValue::Boolean(switch)) => Some(Value::Switch(*switch)),
        (Kind::List | Kind::Command, DeValue::Array(items)) => {
            items.iter().map(|item| item.get_ref().as_str().map(str::to_owned)).collect::<Option<_>>().map(Value::List)
        }
        _ => None,
    }
}

fn from_text(kind: Kind, text: &str) -> Option<Value> {
    match kind {
        Kind::Text | Kind::Secret => Some(Value::Text(text.to_owned())),
        Kind::Number => text.trim().parse().ok().map(Value::Number),
        Kind::Switch => text.trim().parse().ok().map(Value::Switch),
        Kind::List => Some(Value::List(
            text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect(),
        )),
        Kind::Command if text.trim_start().starts_with('[') => serde_json::from_str(text).ok().map(Value::List),
        Kind::Command => Some(Value::List(text.split_whitespace().map(str::to_owned).collect())),
    }
}

/// Everything that is wrong, in the order found.
#[derive(Default)]
pub(super) struct Problems(Vec<String>);

impl Problems {
    pub(super) fn add(&mut self, problem: impl Into<String>) {
        self.0.push(problem.into());
    }

    fn unknown(&mut self, what: &str, name: &str, place: &str, nearest: Option<String>) {
        let nearest = nearest.map(|nearest| format!("; did you mean {nearest}?")).unwrap_or_default();
        self.add(format!("unknown {what} {name}{place}{nearest}"));
    }

    fn unknown_key(&mut self, path: &str, origin: &Origin) {
        let (section, name) = path.split_once('.').unwrap_or(("", path));
        // The right section first; then the same name anywhere; then whatever looks alike.
        let nearest =
            keys::nearest(name, KEYS.iter().filter(|key| key.section == section).map(|key| key.name.to_owned()))
                .map(|name| format!("{section}.{name}"))
                .or_else(|| KEYS.iter().find(|key| key.name == name).map(Key::path))
                .or_else(|| keys::nearest(path, KEYS.iter().map(Key::path)));
        self.unknown("key", path, &format!(" ({origin})"), nearest);
    }

    fn unknown_section(&mut self, name: &str, origin: &Origin) {
        let nearest = keys::nearest(name, KEYS.iter().map(|key| key.section.to_owned()));
        self.unknown("section", &format!("[{name}]"), &format!(" ({origin})"), nearest.map(|name| format!("[{name}]")));
    }

    fn unknown_variable(&mut self, name: &str) {
        self.unknown("environment variable", name, "", keys::nearest(name, KEYS.iter().map(Key::environment)));
    }

    fn wrong_type(&mut self, key: &Key, origin: &Origin) {
        let environment = matches!(origin, Origin::Environment(_));
        let wanted = match key.kind {
            Kind::Text | Kind::Secret => "must be a string",
            Kind::Number => "must be a whole number",
            Kind::Switch => "must be true or false",
            Kind::List => "must be a list of strings",
            Kind::Command if environment => "must be a JSON array of strings, or words separated by spaces",
            Kind::Command => "must be a list of strings: the program and its arguments",
        };
        self.add(format!("{} ({origin}) {wanted}", key.path()));
    }

    /// One error for all of them.
    pub(super) fn into_result(self) -> Result<()> {
        let message = match self.0.as_slice() {
            [] => return Ok(()),
            [one] => one.clone(),
            many => {
                let list = many.iter().map(|problem| format!("\n  - {problem}")).collect::<String>();
                format!("{} things are wrong with the configuration:{list}", many.len())
            }
        };
        Err(Error::new(Class::Usage, "configuration", message).hint("docs/configuration.md describes every key"))
    }
}
