//! Whether the target has the roles that what travels names, and lets us give objects to them and set their default privileges.

use std::collections::{BTreeMap, BTreeSet};

use super::finding::kinds;
use super::look::{Attempt, Look, Place};
use super::owned::{Owned, of_a_column};
use super::privileges::text;
use super::{Finding, large_objects};
use crate::error::Result;
use crate::postgres::{QualifiedName, Side, provider, quote_identifier};
use crate::schema::{DefaultPrivileges, OWNS_CATALOG, PROBE_EVENT_TRIGGER, Refusal, TargetRoles};

/// Roles that own something of this database or hold a privilege on it: shared dependencies. The server keeps none on the role
/// that initdb made; what that one owns, [`Owned`] finds. Left out is what does not travel or travels without its roles:
/// extensions and what they own, publications, subscriptions, large objects, default privileges, schemas of providers.
/// `$1`: schemas that stay behind, `$2`: extensions that do.
fn named() -> String {
    format!(
        r"
        SELECT DISTINCT n.nspname::text, CASE WHEN c.relkind IN ('r', 'p', 'f') THEN c.relname::text END, r.rolname::text
        FROM pg_catalog.pg_shdepend s
        JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid
        CROSS JOIN LATERAL pg_catalog.pg_identify_object(s.classid, s.objid, s.objsubid) i
        LEFT JOIN pg_catalog.pg_class c ON s.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND c.oid = s.objid
        LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        LEFT JOIN pg_catalog.pg_depend d ON d.classid = s.classid AND d.objid = s.objid AND d.deptype = 'e'
        LEFT JOIN pg_catalog.pg_extension e ON d.refobjid = e.oid
        WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass
          AND s.deptype IN ('o', 'a', 'r') AND r.rolname !~ '^pg_'
          AND s.dbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
          AND i.type NOT IN ('extension', 'publication', 'subscription', 'large object', 'event trigger', 'default acl')
          AND i.schema IS DISTINCT FROM 'pgtandem' AND i.schema IS DISTINCT FROM 'pg_toast'
          AND NOT COALESCE(i.schema ~ '^pg_(toast_)?temp', false)
          AND NOT (s.deptype = 'o' AND (
              d.objid IS NOT NULL
              -- The owner of public, where it is a provider's or the server's, is how a database is born.
              OR i.type = 'schema' AND i.name = 'public' AND r.rolname = ANY ($3)
              OR COALESCE(c.relkind = 'S' AND {}, false)))
          AND NOT COALESCE(i.schema = ANY ($1) OR i.type = 'schema' AND i.name = ANY ($1), false)
          AND NOT COALESCE(e.extname = ANY ($2), false)
          AND NOT COALESCE(i.schema IN ('pg_catalog', 'information_schema'), false)",
        of_a_column("c.oid")
    )
}

/// What is granted on the server's own catalog: to whom, on what. Providers' roles are named by their own names: `$1`.
const GRANTED_ON_CATALOG: &str = r"
    SELECT r.rolname::text, i.identity, r.rolname = ANY ($1)
    FROM pg_catalog.pg_shdepend s
    JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid
    CROSS JOIN LATERAL pg_catalog.pg_identify_object(s.classid, s.objid, s.objsubid) i
    WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass AND s.deptype = 'a' AND r.rolname !~ '^pg_'
      AND s.dbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
      AND i.schema IN ('pg_catalog', 'information_schema')
    ORDER BY 1, 2";

/// Roles that initdb made and that are granted something by an owner other than them: no shared dependency tells.
const GRANTED_TO_THE_FIRST_ROLE: &str = r"
    SELECT DISTINCT n.nspname::text, CASE WHEN c.relkind IN ('r', 'p', 'f') THEN c.relname::text END, r.rolname::text
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) a
    JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
    WHERE r.oid = 10 AND c.relowner <> 10 AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast', 'pgtandem')";

const EVENT_TRIGGER_OWNERS: &str = r"
    SELECT DISTINCT pg_catalog.pg_get_userbyid(e.evtowner)::text
    FROM pg_catalog.pg_event_trigger e
    WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                      WHERE d.classid = 'pg_catalog.pg_event_trigger'::pg_catalog.regclass
                        AND d.objid = e.oid AND d.deptype = 'e')";

