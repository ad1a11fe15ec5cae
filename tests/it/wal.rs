//! The WAL that a source keeps while the copy runs, and when that is said to be a risk.

use std::time::Duration;

use crate::harness::{Cluster, PATIENCE, Pgtandem, versions_under_test, wait_until};

/// How often the daemon warned.
fn warnings(log: &str) -> usize {
    log.matches("the source gives up the slot pgtandem_app after").count()
}

#[tokio::test]
async fn a_copy_that_outlasts_the_kept_wal_is_warned_of_in_steps() {
    let (from, to) = versions_under_test();
    let source = Cluster::builder(from).set("max_slot_wal_keep_size", "160MB").start().await;
    let target = Cluster::start(to).await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute("create table account (id int primary key); insert into account values (1)").await;
    let pgtandem = Pgtandem::new(&from, &to, "app");
    // Given a copy that cannot end, for its table is locked on the target.
    let schema = pgtandem.clone().env("PGTANDEM_COPY_METHOD", "none").run(&["run"]).await;
    assert!(schema.stderr.contains("no_snapshot"), "{schema}");
    let blocker = to.connect().await;
    blocker.batch_execute("begin; lock table account in access exclusive mode").await.unwrap();
    let mut daemon = pgtandem.spawn(&["run", "--until", "follow"]);
    daemon.wait_for_log("took the first cut", PATIENCE).await;

    // When the source writes on, then each step is said once, with the time that is left.
    let safe = async || {
        let sql = "select coalesce(safe_wal_size, 0)::text from pg_replication_slots where slot_name = 'pgtandem_app'";
        from.query_string(sql).await.parse::<u64>().unwrap()
    };
    let write_until = async |left: u64| {
        wait_until("WAL to be written", PATIENCE, async || {
            from.execute("update account set id = id; select pg_switch_wal()").await;
            tokio::time::sleep(Duration::from_millis(500)).await;
            safe().await < left
        })
        .await;
    };
    assert_eq!(warnings(&daemon.stderr()), 0, "{}", daemon.stderr());
    write_until(80 << 20).await;
    daemon.wait_for_log("wal_running_out", PATIENCE).await;
    write_until(40 << 20).await;
    wait_until("the second step", PATIENCE, async || warnings(&daemon.stderr()) == 2).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let log = daemon.stderr();
    assert_eq!(warnings(&log), 2, "{log}");
    assert!(
        log.contains("max_slot_wal_keep_size is 160.0 MiB") && log.contains("at the present rate in about"),
        "{log}"
    );

    // And the status has it, as a warning that blocks nothing.
    let status = pgtandem.run(&["status", "--json"]).await;
    let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!(status["warnings"][0]["code"], "wal_running_out", "{status}");
    assert_eq!(status["blockers"], serde_json::json!([]), "{status}");
    let text = pgtandem.run(&["status"]).await;
    assert!(text.stdout.contains("warning (wal_running_out)"), "{text}");

    // When the copy can go on, then the move does.
    blocker.batch_execute("rollback").await.unwrap();
    let ended = daemon.wait(PATIENCE).await;
    assert_eq!(ended.code, Some(0), "{ended}");
}
