//! Preflight finds everything at once, and leaves nothing behind.

mod rights;

use std::num::NonZeroUsize;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use pgtandem::config::{
    Config, Copy, CopyMethod, Cutover, CutoverVerify, Ddl, Engine, Fence, Follow, Log, LogFormat, MissingRow, MoveName,
    Scope, TablePattern, WithoutIdentity,
};
use pgtandem::postgres::{Ambient, ConnInfo, Server, Side};
use pgtandem::preflight::{self, Report};

use pgtandem::state::Store;

use crate::harness::{Cluster, Database, PASSWORD, PATIENCE, Pgtandem, server_bin, versions_under_test, wait_until};

#[tokio::test]
async fn an_ordinary_pair_is_ready() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        "create table account (id int primary key, owner text);
         create table history (what text);
         insert into history values ('begun');
         create materialized view totals as select count(*) from account",
    )
    .await;
    let before = (fingerprint(&from).await, fingerprint(&to).await);

    let report = check(&from, &to).await;

    assert_eq!(codes(&report, "blocking"), [""; 0], "{}", report.to_text(false));
    assert_eq!(objects(&report, "insert_only"), ["public.history"]);
    assert_eq!(objects(&report, "materialized_views"), ["public.totals"]);
    assert_eq!(codes(&report, "warning"), [""; 0], "{}", report.to_text(false));
    assert_eq!((fingerprint(&from).await, fingerprint(&to).await), before);
}

#[tokio::test]
async fn everything_wrong_is_said_at_once() {
    let (one, two) = versions_under_test();
    let source = Cluster::builder(one).set("wal_level", "replica").set("max_prepared_transactions", "2").start().await;
    let target = Cluster::builder(two).start().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        r#"create role "the owner"; create role reader;
           create table no_key (id int); insert into no_key values (1); update no_key set id = 2;
           create table whole (id int); alter table whole replica identity full;
           create table late_key (id int primary key deferrable);
           create unlogged table cache (id int primary key);
           create table owned (id int primary key); alter table owned owner to "the owner"; grant select on owned to reader;
           create table sorted (id int primary key, name text collate "C");
           create table pointer (id int primary key, what oid);
           select lo_create(0);
           create publication theirs for table owned"#,
    )
    .await;
    let client = from.connect().await;
    client.batch_execute("begin; insert into owned values (1); prepare transaction 'left behind'").await.unwrap();
    counted_updates(&from, "no_key").await;
    to.execute("create table something (id int); create function f() returns int language sql as 'select 1'; create type mood as enum ('ok')")
        .await;
    let before = (fingerprint(&from).await, fingerprint(&to).await);

    let report = check(&from, &to).await;

    let mut blocking = codes(&report, "blocking");
    blocking.sort_unstable();
    assert_eq!(
        blocking,
        ["no_replica_identity", "roles_missing", "target_not_empty", "wal_level"],
        "{}",
        report.to_text(false)
    );
    assert_eq!(objects(&report, "no_replica_identity"), ["public.no_key"]);
    assert_eq!(fix(&report, "no_replica_identity"), r#"ALTER TABLE "public"."no_key" REPLICA IDENTITY FULL;"#);
    assert_eq!(objects(&report, "roles_missing"), ["reader", "the owner"]);
    assert_eq!(fix(&report, "roles_missing"), "CREATE ROLE \"reader\" NOLOGIN;\nCREATE ROLE \"the owner\" NOLOGIN;");
    assert_eq!(objects(&report, "target_not_empty"), ["public.f()", "public.mood", "public.something"]);
    assert_eq!(objects(&report, "full_replica_identity"), ["public.whole"]);
    assert_eq!(objects(&report, "deferrable_key"), ["public.late_key"]);
    assert_eq!(objects(&report, "unlogged_tables"), ["public.cache"]);
    assert_eq!(objects(&report, "local_identifiers"), ["public.pointer.what oid"]);
    assert_eq!(objects(&report, "publications"), ["theirs"]);
    assert_eq!(objects(&report, "prepared_transaction"), ["left behind"]);
    assert!(finding(&report, "large_objects").is_some());
    assert_eq!((fingerprint(&from).await, fingerprint(&to).await), before);
}