/// `$1`: names of roles. Those that are there; whether we may make something theirs; whether their rights are ours without
/// SET ROLE, as for building an index on their table. From 16 on a membership has an option for each.
fn there(target: &Place<'_>) -> String {
    let may_give = if target.facts.major() < 16 { "MEMBER" } else { "SET" };
    format!(
        "SELECT r.rolname::text, pg_catalog.pg_has_role(r.oid, '{may_give}'), pg_catalog.pg_has_role(r.oid, 'USAGE')
         FROM pg_catalog.pg_roles r WHERE r.rolname = ANY ($1)"
    )
}

kinds! {
    ROLES_MISSING = Blocking "roles_missing" {
        what: "the target lacks roles that own objects of the source or have privileges on them",
        why: "roles belong to a server, not to a database: pg_dump does not carry them, and the restore stops at the first statement that names one",
        fix: "CREATE ROLE … NOLOGIN on the target; GRANT owner TO role for each that owns something",
    }
    NOT_MEMBER = Blocking "not_member_of_owner" {
        what: "the target's role may not act for roles that own objects of the source",
        why: "the restore gives each object to its owner, and then builds indexes on it: it would stop with role_not_granted or insufficient_privilege",
        fix: "GRANT owner TO role on the target (from 16 on WITH INHERIT TRUE, SET TRUE)",
    }
    CATALOG_GRANTS_LEFT_OUT = Warning "catalog_grants_left_out" {
        what: "the source has grants on functions or views of the server itself, which the target refuses to its role",
        why: "only the owner of the server's catalog can make them; they are left out of the move",
        fix: "GRANT … on the target, as an administrator",
    }
    DEFAULT_PRIVILEGES_LEFT_OUT = Warning "default_privileges_left_out" {
        what: "the target cannot take default privileges of the source",
        why: "they are for, or grant to, a role that the target lacks or that its role may not act for; they are left out of the move",
        fix: "before the move, on the target: CREATE ROLE …, or GRANT owner TO role; or set them by hand after the cutover",
    }
}

pub(super) async fn roles(look: &Look<'_>) -> Result<Vec<Finding>> {
    let mut owners = Owned::find(look).await?.owners;
    let of_large_objects = large_objects::roles(look).await?;
    owners.extend(of_large_objects.iter().filter(|(_, owns)| *owns).map(|(name, _)| name.clone()));
    let mut needed = owners.clone();
    needed.extend(of_large_objects.into_iter().map(|(name, _)| name));
    needed.extend(named_by_privileges(look).await?);
    // Where the target refuses these, they are left out.
    if look.target.client.query_one(OWNS_CATALOG, &[]).await?.try_get(0)? {
        for row in look.source.client.query(GRANTED_ON_CATALOG, &[&provider::ROLES.as_slice()]).await? {
            needed.insert(text(&row, 0)?);
        }
    }
    if matches!(look.target.attempt(PROBE_EVENT_TRIGGER).await, Ok(Attempt::Allowed)) {
        needed.extend(look.source.list(EVENT_TRIGGER_OWNERS).await?);
    }
    let target = &look.target;
    let names: Vec<&String> = needed.iter().collect();
    let mut strangers = BTreeMap::new();
    let mut there_now = BTreeSet::new();
    for row in target.client.query(&there(target), &[&names]).await? {
        let name = text(&row, 0)?;
        let (may_give, inherits): (bool, bool) = (row.try_get(1)?, row.try_get(2)?);
        if owners.contains(&name) && !(may_give && inherits) {
            strangers.insert(name.clone(), may_give);
        }
        there_now.insert(name);
    }
    let missing: Vec<String> = needed.into_iter().filter(|name| !there_now.contains(name)).collect();
    let mut found = Vec::new();
    found.extend(roles_missing(target, missing, &owners));
    found.extend(not_member(target, &strangers));
    Ok(found)
}

async fn named_by_privileges(look: &Look<'_>) -> Result<Vec<String>> {
    let source = look.source.client;
    let lists = (provider::SCHEMAS.as_slice(), provider::EXTENSIONS.as_slice(), provider::ROLES.as_slice());
    let mut rows = source.query(&named(), &[&lists.0, &lists.1, &lists.2]).await?;
    rows.extend(source.query(GRANTED_TO_THE_FIRST_ROLE, &[]).await?);
    let mut names = Vec::new();
    for row in rows {
        let table: (Option<String>, Option<String>) = (row.try_get(0)?, row.try_get(1)?);
        let travels = match table {
            (Some(schema), Some(name)) => look.travels(&QualifiedName::new(schema, name)),
            _ => true,
        };
        if travels {
            names.push(text(&row, 2)?);
        }
    }
    Ok(names)
}

