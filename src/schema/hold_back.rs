//! Finding what would react to applied rows or to our statements, or refuse them, with the statements that disable it and
//! bring it back.
//!
//! The order matters. Disabling goes from first to last, enabling from last to first: event triggers are disabled first
//! and enabled last, so that they never see the other statements. A trigger of a partitioned table hands its state down to
//! its copies on the partitions, so a copy is named only where it differs, before its parent.

use std::collections::HashSet;

use crate::error::{Doing, Result};
use crate::postgres::{QualifiedName, Session, catalog::IS_USER_TABLE, quote_identifier};
use crate::state::HeldBack;

/// `$1`: names of event triggers that came from the source. The target's own ones are not ours to touch.
const EVENT_TRIGGERS: &str = "SELECT evtname::text, evtenabled::text FROM pg_catalog.pg_event_trigger WHERE evtname = ANY ($1) AND evtenabled <> 'D' ORDER BY 1";

/// Triggers that people made, enabled in any way. `tgisinternal` is set on copies before version 15, hence the parent.
fn triggers() -> String {
    format!(
        r"
        SELECT n.nspname::text, c.relname::text, t.tgname::text, t.tgenabled::text
        FROM pg_catalog.pg_trigger t
        JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        LEFT JOIN pg_catalog.pg_trigger parent ON parent.oid = t.tgparentid
        CROSS JOIN LATERAL (SELECT count(*) FROM pg_catalog.pg_partition_ancestors(c.oid)) AS family (depth)
        WHERE c.relkind IN ('r', 'p')
          AND CASE WHEN parent.oid IS NULL THEN NOT t.tgisinternal AND t.tgenabled <> 'D'
                   ELSE NOT pg_catalog.starts_with(parent.tgname::text, 'RI_ConstraintTrigger') AND t.tgenabled <> parent.tgenabled END
          AND {IS_USER_TABLE}
        ORDER BY family.depth DESC, 1, 2, 3"
    )
}

fn rules() -> String {
    format!(
        r"
        SELECT n.nspname::text, c.relname::text, r.rulename::text, r.ev_enabled::text
        FROM pg_catalog.pg_rewrite r
        JOIN pg_catalog.pg_class c ON c.oid = r.ev_class
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND r.rulename <> '_RETURN' AND r.ev_enabled <> 'D' AND {IS_USER_TABLE}
        ORDER BY 1, 2, 3"
    )
}

/// Columns that are GENERATED ALWAYS AS IDENTITY. An INSERT may say OVERRIDING SYSTEM VALUE, an UPDATE may not: it would be
/// refused the value that the source gave. From 17 on a partition has its identity from its root.
fn identity_columns() -> String {
    format!(
        r"
        SELECT n.nspname::text, c.relname::text, a.attname::text
        FROM pg_catalog.pg_attribute a
        JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND a.attidentity = 'a' AND NOT a.attisdropped AND {IS_USER_TABLE}
          AND NOT (c.relispartition AND pg_catalog.current_setting('server_version_num')::int4 >= 170000)
        ORDER BY 1, 2, 3"
    )
}

/// What is held back of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A trigger.
    Trigger,
    /// A rule.
    Rule,
    /// A column that is GENERATED ALWAYS AS IDENTITY.
    Identity,
}

/// What to ask a server, in the order of disabling; each row, all of it text, makes an [`object`].
pub(crate) fn questions() -> [(Kind, String); 3] {
    [(Kind::Trigger, triggers()), (Kind::Rule, rules()), (Kind::Identity, identity_columns())]
}

/// From a row of the answer: schema, table, name and, but for an identity, its state.
pub(crate) fn object(kind: Kind, row: &[String]) -> HeldBack {
    let text = |at: usize| row.get(at).map(String::as_str).unwrap_or_default();
    let table = QualifiedName::new(text(0), text(1));
    match kind {
        Kind::Trigger => on_table("TRIGGER", &table, text(2), text(3)),
        Kind::Rule => on_table("RULE", &table, text(2), text(3)),
        Kind::Identity => identity(&table, text(2)),
    }
}

