//! Tables that are made, dropped or changed beside the stream while a move follows: noticed, named, and never lost.

use serde_json::Value;

use crate::harness::{Cluster, Database, PATIENCE, Pgtandem, Running, assert_same, wait_until};

/// A move that follows.
struct Following {
    source: Database,
    target: Database,
    pgtandem: Pgtandem,
    daemon: Running,
    _clusters: (Cluster, Cluster),
}

impl Following {
    async fn new(schema: &str) -> Self {
        let clusters = Cluster::pair().await;
        let (source, target) = (clusters.0.create_database("app").await, clusters.1.create_database("app").await);
        source.execute(schema).await;
        let pgtandem = Pgtandem::new(&source, &target, "app");
        let mut daemon = pgtandem.spawn(&["run"]);
        daemon.wait_for_log("entering phase follow", PATIENCE).await;
        Self { source, target, pgtandem, daemon, _clusters: clusters }
    }

    /// What blocks the move, by code, with the message and the hint.
    async fn blockers(&self) -> Vec<(String, String)> {
        let status = self.pgtandem.run(&["status", "--json"]).await;
        let status: Value = serde_json::from_str(&status.stdout).expect("JSON");
        let found = status["blockers"].as_array().expect("blockers");
        found
            .iter()
            .map(|b| (b["code"].as_str().unwrap().to_owned(), format!("{} {}", b["message"], b["hint"])))
            .collect()
    }

    async fn wait_for_blocker(&self, code: &str, text: &str) {
        wait_until(&format!("{code} with {text}"), PATIENCE, async || {
            self.blockers().await.iter().any(|(found, words)| found == code && words.contains(text))
        })
        .await;
    }

    async fn wait_until_nothing_blocks(&self) {
        wait_until("nothing blocks", PATIENCE, async || self.blockers().await.is_empty()).await;
    }

    async fn cutover_is_refused(&mut self, reason: &str) {
        let done = self.pgtandem.run(&["cutover", "--timeout", "3s"]).await;
        assert_eq!(done.code, Some(1), "{done}");
        assert!(done.stderr.contains(reason), "not because of {reason:?}: {done}");
        assert!(self.daemon.is_running(), "{}", self.daemon.stderr());
    }

    async fn cut_over(self) {
        let done = self.pgtandem.run(&["cutover", "--timeout", "60s"]).await;
        assert_eq!(done.code, Some(0), "{done}\n{}", self.daemon.stderr());
        let ended = self.daemon.wait(PATIENCE).await;
        assert_eq!(ended.code, Some(0), "{ended}");
        assert_same(&self.source, &self.target).await;
    }
}

#[tokio::test]
async fn a_new_table_refuses_the_cutover_by_name() {
    let mut moving =
        Following::new("create table kept (id int primary key); create table old (id int primary key)").await;
    moving.source.execute("create table late (id int primary key); insert into late values (1)").await;
    moving.wait_for_blocker("table_new", "public.late").await;
    moving.cutover_is_refused("public.late").await;
    // Dropped again, it is in nobody's way; a dropped one that the target still has is.
    moving.source.execute("drop table late; drop table old").await;
    moving.wait_for_blocker("table_dropped", "public.old").await;
    moving.target.execute("drop table old").await;
    // Made anew under the name of a known one, it is new all the same.
    moving.source.execute("drop table kept; create table kept (id int primary key)").await;
    moving.wait_for_blocker("table_new", "public.kept").await;
    moving.cutover_is_refused("public.kept").await;
}

#[tokio::test]
async fn a_partition_made_on_both_sides_is_carried() {
    let schema = "create table parts (id int primary key, v text) partition by range (id);
                  create table parts_0 partition of parts for values from (0) to (10);
                  insert into parts values (1, 'first')";
    let mut moving = Following::new(schema).await;
    let made = "create table parts_1 partition of parts for values from (10) to (20)";
    moving.source.execute(made).await;
    // Missing on the target: the statement is in the hint, and does what it says.
    moving.wait_for_blocker("partition_new", "FOR VALUES FROM (10) TO (20)").await;
    moving.cutover_is_refused("public.parts_1").await;
    moving.target.execute(made).await;
    moving.wait_until_nothing_blocks().await;
    moving.source.execute("insert into parts values (11, 'second'); update parts set v = 'third' where id = 11").await;
    // One that had rows before it was attached is not carried whole.
    let attached = "create table parts_2 (id int primary key, v text);
                    insert into parts_2 values (21, 'before');
                    alter table parts attach partition parts_2 for values from (20) to (30)";
    moving.target.execute("create table parts_2 partition of parts for values from (20) to (30)").await;
    moving.source.execute(attached).await;
    moving.wait_for_blocker("partition_attached", "public.parts_2").await;
    moving.source.execute("drop table parts_2").await;
    moving.target.execute("drop table parts_2").await;
    moving.wait_until_nothing_blocks().await;
    moving.cut_over().await;
}

#[tokio::test]
async fn an_update_without_an_identity_refuses_the_cutover_and_a_false_alarm_does_not() {
    let mut moving = Following::new("create table log (v text); insert into log values ('a'), ('b')").await;
    // A rolled-back update counts, but both sides are the same.
    moving.source.execute("begin; update log set v = 'x'; rollback; insert into log values ('c')").await;
    let again = "is the same on both sides after all";
    moving.daemon.wait_for_log(again, PATIENCE).await;
    moving.wait_until_nothing_blocks().await;
    moving.source.execute("update log set v = 'x' where v = 'a'").await;
    moving.cutover_is_refused("public.log").await;
    moving.wait_for_blocker("unkeyed_changed", "public.log").await;
    assert!(moving.daemon.is_running());
    moving.target.execute("update log set v = 'x' where v = 'a'").await;
    moving.wait_until_nothing_blocks().await;
    moving.cut_over().await;
}