fn roles_missing(target: &Place<'_>, missing: Vec<String>, owners: &BTreeSet<String>) -> Option<Finding> {
    if missing.is_empty() {
        return None;
    }
    let mut fix: Vec<String> =
        missing.iter().map(|role| format!("CREATE ROLE {} NOLOGIN;", quote_identifier(role))).collect();
    if !target.facts.superuser {
        fix.extend(missing.iter().filter(|role| owners.contains(*role)).map(|role| grant(target, role)));
    }
    let what = format!("the target lacks the roles {}", missing.join(", "));
    Some(ROLES_MISSING.on(Side::Target, what).fix(fix.join("\n")).objects(missing))
}

/// `strangers`: roles, and whether we may at least give something to them.
fn not_member(target: &Place<'_>, strangers: &BTreeMap<String, bool>) -> Option<Finding> {
    if strangers.is_empty() {
        return None;
    }
    let mut fix: Vec<String> = strangers.keys().map(|role| grant(target, role)).collect();
    if target.facts.major() < 16 && strangers.values().any(|may_give| *may_give) {
        fix.push(format!("ALTER ROLE {} INHERIT;", quote_identifier(&target.facts.user)));
    }
    let names: Vec<String> = strangers.keys().cloned().collect();
    let what = format!("{} may not act for {}", target.facts.user, names.join(", "));
    Some(NOT_MEMBER.on(Side::Target, what).fix(fix.join("\n")).objects(names))
}

/// A membership that lets us give objects to the role and treat them as ours afterwards.
fn grant(target: &Place<'_>, role: &str) -> String {
    let options = if target.facts.major() < 16 { "" } else { " WITH INHERIT TRUE, SET TRUE" };
    format!("GRANT {} TO {}{options};", quote_identifier(role), quote_identifier(&target.facts.user))
}

/// Grants on the server's own catalog that the restore will leave out; those to a provider's roles are nobody's loss.
pub(super) async fn catalog_grants(look: &Look<'_>) -> Result<Vec<Finding>> {
    if look.target.client.query_one(OWNS_CATALOG, &[]).await?.try_get(0)? {
        return Ok(Vec::new());
    }
    let mut objects = Vec::new();
    for row in look.source.client.query(GRANTED_ON_CATALOG, &[&provider::ROLES.as_slice()]).await? {
        if !row.try_get::<_, bool>(2)? {
            objects.push(format!("{} to {}", text(&row, 1)?, text(&row, 0)?));
        }
    }
    if objects.is_empty() {
        return Ok(Vec::new());
    }
    let what = format!("left out: grants on {}", objects.join("; "));
    Ok(vec![CATALOG_GRANTS_LEFT_OUT.on(Side::Target, what).objects(objects)])
}

/// Default privileges that the restore will leave out.
pub(super) async fn default_privileges(look: &Look<'_>) -> Result<Vec<Finding>> {
    let all = DefaultPrivileges::read(look.source.client).await?;
    let target_roles = TargetRoles::of(look.target.client, &all).await?;
    let (mut objects, mut fix) = (Vec::new(), BTreeSet::new());
    for privileges in &all {
        match target_roles.refuse(privileges) {
            None => continue,
            Some(Refusal::Missing(roles)) => {
                fix.extend(roles.iter().map(|role| format!("CREATE ROLE {} NOLOGIN;", quote_identifier(role))));
            }
            Some(Refusal::NotOurs(role)) => {
                fix.insert(grant(&look.target, &role));
            }
        }
        objects.push(privileges.plain());
    }
    objects.dedup();
    if objects.is_empty() {
        return Ok(Vec::new());
    }
    let what = format!("left out: {}", objects.join("; "));
    let fix = fix.into_iter().collect::<Vec<_>>().join("\n");
    Ok(vec![DEFAULT_PRIVILEGES_LEFT_OUT.on(Side::Target, what).fix(fix).objects(objects)])
}
