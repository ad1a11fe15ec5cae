//! A large transaction is on the target before it commits on the source, and comes out the same where it cannot be.

use tokio_postgres::Client;

use crate::differential::case::cut_over;
use crate::harness::{PATIENCE, Running, assert_same, wait_until};
use crate::streamed::{Sides, rows, run};

/// Sessions that have written to a table and have not committed.
const WRITERS: &str = "
    select distinct l.pid from pg_locks l join pg_stat_activity a using (pid)
    where l.relation = 't'::regclass and l.mode = 'RowExclusiveLock' and a.application_name = 'pgtandem app apply'";

/// What the log says where a transaction is given up.
const GIVEN_UP: &str = "a transaction in progress is applied once it has committed";

impl Sides {
    async fn followed(source: u16, target: u16) -> (Self, Running) {
        let mut sides = Self::of(source, target).await;
        sides.pgtandem = sides.pgtandem.clone().env("PGTANDEM_LOG_LEVEL", "debug");
        let daemon = sides.follow().await;
        (sides, daemon)
    }

    /// How many sessions write; with `pg_terminate_backend(pid)` they end.
    async fn writers(&self, counted: &str) -> String {
        self.to.query_string(&format!("select count({counted}) from ({WRITERS}) w")).await
    }

    async fn is_applied_early(&self) {
        wait_until("it is applied early", PATIENCE, async || self.writers("pid").await == "1").await;
    }

    /// A transaction in progress of which something is on the target.
    async fn early(&self, first: u32, count: u32) -> Client {
        let session = self.large(first, count).await;
        self.is_applied_early().await;
        assert_eq!(self.to.query_string(&format!("select count(*) from t where id >= {first}")).await, "0");
        session
    }
}

#[tokio::test]
async fn a_large_transaction_is_applied_before_it_commits() {
    for (source, target) in [(14, 18), (18, 18)] {
        let (sides, daemon) = Sides::followed(source, target).await;
        let a = sides.early(10_000, 5000).await;
        // Others go on beside it, also with a row that it will touch.
        sides.from.execute("insert into log values ('beside it'); update t set v = 'beside' where id <= 50").await;
        sides.arrives_in("log").await;
        run(&a, "update t set v = v || ' and in it' where id between 40 and 60 or id between 11000 and 11999").await;
        run(&a, "delete from t where id between 12000 and 12500; create table is_new (id int)").await;
        run(&a, "insert into other select i, 'x' from generate_series(1, 3000) i").await;
        sides.from.execute("delete from t where id <= 30").await;
        run(&a, "commit").await;
        sides.from.execute("update t set v = v || ' after it' where id between 35 and 11100").await;
        sides.arrives().await;

        // The next one finds a connection that has been the other one, and knows what the last one announced.
        let b = sides.early(30_000, 5000).await;
        run(&b, "commit").await;
        sides.from.execute("insert into other values (4000, 'small')").await;
        sides.arrives().await;
        sides.ends(daemon).await;
    }
}

#[tokio::test]
async fn what_is_rolled_back_leaves_nothing() {
    let (sides, mut daemon) = Sides::followed(16, 17).await;
    let a = sides.early(10_000, 5000).await;
    run(&a, "rollback").await;
    daemon.wait_for_log("a part of it was rolled back", PATIENCE).await;

    // One that goes on without the part.
    let b = sides.early(20_000, 5000).await;
    run(&b, "savepoint s; update t set v = 'never'").await;
    run(&b, &rows(30_000, 3000)).await;
    run(&b, "rollback to s; update t set v = 'in the end' where id < 20").await;
    wait_until("it is given up", PATIENCE, async || sides.writers("pid").await == "0").await;
    // What the savepoint had locked is free again.
    sides.from.execute("update t set v = 'free' where id = 50").await;
    run(&b, "commit").await;
    sides.arrives().await;
    assert_eq!(daemon.stderr().matches(GIVEN_UP).count(), 2, "{}", daemon.stderr());
    sides.ends(daemon).await;
}

#[tokio::test]
async fn what_needs_the_lock_of_a_table_waits_for_the_commit() {
    let (sides, mut daemon) = Sides::followed(15, 17).await;
    let a = sides.early(10_000, 5000).await;
    run(&a, "truncate other; insert into other select i, 'a' from generate_series(1, 5000) i").await;
    daemon.wait_for_log("it empties a table", PATIENCE).await;
    run(&a, "commit").await;
    sides.arrives().await;

    let b = sides.early(20_000, 5000).await;
    sides.from.execute("create table another (id int primary key)").await;
    daemon.wait_for_log("a schema change comes before its end", PATIENCE).await;
    run(&b, "alter table t add column n int default 7").await;
    run(&b, "insert into t select i, 'b', i from generate_series(30000, 35000) i").await;
    run(&b, "commit").await;
    sides.arrives().await;

    // A schema change within it, and rows without a key.
    sides.from.execute("alter table log replica identity full").await;
    daemon.wait_for_log("the table is copied again", PATIENCE).await;
    sides.from.execute("insert into log values ('copied')").await;
    sides.arrives().await;
    let c = sides.early(40_000, 3000).await;
    run(&c, "insert into log select 'line ' || i % 10 from generate_series(1, 4000) i").await;
    run(&c, "delete from log where line = 'line 3'; update log set line = 'same'").await;
    daemon.wait_for_log("it changes rows that have no key", PATIENCE).await;
    run(&c, "commit").await;
    sides.arrives().await;
    sides.ends(daemon).await;
}

