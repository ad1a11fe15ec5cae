//! The status for people: what the phase means, how far it is, what to do next.
//!
//! Pure text of a [`Status`]; colour only if asked for. Names and messages were cleaned of control characters before,
//! or are cleaned here: what a catalog holds must not drive a terminal.

use std::fmt::Write as _;

use super::redact::shown;
use super::status::{CutoverStatus, Problem, Status};
use crate::state::{Phase, TableState};

/// Tables in flight that are listed.
const LISTED: usize = 10;

/// How the text is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    /// With ANSI colours.
    pub colour: bool,
}

#[derive(Clone, Copy)]
enum Ink {
    Bold,
    Soft,
    Good,
    Warn,
    Bad,
}

impl Style {
    fn paint(self, ink: Ink, text: &str) -> String {
        if !self.colour {
            return text.to_owned();
        }
        let code = match ink {
            Ink::Bold => "1",
            Ink::Soft => "2",
            Ink::Good => "32",
            Ink::Warn => "33",
            Ink::Bad => "31",
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }
}

/// The whole text, ending with a line feed.
#[must_use]
pub fn render_text(status: &Status, style: Style) -> String {
    let mut page = Page { text: String::new(), style };
    page.heading(status);
    page.line("source", &source(status));
    page.line("target", &target(status));
    page.line("lag", &lag(status));
    page.line("copy", &copy(status));
    page.line("applied", &applied(status));
    page.line("ready", &page.ready(status));
    page.tables(status);
    page.cutover(&status.cutover);
    page.problems(status);
    page.text
}

struct Page {
    text: String,
    style: Style,
}

impl Page {
    fn put(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    fn line(&mut self, label: &str, value: &str) {
        let label = self.style.paint(Ink::Soft, &format!("{label:<9}"));
        self.put(&format!("  {label} {value}"));
    }

    fn heading(&mut self, status: &Status) {
        let ink = match status.phase {
            "failed" => Ink::Bad,
            "paused" => Ink::Warn,
            "follow" | "done" => Ink::Good,
            _ => Ink::Bold,
        };
        let phase = self.style.paint(ink, status.phase);
        let name = self.style.paint(Ink::Bold, &status.name);
        let since = status.phase_since.as_ref().map(|since| format!(" since {since}")).unwrap_or_default();
        self.put(&format!("{name}: {phase}{}", self.style.paint(Ink::Soft, &since)));
        let (meaning, next) = guidance(status);
        self.put(&format!("  {meaning}"));
        if let Some(activity) = &status.activity {
            self.put(&format!("  now: {activity}"));
        }
        self.put(&format!("  next: {next}\n"));
    }

    fn ready(&self, status: &Status) -> String {
        if status.ready {
            return self.style.paint(Ink::Good, "yes");
        }
        let because = status.not_ready_because.as_deref().map(|why| format!(": {why}")).unwrap_or_default();
        format!("{}{because}", self.style.paint(Ink::Warn, "no"))
    }

    fn tables(&mut self, status: &Status) {
        let copying = TableState::Copying.as_str();
        let in_flight: Vec<_> = status.tables.iter().filter(|table| table.state == copying).collect();
        if in_flight.is_empty() {
            return;
        }
        self.put("\n  tables on their way");
        let names: Vec<_> = in_flight.iter().map(|table| shown(&format!("{}.{}", table.schema, table.name))).collect();
        let width = names.iter().take(LISTED).map(|name| name.chars().count()).max().unwrap_or(0);
        for (table, name) in in_flight.iter().zip(&names).take(LISTED) {
            self.put(&format!("    {name:<width$}  {:>10}  {:>15} rows", bytes(table.bytes), count(table.rows)));
        }
        if in_flight.len() > LISTED {
            self.put(&format!("    and {} more", in_flight.len() - LISTED));
        }
    }

    fn cutover(&mut self, cutover: &CutoverStatus) {
        let Some(state) = &cutover.state else { return };
        self.put(&format!("\n  cutover {state}"));
        let width = cutover.steps.iter().map(|step| step.name.chars().count()).max().unwrap_or(0);
        for step in &cutover.steps {
            let seconds = step.seconds.map(|seconds| format!("{seconds:>9.3} s")).unwrap_or_default();
            let ink = match step.state.as_str() {
                "done" => Ink::Good,
                "failed" => Ink::Bad,
                _ => Ink::Soft,
            };
            let word = self.style.paint(ink, &format!("{:<8}", step.state));
            let line = format!("    {:<width$}  {word}{seconds}", step.name);
            self.put(line.trim_end());
        }
        if let Some(seconds) = cutover.write_pause_seconds {
            self.put(&format!("    writes paused for {seconds:.3} s"));
        }
    }

    fn problems(&mut self, status: &Status) {
        for blocker in &status.blockers {
            self.problem(Ink::Warn, "blocked", blocker);
        }
        for warning in &status.warnings {
            self.problem(Ink::Warn, "warning", warning);
        }
        if let Some(error) = &status.error {
            self.problem(Ink::Bad, "error", error);
        }
    }

    fn problem(&mut self, ink: Ink, label: &str, problem: &Problem) {
        let label = self.style.paint(ink, label);
        self.put(&format!("\n  {label} ({}): {}", problem.code, problem.message));
        if let Some(hint) = &problem.hint {
            self.put(&format!("    {hint}"));
        }
    }
}

fn source(status: &Status) -> String {
    let source = &status.source;
    let Some(version) = &source.version else { return "cannot be reached".to_owned() };
    let mut text = format!("PostgreSQL {version}");
    if let Some(head) = &source.head_lsn {
        put(&mut text, format_args!(", head {head}"));
    }
    let Some(slot) = &source.slot else { return text };
    put(&mut text, format_args!(", slot {} {}", slot.name, if slot.active { "active" } else { "not active" }));
    if let Some(retained) = slot.retained_wal_bytes {
        put(&mut text, format_args!(", keeps {} of WAL", bytes(retained)));
    }
    if let Some(wal) = &slot.wal_status {
        put(&mut text, format_args!(" ({wal})"));
    }
    text
}

fn target(status: &Status) -> String {
    let version = status.target.version.as_ref().map(|version| format!("PostgreSQL {version}"));
    let progress = status.target.progress_lsn.as_ref().map(|lsn| format!("progress {lsn}"));
    let known: Vec<_> = [version, progress].into_iter().flatten().collect();
    if known.is_empty() { "nothing is known yet".to_owned() } else { known.join(", ") }
}

fn lag(status: &Status) -> String {
    match (status.lag.bytes, status.lag.seconds) {
        (None, _) => "not known".to_owned(),
        (Some(wal), None) => bytes(wal),
        (Some(wal), Some(seconds)) => format!("{}, {}", bytes(wal), duration(seconds)),
    }
}

fn copy(status: &Status) -> String {
    let copy = &status.copy;
    let mut text = format!(
        "{} of {} tables, {} rows, {} (source holds {})",
        count(copy.tables_done),
        count(copy.tables_total),
        count(copy.rows_done),
        bytes(copy.bytes_done),
        bytes(copy.bytes_total)
    );
    if let Some(eta) = copy.eta_seconds {
        put(&mut text, format_args!(", about {} left", duration(eta as f64)));
    }
    text
}

fn applied(status: &Status) -> String {
    format!("{} transactions, {} changes", count(status.apply.transactions), count(status.apply.changes))
}

/// What the phase means, and what to do next.
fn guidance(status: &Status) -> (&'static str, &'static str) {
    let phase: Option<Phase> = status.phase.parse().ok();
    let next_without_daemon = "start `pgtandem run`; it goes on from here";
    let (meaning, next) = match phase {
        Some(Phase::Preflight) if status.phase_since.is_none() => {
            ("The target knows nothing of this move yet.", "`pgtandem check`, then `pgtandem run`")
        }
        Some(Phase::Preflight) => ("Both sides are being checked; nothing was changed.", "wait"),
        Some(Phase::Schema) => ("The schema is being restored on the target.", "wait"),
        Some(Phase::Copy) => ("Rows are being copied; the source stays in use.", "wait"),
        Some(Phase::Catchup) => {
            ("The changes made during the copy are being applied.", "wait until the phase is follow")
        }
        Some(Phase::Follow) if status.ready => {
            ("The target follows the source.", "`pgtandem cutover --dry-run`, then `pgtandem cutover`")
        }
        Some(Phase::Follow) => ("The target follows the source.", "wait until ready, or see what is in the way"),
        Some(Phase::Cutover) => {
            ("The application is being switched over.", "wait; the fence lifts by itself on a failure")
        }
        Some(Phase::Done) => {
            return (
                "The application uses the target.",
                "`pgtandem clean` once you are sure that nothing has to go back",
            );
        }
        Some(Phase::Paused) => ("The move was paused; the source keeps WAL for it.", "start `pgtandem run` again"),
        Some(Phase::Failed) => {
            ("The move stopped: a person must look at it.", "read the error below, then `pgtandem run`")
        }
        None => ("This phase is of another version.", "run the version of pgtandem that made it"),
    };
    let begun = status.phase_since.is_some();
    (meaning, if begun && !status.daemon { next_without_daemon } else { next })
}

fn put(text: &mut String, more: std::fmt::Arguments<'_>) {
    // Writing to a String never fails.
    if text.write_fmt(more).is_err() {
        text.push('?');
    }
}

/// `1234567` as `1,234,567`.
#[must_use]
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1536` as `1.5 KiB`.
#[must_use]
pub fn bytes(number: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = number as f64;
    let mut unit = UNITS[0];
    for larger in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    if number < 1024 { format!("{number} B") } else { format!("{value:.1} {unit}") }
}

/// Seconds as a person says them.
#[must_use]
pub fn duration(seconds: f64) -> String {
    if seconds < 60.0 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}
