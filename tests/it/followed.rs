//! What following does when it meets something that it cannot carry: it stops before a row goes astray, and says what to do.

use crate::differential::case::{cut_over, following};
use crate::harness::{Cluster, Database, PATIENCE, Pgtandem, Running, assert_same, wait_until};

/// A change of the schema stops the move before a row goes astray; once it is made on the target too, the move goes on.
#[tokio::test]
async fn a_change_of_the_schema_stops_the_move_until_it_is_made_on_the_target() {
    let (source, target) = Cluster::pair().await;
    let sides = Sides::of(&source, &target).await;
    sides
        .from
        .execute(
            "create table widened (id int primary key, v int); create table leaves (id int primary key);
             create table parted (id int primary key) partition by range (id);
             create table parted_1 partition of parted for values from (0) to (100);
             insert into widened select i, i from generate_series(1, 100) i; insert into leaves values (1)",
        )
        .await;
    let pgtandem = Pgtandem::new(&sides.from, &sides.to, "schema").env("PGTANDEM_FOLLOW_DDL", "stop");
    for (change, rows, code, table) in [
        (
            "alter table widened add column more text",
            "insert into widened values (1000, 0, 'm')",
            "shape_differs",
            "widened",
        ),
        (
            "alter table widened alter v type bigint",
            "insert into widened values (1001, 5000000000)",
            "shape_differs",
            "widened",
        ),
        ("drop table leaves", "", "table_dropped", "leaves"),
        (
            "create table arrives (id serial primary key, w int references widened)",
            "insert into arrives (w) select id from widened",
            "table_added",
            "arrives",
        ),
        (
            "create table parted_2 partition of parted for values from (100) to (200)",
            "insert into parted values (1), (150)",
            "table_",
            "parted_2",
        ),
    ] {
        let mut daemon = pgtandem.spawn(&["run"]);
        following(&mut daemon, PATIENCE).await;
        // What came before the change must not stand in its way afterwards.
        sides.from.execute("insert into widened select max(id) + 1, 7 from widened where id < 1000").await;
        sides.from.execute(&format!("{change}; {rows}")).await;
        sides.from.execute("insert into widened select max(id) + 1, 8 from widened where id < 1000").await;
        let stopped = daemon.wait(PATIENCE).await;
        assert_eq!(stopped.code, Some(4), "{change}: {stopped}");
        let last = stopped.stderr.lines().rev().find(|line| line.starts_with("error:")).unwrap_or_default();
        assert!(last.contains(table) && last.contains(code), "{change}: {stopped}");
        let again = pgtandem.run(&["run", "--until", "follow"]).await;
        assert_eq!(again.code, Some(4), "it goes on though nothing was mended: {again}");
        sides.to.execute(change).await;
    }
    let daemon = pgtandem.spawn(&["run"]);
    let done = pgtandem.clone();
    wait_until("the move follows again", PATIENCE, async || {
        done.run(&["status", "--json"]).await.stdout.contains("\"ready\":true")
    })
    .await;
    sides
        .from
        .execute(
            "insert into arrives (w) values (1); insert into parted values (2), (151); delete from parted where id = 1",
        )
        .await;
    cut_over(&pgtandem, daemon).await;
    sides.same().await;
}

