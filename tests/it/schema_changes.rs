//! Changes of the schema while a move follows: carried in order with the rows around them, or waited for with a way on.

mod capture;

use crate::harness::{Cluster, Database, PASSWORD, PATIENCE, Pgtandem, Running, assert_same, wait_until};

const CONTENT: &str = "
    create schema app; create type app.mood as enum ('sad', 'ok'); create sequence app.numbers;
    create table account (id int primary key, owner text, balance numeric not null default 0);
    create table entry (id bigint generated always as identity primary key, account int references account, at timestamptz default now(), v int);
    create table parted (id int primary key, v text) partition by range (id);
    create table parted_1 partition of parted for values from (0) to (100);
    create table keyless (v int);
    insert into account select i, 'owner ' || i from generate_series(1, 50) i;
    insert into entry (account, v) select id, id from account;
    insert into parted select i, 'p' from generate_series(1, 20) i; insert into keyless select generate_series(1, 5)";

struct Sides {
    _clusters: (Cluster, Cluster),
    from: Database,
    to: Database,
    pgtandem: Pgtandem,
}

impl Sides {
    /// As the superuser.
    async fn with(content: &str) -> Self {
        let clusters = Cluster::pair().await;
        Self::of(clusters, content).await
    }

    async fn of(clusters: (Cluster, Cluster), content: &str) -> Self {
        let (from, to) = (clusters.0.create_database("app").await, clusters.1.create_database("app").await);
        from.execute(content).await;
        let pgtandem = Pgtandem::new(&from, &to, "app");
        Self { _clusters: clusters, from, to, pgtandem }
    }

    /// With roles that own their database and may replicate, and nothing more: no event triggers.
    async fn without_a_superuser(content: &str) -> Self {
        let clusters = Cluster::pair().await;
        let mut sides = Vec::new();
        for cluster in [&clusters.0, &clusters.1] {
            cluster.execute(&format!("create role app login replication bypassrls password '{PASSWORD}'")).await;
            let database = cluster.create_database("app").await;
            cluster.execute("alter database app owner to app").await;
            database.execute("grant all on schema public to app").await;
            sides.push(database.with_user("app", PASSWORD));
        }
        let (to, from) = (sides.pop().unwrap(), sides.pop().unwrap());
        from.execute(content).await;
        let pgtandem = Pgtandem::new(&from, &to, "app");
        Self { _clusters: clusters, from, to, pgtandem }
    }

    async fn follow(&self) -> Running {
        let mut daemon = self.pgtandem.spawn(&["run"]);
        daemon.wait_for_log("entering phase follow", PATIENCE).await;
        daemon
    }

    async fn status(&self) -> serde_json::Value {
        let status = self.pgtandem.run(&["status", "--json"]).await;
        serde_json::from_str(&status.stdout).unwrap_or_else(|e| panic!("{e}: {status}"))
    }

    async fn arrives_whole(&self, mut daemon: Running) {
        wait_until("the cutover happens", 3 * PATIENCE, async || {
            assert!(daemon.is_running(), "{}", daemon.stderr());
            // Tables that are copied again put it off.
            let done = self.pgtandem.spawn(&["cutover", "--timeout", "60s"]).wait(3 * PATIENCE).await;
            assert!(matches!(done.code, Some(0 | 1)), "{done}\n{}", daemon.stderr());
            done.code == Some(0)
        })
        .await;
        let ended = daemon.wait(PATIENCE).await;
        assert_eq!(ended.code, Some(0), "{ended}");
        assert_same(&self.from, &self.to).await;
    }
}

