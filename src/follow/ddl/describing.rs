//! The functions on the source that describe a statement, and what both sides ask about a table alike.
//!
//! Owns the bodies of `pgtandem.role_<name>`, `pgtandem.capture_<name>` and `pgtandem.table_<name>`, which [`super::capture`] makes.
//! Promises that a statement of the application never fails because of them, not even when its time runs out inside.

use crate::postgres::{QualifiedName, quote_literal};

/// Settings of a session that change what the text of a statement means there. Each of them may be set by everybody.
///
/// `standard_conforming_strings` is not among them: it is taken into account where the text is read, and the statement that
/// is chosen from it means the same under either value.
pub(super) const MEANINGFUL: [&str; 9] = [
    "TimeZone",
    "DateStyle",
    "IntervalStyle",
    "check_function_bodies",
    "default_tablespace",
    "default_table_access_method",
    "default_toast_compression",
    "transform_null_equals",
    "xmloption",
];

/// How values and expressions are printed for a comparison of both sides: as on every session of the move.
pub(super) const PRINTING: &str = "
    SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, YMD' SET IntervalStyle = 'postgres' SET TimeZone = 'UTC'
    SET extra_float_digits = 3 SET bytea_output = 'hex' SET lc_monetary = 'C'";

/// One text that changes with everything that a statement may change of a table (an expression of an oid), apart from its rows and
/// from what is held back on the target; NULL if there is no such table. To be asked under [`PRINTING`].
pub(super) fn traits(relation: &str) -> String {
    format!(
        r#"
        SELECT pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(
                   pg_catalog.string_agg(line, pg_catalog.chr(10) ORDER BY line COLLATE pg_catalog."C"), 'UTF8')), 'hex')
        FROM (
            SELECT pg_catalog.format('column %s %s %s %s', a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull,
                                     pg_catalog.pg_get_expr(d.adbin, d.adrelid))
            FROM pg_catalog.pg_attribute a
            LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
            WHERE a.attrelid = {relation} AND a.attnum > 0 AND NOT a.attisdropped
            UNION ALL
            SELECT pg_catalog.format('constraint %s %s %s', conname, contype, convalidated)
            FROM pg_catalog.pg_constraint WHERE conrelid = {relation} AND contype <> 'n'
            UNION ALL
            SELECT pg_catalog.format('index %s %s %s', k.relname, i.indisreplident, i.indisclustered)
            FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class k ON k.oid = i.indexrelid WHERE i.indrelid = {relation}
            UNION ALL
            SELECT pg_catalog.format('trigger %s', tgname)
            FROM pg_catalog.pg_trigger WHERE tgrelid = {relation} AND NOT tgisinternal AND NOT pg_catalog.starts_with(tgname::text, 'pgtandem_')
            UNION ALL
            SELECT pg_catalog.format('policy %s', polname) FROM pg_catalog.pg_policy WHERE polrelid = {relation}
            UNION ALL
            SELECT pg_catalog.format('relation %s %s %s %s %s', pg_catalog.pg_get_userbyid(relowner), relreplident, relrowsecurity,
                                     relforcerowsecurity, pg_catalog.array_to_string(reloptions, ' '))
            FROM pg_catalog.pg_class WHERE oid = {relation}) AS of (line)"#
    )
}

/// Runs with the rights of whoever makes the change, right before the capture: only there `current_user` is the role that the
/// server checked, also inside a function with its owner's rights. Nobody else can say it: whatever the setting was given
/// before, this overwrites it, and the capture follows without anything in between.
pub(super) fn role_body(setting: &str) -> String {
    format!(
        r"
BEGIN
    PERFORM pg_catalog.set_config({setting}::pg_catalog.text, current_user::pg_catalog.text, true);
END",
        setting = quote_literal(setting)
    )
}

/// A relation as it stands, for the capture.
pub(super) fn table_body() -> String {
    format!(
        r"
BEGIN
    RETURN (
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
            'traits', ({traits}),
            'missing', COALESCE((
                WITH RECURSIVE family (relid) AS (
                    SELECT k.oid UNION SELECT h.inhrelid FROM family f JOIN pg_inherits h ON h.inhparent = f.relid)
                SELECT jsonb_agg(jsonb_build_array(fn.nspname, m.relname, a.attname, a.attmissingval::text))
                FROM family f
                JOIN pg_class m ON m.oid = f.relid
                JOIN pg_namespace fn ON fn.oid = m.relnamespace
                JOIN pg_attribute a ON a.attrelid = f.relid AND a.atthasmissing AND tag = 'ALTER TABLE'), '[]'))
        FROM pg_class k
        JOIN pg_namespace n ON n.oid = k.relnamespace
        WHERE k.oid = relation);
END",
        traits = traits("relation")
    )
}

