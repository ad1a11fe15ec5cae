//! Event triggers on the source that write each schema change into the stream.
//!
//! Owns, on the source: the table `pgtandem.ddl_<name>`, the functions `pgtandem.capture_<name>` and
//! `pgtandem.publish_<name>`, and the event triggers `pgtandem_<name>_command`, `_drop` and `_rewrite`. Promises that a statement of the
//! application never fails because of them: whatever goes wrong is caught, and said in the stream. Where the role
//! may not make event triggers, nothing is made, and the move goes on without.
//!
//! # How a schema change gets into the stream
//!
//! The trigger inserts a description of the statement into the table, in the transaction of the statement, and deletes it
//! again at once. The table is published for inserts only, so the stream carries the description in its place between the
//! rows, and the table stays empty. A logical message would do the same without a table, but PostgreSQL 13 sends none, and
//! every role may write one: it could have the target run any statement. Into the table only its owner writes.
//!
//! A table that is new is published by the same trigger, so that its rows travel from the first one on; one whose
//! replica identity came or went moves to the publication that fits, before the source could refuse an UPDATE.

use crate::config::{MoveName, Scope, TablePattern};
use crate::error::{Doing, Error, Result};
use crate::postgres::catalog::IS_USER_TABLE;
use crate::postgres::{QualifiedName, Session, quote_identifier, quote_literal};

/// The events, with the suffixes of their triggers.
const EVENTS: [(&str, &str); 3] = [("ddl_command_end", "command"), ("sql_drop", "drop"), ("table_rewrite", "rewrite")];

/// What the capture of a move is called on the source.
#[derive(Clone, Debug)]
pub struct Capture {
    name: MoveName,
}

impl Capture {
    /// Of this move.
    #[must_use]
    pub fn of(name: &MoveName) -> Self {
        Self { name: name.clone() }
    }

    /// The table through which descriptions pass.
    #[must_use]
    pub fn table(&self) -> QualifiedName {
        QualifiedName::new("pgtandem", format!("ddl_{}", self.name))
    }

    fn function(&self, what: &str) -> QualifiedName {
        QualifiedName::new("pgtandem", format!("{what}_{}", self.name))
    }

    fn trigger_name(&self, suffix: &str) -> String {
        format!("pgtandem_{}_{suffix}", self.name)
    }

    /// Quoted.
    fn trigger(&self, suffix: &str) -> String {
        quote_identifier(&self.trigger_name(suffix))
    }

    /// Makes everything, or makes it anew; false where the role may not.
    ///
    /// # Errors
    /// The connection's.
    pub async fn install(&self, source: &Session, scope: &Scope) -> Result<bool> {
        let made = source.batch_execute(&self.install_sql(scope)).await;
        let Err(error) = made else { return Ok(true) };
        source.batch_execute("ROLLBACK").await.doing(|| "giving up the capture of schema changes")?;
        let error = Error::from(error);
        if error.sqlstate() == Some("42501") {
            tracing::info!("the source's role may not make event triggers; schema changes are looked for instead");
            return Ok(false);
        }
        Err(error.doing("installing the capture of schema changes on the source"))
    }

    /// Whether schema changes are captured.
    ///
    /// # Errors
    /// The connection's.
    pub async fn is_installed(&self, source: &Session) -> Result<bool> {
        let names = EVENTS.map(|(_, suffix)| self.trigger_name(suffix));
        let row = source
            .query_one(
                "SELECT count(*) = 3 FROM pg_catalog.pg_event_trigger WHERE evtname = ANY ($1) AND evtenabled = 'A'",
                &[&names.as_slice()],
            )
            .await
            .doing(|| "looking for the capture of schema changes")?;
        Ok(row.try_get(0)?)
    }

