//! What the target's role may not do, and what does not travel by itself, is found before the move, with a fix that mends it.

use super::*;

/// Two empty databases, the target's reached by a role without a superuser's rights that may make schemas.
struct Plain {
    _clusters: (Cluster, Cluster),
    from: Database,
    /// As the administrator.
    admin: Database,
    to: Database,
}

impl Plain {
    async fn new((source, target): (u16, u16)) -> Self {
        let clusters = (Cluster::start(source).await, Cluster::start(target).await);
        let (from, admin) = (clusters.0.create_database("app").await, clusters.1.create_database("app").await);
        admin
            .execute(&format!(
                "create role plain login password '{PASSWORD}'; grant create, temporary on database app to plain"
            ))
            .await;
        let to = admin.with_user("plain", PASSWORD);
        Self { _clusters: clusters, from, admin, to }
    }

    async fn check(&self) -> Report {
        check(&self.from, &self.to).await
    }

    /// Runs every statement of the findings that block.
    async fn mend(&self, report: &Report) {
        for finding in report.findings.iter().filter(|found| found.severity.as_str() == "blocking") {
            self.admin.execute(finding.fix.as_ref().unwrap()).await;
        }
    }
}

#[tokio::test]
async fn what_the_first_role_owns_must_find_that_role_on_the_target() {
    let stage = Plain::new(versions_under_test()).await;
    stage.from.execute("create table t (id int primary key)").await;

    // The tests' servers are made by `postgres`, which exists everywhere; a provider's role is no member of it.
    let report = stage.check().await;
    assert_eq!(
        codes(&report, "blocking"),
        ["not_member_of_owner", "target_schema_closed"],
        "{}",
        report.to_text(false)
    );
    assert_eq!(objects(&report, "not_member_of_owner"), ["postgres"]);

    // And where it has another name, it is missing.
    stage.admin.execute("create role chief superuser login password 'x'").await;
    let chief = stage.admin.with_user("chief", "x");
    chief.execute("alter role postgres rename to first").await;
    let report = stage.check().await;
    assert_eq!(objects(&report, "roles_missing"), ["postgres"], "{}", report.to_text(false));
    chief.execute(&fix(&report, "roles_missing")).await;
    let report = stage.check().await;
    assert_eq!(finding(&report, "roles_missing"), None);
    assert_eq!(finding(&report, "not_member_of_owner"), None, "the fix grants the role as well");
}

#[tokio::test]
async fn roles_that_are_named_almost_like_a_providers_are_asked_for() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        "create role neondb_owner; create role rds_app; create role idle;
         create table t (id int primary key); alter table t owner to neondb_owner; grant select on t to rds_app;
         create schema neon; create role rds_superuser; create table neon.theirs (id int); alter table neon.theirs owner to rds_superuser",
    )
    .await;

    let report = check(&from, &to).await;

    assert_eq!(objects(&report, "roles_missing"), ["neondb_owner", "rds_app"], "{}", report.to_text(false));
    assert_eq!(objects(&report, "provider_schemas"), ["neon.theirs"]);
}

#[tokio::test]
async fn a_membership_must_let_us_give_and_act() {
    for versions in [(15, 15), (16, 16)] {
        let stage = Plain::new(versions).await;
        stage.from.execute("create role boss; create table t (id int primary key); alter table t owner to boss").await;
        stage.admin.execute("create role boss; grant usage, create on schema public to boss, plain").await;
        let half = if versions.1 < 16 {
            "alter role plain noinherit; grant boss to plain"
        } else {
            "grant boss to plain with set false"
        };
        stage.admin.execute(half).await;

        let report = stage.check().await;
        assert_eq!(codes(&report, "blocking"), ["not_member_of_owner"], "{}", report.to_text(false));

        stage.mend(&report).await;
        let report = stage.check().await;
        assert_eq!(codes(&report, "blocking"), [""; 0], "{}", report.to_text(false));
    }
}