/// Before 18 a generated column is not published, so a key that has one identifies nothing: preflight says so as well.
#[tokio::test]
async fn a_key_with_a_generated_column_is_none_before_18() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        "create table by_key (a int, b int generated always as (a / 2) stored, primary key (a, b));
         create table by_index (a int not null, b int not null generated always as (a / 2) stored, unique (a, b));
         alter table by_index replica identity using index by_index_a_b_key;
         create table beside (a int primary key, b int generated always as (a / 2) stored)",
    )
    .await;

    let report = check(&from, &to).await;

    let unkeyed: &[&str] = if source.version() < 18 { &["public.by_index", "public.by_key"] } else { &[] };
    assert_eq!(objects(&report, "insert_only"), unkeyed, "{}", report.to_text(false));
}

#[tokio::test]
async fn functions_that_the_target_cannot_load_are_named() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    let server = server_bin(source.version()).join("../lib/postgresql/refint.so");
    let folder = tempfile::Builder::new().prefix("pgtandem-library-").tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let library = folder.path().join("of their own.so");
    std::fs::copy(server, &library).unwrap();
    from.execute(&format!(
        "create function plain() returns int language sql as 'select 1';
         create function \"Their check\"() returns trigger language c as '{}', 'check_primary_key'",
        library.display()
    ))
    .await;
    // The source has loaded it; the target looks for it in vain.
    std::fs::remove_file(&library).unwrap();

    let report = check(&from, &to).await;

    assert_eq!(codes(&report, "blocking"), ["library_refused"], "{}", report.to_text(false));
    assert_eq!(objects(&report, "library_refused"), ["public.\"Their check\"()"]);
    from.execute(fix(&report, "library_refused").lines().last().unwrap()).await;
    let report = check(&from, &to).await;
    assert_eq!(codes(&report, "blocking"), [""; 0], "{}", report.to_text(false));
}

#[tokio::test]
async fn columns_that_are_generated_in_a_child_alone_are_named_where_they_are_refused() {
    let (source, old, new) = tokio::join!(Cluster::start(15), Cluster::start(15), Cluster::start(16));
    let (from, to) = (source.create_database("app").await, new.create_database("app").await);
    from.execute(
        r#"create table parent (a int primary key, "b" int);
           create table "Chi""ld" ("b" int generated always as (a * 2) stored) inherits (parent);
           create table like_it (b int generated always as (a * 2) stored) inherits (parent)"#,
    )
    .await;

    let report = check(&from, &to).await;

    assert_eq!(codes(&report, "blocking"), ["generated_in_child"], "{}", report.to_text(false));
    assert_eq!(objects(&report, "generated_in_child"), ["public.Chi\"ld.b", "public.like_it.b"]);
    let theirs = check(&from, &old.create_database("app").await).await;
    assert_eq!(codes(&theirs, "blocking"), [""; 0], "{}", theirs.to_text(false));
    from.execute(&fix(&report, "generated_in_child")).await;
    let moved = Pgtandem::new(&from, &to, "app").run(&["run", "--until", "copy"]).await;
    assert_eq!(moved.code, Some(0), "{moved}");
}

#[tokio::test]
async fn the_fixes_mend_what_was_found() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        r#"create role "O'Neill"; create table "Odd "" name" (id int); insert into "Odd "" name" values (1);
           delete from "Odd "" name"; alter table "Odd "" name" owner to "O'Neill""#,
    )
    .await;
    counted_updates(&from, r#""Odd "" name""#).await;
    let report = check(&from, &to).await;
    assert_eq!(codes(&report, "blocking"), ["no_replica_identity", "roles_missing"]);

    from.execute(&fix(&report, "no_replica_identity")).await;
    to.execute(&fix(&report, "roles_missing")).await;

    let report = check(&from, &to).await;
    assert_eq!(codes(&report, "blocking"), [""; 0], "{}", report.to_text(false));
}

#[tokio::test]
async fn a_role_with_replication_that_owns_its_database_passes() {
    let (source, target) = Cluster::pair().await;
    let owner = format!("create role app login replication password '{PASSWORD}'");
    source.execute(&owner).await;
    target.execute(&owner).await;
    let from = source.create_database("app").await;
    let to = target.create_database("app").await;
    for database in [&from, &to] {
        database.execute("alter database app owner to app; grant create on schema public to app").await;
    }
    let (from, to) = (from.with_user("app", PASSWORD), to.with_user("app", PASSWORD));
    from.execute("create table t (id serial primary key)").await;

    let report = check(&from, &to).await;

    assert_eq!(codes(&report, "blocking"), [""; 0], "{}", report.to_text(false));
    assert!(finding(&report, "no_session_replication_role").is_some());
}