/// Everything on a server that is enabled and must not be before the cutover, in the order of disabling.
pub(crate) async fn find(session: &Session, event_triggers: &[String]) -> Result<Vec<HeldBack>> {
    let mut found = Vec::new();
    for row in session.query(EVENT_TRIGGERS, &[&event_triggers]).await.doing(|| "listing event triggers")? {
        found.push(event_trigger(row.try_get(0)?, row.try_get(1)?));
    }
    for (kind, question) in questions() {
        for row in session.query(&question, &[]).await.doing(|| "listing triggers, rules and identities")? {
            let fields = (0..row.len()).map(|at| Ok(row.try_get(at)?)).collect::<Result<Vec<String>>>()?;
            found.push(object(kind, &fields));
        }
    }
    Ok(found)
}

/// What the cutover shall bring back, whatever happened since the schema was restored: the triggers and rules that the source
/// has enabled and the target has at all.
///
/// Returns them, and the names of all triggers and rules that the source has. One that is held back and that the source does not have
/// under this name keeps its place: a rename of it may still be on its way.
pub(crate) async fn as_on_the_source(source: &Session, target: &Session) -> Result<(Vec<HeldBack>, HashSet<String>)> {
    let found = find(source, &[]).await?;
    let names = async |session: &Session| -> Result<HashSet<String>> {
        let rows = session.query(&every_object(), &[]).await.doing(|| "listing triggers and rules")?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    };
    let (known, there) = (names(source).await?, names(target).await?);
    Ok((found.into_iter().filter(|object| there.contains(&object.what)).collect(), known))
}

/// [`HeldBack::what`] of each trigger and rule, enabled or not.
fn every_object() -> String {
    format!(
        r"
        SELECT 'trigger ' || t.tgname || ' on ' || n.nspname || '.' || c.relname
        FROM pg_catalog.pg_trigger t
        JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE {IS_USER_TABLE}
        UNION ALL
        SELECT 'rule ' || r.rulename || ' on ' || n.nspname || '.' || c.relname
        FROM pg_catalog.pg_rewrite r
        JOIN pg_catalog.pg_class c ON c.oid = r.ev_class
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE {IS_USER_TABLE}"
    )
}

/// The words of `tgenabled`, `ev_enabled` and `evtenabled`.
fn state(enabled: &str) -> &'static str {
    match enabled {
        "D" => "DISABLE",
        "R" => "ENABLE REPLICA",
        "A" => "ENABLE ALWAYS",
        _ => "ENABLE",
    }
}

fn event_trigger(name: &str, enabled: &str) -> HeldBack {
    let quoted = quote_identifier(name);
    HeldBack {
        what: format!("event trigger {name}"),
        enable: format!("ALTER EVENT TRIGGER {quoted} {}", state(enabled)),
        disable: format!("ALTER EVENT TRIGGER {quoted} DISABLE"),
    }
}

fn on_table(kind: &str, table: &QualifiedName, name: &str, enabled: &str) -> HeldBack {
    let quoted = quote_identifier(name);
    HeldBack {
        what: format!("{} {name} on {}", kind.to_lowercase(), table.plain()),
        enable: format!("ALTER TABLE {table} {} {kind} {quoted}", state(enabled)),
        disable: format!("ALTER TABLE {table} DISABLE {kind} {quoted}"),
    }
}

fn identity(table: &QualifiedName, column: &str) -> HeldBack {
    let set = |how: &str| format!("ALTER TABLE {table} ALTER COLUMN {} SET GENERATED {how}", quote_identifier(column));
    HeldBack {
        what: format!("GENERATED ALWAYS of {}.{column}", table.plain()),
        enable: set("ALWAYS"),
        disable: set("BY DEFAULT"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trigger_comes_back_as_it_was() {
        let table = QualifiedName::new("s", "T");
        let held = on_table("TRIGGER", &table, "x", "A");
        assert_eq!(held.enable, r#"ALTER TABLE "s"."T" ENABLE ALWAYS TRIGGER "x""#);
        assert_eq!(held.disable, r#"ALTER TABLE "s"."T" DISABLE TRIGGER "x""#);
        assert!(on_table("RULE", &table, "x", "R").enable.contains("ENABLE REPLICA RULE"));
        let column = identity(&table, "Id");
        assert_eq!(column.enable, r#"ALTER TABLE "s"."T" ALTER COLUMN "Id" SET GENERATED ALWAYS"#);
        assert!(column.disable.ends_with("SET GENERATED BY DEFAULT"));
        assert!(event_trigger("e", "O").enable.ends_with(r#""e" ENABLE"#));
    }
}
