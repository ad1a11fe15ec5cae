//! Whether the source takes changes from somewhere itself: what a subscription applies passes by the fence's triggers.

use super::Finding;
use super::finding::kinds;
use super::look::Look;
use super::privileges::text;
use crate::error::{Doing, Error, Result};
use crate::postgres::{Session, Side, quote_identifier};

/// `pg_subscription` is closed to ordinary roles, its first columns are not.
const ENABLED: &str = r"
    SELECT s.subname::text FROM pg_catalog.pg_subscription s
    JOIN pg_catalog.pg_database d ON d.oid = s.subdbid
    WHERE d.datname = pg_catalog.current_database() AND s.subenabled ORDER BY 1";

/// Tables that an enabled subscription feeds, each with the subscription.
const FED: &str = r"
    SELECT n.nspname::text, c.relname::text, s.subname::text
    FROM pg_catalog.pg_subscription s
    JOIN pg_catalog.pg_database d ON d.oid = s.subdbid
    JOIN pg_catalog.pg_subscription_rel r ON r.srsubid = s.oid
    JOIN pg_catalog.pg_class c ON c.oid = r.srrelid
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE d.datname = pg_catalog.current_database() AND s.subenabled ORDER BY 1, 2, 3";

kinds! {
    SOURCE_IS_SUBSCRIBER = Blocking "source_is_subscriber" {
        what: "an enabled subscription of the source feeds tables that move",
        why: "its apply workers fire no ordinary triggers and would write past the fence of a cutover",
        fix: "ALTER SUBSCRIPTION … DISABLE, or exclude the tables",
    }
}

pub(super) async fn subscriber(look: &Look<'_>) -> Result<Vec<Finding>> {
    let fed = look.in_scope(look.source.client.query(FED, &[]).await?)?;
    let mut names = fed.iter().map(|(_, row)| text(row, 2)).collect::<Result<Vec<_>>>()?;
    names.sort();
    names.dedup();
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let mut tables: Vec<String> = fed.iter().map(|(name, _)| name.plain()).collect();
    tables.dedup();
    let what = format!("the subscriptions {} write to {} of the tables that move", names.join(", "), tables.len());
    let fix = names.iter().map(|name| format!("ALTER SUBSCRIPTION {} DISABLE;", quote_identifier(name)));
    let fix = fix.collect::<Vec<_>>().join("\n");
    Ok(vec![SOURCE_IS_SUBSCRIBER.on(Side::Source, what).fix(fix).objects(tables)])
}

/// The enabled subscriptions of the session's database, by name: a cutover must not begin while there is one.
///
/// # Errors
/// The connection's.
pub async fn subscriptions_enabled(session: &Session) -> Result<Vec<String>> {
    let rows = session.query(ENABLED, &[]).await.doing(|| "listing the enabled subscriptions")?;
    rows.iter().map(|row| row.try_get(0).map_err(Error::from)).collect()
}
