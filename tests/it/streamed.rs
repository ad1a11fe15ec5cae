//! Large transactions come while they are in progress, and arrive as if they had come when they committed.

use crate::differential::case::following;
use crate::followed::get;
use crate::harness::{Cluster, Database, PATIENCE, Pgtandem, Running, assert_same, differences, wait_until};

const CONTENT: &str = "
    create table t (id int primary key, v text);
    create table other (id int primary key, v text);
    create table log (line text);
    insert into t select i, 'old' from generate_series(1, 100) i";

/// A source that sends whatever it can while it is in progress, a target, and a move between them.
pub struct Sides {
    source: Cluster,
    _target: Cluster,
    pub from: Database,
    pub to: Database,
    pub pgtandem: Pgtandem,
}

impl Sides {
    pub async fn of(source: u16, target: u16) -> Self {
        let source =
            Cluster::builder(source).set("logical_decoding_work_mem", "64kB").set("max_prepared_transactions", "10");
        let (source, target) = tokio::join!(source.start(), Cluster::start(target));
        let (from, to) = (source.create_database("app").await, target.create_database("app").await);
        from.execute(CONTENT).await;
        let pgtandem = Pgtandem::new(&from, &to, "app").env("PGTANDEM_HTTP_LISTEN", "127.0.0.1:0");
        Self { source, _target: target, from, to, pgtandem }
    }

    pub async fn follow(&self) -> Running {
        let mut daemon = self.pgtandem.spawn(&["run"]);
        following(&mut daemon, PATIENCE).await;
        daemon
    }

    /// A session on the source with a transaction of many rows, which are on their way to the daemon.
    pub async fn large(&self, first: u32, count: u32) -> tokio_postgres::Client {
        let session = self.from.connect().await;
        run(&session, "begin").await;
        run(&session, &rows(first, count)).await;
        session
    }

    pub async fn arrives(&self) {
        wait_until("both sides hold the same", 2 * PATIENCE, async || {
            differences(&self.from, &self.to).await.is_empty()
        })
        .await;
    }

    /// How many transactions the source began to send while they were in progress; 13 cannot.
    async fn sent_in_progress(&self) -> u64 {
        if self.source.version() < 14 {
            return 0;
        }
        self.from.query_string("select sum(stream_txns) from pg_stat_replication_slots").await.parse().unwrap()
    }

    async fn wait_for_sent_in_progress(&self, most: u64) {
        if self.source.version() >= 14 {
            wait_until("the source sends what is in progress", PATIENCE, async || self.sent_in_progress().await > most)
                .await;
        }
    }

    pub async fn ends(self, daemon: Running) {
        assert_same(&self.from, &self.to).await;
        daemon.terminate();
        let ended = daemon.wait(PATIENCE).await;
        assert_eq!(ended.code, Some(0), "{ended}");
        assert!(!ended.stderr.contains(" ERROR "), "{ended}");
    }
}

pub fn rows(first: u32, count: u32) -> String {
    format!("insert into t select i, repeat('x', 300) || i from generate_series({first}, {}) i", first + count - 1)
}

pub async fn run(session: &tokio_postgres::Client, sql: &str) {
    session.batch_execute(sql).await.unwrap_or_else(|error| panic!("{error:?} in {sql}"));
}

/// Transactions of every kind, in each other's way.
async fn every_kind_arrives(source: u16, target: u16) {
    let sides = Sides::of(source, target).await;
    let daemon = sides.follow().await;

    // Two that overlap, with small ones between, and the second commits first.
    let (a, b) = (sides.large(10_000, 3000).await, sides.large(20_000, 3000).await);
    sides.from.execute("insert into log values ('between'); update t set v = 'small' where id = 1").await;
    run(
        &a,
        "update t set v = v || 'a' where id >= 10000 and id < 11000; delete from t where id between 10500 and 10600",
    )
    .await;
    run(
        &b,
        "update t set v = v || 'b' where id >= 20000 and id < 21000; truncate other; insert into other values (1, 'b')",
    )
    .await;

    // Savepoints: rolled back, released, within each other.
    run(&a, "savepoint s").await;
    run(&a, &rows(13_000, 1000)).await;
    run(&a, "savepoint inner_one").await;
    run(&a, &rows(14_000, 1000)).await;
    run(&a, "release inner_one; rollback to s").await;
    run(&a, "savepoint kept").await;
    run(&a, &rows(13_500, 1000)).await;
    run(&a, "release kept").await;
    run(&b, "commit").await;
    sides.from.execute("update t set v = v || 'after b' where id = 20500").await;
    run(&a, "commit").await;

    // One that is rolled back, and one that is prepared, and committed after others.
    let c = sides.large(30_000, 3000).await;
    let d = sides.large(40_000, 3000).await;
    run(&c, "update t set v = 'never'").await;
    run(&d, "insert into log values ('prepared'); prepare transaction 'd'").await;
    run(&c, "rollback").await;
    sides.from.execute("insert into log values ('while prepared')").await;
    sides.from.execute("commit prepared 'd'").await;
    sides.from.execute("begin; insert into t select i, 'v' from generate_series(50000, 52000) i; delete from t where id > 51000; commit").await;

    sides.arrives().await;
    sides.wait_for_sent_in_progress(3).await;
    sides.ends(daemon).await;
}