/// Each line is one text of a client: statements of a text may hang together.
const CHANGES: &str = r#"
alter table account add column note text; insert into account (id, owner, note) values (100, 'new', 'with a note')
begin; alter table account add column level int not null default 7; update account set level = 8 where id < 10; alter table account rename column note to remark; insert into account (id, owner, remark) values (101, 'x', 'renamed'); commit
alter table account alter balance type numeric(12,2)
alter table entry alter v type bigint; insert into entry (account, v) values (1, 5000000000)
alter table entry add column born timestamptz default now(); insert into entry (account, v) values (2, 2)
alter table entry add column token uuid default gen_random_uuid()
alter table entry alter column v type text using v || ' at ' || clock_timestamp()
create table made (id serial primary key, v text, mood app.mood default 'ok'); insert into made (v) values ('one'), ('two'); alter table made add unique (v)
create index concurrently made_mood on made (mood)
update made set mood = 'sad' where id = 1
alter type app.mood add value 'happy'
insert into made (v, mood) values ('three', 'happy')
create table "Odd ""name" (like made including all); insert into "Odd ""name" (v) select 'odd' || i from generate_series(1, 9) i; delete from "Odd ""name" where v = 'odd3'
create table filled as select id, owner from account where id < 20
create table no_key (a int, b text); insert into no_key values (1, 'x'), (1, 'x')
alter table no_key replica identity full; update no_key set b = 'y' where a = 1; delete from no_key where ctid = (select min(ctid) from no_key)
alter table filled add primary key (id); update filled set owner = 'changed' where id < 5; delete from filled where id = 7
create table parted_2 partition of parted for values from (100) to (200); insert into parted values (150, 'second'); update parted set id = id + 100 where id < 5
alter table parted detach partition parted_1; update parted_1 set v = 'detached'
create table parted_0 (id int primary key, v text); insert into parted_0 values (3, 'before'); alter table parted attach partition parted_0 for values from (0) to (100); insert into parted values (4, 'attached')
alter table account rename to accounts; insert into accounts (id, owner) values (200, 'after the rename')
alter table entry set schema app; update app.entry set account = 3 where account = 1
alter schema app rename to app2; insert into app2.entry (account, v) values (5, 'x')
do $$ begin for i in 1 .. 3 loop execute format('create table loop_%s (id int primary key)', i); execute format('insert into loop_%s values (%s)', i, i); end loop; end $$
create function touch() returns trigger language plpgsql as $$ begin new.v := new.v || '!'; return new; end $$; create trigger touch before insert on made for each row execute function touch(); insert into made (v) values ('fires once')
alter table made enable always trigger touch; insert into made (v) values ('fires once more')
create view seen as select * from made; comment on view seen is 'a; comment'; create materialized view counted as select count(*) from made
drop table loop_2; drop view seen; create rule quiet as on delete to loop_1 do instead nothing
set search_path = app2; create table in_path (id int primary key); insert into in_path values (1)
truncate loop_3; alter table loop_3 add column more text; insert into loop_3 values (9, 'more')
create temp table passing (id int); insert into passing values (1); drop table passing
begin; create table rolled_back (id int primary key); insert into rolled_back values (1); rollback
begin; savepoint s; alter table loop_1 add column gone int; rollback to s; alter table loop_1 add column kept int; insert into loop_1 values (77, 7); commit
alter table made drop column mood; update made set v = 'without a mood' where id = 2
alter table accounts disable row level security; create policy nobody on accounts using (false)
create domain app2.positive as int check (value > 0); create table with_domain (id app2.positive primary key); insert into with_domain values (5)
alter sequence app2.numbers increment 5; select nextval('app2.numbers')
alter table accounts drop constraint if exists tall; alter table accounts add constraint tall check (level < 1000)
alter table accounts drop constraint if exists tall; alter table accounts add constraint tall check (level < 2000); create index on accounts (owner)
begin; savepoint s; create index on accounts (level); rollback to s; create index on accounts (balance); commit
create index on accounts (lower(owner)); create index on accounts (upper(owner)); alter table accounts alter level set default 9
"#;

