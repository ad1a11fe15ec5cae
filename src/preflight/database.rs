//! What belongs to the database itself and travels with nothing: settings made for it, grants on it, its comment.

use std::collections::BTreeSet;

use super::Finding;
use super::finding::kinds;
use super::grants::{Grant, differences, exploded};
use super::look::{Look, Place};
use super::privileges::text;
use crate::error::Result;
use crate::postgres::{Side, quote_identifier, quote_literal};

/// What is set for this database: the role, empty for all; the setting's name; its value; whether that is a list of quoted
/// names, which is a literal no more.
const SETTINGS: &str = r"
    SELECT COALESCE(u.rolname::text, ''), pg_catalog.split_part(s.setting, '=', 1),
           pg_catalog.substr(s.setting, pg_catalog.strpos(s.setting, '=') + 1),
           pg_catalog.lower(pg_catalog.split_part(s.setting, '=', 1)) IN
               ('local_preload_libraries', 'search_path', 'session_preload_libraries', 'temp_tablespaces')
    FROM pg_catalog.pg_db_role_setting r
    JOIN pg_catalog.pg_database d ON d.oid = r.setdatabase
    LEFT JOIN pg_catalog.pg_roles u ON u.oid = r.setrole
    CROSS JOIN LATERAL unnest(r.setconfig) s(setting)
    WHERE d.datname = pg_catalog.current_database() AND (r.setrole = 0 OR u.oid IS NOT NULL)";

const COMMENT: &str = r"
    SELECT pg_catalog.shobj_description(d.oid, 'pg_database')
    FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()";

fn grants() -> String {
    format!(
        "SELECT g.* FROM pg_catalog.pg_database d
         CROSS JOIN LATERAL ({}) g
         WHERE d.datname = pg_catalog.current_database()",
        exploded("d.datacl", 'd', "d.datdba")
    )
}

kinds! {
    DATABASE_PROPERTIES = Warning "database_properties" {
        what: "settings, grants or a comment of the source database are not on the target database",
        why: "they belong to the database itself, which pgtandem does not make: applications that count on them behave otherwise after the cutover",
        fix: "before the cutover, on the target: ALTER DATABASE … SET …; ALTER ROLE … IN DATABASE … SET …; GRANT … ON DATABASE …; COMMENT ON DATABASE …",
    }
}

/// One setting made for the database.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Setting {
    /// Empty for every role.
    role: String,
    name: String,
    value: String,
    is_list: bool,
}

impl Setting {
    fn statement(&self, database: &str) -> String {
        let value = if self.is_list { self.value.clone() } else { quote_literal(&self.value) };
        // Names of settings may have a dot, which is none of the name when quoted.
        let name = self.name.split('.').map(quote_identifier).collect::<Vec<_>>().join(".");
        if self.role.is_empty() {
            format!("ALTER DATABASE {database} SET {name} TO {value};")
        } else {
            format!("ALTER ROLE {} IN DATABASE {database} SET {name} TO {value};", quote_identifier(&self.role))
        }
    }
}

/// What one side says of its database.
struct Properties {
    settings: BTreeSet<Setting>,
    grants: BTreeSet<Grant>,
    comment: Option<String>,
}

impl Properties {
    async fn of(place: &Place<'_>) -> Result<Self> {
        let rows = place.client.query(SETTINGS, &[]).await?;
        let settings = rows.iter().map(|row| {
            Ok(Setting { role: text(row, 0)?, name: text(row, 1)?, value: text(row, 2)?, is_list: row.try_get(3)? })
        });
        let settings = settings.collect::<Result<_>>()?;
        let rows = place.client.query(&grants(), &[]).await?;
        let grants = rows.iter().map(|row| Grant::from_row(row, 0)).collect::<Result<_>>()?;
        let comment = place.client.query_one(COMMENT, &[]).await?.try_get(0)?;
        Ok(Self { settings, grants, comment })
    }
}

/// What the target database would have to be told to be like the source's.
pub(super) async fn properties(look: &Look<'_>) -> Result<Vec<Finding>> {
    let source = Properties::of(&look.source).await?;
    let target = Properties::of(&look.target).await?;
    let database = quote_identifier(&look.target.facts.database);
    let mut objects = Vec::new();
    let settings: Vec<String> =
        source.settings.difference(&target.settings).map(|setting| setting.statement(&database)).collect();
    // What the move itself was granted there is no part of the application.
    let grants =
        differences(&source.grants, &target.grants, &format!("DATABASE {database}"), Some(&look.source.facts.user));
    let comment = source.comment.filter(|comment| target.comment.as_ref() != Some(comment));
    let comment = comment.map(|comment| format!("COMMENT ON DATABASE {database} IS {};", quote_literal(&comment)));
    for (what, count) in
        [("settings", settings.len()), ("grants", grants.len()), ("comment", usize::from(comment.is_some()))]
    {
        if count > 0 {
            objects.push(what.to_owned());
        }
    }
    if objects.is_empty() {
        return Ok(Vec::new());
    }
    let fix: Vec<String> = settings.into_iter().chain(grants).chain(comment).collect();
    let what = format!("the source database has {} that the target database lacks", objects.join(", "));
    Ok(vec![DATABASE_PROPERTIES.on(Side::Target, what).fix(fix.join("\n")).objects(objects)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(role: &str, name: &str, value: &str, is_list: bool) -> Setting {
        Setting { role: role.into(), name: name.into(), value: value.into(), is_list }
    }

    #[test]
    fn settings_become_statements() {
        let path = setting("", "search_path", "\"$user\", app", true).statement("\"d\"");
        assert_eq!(path, r#"ALTER DATABASE "d" SET "search_path" TO "$user", app;"#);
        let own = setting("O'x", "my.key", "it's", false).statement("\"d\"");
        assert_eq!(own, r#"ALTER ROLE "O'x" IN DATABASE "d" SET "my"."key" TO 'it''s';"#);
    }
}
