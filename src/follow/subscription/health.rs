//! How the worker is, as far as the target's views tell: looked at every few seconds, beside tables without an identity.
//!
//! A worker that meets an error writes it to the server's log, ends, and is started again after a few seconds, for as long
//! as it takes. No view holds the error's words. What can be seen is that it is not there, that it is another one each
//! time, and from 15 on that its errors were counted. All of that is one blocker, which goes once a worker stays.

use super::object::Subscription;
use crate::config::{MissingRow, MoveName};
use crate::error::{Doing, Result};
use crate::follow::Gate;
use crate::postgres::{Lsn, Server, Session};
use crate::telemetry::{Blocker, Telemetry};

/// `$1`: the subscription. The counters as JSON, for they differ from version to version.
fn look_sql(counted: bool) -> String {
    let (counters, join) = if counted {
        ("pg_catalog.to_jsonb(c)::text", "LEFT JOIN pg_catalog.pg_stat_subscription_stats c ON c.subid = s.oid")
    } else {
        ("NULL::text", "")
    };
    format!(
        "SELECT s.subenabled, w.pid, w.received_lsn::text, {counters}
         FROM pg_catalog.pg_subscription s {join}
         LEFT JOIN LATERAL (SELECT pid, received_lsn FROM pg_catalog.pg_stat_subscription
                            WHERE subid = s.oid AND relid IS NULL AND pid IS NOT NULL
                            ORDER BY received_lsn DESC NULLS LAST LIMIT 1) w ON true
         WHERE s.subname = $1
           AND s.subdbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())"
    )
}

/// What one look saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    enabled: bool,
    worker: Option<i32>,
    errors: i64,
    /// From 18 on: updates and deletes that found no row, which the worker passed over.
    missing: i64,
}

/// Looks again and again, and remembers the look before.
pub struct Health {
    target: Server,
    name: MoveName,
    gate: Gate,
    missing_row: MissingRow,
    session: Option<Session>,
    before: Option<Seen>,
}

impl Health {
    /// Does not connect yet.
    #[must_use]
    pub fn new(target: Server, name: MoveName, gate: Gate, missing_row: MissingRow) -> Self {
        Self { target, name, gate, missing_row, session: None, before: None }
    }

    /// A blocker if the worker is not well.
    ///
    /// # Errors
    /// The connection's.
    pub async fn check(&mut self, telemetry: &Telemetry) -> Result<Option<Blocker>> {
        if !self.gate.is_open() {
            // A cutover keeps it from applying.
            self.before = None;
            return Ok(None);
        }
        let subscription = Subscription::new(&self.target, &self.name);
        let session = match self.session.take().filter(|session| !session.is_closed()) {
            Some(session) => session,
            None => subscription.session().await?,
        };
        let seen = look(&session, subscription.name(), telemetry).await?;
        self.session = Some(session);
        // Following says itself what keeps it from being made.
        let Some(mut seen) = seen else { return Ok(None) };
        if self.missing_row == MissingRow::Record {
            seen.missing = 0;
        }
        Ok(judge(subscription.name(), self.before.replace(seen), seen))
    }
}

async fn look(session: &Session, name: &str, telemetry: &Telemetry) -> Result<Option<Seen>> {
    let counted: bool = session
        .query_one("SELECT pg_catalog.to_regclass('pg_catalog.pg_stat_subscription_stats') IS NOT NULL", &[])
        .await
        .doing(|| "looking at the subscription's worker")?
        .try_get(0)?;
    let row = session.query_opt(&look_sql(counted), &[&name]).await.doing(|| "looking at the subscription's worker")?;
    let Some(row) = row else { return Ok(None) };
    if let Some(received) = row.try_get::<_, Option<String>>(2)?.and_then(|text| text.parse::<Lsn>().ok()) {
        telemetry.received(received);
    }
    let counters: serde_json::Value =
        row.try_get::<_, Option<&str>>(3)?.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let count = |name: &str| counters.get(name).and_then(serde_json::Value::as_i64).unwrap_or(0);
    Ok(Some(Seen {
        enabled: row.try_get(0)?,
        worker: row.try_get(1)?,
        errors: count("apply_error_count"),
        missing: count("confl_update_missing") + count("confl_delete_missing"),
    }))
}

/// Pure.
fn judge(name: &str, before: Option<Seen>, now: Seen) -> Option<Blocker> {
    if !now.enabled {
        return Some(Blocker {
            code: "subscription_disabled",
            message: format!("the subscription {name} is disabled on the target: nothing is applied"),
            hint: format!(
                "mend what it was disabled for, then ALTER SUBSCRIPTION {name} ENABLE, or start pgtandem again"
            ),
        });
    }
    // They are counted from when the subscription was made: copying a table again makes another one.
    if now.missing > 0 {
        return Some(Blocker {
            code: "subscription_missing_rows",
            message: format!(
                "{} updates or deletes found no row on the target; the worker passed over them",
                now.missing
            ),
            hint:
                "someone else changed the target, or the sides differed before. The target's log names table and key. \
                   Copy the tables again with `pgtandem resync`"
                    .to_owned(),
        });
    }
    let errors = before.map_or(0, |before| now.errors - before.errors);
    // At the first look it may just have been enabled.
    let stays = before.is_none_or(|before| now.worker.is_some() && before.worker == now.worker);
    if stays && errors <= 0 {
        return None;
    }
    let counted = if now.errors > 0 { format!(" ({} errors so far)", now.errors) } else { String::new() };
    let what = if now.worker.is_some() { "was started again" } else { "is not running" };
    Some(Blocker {
        code: "subscription_failing",
        message: format!("the worker of the subscription {name} {what}{counted}"),
        hint: format!(
            "the target's log says why, and for which table: look for the worker of {name}. A row that is there already, a \
             column that is missing, a source that cannot be reached, no free worker process: mend it, and it goes on by \
             itself within seconds"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WELL: Seen = Seen { enabled: true, worker: Some(7), errors: 3, missing: 0 };

    fn code(before: Option<Seen>, now: Seen) -> Option<&'static str> {
        judge("pgtandem_app", before, now).map(|blocker| blocker.code)
    }

    #[test]
    fn a_worker_that_stays_is_well_whatever_was_before() {
        assert_eq!(code(None, WELL), None);
        assert_eq!(code(Some(WELL), WELL), None);
    }

    #[test]
    fn a_worker_that_ends_again_and_again_is_seen_at_any_moment() {
        for now in [
            Seen { worker: None, ..WELL },
            Seen { worker: Some(8), ..WELL },
            Seen { errors: 4, ..WELL },
            Seen { worker: None, errors: 4, ..WELL },
        ] {
            assert_eq!(code(Some(WELL), now), Some("subscription_failing"), "{now:?}");
        }
    }

    #[test]
    fn what_no_worker_will_mend_has_words_of_its_own() {
        assert_eq!(code(Some(WELL), Seen { enabled: false, ..WELL }), Some("subscription_disabled"));
        assert_eq!(code(Some(WELL), Seen { missing: 2, ..WELL }), Some("subscription_missing_rows"));
    }
}