/// The target may have an index that the source has not.
#[tokio::test]
async fn nobody_waits_long_for_a_transaction_in_progress() {
    let (sides, mut daemon) = Sides::followed(15, 16).await;
    sides.to.execute("create unique index on t (right(v, 8))  where v like '%same%'").await;
    let a = sides.large(10_000, 3000).await;
    run(&a, "insert into t values (5000, 'the same')").await;
    run(&a, &rows(20_000, 3000)).await;
    sides.is_applied_early().await;
    wait_until("all of it is there", PATIENCE, async || {
        sides.to.query_string("select pg_relation_size('t') > 2000000").await == "t"
    })
    .await;
    sides.from.execute("insert into t values (5001, 'the same')").await;
    sides.from.execute("insert into log values ('behind it')").await;
    daemon.wait_for_log("others may be waiting for it", PATIENCE).await;
    sides.arrives_in("log").await;
    sides.from.execute("delete from t where id = 5001").await;
    run(&a, "commit").await;
    sides.arrives().await;
    sides.ends(daemon).await;
}

/// Its session is lost, or refuses a row: all of it comes again.
#[tokio::test]
async fn an_error_costs_nothing_but_time() {
    let (sides, mut daemon) = Sides::followed(14, 14).await;
    for round in 1..=4 {
        let first = round * 10_000;
        let a = if round < 4 { sides.early(first, 5000).await } else { sides.large(first, 5000).await };
        let killed = sides.writers("pg_terminate_backend(pid)").await;
        // After three errors no more is tried.
        assert_eq!(killed, if round < 4 { "1" } else { "0" });
        run(&a, &rows(first + 5000, 3000)).await;
        run(&a, "commit").await;
        sides.arrives().await;
    }
    daemon.wait_for_log(GIVEN_UP, PATIENCE).await;
    sides.ends(daemon).await;
}

#[tokio::test]
async fn a_cutover_meets_a_transaction_in_progress() {
    let (sides, daemon) = Sides::followed(16, 18).await;
    let a = sides.early(10_000, 5000).await;
    let pgtandem = sides.pgtandem.clone();
    let ((), ()) = tokio::join!(cut_over(&pgtandem, daemon), async {
        let waiting = "select count(*) from pg_locks where not granted and relation = 't'::regclass";
        wait_until("the fence waits for it", PATIENCE, async || sides.from.query_string(waiting).await != "0").await;
        run(&a, &rows(20_000, 1000)).await;
        run(&a, "commit").await;
    });
    assert_same(&sides.from, &sides.to).await;
}

/// A death while it is open, at its commit, and soon after.
#[tokio::test]
async fn a_death_around_the_commit_loses_and_doubles_nothing() {
    let (sides, mut daemon) = Sides::followed(15, 15).await;
    for round in 0..8u32 {
        let first = 10_000 * (round + 1);
        let a = sides.early(first, 4000).await;
        run(&a, "update t set v = v || '+' where id <= 100; insert into log values ('with it')").await;
        if round % 4 == 0 {
            daemon.kill();
            daemon = sides.follow().await;
        }
        run(&a, "commit").await;
        if round % 4 == 1 {
            daemon.kill();
            daemon = sides.follow().await;
        }
        if round % 4 == 2 {
            sides.arrives_in("log").await;
            daemon.kill();
            daemon = sides.follow().await;
        }
        sides.arrives().await;
    }
    sides.ends(daemon).await;
}

/// It is kept only in case that it is given up; then the source has it yet.
#[tokio::test]
async fn what_does_not_fit_here_is_applied_early_all_the_same() {
    let mut sides = Sides::of(16, 16).await;
    sides.pgtandem = sides.pgtandem.clone().env("PGTANDEM_FOLLOW_SPILL_MAX_BYTES", "1MiB");
    let mut daemon = sides.follow().await;
    let a = sides.early(1_000_000, 150_000).await;
    daemon.wait_for_log("there is no room to keep a transaction in progress", PATIENCE).await;
    sides.from.execute("insert into log values ('beside it')").await;
    run(&a, "commit").await;
    sides.arrives().await;
    assert!(!daemon.stderr().contains("the source keeps large transactions itself"), "{}", daemon.stderr());

    let b = sides.early(2_000_000, 150_000).await;
    wait_until("the second one is not kept", PATIENCE, async || {
        daemon.stderr().matches("there is no room to keep a transaction in progress").count() == 2
    })
    .await;
    run(&b, "savepoint s").await;
    run(&b, &rows(3_000_000, 5000)).await;
    run(&b, "rollback to s; commit").await;
    daemon.wait_for_log("the source keeps large transactions itself", PATIENCE).await;
    sides.arrives().await;
    sides.ends(daemon).await;
}

/// Whoever holds a lock of the target holds up what waits for it, and nothing else.
#[tokio::test]
async fn others_go_on_while_a_table_is_locked_on_the_target() {
    let (sides, mut daemon) = Sides::followed(15, 15).await;
    let holder = sides.to.connect().await;
    run(&holder, "begin; lock table t in share mode").await;
    let a = sides.large(10_000, 60_000).await;
    daemon.wait_for_log(GIVEN_UP, PATIENCE).await;
    sides.from.execute("insert into log values ('beside it')").await;
    sides.arrives_in("log").await;
    run(&holder, "rollback").await;
    run(&a, "commit").await;
    sides.arrives().await;
    sides.ends(daemon).await;
}
