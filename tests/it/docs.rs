//! The pages against the code and against each other: what they name is there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Files below a folder that end with `.<extension>`.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found
}

/// The pages that people are sent to.
fn pages() -> Vec<PathBuf> {
    let mut pages = files(&project().join("docs"), "md");
    pages.extend(["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "deploy/README.md"].map(|page| project().join(page)));
    pages
}

fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// The string literal that a text begins with.
fn literal(text: &str) -> Option<&str> {
    let (word, _) = text.trim_start().strip_prefix('"')?.split_once('"')?;
    is_word(word).then_some(word)
}

/// Functions that make an error and take its code first, as `name("code"`.
const MAKERS: [&str; 6] = ["usage(", "no(", "lost(", "refused(", "blocker(", "said("];

/// Error codes in a source file: what follows `Class::Word,`, what the makers are given, and what stands first in the
/// tuples of TLS errors.
fn codes(source: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in source.match_indices("Class::") {
        let rest = &source[at + "Class::".len()..];
        let class = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        // Between class and code there is a comma: in a call, a tuple, or a pair of them.
        found.extend(rest[class..].strip_prefix(',').and_then(literal).map(str::to_owned));
    }
    // Blockers, which are no errors.
    found.extend(source.match_indices(" code: ").filter_map(|(at, _)| literal(&source[at + 7..])).map(str::to_owned));
    for maker in MAKERS {
        for (at, _) in source.match_indices(maker) {
            let whole_word = !source[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            found.extend(literal(&source[at + maker.len()..]).filter(|_| whole_word).map(str::to_owned));
        }
    }
    for (at, _) in source.match_indices("\"tls_") {
        let code = literal(&source[at..]).filter(|code| source[at + code.len() + 2..].starts_with(','));
        found.extend(code.map(str::to_owned));
    }
    if source.contains("Self::new(Class::Bug") {
        found.insert("bug".to_owned());
    }
    found
}

/// Every code with a file that uses it. Tests inside the files are left out.
fn all_codes() -> BTreeMap<String, PathBuf> {
    let mut all = BTreeMap::new();
    for file in files(&project().join("src"), "rs") {
        if file.file_name().is_some_and(|name| name == "tests.rs") {
            continue;
        }
        let text = read(&file);
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        all.extend(codes(code).into_iter().map(|code| (code, file.clone())));
    }
    all
}

/// The codes that the page has: the first cell of each row, and every word in the paragraph about the demo.
fn documented() -> BTreeSet<String> {
    let page = read(&project().join("docs/errors.md"));
    let (tables, demo) = page.split_once("## Demo").unwrap();
    let rows = tables.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(code, _)| code));
    let classes = ["retry", "wait", "no", "usage", "operator", "held", "bug"];
    let in_demo = demo.split('`').skip(1).step_by(2).filter(|word| is_word(word) && !classes.contains(word));
    let mut found: BTreeSet<String> = rows.chain(in_demo).map(str::to_owned).collect();
    // Rows of the table of classes; those that are codes as well have a row among the codes.
    for class in classes {
        let rows = tables.lines().filter(|line| line.starts_with(&format!("| `{class}` "))).count();
        if rows < 2 {
            found.remove(class);
        }
    }
    found
}

#[test]
fn every_error_code_has_its_row_and_every_row_its_code() {
    let (used, documented) = (all_codes(), documented());
    assert!(used.len() > 100, "only {} codes were found in src/: {used:?}", used.len());
    let missing: Vec<_> = used.iter().filter(|(code, _)| !documented.contains(*code)).collect();
    assert!(missing.is_empty(), "docs/errors.md lacks {missing:#?}");
    let gone: Vec<_> = documented.iter().filter(|code| !used.contains_key(*code)).collect();
    assert!(gone.is_empty(), "docs/errors.md has codes that src/ does not use: {gone:?}");
}

/// A page without its fenced and indented code.
fn prose(page: &str) -> String {
    let mut fenced = false;
    let outside = page.lines().filter(|line| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    });
    outside.collect::<Vec<_>>().join("\n")
}

/// The anchors that a page's headings make.
fn anchors(page: &str) -> BTreeSet<String> {
    let headings = prose(page);
    let headings = headings.lines().filter_map(|line| line.strip_prefix('#').map(|text| text.trim_start_matches('#')));
    headings
        .map(|text| {
            let text = text.trim().to_lowercase().replace(' ', "-");
            text.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect()
        })
        .collect()
}

/// Targets of the links of a page: `](target)`.
fn links(page: &str) -> Vec<String> {
    let page = prose(page);
    page.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(target, _)| target.to_owned())).collect()
}