#[tokio::test]
async fn whoever_makes_or_gets_an_object_must_be_able_to_create_in_its_schema() {
    let stage = Plain::new((16, 17)).await;
    stage
        .from
        .execute(
            "create role boss; create schema early; create schema late authorization boss;
             create table t (id int primary key); alter table t owner to boss;
             create function early.f() returns int language sql as 'select 1'; alter function early.f owner to boss;
             create table late.t (id int primary key); alter table late.t owner to boss;
             alter schema early owner to boss",
        )
        .await;
    stage.admin.execute("create role boss; grant boss to plain; create schema early").await;

    let report = stage.check().await;

    assert_eq!(codes(&report, "blocking"), ["target_schema_closed"], "{}", report.to_text(false));
    assert_eq!(
        objects(&report, "target_schema_closed"),
        ["early for boss", "early for plain", "public for boss", "public for plain"]
    );
    stage.mend(&report).await;
    let report = stage.check().await;
    assert_eq!(codes(&report, "blocking"), [""; 0], "{}", report.to_text(false));
    assert_eq!(fix(&report, "target_schema_kept"), r#"ALTER SCHEMA "early" OWNER TO "boss";"#);

    stage.admin.execute(&fix(&report, "target_schema_kept")).await;
    let report = stage.check().await;
    assert_eq!(codes(&report, "warning"), [""; 0], "{}", report.to_text(false));
}

#[tokio::test]
async fn forced_row_level_security_must_not_apply_to_the_targets_role() {
    let stage = Plain::new(versions_under_test()).await;
    stage
        .from
        .execute(
            "create role boss; create table open (id int primary key); create table forced (id int primary key);
             alter table open enable row level security;
             alter table forced enable row level security; alter table forced force row level security;
             alter table open owner to boss; alter table forced owner to boss",
        )
        .await;
    stage.admin.execute("create role boss; grant boss to plain; grant create on schema public to boss, plain").await;

    let report = stage.check().await;

    assert_eq!(codes(&report, "blocking"), ["target_row_security"], "{}", report.to_text(false));
    assert_eq!(objects(&report, "target_row_security"), ["public.forced"]);
    stage.mend(&report).await;
    let report = stage.check().await;
    assert_eq!(codes(&report, "blocking"), [""; 0], "{}", report.to_text(false));
}

#[tokio::test]
async fn default_privileges_that_will_be_left_out_are_named() {
    let stage = Plain::new(versions_under_test()).await;
    stage
        .from
        .execute(
            "create role cloud_admin; create role neon_superuser; create role boss; create role reader;
             alter default privileges for role cloud_admin in schema public grant all on tables to neon_superuser;
             alter default privileges for role boss grant select on tables to reader",
        )
        .await;
    stage.admin.execute("create role boss; create role reader").await;

    let report = stage.check().await;

    assert_eq!(codes(&report, "blocking"), [""; 0], "{}", report.to_text(false));
    assert_eq!(
        objects(&report, "default_privileges_left_out"),
        ["default privileges for boss", "default privileges for cloud_admin in public"]
    );
    stage.admin.execute(&fix(&report, "default_privileges_left_out")).await;
    let report = stage.check().await;
    assert_eq!(objects(&report, "default_privileges_left_out"), ["default privileges for cloud_admin in public"]);
    stage.admin.execute(&fix(&report, "default_privileges_left_out")).await;
    assert_eq!(finding(&stage.check().await, "default_privileges_left_out"), None);
}

#[tokio::test]
async fn what_belongs_to_the_database_itself_is_printed_as_statements() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("My App").await);
    for database in [&from, &to] {
        database.execute("create role \"the app\"").await;
    }
    from.execute(
        r#"alter database app set search_path to "$user", app, public; alter database app set work_mem to '8MB';
           alter role "the app" in database app set statement_timeout to '5s';
           revoke connect on database app from public; grant connect on database app to "the app";
           comment on database app is 'it''s theirs'"#,
    )
    .await;

    let report = check(&from, &to).await;

    assert_eq!(codes(&report, "blocking"), [""; 0], "{}", report.to_text(false));
    assert_eq!(objects(&report, "database_properties"), ["settings", "grants", "comment"]);
    to.execute(&fix(&report, "database_properties")).await;
    let report = check(&from, &to).await;
    assert_eq!(finding(&report, "database_properties"), None, "{}", report.to_text(false));
    let path =
        "select setting from pg_db_role_setting, unnest(setconfig) s(setting) where setting like 'search_path=%'";
    assert_eq!(to.query_string(path).await, from.query_string(path).await);
}

#[tokio::test]
async fn partitioned_and_unlogged_tables_of_somebody_else_are_found_too() {
    let (source, target) = Cluster::pair().await;
    source.execute(&format!("create role plain login replication password '{PASSWORD}'")).await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        "grant create on database app to plain;
         create table root (id int primary key) partition by list (id);
         create table part partition of root for values in (1); alter table part owner to plain;
         create unlogged table cache (id int primary key)",
    )
    .await;

    let report = check(&from.with_user("plain", PASSWORD), &to).await;

    assert_eq!(objects(&report, "not_owner"), ["public.root", "public.cache"], "{}", report.to_text(false));
    assert_eq!(objects(&report, "no_lock_right"), ["public.cache", "public.root"]);
    assert_eq!(objects(&report, "no_select"), ["public.cache", "public.root"]);
}