    /// Removes everything; returns whether there was anything. The table leaves the publication with it.
    ///
    /// # Errors
    /// The connection's, or a role that does not own it.
    pub async fn remove(&self, source: &Session) -> Result<bool> {
        let row = source
            .query_one("SELECT pg_catalog.to_regclass($1) IS NOT NULL", &[&self.table().to_string()])
            .await
            .doing(|| "looking for the capture of schema changes")?;
        if !row.try_get::<_, bool>(0)? {
            return Ok(false);
        }
        let drop_triggers = self.drop_triggers();
        let (table, capture, publish) = (self.table(), self.function("capture"), self.function("publish"));
        source
            .batch_execute(&format!(
                "SET client_min_messages = error; {drop_triggers};
                 DROP FUNCTION IF EXISTS {capture}(), {publish}(); DROP TABLE {table}; RESET client_min_messages"
            ))
            .await
            .doing(|| "removing the capture of schema changes from the source")?;
        Ok(true)
    }

    fn drop_triggers(&self) -> String {
        let drop = |(_, suffix): &(&str, &str)| format!("DROP EVENT TRIGGER IF EXISTS {}", self.trigger(suffix));
        EVENTS.iter().map(drop).collect::<Vec<_>>().join("; ")
    }

    fn install_sql(&self, scope: &Scope) -> String {
        let (table, capture, publish) = (self.table(), self.function("capture"), self.function("publish"));
        let triggers: String = EVENTS
            .iter()
            .map(|(event, suffix)| {
                let trigger = self.trigger(suffix);
                format!(
                    "CREATE EVENT TRIGGER {trigger} ON {event} EXECUTE FUNCTION {capture}();
                     ALTER EVENT TRIGGER {trigger} ENABLE ALWAYS;\n"
                )
            })
            .collect();
        format!(
            "BEGIN;
             SET LOCAL client_min_messages = error;
             CREATE SCHEMA IF NOT EXISTS pgtandem;
             CREATE TABLE IF NOT EXISTS {table} (event text NOT NULL);
             {drop_triggers};
             DROP FUNCTION IF EXISTS {publish}();
             CREATE FUNCTION {publish}() RETURNS jsonb LANGUAGE plpgsql SECURITY DEFINER
                 SET search_path = pg_catalog, pg_temp AS {publish_body};
             REVOKE ALL ON FUNCTION {publish}() FROM PUBLIC;
             CREATE OR REPLACE FUNCTION {capture}() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS {capture_body};
             REVOKE ALL ON FUNCTION {capture}() FROM PUBLIC;
             {triggers}
             COMMIT",
            drop_triggers = self.drop_triggers(),
            publish_body = quote_literal(&self.publish_body(scope)),
            capture_body = quote_literal(&capture_body(&table, &publish)),
        )
    }

