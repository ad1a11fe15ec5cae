//! `follow.engine = "subscription"`: the target's own worker follows, and whatever happens to it, to us or to a server, every
//! change is applied once, and nothing of the subscription is left when it is over.

use crate::harness::{Cluster, Database, PATIENCE, Pgtandem, Running, Stop, assert_same, wait_until};

mod rights;

/// A table with a key, and one without, in which a change that is applied twice shows.
const TABLES: &str = "create table t (id int primary key, v text);
    create table log (line text);
    insert into t select i, 'old' from generate_series(1, 2000) i;
    insert into log select 'old ' || i from generate_series(1, 500) i";

/// The worker finds a row by comparing all of it, also where the move itself gives the table that identity.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_the_worker_cannot_compare_is_named_before_it_is_given_full() {
    let stage = Stage::of((16, 17)).await;
    stage.from.execute("create table bare (j json)").await;
    let warned = async |choice: &str| {
        let program = stage.program.clone().env("PGTANDEM_FOLLOW_WITHOUT_IDENTITY", choice);
        let checked = program.run(&["check", "--json"]).await;
        assert_eq!(checked.code, Some(0), "{checked}");
        checked.stdout
    };
    let said = warned("full").await;
    assert!(said.contains("full_identity_without_equality") && said.contains("public.bare"), "{said}");
    assert!(!warned("watch").await.contains("full_identity_without_equality"));
}

/// What of a move can be left on a server.
const LEFT: &str = "select 'subscription ' || subname from pg_subscription
    union all select 'origin ' || roname from pg_replication_origin
    union all select 'origin state' from pg_replication_origin_status
    union all select 'slot ' || slot_name from pg_replication_slots";

struct Stage {
    source: Cluster,
    target: Cluster,
    from: Database,
    to: Database,
    program: Pgtandem,
}

impl Stage {
    async fn of(versions: (u16, u16)) -> Self {
        let (source, target) = tokio::join!(Cluster::start(versions.0), Cluster::start(versions.1));
        let (from, to) = (source.create_database("app").await, target.create_database("app").await);
        from.execute(TABLES).await;
        let program = Pgtandem::new(&from, &to, "app").env("PGTANDEM_FOLLOW_ENGINE", "subscription");
        Self { source, target, from, to, program }
    }

    /// A few transactions of every kind.
    async fn change(&self, round: u32) {
        for sql in [
            "insert into t values (R * 10000, 'new'), (R * 10000 + 1, 'new'); update t set v = 'R' where id % 7 = 0",
            "insert into log select 'round R ' || i from generate_series(1, 50) i",
            "delete from t where id % 100 = R",
        ] {
            self.from.execute(&sql.replace('R', &round.to_string())).await;
        }
    }

    /// Waits until the target has a line that is written now.
    async fn arrives(&self) {
        let line = self.from.query_string("insert into log values ('mark ' || txid_current()) returning line").await;
        let there = format!("select count(*) from log where line = '{line}'");
        wait_until("a change arrives", PATIENCE, async || self.to.query_string(&there).await == "1").await;
    }

    /// Waits until the worker follows, and the daemon knows.
    async fn works(&self, daemon: &mut Running) {
        daemon.wait_for_log("the target's worker follows", PATIENCE).await;
        let worker = "select count(*) from pg_stat_subscription where subname = 'pgtandem_app' and pid is not null";
        wait_until("the worker runs", PATIENCE, async || {
            assert!(daemon.is_running(), "the daemon ended:\n{}", daemon.stderr());
            self.to.query_string(worker).await == "1"
        })
        .await;
        self.arrives().await;
    }

    async fn status(&self) -> String {
        self.program.run(&["status", "--json"]).await.stdout
    }

    async fn cut_over(&self, daemon: Running) {
        let done = self.program.spawn(&["cutover", "--timeout", "60s"]).wait(4 * PATIENCE).await;
        assert_eq!(done.code, Some(0), "{done}\n{}", daemon.stderr());
        let ended = daemon.wait(PATIENCE).await;
        assert_eq!(ended.code, Some(0), "{ended}");
    }

    async fn nothing_is_left(&self) {
        for cluster in [&self.source, &self.target] {
            assert_eq!(cluster.query_strings(LEFT).await, [""; 0]);
        }
    }

    async fn same(&self) {
        assert_same(&self.from, &self.to).await;
    }
}