#[tokio::test]
async fn a_role_without_any_right_hears_of_each() {
    let (source, target) = Cluster::pair().await;
    let nobody = format!("create role nobody login password '{PASSWORD}'");
    source.execute(&nobody).await;
    target.execute(&nobody).await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        "create schema closed; create table closed.t (id int primary key);
         create table hidden (id serial primary key); alter table hidden enable row level security;
         create role other; alter table hidden owner to other",
    )
    .await;
    let before = (fingerprint(&from).await, fingerprint(&to).await);
    let (weak_from, weak_to) = (from.with_user("nobody", PASSWORD), to.with_user("nobody", PASSWORD));

    let report = check(&weak_from, &weak_to).await;

    for code in [
        "no_replication_right",
        "no_publication_right",
        "not_owner",
        "no_select",
        "no_schema_usage",
        "no_lock_right",
        "row_security",
        "target_no_create",
    ] {
        assert!(codes(&report, "blocking").contains(&code), "{code} is missing:\n{}", report.to_text(false));
    }
    assert_eq!(objects(&report, "not_owner"), ["closed.t", "public.hidden"]);
    assert_eq!(objects(&report, "no_select"), ["closed.t", "public.hidden", "public.hidden_id_seq"]);
    assert_eq!(objects(&report, "cannot_look").len(), 0);
    assert!(finding(&report, "cannot_look").is_some(), "the WAL on disk cannot be seen without pg_monitor");
    assert!(!report.to_json().to_string().contains(PASSWORD));
    assert_eq!((fingerprint(&from).await, fingerprint(&to).await), before);
}

#[tokio::test]
async fn the_source_is_no_target_under_any_name() {
    let cluster = Cluster::start(versions_under_test().0).await;
    let (one, two) = (cluster.create_database("one").await, cluster.create_database("two").await);
    let elsewhere = one.url().replace("127.0.0.1", "localhost");

    let report = check_urls(&one.url(), &elsewhere, &config()).await;
    assert_eq!(codes(&report, "blocking"), ["same_server"], "{}", report.to_text(false));

    let report = check(&one, &two).await;
    assert_eq!(finding(&report, "same_server"), None, "two databases of one cluster are two");
}

#[tokio::test]
async fn the_source_is_no_target_though_its_identifier_is_closed() {
    let cluster = Cluster::start(versions_under_test().0).await;
    let app = cluster.create_database("app").await;
    app.execute(&format!(
        "create role app login replication password '{PASSWORD}'; grant all on database app to app;
         revoke execute on function pg_control_system() from public"
    ))
    .await;
    let app = app.with_user("app", PASSWORD);

    let report = check(&app, &app).await;

    assert!(finding(&report, "same_server").is_some(), "{}", report.to_text(false));
    assert!(finding(&report, "identity_unknown").is_some());
}

#[tokio::test]
async fn slots_walsenders_and_names_must_be_free() {
    let (one, two) = versions_under_test();
    let source = Cluster::builder(one).set("max_replication_slots", "1").set("max_wal_senders", "0");
    let (source, target) = (source.start().await, Cluster::start(two).await);
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute("select pg_create_logical_replication_slot('theirs', 'pgoutput')").await;

    let report = check(&from, &to).await;
    assert_eq!(codes(&report, "blocking"), ["no_slot_free", "no_walsender_free"], "{}", report.to_text(false));

    from.execute(
        "select pg_drop_replication_slot('theirs'); select pg_create_logical_replication_slot('pgtandem_app', 'pgoutput');
         create publication pgtandem_app",
    )
    .await;
    let report = check(&from, &to).await;
    assert_eq!(codes(&report, "blocking"), ["slot_exists", "no_walsender_free", "publication_exists"]);
    from.execute(&fix(&report, "slot_exists")).await;
    from.execute(&fix(&report, "publication_exists")).await;
    assert_eq!(codes(&check(&from, &to).await, "blocking"), ["no_walsender_free"]);
}

