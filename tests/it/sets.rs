//! Statements for sets of rows: what they cannot do is done row by row, and what comes out is the same.

use crate::differential::case::following;
use crate::followed::get;
use crate::harness::{Cluster, Database, PATIENCE, Pgtandem, Running, assert_same, differences, wait_until};

/// Waits until the target holds what the source holds.
async fn arrives(from: &Database, to: &Database) {
    wait_until("both sides hold the same", PATIENCE, async || differences(from, to).await.is_empty()).await;
}

async fn ends(daemon: Running) {
    daemon.terminate();
    let ended = daemon.wait(PATIENCE).await;
    assert_eq!(ended.code, Some(0), "{ended}");
}

/// In the middle of one statement that updates all of them two rows hold the same value.
#[tokio::test]
async fn rows_that_exchange_unique_values_are_updated_in_their_order() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        "create table ranked (id int primary key, place int unique, v text);
         create table spans (id int primary key, span int4range, exclude using gist (span with &&));
         create table beside (id int primary key, v text);
         insert into ranked select i, i, 'old' from generate_series(1, 100) i;
         insert into spans select i, int4range(i, i + 1) from generate_series(1, 100) i;
         insert into beside select i, 'old' from generate_series(1, 100) i",
    )
    .await;
    let pgtandem = Pgtandem::new(&from, &to, "exchange").env("PGTANDEM_HTTP_LISTEN", "127.0.0.1:0");
    let mut daemon = pgtandem.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;

    from.execute(
        "begin;
         update ranked set place = -place, v = 'new'; update ranked set place = 101 + place;
         update spans set span = int4range(-id - 1, -id); update spans set span = int4range(101 - id, 102 - id);
         update beside set v = 'new';
         delete from beside where id % 3 = 0; insert into beside select i, 'again' from generate_series(3, 99, 3) i;
         commit",
    )
    .await;

    arrives(&from, &to).await;
    let metrics = get(&daemon, "/metrics").await;
    for reason in ["unique_violation", "exclusion_violation"] {
        assert!(metrics.contains(&format!("pgtandem_apply_fallbacks_total{{reason=\"{reason}\"}} 1")), "{metrics}");
    }
    ends(daemon).await;
}

/// The error tells the row's transaction, and nothing of that transaction is applied.
#[tokio::test]
async fn a_row_that_a_set_does_not_find_stops_the_move() {
    let (source, target) = Cluster::pair().await;
    for (name, key) in [("keyed", "primary key"), ("alike", "")] {
        let (from, to) = (source.create_database(name).await, target.create_database(name).await);
        from.execute(&format!(
            "create table t (id int {key}, v text); alter table t replica identity full;
             insert into t select i, 'old' from generate_series(1, 100) i"
        ))
        .await;
        let mut daemon = Pgtandem::new(&from, &to, name).spawn(&["run"]);
        following(&mut daemon, PATIENCE).await;
        to.execute("delete from t where id = 50").await;

        from.execute("update t set v = 'new'").await;

        let stopped = daemon.wait(PATIENCE).await;
        assert_eq!(stopped.code, Some(4), "{stopped}");
        assert!(stopped.stderr.contains("row_missing"), "{stopped}");
        assert!(stopped.stderr.contains("found no row in table public.t "), "{stopped}");
        assert_eq!(to.query_string("select count(*) from t where v = 'new'").await, "0", "{name}");
    }
}

/// What is too large to be collected goes to the target in parts, in one target transaction; a death in the middle leaves none of it.
#[tokio::test]
async fn a_large_transaction_goes_in_parts_and_survives_a_death() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        "create table t (id int primary key, v text); create table other (id int primary key, v text);
         insert into t select i, 'old' from generate_series(1, 5000) i",
    )
    .await;
    let pgtandem = Pgtandem::new(&from, &to, "parts").env("PGTANDEM_FOLLOW_BATCH_MAX_BYTES", "64KiB");
    let mut daemon = pgtandem.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;
    let sessions = "select count(*) from pg_stat_activity where application_name = 'pgtandem parts apply'";
    wait_until("the session that applies stands", PATIENCE, async || to.query_string(sessions).await == "1").await;
    // The last part waits for this lock.
    let holder = to.connect().await;
    holder.batch_execute("begin; lock table other").await.unwrap();

    from.execute(
        "begin;
         insert into t select i, 'new' from generate_series(5001, 20000) i;
         update t set v = v || id where id % 2 = 0;
         delete from t where id % 5 = 0;
         insert into t select i, 'again' from generate_series(5, 20000, 5) i;
         insert into other select i, 'other' from generate_series(1, 2000) i;
         commit",
    )
    .await;
    wait_until("the last part waits", PATIENCE, async || {
        to.query_string(&format!("{sessions} and wait_event_type = 'Lock'")).await == "1"
    })
    .await;
    assert_eq!(to.query_string("select count(*) from t").await, "5000", "nobody sees a part");
    daemon.kill();
    holder.batch_execute("rollback").await.unwrap();

    let mut daemon = pgtandem.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;
    arrives(&from, &to).await;
    ends(daemon).await;
}

