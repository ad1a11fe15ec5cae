use super::*;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Class, Error};

const URLS: [(&str, &str); 2] =
    [("PGTANDEM_SOURCE_URL", "host=a user=u password=sEcr3t"), ("PGTANDEM_TARGET_URL", "host=b user=u")];

fn named(schema: &str, table: &str) -> QualifiedName {
    QualifiedName::new(schema, table)
}

/// A file in a folder of its own.
fn file(text: &str) -> (tempfile::TempDir, Flags) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("move.toml");
    fs::write(&path, text).unwrap();
    (folder, Flags { config: Some(path), ..Flags::default() })
}

fn load(text: &str, environment: Environment) -> crate::Result<Config> {
    let (_folder, flags) = file(text);
    Settings::gather(&flags, environment)?.config()
}

fn problem(text: &str) -> String {
    let error = load(text, Environment::of(URLS)).unwrap_err();
    assert_eq!(error.class(), Class::Usage);
    error.to_string()
}

#[test]
fn without_a_file_the_defaults_hold() {
    let config = load("", Environment::of(URLS)).unwrap();
    assert_eq!(config.name.as_str(), "app");
    assert_eq!((config.copy.workers.get(), config.copy.split_above), (4, 1 << 30));
    assert_eq!(config.follow.batch_max_delay, Duration::from_millis(200));
    assert_eq!(config.http, Some("127.0.0.1:8432".parse().unwrap()));
    assert!(config.cutover.reverse && config.cutover.pgbouncer.is_none() && config.scope.include.is_empty());
    assert!(!format!("{config:?}").contains("sEcr3t"));
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let (_folder, mut flags) = file("[move]\nname = 'file'\n[copy]\nworkers = 3\n[log]\nlevel = 'warn'");
    let environment =
        || Environment::of([URLS[0], URLS[1], ("PGTANDEM_MOVE_NAME", "env"), ("PGTANDEM_LOG_LEVEL", "debug")]);
    let config = Settings::gather(&flags, environment()).unwrap().config().unwrap();
    assert_eq!((config.name.as_str(), config.copy.workers.get(), config.log.level.as_str()), ("env", 3, "debug"));

    flags.name = Some("flag".into());
    flags.source = Some("host=c user=v".into());
    let config = Settings::gather(&flags, environment()).unwrap().config().unwrap();
    assert_eq!((config.name.as_str(), config.source.user()), ("flag", "v"));
}

