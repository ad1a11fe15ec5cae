//! Schemas that are on both sides before the move, as `public` always is: whether objects can be made there, and whether owner
//! and grants of the source can be given to them. A schema that the restore makes itself needs no question.

use std::collections::{BTreeMap, BTreeSet};

use super::Finding;
use super::finding::kinds;
use super::grants::{Grant, differences, exploded};
use super::look::{Look, Place};
use super::owned::Owned;
use super::privileges::text;
use crate::config::CopyMethod;
use crate::error::Result;
use crate::postgres::{Side, provider, quote_identifier};

/// `$1`: schemas, `$2`: a role for each, or the current one where it is empty. Whether it may enter and create there; rows only
/// for what is there. A server lets an owner have an object only where the owner may create.
const MAY_CREATE: &str = r"
    SELECT a.schema, a.role,
           pg_catalog.has_schema_privilege(COALESCE(r.oid, me.oid), n.oid, 'USAGE'),
           pg_catalog.has_schema_privilege(COALESCE(r.oid, me.oid), n.oid, 'CREATE')
    FROM unnest($1::text[], $2::text[]) AS a (schema, role)
    JOIN pg_catalog.pg_namespace n ON n.nspname = a.schema
    JOIN pg_catalog.pg_roles me ON me.rolname = current_user
    LEFT JOIN pg_catalog.pg_roles r ON r.rolname = a.role
    WHERE a.role = '' OR r.oid IS NOT NULL ORDER BY 1, 2";

/// `$1`: schemas. Owner, whether it is as a database is born with, whether it is ours, and every grant.
fn described() -> String {
    format!(
        "SELECT n.nspname::text, pg_catalog.pg_get_userbyid(n.nspowner)::text,
                n.nspname = 'public' AND (n.nspowner = 10 OR pg_catalog.pg_get_userbyid(n.nspowner) = 'pg_database_owner'),
                pg_catalog.pg_has_role(n.nspowner, 'USAGE'), g.*
         FROM pg_catalog.pg_namespace n
         LEFT JOIN LATERAL ({}) g (grantee, privilege, grantable) ON true
         WHERE n.nspname = ANY ($1) ORDER BY 1",
        exploded("n.nspacl", 'n', "n.nspowner")
    )
}

kinds! {
    SCHEMA_CLOSED = Blocking "target_schema_closed" {
        what: "nothing can be made in a schema of the target that the source uses",
        why: "the target's role makes each object there and gives it to its owner; both must have CREATE on the schema (from 15 on, public gives it to nobody)",
        fix: "GRANT USAGE, CREATE ON SCHEMA … TO … on the target",
    }
    SCHEMA_KEPT = Warning "target_schema_kept" {
        what: "a schema that was on the target before the move belongs to somebody else there",
        why: "the target's role can give it neither the owner nor the grants nor the comment that it has on the source: it stays as it is",
        fix: "ALTER SCHEMA … OWNER TO …; GRANT … ON SCHEMA … TO … as an administrator of the target",
    }
}

/// A schema, as one side has it.
#[derive(Debug, Default)]
struct Described {
    owner: String,
    born_so: bool,
    ours: bool,
    grants: BTreeSet<Grant>,
}