/// A whole move whose daemon dies wherever it can: while it copies, just when the worker takes over, and while it watches.
async fn survives_every_death(versions: (u16, u16)) {
    let stage = Stage::of(versions).await;
    for (round, moment) in [
        (1, "entering phase copy"),
        (2, "entering phase catchup"),
        (3, "entering phase follow"),
        (4, "made on the target"),
    ] {
        let mut daemon = stage.program.spawn(&["run"]);
        daemon.wait_for_log(moment, PATIENCE).await;
        stage.change(round).await;
        daemon.kill();
    }
    let mut daemon = stage.program.spawn(&["run"]);
    stage.works(&mut daemon).await;
    stage.change(5).await;
    daemon.kill();
    // Given nobody who watches, the worker goes on.
    stage.change(6).await;
    stage.arrives().await;

    let mut daemon = stage.program.spawn(&["run"]);
    stage.works(&mut daemon).await;
    stage.change(7).await;
    stage.cut_over(daemon).await;

    stage.same().await;
    stage.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deaths_change_nothing_from_13_to_18() {
    survives_every_death((13, 18)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deaths_change_nothing_from_15_to_15() {
    survives_every_death((15, 15)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deaths_change_nothing_from_16_to_17() {
    survives_every_death((16, 17)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deaths_change_nothing_from_14_to_14() {
    survives_every_death((14, 14)).await;
}

/// A source that forgets on its crash what the slot had confirmed must not make the worker apply again.
#[tokio::test(flavor = "multi_thread")]
async fn restarts_and_crashes_of_either_server_change_nothing() {
    let mut stage = Stage::of((16, 17)).await;
    let mut daemon = stage.program.spawn(&["run"]);
    stage.works(&mut daemon).await;
    // Before the worker has applied anything since a checkpoint of the source.
    stage.source.crash().await;
    stage.source.start_again().await;
    stage.works(&mut daemon).await;
    stage.change(1).await;
    stage.target.crash().await;
    stage.target.start_again().await;
    stage.works(&mut daemon).await;
    stage.change(2).await;
    stage.target.stop(Stop::Fast).await;
    stage.change(3).await;
    stage.target.start_again().await;
    stage.source.restart().await;
    stage.works(&mut daemon).await;
    stage.cut_over(daemon).await;
    stage.same().await;
    stage.nothing_is_left().await;
}

/// The worker begins behind our progress even if the source has forgotten that it was confirmed.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_goes_back_at_the_take_over_doubles_nothing() {
    let mut stage = Stage::of((15, 18)).await;
    // Given a move that our stream followed for a while.
    let streaming = stage.program.clone().env("PGTANDEM_FOLLOW_ENGINE", "stream");
    let mut daemon = streaming.spawn(&["run"]);
    daemon.wait_for_log("entering phase follow", PATIENCE).await;
    stage.change(1).await;
    stage.arrives().await;
    daemon.terminate();
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));
    // Given a schema change on its way, which a worker could not carry.
    stage.from.execute("alter table log add column more int").await;
    stage.from.execute("insert into log values ('wider', 1)").await;
    // When the source crashes before it wrote the slot down, and the worker takes over,
    stage.source.crash().await;
    stage.source.start_again().await;
    let mut daemon = stage.program.spawn(&["run"]);
    stage.works(&mut daemon).await;
    // then no line of the table without a key is there twice.
    let captured = "select count(*) from pg_event_trigger where evtname like '%pgtandem%'";
    assert_eq!(stage.from.query_string(captured).await, "0");
    stage.change(2).await;
    stage.cut_over(daemon).await;
    stage.same().await;
}

/// Tables that came and went while our stream followed are in the stream only, and no worker could read that.
#[tokio::test(flavor = "multi_thread")]
async fn tables_that_are_still_in_the_stream_come_and_go_before_the_worker_takes_over() {
    let stage = Stage::of((16, 17)).await;
    stage.from.execute("create table goes (id int primary key); insert into goes values (1)").await;
    let streaming = stage.program.clone().env("PGTANDEM_FOLLOW_ENGINE", "stream");
    assert_eq!(streaming.run(&["run", "--until", "follow"]).await.code, Some(0));
    for change in [
        "create table comes (id int primary key, v text); insert into comes select i, 'v' from generate_series(1, 100) i",
        "update comes set v = 'x' where id < 10; create table filled as select id from comes; drop table goes",
        "alter table comes rename to came; insert into came values (1000, 'y')",
    ] {
        stage.from.execute(change).await;
    }
    stage.change(1).await;

    let mut daemon = stage.program.spawn(&["run"]);
    stage.works(&mut daemon).await;

    stage.from.execute("update came set v = 'z' where id = 1000").await;
    stage.cut_over(daemon).await;
    stage.same().await;
    stage.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_the_worker_is_shown_and_mended() {
    let stage = Stage::of((16, 17)).await;
    let mut daemon = stage.program.spawn(&["run"]);
    stage.works(&mut daemon).await;

    stage.to.execute("insert into t values (77777, 'by hand')").await;
    stage.from.execute("insert into t values (77777, 'from the source')").await;
    wait_until("the error is shown", PATIENCE, async || stage.status().await.contains("subscription_failing")).await;
    let shown = stage.status().await;
    assert!(shown.contains("\"ready\":false") && shown.contains("errors so far"), "{shown}");
    let refused = stage.program.run(&["cutover", "--timeout", "3s"]).await;
    assert_eq!(refused.code, Some(1), "{refused}");
    assert!(daemon.is_running(), "{}", daemon.stderr());

    stage.to.execute("delete from t where id = 77777").await;
    stage.arrives().await;
    wait_until("the error is overcome", PATIENCE, async || stage.status().await.contains("\"ready\":true")).await;
    assert_eq!(stage.to.query_string("select v from t where id = 77777").await, "from the source");
    stage.cut_over(daemon).await;
    stage.same().await;
}

/// Copying a table again ends the worker where it stands, also one that cannot go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_diverged_is_copied_again() {
    let stage = Stage::of((15, 18)).await;
    let mut daemon = stage.program.spawn(&["run"]);
    stage.works(&mut daemon).await;
    stage.to.execute("insert into t values (77777, 'by hand'); update t set v = 'by hand' where id = 3").await;
    stage.from.execute("insert into t values (77777, 'from the source')").await;
    stage.change(1).await;
    wait_until("the error is shown", PATIENCE, async || stage.status().await.contains("subscription_failing")).await;

    let copied = stage.program.run(&["resync", "t"]).await;

    assert_eq!(copied.code, Some(0), "{copied}\n{}", daemon.stderr());
    stage.works(&mut daemon).await;
    stage.cut_over(daemon).await;
    stage.same().await;
    stage.nothing_is_left().await;
}

/// From 18 on the target counts the rows that its worker does not find.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_the_worker_does_not_find_block_the_cutover() {
    let stage = Stage::of((16, 18)).await;
    let mut daemon = stage.program.spawn(&["run"]);
    stage.works(&mut daemon).await;
    stage.to.execute("delete from t where id = 5").await;
    stage.from.execute("update t set v = 'x' where id = 5").await;
    wait_until("it is shown", PATIENCE, async || stage.status().await.contains("subscription_missing_rows")).await;
    let refused = stage.program.run(&["cutover", "--timeout", "3s"]).await;
    assert_eq!(refused.code, Some(1), "{refused}");
}

/// What an earlier move left has another history.
#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_of_the_same_name_is_not_taken_for_ours() {
    let stage = Stage::of((16, 17)).await;
    stage
        .to
        .execute(
            "create subscription pgtandem_app connection 'host=nowhere' publication p
                 with (connect = false, create_slot = false, enabled = false, slot_name = none)",
        )
        .await;
    let refused = stage.program.run(&["run"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("subscription_exists"), "{refused}");
    stage.to.execute("drop subscription pgtandem_app").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cutover_that_fails_lets_the_worker_go_on_and_a_later_one_ends_it() {
    let stage = Stage::of((16, 17)).await;
    let fires = "create function fires() returns trigger language plpgsql as
        'begin insert into log values (''fired''); return null; end';
        create trigger fires after insert on t execute function fires(); alter table t enable always trigger fires";
    stage.from.execute(fires).await;
    let failing = stage.program.clone().env("PGTANDEM_CUTOVER_HOOK", r#"["false"]"#);
    let mut daemon = failing.spawn(&["run"]);
    stage.works(&mut daemon).await;
    stage.change(1).await;

    let refused = stage.program.run(&["cutover", "--timeout", "20s"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("hook"), "{refused}");
    stage.change(2).await;
    stage.works(&mut daemon).await;
    daemon.terminate();
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));

    let mut daemon = stage.program.spawn(&["run"]);
    stage.works(&mut daemon).await;
    stage.cut_over(daemon).await;
    stage.same().await;
    stage.nothing_is_left().await;
}

/// A death behind the closed gate: the subscription stands still, and the triggers are on.
#[tokio::test(flavor = "multi_thread")]
async fn a_death_in_the_middle_of_a_cutover_changes_nothing() {
    let stage = Stage::of((13, 15)).await;
    let hanging = stage.program.clone().env("PGTANDEM_CUTOVER_HOOK", r#"["sleep", "600"]"#);
    let mut daemon = hanging.spawn(&["run"]);
    stage.works(&mut daemon).await;
    let asking = stage.program.spawn(&["cutover", "--timeout", "60s"]);
    daemon.wait_for_log("cutover step switch: running", PATIENCE).await;
    daemon.kill();
    // What is decided is finished; the subscription goes then as well.
    let ended = stage.program.run(&["run"]).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    let told = asking.wait(PATIENCE).await;
    assert_eq!(told.code, Some(0), "{told}");
    stage.same().await;
    stage.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clean_in_the_middle_leaves_no_trace() {
    for (source, target) in [(13, 13), (16, 18)] {
        let stage = Stage::of((source, target)).await;
        let mut daemon = stage.program.spawn(&["run"]);
        stage.works(&mut daemon).await;
        daemon.kill();
        let cleaned = stage.program.run(&["clean", "--yes"]).await;
        assert_eq!(cleaned.code, Some(0), "{cleaned}");
        assert!(cleaned.stdout.contains("target: removed the subscription pgtandem_app"), "{cleaned}");
        stage.nothing_is_left().await;
        for side in [&stage.from, &stage.to] {
            let state = "select count(*) from pg_namespace where nspname = 'pgtandem'";
            assert_eq!(side.query_string(state).await, "0");
            assert_eq!(side.query_string("select count(*) from pg_publication").await, "0");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_can_be_changed_back_and_forth() {
    let stage = Stage::of((14, 16)).await;
    let streaming = stage.program.clone().env("PGTANDEM_FOLLOW_ENGINE", "stream");
    for round in 1..4 {
        let mut daemon = stage.program.spawn(&["run"]);
        stage.works(&mut daemon).await;
        stage.change(2 * round).await;
        // However much is on its way.
        daemon.kill();
        let mut daemon = streaming.spawn(&["run"]);
        daemon.wait_for_log("our own stream goes on", PATIENCE).await;
        stage.change(2 * round + 1).await;
        stage.arrives().await;
        daemon.kill();
        assert_eq!(stage.to.query_string("select count(*) from pg_subscription").await, "0");
    }
    let mut daemon = stage.program.spawn(&["run"]);
    stage.works(&mut daemon).await;
    stage.cut_over(daemon).await;
    stage.same().await;
    stage.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_table_is_taken_in() {
    let stage = Stage::of((16, 17)).await;
    let mut daemon = stage.program.spawn(&["run"]);
    stage.works(&mut daemon).await;
    let table = "create table arrives (id int primary key, v text)";
    stage.from.execute(&format!("{table}; insert into arrives select i, 'first' from generate_series(1, 100) i")).await;
    daemon.wait_for_log("table_added", PATIENCE).await;
    // Given that it is there on the target, while the worker still runs and passes over its changes,
    stage.to.execute(table).await;
    stage.from.execute("insert into arrives values (200, 'second'); update arrives set v = 'x' where id = 5").await;
    stage.change(1).await;

    daemon.wait_for_log("our own stream goes on", PATIENCE).await;
    stage.from.execute("insert into arrives values (300, 'third'); delete from arrives where id = 6").await;
    stage.works(&mut daemon).await;
    stage.from.execute("insert into arrives values (400, 'fourth')").await;
    stage.cut_over(daemon).await;

    stage.same().await;
    stage.nothing_is_left().await;
}

/// The address that is good for us may be none for the target.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_the_target_cannot_reach_is_named() {
    let stage = Stage::of((15, 18)).await;
    let lost = stage.program.clone().env("PGTANDEM_SOURCE_URL_FROM_TARGET", "postgresql://u:p4ss@127.0.0.1:1/app");
    let refused = lost.run(&["run"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("source_unreachable_from_target"), "{refused}");
    assert!(!refused.stderr.contains("p4ss"), "{refused}");
    // A move that began with the other engine meets it when the worker is to take over, and goes on once it is mended.
    let streaming = stage.program.clone().env("PGTANDEM_FOLLOW_ENGINE", "stream");
    assert_eq!(streaming.run(&["run", "--until", "follow"]).await.code, Some(0));
    let mut daemon = lost.spawn(&["run"]);
    daemon.wait_for_log("subscription_unreachable", PATIENCE).await;
    assert!(!daemon.kill().stderr.contains("p4ss"));
    let mut daemon = stage.program.spawn(&["run"]);
    stage.works(&mut daemon).await;
    stage.cut_over(daemon).await;
    stage.same().await;
}
