//! Whether the target's own worker can follow: only asked for `follow.engine = "subscription"`.

use super::Finding;
use super::finding::kinds;
use super::look::{Attempt, Look};
use super::privileges::{attempt_write, plain, tables};
use crate::config::{Engine, WithoutIdentity};
use crate::error::{Error, Result};
use crate::follow::subscription::{self, Reached};
use crate::postgres::catalog::IS_USER_TABLE;
use crate::postgres::{Server, Side, quote_identifier};

/// Goes nowhere: a role without a password in it is refused for that alone.
const PROBE: &str = "
    CREATE SUBSCRIPTION pgtandem_probe CONNECTION 'host=probe dbname=probe user=probe password=probe'
        PUBLICATION pgtandem_probe WITH (connect = false, create_slot = false, enabled = false, slot_name = NONE)";

const TEMPORARY_RIGHT: &str = "
    SELECT pg_catalog.has_database_privilege(pg_catalog.current_database(), 'TEMPORARY')";

const ORIGIN_RIGHTS: &str = "
    SELECT pg_catalog.has_function_privilege('pg_catalog.pg_replication_origin_advance(text, pg_lsn)', 'EXECUTE')
       AND pg_catalog.has_function_privilege('pg_catalog.pg_replication_origin_progress(text, boolean)', 'EXECUTE')";

/// From 18 on the limit has a name of its own.
const FREE_ORIGINS: &str = "
    SELECT COALESCE(pg_catalog.current_setting('max_active_replication_origins', true),
                    pg_catalog.current_setting('max_replication_slots'))::int8
         - (SELECT count(*) FROM pg_catalog.pg_replication_origin)";

/// Tables whose rows are found by comparing all columns, with a column that has no equality to compare by. `$1`: those as well
/// that nothing identifies yet, for the move will give them REPLICA IDENTITY FULL; where a column is virtual that is of no
/// use, and not done.
fn without_equality() -> String {
    format!(
        r"
        SELECT DISTINCT n.nspname::text, c.relname::text
        FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        JOIN pg_catalog.pg_type given ON given.oid = a.atttypid
        JOIN pg_catalog.pg_type t
             ON t.oid = CASE WHEN given.typtype = 'd' THEN given.typbasetype
                             WHEN given.typcategory = 'A' THEN given.typelem ELSE given.oid END
        WHERE c.relkind = 'r' AND t.typtype = 'b' AND t.typcategory <> 'A' AND {IS_USER_TABLE}
          AND (c.relreplident = 'f'
               OR $1 AND NOT (c.relreplident = 'i' AND EXISTS (
                         SELECT FROM pg_catalog.pg_index i
                         WHERE i.indrelid = c.oid AND i.indisreplident AND i.indisvalid))
                     AND NOT EXISTS (SELECT FROM pg_catalog.pg_attribute v
                                     WHERE v.attrelid = c.oid AND v.attgenerated = 'v' AND NOT v.attisdropped))
          AND NOT EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate)
          AND NOT EXISTS (
              SELECT FROM pg_catalog.pg_opclass o JOIN pg_catalog.pg_am m ON m.oid = o.opcmethod
              WHERE m.amname IN ('btree', 'hash') AND o.opcdefault
                AND (o.opcintype = t.oid
                     OR EXISTS (SELECT FROM pg_catalog.pg_cast k WHERE k.castsource = t.oid
                                AND k.casttarget = o.opcintype AND k.castmethod = 'b' AND k.castcontext = 'i')))
        ORDER BY 1, 2"
    )
}

/// `$1`: the subscription.
const THERE: &str = "
    SELECT count(*) FROM pg_catalog.pg_subscription WHERE subname = $1
       AND subdbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())";

