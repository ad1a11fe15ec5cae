//! Large objects: whether they are carried, can be read, can be made on the target, and can be kept from changing.

use super::Finding;
use super::finding::kinds;
use super::look::{Attempt, Look};
use super::privileges::text;
use crate::config::CopyMethod;
use crate::error::Result;
use crate::postgres::{Side, quote_identifier};

const COUNT: &str = "SELECT count(*) FROM pg_catalog.pg_largeobject_metadata";

/// Those that the role may not read, as the server would decide it: neither a superuser nor the old way of asking nobody, nor
/// the owner's or granted rights.
const UNREADABLE: &str = r"
    SELECT m.oid::text
    FROM pg_catalog.pg_largeobject_metadata m
    WHERE NOT (SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname = current_user)
      AND NOT pg_catalog.current_setting('lo_compat_privileges')::bool
      AND NOT EXISTS (
        SELECT FROM pg_catalog.aclexplode(COALESCE(m.lomacl, pg_catalog.acldefault('L', m.lomowner))) a
        WHERE a.privilege_type = 'SELECT' AND (a.grantee = 0 OR pg_catalog.pg_has_role(a.grantee, 'USAGE')))
    ORDER BY m.oid";

/// Who owns one or is granted something on one: names, and whether it is an owner.
const ROLES: &str = r"
    SELECT DISTINCT r.rolname::text, r.oid = m.lomowner
    FROM pg_catalog.pg_largeobject_metadata m
    LEFT JOIN LATERAL pg_catalog.aclexplode(m.lomacl) a ON true
    JOIN pg_catalog.pg_roles r ON r.oid IN (m.lomowner, a.grantee)
    WHERE r.rolname !~ '^pg_'";

/// Makes one and writes to it, for a transaction that is rolled back.
const PROBE: &str = "SELECT pg_catalog.lo_put(pg_catalog.lo_create(0), 0, 'x')";

const MAY_LOCK: &str = "SELECT pg_catalog.has_table_privilege('pg_catalog.pg_largeobject_metadata', 'UPDATE')";

/// A target that is new has none; of one that has a great many, the cutover itself finds the rest.
const SOME: &str = "SELECT oid FROM pg_catalog.pg_largeobject_metadata ORDER BY oid LIMIT 10000";
const OF_THESE: &str = "SELECT oid::text FROM pg_catalog.pg_largeobject_metadata WHERE oid = ANY ($1) ORDER BY oid";

/// So many are named.
const NAMED: usize = 20;

kinds! {
    LARGE_OBJECTS = Info "large_objects" {
        what: "the source has large objects",
        why: "logical replication does not carry them: they arrive at the cutover, most of them before the fence and the difference behind it; reading them on both sides is part of the write pause. The fence does not stop what writes into an existing one and to no table of the move",
        fix: "stop what writes into existing large objects alone before the cutover; if nobody needs them: move.large_objects = false",
    }
    LEFT_BEHIND = Warning "large_objects_left_behind" {
        what: "the source has large objects, and move.large_objects is false",
        why: "they will be missing on the target",
        fix: "move.large_objects = true, or carry them by hand while writes are stopped",
    }
    UNREADABLE_OBJECTS = Blocking "large_objects_unreadable" {
        what: "large objects of the source cannot be read",
        why: "their content cannot be carried",
        fix: "GRANT SELECT ON LARGE OBJECT … TO …, or move.large_objects = false",
    }
    REFUSED_OBJECTS = Blocking "large_objects_refused" {
        what: "the target takes no large objects from its role",
        why: "some services refuse them",
        fix: "move their content to a bytea column (lo_get), and set move.large_objects = false",
    }
    TAKEN_OBJECTS = Blocking "large_objects_taken" {
        what: "the target has large objects under identifiers that the source uses",
        why: "large objects keep their identifiers, because columns hold them; what the move did not make is never overwritten",
        fix: "SELECT lo_unlink(…) on the target if nobody needs them, or move.large_objects = false",
    }
    UNFENCED_OBJECTS = Warning "large_objects_unfenced" {
        what: "the source's role may not lock large objects",
        why: "the fence of a cutover then stops writers of tables only: a large object that is made or removed without a write to a table of the move may be missed",
        fix: "use a superuser on the source, or stop what makes or removes large objects alone before the cutover",
    }
}

pub(super) async fn on_source(look: &Look<'_>) -> Result<Vec<Finding>> {
    let (source, side) = (&look.source, Side::Source);
    let count = source.count(COUNT).await?;
    if count == 0 {
        return Ok(Vec::new());
    }
    let what = format!("{count} large objects");
    if !look.config.large_objects {
        return Ok(vec![LEFT_BEHIND.on(side, what)]);
    }
    let mut found = vec![LARGE_OBJECTS.on(side, what)];
    let unreadable = source.list(UNREADABLE).await?;
    if !unreadable.is_empty() {
        let user = quote_identifier(&source.facts.user);
        let fix = unreadable.iter().map(|oid| format!("GRANT SELECT ON LARGE OBJECT {oid} TO {user};"));
        let what = format!("{} large objects cannot be read by {}", unreadable.len(), source.facts.user);
        found.push(
            UNREADABLE_OBJECTS
                .on(side, what)
                .fix(fix.collect::<Vec<_>>().join("\n"))
                .objects(unreadable.into_iter().take(NAMED).collect()),
        );
    }
    if !source.client.query_one(MAY_LOCK, &[]).await?.try_get::<_, bool>(0)? {
        let what = format!("{} may not lock pg_largeobject_metadata", source.facts.user);
        found.push(UNFENCED_OBJECTS.on(side, what));
    }
    Ok(found)
}

/// Whether the target would take them.
pub(super) async fn on_target(look: &Look<'_>) -> Result<Vec<Finding>> {
    if !look.config.large_objects || look.source.count(COUNT).await? == 0 {
        return Ok(Vec::new());
    }
    if let Attempt::Refused(words) = look.target.attempt(PROBE).await? {
        return Ok(vec![REFUSED_OBJECTS.on(Side::Target, words)]);
    }
    // Those of a move that has begun are its own, and so are those of a copy made by hand.
    if look.begun || look.config.copy.method == CopyMethod::None {
        return Ok(Vec::new());
    }
    let rows = look.target.client.query(SOME, &[]).await?;
    let theirs = rows.iter().map(|row| Ok(row.try_get(0)?)).collect::<Result<Vec<u32>>>()?;
    let rows = look.source.client.query(OF_THESE, &[&theirs]).await?;
    let taken = rows.iter().map(|row| text(row, 0)).collect::<Result<Vec<_>>>()?;
    if taken.is_empty() {
        return Ok(Vec::new());
    }
    let what = format!("the target has {} large objects under identifiers of the source", taken.len());
    let fix = taken.iter().map(|oid| format!("SELECT lo_unlink({oid});")).collect::<Vec<_>>().join("\n");
    let objects = taken.into_iter().take(NAMED).collect();
    Ok(vec![TAKEN_OBJECTS.on(Side::Target, what).fix(fix).objects(objects)])
}

/// The roles that carried objects name: each, and whether it owns one.
pub(super) async fn roles(look: &Look<'_>) -> Result<Vec<(String, bool)>> {
    if !look.config.large_objects {
        return Ok(Vec::new());
    }
    let rows = look.source.client.query(ROLES, &[]).await?;
    rows.iter().map(|row| Ok((text(row, 0)?, row.try_get(1)?))).collect()
}
