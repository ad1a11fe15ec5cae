//! Transactions: snapshot and stream meet exactly, and every transaction arrives whole, once, and in order.

use super::case::{Case, cut_over, following, number};
use crate::harness::{Cluster, PATIENCE, Pgtandem, assert_same, versions_under_test, wait_until};

/// Prepared before the move begins, and decided after the cut.
#[tokio::test]
async fn transactions_of_every_kind_arrive_whole() {
    let schema = "
        create table t (id int primary key, v text);
        create table log (line text);
        insert into t select i, 'old' from generate_series(1, 1000) i;";
    // The rounds are thousands apart, so that each has rows of its own.
    let script = "
@p begin; insert into t values (-10 * ROUND, 'x'); update t set v = 'prepared ROUND' where id = 5; prepare transaction 'p'
@m insert into log values ('while prepared');
insert into t select i, 'large' from generate_series(100000 * ROUND, 100000 * ROUND + 20000) i;
@p commit prepared 'p'
@m update t set v = v || 'r' where id > 100000 * ROUND + 12000;
delete from t where id > 100000 * ROUND + 17000;
@r begin; update t set v = 'never' where id > 10; prepare transaction 'r'
@r rollback prepared 'r'
@l copy log from stdin
LINES
@s do $$ begin for i in 1 .. 3000 loop begin
       insert into log values ('sub ' || i);
       if i % 2 = 0 then raise division_by_zero; end if;
   exception when division_by_zero then null; end; end loop; end $$
@a begin; update t set v = 'a first' where id = 10;
@b begin; update t set v = 'b' where id = 11; insert into t values (-10 * ROUND - 1, 'b');
@c begin; insert into log values ('c begins last and commits first'); commit
@b commit
@a update t set v = 'a last' where id = 11; commit
@e begin; commit; begin; savepoint s; insert into log values ('never'); rollback to s; commit
";
    let lines: Vec<String> = (1..=20_000).map(|n| format!("line {n}")).collect();
    let script = script.replace("LINES", &lines.join("\n"));
    let before = "
@a begin; insert into t values (-1001, 'in progress before the move'); savepoint s; update t set v = 'never' where id = 1
@b begin; update t set v = 'prepared before the move' where id = 2; prepare transaction 'commits';
@c begin; update t set v = 'never' where id = 3; prepare transaction 'rolls back'
@d begin; insert into t values (-1002, 'never')";
    let meanwhile = "
@e begin; insert into t values (-1003, 'began while the cut waited');
@a rollback to s; update t set v = 'kept' where id = 1
@f insert into t values (-1004, 'began and ended while the cut waited');
@a commit
@b commit prepared 'commits'
@c rollback prepared 'rolls back'
@d rollback
@e update t set v = 'later' where id = -1004; commit";
    let case = Case::new("transactions")
        .schema(schema)
        .around_the_cut(before, meanwhile)
        .script(&script)
        .also_by_subscription();
    case.covering(&[0, 4]).moves().await;
}