#[test]
fn every_kind_of_value_has_a_form_in_the_environment() {
    let config = load(
        "",
        Environment::of([
            URLS[0],
            URLS[1],
            ("PGTANDEM_MOVE_INCLUDE", "public.*, app.orders"),
            ("PGTANDEM_CUTOVER_REVERSE", "false"),
            ("PGTANDEM_CUTOVER_HOOK", r#"["/bin/switch","to target"]"#),
            ("PGTANDEM_COPY_SPLIT_ABOVE", "2MiB"),
            ("PGTANDEM_HTTP_LISTEN", ""),
            ("PGTANDEM_CACHE", "/tmp"),
            ("PGTANDEM_HOOK_STEP", "switch"),
        ]),
    )
    .unwrap();
    assert!(config.scope.contains(&named("public", "x"), &[]) && config.scope.contains(&named("app", "orders"), &[]));
    assert!(!config.scope.contains(&named("app", "x"), &[]));
    assert!(!config.cutover.reverse && config.http.is_none());
    assert_eq!(config.cutover.hook, ["/bin/switch", "to target"]);
    assert_eq!(config.copy.split_above, 2 << 20);

    let words = Environment::of([URLS[0], URLS[1], ("PGTANDEM_CUTOVER_HOOK", "/bin/switch now")]);
    assert_eq!(load("", words).unwrap().cutover.hook, ["/bin/switch", "now"]);
}

#[test]
fn all_problems_are_said_at_once_each_with_its_place() {
    let said =
        problem("[mov]\nname = 'x'\n[copy]\nworker = 1\nreverse = true\n[follow]\nsplit_above = '1GiB'\nddl = true");
    for part in [
        "5 things are wrong",
        "unknown section [mov]",
        "line 1); did you mean [move]?",
        "unknown key copy.worker",
        "line 4); did you mean copy.workers?",
        "did you mean cutover.reverse?",
        "did you mean copy.split_above?",
        "follow.ddl",
        "must be a string",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn a_value_out_of_range_names_key_value_place_and_range() {
    let said = problem(
        "[move]\nname = 'App'\n[copy]\nworkers = 65\nsplit_above = '1kB'\n[follow]\nbatch_max_delay = '2m'\n\
         batch_max_bytes = 1\n[cutover]\nmax_lag = '30'\ntimeout = '2h'\nfence = 'door'\n[http]\nlisten = 'here'\n\
         [log]\nformat = 'xml'\nlevel = 'loud'",
    );
    for part in [
        "move.name = \"App\"",
        "[a-z0-9_]{1,40}",
        "copy.workers = 65",
        "line 4) must be from 1 to 64",
        "copy.split_above = \"1kB\"",
        "at least 1MiB",
        "from 1ms to 1m",
        "follow.batch_max_bytes = 1 ",
        "from 64KiB to 1GiB",
        "cutover.max_lag = \"30\"",
        "from 1s to 1h",
        "must be one of lock, read-only, none",
        "127.0.0.1:8432",
        "must be one of text, json",
        "log.level = \"loud\"",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn what_is_not_built_yet_is_refused_by_name() {
    let said = problem("[cutover]\nfence = 'read-only'\npgbouncer = 'host=p user=u password=sEcr3t'");
    for key in ["cutover.fence", "cutover.pgbouncer"] {
        assert!(said.contains(key), "{key}: {said}");
    }
    assert!(!said.contains("sEcr3t"));
}

#[test]
fn a_broken_file_is_a_clear_error_without_its_secrets() {
    let said = problem("[source]\nurl = \"postgresql://u:sEcr3t@h/d\n[target]\n");
    assert!(said.contains("line 2") && said.contains("not TOML") && !said.contains("sEcr3t"), "{said}");
    let said =
        load("[source]\nurl = 'postgresql://u:sEcr3t@sEcr3t@h/d'", Environment::default()).unwrap_err().to_string();
    assert!(said.contains("source.url") && said.contains("%40") && !said.contains("sEcr3t"), "{said}");

    let gather = |path: &Path| {
        let flags = Flags { config: Some(path.to_owned()), ..Flags::default() };
        Settings::gather(&flags, Environment::of(URLS)).err().map(|error: Error| error.to_string()).unwrap()
    };
    let folder = tempfile::tempdir().unwrap();
    assert!(gather(folder.path()).contains("this is a directory"));
    assert!(gather(&folder.path().join("none.toml")).contains("No such file"));
    let latin = folder.path().join("latin.toml");
    fs::write(&latin, b"[move]\nname = '\xe9'").unwrap();
    assert!(gather(&latin).contains("line 2 is not UTF-8"));
}

#[test]
fn an_unknown_variable_is_an_error_with_a_suggestion() {
    let environment = Environment::of([URLS[0], URLS[1], ("PGTANDEM_COPY_WORKER", "3")]);
    let said = load("", environment).unwrap_err().to_string();
    assert!(said.contains("PGTANDEM_COPY_WORKER; did you mean PGTANDEM_COPY_WORKERS?"), "{said}");
}

#[test]
fn a_missing_url_says_every_way_to_give_it() {
    let said = load("", Environment::default()).unwrap_err().to_string();
    for part in ["source.url is not set", "--target", "PGTANDEM_TARGET_URL"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

fn project_file(path: &str) -> String {
    fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

#[test]
fn the_annotated_example_holds_every_key_with_its_default() {
    let text = project_file("config/pgtandem.toml");
    for key in keys::KEYS {
        let section = text.split(&format!("\n[{}]\n", key.section)).nth(1).unwrap();
        let section = section.split("\n[").next().unwrap();
        let line = match key.default {
            Some(default) => format!("\n{} = {default}\n", key.name),
            None => format!("\n{} = ", key.name),
        };
        assert!(format!("\n{section}\n").contains(&line), "{} is not there with its default", key.path());
    }
    let config = load(&text, Environment::default()).unwrap();
    assert_eq!(config.name.as_str(), "app");
}

#[test]
fn the_reference_names_every_key() {
    let text = project_file("docs/configuration.md");
    for key in keys::KEYS {
        assert!(text.contains(&format!("`{}`", key.path())), "{} is missing", key.path());
        assert!(text.contains(&format!("`{}`", key.environment())), "{} is missing", key.environment());
        assert!(text.contains(key.doc), "the line of {} differs: {}", key.path(), key.doc);
        if let Some(default) = key.default {
            assert!(
                text.contains(&format!("`{}` | `{default}` |", key.environment())),
                "the default of {}",
                key.path()
            );
        }
    }
}

#[test]
fn a_partition_is_chosen_with_what_is_above_it() {
    let patterns = |texts: &[&str]| texts.iter().map(|text| TablePattern::new(text).unwrap()).collect();
    let scope = |include: &[&str], exclude: &[&str]| Scope { include: patterns(include), exclude: patterns(exclude) };
    let (leaf, above) = (named("public", "y_1"), [named("public", "y"), named("public", "events")]);
    assert!(scope(&["events"], &[]).contains(&leaf, &above));
    assert!(scope(&["y_*"], &[]).contains(&leaf, &above));
    assert!(!scope(&["other"], &[]).contains(&leaf, &above));
    for exclude in ["events", "y", "y_1"] {
        assert!(!scope(&[], &[exclude]).contains(&leaf, &above), "{exclude}");
        assert!(!scope(&["events", "y_1"], &[exclude]).contains(&leaf, &above), "{exclude}");
    }
}
