//! The applying session on the target: what finds a row, and what a stop waits for.

use crate::harness::{Cluster, Database, PATIENCE, Pgtandem, Running, wait_until};

/// Waits on the target until a question of yes or no is answered with yes.
async fn wait_for(target: &Database, question: &str) {
    wait_until(question, PATIENCE, async || target.query_string(question).await == "t").await;
}

async fn following(daemon: &mut Running) {
    daemon.wait_for_log("entering phase follow", PATIENCE).await;
}

#[tokio::test]
async fn rows_are_found_by_composite_keys() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(
        "create schema app;
         create type app.pair as (a int, b text);
         create domain app.known_pair as app.pair check (value is not null);
         create table composite (id app.pair primary key, v text);
         create table composite_domain (id app.known_pair primary key, v text);
         create table composite_array (id app.pair[] primary key, v text);
         insert into composite select row(i, 'x')::app.pair, 'old' from generate_series(1, 3) i;
         insert into composite_domain select id, v from composite;
         insert into composite_array select array[id], v from composite",
    )
    .await;
    let mut daemon = Pgtandem::new(&from, &to, "composite").spawn(&["run"]);
    following(&mut daemon).await;

    for table in ["composite", "composite_domain"] {
        from.execute(&format!(
            "update {table} set v = 'new, \"quoted\"' where (id).a = 2; delete from {table} where (id).a = 3"
        ))
        .await;
    }
    from.execute("update composite_array set v = 'new, \"quoted\"' where (id[1]).a = 2; delete from composite_array where (id[1]).a = 3")
        .await;

    wait_for(&to, "select count(*) = 2 from composite_array").await;
    for table in ["composite", "composite_domain", "composite_array"] {
        let rows = to.query_strings(&format!("select v from {table} order by id")).await;
        assert_eq!(rows, ["old", "new, \"quoted\""], "{table}");
    }
    daemon.terminate();
    let ended = daemon.wait(PATIENCE).await;
    assert_eq!(ended.code, Some(0), "{ended}");
}

#[tokio::test]
async fn a_stop_does_not_wait_for_a_locked_target() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute("create table t (id int primary key, v text); insert into t values (1, 'old')").await;
    let pgtandem = Pgtandem::new(&from, &to, "locked");
    let mut daemon = pgtandem.spawn(&["run"]);
    following(&mut daemon).await;
    from.execute("insert into t values (2, 'followed')").await;
    wait_for(&to, "select count(*) = 2 from t").await;

    // Given a batch that waits for a lock which nobody is going to give up.
    let holder = to.connect().await;
    holder.batch_execute("begin; lock table t in access exclusive mode").await.unwrap();
    from.execute("update t set v = 'new' where id = 1").await;
    let applying = "from pg_stat_activity where application_name = 'pgtandem locked apply'";
    wait_for(&to, &format!("select exists (select {applying} and wait_event_type = 'Lock')")).await;
    // When it is told to stop, then it ends, and leaves no session behind that still waits.
    daemon.terminate();
    let ended = daemon.wait(PATIENCE).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    wait_for(&to, &format!("select not exists (select {applying})")).await;
    // And the next start applies what was abandoned.
    holder.batch_execute("rollback").await.unwrap();
    let daemon = pgtandem.spawn(&["run"]);
    wait_for(&to, "select v = 'new' from t where id = 1").await;
    daemon.terminate();
    let ended = daemon.wait(PATIENCE).await;
    assert_eq!(ended.code, Some(0), "{ended}");
}
