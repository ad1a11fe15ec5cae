//! What the capture on the source notes of a statement, and which statement of a text is run for it.

use super::{Sides, same_catalog};
use crate::harness::{Cluster, PASSWORD, PATIENCE, wait_until};

/// What the text of a statement means depends on the session that ran it.
#[tokio::test]
async fn a_captured_change_means_what_it_meant_in_its_session() {
    let sides = Sides::with("create table t (id int primary key); insert into t values (1), (2)").await;
    let daemon = sides.follow().await;
    let client = sides.from.connect().await;
    for settings in [
        "set timezone = 'Asia/Tokyo'; set datestyle = 'SQL, DMY'; set intervalstyle = 'sql_standard'",
        "set check_function_bodies = off; set transform_null_equals = on; set standard_conforming_strings = off; set escape_string_warning = off",
    ] {
        client.batch_execute(settings).await.unwrap();
    }
    for change in [
        "alter table t add column at timestamptz default '02/01/2026 09:00', add column late interval default '-1 2:03:04'",
        "create table dated (id int primary key, at timestamptz default '03/02/2026 10:00', check (id <> 7)); insert into dated values (1)",
        "create function reads_later() returns bigint language sql as 'select count(*) from comes_later'",
        "create view blank as select id from t where at = null",
        r"alter table t add column quoted text default 'it\'s one; drop table t; --'",
        "create table comes_later (id int primary key)",
    ] {
        client.batch_execute(change).await.unwrap_or_else(|error| panic!("{change}: {error:?}"));
    }
    drop(client);
    let log = || daemon.stderr();
    wait_until("the last of them arrives", PATIENCE, async || {
        sides.to.query_string("select to_regclass('comes_later') is not null").await == "t"
    })
    .await;
    assert_eq!(sides.to.query_string("select late from t where id = 1").await, "-1 days -02:03:04", "{}", log());
    assert!(sides.to.query_string("select pg_get_viewdef('blank')").await.contains("IS NULL"));
    same_catalog(&sides).await;
    assert!(!log().contains("copied again after the schema change"), "{}", log());
    sides.arrives_whole(daemon).await;
}

/// A restart between two statements of one text that nothing tells apart but their order.
#[tokio::test]
async fn a_text_is_gone_on_with_where_it_stood() {
    let sides = Sides::with("create table t (id int primary key); create role only_here").await;
    let mut daemon = sides.follow().await;
    sides
        .from
        .execute(
            "begin; comment on table t is 'one'; commit;
             begin; grant select on t to only_here; comment on table t is 'two'; insert into t values (1); commit;
             begin; comment on table t is 'three'; commit",
        )
        .await;
    let refused = "select count(*) from pgtandem.ddl where state = 'refused'";
    wait_until("the text is half done", PATIENCE, async || sides.to.query_string(refused).await == "1").await;
    let comment = "select obj_description('t'::regclass)";
    assert_eq!(sides.to.query_string(comment).await, "one");
    drop(daemon.kill());
    sides.to.execute("create role only_here").await;
    daemon = sides.pgtandem.spawn(&["run"]);
    let carried = "select string_agg(statement, '; ' order by lsn, ordinal) from pgtandem.ddl where tag = 'COMMENT'";
    wait_until("the rest arrives", PATIENCE, async || {
        sides.to.query_string("select count(*) from pgtandem.ddl where tag = 'COMMENT'").await == "3"
    })
    .await;
    assert_eq!(
        sides.to.query_string(carried).await,
        "comment on table t is 'one'; comment on table t is 'two'; comment on table t is 'three'"
    );
    sides.arrives_whole(daemon).await;
}

/// Which of two statements it was cannot be told: a person is asked, and none is taken for the other.
#[tokio::test]
async fn a_change_that_two_statements_may_have_made_is_waited_for() {
    let sides = Sides::with("create table t (id int primary key)").await;
    let daemon = sides.follow().await;
    sides
        .from
        .execute("begin; savepoint s; comment on table t is 'one'; rollback to s; comment on table t is 'two'; insert into t values (1); commit")
        .await;
    wait_until("the daemon says what it waits for", PATIENCE, async || {
        let status = sides.status().await;
        status["error"]["code"] == "ddl_refused"
            && status["error"]["message"].as_str().is_some_and(|m| m.contains("cannot be told"))
    })
    .await;
    sides
        .to
        .execute("comment on table t is 'two'; update pgtandem.ddl set state = 'skip' where state = 'refused'")
        .await;
    wait_until("it goes on", PATIENCE, async || sides.to.query_string("select count(*) from t").await == "1").await;
    sides.arrives_whole(daemon).await;
}

