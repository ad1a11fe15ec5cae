//! The tables that a cutover is for: which of them the fence must cover, and whether that is still so.
//!
//! Lists are made before writers wait, and the source's schema is nobody's to stop: a table may be made in the moment after.
//! The fence would not hold its writers, and no proof would look at it. So the catalog is asked again behind the fence,
//! and a last time in the transaction that seals it. What is covered cannot change in between, for the locks of the fence
//! are in the way of whoever would drop, rename, attach or detach one of its tables, or take a trigger off it.

use std::collections::{HashMap, HashSet};

use super::fence::Names;
use crate::config::Scope;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::catalog::{ABOVE, IS_USER_TABLE, above};
use crate::postgres::{QualifiedName, Session};

/// The tables of the move on the source, with the partitioned tables above them, and the oid of each.
pub(super) async fn to_fence(session: &Session, moved: &[QualifiedName]) -> Result<Vec<(QualifiedName, u32)>> {
    let rows = session
        .query(
            &format!(
                "SELECT n.nspname::text, c.relname::text, c.relkind = 'p',
                        ARRAY(SELECT a.relid::oid FROM pg_catalog.pg_partition_ancestors(c.oid) a), c.oid
                 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND {IS_USER_TABLE}
                 ORDER BY 1, 2"
            ),
            &[],
        )
        .await
        .doing(|| "listing the tables to fence")?;
    let moved: HashSet<&QualifiedName> = moved.iter().collect();
    let mut above: HashSet<u32> = HashSet::new();
    let mut ancestors: HashMap<u32, Vec<u32>> = HashMap::new();
    let mut all = Vec::with_capacity(rows.len());
    for row in &rows {
        let name = QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? };
        let partitioned: bool = row.try_get(2)?;
        let (of, oid): (Vec<u32>, u32) = (row.try_get(3)?, row.try_get(4)?);
        if !partitioned && moved.contains(&name) {
            // The list begins with the table itself.
            above.extend(of.iter().filter(|ancestor| **ancestor != oid));
        }
        ancestors.insert(oid, of);
        all.push((name, partitioned, oid));
    }
    let fenced = |(name, partitioned, oid): &(QualifiedName, bool, u32)| {
        // A partition that was made since the copy is written to as well.
        above.contains(oid)
            || moved.contains(name)
            || (!partitioned && ancestors.get(oid).is_some_and(|all| all.iter().any(|root| above.contains(root))))
    };
    Ok(all.into_iter().filter(fenced).map(|(name, _, oid)| (name, oid)).collect())
}

/// Refuses a table in scope that is not `listed`: what is done at the cutover does not know it.
///
/// # Errors
/// Class no: there is one. The connection's.
pub(super) async fn all_listed(session: &Session, scope: &Scope, listed: &[QualifiedName]) -> Result<()> {
    let rows = session
        .query(
            &format!(
                "SELECT n.nspname::text, c.relname::text, above.schemas, above.names
                 FROM pg_catalog.pg_class c
                 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 CROSS JOIN {ABOVE}
                 WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND {IS_USER_TABLE}
                 ORDER BY 1, 2"
            ),
            &[],
        )
        .await
        .doing(|| "asking whether a table came meanwhile")?;
    let listed: HashSet<&QualifiedName> = listed.iter().collect();
    for row in &rows {
        let name = QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? };
        if !listed.contains(&name) && scope.contains(&name, &above(row, 2)?) {
            return Err(came(&name));
        }
    }
    Ok(())
}

/// `$1`: the fence's trigger. The tables that this very session has locked against writers, and that the seal will hold.
const COVERED: &str = "
    SELECT l.relation FROM pg_catalog.pg_locks l
    JOIN pg_catalog.pg_trigger t ON t.tgrelid = l.relation AND t.tgname = $1 AND t.tgenabled = 'A'
    WHERE l.pid = pg_catalog.pg_backend_pid() AND l.locktype = 'relation' AND l.granted
      AND l.mode = 'ShareRowExclusiveLock'
      AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())";

/// Refuses a table that the fence should cover and does not: one that came, or that took the place of another between the
/// listing and the locks. `session` is the fence's own.
///
/// # Errors
/// Class no: there is one. The connection's.
pub(super) async fn all_covered(session: &Session, names: &Names, listed: &[QualifiedName]) -> Result<()> {
    let rows = session.query(COVERED, &[&names.trigger_name()]).await.doing(|| "asking what the fence covers")?;
    let covered: HashSet<u32> = rows.iter().map(|row| Ok(row.try_get(0)?)).collect::<Result<_>>()?;
    match to_fence(session, listed).await?.iter().find(|(_, oid)| !covered.contains(oid)) {
        Some((name, _)) => Err(came(name)),
        None => Ok(()),
    }
}

fn came(table: &QualifiedName) -> Error {
    let message = format!("the source has a table {} that came while the cutover was prepared", table.plain());
    Error::new(Class::No, "table_came", message).hint(
        "following goes on, and takes it in or says what it needs. Cut over again once `pgtandem status --json` lists it, and \
         leave the schema alone meanwhile",
    )
}