/// What is wrong with a link on a page.
fn broken(page: &Path, link: &str) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
    let file = if file.is_empty() { page.to_owned() } else { page.parent()?.join(file) };
    if !file.exists() {
        return Some(format!("{}: {link}: no such file", page.display()));
    }
    let known = anchor.is_none_or(|anchor| anchors(&read(&file)).contains(anchor));
    (!known).then(|| format!("{}: {link}: no such heading", page.display()))
}

#[test]
fn every_link_of_a_page_leads_somewhere() {
    let mut seen = 0;
    let mut wrong = Vec::new();
    for page in pages() {
        for link in links(&read(&page)) {
            seen += 1;
            wrong.extend(broken(&page, &link));
        }
    }
    assert!(seen > 50, "only {seen} links were found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The tests that a page names, as `module::of::the_test`.
fn tests_named(page: &str) -> Vec<&str> {
    page.split('`').filter(|code| code.contains("::") && code.split("::").all(is_word)).collect()
}

/// Panics unless the test is there.
fn must_be_a_test(page: &str, path: &str) {
    let (module, test) = path.rsplit_once("::").unwrap();
    let text = read(&project().join(format!("tests/it/{}.rs", module.replace("::", "/"))));
    assert!(text.contains(&format!("fn {test}()")), "{page} names {path}, which is not there");
}

#[test]
fn every_test_that_the_readme_names_is_there() {
    let readme = read(&project().join("README.md"));
    let named = tests_named(&readme);
    assert!(named.len() > 5, "only {named:?}");
    named.iter().for_each(|path| must_be_a_test("README.md", path));
}

/// Every line of the table of behaviours points to tests that are there, to findings and errors that are there, or admits
/// with a dash that nothing shows it.
#[test]
fn every_behaviour_points_to_its_tests() {
    let page = read(&project().join("docs/behaviours.md"));
    let codes = [read(&project().join("docs/preflight.md")), read(&project().join("docs/errors.md"))].concat();
    let lines: Vec<&str> =
        page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| what |")).collect();
    assert!(lines.len() > 50, "only {} lines", lines.len());
    for line in lines {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [_, how, tests] = cells[..] else { panic!("not three cells: {line}") };
        assert!(!tests_named(tests).is_empty() || tests == "–", "no test and no dash: {line}");
        for code in how.split('`').skip(1).step_by(2).filter(|word| is_word(word) && word.contains('_')) {
            assert!(codes.contains(&format!("| `{code}` |")), "neither a finding nor an error: {code}");
        }
    }
    tests_named(&page).iter().for_each(|path| must_be_a_test("docs/behaviours.md", path));
}

#[test]
fn the_table_of_the_status_has_exactly_the_fields_of_the_document() {
    let page = read(&project().join("docs/http.md"));
    let (_, table) = page.split_once("| field | type |").unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    let first_cells = table.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    let named: BTreeSet<_> = first_cells
        .flat_map(|cell| cell.split(", ").map(|field| field.trim_matches('`').replace("[]", "")).collect::<Vec<_>>())
        .collect();
    let (_, example) = page.split_once("```json\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    let example: serde_json::Value = serde_json::from_str(example).expect("the example is JSON");
    let mut shown = BTreeSet::new();
    paths(&example, "", &mut shown);
    let unnamed: Vec<_> = shown.difference(&named).filter(|path| !is_group(path)).collect();
    assert!(unnamed.is_empty(), "the table lacks {unnamed:?}");

    // The code's own fields, by their names.
    let code = read(&project().join("src/telemetry/status.rs"));
    let (structs, _) = code.split_once("/// Asks the target and the source").unwrap();
    let structs = structs.replace("#[serde(skip)]\n    pub ", "");
    let fields =
        structs.lines().filter_map(|line| line.strip_prefix("    pub ")?.split_once(':').map(|(name, _)| name));
    let last_words: BTreeSet<_> = named.iter().filter_map(|path| path.rsplit('.').next()).collect();
    let missing: Vec<_> =
        fields.filter(|field| !last_words.contains(field) && !is_group(field)).map(str::to_owned).collect();
    assert!(missing.is_empty(), "docs/http.md lacks fields of src/telemetry/status.rs: {missing:?}");
}

/// Objects that only group fields have no row of their own.
fn is_group(path: &str) -> bool {
    ["source", "target", "lag", "copy", "apply", "cutover"].contains(&path)
}

/// Every key of a document, with its parents.
fn paths(value: &serde_json::Value, above: &str, found: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(fields) => {
            for (name, value) in fields {
                let path = if above.is_empty() { name.clone() } else { format!("{above}.{name}") };
                paths(value, &path, found);
                found.insert(path);
            }
        }
        serde_json::Value::Array(items) => items.iter().for_each(|item| paths(item, above, found)),
        _ => {}
    }
}
