//! Tables without a replica identity: their inserts are carried, an update of them is noticed before the switch.

use crate::harness::{Cluster, PATIENCE, Pgtandem, assert_same};

#[tokio::test]
async fn an_update_without_an_identity_refuses_the_cutover_and_a_false_alarm_does_not() {
    let clusters = Cluster::pair().await;
    let (source, target) = (clusters.0.create_database("app").await, clusters.1.create_database("app").await);
    source.execute("create table log (v text); insert into log values ('a'), ('b')").await;
    let pgtandem = Pgtandem::new(&source, &target, "app");
    let mut daemon = pgtandem.spawn(&["run"]);
    daemon.wait_for_log("entering phase follow", PATIENCE).await;

    // A rolled-back update counts, but both sides are the same.
    source.execute("begin; update log set v = 'x'; rollback; insert into log values ('c')").await;
    daemon.wait_for_log("is the same on both sides after all", PATIENCE).await;

    source.execute("update log set v = 'x' where v = 'a'").await;
    let refused = pgtandem.run(&["cutover", "--timeout", "5s"]).await;
    assert_eq!(refused.code, Some(1), "{refused}");
    daemon.wait_for_log("public.log", PATIENCE).await;
    assert!(daemon.is_running(), "{}", daemon.stderr());

    target.execute("update log set v = 'x' where v = 'a'").await;
    let done = pgtandem.run(&["cutover", "--timeout", "60s"]).await;
    assert_eq!(done.code, Some(0), "{done}\n{}", daemon.stderr());
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));
    assert_same(&source, &target).await;
}
