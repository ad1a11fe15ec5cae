//! Settings to a [`Config`]: ranges, words and connection strings.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::settings::{Problems, Setting, Settings, Value};
use super::units::{parse_duration, parse_size, show_duration, show_size};
use super::{
    Config, Copy, CopyMethod, Cutover, CutoverVerify, Ddl, Engine, Fence, Follow, Log, LogFormat, MissingRow, MoveName,
    Scope, TablePattern, WithoutIdentity,
};
use crate::error::Result;
use crate::postgres::ConnInfo;

/// A value that the contract has and this version does not do yet.
struct NotYet {
    key: &'static str,
    applies: fn(&Value) -> bool,
    instead: &'static str,
}

/// Refused by name, so that nothing is silently left out. Whoever builds one of them deletes its line.
const NOT_YET: &[NotYet] = &[
    NotYet { key: "cutover.fence", applies: |value| is_text(value, "read-only"), instead: "use \"lock\" or \"none\"" },
    NotYet {
        key: "cutover.pgbouncer",
        applies: |value| !is_text(value, ""),
        instead: "leave it empty and use cutover.hook",
    },
];

fn is_text(value: &Value, text: &str) -> bool {
    matches!(value, Value::Text(given) if given == text)
}

const MIB: u64 = 1 << 20;

impl Settings {
    /// The whole configuration, with both connection strings.
    ///
    /// # Errors
    /// Class usage, with everything that is wrong: a value out of range, a connection string that is missing or
    /// cannot be read, something that this version does not do.
    pub fn config(&self) -> Result<Config> {
        let mut judge = Judge { settings: self, problems: Problems::default() };
        let config = judge.config();
        judge.refuse_what_is_not_built();
        judge.problems.into_result()?;
        // A part is missing only together with a problem.
        config.ok_or_else(|| crate::Error::bug("a configuration without problems is incomplete"))
    }

    /// `[log]` alone: needed before anything else is judged.
    ///
    /// # Errors
    /// Class usage: a level or format that is none.
    pub fn log(&self) -> Result<Log> {
        let mut judge = Judge { settings: self, problems: Problems::default() };
        let log = judge.log();
        judge.problems.into_result()?;
        log.ok_or_else(|| crate::Error::bug("a log configuration without problems is incomplete"))
    }
}

struct Judge<'a> {
    settings: &'a Settings,
    problems: Problems,
}

