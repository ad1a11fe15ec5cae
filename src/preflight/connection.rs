//! Whether both servers can be reached, are of a version that can be moved, and accept writes where needed.

use super::finding::kinds;
use super::look::{Look, Place};
use super::{Finding, Kind};
use crate::config::CopyMethod;
use crate::error::{Error, Result};
use crate::postgres::Side;

/// The oldest and the newest major version that the tests move.
const SUPPORTED: std::ops::RangeInclusive<i32> = 13..=18;

/// A report with this code says that most questions were never asked.
pub(super) const CONNECTION_FAILED_CODE: &str = CONNECTION_FAILED.code;

kinds! {
    CONNECTION_FAILED = Blocking "connection_failed" {
        what: "the server cannot be reached or refuses us",
        why: "nothing else can be asked of it",
        fix: "correct the connection string, or let this machine through",
    }
    CANNOT_LOOK = Warning "cannot_look" {
        what: "a question could not be answered",
        why: "what it would have found is unknown, not absent",
        fix: "grant the role what the message names (often: GRANT pg_monitor TO role), then check again",
    }
    SOURCE_TOO_OLD = Blocking "source_too_old" {
        what: "the source is older than PostgreSQL 13",
        why: "before 13 the stream lacks what an exact copy needs (partitioned tables in publications, bounded decoding memory)",
        fix: "upgrade the source to 13 or newer (pg_upgrade), then move it",
    }
    SOURCE_UNTESTED = Warning "source_untested" {
        what: "the source is newer than any version that pgtandem is tested with",
        why: "its catalog or its stream may hold something unknown",
        fix: "look for a newer pgtandem",
    }
    TARGET_TOO_OLD = Blocking "target_too_old" {
        what: "the target is older than PostgreSQL 13",
        why: "the state of the move and the way back need 13",
        fix: "take a target of version 13 or newer",
    }
    TARGET_UNTESTED = Warning "target_untested" {
        what: "the target is newer than any version that pgtandem is tested with",
        why: "it may refuse a statement of the schema that older versions take",
        fix: "look for a newer pgtandem",
    }
    TARGET_OLDER = Blocking "target_older" {
        what: "the target is older than the source",
        why: "pg_dump writes a schema for its own version or newer; an older server may refuse it or read it differently",
        fix: "take a target of the source's major version or newer",
    }
    TARGET_OLDER_BY_HAND = Warning "target_older_by_hand" {
        what: "the target is older than the source, and copy.method is none",
        why: "the schema is made by hand, so nothing is restored into an older server; types and defaults may still differ",
        fix: "make sure by hand that each table has the same columns and types on both sides",
    }
    SOURCE_STANDBY = Blocking "source_standby" {
        what: "the source is a standby",
        why: "publications and the fence can only be made on the primary",
        fix: "point source.url to the primary",
    }
    TARGET_STANDBY = Blocking "target_standby" {
        what: "the target is a standby",
        why: "nothing can be written there",
        fix: "point target.url to the primary",
    }
    TARGET_READ_ONLY = Blocking "target_read_only" {
        what: "the target refuses to write",
        why: "nothing can be restored or applied there",
        fix: "end the target's read-only mode: a provider's guard for a full disk, or a plan's limit",
    }
}

/// Every way in which a session could not be had.
pub(super) fn failed(side: Side, error: &Error) -> Finding {
    let finding = CONNECTION_FAILED.on(side, error.to_string());
    match error.hint_text() {
        Some(hint) => finding.fix(hint),
        None => finding,
    }
}

/// A session that ended before everything was asked.
pub(super) fn lost(side: Side) -> Finding {
    CONNECTION_FAILED.on(side, "the connection ended while the questions were asked").fix("check again")
}

/// A question that the server did not answer.
pub(super) fn cannot_look(side: Side, question: &str, error: &Error) -> Finding {
    let finding = CANNOT_LOOK.on(side, format!("could not see {question}: {error}"));
    match error.sqlstate() {
        Some("42501") | None => finding,
        Some(_) => finding.fix(error.hint_text().unwrap_or("try again; if it stays, see the server's log")),
    }
}

/// Versions of both sides, and against each other.
pub(super) fn versions(look: &Look<'_>) -> Vec<Finding> {
    let (source, target) = (&look.source, &look.target);
    let mut found = Vec::new();
    found.extend(version(source, &SOURCE_TOO_OLD, &SOURCE_UNTESTED));
    found.extend(version(target, &TARGET_TOO_OLD, &TARGET_UNTESTED));
    if target.facts.major() < source.facts.major() {
        let kind = if look.config.copy.method == CopyMethod::None { TARGET_OLDER_BY_HAND } else { TARGET_OLDER };
        let (old, new) = (&target.facts.version, &source.facts.version);
        found.push(kind.on(Side::Target, format!("the target is {old}, the source {new}")));
    }
    found
}

fn version(place: &Place<'_>, too_old: &Kind, untested: &Kind) -> Option<Finding> {
    let kind = match place.facts.major() {
        major if major < *SUPPORTED.start() => too_old,
        major if major > *SUPPORTED.end() => untested,
        _ => return None,
    };
    Some(kind.on(place.side, format!("the {} is PostgreSQL {}", place.side.as_str(), place.facts.version)))
}

/// A standby on either side.
pub(super) fn standby(look: &Look<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    if look.source.facts.in_recovery {
        found.push(SOURCE_STANDBY.on(Side::Source, "the source is in recovery: it is a standby"));
    }
    if look.target.facts.in_recovery {
        found.push(TARGET_STANDBY.on(Side::Target, "the target is in recovery: it is a standby"));
    }
    found
}

/// Whether a transaction of ours on the target may write although its settings were pinned to allow it.
pub(super) async fn read_only(target: &Place<'_>) -> Result<Vec<Finding>> {
    let read_only = target.setting("transaction_read_only").await?.as_deref() == Some("on");
    if !read_only || target.facts.in_recovery {
        return Ok(Vec::new());
    }
    Ok(vec![TARGET_READ_ONLY.on(Side::Target, "transactions on the target are read-only although we ask for others")])
}