/// An event trigger of the application that changes the schema itself: what it does comes after what it reacts to.
#[tokio::test]
async fn what_an_event_trigger_changes_comes_after_its_cause() {
    let sides = Sides::with(
        "create function index_it() returns event_trigger language plpgsql as $$
         declare made record; begin
             for made in select * from pg_event_trigger_ddl_commands() where object_type = 'table' and schema_name = 'public' loop
                 execute format('create index on %s (v)', made.object_identity);
             end loop;
         end $$;
         create event trigger \"a first one\" on ddl_command_end when tag in ('CREATE TABLE') execute function index_it();
         create event trigger \"#\" on ddl_command_end when tag in ('CREATE TABLE') execute function index_it()",
    )
    .await;
    let daemon = sides.follow().await;
    sides.from.execute("create table t (id int primary key, v int); insert into t values (1, 1)").await;
    wait_until("the table arrives", PATIENCE, async || {
        sides.to.query_string("select count(*) from pg_class where relname in ('t_v_idx', 't_v_idx1')").await == "2"
    })
    .await;
    let carried = "select string_agg(tag, ', ' order by ordinal) from pgtandem.ddl";
    assert_eq!(sides.to.query_string(carried).await, "CREATE TABLE, CREATE INDEX, CREATE INDEX");
    assert_eq!(sides.to.query_string("select count(*) from pgtandem.ddl where state = 'refused'").await, "0");
    sides.arrives_whole(daemon).await;
}

/// A capture under the names that its triggers had before is known, replaced and removed.
#[tokio::test]
async fn a_capture_of_an_earlier_name_is_removed() {
    let sides = Sides::with("create table t (id int primary key)").await;
    let daemon = sides.follow().await;
    for suffix in ["command", "drop", "rewrite"] {
        let renamed = format!("alter event trigger \"!pgtandem_app_{suffix}\" rename to pgtandem_app_{suffix}");
        sides.from.execute(&renamed).await;
    }
    sides.from.execute("alter table t add column v text; insert into t values (1, 'x')").await;
    wait_until("it is carried", PATIENCE, async || sides.to.query_string("select count(*) from t").await == "1").await;
    sides.arrives_whole(daemon).await;
    assert_eq!(sides.from.query_string("select count(*) from pg_event_trigger").await, "0");
}

/// A function with its owner's rights: what it makes belongs to that one.
#[tokio::test]
async fn a_change_inside_a_function_is_made_as_the_role_that_acted() {
    let sides = Sides::with("create table t (id int primary key)").await;
    for side in [&sides.from, &sides.to] {
        side.execute(&format!(
            "create role maker; create role dev login password '{PASSWORD}'; grant create on schema public to maker"
        ))
        .await;
    }
    sides
        .from
        .execute(
            "create function make(name text) returns void language plpgsql security definer as
             $$ begin execute format('create table public.%I (id int primary key)', name); end $$;
             alter function make owner to maker",
        )
        .await;
    let daemon = sides.follow().await;
    let dev = sides.from.with_user("dev", PASSWORD);
    dev.execute("select make('made')").await;
    // What somebody puts there beforehand does not count.
    dev.execute("select set_config('pgtandem.role_app', 'postgres', false); select make('made_too')").await;
    for table in ["made", "made_too"] {
        wait_until("the table arrives", PATIENCE, async || {
            sides.to.query_string(&format!("select to_regclass('{table}') is not null")).await == "t"
        })
        .await;
        let owner = format!("select relowner::regrole from pg_class where relname = '{table}'");
        assert_eq!(sides.to.query_string(&owner).await, "maker");
    }
    assert_eq!(
        sides
            .to
            .query_string("select string_agg(distinct role, ' ') from pgtandem.ddl where tag = 'CREATE TABLE'")
            .await,
        "maker"
    );
    sides.arrives_whole(daemon).await;
}