/// What rows do not show: keys, indexes, constraints, triggers, views, functions, types, policies, comments, owners.
const CATALOG: &str = r"
    select 'index ' || pg_get_indexdef(indexrelid) || ' ' || indisreplident from pg_index where indrelid >= 16384 and ours(indrelid)
    union all select 'constraint ' || conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) || ' ' || convalidated
        from pg_constraint where conrelid <> 0 and contype <> 'n' and ours(conrelid)
    union all select 'trigger ' || pg_get_triggerdef(oid) || ' ' || tgenabled::text from pg_trigger
        where not tgisinternal and tgname <> 'pgtandem_app_fence' and ours(tgrelid)
    union all select 'rule ' || pg_get_ruledef(oid) || ' ' || ev_enabled::text from pg_rewrite where ours(ev_class)
    union all select 'column ' || attrelid::regclass || ' ' || attname || ' ' || format_type(atttypid, atttypmod) || ' ' || attnotnull
            || ' ' || attidentity::text || ' ' || attgenerated::text || ' ' || coalesce((select pg_get_expr(adbin, adrelid) from pg_attrdef
                                                  where adrelid = attrelid and adnum = attnum), '')
        from pg_attribute where attnum > 0 and not attisdropped and ours(attrelid)
    union all select 'relation ' || oid::regclass || ' ' || relkind::text || relpersistence::text || relreplident::text || ' ' || relrowsecurity || ' '
            || relowner::regrole || ' ' || coalesce(pg_get_expr(relpartbound, oid), '') || ' ' || coalesce(obj_description(oid, 'pg_class'), '')
        from pg_class where relkind <> 't' and ours(oid)
    union all select 'label ' || enumtypid::regtype || ' ' || enumlabel from pg_enum
    union all select 'type ' || t.oid::regtype || typtype::text || ' ' || coalesce(pg_get_constraintdef(k.oid), '')
        from pg_type t left join pg_constraint k on k.contypid = t.oid
        where typtype in ('d', 'e') and typnamespace not in ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
    union all select 'function ' || pg_get_functiondef(oid) from pg_proc
        where pronamespace not in ('pg_catalog'::regnamespace, 'information_schema'::regnamespace) and prokind in ('f', 'p')
          and pronamespace <> coalesce(to_regnamespace('pgtandem'), 0) and proname <> 'ours'
    union all select 'policy ' || polname || ' ' || polrelid::regclass || ' ' || coalesce(pg_get_expr(polqual, polrelid), '') from pg_policy
    order by 1";

/// A helper of [`CATALOG`] in the session's own schema.
const OURS: &str = "
    create or replace function pg_temp.ours(relation oid) returns boolean language sql as
    $$ select exists (select from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
                      where c.oid = relation and n.nspname !~ '^pg_' and n.nspname not in ('information_schema', 'pgtandem')) $$";

