//! Real content through a move while it changes: nothing is lost, doubled, bent or refused on the way.
//!
//! The content stands in `followed/*.sql`: what is there before the move, and a round of changes that is played while
//! the copy runs, while following, and once more just before the cutover.

use crate::harness::{
    Cluster, Database, PASSWORD, PATIENCE, Pgtandem, Running, assert_same, versions_under_test, wait_until,
};

const VALUES: &str = include_str!("followed/values.sql");
const VALUES_CHANGES: &str = include_str!("followed/values_changes.sql");
const SHAPES: &str = include_str!("followed/shapes.sql");
const SHAPES_CHANGES: &str = include_str!("followed/shapes_changes.sql");

/// Settings of a role that would change how values print or read, and how long a statement may take.
const HOSTILE_SETTINGS: [(&str, &str); 17] = [
    ("DateStyle", "German, DMY"),
    ("IntervalStyle", "sql_standard"),
    ("TimeZone", "Asia/Kathmandu"),
    ("extra_float_digits", "-2"),
    ("bytea_output", "escape"),
    ("lc_monetary", "C.UTF-8"),
    ("xmloption", "document"),
    ("search_path", "v, pg_catalog"),
    ("standard_conforming_strings", "off"),
    ("escape_string_warning", "off"),
    ("statement_timeout", "100ms"),
    ("lock_timeout", "1ms"),
    ("idle_in_transaction_session_timeout", "50ms"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_deferrable", "on"),
    ("quote_all_identifiers", "on"),
    ("session_replication_role", "origin"),
];

#[tokio::test]
async fn every_value_arrives_as_it_was_whatever_the_settings_are() {
    let (source, target) = Cluster::pair().await;
    let sides = Sides::of(&source, &target).await;
    sides.from.execute(VALUES).await;
    for cluster in [&source, &target] {
        be_hostile(cluster).await;
    }
    target.execute("alter role mover in database app set default_transaction_read_only = on").await;
    let (from, to) = (sides.from.with_user("mover", PASSWORD), sides.to.with_user("mover", PASSWORD));
    let pgtandem = Pgtandem::new(&from, &to, "values");

    let mut daemon = pgtandem.spawn(&["run"]);
    sides.play(VALUES_CHANGES, 1).await;
    following(&mut daemon).await;
    sides.play(VALUES_CHANGES, 2).await;
    sides.play(VALUES_CHANGES, 3).await;
    cut_over(&pgtandem, daemon).await;

    sides.same().await;
}

#[tokio::test]
async fn every_shape_of_table_is_followed() {
    let (source, target) = Cluster::pair().await;
    let sides = Sides::of(&source, &target).await;
    sides.from.execute(&shapes(SHAPES)).await;
    let pgtandem = Pgtandem::new(&sides.from, &sides.to, "shapes");

    let mut daemon = pgtandem.spawn(&["run"]);
    sides.play(&shapes(SHAPES_CHANGES), 1).await;
    following(&mut daemon).await;
    sides.play(&shapes(SHAPES_CHANGES), 2).await;
    sides.play(&shapes(SHAPES_CHANGES), 3).await;
    cut_over(&pgtandem, daemon).await;

    sides.same().await;
    the_target_works_alone(&sides.to).await;
}

/// Roles that own their database, and nothing more: foreign keys wait for the cutover, triggers are disabled one by one.
#[tokio::test]
async fn every_shape_is_followed_without_a_superuser() {
    let (source, target) = Cluster::pair().await;
    let sides = Sides::of(&source, &target).await;
    for cluster in [&source, &target] {
        cluster.execute(&format!("create role app login replication bypassrls password '{PASSWORD}'")).await;
        cluster.execute("alter database app owner to app").await;
        cluster.database("app").execute("grant all on schema public to app").await;
    }
    let (from, to) = (sides.from.with_user("app", PASSWORD), sides.to.with_user("app", PASSWORD));
    from.execute(&shapes(SHAPES)).await;
    let pgtandem = Pgtandem::new(&from, &to, "shapes");

    let mut daemon = pgtandem.spawn(&["run"]);
    sides.play(&shapes(SHAPES_CHANGES), 1).await;
    following(&mut daemon).await;
    sides.play(&shapes(SHAPES_CHANGES), 2).await;
    cut_over(&pgtandem, daemon).await;

    sides.same().await;
    the_target_works_alone(&sides.to).await;
}

#[tokio::test]
async fn transactions_of_every_kind_arrive_whole() {
    let (one, two) = versions_under_test();
    let source = Cluster::builder(one).set("max_prepared_transactions", "5").start().await;
    let target = Cluster::start(two).await;
    let sides = Sides::of(&source, &target).await;
    let from = &sides.from;
    from.execute("create table t (id int primary key, v text); create table log (line text)").await;
    from.execute("insert into t select i, 'old' from generate_series(1, 1000) i").await;
    let before = from.connect().await;
    for gid in ["commits after the cut", "rolls back after the cut"] {
        let sql =
            format!("begin; insert into t values ({}, '{gid}'); prepare transaction '{gid}'", -(gid.len() as i64));
        before.batch_execute(&sql).await.unwrap();
    }
    let pgtandem = Pgtandem::new(from, &sides.to, "transactions");

    let mut daemon = pgtandem.spawn(&["run"]);
    daemon.wait_for_log("consistent point", PATIENCE).await;
    before.batch_execute("begin; insert into t values (-1, 'meanwhile'); commit").await.unwrap();
    before.batch_execute("commit prepared 'commits after the cut'").await.unwrap();
    before.batch_execute("rollback prepared 'rolls back after the cut'").await.unwrap();
    following(&mut daemon).await;
    from.execute(
        "begin; insert into t values (-2, 'x'); update t set v = 'prepared' where id = 5; prepare transaction 'p'",
    )
    .await;
    from.execute("insert into log values ('while prepared')").await;
    from.execute("insert into t select i, 'large' from generate_series(10001, 210000) i").await;
    from.execute("commit prepared 'p'").await;
    from.execute("update t set v = v || 'r' where id > 150000; delete from t where id > 200000").await;
    from.execute("copy log from program 'seq 1 50000'").await;
    // Thousands of subtransactions, every second one rolled back.
    from.execute(
        "do $$ begin for i in 1 .. 3000 loop begin
             insert into log values ('sub ' || i);
             if i % 2 = 0 then raise division_by_zero; end if;
         exception when division_by_zero then null; end; end loop; end $$",
    )
    .await;
    cut_over(&pgtandem, daemon).await;

    sides.same().await;
}

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
        following(&mut daemon).await;
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
    following(&mut daemon).await;

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
    following(&mut daemon).await;
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
    following(&mut daemon).await;
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

/// What was held back is in force: triggers and rules of every state, foreign keys, GENERATED ALWAYS.
async fn the_target_works_alone(to: &Database) {
    let seen = "select coalesce(max(id), 0) from witness";
    let before = to.query_string(seen).await;
    to.execute("insert into watched values (-1, 'target'); insert into ruled values (-1, 'target'); update ruled set v = 'x' where id = -1")
        .await;
    let fired = to.query_strings(&format!("select what from witness where id > {before} order by what")).await;
    assert_eq!(fired, ["always INSERT", "late INSERT", "plain INSERT", "rule", "rule always"]);
    let states = "select string_agg(tgname || tgenabled::text, ' ' order by tgname) from pg_trigger \
                  where tgrelid = 'watched'::regclass and not tgisinternal";
    assert_eq!(to.query_string(states).await, "alwaysA disabledD emptiedO lateO plainO replicaR");
    let keys = "select count(*) || ' ' || bool_and(convalidated) from pg_constraint where contype = 'f' and connamespace = 'public'::regnamespace";
    assert_eq!(to.query_string(keys).await, "4 true");
    let client = to.connect().await;
    for refused in
        ["insert into child values (-1, -1)", "insert into always values (-1000)", "update always set id = 5"]
    {
        assert!(client.batch_execute(refused).await.is_err(), "{refused} was accepted");
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

    /// One round of changes, in one session.
    async fn play(&self, changes: &str, round: u32) {
        self.from.execute(&changes.replace("ROUND", &round.to_string())).await;
    }

    async fn same(&self) {
        assert_same(&self.from, &self.to).await;
    }
}

/// The longest name that there is, in bytes.
fn shapes(sql: &str) -> String {
    sql.replace("LONGNAME", &("ä".repeat(31) + "1"))
}

async fn be_hostile(cluster: &Cluster) {
    let mut sql = format!("create role mover superuser login password '{PASSWORD}';");
    for (name, value) in HOSTILE_SETTINGS {
        sql += &format!("alter role mover set {name} = '{value}';");
    }
    if cluster.version() >= 17 {
        sql += "alter role mover set transaction_timeout = '100ms';";
    }
    // `search_path` is a list, not a name.
    cluster.execute(&sql.replace("'v, pg_catalog'", "v, pg_catalog")).await;
}

async fn following(daemon: &mut Running) {
    wait_until("the move follows", PATIENCE, async || {
        let log = daemon.stderr();
        let follows = log.contains("entering phase follow")
            || log.contains("going on with the move") && log.contains("phase=follow");
        assert!(follows || daemon.is_running(), "the daemon ended:\n{log}");
        follows
    })
    .await;
}

/// Waits until the move is ready, cuts over, and sees the daemon end well.
async fn cut_over(pgtandem: &Pgtandem, daemon: Running) {
    // It waits for what is still to be applied; on a busy machine that takes a while.
    let done = pgtandem.spawn(&["cutover", "--timeout", "3m"]).wait(4 * PATIENCE).await;
    assert_eq!(done.code, Some(0), "{done}\n{}", daemon.stderr());
    let ended = daemon.wait(PATIENCE).await;
    assert_eq!(ended.code, Some(0), "{ended}");
}

/// One request to the daemon's HTTP side, at the address that it logged.
async fn get(daemon: &Running, path: &str) -> String {
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
