//! What comes to the source while a cutover is prepared, too late for its lists.

use super::Sides;
use crate::harness::{PATIENCE, Running, versions_under_test, wait_until};

/// Asks for a cutover, has the source's schema changed between its lists and the fence, and lets it go on.
async fn changed_before_the_fence(sides: &Sides, change: &str) -> Running {
    let writer = sides.from.connect().await;
    // Given a writer who keeps the fence open,
    writer.batch_execute("begin; lock table t in row exclusive mode").await.unwrap();
    let asking = sides.pgtandem.spawn(&["cutover", "--timeout", "60s"]);
    sides.wait_for_step("prepare").await;
    sides.from.execute(change).await;
    writer.batch_execute("rollback").await.unwrap();
    asking
}

async fn takes_in(sides: &Sides, table: &str) {
    let known = format!("select count(*) from pgtandem.copy_table where table_name = '{table}' and state = 'copied'");
    wait_until("the move knows the table", PATIENCE, async || sides.to.query_string(&known).await == "1").await;
}

/// Neither fenced nor compared, its rows would be left to chance.
#[tokio::test]
async fn a_table_that_came_before_the_fence_refuses_the_cutover_and_the_next_one_carries_it() {
    let sides = Sides::new(versions_under_test()).await;
    sides.from.execute("create table t (id int primary key); insert into t values (1)").await;
    let daemon = sides.following().await;

    let asked = changed_before_the_fence(&sides, "create table late (id int primary key); insert into late values (1)");
    let refused = asked.await.wait(PATIENCE).await;

    assert!(refused.code == Some(1) && refused.stderr.contains("a table public.late that came"), "{refused}");
    assert!(refused.stdout.contains("tables     failed"), "{refused}");
    sides.from.execute("insert into late values (2)").await;
    takes_in(&sides, "late").await;
    sides.cut_over(daemon).await;
    sides.same().await;
    assert_eq!(sides.to.query_string("select count(*) from late").await, "2");
}

/// The target waits with the proofs, while the source gets another table.
#[tokio::test]
async fn a_table_that_came_behind_the_fence_is_seen_before_the_seal() {
    let sides = Sides::new(versions_under_test()).await;
    sides.from.execute("create table t (id int primary key); insert into t values (1)").await;
    let daemon = sides.following().await;
    let holder = sides.to.connect().await;
    holder.batch_execute("begin; lock table t in access exclusive mode").await.unwrap();

    let asking = sides.pgtandem.spawn(&["cutover", "--timeout", "60s"]);
    sides.wait_for_step("verify").await;
    sides.from.execute("create table late (id int primary key); insert into late values (1)").await;
    holder.batch_execute("rollback").await.unwrap();
    let refused = asking.wait(PATIENCE).await;

    assert!(refused.code == Some(1) && refused.stderr.contains("a table public.late that came"), "{refused}");
    assert!(refused.stdout.contains("seal       failed"), "{refused}");
    sides.from.execute("insert into t values (2); insert into late values (2)").await;
    takes_in(&sides, "late").await;
    sides.cut_over(daemon).await;
    sides.same().await;
}

/// Its name is on the list, and it is locked: only that no trigger is on it tells.
#[tokio::test]
async fn a_table_that_took_the_place_of_another_refuses_the_cutover() {
    let sides = Sides::new(versions_under_test()).await;
    sides
        .from
        .execute(
            "create table t (id int primary key); create table other (id int primary key); insert into other values (1)",
        )
        .await;
    let daemon = sides.following().await;
    let writer = sides.from.connect().await;
    writer.batch_execute("begin; lock table t in row exclusive mode").await.unwrap();
    let asking = sides.pgtandem.spawn(&["cutover", "--timeout", "60s"]);
    let fenced = "select count(*) from pg_trigger where tgrelid = 'other'::regclass and tgenabled = 'A'";
    wait_until("the trigger is there", PATIENCE, async || sides.from.query_string(fenced).await == "1").await;
    sides.from.execute("drop table other; create table other (id int primary key); insert into other values (7)").await;
    writer.batch_execute("rollback").await.unwrap();
    let refused = asking.wait(PATIENCE).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("a table public.other that came"), "{refused}");
    wait_until("the rows arrive", PATIENCE, async || sides.to.query_string("select max(id) from other").await == "7")
        .await;
    sides.cut_over(daemon).await;
    sides.same().await;
    let refused = sides.from.connect().await.batch_execute("insert into other values (8)").await;
    assert!(refused.is_err(), "the source takes writes after the switch");
}

/// It is not on the target's list of sequences either until the stream brings it.
#[tokio::test]
async fn a_sequence_that_came_before_the_fence_is_set_too() {
    let sides = Sides::new(versions_under_test()).await;
    sides.from.execute("create table t (id int primary key)").await;
    let daemon = sides.following().await;
    let change = "create sequence late start 50; select nextval('late'), nextval('late')";
    let done = changed_before_the_fence(&sides, change).await.wait(PATIENCE).await;
    assert_eq!(done.code, Some(0), "{done}");
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));
    assert_eq!(sides.to.query_string("select nextval('late')").await, "52");
}

/// From that moment on its updates are in no stream: nobody would have compared it, nor carried what differs.
#[tokio::test]
async fn a_table_that_lost_its_identity_before_the_fence_refuses_the_cutover_and_the_next_one_carries_it() {
    let sides = Sides::new(versions_under_test()).await.configured("[follow]\nwithout_identity = 'copy'");
    sides
        .from
        .execute("create table t (id int primary key); create table k (id int primary key, v text); insert into k values (1, 'old')")
        .await;
    let daemon = sides.following().await;

    let change = "alter table k drop constraint k_pkey; update k set v = 'new'";
    let refused = changed_before_the_fence(&sides, change).await.wait(PATIENCE).await;

    assert!(refused.code == Some(1) && refused.stderr.contains("public.k came, went or was altered"), "{refused}");
    assert_eq!(sides.to.query_string("select v from k").await, "old");
    sides.cut_over(daemon).await;
    sides.same().await;
}

/// The target has them as they were restored, and nobody told it.
#[tokio::test]
async fn triggers_that_change_before_the_fence_are_on_the_target_what_they_are_on_the_source() {
    let sides = Sides::new(versions_under_test()).await.configured("[follow]\nddl = 'stop'");
    sides
        .from
        .execute(
            "create table t (id int primary key); create table other (id int primary key);
             create function f() returns trigger language plpgsql as 'begin return new; end';
             create trigger goes before insert on other for each row execute function f();
             create trigger comes before insert on other for each row execute function f();
             create trigger stays before insert on other for each row execute function f();
             alter table other disable trigger comes",
        )
        .await;
    let daemon = sides.following().await;
    let change = "alter table other disable trigger goes; alter table other enable always trigger comes";
    let done = changed_before_the_fence(&sides, change).await.wait(PATIENCE).await;
    assert_eq!(done.code, Some(0), "{done}");
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));
    let states = "select string_agg(tgname || tgenabled::text, ' ' order by tgname) from pg_trigger where tgrelid = 'other'::regclass";
    assert_eq!(sides.to.query_string(states).await, "comesA goesD staysO");
}