#[tokio::test]
async fn what_is_out_of_scope_is_not_looked_at() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute("create table no_key (id int); insert into no_key values (1); delete from no_key").await;
    counted_updates(&from, "no_key").await;
    let mut config = config();
    config.scope.exclude.push(TablePattern::new("public.no_*").unwrap());

    let report = check_urls(&from.url(), &to.url(), &config).await;

    assert_eq!(codes(&report, "blocking"), [""; 0], "{}", report.to_text(false));
}

#[tokio::test]
async fn encodings_and_extensions_are_compared() {
    let (one, two) = versions_under_test();
    let (source, target) = (Cluster::start(one).await, Cluster::start(two).await);
    let from = source.create_database("app").await;
    target.execute("create database app template template0 encoding 'LATIN1' lc_collate 'C' lc_ctype 'C'").await;
    let to = target.database("app");
    // An extension that the target cannot offer: known to the catalog of the source only.
    from.execute("update pg_extension set extname = 'only_here' where extname = 'plpgsql'").await;

    let report = check(&from, &to).await;

    assert_eq!(codes(&report, "blocking"), ["extension_missing", "encoding_differs"], "{}", report.to_text(false));
    assert_eq!(objects(&report, "extension_missing"), ["only_here"]);
}

#[tokio::test]
async fn an_old_transaction_is_only_named_once_it_is_old() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    let writer = from.connect().await;
    writer.batch_execute("begin; select pg_current_xact_id()").await.unwrap();

    assert_eq!(finding(&check(&from, &to).await, "old_transaction"), None);

    from.execute(&format!("create role blind login password '{PASSWORD}'")).await;
    let report = check(&from.with_user("blind", PASSWORD), &to).await;
    let named = finding(&report, "old_transaction").expect("an age that cannot be seen may be any");
    assert!(named.what.contains("only pg_monitor may see"), "{}", named.what);
}

#[tokio::test]
async fn both_unreachable_servers_are_named() {
    let nowhere = "postgresql://app:secret@127.0.0.1:1/app";
    let report = check_urls(nowhere, nowhere, &config()).await;
    assert_eq!(codes(&report, "blocking"), ["connection_failed", "connection_failed"]);
    assert!(report.unreachable());
    assert!(!report.to_text(false).contains("secret"));
}

#[tokio::test]
async fn a_move_that_has_begun_may_find_what_it_made() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute("create table t (id int primary key); create publication pgtandem_app for table t").await;
    from.execute("select pg_create_logical_replication_slot('pgtandem_app', 'pgoutput')").await;
    to.execute("create table t (id int primary key)").await;
    let store = Store::new(server(Side::Target, &to.url()), MoveName::new("app").unwrap());
    let identity = preflight::identity(&from.connect().await).await.unwrap();

    store.install(&identity).await.unwrap();
    let report = check(&from, &to).await;
    assert_eq!(codes(&report, "blocking"), ["slot_exists", "publication_exists", "target_not_empty"]);

    store.begin(&identity).await.unwrap();
    let report = check(&from, &to).await;
    assert_eq!(codes(&report, "blocking"), [""; 0], "{}", report.to_text(false));
}

#[tokio::test]
async fn the_command_prints_and_ends_as_promised() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    let pgtandem = Pgtandem::new(&from, &to, "app");

    let ready = pgtandem.run(&["check"]).await;
    assert_eq!(ready.code, Some(0), "{ready}");
    assert!(ready.stdout.contains("ready to move: nothing blocking"), "{ready}");

    to.execute("create table in_the_way (id int)").await;
    let refused = pgtandem.run(&["check", "--json"]).await;
    assert_eq!(refused.code, Some(1), "{refused}");
    let document: serde_json::Value = serde_json::from_str(&refused.stdout).unwrap();
    assert_eq!(document["ok"], false);
    assert_eq!(document["findings"][0]["code"], "target_not_empty");
    assert_eq!(document["findings"][0]["objects"][0], "public.in_the_way");

    let wrong = Pgtandem::new(&from.with_user("postgres", "wrong"), &to.with_user("postgres", "wrong"), "app");
    let unreachable = wrong.run(&["check"]).await;
    assert_eq!(unreachable.code, Some(3), "{unreachable}");
    assert!(unreachable.stdout.contains("blocking (2)"), "{unreachable}");
    assert!(unreachable.stderr.contains("cannot ask the source and the target"), "{unreachable}");
}