    /// Brings every table of the scope into the publication that fits it. Most tables are there already: it changes what the
    /// statement before has changed. Returns the tables whose updates and deletes are not carried from here on
    /// (`lost`), and those whose are carried again (`gained`).
    fn publish_body(&self, scope: &Scope) -> String {
        format!(
            r"
DECLARE
    item record;
    lost jsonb := '[]';
    gained jsonb := '[]';
BEGIN
    FOR pass IN 1 .. 2 LOOP
        FOR item IN
            WITH member AS (
                SELECT p.pubname = {full} AS full, r.prrelid
                FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
                WHERE p.pubname IN ({full}, {inserts})
            )
            SELECT format('%I.%I', n.nspname, c.relname) AS name, n.nspname AS schema_name, c.relname AS table_name, root.name AS root, identity.has AS identified,
                   COALESCE(bool_or(m.full), false) AS full, COALESCE(bool_or(m.full AND m.prrelid = c.oid), false) AS full_itself,
                   COALESCE(bool_or(NOT m.full), false) AS inserts,
                   COALESCE(bool_or(NOT m.full AND m.prrelid = c.oid), false) AS inserts_itself
            FROM pg_class c
            JOIN pg_namespace n ON n.oid = c.relnamespace
            CROSS JOIN LATERAL (
                SELECT c.relreplident = 'f' OR c.relreplident IN ('d', 'i') AND EXISTS (
                    SELECT FROM pg_index i
                    WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
                      AND CASE c.relreplident WHEN 'd' THEN i.indisprimary ELSE i.indisreplident END) AS has) identity
            LEFT JOIN LATERAL (
                SELECT format('%I.%I', rn.nspname, r.relname) AS name
                FROM pg_class r JOIN pg_namespace rn ON rn.oid = r.relnamespace
                WHERE c.relispartition AND r.oid = pg_partition_root(c.oid)) root ON true
            LEFT JOIN member m ON m.prrelid = c.oid
                OR c.relispartition AND m.prrelid IN (SELECT relid FROM pg_partition_ancestors(c.oid))
            WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND {IS_USER_TABLE} AND {scope}
            GROUP BY c.oid, n.nspname, c.relname, root.name, identity.has
            HAVING NOT COALESCE(bool_or(m.full), false) AND (identity.has OR NOT COALESCE(bool_or(NOT m.full), false))
                OR COALESCE(bool_or(m.full), false) AND NOT identity.has
        LOOP
            IF item.identified AND NOT item.full THEN
                IF item.inserts THEN
                    gained := gained || jsonb_build_array(jsonb_build_array(item.schema_name, item.table_name));
                END IF;
                IF item.inserts_itself THEN
                    EXECUTE 'ALTER PUBLICATION {inserts_name} DROP TABLE ONLY ' || item.name;
                END IF;
                EXECUTE 'ALTER PUBLICATION {full_name} ADD TABLE ONLY ' || item.name;
            ELSIF NOT item.identified AND item.full_itself THEN
                EXECUTE 'ALTER PUBLICATION {full_name} DROP TABLE ONLY ' || item.name;
                EXECUTE 'ALTER PUBLICATION {inserts_name} ADD TABLE ONLY ' || item.name;
                lost := lost || jsonb_build_array(jsonb_build_array(item.schema_name, item.table_name));
            ELSIF NOT item.identified AND item.full THEN
                -- A partition without what the others have: each is listed for itself, by the second pass.
                IF EXISTS (SELECT FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
                           WHERE p.pubname = {full} AND r.prrelid = item.root::regclass) THEN
                    EXECUTE 'ALTER PUBLICATION {full_name} DROP TABLE ' || item.root;
                END IF;
            ELSIF NOT item.inserts THEN
                EXECUTE 'ALTER PUBLICATION {inserts_name} ADD TABLE ONLY ' || item.name;
                lost := lost || jsonb_build_array(jsonb_build_array(item.schema_name, item.table_name));
            END IF;
        END LOOP;
    END LOOP;
    RETURN jsonb_build_object('lost', lost, 'gained', gained);
END",
            full = quote_literal(&self.name.publication()),
            inserts = quote_literal(&self.name.insert_publication()),
            full_name = quote_identifier(&self.name.publication()),
            inserts_name = quote_identifier(&self.name.insert_publication()),
            scope = scope_sql(scope),
        )
    }
}

/// The scope as a condition over `c` (pg_class), as [`Scope::contains`] has it.
fn scope_sql(scope: &Scope) -> String {
    let any = |patterns: &[TablePattern]| {
        let each: Vec<String> = patterns
            .iter()
            .map(|pattern| {
                let [schema, table] = pattern.as_like().map(|half| quote_literal(&half));
                format!("sn.nspname LIKE {schema} AND s.relname LIKE {table}")
            })
            .collect();
        format!(
            "EXISTS (SELECT FROM pg_class s JOIN pg_namespace sn ON sn.oid = s.relnamespace
                     WHERE (s.oid = c.oid OR c.relispartition AND s.oid IN (SELECT relid FROM pg_partition_ancestors(c.oid)))
                       AND ({}))",
            each.join(" OR ")
        )
    };
    let mut conditions = vec!["true".to_owned()];
    if !scope.include.is_empty() {
        conditions.push(any(&scope.include));
    }
    if !scope.exclude.is_empty() {
        conditions.push(format!("NOT {}", any(&scope.exclude)));
    }
    conditions.join(" AND ")
}