kinds! {
    SUBSCRIPTION_EXISTS = Blocking "subscription_exists" {
        what: "a subscription of the move's name is there, but the target knows nothing of the move",
        why: "an earlier move left it, or somebody made it: it would write to the target beside the move",
        fix: "ALTER SUBSCRIPTION … DISABLE; ALTER SUBSCRIPTION … SET (slot_name = NONE); DROP SUBSCRIPTION …, or choose another --name",
    }
    NO_SUBSCRIPTION_RIGHT = Blocking "no_subscription_right" {
        what: "the target's role may not make a subscription",
        why: "the subscription engine is one; before 16 that takes a superuser",
        fix: "GRANT pg_create_subscription TO … and GRANT CREATE ON DATABASE … TO … (from 16 on), or follow.engine = \"stream\"",
    }
    NO_ORIGIN_RIGHT = Blocking "no_origin_right" {
        what: "the target's role may not set and read replication origins",
        why: "an origin is where the worker remembers what is applied: it must begin exactly where the copy ended, and be asked where it stands",
        fix: "GRANT EXECUTE ON FUNCTION pg_replication_origin_advance(text, pg_lsn), pg_replication_origin_progress(text, boolean) TO …, or follow.engine = \"stream\"",
    }
    FEW_ORIGINS = Blocking "few_replication_origins" {
        what: "no replication origin is free on the target",
        why: "a subscription takes one",
        fix: "raise max_replication_slots (from 18 on max_active_replication_origins) and restart the target",
    }
    UNREACHABLE = Blocking "source_unreachable_from_target" {
        what: "the target server cannot connect to the source",
        why: "with the subscription engine it is the target that connects, not pgtandem",
        fix: "set source.url_from_target to an address, user and password that work from there, and let the target in by firewall and pg_hba.conf",
    }
    NO_TEMPORARY_RIGHT = Blocking "no_temporary_right" {
        what: "the target's role may not make temporary tables",
        why: "the connection to the source is handed to the target's server in one, so that no log shows its password",
        fix: "GRANT TEMPORARY ON DATABASE … TO …, or follow.engine = \"stream\"",
    }
    LOG_TELLS = Blocking "subscription_log_tells" {
        what: "the target would write down the connection to the source with its password",
        why: "the statement that makes a subscription holds it; the role may not switch off what logs or counts statements inside a block",
        fix: "GRANT SET ON PARAMETER … TO …, or ALTER ROLE … SET …, as a superuser, or follow.engine = \"stream\"",
    }
    LOG_MAY_TELL = Warning "subscription_log_may_tell" {
        what: "the target's role may not keep the context of messages out of the server's log",
        why: "if the session is ended from outside while it makes or starts the subscription, the log shows the statement with the password; for that reason it was not tried whether the target reaches the source",
        fix: "GRANT SET ON PARAMETER log_error_verbosity TO …, as a superuser, or follow.engine = \"stream\"",
    }
    NO_EQUALITY = Warning "full_identity_without_equality" {
        what: "tables under REPLICA IDENTITY FULL, or that will be given it, have columns of types without an equality",
        why: "the target's worker compares whole rows by it, and an update or delete there ends it again and again",
        fix: "give the table a key, or use follow.engine = \"stream\"",
    }
    SILENT_ABOUT_MISSING_ROWS = Warning "worker_passes_over_missing_rows" {
        what: "the target's worker passes over updates and deletes that find no row",
        why: "follow.missing_row does not stop it, and before 18 nothing tells that it happened",
        fix: "cutover.verify = \"full\", or follow.engine = \"stream\"",
    }
}

/// With either engine.
pub(super) async fn stranger(look: &Look<'_>) -> Result<Vec<Finding>> {
    let name = look.config.name.slot();
    if look.begun || look.target.client.query_one(THERE, &[&name]).await?.try_get::<_, i64>(0)? == 0 {
        return Ok(Vec::new());
    }
    let quoted = quote_identifier(&name);
    let fix = format!(
        "ALTER SUBSCRIPTION {quoted} DISABLE;\nALTER SUBSCRIPTION {quoted} SET (slot_name = NONE);\nDROP SUBSCRIPTION {quoted};"
    );
    Ok(vec![SUBSCRIPTION_EXISTS.on(Side::Target, format!("the target has a subscription {name}")).fix(fix)])
}