#[tokio::test]
async fn an_older_target_is_refused() {
    let (source, target) = (Cluster::start(14).await, Cluster::start(13).await);
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    assert_eq!(codes(&check(&from, &to).await, "blocking"), ["target_older"]);
}

async fn check(source: &Database, target: &Database) -> Report {
    check_urls(&source.url(), &target.url(), &config()).await
}

async fn check_urls(source: &str, target: &str, config: &Config) -> Report {
    preflight::run(config, &server(Side::Source, source), &server(Side::Target, target)).await
}

fn server(side: Side, url: &str) -> Server {
    Server::new(side, conninfo(url), "app").unwrap()
}

fn conninfo(url: &str) -> ConnInfo {
    ConnInfo::parse(url, &Ambient::default()).unwrap()
}

fn config() -> Config {
    let few = NonZeroUsize::new(2).unwrap();
    let nowhere = conninfo("postgresql://nobody@127.0.0.1:1/nothing");
    Config {
        large_objects: true,
        name: MoveName::new("app").unwrap(),
        scope: Scope::default(),
        source: nowhere.clone(),
        source_from_target: None,
        target: nowhere,
        copy: Copy {
            method: CopyMethod::Copy,
            workers: few,
            index_workers: few,
            split_above: 1 << 30,
            first: Vec::new(),
            max_bytes_per_second: 0,
            keep_archive: false,
        },
        follow: Follow {
            engine: Engine::Stream,
            workers: few,
            batch_max_delay: Duration::from_millis(200),
            batch_max_bytes: 1 << 25,
            spill_max_bytes: 8 << 30,
            spool: None,
            spool_max_bytes: 1 << 30,
            ddl: Ddl::Replicate,
            missing_row: MissingRow::Stop,
            without_identity: WithoutIdentity::Watch,
        },
        cutover: Cutover {
            max_lag: Duration::from_secs(1),
            timeout: Duration::from_secs(30),
            fence: Fence::Lock,
            verify: CutoverVerify::Counts,
            refresh: true,
            reverse: true,
            hook: Vec::new(),
            pgbouncer: None,
            pgbouncer_database: String::new(),
        },
        http: None,
        log: Log { level: "info".into(), format: LogFormat::Text },
    }
}

fn codes<'a>(report: &'a Report, severity: &str) -> Vec<&'a str> {
    report.findings.iter().filter(|found| found.severity.as_str() == severity).map(|found| found.code).collect()
}

fn finding<'a>(report: &'a Report, code: &str) -> Option<&'a preflight::Finding> {
    report.findings.iter().find(|found| found.code == code)
}

fn objects(report: &Report, code: &str) -> Vec<String> {
    finding(report, code).map(|found| found.objects.clone()).unwrap_or_default()
}

fn fix(report: &Report, code: &str) -> String {
    finding(report, code).and_then(|found| found.fix.clone()).unwrap_or_default()
}

/// Counters of updates and deletes reach the statistics a moment after the statement.
async fn counted_updates(database: &Database, table: &str) {
    let sql = format!("select n_tup_upd + n_tup_del > 0 from pg_stat_user_tables where relid = '{table}'::regclass");
    wait_until("the statistics count the change", PATIENCE, || async { database.query_string(&sql).await == "t" })
        .await;
}

/// Everything that a check could leave behind: objects, slots, publications, sessions' settings, transactions, locks.
async fn fingerprint(database: &Database) -> Vec<String> {
    database
        .query_strings(
            "select 'class ' || oid || relname || coalesce(relacl::text, '') from pg_class
             union all select 'namespace ' || nspname || coalesce(nspacl::text, '') from pg_namespace where nspname !~ '^pg_temp|^pg_toast_temp'
             union all select 'publication ' || pubname from pg_publication
             union all select 'slot ' || slot_name from pg_replication_slots
             union all select 'role ' || rolname from pg_roles
             union all select 'setting ' || setdatabase || setrole || setconfig::text from pg_db_role_setting
             union all select 'prepared ' || gid from pg_prepared_xacts
             order by 1",
        )
        .await
}