impl Judge<'_> {
    fn config(&mut self) -> Option<Config> {
        // Each part is judged before any is asked for, so that all problems are found.
        let name = self.parsed("move.name", "must match [a-z0-9_]{1,40}", |text| MoveName::new(text).ok());
        let large_objects = self.switch("move.large_objects");
        let scope = Scope { include: self.patterns("move.include"), exclude: self.patterns("move.exclude") };
        let source = self.required_url("source.url", "--source");
        let source_from_target = self.url("source.url_from_target");
        let target = self.required_url("target.url", "--target");
        let (copy, follow, cutover) = (self.copy(), self.follow(), self.cutover());
        let http =
            self.parsed("http.listen", "must be an address with a port, such as 127.0.0.1:8432, or empty", listen);
        let log = self.log();
        Some(Config {
            name: name?,
            scope,
            large_objects: large_objects?,
            source: source?,
            source_from_target: source_from_target?,
            target: target?,
            copy: copy?,
            follow: follow?,
            cutover: cutover?,
            http: http?,
            log: log?,
        })
    }

    fn copy(&mut self) -> Option<Copy> {
        let method = self
            .word("copy.method", &[("copy", CopyMethod::Copy), ("dump", CopyMethod::Dump), ("none", CopyMethod::None)]);
        let workers = self.count("copy.workers", 1..=64);
        let index_workers = self.count("copy.index_workers", 1..=64);
        let split_above = self.size("copy.split_above", MIB..=u64::MAX);
        let first = self.patterns("copy.first");
        let max_bytes_per_second = self.size("copy.max_bytes_per_second", 0..=u64::MAX);
        if max_bytes_per_second.is_some_and(|most| (1..64 << 10).contains(&most)) {
            self.problems.add("copy.max_bytes_per_second: must be 0, or at least 64KiB");
        }
        let keep_archive = self.switch("copy.keep_archive");
        Some(Copy {
            method: method?,
            workers: workers?,
            index_workers: index_workers?,
            split_above: split_above?,
            first,
            max_bytes_per_second: max_bytes_per_second?,
            keep_archive: keep_archive?,
        })
    }

    fn follow(&mut self) -> Option<Follow> {
        let engine = self.word("follow.engine", &[("stream", Engine::Stream), ("subscription", Engine::Subscription)]);
        let workers = self.count("follow.workers", 1..=16);
        let batch_max_delay =
            self.duration("follow.batch_max_delay", Duration::from_millis(1)..=Duration::from_secs(60));
        let batch_max_bytes = self.size("follow.batch_max_bytes", 64 << 10..=1 << 30);
        let spill_max_bytes = self.size("follow.spill_max_bytes", 0..=16 << 40);
        let spool = self.parsed("follow.spool", "must be the path of a folder, or empty", |text| {
            Some((!text.is_empty()).then(|| PathBuf::from(text)))
        });
        let spool_max_bytes = self.size("follow.spool_max_bytes", MIB..=16 << 40);
        let ddl = self.word("follow.ddl", &[("replicate", Ddl::Replicate), ("stop", Ddl::Stop)]);
        let missing_row =
            self.word("follow.missing_row", &[("stop", MissingRow::Stop), ("record", MissingRow::Record)]);
        let without_identity = self.word(
            "follow.without_identity",
            &[("watch", WithoutIdentity::Watch), ("full", WithoutIdentity::Full), ("copy", WithoutIdentity::Copy)],
        );
        Some(Follow {
            engine: engine?,
            workers: workers?,
            batch_max_delay: batch_max_delay?,
            batch_max_bytes: batch_max_bytes?,
            spill_max_bytes: spill_max_bytes?,
            spool: spool?,
            spool_max_bytes: spool_max_bytes?,
            ddl: ddl?,
            missing_row: missing_row?,
            without_identity: without_identity?,
        })
    }

    fn cutover(&mut self) -> Option<Cutover> {
        let hour = Duration::from_secs(3600);
        let max_lag = self.duration("cutover.max_lag", Duration::from_millis(10)..=hour);
        let timeout = self.duration("cutover.timeout", Duration::from_secs(1)..=hour);
        let fence =
            self.word("cutover.fence", &[("lock", Fence::Lock), ("read-only", Fence::ReadOnly), ("none", Fence::None)]);
        let verify = self.word(
            "cutover.verify",
            &[("off", CutoverVerify::Off), ("counts", CutoverVerify::Counts), ("full", CutoverVerify::Full)],
        );
        let refresh = self.switch("cutover.refresh");
        let reverse = self.switch("cutover.reverse");
        let hook = self.list("cutover.hook");
        if hook.first().is_some_and(String::is_empty) {
            self.problems.add("cutover.hook: the program's name is empty");
        }
        let pgbouncer = self.url("cutover.pgbouncer");
        let pgbouncer_database =
            self.parsed("cutover.pgbouncer_database", "must be a name", |text| Some(text.to_owned()));
        Some(Cutover {
            max_lag: max_lag?,
            timeout: timeout?,
            fence: fence?,
            verify: verify?,
            refresh: refresh?,
            reverse: reverse?,
            hook,
            pgbouncer: pgbouncer?,
            pgbouncer_database: pgbouncer_database?,
        })
    }

    fn log(&mut self) -> Option<Log> {
        let level = self.parsed(
            "log.level",
            "must be error, warn, info, debug, trace, or a filter such as info,pgtandem::follow=debug",
            |text| is_filter(text).then(|| text.to_owned()),
        );
        let format = self.word("log.format", &[("text", LogFormat::Text), ("json", LogFormat::Json)]);
        Some(Log { level: level?, format: format? })
    }

    fn refuse_what_is_not_built(&mut self) {
        for not_yet in NOT_YET {
            let setting = self.settings.get(not_yet.key).filter(|setting| (not_yet.applies)(&setting.value));
            if let Some(Setting { origin, .. }) = setting {
                let NotYet { key, instead, .. } = not_yet;
                self.problems.add(format!("{key} ({origin}): this value is not available in this version; {instead}"));
            }
        }
    }

    /// `key = value (origin) must …`
    fn out_of_range<T>(&mut self, path: &str, setting: &Setting, wanted: &str) -> Option<T> {
        let value = match &setting.value {
            Value::Text(text) => format!("{text:?}"),
            Value::Number(number) => number.to_string(),
            Value::Switch(switch) => switch.to_string(),
            Value::List(items) => format!("{items:?}"),
        };
        self.problems.add(format!("{path} = {value} ({}) {wanted}", setting.origin));
        None
    }

    fn setting(&self, path: &str) -> Option<Setting> {
        self.settings.get(path).cloned()
    }

    fn parsed<T>(&mut self, path: &str, wanted: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let setting = self.setting(path)?;
        let parsed = match &setting.value {
            Value::Text(text) => parse(text),
            _ => None,
        };
        parsed.or_else(|| self.out_of_range(path, &setting, wanted))
    }

    fn word<T: Clone>(&mut self, path: &str, words: &[(&str, T)]) -> Option<T> {
        let list = words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
        self.parsed(path, &format!("must be one of {list}"), |text| {
            words.iter().find(|(word, _)| *word == text).map(|(_, one)| one.clone())
        })
    }

    fn count(&mut self, path: &str, range: RangeInclusive<usize>) -> Option<NonZeroUsize> {
        let setting = self.setting(path)?;
        let count = match setting.value {
            Value::Number(number) => usize::try_from(number).ok().filter(|count| range.contains(count)),
            _ => None,
        };
        count.and_then(NonZeroUsize::new).or_else(|| {
            self.out_of_range(path, &setting, &format!("must be from {} to {}", range.start(), range.end()))
        })
    }

    fn size(&mut self, path: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let setting = self.setting(path)?;
        let size = match &setting.value {
            Value::Text(text) => parse_size(text),
            Value::Number(number) => u64::try_from(*number).ok(),
            _ => None,
        };
        let wanted = match (*range.start(), *range.end()) {
            (low, u64::MAX) => format!("must be a size of at least {}", show_size(low)),
            (low, high) => format!("must be a size from {} to {}", show_size(low), show_size(high)),
        };
        size.filter(|size| range.contains(size))
            .or_else(|| self.out_of_range(path, &setting, &format!("{wanted}, such as 32MiB")))
    }

    fn duration(&mut self, path: &str, range: RangeInclusive<Duration>) -> Option<Duration> {
        let (low, high) = (show_duration(*range.start()), show_duration(*range.end()));
        let wanted = format!("must be a duration with its unit from {low} to {high}, such as 200ms or 1m 30s");
        self.parsed(path, &wanted, |text| parse_duration(text).filter(|duration| range.contains(duration)))
    }

    fn list(&self, path: &str) -> Vec<String> {
        match self.settings.get(path).map(|setting| &setting.value) {
            Some(Value::List(items)) => items.clone(),
            _ => Vec::new(),
        }
    }

    fn patterns(&mut self, path: &str) -> Vec<TablePattern> {
        let mut patterns = Vec::new();
        for item in self.list(path) {
            match TablePattern::new(&item) {
                Ok(pattern) => patterns.push(pattern),
                Err(why) => self.problems.add(format!("{path}: {why}")),
            }
        }
        patterns
    }

    fn switch(&self, path: &str) -> Option<bool> {
        match self.settings.get(path).map(|setting| &setting.value) {
            Some(Value::Switch(switch)) => Some(*switch),
            _ => None,
        }
    }

    /// The value is never repeated: it may hold a password. `Some(None)` is an empty one.
    fn url(&mut self, path: &str) -> Option<Option<ConnInfo>> {
        let setting = self.setting(path)?;
        let text = match &setting.value {
            Value::Text(text) if !text.trim().is_empty() => text,
            _ => return Some(None),
        };
        match ConnInfo::parse(text, &self.settings.environment.ambient()) {
            Ok(conninfo) => Some(Some(conninfo)),
            Err(why) => {
                self.problems.add(format!("{path} ({}): {why}", setting.origin));
                None
            }
        }
    }

    fn required_url(&mut self, path: &str, flag: &str) -> Option<ConnInfo> {
        let variable = format!("{}{}", super::keys::PREFIX, path.replace('.', "_").to_uppercase());
        match self.url(path) {
            Some(Some(conninfo)) => Some(conninfo),
            None if self.settings.get(path).is_some() => None,
            _ => {
                self.problems.add(format!("{path} is not set: give {flag}, {variable}, or the key in the file"));
                None
            }
        }
    }
}

/// A bare word must be a level: the library would take any other for the name of a module.
fn is_filter(text: &str) -> bool {
    let is_level = |part: &str| part.parse::<tracing_subscriber::filter::LevelFilter>().is_ok();
    let parts_fit = text.split(',').map(str::trim).all(|part| part.contains('=') || is_level(part));
    parts_fit && tracing_subscriber::EnvFilter::try_new(text).is_ok()
}

/// `Some(None)` turns it off.
fn listen(text: &str) -> Option<Option<SocketAddr>> {
    if text.is_empty() {
        return Some(None);
    }
    // One name is worth knowing; others would have to be looked up.
    let text = text.strip_prefix("localhost:").map_or_else(|| text.to_owned(), |port| format!("127.0.0.1:{port}"));
    text.parse().ok().map(Some)
}
