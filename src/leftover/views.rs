//! Materialized views: their rows are no changes of anything, so they are made anew from what the target holds.

use super::Context;
use crate::error::{Doing, Result};
use crate::postgres::catalog::IS_USER_TABLE;
use crate::postgres::{QualifiedName, Session};
use crate::telemetry::Telemetry;

/// Whoever reads a view reads it as of then, so views that read others come after them. One that reads another reaches
/// all that the other reaches, and the other: it reaches more.
fn in_order() -> String {
    format!(
        r"
        WITH RECURSIVE reads (reader, what) AS (
            SELECT r.ev_class, d.refobjid
            FROM pg_catalog.pg_rewrite r
            JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass AND d.objid = r.oid
            WHERE d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refobjid <> r.ev_class
        ), reaches (reader, what) AS (
            SELECT reader, what FROM reads
            UNION
            SELECT reaches.reader, reads.what FROM reaches JOIN reads ON reads.reader = reaches.what
        )
        SELECT n.nspname::text, c.relname::text
        FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'm' AND {IS_USER_TABLE}
        ORDER BY (SELECT count(*) FROM reaches JOIN pg_catalog.pg_class m ON m.oid = reaches.what AND m.relkind = 'm'
                  WHERE reaches.reader = c.oid), 1, 2"
    )
}

fn filled() -> String {
    format!(
        "SELECT n.nspname::text, c.relname::text
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind = 'm' AND c.relispopulated AND {IS_USER_TABLE}"
    )
}

/// Those of the target that the source has filled, in the order in which to refresh them.
async fn to_refresh(context: &Context<'_>) -> Result<Vec<QualifiedName>> {
    let list = async |session: Session, sql: String| -> Result<Vec<QualifiedName>> {
        let rows = session.query(&sql, &[]).await.doing(|| "listing the materialized views")?;
        rows.iter().map(|row| Ok(QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? })).collect()
    };
    let (source, target) = tokio::try_join!(context.source.connect("refresh"), context.target.connect("refresh"))?;
    let (filled, mut views) = tokio::try_join!(list(source, filled()), list(target, in_order()))?;
    views.retain(|view| filled.contains(view));
    Ok(views)
}

/// Refreshes them one after the other; returns how many.
///
/// # Errors
/// The connections', or the target's refusal, with the view's name.
pub async fn refresh(context: &Context<'_>, telemetry: &Telemetry) -> Result<usize> {
    let views = to_refresh(context).await?;
    if views.is_empty() {
        return Ok(0);
    }
    let session = context.target.connect("refresh").await?;
    // A server goes on with what it was told by a daemon that is gone.
    session.end_others(&context.target.application_name("refresh")).await.doing(|| "ending an earlier refresh")?;
    for view in &views {
        telemetry.activity(&format!("refreshing {}", view.plain()));
        let refreshed = session.batch_execute(&format!("REFRESH MATERIALIZED VIEW {view}")).await;
        refreshed.doing(|| format!("refreshing {}", view.plain())).map_err(|error| {
            error.hint("mend the view on the target, or set cutover.refresh = false and refresh it after the switch")
        })?;
    }
    Ok(views.len())
}
