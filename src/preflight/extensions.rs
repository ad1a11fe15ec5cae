//! Whether the target has, or can get, the source's extensions.

use std::collections::BTreeMap;

use super::Finding;
use super::finding::kinds;
use super::look::Look;
use super::privileges::text;
use crate::error::Result;
use crate::postgres::{Side, provider, quote_identifier, quote_literal};

const INSTALLED: &str =
    "SELECT e.extname::text, e.extversion FROM pg_catalog.pg_extension e WHERE e.extname <> 'plpgsql' ORDER BY 1";

/// Whether we could create it: trusted ones take CREATE on the database, others a superuser.
const AVAILABLE: &str = r"
    SELECT v.name::text, v.version, v.trusted OR NOT v.superuser OR
           (SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname = current_user)
    FROM pg_catalog.pg_available_extension_versions v WHERE v.name = ANY ($1)";

/// Extensions that act by themselves, at times or in workers of their own.
const ACTIVE: [&str; 4] = ["pg_cron", "pg_partman", "pgagent", "timescaledb"];

kinds! {
    EXTENSION_MISSING = Blocking "extension_missing" {
        what: "the target does not offer an extension of the source",
        why: "types, functions and indexes that need it cannot be restored",
        fix: "install its package on the target, or drop it from the source",
    }
    EXTENSION_OLDER = Warning "extension_older" {
        what: "the target offers an older version of an extension",
        why: "objects that the newer version brought may be missing",
        fix: "install the newer package on the target",
    }
    EXTENSION_NOT_ALLOWED = Warning "extension_not_allowed" {
        what: "the target's role may not be able to create an extension",
        why: "it is not marked as trusted, so it takes a superuser or a provider's allowance",
        fix: "as an administrator of the target: CREATE EXTENSION …",
    }
    EXTENSION_LEFT_OUT = Info "provider_extension" {
        what: "the source has an extension that its provider looks after the server with",
        why: "it is of no use on another provider's servers, so it stays behind with what it made",
        fix: "CREATE EXTENSION … on the target, if its provider offers it and you need it",
    }
    EXTENSION_ACTIVE = Warning "extension_acts" {
        what: "the source has an extension that acts by itself",
        why: "its jobs must not run on the target before the cutover, and its own tables are not followed",
        fix: "note its jobs now, and make them on the target after the cutover",
    }
}

pub(super) async fn extensions(look: &Look<'_>) -> Result<Vec<Finding>> {
    let installed = pairs(&look.source.client.query(INSTALLED, &[]).await?)?;
    let here = pairs(&look.target.client.query(INSTALLED, &[]).await?)?;
    let names: Vec<String> = installed.keys().cloned().collect();
    let mut offered: BTreeMap<String, (Vec<String>, bool)> = BTreeMap::new();
    for row in look.target.client.query(AVAILABLE, &[&names]).await? {
        let entry = offered.entry(text(&row, 0)?).or_default();
        entry.0.push(text(&row, 1)?);
        entry.1 |= row.try_get::<_, Option<bool>>(2)?.unwrap_or(false);
    }
    let mut found = Vec::new();
    for (name, version) in &installed {
        if provider::EXTENSIONS.contains(&name.as_str()) {
            let what = format!("the extension {name} stays behind");
            found.push(EXTENSION_LEFT_OUT.on(Side::Source, what).objects(vec![name.clone()]));
            continue;
        }
        let there = here.get(name);
        match offered.get(name) {
            None if there.is_none() => found.push(missing(name)),
            Some((_, false)) if there.is_none() => found.push(not_allowed(name)),
            _ => {}
        }
        let versions = there.map(std::slice::from_ref).or(offered.get(name).map(|(versions, _)| versions.as_slice()));
        found.extend(versions.and_then(|versions| older(name, version, versions)));
        if ACTIVE.contains(&name.as_str()) {
            let what = format!("the extension {name} acts by itself");
            found.push(EXTENSION_ACTIVE.on(Side::Source, what).objects(vec![name.clone()]));
        }
    }
    Ok(found)
}

fn pairs(rows: &[tokio_postgres::Row]) -> Result<BTreeMap<String, String>> {
    rows.iter().map(|row| Ok((text(row, 0)?, text(row, 1)?))).collect()
}

fn missing(name: &str) -> Finding {
    EXTENSION_MISSING
        .on(Side::Target, format!("the extension {name} is not available on the target"))
        .fix(format!(
            "install the package of {name} on the target, or on the source: DROP EXTENSION {};",
            quote_identifier(name)
        ))
        .objects(vec![name.to_owned()])
}

fn not_allowed(name: &str) -> Finding {
    EXTENSION_NOT_ALLOWED
        .on(Side::Target, format!("the extension {name} is available, but takes a superuser"))
        .fix(format!("CREATE EXTENSION {};  -- as an administrator of the target", quote_identifier(name)))
        .objects(vec![name.to_owned()])
}

/// Newest of the target's versions below the source's.
fn older(name: &str, version: &str, offered: &[String]) -> Option<Finding> {
    let newest = offered.iter().max_by_key(|text| parts(text))?;
    if parts(newest) >= parts(version) {
        return None;
    }
    let what = format!("the extension {name} is {version} on the source, {newest} at most on the target");
    let fix = format!(
        "install the package of {name} {version} on the target; where it is installed: ALTER EXTENSION {} UPDATE TO {};",
        quote_identifier(name),
        quote_literal(version)
    );
    Some(EXTENSION_OLDER.on(Side::Target, what).fix(fix).objects(vec![name.to_owned()]))
}

/// The numbers of a version, so that 1.10 comes after 1.9.
fn parts(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert!(older("x", "1.10", &["1.9".into(), "1.2".into()]).is_some());
        assert!(older("x", "1.9", &["1.9".into(), "1.10".into()]).is_none());
        assert!(older("x", "3.4.2", &["3.4.3".into()]).is_none());
    }
}