/// Runs with its owner's rights, in whatever session makes a change. Until the search path is set, every name is qualified
/// and there is no operator, so that nothing of the session's own is called with these rights.
fn capture_body(table: &QualifiedName, publish: &QualifiedName) -> String {
    // What a move does itself, this one or another, concerns only the source: its fence, its publications.
    let application_name = quote_literal("pgtandem ");
    format!(
        r"
DECLARE
    path pg_catalog.text := pg_catalog.current_setting('search_path'::pg_catalog.text);
    language pg_catalog.text := pg_catalog.current_setting('lc_messages'::pg_catalog.text);
    patience pg_catalog.text := pg_catalog.current_setting('lock_timeout'::pg_catalog.text);
    context pg_catalog.text;
    objects pg_catalog.jsonb;
    identities pg_catalog.jsonb;
    event pg_catalog.jsonb;
    place pg_catalog.tid;
BEGIN
    PERFORM pg_catalog.set_config('search_path'::pg_catalog.text, 'pg_catalog, pg_temp'::pg_catalog.text, true);
    IF starts_with(current_setting('application_name'), {application_name}) OR tg_tag LIKE '% PUBLICATION' OR tg_tag LIKE '% SUBSCRIPTION' OR tg_event = 'sql_drop' AND tg_tag NOT LIKE 'DROP %' THEN
        PERFORM set_config('search_path', path, true);
        RETURN;
    END IF;
    BEGIN
        -- The context is read by a program.
        PERFORM set_config('lc_messages', 'C', true);
        GET DIAGNOSTICS context = PG_CONTEXT;
        PERFORM set_config('lc_messages', language, true);
        IF tg_event = 'ddl_command_end' THEN
            SELECT jsonb_agg(jsonb_build_object('type', c.object_type, 'schema', c.schema_name, 'identity', c.object_identity,
                                                'table', t.description))
            INTO objects
            FROM pg_event_trigger_ddl_commands() c
            LEFT JOIN LATERAL (
                SELECT jsonb_build_object(
                    'schema', n.nspname, 'name', k.relname, 'kind', k.relkind, 'permanent', k.relpersistence = 'p',
                    'above', COALESCE((
                        SELECT jsonb_agg(jsonb_build_array(an.nspname, a.relname) ORDER BY up.ord)
                        FROM pg_partition_ancestors(k.oid) WITH ORDINALITY up (relid, ord)
                        JOIN pg_class a ON a.oid = up.relid
                        JOIN pg_namespace an ON an.oid = a.relnamespace
                        WHERE up.relid <> k.oid), '[]'),
                    'columns', COALESCE((
                        SELECT jsonb_agg(jsonb_build_array(a.attname, format_type(a.atttypid, a.atttypmod),
                            (SELECT format('%I.%I', cn.nspname, l.collname) FROM pg_collation l
                             JOIN pg_namespace cn ON cn.oid = l.collnamespace
                             JOIN pg_type y ON y.oid = a.atttypid
                             WHERE l.oid = a.attcollation AND a.attcollation <> y.typcollation)) ORDER BY a.attnum)
                        FROM pg_attribute a
                        WHERE a.attrelid = k.oid AND a.attnum > 0 AND NOT a.attisdropped), '[]'),
                    'missing', COALESCE((
                        WITH RECURSIVE family (relid) AS (
                            SELECT k.oid UNION SELECT h.inhrelid FROM family f JOIN pg_inherits h ON h.inhparent = f.relid)
                        SELECT jsonb_agg(jsonb_build_array(fn.nspname, m.relname, a.attname, a.attmissingval::text))
                        FROM family f
                        JOIN pg_class m ON m.oid = f.relid
                        JOIN pg_namespace fn ON fn.oid = m.relnamespace
                        JOIN pg_attribute a ON a.attrelid = f.relid AND a.atthasmissing AND tg_tag = 'ALTER TABLE'), '[]')
                    ) AS description
                FROM pg_class k
                JOIN pg_namespace n ON n.oid = k.relnamespace
                WHERE k.oid = CASE c.classid
                    WHEN 'pg_class'::regclass THEN COALESCE((SELECT indrelid FROM pg_index WHERE indexrelid = c.objid), c.objid)
                    WHEN 'pg_trigger'::regclass THEN (SELECT tgrelid FROM pg_trigger WHERE oid = c.objid)
                    WHEN 'pg_constraint'::regclass THEN (SELECT conrelid FROM pg_constraint WHERE oid = c.objid)
                    WHEN 'pg_rewrite'::regclass THEN (SELECT ev_class FROM pg_rewrite WHERE oid = c.objid)
                    WHEN 'pg_policy'::regclass THEN (SELECT polrelid FROM pg_policy WHERE oid = c.objid)
                    WHEN 'pg_statistic_ext'::regclass THEN (SELECT stxrelid FROM pg_statistic_ext WHERE oid = c.objid)
                END) t ON true
            WHERE NOT c.in_extension AND c.schema_name IS DISTINCT FROM 'pgtandem'
              AND c.object_identity IS DISTINCT FROM 'pgtandem'
              AND NOT COALESCE(c.schema_name = 'pg_temp' OR starts_with(c.object_identity, 'pg_temp'), false);
        ELSIF tg_event = 'sql_drop' THEN
            SELECT jsonb_agg(jsonb_build_object('type', d.object_type, 'schema', d.schema_name, 'identity', d.object_identity))
            INTO objects
            FROM pg_event_trigger_dropped_objects() d
            WHERE d.original AND NOT d.is_temporary AND d.schema_name IS DISTINCT FROM 'pgtandem'
              AND d.object_identity IS DISTINCT FROM 'pgtandem';
        ELSE
            SELECT jsonb_build_array(jsonb_build_object('type', 'table', 'schema', n.nspname, 'identity', k.relname,
                                                        'reason', pg_event_trigger_table_rewrite_reason()))
            INTO objects
            FROM pg_class k JOIN pg_namespace n ON n.oid = k.relnamespace
            WHERE k.oid = pg_event_trigger_table_rewrite_oid() AND k.relpersistence = 'p';
        END IF;
        IF objects IS NOT NULL THEN
            IF tg_event <> 'table_rewrite' THEN
                -- Another statement that changes the publications may hold them until its transaction ends.
                BEGIN
                    PERFORM set_config('lock_timeout', '2s', true);
                    identities := {publish}();
                EXCEPTION WHEN OTHERS THEN
                    identities := NULL;
                END;
                PERFORM set_config('lock_timeout', patience, true);
            END IF;
            event := jsonb_build_object(
                'event', tg_event, 'tag', tg_tag, 'query', current_query(), 'context', context,
                'session', pg_backend_pid() || ' ' || extract(epoch FROM statement_timestamp()),
                'role', CASE current_setting('role') WHEN 'none' THEN session_user::text ELSE current_setting('role') END,
                'path', path, 'objects', objects, 'identities', identities);
            INSERT INTO {table} VALUES (event::text) RETURNING ctid INTO place;
            DELETE FROM {table} WHERE ctid = place;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        BEGIN
            event := jsonb_build_object('event', tg_event, 'tag', tg_tag, 'query', current_query(), 'failed', sqlerrm);
            INSERT INTO {table} VALUES (event::text) RETURNING ctid INTO place;
            DELETE FROM {table} WHERE ctid = place;
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'pgtandem could not note this statement: %', sqlerrm;
        END;
    END;
    PERFORM set_config('search_path', path, true);
END"
    )
}