#[tokio::test]
async fn every_kind_arrives_from_13() {
    every_kind_arrives(13, 16).await;
}

#[tokio::test]
async fn every_kind_arrives_from_14() {
    every_kind_arrives(14, 15).await;
}

#[tokio::test]
async fn every_kind_arrives_from_15() {
    every_kind_arrives(15, 18).await;
}

#[tokio::test]
async fn every_kind_arrives_from_16() {
    every_kind_arrives(16, 16).await;
}

#[tokio::test]
async fn every_kind_arrives_from_18() {
    every_kind_arrives(18, 18).await;
}

/// A schema change counts in its transaction alone, and behind a savepoint that is rolled back not at all.
async fn shapes_stay_in_their_order(source: u16, target: u16) {
    let sides = Sides::of(source, target).await;
    let daemon = sides.follow().await;

    let a = sides.large(10_000, 2000).await;
    run(&a, "savepoint s; alter table t add column never int; insert into t select i, 'never', i from generate_series(12000, 14000) i")
        .await;
    run(&a, "rollback to s").await;
    run(&a, &rows(14_000, 2000)).await;
    run(&a, "alter table log add column w int; insert into log select i, i from generate_series(1, 2000) i").await;
    run(&a, &rows(16_000, 2000)).await;
    run(&a, "commit").await;
    sides.from.execute("insert into t values (1000, 'later'); insert into log values ('later', 7)").await;
    sides.arrives().await;

    // With the savepoint the lock is gone, and another one alters the table before the first commits.
    let b = sides.large(20_000, 2000).await;
    run(&b, "savepoint s; insert into other select i, 'never' from generate_series(1, 3000) i").await;
    sides.wait_for_sent_in_progress(1).await;
    run(&b, "rollback to s").await;
    sides.from.execute("alter table other add column more text; insert into other values (5000, 'v', 'more')").await;
    run(&b, "insert into log values ('the last of b'); commit").await;
    sides.from.execute("insert into other values (5001, 'v', 'still more')").await;

    sides.arrives().await;
    sides.wait_for_sent_in_progress(1).await;
    assert!(!daemon.stderr().contains("keeps large transactions itself"), "{}", daemon.stderr());
    sides.ends(daemon).await;
}

/// The same rows of the catalog are changed again, after a change of them was rolled back: the source, where it decodes the rows between
/// the two, finds none of them.
async fn what_the_source_cannot_decode_in_progress_arrives(source: u16, target: u16) {
    let sides = Sides::of(source, target).await;
    let daemon = sides.follow().await;
    // The catalog is read when all of it has happened.
    daemon.kill();
    let a = sides.large(10_000, 2000).await;
    run(&a, "savepoint s; alter table t add column never int; insert into t select i, 'never', i from generate_series(12000, 14000) i")
        .await;
    run(&a, "rollback to s").await;
    run(&a, &rows(14_000, 2000)).await;
    run(&a, "alter table t add column w int; insert into t select i, 'w', i from generate_series(16000, 18000) i")
        .await;
    run(&a, "commit").await;
    sides.from.execute("insert into t values (1000, 'later', 7)").await;

    let mut daemon = sides.follow().await;

    daemon.wait_for_log("code=\"streaming_failed\"", PATIENCE).await;
    sides.arrives().await;
    sides.wait_for_sent_in_progress(0).await;
    sides.ends(daemon).await;
}

#[tokio::test]
async fn what_the_source_cannot_decode_in_progress_arrives_from_14() {
    what_the_source_cannot_decode_in_progress_arrives(14, 16).await;
}

#[tokio::test]
async fn what_the_source_cannot_decode_in_progress_arrives_from_18() {
    what_the_source_cannot_decode_in_progress_arrives(18, 18).await;
}

#[tokio::test]
async fn shapes_stay_in_their_order_from_14() {
    shapes_stay_in_their_order(14, 16).await;
}

#[tokio::test]
async fn shapes_stay_in_their_order_from_18() {
    shapes_stay_in_their_order(18, 18).await;
}

/// What was here of a transaction in progress comes again from its beginning.
#[tokio::test]
async fn a_death_in_the_middle_loses_and_doubles_nothing() {
    let sides = Sides::of(16, 18).await;
    let daemon = sides.follow().await;
    let (a, b) = (sides.large(10_000, 5000).await, sides.large(20_000, 5000).await);
    sides.wait_for_sent_in_progress(1).await;
    daemon.kill();
    run(&a, "update t set v = v || 'a' where id >= 10000 and id < 12000").await;
    let daemon = sides.follow().await;
    sides.from.execute("insert into log values ('progress goes on meanwhile')").await;
    sides.arrives_in("log").await;
    run(&a, "commit").await;
    sides.arrives_in("t").await;
    daemon.kill();

    let daemon = sides.follow().await;
    run(&b, "savepoint s; update t set v = 'never'; rollback to s; commit").await;
    sides.arrives().await;
    sides.ends(daemon).await;
}