#[tokio::test]
async fn connections_are_counted_though_they_are_somebody_elses() {
    let (one, two) = versions_under_test();
    let mut source = Cluster::builder(one).set("max_connections", "20").set("superuser_reserved_connections", "2");
    if one >= 16 {
        source = source.set("reserved_connections", "4");
    }
    let (source, target) = (source.start().await, Cluster::start(two).await);
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(&format!(
        "create role plain login replication password '{PASSWORD}'; grant create on database app to plain"
    ))
    .await;
    let plain = from.with_user("plain", PASSWORD);
    assert_eq!(finding(&check(&plain, &to).await, "few_connections"), None);

    let mut others = Vec::new();
    for _ in 0..12 {
        others.push(from.connect().await);
    }
    let report = check(&plain, &to).await;
    assert!(finding(&report, "few_connections").is_some(), "{}", report.to_text(false));
}

#[tokio::test]
async fn event_triggers_of_the_target_have_words_of_their_own() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    let trigger =
        "create schema audit; create function audit.f() returns event_trigger language plpgsql as 'begin end';
                   create event trigger \"On DDL\" on ddl_command_end execute function audit.f()";
    to.execute(trigger).await;

    let report = check(&from, &to).await;

    assert_eq!(finding(&report, "event_triggers"), None, "{}", report.to_text(false));
    assert_eq!(objects(&report, "target_event_triggers"), ["On DDL"]);
    to.execute(&fix(&report, "target_event_triggers")).await;
    assert_eq!(finding(&check(&from, &to).await, "target_event_triggers"), None);
}

#[tokio::test]
async fn a_table_with_a_virtual_column_is_told_to_get_a_key() {
    let (source, target) = (Cluster::start(18).await, Cluster::start(18).await);
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute("create table t (id int, twice int generated always as (id * 2) virtual); insert into t values (1); update t set id = 2")
        .await;
    counted_updates(&from, "t").await;

    let report = check(&from, &to).await;

    let statement = fix(&report, "no_replica_identity");
    assert!(statement.contains("ADD PRIMARY KEY (…);"), "{statement}");
    from.execute(&statement.replace('…', "id")).await;
    assert_eq!(codes(&check(&from, &to).await, "blocking"), [""; 0]);
}

#[tokio::test]
async fn the_fix_for_another_locale_makes_the_database_that_was_asked_for() {
    let source = Cluster::start(15).await;
    let target =
        Cluster::builder(18).initdb("--locale-provider=builtin").initdb("--builtin-locale=C.UTF-8").start().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);

    let report = check(&from, &to).await;
    let statements = fix(&report, "locale_differs");
    assert!(statements.contains("LOCALE_PROVIDER libc"), "{}", report.to_text(false));

    for statement in statements.lines() {
        target.execute(statement).await;
    }
    assert_eq!(finding(&check(&from, &to).await, "locale_differs"), None);
}

#[tokio::test]
async fn the_client_programs_are_named_or_asked_for() {
    let (source, target) = (Cluster::start(13).await, Cluster::start(13).await);
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    let report = check(&from, &to).await;
    let found = finding(&report, "client_programs").expect("the pair is named");
    assert!(found.what.starts_with("pg_dump and pg_restore 1"), "{}", found.what);
}

#[tokio::test]
async fn grants_on_the_servers_own_functions_ask_for_no_role_of_a_provider() {
    let stage = Plain::new(versions_under_test()).await;
    stage
        .from
        .execute("create role rds_superuser; create role reader; grant execute on function pg_stat_reset() to rds_superuser, reader")
        .await;

    let report = stage.check().await;
    assert_eq!(codes(&report, "blocking"), [""; 0], "{}", report.to_text(false));
    assert_eq!(objects(&report, "catalog_grants_left_out"), ["pg_catalog.pg_stat_reset() to reader"]);

    // Who may make them must have the roles.
    let report = check(&stage.from, &stage.admin).await;
    assert_eq!(objects(&report, "roles_missing"), ["rds_superuser", "reader"], "{}", report.to_text(false));
}
