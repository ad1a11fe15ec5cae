//! What a check says: one [`Finding`], made from a [`Kind`] that knows how bad it is and why it matters.

use serde::Serialize;

use crate::postgres::Side;

/// How much a finding matters. The order is that of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The move must not begin.
    Blocking,
    /// The move can begin; something will be slow, different or missing.
    Warning,
    /// Good to know.
    Info,
}

impl Severity {
    /// `blocking`, `warning` or `info`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Blocking => "blocking",
            Self::Warning => "warning",
            Self::Info => "info",
        }
    }
}

/// A kind of finding: what is the same each time it is found. `docs/preflight.md` has a row for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Stable snake_case word.
    pub code: &'static str,
    /// How much it matters.
    pub severity: Severity,
    /// What is found, in general.
    pub what: &'static str,
    /// Why it matters.
    pub why: &'static str,
    /// What to do about it, in general; empty when there is nothing to do.
    pub fix: &'static str,
}

impl Kind {
    /// A finding of this kind; `what` says it of this very server.
    #[must_use]
    pub fn on(&self, side: Side, what: impl Into<String>) -> Finding {
        Finding {
            code: self.code,
            severity: self.severity,
            side: side.as_str(),
            what: what.into(),
            why: self.why.to_owned(),
            fix: (!self.fix.is_empty()).then(|| self.fix.to_owned()),
            objects: Vec::new(),
        }
    }
}

/// Something that a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable snake_case word.
    pub code: &'static str,
    /// How much it matters.
    pub severity: Severity,
    /// `source` or `target`: where it was found.
    pub side: &'static str,
    /// What is the case.
    pub what: String,
    /// Why it matters.
    pub why: String,
    /// The exact statement or step that mends it; one a line.
    pub fix: Option<String>,
    /// What it is about: tables, roles, extensions, sessions.
    pub objects: Vec<String>,
}

impl Finding {
    /// Sets the exact statement or step that mends it.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    /// Sets what it is about.
    #[must_use]
    pub fn objects(mut self, objects: Vec<String>) -> Self {
        self.objects = objects;
        self
    }
}

/// Declares the kinds of a group of checks, each as a constant, and `KINDS`, the list of them all.
macro_rules! kinds {
    ($($name:ident = $severity:ident $code:literal { what: $what:literal, why: $why:literal, fix: $fix:literal $(,)? })+) => {
        $(
            const $name: $crate::preflight::Kind = $crate::preflight::Kind {
                code: $code,
                severity: $crate::preflight::Severity::$severity,
                what: $what,
                why: $why,
                fix: $fix,
            };
        )+
        pub(super) const KINDS: &[$crate::preflight::Kind] = &[$($name),+];
    };
}
pub(super) use kinds;
