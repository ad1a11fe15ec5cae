//! Real content through a move while it changes: nothing is lost, doubled, bent or refused on the way.
//!
//! The content stands in `followed/*.sql`: what is there before the move, and a round of changes that is played while
//! the copy runs, while following, and once more just before the cutover.

use crate::harness::{Cluster, Database, PASSWORD, PATIENCE, Pgtandem, Running, assert_same};

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
    sides.from.execute("update late_key set v = v where id < 5").await;
    sides.play(&shapes(SHAPES_CHANGES), 2).await;
    sides.play(&shapes(SHAPES_CHANGES), 3).await;
    cut_over(&pgtandem, daemon).await;

    sides.same().await;
    the_target_works_alone(&sides.to).await;
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
    daemon.wait_for_log("entering phase follow", PATIENCE).await;
}

/// Waits until the move is ready, cuts over, and sees the daemon end well.
async fn cut_over(pgtandem: &Pgtandem, daemon: Running) {
    let done = pgtandem.run(&["cutover"]).await;
    assert_eq!(done.code, Some(0), "{done}\n{}", daemon.stderr());
    let ended = daemon.wait(PATIENCE).await;
    assert_eq!(ended.code, Some(0), "{ended}");
}
