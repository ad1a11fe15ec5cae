//! What the engine needs of a role that is no superuser, and that nobody gets to see the password of the connection.

use std::time::Duration;

use super::{Stage, TABLES};
use crate::harness::{Cluster, PASSWORD, PATIENCE, Pgtandem};

/// Roles that own their database and nothing more do the moving, with what this engine asks for beyond that.
async fn roles_without_a_superuser(stage: &Stage) -> Pgtandem {
    for cluster in [&stage.source, &stage.target] {
        cluster.execute(&format!("create role app login replication bypassrls password '{PASSWORD}'")).await;
        cluster.execute("alter database app owner to app").await;
        cluster.database("app").execute("grant all on schema public to app").await;
    }
    stage.from.execute("alter table t owner to app; alter table log owner to app").await;
    let (from, to) = (stage.from.with_user("app", PASSWORD), stage.to.with_user("app", PASSWORD));
    Pgtandem::new(&from, &to, "app").env("PGTANDEM_FOLLOW_ENGINE", "subscription")
}

/// With what the engine asks for by name.
const RIGHTS: &str = "grant execute on function pg_replication_origin_advance(text, pg_lsn),
    pg_replication_origin_progress(text, boolean) to app";

/// What a role without the rights of a superuser needs, and that each of them is asked for by name.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_needs_certain_rights() {
    let stage = Stage::of((16, 17)).await;
    let program = roles_without_a_superuser(&stage).await;

    let refused = program.run(&["run"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("no_subscription_right"), "{refused}");
    stage.target.execute("grant pg_create_subscription to app").await;
    let refused = program.run(&["run"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("no_origin_right"), "{refused}");
    stage.to.execute(RIGHTS).await;
    stage.target.execute("revoke temporary on database app from public, app").await;
    let refused = program.run(&["run"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("no_temporary_right"), "{refused}");
    stage.target.execute("grant temporary on database app to app").await;
    let mut daemon = program.spawn(&["run"]);
    stage.works(&mut daemon).await;
    stage.change(1).await;
    let done = program.spawn(&["cutover", "--timeout", "60s"]).wait(4 * PATIENCE).await;
    assert_eq!(done.code, Some(0), "{done}\n{}", daemon.stderr());
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));
    stage.same().await;
    stage.nothing_is_left().await;
}

/// Each start asks whether there is a subscription; 13 keeps its number from roles that are no superuser.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_can_have_no_subscription_moves_by_our_stream() {
    let stage = Stage::of((13, 13)).await;
    for cluster in [&stage.source, &stage.target] {
        cluster.execute(&format!("create role app login replication bypassrls password '{PASSWORD}'")).await;
        cluster.execute("alter database app owner to app").await;
    }
    stage.from.execute("alter table t owner to app; alter table log owner to app").await;
    let (from, to) = (stage.from.with_user("app", PASSWORD), stage.to.with_user("app", PASSWORD));
    let program = Pgtandem::new(&from, &to, "app");
    let refused = program.clone().env("PGTANDEM_FOLLOW_ENGINE", "subscription").run(&["run"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("no_subscription_right"), "{refused}");
    let done = program.run(&["run", "--cutover-when-ready"]).await;
    assert_eq!(done.code, Some(0), "{done}");
    stage.same().await;
    let cleaned = program.run(&["clean", "--yes"]).await;
    assert_eq!(cleaned.code, Some(0), "{cleaned}");
}