/// What does not fit in memory goes to a file without a name, and comes back from there.
#[tokio::test]
async fn what_does_not_fit_in_memory_goes_to_a_file() {
    let sides = Sides::of(15, 16).await;
    let folder = tempfile::tempdir().unwrap();
    let with_folder = sides.pgtandem.clone().env("TMPDIR", folder.path());
    let mut daemon = with_folder.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;

    let a = sides.large(100_000, 60_000).await;
    let b = sides.large(200_000, 100_000).await;
    run(&a, "savepoint s; update t set v = 'never' where id >= 100000 and id < 120000; rollback to s").await;
    wait_until("it is in a file", PATIENCE, async || spilled(&daemon).await > 10e6).await;
    let named =
        std::fs::read_dir(folder.path()).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_file()).count();
    assert_eq!(named, 0, "a death would leave it behind");
    run(&b, "commit").await;
    run(&a, "commit").await;

    sides.arrives().await;
    wait_until("the file is gone", PATIENCE, async || spilled(&daemon).await == 0.0).await;
    assert!(!daemon.stderr().contains("spill_failed"), "{}", daemon.stderr());
    sides.ends(daemon).await;
}

/// The source is asked to keep what does not fit here.
#[tokio::test]
async fn what_does_not_fit_at_all_stays_on_the_source_until_it_commits() {
    for (name, value) in [("PGTANDEM_FOLLOW_SPILL_MAX_BYTES", "1MiB"), ("TMPDIR", "/nowhere/at/all")] {
        let mut sides = Sides::of(14, 18).await;
        // The copy needs the folder too.
        let copied = sides.pgtandem.run(&["run", "--until", "follow"]).await;
        assert_eq!(copied.code, Some(0), "{copied}");
        sides.pgtandem = sides.pgtandem.clone().env(name, value);
        let mut daemon = sides.follow().await;

        let a = sides.large(100_000, 60_000).await;
        let b = sides.large(300_000, 120_000).await;
        daemon.wait_for_log("the source keeps large transactions itself", PATIENCE).await;
        run(&b, "commit").await;
        sides.from.execute("insert into log values ('between')").await;
        let between = "select count(*) from log where log::text like '%between%'";
        wait_until("what came between is there", PATIENCE, async || sides.to.query_string(between).await == "1").await;
        // The source counts what it sent a moment later; by now it has.
        wait_until("the source has counted", PATIENCE, async || sides.sent_in_progress().await > 0).await;
        let sent = sides.sent_in_progress().await;
        run(&a, &rows(200_000, 1000)).await;
        run(&a, "commit").await;

        sides.arrives().await;
        let log = daemon.stderr();
        assert_eq!(log.matches("the source keeps large transactions itself").count(), 1, "{log}");
        assert!(sent > 0 && sides.sent_in_progress().await == sent, "{log}");
        sides.ends(daemon).await;
    }
}

#[tokio::test]
async fn a_source_is_not_asked_where_nothing_may_be_kept() {
    let mut sides = Sides::of(16, 16).await;
    sides.pgtandem = sides.pgtandem.clone().env("PGTANDEM_FOLLOW_SPILL_MAX_BYTES", "0");
    let daemon = sides.follow().await;
    let a = sides.large(10_000, 5000).await;
    run(&a, "commit").await;
    sides.arrives().await;
    assert_eq!(sides.sent_in_progress().await, 0);
    sides.ends(daemon).await;
}

/// A stop does not wait for a large transaction that is on its way to the target.
#[tokio::test]
async fn a_stop_in_the_middle_of_a_large_transaction_is_soon_done() {
    let sides = Sides::of(18, 18).await;
    let daemon = sides.follow().await;
    let holder = sides.to.connect().await;
    let sessions = "select count(*) from pg_stat_activity where application_name = 'pgtandem app apply'";
    wait_until("the session that applies stands", PATIENCE, async || sides.to.query_string(sessions).await == "1")
        .await;
    run(&holder, "begin; lock table t").await;
    let a = sides.large(100_000, 150_000).await;
    run(&a, "commit").await;
    wait_until("it waits for the lock", PATIENCE, async || {
        sides.to.query_string(&format!("{sessions} and wait_event_type = 'Lock'")).await == "1"
    })
    .await;
    daemon.terminate();
    let ended = daemon.wait(PATIENCE / 4).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    run(&holder, "rollback").await;

    let daemon = sides.follow().await;
    sides.arrives().await;
    sides.ends(daemon).await;
}

impl Sides {
    pub async fn arrives_in(&self, table: &str) {
        let count = format!("select count(*) from {table}");
        let there = self.from.query_string(&count).await;
        wait_until("the rows arrive", PATIENCE, async || self.to.query_string(&count).await == there).await;
    }
}

/// Bytes in files, as the daemon's metrics say.
async fn spilled(daemon: &Running) -> f64 {
    let metrics = get(daemon, "/metrics").await;
    let line = metrics.lines().find(|line| line.starts_with("pgtandem_queue_bytes{queue=\"spill\"}"));
    line.and_then(|line| line.rsplit(' ').next()).and_then(|value| value.parse().ok()).unwrap_or(0.0)
}