/// The application's statement succeeds while the publications are locked, and its table arrives whole all the same.
#[tokio::test]
async fn a_table_that_cannot_be_published_in_time_is_copied() {
    let sides =
        Sides::of(tokio::join!(Cluster::start(16), Cluster::start(16)), "create table t (id int primary key)").await;
    let daemon = sides.follow().await;
    // Given a migration that made a table, and stays open,
    let open = sides.from.connect().await;
    open.batch_execute("begin; create table slow (id int primary key); insert into slow values (1)").await.unwrap();
    // when others make tables, also with little time,
    sides.from.execute("create table quick (id int primary key); insert into quick select generate_series(1, 5)").await;
    sides.from.execute("set statement_timeout = '300ms'; create table hurried (id int primary key)").await;
    sides.from.execute("set lock_timeout = '100ms'; create table patient (id int); insert into hurried values (7); insert into patient values (8)").await;
    // and nothing that waits for the publications is in the way of what needs none of them,
    sides
        .from
        .execute("set statement_timeout = '300ms'; alter table t add column v text; insert into t values (1, 'x')")
        .await;
    open.batch_execute("commit").await.unwrap();
    // then everything arrives.
    for (table, rows) in [("slow", "1"), ("quick", "5"), ("hurried", "1"), ("patient", "1"), ("t", "1")] {
        wait_until(table, 2 * PATIENCE, async || {
            sides.to.query_string(&format!("select to_regclass('{table}') is not null")).await == "t"
                && sides.to.query_string(&format!("select count(*) from {table}")).await == rows
        })
        .await;
    }
    let published =
        "select count(*) from pg_publication_tables where tablename in ('slow', 'quick', 'hurried', 'patient')";
    assert_eq!(sides.from.query_string(published).await, "4");
    sides.arrives_whole(daemon).await;
}

/// The owner of the capture need not be a superuser for a statement of the application to succeed.
#[tokio::test]
async fn a_statement_succeeds_where_the_capture_may_not_set_its_language() {
    let sides = Sides::with("create table t (id int primary key); create role owner_of_capture").await;
    let daemon = sides.follow().await;
    sides
        .from
        .execute(
            "set application_name = 'pgtandem by hand'; grant usage, create on schema pgtandem to owner_of_capture; alter table pgtandem.ddl_app owner to owner_of_capture;
             grant execute on all functions in schema pgtandem to owner_of_capture;
             alter function pgtandem.capture_app() owner to owner_of_capture;
             alter role postgres set lc_messages = 'C.UTF-8'",
        )
        .await;
    sides.from.execute("alter table t add column v text; insert into t values (1, 'x')").await;
    wait_until("it is carried", PATIENCE, async || sides.to.query_string("select count(*) from t").await == "1").await;
    assert_eq!(sides.to.query_string("select count(*) from pgtandem.ddl where state = 'refused'").await, "0");
    sides
        .from
        .execute(
            "set application_name = 'pgtandem by hand'; alter function pgtandem.capture_app() owner to current_user; alter table pgtandem.ddl_app owner to current_user",
        )
        .await;
    sides.arrives_whole(daemon).await;
}

/// Old rows were filled by a default that each side knows by itself: that is compared once.
#[tokio::test]
async fn a_table_with_a_filled_column_is_not_copied_by_every_later_change() {
    let sides = Sides::with("create table t (id int primary key); insert into t values (1), (2)").await;
    let daemon = sides.follow().await;
    let copies = || daemon.stderr().matches("the table is copied again after the schema change").count();
    sides.from.execute("alter table t add column at timestamptz default clock_timestamp()").await;
    sides.from.execute("alter table t add column born timestamptz default now()").await;
    wait_until("both arrive", PATIENCE, async || {
        sides
            .to
            .query_string(
                "select count(*) from pg_attribute where attrelid = 't'::regclass and attname in ('at', 'born')",
            )
            .await
            == "2"
            && sides.to.query_string("select state from pgtandem.copy_table").await == "copied"
    })
    .await;
    let before = copies();
    assert!(before > 0, "{}", daemon.stderr());
    for change in [
        "add column a int",
        "add column b text default 'same'",
        "drop column a",
        "alter b set not null",
        "add column ts timestamptz default '2026-01-01 00:00+00'",
    ] {
        sides.from.execute(&format!("set timezone = 'America/New_York'; alter table t {change}")).await;
    }
    wait_until("all arrive", PATIENCE, async || {
        sides
            .to
            .query_string("select count(*) from pg_attribute where attrelid = 't'::regclass and attname = 'ts'")
            .await
            == "1"
    })
    .await;
    assert_eq!(copies(), before, "{}", daemon.stderr());
    sides.arrives_whole(daemon).await;
}