/// Rows that look the same: of each look as many are changed as on the source.
#[tokio::test]
async fn rows_without_a_key_are_changed_as_often_as_they_are_there() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        "create table keyless (a int, b text, j json, doubled int generated always as (a * 2) stored);
         alter table keyless replica identity full;
         insert into keyless select i % 10, nullif('b' || i % 4, 'b1'), case i % 3 when 0 then '{\"a\": 1}'::json end
         from generate_series(1, 600) i;
         create table indexed (a int, b text); alter table indexed replica identity full; create index on indexed (b);
         insert into indexed select i % 10, 'b' || i % 7 from generate_series(1, 600) i",
    )
    .await;
    let mut daemon = Pgtandem::new(&from, &to, "keyless").spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;

    for round in 1..=3 {
        from.execute(&format!(
            "begin;
             update keyless set b = 'round{round}' where ctid in (select ctid from keyless where a = {round} limit 25);
             update keyless set j = null, a = a + 1 where b = 'round{round}';
             delete from keyless where ctid in (select ctid from keyless where a = 7 limit 11);
             insert into keyless select 7, null, null from generate_series(1, 9);
             delete from keyless where ctid in (select ctid from keyless where a = 7 and b is null limit 4);
             update indexed set a = a + 100 where ctid in (select ctid from indexed where b = 'b{round}' limit 40);
             delete from indexed where ctid in (select ctid from indexed where b = 'b{round}' limit 3);
             commit;
             update indexed set a = -1 where ctid = (select min(ctid) from indexed where b = 'b6')"
        ))
        .await;
    }

    arrives(&from, &to).await;
    ends(daemon).await;
}

/// A trigger that someone made on the target, to fire for applied rows too, sees them in the order of the source.
#[tokio::test]
async fn what_observes_the_target_sees_the_order_of_the_source() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute("create table t (id int primary key, v text); create table u (id int primary key)").await;
    let pgtandem = Pgtandem::new(&from, &to, "observed");
    let mut daemon = pgtandem.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;
    to.execute(
        "create schema seen; create table seen.log (n serial, what text);
         create function seen.note() returns trigger language plpgsql as
         'begin insert into seen.log (what) values (tg_table_name || new.id); return null; end';
         create trigger note after insert on t for each row execute function seen.note();
         create trigger note after insert on u for each row execute function seen.note();
         alter table t enable always trigger note; alter table u enable always trigger note",
    )
    .await;

    from.execute(
        "begin; insert into t select i from generate_series(20, 1, -1) i; insert into u select i from generate_series(20, 1, -1) i;
         insert into t values (100); commit",
    )
    .await;

    wait_until("all were seen", PATIENCE, async || to.query_string("select count(*) from seen.log").await == "41")
        .await;
    let seen = to.query_strings("select what from seen.log order by n").await;
    let expected: Vec<String> = (1..=20)
        .rev()
        .map(|i| format!("t{i}"))
        .chain((1..=20).rev().map(|i| format!("u{i}")))
        .chain(["t100".to_owned()])
        .collect();
    assert_eq!(seen, expected);
    to.execute("drop schema seen cascade").await;
    assert_same(&from, &to).await;
    ends(daemon).await;
}

/// The stream names partitions; a foreign key that refers to them belongs to the tables that they are of.
#[tokio::test]
async fn partitioned_tables_that_refer_to_each_other_are_emptied() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        "create table tree (id int primary key, up int references tree) partition by range (id);
         create table tree_1 partition of tree for values from (0) to (100);
         create table tree_2 partition of tree for values from (100) to (200) partition by range (id);
         create table tree_2_1 partition of tree_2 for values from (100) to (200);
         create table leaf (id int references tree) partition by range (id);
         create table leaf_1 partition of leaf for values from (0) to (200);
         alter table leaf_1 replica identity full;
         create table alone (id int primary key) partition by range (id);
         create table alone_1 partition of alone for values from (0) to (100);
         create table alone_2 partition of alone for values from (100) to (200);
         insert into tree select i, nullif(i - 1, 89) from generate_series(90, 110) i;
         insert into leaf values (95); insert into alone select i from generate_series(90, 110) i",
    )
    .await;
    let mut daemon = Pgtandem::new(&from, &to, "emptied").spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;

    from.execute("truncate tree, leaf; insert into tree values (101, null), (1, 101); truncate alone_2").await;

    arrives(&from, &to).await;
    assert_eq!(to.query_string("select count(*) from alone").await, "10", "a partition alone");
    ends(daemon).await;
}

/// The statement of the COPY is what fills a message, so that it goes out by itself, and its rows after it.
#[tokio::test]
async fn a_copy_whose_statement_fills_a_message_ends() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    let columns: Vec<String> = (0..60).map(|n| format!("{}{n:02} int", "c".repeat(60))).collect();
    from.execute(&format!(
        "create table before (id int primary key, v text); create table wide ({})",
        columns.join(", ")
    ))
    .await;
    let mut daemon = Pgtandem::new(&from, &to, "full").spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;

    from.execute(
        "begin; insert into before values (1, repeat('x', 63000)); insert into wide select i from generate_series(1, 10) i; commit",
    )
    .await;

    arrives(&from, &to).await;
    ends(daemon).await;
}

/// A CHECK may call a function that reads another table. Then the order of the tables counts.
#[tokio::test]
async fn a_check_that_reads_another_table_sees_the_order_of_the_source() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        "create table parent (id int primary key);
         create function is_there(wanted int) returns bool language sql as 'select exists (select from public.parent where id = wanted)';
         create table child (id int primary key, parent int check (is_there(parent)));
         insert into parent values (1)",
    )
    .await;
    let mut daemon = Pgtandem::new(&from, &to, "checked").spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;

    from.execute(
        "begin; insert into child values (1, 1); insert into parent select i from generate_series(2, 20) i;
         insert into child select i, i from generate_series(2, 20) i; commit;
         begin; insert into child values (100, 1); insert into parent values (100); insert into child values (101, 100);
         insert into parent select i from generate_series(101, 120) i; commit",
    )
    .await;

    arrives(&from, &to).await;
    ends(daemon).await;
}