pub(super) async fn rights(look: &Look<'_>) -> Result<Vec<Finding>> {
    if look.config.follow.engine != Engine::Subscription {
        return Ok(Vec::new());
    }
    let (target, side) = (&look.target, Side::Target);
    let user = quote_identifier(&target.facts.user);
    if let Attempt::Refused(words) = attempt_write(target, PROBE).await? {
        let fix = if target.facts.major() < 16 {
            "connect to the target as a superuser, or set follow.engine = \"stream\"".to_owned()
        } else {
            let database = quote_identifier(&target.facts.database);
            format!("GRANT pg_create_subscription TO {user};\nGRANT CREATE ON DATABASE {database} TO {user};")
        };
        return Ok(vec![NO_SUBSCRIPTION_RIGHT.on(side, words).fix(fix)]);
    }
    let mut found = Vec::new();
    if !target.client.query_one(TEMPORARY_RIGHT, &[]).await?.try_get::<_, bool>(0)? {
        let (user_name, database) = (&target.facts.user, quote_identifier(&target.facts.database));
        let what = format!("{user_name} may not make temporary tables in {}", target.facts.database);
        found.push(NO_TEMPORARY_RIGHT.on(side, what).fix(format!("GRANT TEMPORARY ON DATABASE {database} TO {user};")));
    }
    if !target.client.query_one(ORIGIN_RIGHTS, &[]).await?.try_get::<_, bool>(0)? {
        let what = format!("{} may not execute pg_replication_origin_advance and _progress", target.facts.user);
        let fix = format!(
            "GRANT EXECUTE ON FUNCTION pg_catalog.pg_replication_origin_advance(text, pg_lsn),\n    \
             pg_catalog.pg_replication_origin_progress(text, boolean) TO {user};"
        );
        found.push(NO_ORIGIN_RIGHT.on(side, what).fix(fix));
    }
    if !look.begun && target.count(FREE_ORIGINS).await? < 1 {
        found.push(FEW_ORIGINS.on(side, "every replication origin is taken"));
    }
    if target.facts.major() < 18 {
        let what =
            format!("the target is {}: its worker says nothing of rows that it does not find", target.facts.version);
        found.push(SILENT_ABOUT_MISSING_ROWS.on(side, what));
    }
    Ok(found)
}

pub(super) async fn identity_without_equality(look: &Look<'_>) -> Result<Vec<Finding>> {
    if look.config.follow.engine != Engine::Subscription {
        return Ok(Vec::new());
    }
    let given = look.config.follow.without_identity == WithoutIdentity::Full;
    let names = look.names_in_scope(look.source.client.query(&without_equality(), &[&given]).await?)?;
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let what = format!("{} cannot be compared row by row", tables(names.len()));
    Ok(vec![NO_EQUALITY.on(Side::Source, what).objects(plain(&names))])
}

/// Has the target connect to the source. Needs a session of its own.
pub(super) async fn reach(look: &Look<'_>, source: &Server, target: &Server) -> Result<Vec<Finding>> {
    if look.config.follow.engine != Engine::Subscription {
        return Ok(Vec::new());
    }
    match subscription::reaches(look.config, source, target).await {
        Ok(Reached::Yes) => Ok(Vec::new()),
        Ok(Reached::Untried) => {
            let user = &look.target.facts.user;
            let what =
                format!("{user} may not set log_error_verbosity; whether the target reaches the source was not tried");
            let fix = format!("GRANT SET ON PARAMETER log_error_verbosity TO {};", quote_identifier(user));
            Ok(vec![LOG_MAY_TELL.on(Side::Target, what).fix(fix)])
        }
        Err(error) if error.code() == "subscription_log_tells" => {
            Ok(vec![LOG_TELLS.on(Side::Target, Error::to_string(&error))])
        }
        Err(error) if error.code() == "subscription_unreachable" => {
            Ok(vec![UNREACHABLE.on(Side::Target, Error::to_string(&error))])
        }
        // Said by the other checks.
        Err(error) if error.code() == "subscription_refused" => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