async fn catalog(database: &Database) -> Vec<String> {
    let client = database.connect().await;
    client.batch_execute(OURS).await.unwrap();
    client.batch_execute("set search_path = ''").await.unwrap();
    let rows = client.query(&CATALOG.replace("ours(", "pg_temp.ours("), &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn same_catalog(sides: &Sides) {
    let (from, to) = (catalog(&sides.from).await, catalog(&sides.to).await);
    let only =
        |one: &[String], other: &[String]| one.iter().filter(|line| !other.contains(line)).cloned().collect::<Vec<_>>();
    assert!(from == to, "only on the source: {:#?}\nonly on the target: {:#?}", only(&from, &to), only(&to, &from));
}

async fn captured_changes_arrive(sides: Sides) {
    let daemon = sides.follow().await;
    for text in CHANGES.lines().filter(|line| !line.is_empty()) {
        sides.from.execute(text).await;
        // Rows around each change.
        sides.from.execute("insert into keyless values (1); update parted set v = v || '.' where id = 15").await;
    }
    sides.arrives_whole(daemon).await;
    same_catalog(&sides).await;
    assert_eq!(sides.to.query_string("select count(*) from pgtandem.ddl where state = 'refused'").await, "0");
    let left =
        "select (select count(*) from pg_event_trigger) + (select count(*) from pg_class where relname = 'ddl_app')";
    assert_eq!(sides.from.query_string(left).await, "0", "the capture goes with the switch");
}

#[tokio::test]
async fn captured_changes_of_the_schema_arrive_in_order() {
    captured_changes_arrive(Sides::with(CONTENT).await).await;
}

#[tokio::test]
async fn captured_changes_of_the_schema_arrive_from_13_to_18() {
    let clusters = tokio::join!(Cluster::start(13), Cluster::start(18));
    captured_changes_arrive(Sides::of(clusters, CONTENT).await).await;
}

/// The capture runs with its owner's rights in everybody's session: nothing of that session's own is called with them.
#[tokio::test]
async fn a_role_of_the_source_gains_nothing_from_the_capture() {
    let sides = Sides::with(CONTENT).await;
    for side in [&sides.from, &sides.to] {
        side.execute(&format!("create role dev login password '{PASSWORD}'; grant create on schema public to dev"))
            .await;
    }
    sides.from.execute("create schema traps authorization dev").await;
    let daemon = sides.follow().await;
    let dev = sides.from.with_user("dev", PASSWORD);
    // Functions and operators of the names that the capture uses, in front of the real ones.
    dev.execute(
        "create function traps.spring() returns boolean language plpgsql as $$ begin
             execute 'alter role dev superuser'; return true; exception when others then return true; end $$;
         create function traps.set_config(text, text, boolean) returns text language sql as 'select traps.spring()::text';
         create function traps.current_setting(text) returns text language sql as 'select traps.spring()::text';
         create function traps.current_query() returns text language sql as 'select traps.spring()::text';
         create function traps.starts_with(text, text) returns boolean language sql as 'select traps.spring()';
         create function traps.same(text, text) returns boolean language sql as 'select traps.spring()';
         create operator traps.= (leftarg = text, rightarg = text, function = traps.same);
         create operator traps.~~ (leftarg = text, rightarg = text, function = traps.same)",
    )
    .await;
    dev.execute("set search_path = traps, pg_catalog, public; create table public.by_dev (id int primary key); insert into by_dev values (1)")
        .await;
    // And into the way of the descriptions nobody else writes.
    let refused = dev.connect().await.batch_execute("insert into pgtandem.ddl_app values ('{}')").await;
    assert!(refused.is_err(), "everybody may have the target run statements");
    let refused = dev.connect().await.batch_execute("select pgtandem.publish_app()").await;
    assert!(refused.is_err(), "everybody may change the publications");
    let superuser = "select rolsuper from pg_roles where rolname = 'dev'";
    assert_eq!(sides.from.query_string(superuser).await, "f");
    wait_until("the table arrives", PATIENCE, async || {
        sides.to.query_string("select to_regclass('public.by_dev') is not null").await == "t"
    })
    .await;
    assert_eq!(sides.to.query_string("select relowner::regrole from pg_class where relname = 'by_dev'").await, "dev");
    assert_eq!(sides.to.query_string(superuser).await, "f");
    sides.arrives_whole(daemon).await;
}

/// A statement that the target cannot run is waited for, with its text and the ways on; nothing around it is lost.
#[tokio::test]
async fn a_captured_change_that_the_target_refuses_is_waited_for() {
    let sides = Sides::with("create table t (id int primary key, v text); insert into t values (1, 'a')").await;
    let daemon = sides.follow().await;
    // A role that the target lacks, and a statement that names it.
    sides.from.execute("create role only_here; insert into t values (2, 'b'); grant select on t to only_here").await;
    sides.from.execute("insert into t values (3, 'c')").await;
    wait_until("the daemon says what it waits for", PATIENCE, async || {
        let status = sides.status().await;
        status["error"]["code"] == "ddl_refused"
            && status["error"]["message"].as_str().is_some_and(|m| m.contains("grant select on t"))
    })
    .await;
    assert_eq!(
        sides.to.query_strings("select id from t order by 1").await,
        ["1"],
        "nothing of its transaction is there"
    );
    // Whoever asks for something meanwhile hears why it waits, and not that nobody is there. Between two tries the state
    // knows of no error for a moment.
    wait_until("a cutover is refused with the reason", PATIENCE, async || {
        let refused = sides.pgtandem.run(&["cutover", "--timeout", "1s"]).await;
        assert!(refused.code == Some(1) && !refused.stderr.contains("no_daemon"), "{refused}");
        refused.stderr.contains("the daemon waits before it tries again")
            && refused.stderr.contains("grant select on t")
    })
    .await;
    let refused = sides.pgtandem.run(&["clean", "--yes"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("daemon_running"), "{refused}");
    // Mended, it goes on by itself.
    sides.to.execute("create role only_here").await;
    wait_until("it goes on", PATIENCE, async || sides.to.query_string("select count(*) from t").await == "3").await;
    // Or it is left out.
    sides.from.execute("create role another; grant select on t to another").await;
    sides.from.execute("insert into t values (4, 'd')").await;
    wait_until("the refusal is noted", PATIENCE, async || {
        sides.to.query_string("select count(*) from pgtandem.ddl where state = 'refused'").await == "1"
    })
    .await;
    sides.to.execute("update pgtandem.ddl set state = 'skip' where state = 'refused'").await;
    wait_until("it goes on", PATIENCE, async || sides.to.query_string("select count(*) from t").await == "4").await;
    sides.arrives_whole(daemon).await;
}

/// Whatever the daemon dies of, and whenever, between two changes of the schema.
#[tokio::test]
async fn captured_changes_survive_deaths_of_the_daemon() {
    let sides = Sides::with(CONTENT).await;
    let mut daemon = sides.follow().await;
    for round in 0..8 {
        sides
            .from
            .execute(&format!(
                "create table t{round} (id int primary key); insert into t{round} select generate_series(1, 100);
                 alter table account add column c{round} text default 'round {round}'; update account set c{round} = 'x' where id = {};
                 alter table entry add column r{round} float default random()",
                round + 1
            ))
            .await;
        drop(daemon.kill());
        daemon = sides.pgtandem.spawn(&["run"]);
        if round % 2 == 0 {
            daemon.wait_for_log("schema change statement", PATIENCE).await;
        }
    }
    sides.arrives_whole(daemon).await;
    same_catalog(&sides).await;
}

/// Without the right to make event triggers, a change is noticed before a row goes astray, and waited for.
#[tokio::test]
async fn a_change_that_is_not_captured_is_waited_for() {
    let sides = Sides::without_a_superuser(
        "create table widened (id int primary key, v int); insert into widened select i, i from generate_series(1, 9) i;
         create table leaves (id int primary key); insert into leaves values (1)",
    )
    .await;
    let mut daemon = sides.follow().await;
    for (change, rows, code) in [
        ("alter table widened add column more text", "insert into widened values (100, 0, 'm')", "shape_differs"),
        ("alter table widened alter v type bigint", "insert into widened values (101, 5000000000)", "shape_differs"),
        ("create table arrives (id int primary key)", "insert into arrives values (1), (2)", "table_added"),
        // Changes of it are still on their way when it goes.
        ("drop table leaves", "", "table_"),
    ] {
        if code == "table_" {
            sides.from.execute("insert into leaves values (2)").await;
        }
        sides.from.execute(change).await;
        sides.from.execute(rows).await;
        wait_until(change, PATIENCE, async || {
            assert!(daemon.is_running(), "{}", daemon.stderr());
            sides.status().await["error"]["code"].as_str().is_some_and(|found| found.starts_with(code))
        })
        .await;
        sides.to.execute(change).await;
        wait_until("it follows again", PATIENCE, async || {
            assert!(daemon.is_running(), "{}", daemon.stderr());
            let status = sides.status().await;
            status["error"].is_null() && status["phase"] == "follow"
        })
        .await;
    }
    sides.arrives_whole(daemon).await;
    same_catalog(&sides).await;
}

/// Under `follow.ddl = "stop"` the daemon ends instead.
#[tokio::test]
async fn a_change_ends_the_daemon_where_that_is_asked() {
    let mut sides = Sides::with("create table t (id int primary key)").await;
    sides.pgtandem = sides.pgtandem.env("PGTANDEM_FOLLOW_DDL", "stop");
    let daemon = sides.follow().await;
    sides.from.execute("alter table t add column v text; insert into t values (1, 'x')").await;
    let stopped = daemon.wait(PATIENCE).await;
    assert!(stopped.code == Some(4) && stopped.stderr.contains("shape_differs"), "{stopped}");
    let triggers = "select count(*) from pg_event_trigger";
    assert_eq!(sides.from.query_string(triggers).await, "0");
}

#[tokio::test]
async fn tables_are_copied_again_while_following() {
    let sides = Sides::with(CONTENT).await;
    let mut daemon = sides.follow().await;
    // Others refer to the first one; the second is partitioned; the third goes on changing.
    sides.to.execute("delete from keyless; update parted set v = 'bent'; set session_replication_role = replica; delete from account where id > 40")
        .await;
    let (from, stop) = (sides.from.clone(), tokio_util::sync::CancellationToken::new());
    let writer = tokio::spawn({
        let stop = stop.clone();
        async move {
            let client = from.connect().await;
            let mut id = 1000;
            while !stop.is_cancelled() {
                id += 1;
                let sql = format!("insert into account values ({id}, 'meanwhile'); insert into keyless values ({id})");
                client.batch_execute(&sql).await.unwrap();
            }
        }
    });
    let done = sides.pgtandem.spawn(&["resync", "account", "public.parted", "key*"]).wait(2 * PATIENCE).await;
    assert_eq!(done.code, Some(0), "{done}\n{}", daemon.stderr());
    assert!(done.stdout.contains("public.parted_1") && done.stdout.contains("the target follows"), "{done}");
    stop.cancel();
    writer.await.unwrap();
    // Nothing else was copied again.
    let copied = daemon.stderr().matches("copied public.entry").count();
    assert_eq!(copied, 1, "{}", daemon.stderr());
    let unknown = sides.pgtandem.run(&["resync", "nowhere"]).await;
    assert!(unknown.code == Some(1) && unknown.stderr.contains("table_unknown"), "{unknown}");
    // Without a daemon it is written down for the next one.
    drop(daemon.kill());
    sides.to.execute("update parted set v = 'bent again'").await;
    let noted = sides.pgtandem.run(&["resync", "parted_1"]).await;
    assert!(noted.code == Some(0) && noted.stdout.contains("no daemon runs"), "{noted}");
    daemon = sides.pgtandem.spawn(&["run"]);
    daemon.wait_for_log("copied public.parted_1", PATIENCE).await;
    sides.arrives_whole(daemon).await;
}

/// The sides differ, the move stopped; a copy of the table is the way on.
#[tokio::test]
async fn a_table_that_diverged_is_copied_again_and_the_move_goes_on() {
    let sides = Sides::with(
        "create table t (id int primary key, v text); insert into t select i, 'v' from generate_series(1, 9) i",
    )
    .await;
    let daemon = sides.follow().await;
    sides.to.execute("delete from t where id = 5").await;
    sides.from.execute("update t set v = 'x' where id = 5").await;
    let stopped = daemon.wait(PATIENCE).await;
    assert!(stopped.code == Some(4) && stopped.stderr.contains("resync"), "{stopped}");
    let noted = sides.pgtandem.run(&["resync", "t"]).await;
    assert_eq!(noted.code, Some(0), "{noted}");
    let mut daemon = sides.pgtandem.spawn(&["run"]);
    daemon.wait_for_log("entering phase follow", PATIENCE).await;
    sides.arrives_whole(daemon).await;
}

/// What a tool does that changes a large table by filling another one and exchanging their names.
#[tokio::test]
async fn a_table_that_was_exchanged_is_copied_again() {
    let sides =
        Sides::without_a_superuser("create table t (id int primary key, v text); insert into t values (1, 'old')")
            .await;
    let daemon = sides.follow().await;
    daemon.terminate();
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));
    sides
        .from
        .execute(
            "create table t_new (like t including all); insert into t_new select id, 'new' from t;
             alter table t rename to t_old; alter table t_new rename to t",
        )
        .await;
    sides
        .to
        .execute(
            "create table t_new (like t including all); alter table t rename to t_old; alter table t_new rename to t;
             truncate t_old",
        )
        .await;
    let mut daemon = sides.pgtandem.spawn(&["run"]);
    daemon.wait_for_log("table_not_published", PATIENCE).await;
    wait_until("a moment in which no daemon leads, or one that takes the request", PATIENCE, async || {
        sides.pgtandem.spawn(&["resync", "t"]).wait(2 * PATIENCE).await.code == Some(0)
    })
    .await;
    sides.arrives_whole(daemon).await;
}
