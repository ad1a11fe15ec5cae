//! Several workers bring what one brings, wherever they die.

use tokio_postgres::Client;

use crate::differential::case::{cut_over, following};
use crate::harness::{Cluster, Database, PATIENCE, Pgtandem, Running, Stop, assert_same, differences, wait_until};

/// Tables that are split, one that cannot be, one that is too small, and one in which a row applied twice would be seen.
const TABLES: &str = "
    create table split (id int primary key, v text);
    create table named (schema_name text, name varchar(40), v int, primary key (schema_name, name));
    create table ranked (id int primary key, place int unique, v text);
    create table exact (id numeric primary key, v text);
    create table log (at int, what text);
    create table small (id int primary key, v text);
    insert into split select i, 'old' from generate_series(1, 500) i;
    insert into named select 's' || i % 7, 'n' || i, 0 from generate_series(1, 300) i;
    insert into ranked select i, i, 'old' from generate_series(1, 200) i;
    insert into exact select i, 'old' from generate_series(1, 100) i;
    insert into log select i, 'old' from generate_series(1, 50) i;
    insert into small values (1, 'old')";

/// One transaction that the workers share.
const CHANGES: &str = "begin;
    update split set v = v || '+' where id % 3 = 0; delete from split where id % 11 = 0;
    insert into split select i, 'new' from generate_series((select max(id) from split) + 1, (select max(id) from split) + 200) i;
    update named set v = v + 1;
    update ranked set place = -place; update ranked set place = (select count(*) from ranked) + 1 + place;
    update exact set v = v || '+'; delete from exact where id = 7.0; insert into exact values (7.00, 'again');
    insert into log select i, 'new' from generate_series(1, 40) i;
    update small set v = v || '+';
    commit";

const AHEAD: &str =
    "select count(*) from pgtandem.worker_progress w join pgtandem.progress p using (move) where w.lsn > p.lsn";

struct Move {
    source: Cluster,
    target: Cluster,
    from: Database,
    to: Database,
}

impl Move {
    async fn prepare() -> Self {
        let (source, target) = Cluster::pair().await;
        let (from, to) = (source.create_database("app").await, target.create_database("app").await);
        from.execute(TABLES).await;
        Self { source, target, from, to }
    }

    fn pgtandem(&self, workers: u16) -> Pgtandem {
        Pgtandem::new(&self.from, &self.to, "shared").env("PGTANDEM_FOLLOW_WORKERS", workers.to_string())
    }

    async fn arrives(&self) {
        wait_until("both sides hold the same", PATIENCE, async || differences(&self.from, &self.to).await.is_empty())
            .await;
    }

    /// Lets the workers commit their shares of a batch, and keeps the first worker from committing the batch, until the
    /// returned session ends its transaction.
    async fn stop_between_the_commits(&self) -> Client {
        let waiting = "select count(*) from pg_stat_activity
                       where wait_event_type = 'Lock' and application_name = 'pgtandem shared apply'";
        let (table, progress) = (self.to.connect().await, self.to.connect().await);
        table.batch_execute("begin; lock table split in exclusive mode").await.unwrap();
        self.from.execute(CHANGES).await;
        wait_until("the workers wait for the table", PATIENCE, async || to_number(&self.to, waiting).await >= 2).await;
        // From here on nothing but the batch goes on: progress of an idle source was written before, or comes later.
        progress.batch_execute("begin; select from pgtandem.progress for share").await.unwrap();
        table.batch_execute("rollback").await.unwrap();
        wait_until("the first worker waits, and the others are ahead of it", PATIENCE, async || {
            to_number(&self.to, AHEAD).await > 0 && to_number(&self.to, waiting).await == 1
        })
        .await;
        progress
    }

    /// The same, and the daemon is dead before the batch is committed.
    async fn die_between_the_commits(&self, daemon: Running) {
        let holder = self.stop_between_the_commits().await;
        daemon.kill();
        let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                   where application_name = 'pgtandem shared apply'";
        wait_until("its sessions are gone", PATIENCE, async || to_number(&self.to, end).await == 0).await;
        holder.batch_execute("rollback").await.unwrap();
        assert!(to_number(&self.to, AHEAD).await > 0, "the batch was completed");
    }
}

async fn to_number(database: &Database, sql: &str) -> u64 {
    database.query_string(sql).await.parse().expect("a number")
}

async fn ends(daemon: Running) {
    daemon.terminate();
    let ended = daemon.wait(PATIENCE).await;
    assert_eq!(ended.code, Some(0), "{ended}");
}

