//! The function on the source that publishes the tables a statement touched.
//!
//! Owns the body of `pgtandem.publish_<name>`. Promises that a table which cannot be published in time is named instead of
//! failing the statement of the application; and that nothing is locked where every table is published as it should be.
//!
//! # Why it looks at little, and waits for little
//!
//! It runs inside the application's own transactions. So it is given the tables that the statement may have changed, and finds
//! their places in the publications by key. From 15 on the server locks a publication until the transaction that altered it
//! ends, and a migration may stay open for long. [`PATIENCE`] is below the server's default `deadlock_timeout`: whoever waits for us
//! while we wait for them is let go before the server picks one of us to fail.

use crate::config::{MoveName, Scope, TablePattern};
use crate::postgres::catalog::IS_USER_TABLE;
use crate::postgres::{quote_identifier, quote_literal};

/// How long it waits for a publication that another transaction has altered.
pub(super) const PATIENCE: &str = "500ms";

/// Brings the tables `touched` (oids) into the publication that fits them, where they are in scope and not there yet. Returns the
/// tables whose updates and deletes are not carried from here on (`lost`), those whose are carried again (`gained`), and
/// those that could not be brought there (`failed`): their changes may be missing from here on.
pub(super) fn body(name: &MoveName, scope: &Scope) -> String {
    format!(
        r"
DECLARE
    item record;
    place text;
    lost jsonb := '[]';
    gained jsonb := '[]';
    failed jsonb := '[]';
    refusal text;
BEGIN
    FOR pass IN 1 .. 2 LOOP
        FOR item IN
            SELECT format('%I.%I', n.nspname, c.relname) AS name, jsonb_build_array(jsonb_build_array(n.nspname, c.relname)) AS named,
                   root.oid AS root_oid, root.name AS root, identity.has AS identified,
                   COALESCE(bool_or(m.full), false) AS full, COALESCE(bool_or(m.full AND m.prrelid = c.oid), false) AS full_itself,
                   COALESCE(bool_or(NOT m.full), false) AS inserts,
                   COALESCE(bool_or(NOT m.full AND m.prrelid = c.oid), false) AS inserts_itself
            FROM unnest(touched) AS t (oid)
            JOIN pg_class c ON c.oid = t.oid
            JOIN pg_namespace n ON n.oid = c.relnamespace
            CROSS JOIN LATERAL (
                SELECT c.relreplident = 'f' OR c.relreplident IN ('d', 'i') AND EXISTS (
                    SELECT FROM pg_index i
                    WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
                      AND CASE c.relreplident WHEN 'd' THEN i.indisprimary ELSE i.indisreplident END) AS has) identity
            LEFT JOIN LATERAL (
                SELECT r.oid, format('%I.%I', rn.nspname, r.relname) AS name
                FROM pg_class r JOIN pg_namespace rn ON rn.oid = r.relnamespace
                WHERE r.oid = pg_partition_root(c.oid)) root ON c.relispartition
            LEFT JOIN LATERAL (
                SELECT r.prrelid, p.pubname = {full} AS full
                FROM ({SELF_AND_ABOVE}) above
                JOIN pg_publication_rel r ON r.prrelid = above.relid
                JOIN pg_publication p ON p.oid = r.prpubid
                WHERE p.pubname IN ({full}, {inserts})) m ON true
            WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND {IS_USER_TABLE} AND {scope}
            GROUP BY c.oid, n.nspname, c.relname, root.oid, root.name, identity.has
            HAVING NOT COALESCE(bool_or(m.full), false) AND (identity.has OR NOT COALESCE(bool_or(NOT m.full), false))
                OR COALESCE(bool_or(m.full), false) AND NOT identity.has
        LOOP
            -- What holds up one table holds up the others: the application waits once.
            IF refusal IS NOT NULL THEN
                failed := failed || item.named;
                CONTINUE;
            END IF;
            BEGIN
                IF item.identified AND NOT item.full THEN
                    IF item.inserts_itself THEN
                        EXECUTE 'ALTER PUBLICATION {inserts_name} DROP TABLE ONLY ' || item.name;
                    END IF;
                    EXECUTE 'ALTER PUBLICATION {full_name} ADD TABLE ONLY ' || item.name;
                    place := CASE WHEN item.inserts THEN 'gained' END;
                ELSIF NOT item.identified AND item.full_itself THEN
                    EXECUTE 'ALTER PUBLICATION {full_name} DROP TABLE ONLY ' || item.name;
                    EXECUTE 'ALTER PUBLICATION {inserts_name} ADD TABLE ONLY ' || item.name;
                    place := 'lost';
                ELSIF NOT item.identified AND item.full THEN
                    -- A partition without what the others have: each is listed for itself, by the second pass.
                    IF EXISTS (SELECT FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
                               WHERE p.pubname = {full} AND r.prrelid = item.root_oid) THEN
                        EXECUTE 'ALTER PUBLICATION {full_name} DROP TABLE ' || item.root;
                    END IF;
                    place := NULL;
                ELSIF NOT item.inserts THEN
                    EXECUTE 'ALTER PUBLICATION {inserts_name} ADD TABLE ONLY ' || item.name;
                    place := 'lost';
                ELSE
                    place := NULL;
                END IF;
                IF place = 'gained' THEN
                    gained := gained || item.named;
                ELSIF place = 'lost' THEN
                    lost := lost || item.named;
                END IF;
            EXCEPTION WHEN query_canceled OR OTHERS THEN
                refusal := sqlerrm;
                failed := failed || item.named;
            END;
        END LOOP;
        EXIT WHEN refusal IS NOT NULL;
    END LOOP;
    RETURN jsonb_build_object('lost', lost, 'gained', gained, 'failed', failed);
END",
        full = quote_literal(&name.publication()),
        inserts = quote_literal(&name.insert_publication()),
        full_name = in_literal(&name.publication()),
        inserts_name = in_literal(&name.insert_publication()),
        scope = scope_sql(scope),
    )
}

/// An identifier inside a string.
fn in_literal(name: &str) -> String {
    quote_identifier(name).replace('\'', "''")
}

/// A table `c` (pg_class) and the partitioned tables that it is a partition of.
const SELF_AND_ABOVE: &str = "SELECT c.oid AS relid UNION SELECT relid FROM pg_partition_ancestors(c.oid)";

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
            "EXISTS (SELECT FROM ({SELF_AND_ABOVE}) above
                     JOIN pg_class s ON s.oid = above.relid
                     JOIN pg_namespace sn ON sn.oid = s.relnamespace
                     WHERE {})",
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
