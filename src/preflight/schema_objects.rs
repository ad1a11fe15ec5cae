//! Objects that a move treats in a way of their own: carried differently, or not at all. Each is named.

use super::finding::kinds;
use super::look::{Attempt, Look};
use super::privileges::text;
use super::{Finding, Kind};
use crate::error::Result;
use crate::postgres::catalog::IS_USER_TABLE;
use crate::postgres::{Side, provider};

/// Relations of one kind; the condition is over `c`.
fn relations(condition: &str) -> String {
    format!(
        r"
        SELECT n.nspname::text, c.relname::text
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE {condition} AND {IS_USER_TABLE}
        ORDER BY 1, 2"
    )
}

const UNLOGGED_TABLES: &str = "c.relkind IN ('r', 'p') AND c.relpersistence = 'u'";
const FOREIGN_TABLES: &str = "c.relkind = 'f'";
const MATERIALIZED: &str = "c.relkind = 'm'";
const INHERITANCE: &str = "c.relkind = 'r' AND NOT c.relispartition
    AND EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE i.inhrelid = c.oid)";

/// Tables in schemas that stay behind because a provider makes schemas of these names: `$1`.
const PROVIDERS_TABLES: &str = r"
    SELECT pg_catalog.format('%s.%s', n.nspname, c.relname)
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = ANY ($1) AND c.relkind IN ('r', 'p', 'f')
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                      WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid AND d.deptype = 'e')
    ORDER BY 1";

const FOREIGN_SERVERS: &str = "SELECT srvname::text FROM pg_catalog.pg_foreign_server ORDER BY 1";

const EVENT_TRIGGER_NAMES: &str = r"
    SELECT e.evtname::text FROM pg_catalog.pg_event_trigger e
    JOIN pg_catalog.pg_proc p ON p.oid = e.evtfoid
    JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    WHERE e.evtenabled <> 'D' AND n.nspname <> 'pgtandem'
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                      WHERE d.classid = 'pg_catalog.pg_event_trigger'::pg_catalog.regclass
                        AND d.objid = e.oid AND d.deptype = 'e')
    ORDER BY 1";

const PUBLICATION_NAMES: &str =
    "SELECT pubname::text FROM pg_catalog.pg_publication WHERE pubname NOT LIKE 'pgtandem%' ORDER BY 1";

/// `pg_subscription` is closed to ordinary roles, its first columns are not.
const SUBSCRIPTION_NAMES: &str = r"
    SELECT s.subname::text FROM pg_catalog.pg_subscription s
    JOIN pg_catalog.pg_database d ON d.oid = s.subdbid
    WHERE d.datname = pg_catalog.current_database() ORDER BY 1";

kinds! {
    UNLOGGED = Info "unlogged_tables" {
        what: "the source has unlogged tables",
        why: "they write no WAL, so no change of theirs can be followed: their rows arrive at the cutover, most of them before the fence and the difference behind it; reading them on both sides is part of the write pause",
        fix: "ALTER TABLE … SET LOGGED, or exclude those whose rows nobody needs (move.exclude)",
    }
    FOREIGN = Info "foreign_tables" {
        what: "the source has foreign tables or servers",
        why: "their definition arrives, their data stays where it is; the target must be able to reach that server",
        fix: "check user mappings and network access from the target",
    }
    MATERIALIZED_VIEWS = Info "materialized_views" {
        what: "the source has materialized views",
        why: "they are filled on the target from the tables they read, and refreshed once more shortly before the fence of the cutover; cutover.refresh = false leaves that to you",
        fix: "",
    }
    INHERITED = Info "inheritance" {
        what: "the source has tables that inherit from others",
        why: "each is copied and followed on its own, as ONLY it",
        fix: "",
    }
    PROVIDERS_SCHEMAS = Warning "provider_schemas" {
        what: "the source has tables in a schema that bears the name of a provider's own",
        why: "such a schema belongs to the service that runs the source and stays behind whole: neither its definition nor its rows are carried",
        fix: "if it is yours: ALTER SCHEMA … RENAME TO … before the move",
    }
    EVENT_TRIGGERS = Warning "event_triggers" {
        what: "the source has event triggers",
        why: "they are held back until the cutover, and making them takes a superuser on the target, or a role that its provider lets",
        fix: "make sure that the target's role may create event triggers, or make them by hand after the cutover",
    }
    TARGET_EVENT_TRIGGERS = Warning "target_event_triggers" {
        what: "the target has event triggers of its own",
        why: "they fire for every statement of the restored schema, and are never held back: one that refuses or logs statements can stop the move",
        fix: "ALTER EVENT TRIGGER … DISABLE on the target, and ENABLE after the cutover",
    }
    EVENT_TRIGGERS_LEFT_OUT = Warning "event_triggers_left_out" {
        what: "the target refuses event triggers to its role",
        why: "those of the source are left out of the move",
        fix: "use a role that may make them, or make them by hand after the cutover",
    }
    PUBLICATIONS = Info "publications" {
        what: "the source has publications of its own",
        why: "they are left out of the move: a restored one would make the target refuse updates; whoever follows the source must be pointed to the target by hand",
        fix: "make them on the target after the cutover",
    }
    SUBSCRIPTIONS = Warning "subscriptions" {
        what: "the source subscribes to another server",
        why: "a subscription is left out of the move: on the target it would start to pull a second time",
        fix: "make it on the target at the cutover, with copy_data = false",
    }
}