/// The target logs every statement with its parameters, and the role may change nothing about that.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_logs_everything_does_not_log_the_password() {
    let source = Cluster::start(16).await;
    let target = Cluster::builder(17)
        .set("log_statement", "all")
        .set("log_min_duration_statement", "0")
        .set("log_parameter_max_length_on_error", "-1")
        .start()
        .await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(TABLES).await;
    let stage = Stage { program: Pgtandem::new(&from, &to, "app"), source, target, from, to };
    let program = roles_without_a_superuser(&stage).await;
    stage.target.execute("grant pg_create_subscription to app").await;
    stage.to.execute(RIGHTS).await;
    let checked = program.run(&["check"]).await;
    assert!(checked.code == Some(0) && checked.stdout.contains("subscription_log_may_tell"), "{checked}");

    // When it is made, in vain at first, and set going again by the next start,
    let lost = program.clone().env("PGTANDEM_SOURCE_URL_FROM_TARGET", "postgresql://u:p4ss@127.0.0.1:1/app");
    let mut daemon = lost.spawn(&["run"]);
    daemon.wait_for_log("subscription_unreachable", PATIENCE).await;
    daemon.kill();
    for _ in 0..2 {
        let mut daemon = program.spawn(&["run"]);
        stage.works(&mut daemon).await;
        daemon.kill();
    }
    // then nothing of it is told.
    let log = stage.target.log();
    assert!(
        log.contains("ALTER SUBSCRIPTION") && log.contains("arameters: $1"),
        "the log holds statements with parameters"
    );
    for secret in [PASSWORD, &PASSWORD.replace(' ', "%20"), "p4ss"] {
        // The harness itself, as a superuser, said a password when it made the role.
        let told = log.lines().find(|line| line.contains(secret) && !line.contains("create role"));
        assert_eq!(told, None);
    }

    // What would tell for certain is refused, at a start as by `check`, until the role may switch it off.
    stage.target.execute("alter role app set log_min_messages = debug1").await;
    for command in ["check", "run"] {
        let refused = program.run(&[command]).await;
        assert!(refused.code != Some(0), "{refused}");
        let said = format!("{}{}", refused.stdout, refused.stderr);
        assert!(said.contains("subscription_log_tells") && said.contains("log_min_messages = debug1"), "{refused}");
    }
    stage.target.execute("grant set on parameter log_min_messages, log_error_verbosity to app").await;
    let checked = program.run(&["check"]).await;
    assert!(checked.code == Some(0) && !checked.stdout.contains("subscription_log"), "{checked}");
    let mut daemon = program.spawn(&["run"]);
    stage.works(&mut daemon).await;
    assert!(!stage.target.log().lines().any(|line| line.contains("p4ss")), "{}", daemon.stderr());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_password_is_nowhere_to_be_seen() {
    let source = Cluster::start(16).await;
    let target = Cluster::builder(17)
        .set("log_statement", "all")
        .set("log_min_duration_statement", "0")
        .set("log_min_messages", "info")
        .start()
        .await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(TABLES).await;
    let stage = Stage { program: Pgtandem::new(&from, &to, "app"), source, target, from, to };
    let program = stage
        .program
        .clone()
        .env("PGTANDEM_FOLLOW_ENGINE", "subscription")
        .env("PGTANDEM_LOG_LEVEL", "trace")
        .env("PGTANDEM_HTTP_LISTEN", "127.0.0.1:0");
    let mut daemon = program.spawn(&["run"]);
    stage.works(&mut daemon).await;
    let seen = stage.to.query_strings("select query from pg_stat_activity").await.join("\n");
    let status = program.run(&["status", "--json"]).await;
    let state = stage.to.query_strings("select to_jsonb(m)::text from pgtandem.move m").await.join("\n");
    let kept = stage.to.query_string("select subconninfo from pg_subscription").await;
    let encoded = PASSWORD.replace(' ', "%20");
    assert!(kept.contains(&encoded), "the server cannot connect without it");
    let log = stage.target.log();
    assert!(log.contains("CREATE SUBSCRIPTION"), "the log holds statements");
    for text in [&seen, &status.stdout, &status.stderr, &state, &daemon.stderr(), &log, &stage.source.log()] {
        for secret in [PASSWORD, &encoded] {
            let at = text.find(secret);
            assert!(at.is_none(), "{:?}", at.map(|at| &text[at.saturating_sub(300)..at]));
        }
    }
    daemon.terminate();
    let stopped = daemon.wait(Duration::from_secs(60)).await;
    assert_eq!(stopped.code, Some(0), "{stopped}");
}

/// Such an extension sees what a block executes, whoever executes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_counts_every_statement_does_not_keep_the_password() {
    let source = Cluster::start(16).await;
    let target = Cluster::builder(17)
        .set("shared_preload_libraries", "pg_stat_statements")
        .set("pg_stat_statements.track", "all")
        .start()
        .await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(TABLES).await;
    target.execute("create extension pg_stat_statements").await;
    let stage = Stage { program: Pgtandem::new(&from, &to, "app"), source, target, from, to };
    let program = roles_without_a_superuser(&stage).await;
    stage.target.execute("grant pg_create_subscription to app").await;
    stage.to.execute(RIGHTS).await;
    let refused = program.run(&["run"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("pg_stat_statements.track = all"), "{refused}");

    // A superuser switches it off for the transaction.
    let mut daemon = stage.program.clone().env("PGTANDEM_FOLLOW_ENGINE", "subscription").spawn(&["run"]);
    stage.works(&mut daemon).await;
    let counted = stage.target.query_strings("select query from pg_stat_statements").await;
    assert!(counted.iter().any(|query| query.contains("pg_subscription")), "statements are counted");
    for secret in [PASSWORD, &PASSWORD.replace(' ', "%20")] {
        let told = counted.iter().find(|query| query.contains(secret) && query.contains("SUBSCRIPTION"));
        assert_eq!(told, None);
    }
}
