//! The real binary with wrong arguments and wrong configuration: a clear message, the right exit code, no secret.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// Runs the program in `folder` with `environment` and nothing of ours.
fn pgtandem(folder: &Path, environment: &[(&str, &str)], arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgtandem"));
    command.env_clear().envs(environment.iter().copied()).current_dir(folder).args(arguments);
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (status.code(), text(&stdout), text(&stderr))
}

const URLS: [(&str, &str); 2] = [
    ("PGTANDEM_SOURCE_URL", "host=127.0.0.1 port=1 user=u password=tOpS3cret"),
    ("PGTANDEM_TARGET_URL", "host=127.0.0.1 port=1 user=u"),
];

#[test]
fn a_wrong_configuration_ends_with_2_and_says_all_that_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("pgtandem.toml"), "[copy]\nworker = 3\n[move]\nname = 'a'\nnam = 'b'\n").unwrap();
    let (code, stdout, stderr) = pgtandem(folder.path(), &URLS, &["check"]);
    assert_eq!((code, stdout.as_str()), (Some(2), ""), "{stderr}");
    for part in ["copy.worker (pgtandem.toml line 2); did you mean copy.workers?", "move.nam", "docs/configuration.md"]
    {
        assert!(stderr.contains(part), "{stderr}");
    }
    let (_, _, json) = pgtandem(folder.path(), &URLS, &["check", "--json"]);
    let error: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(error["error"]["code"], "configuration");
}

#[test]
fn a_directory_as_file_an_unknown_variable_and_a_missing_url_end_with_2() {
    let folder = tempfile::tempdir().unwrap();
    let (code, _, stderr) = pgtandem(folder.path(), &URLS, &["check", "--config", "."]);
    assert!(code == Some(2) && stderr.contains("directory"), "{stderr}");
    let (code, _, stderr) = pgtandem(folder.path(), &[("PGTANDEM_SORCE_URL", "x")], &["check"]);
    assert!(code == Some(2) && stderr.contains("did you mean PGTANDEM_SOURCE_URL?"), "{stderr}");
    let (code, _, stderr) = pgtandem(folder.path(), &[], &["check"]);
    assert!(code == Some(2) && stderr.contains("source.url is not set"), "{stderr}");
}

#[test]
fn wrong_arguments_end_with_2_and_hide_connection_strings() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        &["check", "postgresql://u:tOpS3cret@h/d"][..],
        &["postgresql://u:tOpS3cret@h/d", "check"],
        &["check", "host=h password=tOpS3cret"],
        &["check", "--source", "postgresql://u:tOpS3cret@tOpS3cret@h/d"],
        &["check", "--source", "host=h user=u password=my tOpS3cret"],
    ] {
        let (code, stdout, stderr) = pgtandem(folder.path(), &[], arguments);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(!stdout.contains("tOpS3cret") && !stderr.contains("tOpS3cret"), "{stderr}");
    }
}

#[test]
fn help_version_and_completions_need_no_configuration() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("pgtandem.toml"), "broken").unwrap();
    for (arguments, part) in [
        (&["--version"][..], env!("CARGO_PKG_VERSION")),
        (&["cutover", "--help"], "pgtandem cutover --dry-run"),
        (&["completions", "bash"], "_pgtandem"),
        (&["completions", "fish"], "complete -c pgtandem"),
    ] {
        let (code, stdout, stderr) = pgtandem(folder.path(), &[], arguments);
        assert!(code == Some(0) && stdout.contains(part), "{arguments:?}: {stdout}{stderr}");
    }
}
