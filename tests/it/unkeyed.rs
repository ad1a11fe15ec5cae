//! Tables without a replica identity: their inserts are carried, an update of them is noticed before the switch.

use crate::harness::{Cluster, Finished, PATIENCE, Pgtandem, assert_same, wait_until};

const CONTENT: &str = "create table log (v text); insert into log values ('a'), ('b')";

/// A cutover that is refused, with the code of the reason.
async fn refused(pgtandem: &Pgtandem) -> (Finished, String) {
    let refused = pgtandem.run(&["cutover", "--timeout", "5s", "--json"]).await;
    assert_eq!(refused.code, Some(1), "{refused}");
    let document: serde_json::Value =
        serde_json::from_str(&refused.stdout).unwrap_or_else(|e| panic!("{e}: {refused}"));
    let code = document["error"]["code"].as_str().unwrap_or_default().to_owned();
    (refused, code)
}

#[tokio::test]
async fn an_update_without_an_identity_refuses_the_cutover_and_a_false_alarm_does_not() {
    let clusters = Cluster::pair().await;
    let (source, target) = (clusters.0.create_database("app").await, clusters.1.create_database("app").await);
    source.execute(CONTENT).await;
    let pgtandem = Pgtandem::new(&source, &target, "app");
    let mut daemon = pgtandem.spawn(&["run"]);
    daemon.wait_for_log("entering phase follow", PATIENCE).await;

    // A rolled-back update counts, but both sides are the same.
    source.execute("begin; update log set v = 'x'; rollback; insert into log values ('c')").await;
    let taken_back = "is the same on both sides after all";
    daemon.wait_for_log(taken_back, PATIENCE).await;

    source.execute("update log set v = 'x' where v = 'a'").await;
    wait_until("the update blocks the move", PATIENCE, async || {
        assert!(daemon.is_running(), "{}", daemon.stderr());
        daemon.stderr().rsplit(taken_back).next().is_some_and(|since| since.contains("code=\"unkeyed_changed\""))
    })
    .await;
    let (refused, code) = refused(&pgtandem).await;
    assert!(code == "not_ready" && refused.stdout.contains("without a replica identity"), "{refused}");
    assert!(refused.stdout.contains("public.log"), "{refused}");

    target.execute("update log set v = 'x' where v = 'a'").await;
    let done = pgtandem.run(&["cutover", "--timeout", "60s"]).await;
    assert_eq!(done.code, Some(0), "{done}\n{}", daemon.stderr());
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));
    assert_same(&source, &target).await;
}

#[tokio::test]
async fn an_update_that_no_counter_saw_is_found_behind_the_fence() {
    let clusters = Cluster::pair().await;
    let (source, target) = (clusters.0.create_database("app").await, clusters.1.create_database("app").await);
    source.execute(CONTENT).await;
    let pgtandem = Pgtandem::new(&source, &target, "app");
    let mut daemon = pgtandem.spawn(&["run"]);
    daemon.wait_for_log("entering phase follow", PATIENCE).await;

    source.execute("set track_counts = off; update log set v = 'x' where v = 'a'").await;
    let (refused, code) = refused(&pgtandem).await;
    assert!(code == "unkeyed_changed" && refused.stdout.contains("public.log"), "{refused}");
    source.execute("insert into log values ('the fence is open again')").await;
    assert!(daemon.is_running(), "{}", daemon.stderr());
}
