//! What the stream does not tell: tables that came or went on the source, or that no publication carries any more.
//!
//! Looks at the source's catalog every now and then, on a connection of its own. Promises to end with an error that names
//! the tables and says what to do; must never change anything.

use std::collections::HashSet;
use std::convert::Infallible;
use std::time::Duration;

use super::Follow;
use super::ddl::Moved;
use crate::config::Config;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::catalog::{self, ABOVE, IS_USER_TABLE, above};
use crate::postgres::{Lsn, QualifiedName, Session};

const EVERY: Duration = Duration::from_secs(2);

/// `$1`: the publications. Each table, whether its changes are published, and the partitioned tables above it.
fn tables() -> String {
    format!(
        r"
        SELECT n.nspname::text, c.relname::text, EXISTS (
            SELECT FROM pg_catalog.pg_publication_rel r
            JOIN pg_catalog.pg_publication p ON p.oid = r.prpubid
            WHERE p.pubname = ANY ($1)
              AND (r.prrelid = c.oid
                   OR c.relispartition AND r.prrelid IN (SELECT relid FROM pg_catalog.pg_partition_ancestors(c.oid)))),
            above.schemas, above.names
        FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        CROSS JOIN {ABOVE}
        WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND {IS_USER_TABLE}
        ORDER BY 1, 2"
    )
}

/// Watches until something is found. A source that does not answer is the business of those who stream from it.
///
/// Where schema changes come with the stream, the source's catalog is ahead of what is known here. What is found then counts
/// only once the target holds everything up to the moment of the first look, and it is still so.
pub(super) async fn watch(follow: &Follow<'_>, moved: &Moved) -> Result<Infallible> {
    let mut session = None;
    let mut suspicion: Option<(String, Lsn)> = None;
    loop {
        tokio::time::sleep(EVERY).await;
        let progress = follow.durable.borrow().lsn;
        let known = moved.snapshot();
        let mut head = Lsn::ZERO;
        let looked = async {
            let session = match &mut session {
                Some(session) => session,
                empty => empty.insert(follow.source.connect("watch").await?),
            };
            head = catalog::end_of_log(&**session).await?;
            look(session, follow.config, follow.publications, &known).await
        };
        match looked.await {
            Ok(()) => suspicion = None,
            Err(error) if follow.captured && is_schema_change(&error) => match &suspicion {
                Some((same, then)) if *same == error.to_string() => {
                    if progress >= *then {
                        return Err(error);
                    }
                }
                _ => suspicion = Some((error.to_string(), head)),
            },
            Err(error) if matches!(error.class(), Class::Retry | Class::Wait) => {
                tracing::debug!(%error, "the source's tables cannot be looked at");
                session = None;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn look(
    session: &Session,
    config: &Config,
    publications: &[String],
    moved: &HashSet<QualifiedName>,
) -> Result<()> {
    let rows = session.query(&tables(), &[&publications]).await.doing(|| "looking at the source's tables")?;
    let mut gone: HashSet<&QualifiedName> = moved.iter().filter(|name| !config.scope.excludes(name)).collect();
    for row in &rows {
        let name = QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? };
        // A partition that was detached is out of a scope that names its root, and still one of the move's tables.
        if !gone.remove(&name) {
            if config.scope.contains(&name, &above(row, 3)?) {
                return Err(added(&name));
            }
            continue;
        }
        if !row.try_get::<_, bool>(2)? {
            return Err(unpublished(&name));
        }
    }
    match gone.into_iter().min() {
        Some(name) => Err(dropped(name)),
        None => Ok(()),
    }
}

/// Whether the error says that both sides have different tables or shapes because the source's schema changed.
pub(crate) fn is_schema_change(error: &Error) -> bool {
    matches!(
        error.code(),
        "shape_differs" | "table_added" | "table_dropped" | "table_missing" | "table_not_published" | "ddl_refused"
    )
}

/// A table in scope that the move does not know.
pub(crate) fn added(table: &QualifiedName) -> Error {
    let message = format!("the source has a new table, {}, which the move does not know", table.plain());
    Error::new(Class::Operator, "table_added", message)
        .hint(format!(
            "create it on the target as it is on the source, and its rows are copied: pg_dump --schema-only --table='{table}' \
             on the source, into psql on the target. Or exclude it"
        ))
}

/// A table of the move that the source has no more.
pub(crate) fn dropped(table: &QualifiedName) -> Error {
    let message = format!("the source has no table {} any more", table.plain());
    Error::new(Class::Operator, "table_dropped", message)
        .hint(format!("drop or rename it on the target as on the source: DROP TABLE {table}"))
}

/// A table of the move whose changes do not reach the stream.
pub(crate) fn unpublished(table: &QualifiedName) -> Error {
    let message = format!("the changes of table {} are not published any more", table.plain());
    Error::new(Class::Operator, "table_not_published", message).hint(format!(
        "it was dropped and made again, or someone altered the publication: changes are missing. See that the target's \
             table has the same shape, then `pgtandem resync {}` copies it again",
        table.plain()
    ))
}
