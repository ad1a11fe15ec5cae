//! That the page and the code name the same findings.

use super::*;

/// The page's row of a kind.
fn row(kind: &Kind) -> String {
    let cell = |text: &str| if text.is_empty() { "–".to_owned() } else { text.replace('|', "\\|") };
    format!(
        "| `{}` | {} | {} | {} | {} |",
        kind.code,
        kind.severity.as_str(),
        cell(kind.what),
        cell(kind.why),
        cell(kind.fix)
    )
}

#[test]
fn the_page_has_exactly_the_kinds_of_the_code() {
    let page = include_str!("../../docs/preflight.md");
    let documented: Vec<_> = page.lines().filter(|line| line.starts_with("| `")).collect();
    let rows: Vec<_> = kinds().map(row).collect();
    let missing: Vec<_> = rows.iter().filter(|row| !documented.contains(&row.as_str())).collect();
    assert!(missing.is_empty(), "docs/preflight.md lacks these rows:\n{}", rows.join("\n"));
    assert_eq!(documented.len(), rows.len(), "docs/preflight.md has rows that no check finds");
}

#[test]
fn codes_are_unique_snake_case_words() {
    let mut codes: Vec<_> = kinds().map(|kind| kind.code).collect();
    assert!(codes.iter().all(|code| code.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')));
    codes.sort_unstable();
    let total = codes.len();
    codes.dedup();
    assert_eq!(codes.len(), total);
}

#[test]
fn every_blocking_kind_says_how_to_mend_it() {
    for kind in kinds().filter(|kind| kind.severity == Severity::Blocking) {
        assert!(!kind.fix.is_empty(), "{} has no fix", kind.code);
    }
}