#[tokio::test]
async fn an_update_that_the_source_cannot_identify_is_let_through_there_and_refuses_the_cutover() {
    let (source, target) = Cluster::pair().await;
    let sides = Sides::of(&source, &target).await;
    sides
        .from
        .execute("create table late_key (id int primary key deferrable, v text); insert into late_key values (1, 'v')")
        .await;
    let pgtandem = Pgtandem::new(&sides.from, &sides.to, "unseen");
    let mut daemon = pgtandem.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;

    sides.from.execute("update late_key set v = 'x'").await;

    let refused = pgtandem.run(&["cutover", "--timeout", "5s"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("public.late_key"), "{refused}");
    assert!(daemon.is_running(), "{}", daemon.stderr());
}

#[tokio::test]
async fn a_row_that_is_missing_on_the_target_stops_the_move_or_is_recorded() {
    let (source, target) = Cluster::pair().await;
    let sides = Sides::of(&source, &target).await;
    sides
        .from
        .execute(
            "create table t (id int primary key, v text); insert into t select i, 'v' from generate_series(1, 9) i",
        )
        .await;
    let pgtandem = Pgtandem::new(&sides.from, &sides.to, "missing");
    let mut daemon = pgtandem.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;
    sides.to.execute("delete from t where id = 5").await;
    let xid = sides.from.query_string("select txid_current() + 2").await;
    sides.from.execute("update t set v = 'before' where id = 4").await;

    sides.from.execute("update t set v = 'x' where id = 5").await;

    let stopped = daemon.wait(PATIENCE).await;
    assert_eq!(stopped.code, Some(4), "{stopped}");
    let said = format!("UPDATE of transaction {xid} (committed at ");
    assert!(stopped.stderr.contains(&said) && stopped.stderr.contains("table public.t"), "{said}: {stopped}");
    assert!(stopped.stderr.contains("row_missing"), "{stopped}");
    assert_eq!(sides.to.query_string("select v from t where id = 4").await, "before", "what came before is applied");

    let recording = pgtandem.env("PGTANDEM_FOLLOW_MISSING_ROW", "record").env("PGTANDEM_HTTP_LISTEN", "127.0.0.1:0");
    let mut daemon = recording.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;
    sides.from.execute("update t set v = 'y' where id = 6").await;
    wait_until("it goes on", PATIENCE, async || sides.to.query_string("select v from t where id = 6").await == "y")
        .await;
    let recorded = "select table_name, operation, xid from pgtandem.missing_row";
    assert_eq!(sides.to.query_strings(recorded).await, [format!("public.t|UPDATE|{xid}")]);
    let metrics = get(&daemon, "/metrics").await;
    assert!(metrics.contains("pgtandem_missing_rows_total{table=\"public.t\"} 1"), "{metrics}");
}

/// What the slot kept for us is gone: going on would leave a hole.
#[tokio::test]
async fn a_slot_that_is_not_ours_any_more_is_never_followed() {
    let (source, target) = Cluster::pair().await;
    for (name, tampering, code) in [
        ("dropped", "select pg_drop_replication_slot('pgtandem_dropped')", "slot_missing"),
        (
            "again",
            "select pg_drop_replication_slot('pgtandem_again'); insert into t values (2);
             select pg_create_logical_replication_slot('pgtandem_again', 'pgoutput')",
            "slot_advanced",
        ),
        (
            "advanced",
            "insert into t values (2); select pg_replication_slot_advance('pgtandem_advanced', pg_current_wal_lsn())",
            "slot_advanced",
        ),
        (
            "stranger",
            "select pg_drop_replication_slot('pgtandem_stranger');
             select pg_create_logical_replication_slot('pgtandem_stranger', 'test_decoding')",
            "slot_foreign",
        ),
    ] {
        let (from, to) = (source.create_database(name).await, target.create_database(name).await);
        from.execute("create table t (id int primary key); insert into t values (1)").await;
        let pgtandem = Pgtandem::new(&from, &to, name);
        let copied = pgtandem.run(&["run", "--until", "follow"]).await;
        assert_eq!(copied.code, Some(0), "{copied}");
        for statement in tampering.split(';') {
            from.execute(statement).await;
        }
        let refused = pgtandem.run(&["run"]).await;
        assert_eq!(refused.code, Some(4), "{name}: {refused}");
        assert!(refused.stderr.contains(code) && refused.stderr.contains("pgtandem clean"), "{name}: {refused}");
        assert_eq!(to.query_string("select count(*) from t").await, "1", "{name}");
    }
}

/// Both databases named `app`, as the superuser sees them.
struct Sides {
    from: Database,
    to: Database,
}

impl Sides {
    async fn of(source: &Cluster, target: &Cluster) -> Self {
        Self { from: source.create_database("app").await, to: target.create_database("app").await }
    }

    async fn same(&self) {
        assert_same(&self.from, &self.to).await;
    }
}

/// One request to the daemon's HTTP side, at the address that it logged.
pub async fn get(daemon: &Running, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let log = daemon.stderr();
    let address = log.split("address=").nth(1).and_then(|rest| rest.split_whitespace().next()).expect("an address");
    let mut stream = tokio::net::TcpStream::connect(address).await.expect("connect to the daemon");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("ask the daemon");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("the daemon's answer");
    answer
}