#[tokio::test]
async fn several_workers_share_a_batch_up_to_the_cutover() {
    let stage = Move::prepare().await;
    let pgtandem = stage.pgtandem(4);
    let mut daemon = pgtandem.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;

    for _ in 0..5 {
        stage.from.execute(CHANGES).await;
        stage.from.execute("truncate log; insert into split values (0, 'zero'); delete from split where id = 0").await;
    }
    // The key of one row becomes that of another.
    stage.from.execute("update split set id = -id; update split set id = -id").await;
    // A batch that holds this too would leave the table to one worker.
    stage.arrives().await;
    stage.stop_between_the_commits().await.batch_execute("rollback").await.unwrap();
    stage.arrives().await;

    let split = "select count(distinct t) from pgtandem.worker_progress, jsonb_array_elements(split) t";
    assert!(to_number(&stage.to, "select count(*) from pgtandem.worker_progress").await >= 2, "nothing was shared");
    assert_eq!(to_number(&stage.to, split).await, 2, "split and named, and none else");
    cut_over(&pgtandem, daemon).await;
    assert_same(&stage.from, &stage.to).await;
}

#[tokio::test]
async fn a_death_between_the_commits_of_the_workers_doubles_nothing_and_loses_nothing() {
    let stage = Move::prepare().await;
    // Whoever goes on may have more workers, fewer, or one.
    for (before, after) in [(4, 4), (3, 1), (2, 5), (4, 2)] {
        let mut daemon = stage.pgtandem(before).spawn(&["run"]);
        following(&mut daemon, PATIENCE).await;
        stage.arrives().await;

        stage.die_between_the_commits(daemon).await;
        stage.from.execute(CHANGES).await;

        let mut daemon = stage.pgtandem(after).spawn(&["run"]);
        following(&mut daemon, PATIENCE).await;
        stage.from.execute(CHANGES).await;
        stage.arrives().await;
        assert_eq!(to_number(&stage.to, AHEAD).await, 0);
        ends(daemon).await;
    }
}

#[tokio::test]
async fn a_subscription_takes_over_from_workers_that_died_between_their_commits() {
    let stage = Move::prepare().await;
    let mut daemon = stage.pgtandem(3).spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;
    stage.die_between_the_commits(daemon).await;

    let pgtandem = stage.pgtandem(3).env("PGTANDEM_FOLLOW_ENGINE", "subscription");
    let mut daemon = pgtandem.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;

    stage.from.execute("update split set v = 'by the subscription' where id < 50").await;
    stage.arrives().await;
    ends(daemon).await;
}

/// What did not wait for the target's disk goes in the reverse order of the commits.
#[tokio::test]
async fn a_crash_of_the_target_takes_no_share_back_alone() {
    let mut stage = Move::prepare().await;
    let mut daemon = stage.pgtandem(4).spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;
    for _ in 0..4 {
        for _ in 0..5 {
            stage.from.execute(CHANGES).await;
        }
        stage.target.crash().await;
        stage.target.start_again().await;
    }
    stage.arrives().await;
    ends(daemon).await;
    stage.source.stop(Stop::Fast).await;
}

/// The error names the row's transaction, and nothing of it is on the target, whosever share the row was.
#[tokio::test]
async fn a_row_that_a_worker_does_not_find_stops_the_move() {
    let stage = Move::prepare().await;
    let pgtandem = stage.pgtandem(4);
    let mut daemon = pgtandem.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;
    stage.to.execute("delete from split where id in (50, 51, 52, 53)").await;

    stage.from.execute("update split set v = 'new' where id not between 50 and 53").await;
    stage.from.execute("update split set v = 'newer'").await;

    let stopped = daemon.wait(PATIENCE).await;
    assert_eq!(stopped.code, Some(4), "{stopped}");
    assert!(stopped.stderr.contains("row_missing"), "{stopped}");
    assert!(stopped.stderr.contains("found no row in table public.split "), "{stopped}");
    let holds = async |v: &str| to_number(&stage.to, &format!("select count(*) from split where v = '{v}'")).await;
    assert_eq!((holds("new").await, holds("newer").await), (496, 0));
    // What a person puts back is found, and what was applied is not applied again.
    stage.to.execute("insert into split select i, 'old' from generate_series(50, 53) i").await;
    let mut daemon = pgtandem.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;
    stage.arrives().await;
    ends(daemon).await;
}

/// Whoever else holds a lock for long makes the workers give up, and the first of them waits alone.
#[tokio::test]
async fn a_table_that_is_locked_for_long_is_waited_for_by_one_worker() {
    let stage = Move::prepare().await;
    let mut daemon = stage.pgtandem(3).spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;
    let holder = stage.to.connect().await;
    holder.batch_execute("begin; lock table split in exclusive mode").await.unwrap();

    stage.from.execute(CHANGES).await;
    daemon.wait_for_log("going on one by one", PATIENCE).await;
    stage.from.execute(CHANGES).await;
    holder.batch_execute("rollback").await.unwrap();

    stage.arrives().await;
    ends(daemon).await;
}