/// What the target refuses for the moment is applied again, from the first statement of the target's transaction.
#[tokio::test]
async fn a_refusal_of_the_moment_repeats_the_whole_target_transaction() {
    let (one, two) = versions_under_test();
    let (source, target) =
        tokio::join!(Cluster::start(one), Cluster::builder(two).set("deadlock_timeout", "5s").start());
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        "create table log (line text); create table t (id int primary key, v text); create table last (id int primary key);
         insert into t select i, 'v' from generate_series(1, 9) i",
    )
    .await;
    // Given a target whose own sessions are serializable, and that refuses the last change of a transaction three times.
    to.execute("alter role postgres set default_transaction_isolation = serializable").await;
    let pgtandem = Pgtandem::new(&from, &to, "repeats");
    let mut daemon = pgtandem.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;
    to.execute(
        "create sequence refused;
         create function refuse() returns trigger language plpgsql as $$ begin
             case nextval('public.refused')
                 when 1 then raise sqlstate '40001';
                 when 2 then raise sqlstate '55P03';
                 when 3 then raise sqlstate '40P01';
                 else return new; end case; end $$;
         create trigger refuse before insert on last for each row execute function refuse();
         alter table last enable always trigger refuse",
    )
    .await;
    from.execute(
        "begin; insert into log values ('once'); update t set v = v || '!'; insert into last values (1); commit",
    )
    .await;
    wait_until("it is applied in the end", PATIENCE, async || {
        to.query_string("select count(*) from last").await == "1"
    })
    .await;
    assert_eq!(to.query_strings("select v from t group by v").await, ["v!"]);
    assert_eq!(to.query_string("select count(*) from log").await, "1");
    assert_eq!(to.query_string("select last_value from refused").await, "4");

    // And a deadlock with a session of the target, of which the applying one is the victim.
    let other = to.connect().await;
    other.batch_execute("set deadlock_timeout = '1h'; begin; update t set v = 'x' where id = 2").await.unwrap();
    from.execute("begin; insert into log values ('twice?'); update t set v = 'a' where id = 1; update t set v = 'b' where id = 2; commit").await;
    let waits = "select exists (select from pg_stat_activity where application_name = 'pgtandem repeats apply' and wait_event_type = 'Lock')";
    wait_until("the apply waits", PATIENCE, async || to.query_string(waits).await == "t").await;
    other.batch_execute("update t set v = 'y' where id = 1").await.unwrap();
    // The victim is the applying session.
    daemon.wait_for_log("deadlock detected (SQLSTATE 40P01)", PATIENCE).await;
    other.batch_execute("rollback").await.unwrap();
    to.execute("drop function refuse cascade; drop sequence refused").await;
    wait_until("it is applied too", PATIENCE, async || to.query_string("select count(*) from log").await == "2").await;
    cut_over(&pgtandem, daemon).await;
    assert_same(&from, &to).await;
}

/// One transaction changes every table; more statements than are kept prepared.
async fn many_tables_in_one_transaction(tables: u64) {
    let schema = format!(
        "do $$ begin for i in 1 .. {tables} loop
             execute format('create table t%s (id int primary key, v text); insert into t%s values (1, ''v''), (2, ''w'')', i, i);
             -- So that one transaction need not lock them all.
             if i % 500 = 0 then commit; end if;
         end loop; end $$"
    );
    let script = format!(
        "do $$ begin for i in 1 .. {tables} loop
             execute format('update t%s set v = v || ROUND where id = 1; insert into t%s values (10 + ROUND, null); delete from t%s where id = 2 * ROUND', i, i, i);
         end loop; end $$"
    );
    let case = Case::new("many_tables").schema(&schema).script(&script).covering(&[0]);
    case.server_setting("max_locks_per_transaction", "4096").moves().await;
}

#[tokio::test]
async fn a_transaction_over_many_tables_arrives_whole() {
    many_tables_in_one_transaction(number("PGTANDEM_TEST_TABLES").unwrap_or(700)).await;
}

/// Tens of millions of rows by hand: `PGTANDEM_TEST_ROWS=30000000`, best with a release build.
#[tokio::test]
async fn a_large_transaction_takes_no_memory_of_its_size() {
    let rows = number("PGTANDEM_TEST_ROWS").unwrap_or(60_000);
    let script = format!(
        "begin; insert into t select {rows} * ROUND + i, repeat('x', 500) from generate_series(1, {rows}) i;
         savepoint s; update t set v = 'never'; rollback to s;
         delete from t where id % 3 = 0 and id >= {rows} * ROUND; commit"
    );
    let case = Case::new("large_transaction").schema("create table t (id bigint primary key, v text)").script(&script);
    case.covering(&[3])
        .moves_and(async |moved| {
            let peak = moved.peak_memory() >> 20;
            println!("the daemon held {peak} MB at most for transactions of {rows} rows");
            assert!(peak < 300, "the daemon held {peak} MB");
        })
        .await;
}

/// A daemon that died during the copy makes its dump of the schema anew, when what captures changes of it is there already.
#[tokio::test]
async fn a_death_during_the_copy_leaves_what_captures_changes_behind() {
    let case = Case::new("dies").schema("create table t (id int primary key)").script("insert into t values (ROUND)");
    case.covering(&[0]).with_deaths().moves().await;
}