/// What the capture is made of.
pub(super) struct Parts<'a> {
    pub table: &'a QualifiedName,
    pub describe: &'a QualifiedName,
    pub publish: &'a QualifiedName,
    /// Where [`role_body`] leaves the role.
    pub role: &'a str,
}

/// Runs with its owner's rights, in whatever session makes a change. Until the search path is set, every name is qualified
/// and there is no operator, so that nothing of the session's own is called with these rights.
pub(super) fn capture_body(parts: &Parts<'_>) -> String {
    let Parts { table, describe, publish, .. } = parts;
    // What a move does itself, this one or another, concerns only the source: its fence, its publications.
    let application_name = quote_literal("pgtandem ");
    let role = quote_literal(parts.role);
    let settings = MEANINGFUL.map(|name| format!("'{name}', current_setting('{name}', true)")).join(", ");
    format!(
        r"
DECLARE
    path pg_catalog.text := pg_catalog.current_setting('search_path'::pg_catalog.text);
    language pg_catalog.text := pg_catalog.current_setting('lc_messages'::pg_catalog.text);
    acting pg_catalog.text := pg_catalog.current_setting({role}::pg_catalog.text, true);
    context pg_catalog.text;
    objects pg_catalog.jsonb;
    touched pg_catalog.oid[];
    whole pg_catalog.bool := false;
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
        -- The context is read by a program, in English. Where the owner may not ask for that, what functions run is told in the
        -- server's language and not understood; the rest does not need it.
        IF language <> 'C' THEN
            BEGIN
                PERFORM set_config('lc_messages', 'C', true);
            EXCEPTION WHEN OTHERS THEN
                language := 'C';
            END;
        END IF;
        GET DIAGNOSTICS context = PG_CONTEXT;
        IF language <> 'C' THEN
            PERFORM set_config('lc_messages', language, true);
        END IF;
        IF tg_event = 'ddl_command_end' THEN
            SELECT jsonb_agg(jsonb_build_object('type', c.object_type, 'schema', c.schema_name, 'identity', c.object_identity,
                                                'table', {describe}(t.oid, tg_tag)))
            INTO objects
            FROM pg_event_trigger_ddl_commands() c
            CROSS JOIN LATERAL (
                SELECT CASE c.classid
                    WHEN 'pg_class'::regclass THEN COALESCE((SELECT indrelid FROM pg_index WHERE indexrelid = c.objid), c.objid)
                    WHEN 'pg_trigger'::regclass THEN (SELECT tgrelid FROM pg_trigger WHERE oid = c.objid)
                    WHEN 'pg_constraint'::regclass THEN (SELECT conrelid FROM pg_constraint WHERE oid = c.objid)
                    WHEN 'pg_rewrite'::regclass THEN (SELECT ev_class FROM pg_rewrite WHERE oid = c.objid)
                    WHEN 'pg_policy'::regclass THEN (SELECT polrelid FROM pg_policy WHERE oid = c.objid)
                    WHEN 'pg_statistic_ext'::regclass THEN (SELECT stxrelid FROM pg_statistic_ext WHERE oid = c.objid)
                END AS oid) t
            WHERE NOT c.in_extension AND c.schema_name IS DISTINCT FROM 'pgtandem'
              AND c.object_identity IS DISTINCT FROM 'pgtandem'
              AND NOT COALESCE(c.schema_name = 'pg_temp' OR starts_with(c.object_identity, 'pg_temp'), false)
              AND NOT EXISTS (SELECT FROM pg_class k WHERE k.oid = t.oid AND k.relpersistence = 't');
            -- Whose place in the publications may be another now. A partition that was detached, or a table in a schema that was renamed,
            -- is not among the objects: then all are looked at.
            whole := tg_tag IN ('ALTER SCHEMA', 'ALTER TYPE', 'ALTER EXTENSION')
                OR tg_tag = 'ALTER TABLE' AND EXISTS (SELECT FROM jsonb_array_elements(objects) o WHERE o -> 'table' ->> 'kind' = 'p');
            IF NOT whole AND tg_tag IN ('CREATE TABLE', 'CREATE TABLE AS', 'SELECT INTO', 'CREATE SCHEMA', 'ALTER TABLE') THEN
                WITH RECURSIVE family (relid) AS (
                    SELECT c.objid FROM pg_event_trigger_ddl_commands() c
                    WHERE c.classid = 'pg_class'::regclass AND c.object_type = 'table' AND NOT c.in_extension
                    UNION SELECT h.inhrelid FROM family f JOIN pg_inherits h ON h.inhparent = f.relid)
                SELECT array_agg(relid) INTO touched FROM family;
            END IF;
        ELSIF tg_event = 'sql_drop' THEN
            SELECT jsonb_agg(jsonb_build_object('type', d.object_type, 'schema', d.schema_name, 'identity', d.object_identity))
            INTO objects
            FROM pg_event_trigger_dropped_objects() d
            WHERE d.original AND NOT d.is_temporary AND d.schema_name IS DISTINCT FROM 'pgtandem'
              AND d.object_identity IS DISTINCT FROM 'pgtandem';
            -- What identified the rows of a table may have gone. Of a dropped table its own keys and indexes went, of another one columns.
            whole := EXISTS (
                SELECT FROM pg_event_trigger_dropped_objects() d
                WHERE NOT d.is_temporary
                  AND (d.object_type = 'table column' OR d.object_type IN ('index', 'table constraint') AND tg_tag <> 'DROP TABLE'));
        ELSE
            SELECT jsonb_build_array(jsonb_build_object('type', 'table', 'schema', n.nspname, 'identity', k.relname,
                                                        'reason', pg_event_trigger_table_rewrite_reason()))
            INTO objects
            FROM pg_class k JOIN pg_namespace n ON n.oid = k.relnamespace
            WHERE k.oid = pg_event_trigger_table_rewrite_oid() AND k.relpersistence = 'p';
        END IF;
        IF objects IS NOT NULL THEN
            IF whole THEN
                SELECT array_agg(oid) INTO touched FROM pg_class WHERE relkind = 'r' AND relpersistence = 'p';
            END IF;
            IF touched IS NOT NULL THEN
                BEGIN
                    identities := {publish}(touched);
                EXCEPTION WHEN query_canceled OR OTHERS THEN
                    -- It does not know how far it came.
                    SELECT jsonb_build_object('lost', '[]'::jsonb, 'gained', '[]'::jsonb,
                                              'failed', COALESCE(jsonb_agg(jsonb_build_array(n.nspname, k.relname)), '[]'))
                    INTO identities
                    FROM unnest(touched) t (oid) JOIN pg_class k ON k.oid = t.oid JOIN pg_namespace n ON n.oid = k.relnamespace;
                END;
            END IF;
            event := jsonb_build_object(
                'event', tg_event, 'tag', tg_tag, 'query', COALESCE(current_query(), ''), 'context', context,
                'session', pg_backend_pid() || ' ' || extract(epoch FROM statement_timestamp()),
                'role', COALESCE(NULLIF(acting, ''), CASE current_setting('role') WHEN 'none' THEN session_user::text ELSE current_setting('role') END),
                'path', path, 'settings', jsonb_build_object({settings}),
                'plain_backslashes', current_setting('standard_conforming_strings')::bool,
                'objects', objects, 'identities', identities);
            INSERT INTO {table} VALUES (event::text) RETURNING ctid INTO place;
            DELETE FROM {table} WHERE ctid = place;
        END IF;
    EXCEPTION WHEN query_canceled OR OTHERS THEN
        BEGIN
            event := jsonb_build_object('event', tg_event, 'tag', tg_tag, 'query', COALESCE(current_query(), ''), 'failed', sqlerrm);
            INSERT INTO {table} VALUES (event::text) RETURNING ctid INTO place;
            DELETE FROM {table} WHERE ctid = place;
        EXCEPTION WHEN query_canceled OR OTHERS THEN
            RAISE WARNING 'pgtandem could not note this statement: %', sqlerrm;
        END;
    END;
    PERFORM set_config({role}, '', true);
    -- The last thing: behind it, names and operators may be the session's own.
    PERFORM set_config('search_path', path, true);
END"
    )
}