/// Everything that is found by listing relations.
pub(super) async fn special_relations(look: &Look<'_>) -> Result<Vec<Finding>> {
    let mut found = Vec::new();
    for (kind, condition, what) in [
        (UNLOGGED, UNLOGGED_TABLES, "unlogged tables"),
        (FOREIGN, FOREIGN_TABLES, "foreign tables"),
        (MATERIALIZED_VIEWS, MATERIALIZED, "materialized views"),
        (INHERITED, INHERITANCE, "tables that inherit"),
    ] {
        let names = look.names_in_scope(look.source.client.query(&relations(condition), &[]).await?)?;
        let mut finding = kind.on(Side::Source, format!("{} {what}", names.len()));
        if kind.code == UNLOGGED.code {
            finding = finding.fix(set_logged(&names));
        }
        found.extend(about(finding, super::privileges::plain(&names)));
    }
    Ok(found)
}

fn set_logged(names: &[crate::postgres::QualifiedName]) -> String {
    names.iter().map(|name| format!("ALTER TABLE {name} SET LOGGED;")).collect::<Vec<_>>().join("\n")
}

fn about(finding: Finding, objects: Vec<String>) -> Option<Finding> {
    (!objects.is_empty()).then(|| finding.objects(objects))
}

/// Schemas that are left out by their name, where they hold something.
pub(super) async fn providers_schemas(look: &Look<'_>) -> Result<Vec<Finding>> {
    let rows = look.source.client.query(PROVIDERS_TABLES, &[&provider::SCHEMAS.as_slice()]).await?;
    let names = rows.iter().map(|row| text(row, 0)).collect::<Result<Vec<_>>>()?;
    let what = format!("tables in schemas of the source's provider stay behind: {}", names.join(", "));
    Ok(about(PROVIDERS_SCHEMAS.on(Side::Source, what), names).into_iter().collect())
}

/// What belongs to the database rather than to a schema.
pub(super) async fn database_objects(look: &Look<'_>) -> Result<Vec<Finding>> {
    let mut found = Vec::new();
    for (kind, sql, what) in database_questions() {
        let names = look.source.list(sql).await?;
        let what = format!("{} {what}: {}", names.len(), names.join(", "));
        found.extend(about(kind.on(Side::Source, what), names));
    }
    Ok(found)
}

fn database_questions() -> [(Kind, &'static str, &'static str); 4] {
    [
        (FOREIGN, FOREIGN_SERVERS, "foreign servers"),
        (EVENT_TRIGGERS, EVENT_TRIGGER_NAMES, "event triggers"),
        (PUBLICATIONS, PUBLICATION_NAMES, "publications"),
        (SUBSCRIPTIONS, SUBSCRIPTION_NAMES, "subscriptions"),
    ]
}

/// Whether the target lets us make those of the source; if not, the restore leaves them out.
pub(super) async fn event_triggers(look: &Look<'_>) -> Result<Vec<Finding>> {
    let names = look.source.list(EVENT_TRIGGER_NAMES).await?;
    if names.is_empty() {
        return Ok(Vec::new());
    }
    match look.target.attempt(crate::schema::PROBE_EVENT_TRIGGER).await? {
        Attempt::Allowed => Ok(Vec::new()),
        Attempt::Refused(words) => Ok(vec![EVENT_TRIGGERS_LEFT_OUT.on(Side::Target, words).objects(names)]),
    }
}

/// Event triggers that stand on the target already would fire for each statement of the restored schema.
pub(super) async fn target_event_triggers(look: &Look<'_>) -> Result<Vec<Finding>> {
    let rows = look.target.client.query(EVENT_TRIGGER_NAMES, &[]).await?;
    let names = rows.iter().map(|row| text(row, 0)).collect::<Result<Vec<_>>>()?;
    let fix = names
        .iter()
        .map(|name| format!("ALTER EVENT TRIGGER {} DISABLE;", crate::postgres::quote_identifier(name)))
        .collect::<Vec<_>>();
    let what =
        format!("{} event triggers of the target fire for what is restored there: {}", names.len(), names.join(", "));
    Ok(about(TARGET_EVENT_TRIGGERS.on(Side::Target, what).fix(fix.join("\n")), names).into_iter().collect())
}
