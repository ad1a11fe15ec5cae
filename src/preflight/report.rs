//! All findings together, and how they are shown.

use std::fmt::Write as _;

use serde::Serialize;

use super::connection::CONNECTION_FAILED_CODE;
use super::{Finding, Severity};

/// Objects shown to a person; JSON has them all.
const SHOWN_OBJECTS: usize = 10;

/// What preflight found, worst first.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Sorted by severity, then in the order of the checks.
    pub findings: Vec<Finding>,
}

/// The document of `check --json`.
#[derive(Serialize)]
struct Document<'a> {
    ok: bool,
    findings: &'a [Finding],
}

impl Report {
    /// Sorts the findings, worst first.
    #[must_use]
    pub fn new(mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|finding| finding.severity);
        Self { findings }
    }

    /// The findings that keep the move from beginning.
    pub fn blocking(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.severity == Severity::Blocking)
    }

    /// Whether the move may begin.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.blocking().next().is_none()
    }

    /// Whether a server could not be reached, so that most questions were never asked.
    #[must_use]
    pub fn unreachable(&self) -> bool {
        self.unreachable_sides().next().is_some()
    }

    /// `source`, `target` or both: who gave no answer.
    pub fn unreachable_sides(&self) -> impl Iterator<Item = &'static str> {
        self.findings.iter().filter(|finding| finding.code == CONNECTION_FAILED_CODE).map(|finding| finding.side)
    }

    /// The document of `check --json`: `{"ok":…,"findings":[…]}`.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(Document { ok: self.is_ok(), findings: &self.findings }).unwrap_or_default()
    }

    /// For people: grouped by severity, aligned, with colour if asked for.
    #[must_use]
    pub fn to_text(&self, colour: bool) -> String {
        let paint = Paint { colour };
        let mut text = String::new();
        for severity in [Severity::Blocking, Severity::Warning, Severity::Info] {
            let group: Vec<_> = self.findings.iter().filter(|finding| finding.severity == severity).collect();
            if group.is_empty() {
                continue;
            }
            let title = format!("{} ({})", severity.as_str(), group.len());
            push_line(&mut text, &paint.severity(severity, &title));
            for finding in group {
                push_finding(&mut text, &paint, finding);
            }
            text.push('\n');
        }
        push_line(&mut text, &paint.summary(self));
        text
    }
}

fn push_finding(text: &mut String, paint: &Paint, finding: &Finding) {
    push_line(text, &format!("  {:<6}  {}", finding.side, paint.severity(finding.severity, finding.code)));
    push_field(text, "what", &finding.what);
    push_field(text, "why", &finding.why);
    if !finding.objects.is_empty() {
        push_field(text, "on", &shown(&finding.objects));
    }
    if let Some(fix) = &finding.fix {
        push_field(text, "fix", fix);
    }
}

/// The first few, and how many more there are.
fn shown(objects: &[String]) -> String {
    let first = objects.iter().take(SHOWN_OBJECTS).cloned().collect::<Vec<_>>().join(", ");
    match objects.len().saturating_sub(SHOWN_OBJECTS) {
        0 => first,
        more => format!("{first} and {more} more (--json has all)"),
    }
}

/// One labelled field; further lines are aligned below the first.
fn push_field(text: &mut String, label: &str, value: &str) {
    for (at, line) in value.lines().enumerate() {
        let label = if at == 0 { label } else { "" };
        push_line(text, &format!("          {label:<4}  {line}"));
    }
}

fn push_line(text: &mut String, line: &str) {
    // Writing to a String cannot fail.
    writeln!(text, "{line}").unwrap_or_default();
}

struct Paint {
    colour: bool,
}

impl Paint {
    fn severity(&self, severity: Severity, text: &str) -> String {
        self.code(
            match severity {
                Severity::Blocking => "1;31",
                Severity::Warning => "33",
                Severity::Info => "36",
            },
            text,
        )
    }

    fn summary(&self, report: &Report) -> String {
        let count = |severity| report.findings.iter().filter(|finding| finding.severity == severity).count();
        let (blocking, warnings, infos) = (count(Severity::Blocking), count(Severity::Warning), count(Severity::Info));
        let tail = format!("{warnings} warning{}, {infos} info", if warnings == 1 { "" } else { "s" });
        if blocking == 0 {
            self.code("1;32", &format!("ready to move: nothing blocking, {tail}"))
        } else {
            self.code("1;31", &format!("not ready to move: {blocking} blocking, {tail}"))
        }
    }

    fn code(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(code: &'static str, severity: Severity) -> Finding {
        Finding {
            code,
            severity,
            side: "source",
            what: "something".into(),
            why: "it matters".into(),
            fix: Some("ALTER ONE;\nALTER TWO;".into()),
            objects: (1..=12).map(|n| format!("t{n}")).collect(),
        }
    }

    #[test]
    fn text_is_grouped_worst_first_and_aligned() {
        let report = Report::new(vec![finding("later", Severity::Info), finding("first", Severity::Blocking)]);
        let text = report.to_text(false);
        let expected = "\
blocking (1)
  source  first
          what  something
          why   it matters
          on    t1, t2, t3, t4, t5, t6, t7, t8, t9, t10 and 2 more (--json has all)
          fix   ALTER ONE;
                ALTER TWO;

info (1)
";
        assert!(text.starts_with(expected), "{text}");
        assert!(text.ends_with("not ready to move: 1 blocking, 0 warnings, 1 info\n"), "{text}");
        assert!(!text.contains('\x1b'));
        assert!(report.to_text(true).contains("\x1b[1;31mfirst\x1b[0m"));
    }

    #[test]
    fn warnings_do_not_block() {
        assert!(Report::new(vec![finding("slow", Severity::Warning)]).is_ok());
        assert!(Report::default().to_text(false).starts_with("ready to move"));
    }

    #[test]
    fn json_is_one_document_with_every_object() {
        let json = Report::new(vec![finding("bad", Severity::Blocking)]).to_json();
        assert_eq!(json["ok"], false);
        assert_eq!(json["findings"][0]["code"], "bad");
        assert_eq!(json["findings"][0]["severity"], "blocking");
        assert_eq!(json["findings"][0]["objects"].as_array().map(Vec::len), Some(12));
    }
}