async fn describe(place: &Place<'_>, names: &[&String]) -> Result<BTreeMap<String, Described>> {
    let mut found: BTreeMap<String, Described> = BTreeMap::new();
    for row in place.client.query(&described(), &[&names]).await? {
        let one = found.entry(text(&row, 0)?).or_default();
        (one.owner, one.born_so, one.ours) = (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
        if row.try_get::<_, Option<String>>(4)?.is_some() {
            one.grants.insert(Grant::from_row(&row, 4)?);
        }
    }
    Ok(found)
}

pub(super) async fn existing(look: &Look<'_>) -> Result<Vec<Finding>> {
    if look.begun || look.config.copy.method == CopyMethod::None {
        return Ok(Vec::new());
    }
    let owned = Owned::find(look).await?;
    let names: Vec<&String> = owned.schemas.iter().collect();
    let target = describe(&look.target, &names).await?;
    let source = describe(&look.source, &names).await?;
    let mut found = Vec::new();
    found.extend(closed(look, &owned, &source, &target).await?);
    found.extend(kept(look, &source, &target));
    Ok(found)
}

/// Schemas without the right to create, for us or for an owner of something in them.
async fn closed(
    look: &Look<'_>,
    owned: &Owned,
    source: &BTreeMap<String, Described>,
    target: &BTreeMap<String, Described>,
) -> Result<Option<Finding>> {
    if look.target.facts.superuser {
        return Ok(None);
    }
    // The restore gives the schema to its owner first, if it can.
    let becomes_owner = |schema: &String, role: &String| {
        target.get(schema).is_some_and(|one| one.ours) && will_own(source.get(schema), role)
    };
    let asked = owned.in_schemas.iter().filter(|(schema, role)| !becomes_owner(schema, role));
    let (mut schemas, mut roles): (Vec<&str>, Vec<&str>) =
        asked.map(|(schema, role)| (schema.as_str(), role.as_str())).unzip();
    for schema in &owned.schemas {
        schemas.push(schema);
        roles.push("");
    }
    let (mut objects, mut fix) = (BTreeSet::new(), Vec::new());
    for row in look.target.client.query(MAY_CREATE, &[&schemas, &roles]).await? {
        let (schema, role) = (text(&row, 0)?, text(&row, 1)?);
        let (usage, create): (bool, bool) = (row.try_get(2)?, row.try_get(3)?);
        // Only who makes something has to find the schema as well.
        let rights = match (usage || !role.is_empty(), create) {
            (true, true) => continue,
            (true, false) => "CREATE",
            (false, true) => "USAGE",
            (false, false) => "USAGE, CREATE",
        };
        let role = if role.is_empty() { &look.target.facts.user } else { &role };
        fix.push(format!("GRANT {rights} ON SCHEMA {} TO {};", quote_identifier(&schema), quote_identifier(role)));
        objects.insert(format!("{schema} for {role}"));
    }
    if objects.is_empty() {
        return Ok(None);
    }
    let objects: Vec<String> = objects.into_iter().collect();
    let what = format!("objects cannot be made in schemas of the target: {}", objects.join(", "));
    Ok(Some(SCHEMA_CLOSED.on(Side::Target, what).fix(fix.join("\n")).objects(objects)))
}

fn will_own(source: Option<&Described>, role: &str) -> bool {
    source.is_some_and(|schema| schema.owner == role && !schema.born_so && !provider::ROLES.contains(&role))
}

/// Schemas whose owner and grants will not arrive.
fn kept(
    look: &Look<'_>,
    source: &BTreeMap<String, Described>,
    target: &BTreeMap<String, Described>,
) -> Option<Finding> {
    let (mut objects, mut fix) = (Vec::new(), Vec::new());
    for (name, there) in target.iter().filter(|(_, there)| !there.ours) {
        let Some(here) = source.get(name) else { continue };
        let quoted = quote_identifier(name);
        let before = fix.len();
        if here.owner != there.owner && will_own(Some(here), &here.owner) {
            fix.push(format!("ALTER SCHEMA {quoted} OWNER TO {};", quote_identifier(&here.owner)));
        }
        let on = format!("SCHEMA {quoted}");
        fix.extend(differences(&here.grants, &there.grants, &on, None));
        if fix.len() > before {
            objects.push(name.clone());
        }
    }
    if objects.is_empty() {
        return None;
    }
    let what = format!("{} may not change the schemas {}", look.target.facts.user, objects.join(", "));
    Some(SCHEMA_KEPT.on(Side::Target, what).fix(fix.join("\n")).objects(objects))
}