/// Foreign keys are added when the rows are there; one that the source has dropped meanwhile does not come back.
#[tokio::test]
async fn a_foreign_key_that_is_dropped_during_the_first_copy_stays_dropped() {
    let sides = Sides::with(
        "create table parent (id int primary key); create table held (id int primary key); insert into held values (1);
         create table child (id int primary key, a int constraint before_the_cut references parent,
                             b int constraint after_the_cut references parent, c int constraint kept references parent)",
    )
    .await;
    // Given a transaction that the cut waits for,
    let open = sides.from.connect().await;
    open.batch_execute("begin; insert into held values (2)").await.unwrap();
    let mut daemon = sides.pgtandem.spawn(&["run"]);
    wait_until("the capture is there", PATIENCE, async || {
        sides.from.query_string("select count(*) from pg_replication_slots").await == "1"
    })
    .await;
    sides.from.execute("alter table child drop constraint before_the_cut").await;
    // and a table that cannot be filled yet,
    let block = sides.to.connect().await;
    block.batch_execute("begin; lock table held").await.unwrap();
    open.batch_execute("commit").await.unwrap();
    wait_until("the other tables are copied", PATIENCE, async || {
        sides.to.query_string("select count(*) from pgtandem.copy_table where state = 'copied'").await == "2"
    })
    .await;
    sides.from.execute("alter table child drop constraint after_the_cut").await;
    block.batch_execute("commit").await.unwrap();
    daemon.wait_for_log("entering phase follow", PATIENCE).await;
    let keys = "select string_agg(conname, ' ') from pg_constraint where contype = 'f' and connamespace = 'public'::regnamespace";
    assert_eq!(sides.to.query_string(keys).await, "kept");
    sides.arrives_whole(daemon).await;
    same_catalog(&sides).await;
}

/// What stands in the capture's table is run on the target: whoever may write into every table may not write into this one.
#[tokio::test]
async fn nobody_else_writes_into_the_table_of_the_capture() {
    let sides = Sides::with(
        "create table t (id int primary key); create role nosy login;
         alter default privileges grant all on tables to nosy, public; create schema pgtandem; grant usage on schema pgtandem to public",
    )
    .await;
    let daemon = sides.follow().await;
    let forged = r#"{"event":"ddl_command_end","tag":"CREATE TABLE","query":"create table forged ()"}"#;
    let table = sides.from.query_string("select format('%I.%I', schemaname, tablename) from pg_tables where tablename like 'ddl%' and schemaname = 'pgtandem'").await;
    let client = sides.from.connect().await;
    client.batch_execute("set role nosy").await.unwrap();
    let refused = client.batch_execute(&format!("insert into {table} values ('{forged}')")).await.unwrap_err();
    assert_eq!(refused.code().map(tokio_postgres::error::SqlState::code), Some("42501"), "{refused:?}");
    sides.from.execute("create table carried (id int primary key)").await;
    wait_until("the capture itself still writes", PATIENCE, async || {
        sides.to.query_string("select to_regclass('carried') is not null").await == "t"
    })
    .await;
    sides.arrives_whole(daemon).await;
}

/// Until the first catchup ends the target's materialized views are empty, and cannot be refreshed beside their readers.
#[tokio::test]
async fn a_refresh_of_a_materialized_view_is_left_to_the_cutover() {
    let sides = Sides::with(
        "create table t (id int primary key); create materialized view seen as select * from t; create unique index on seen (id)",
    )
    .await;
    let daemon = sides.follow().await;
    sides.from.execute("create temp table t2 (id int); create rule nothing as on insert to t2 do instead nothing; insert into t values (1); refresh materialized view concurrently seen").await;
    sides.from.execute("refresh materialized view seen; create table behind (id int primary key)").await;
    wait_until("what came behind it is there", PATIENCE, async || {
        sides.to.query_string("select to_regclass('behind') is not null").await == "t"
    })
    .await;
    assert_eq!(sides.to.query_string("select count(*) from pgtandem.ddl where state = 'refused'").await, "0");
    assert_eq!(sides.to.query_string("select count(*) from pgtandem.ddl where tag like 'REFRESH%'").await, "0");
    sides.arrives_whole(daemon).await;
}
