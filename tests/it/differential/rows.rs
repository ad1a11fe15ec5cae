//! Rows and identity: each change finds its row, and no other.

use super::case::{Case, Moved, Role, cut_over, following};
use crate::harness::{Cluster, PATIENCE, Pgtandem, wait_until};

const SHAPES: &str = include_str!("content/shapes.sql");
const SHAPES_CHANGES: &str = include_str!("content/shapes_changes.sql");

/// The longest name that there is, in bytes.
fn shapes(sql: &str) -> String {
    sql.replace("LONGNAME", &("ä".repeat(31) + "1"))
}

/// Foreign keys wait for the cutover and triggers are disabled one by one, where the role is no superuser.
#[tokio::test]
async fn every_shape_of_table_is_followed() {
    let case = Case::new("shapes").schema(&shapes(SHAPES)).script(&shapes(SHAPES_CHANGES)).covering(&[0, 1, 4]);
    case.owner_may("bypassrls").moves_and(async |moved| the_target_works_alone(moved).await).await;
}

/// What was held back is in force: triggers and rules of every state, foreign keys, GENERATED ALWAYS.
async fn the_target_works_alone(moved: &Moved) {
    let to = &moved.to;
    let seen = "select coalesce(max(id), 0) from witness";
    let before = to.query_string(seen).await;
    to.execute("insert into watched values (-1, 'target'); insert into ruled values (-1, 'target'); update ruled set v = 'x' where id = -1")
        .await;
    let fired = to.query_strings(&format!("select what from witness where id > {before} order by what")).await;
    assert_eq!(fired, ["always INSERT", "late INSERT", "plain INSERT", "rule", "rule always"]);
    let keys = "select count(*) || ' ' || bool_and(convalidated) from pg_constraint where contype = 'f' and connamespace = 'public'::regnamespace";
    assert_eq!(to.query_string(keys).await, "4 true");
    let client = to.connect().await;
    for refused in
        ["insert into child values (-1, -1)", "insert into always values (-1000)", "update always set id = 5"]
    {
        assert!(client.batch_execute(refused).await.is_err(), "{refused} was accepted");
    }
}

const IDENTITIES: &str = "
    create table keyed (id int primary key, a int not null unique, v text);
    insert into keyed select i, i, 'v' from generate_series(1, 60) i;
    create function touch(what text) returns void language sql as
        'update keyed set v = v || what where id % 3 = 0; update keyed set a = -a where id % 3 = 1;
         update keyed set id = id + 1000 where id % 7 = 0; delete from keyed where id = (select min(id) from keyed)';
    create table refusals (what text);";

/// A step of identity at a time, with changes after each.
#[tokio::test]
async fn an_identity_may_change_while_rows_change() {
    let script = "
        select touch('default ROUND');
        alter table keyed replica identity full; select touch('full ROUND');
        alter table keyed replica identity using index keyed_a_key; select touch('index ROUND');
        alter table keyed replica identity nothing;
        insert into keyed values (500 + ROUND, 500 + ROUND, 'nobody knows me');
        alter table keyed replica identity full; select touch('full again ROUND');
        alter table keyed replica identity default; select touch('default again ROUND');";
    Case::new("identities").schema(IDENTITIES).script(script).covering(&[0, 1]).with_deaths().moves().await;
}

/// What nothing identifies the source itself refuses to update, as long as it publishes updates of the table.
const UNDER_NOTHING: &str = "
    alter table keyed replica identity nothing;
    do $$ begin perform touch('nothing'); exception when object_not_in_prerequisite_state then insert into refusals values (sqlerrm); end $$;
    alter table keyed replica identity default; select touch('default again ROUND');";

#[tokio::test]
async fn an_update_under_identity_nothing_is_refused_by_the_source() {
    let case = Case::new("under_nothing").schema(IDENTITIES).script(UNDER_NOTHING).covering(&[1]).only(Role::Owner);
    case.moves_and(async |moved| {
        let refused = "select count(*) from refusals where what like '%replica identity%'";
        assert_eq!(moved.to.query_string(refused).await, "3");
    })
    .await;
}

/// Where schema changes are captured, the table leaves the publication of updates with its identity, so that the source does
/// not refuse. What is updated then is copied once something identifies the rows again.
#[tokio::test]
async fn an_update_under_identity_nothing_arrives_with_the_next_identity() {
    let case = Case::new("unseen").schema(IDENTITIES).script(UNDER_NOTHING).covering(&[0]).only(Role::Superuser);
    case.moves().await;
}

/// Rows go where their columns are, and a column that the source does not have gets its default.
#[tokio::test]
async fn a_target_made_by_hand_may_have_other_columns_besides() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute("create table t (gone int, id int primary key, a text, b numeric); alter table t drop gone; insert into t values (1, 'a', 1.10)").await;
    let pgtandem = Pgtandem::new(&from, &to, "by_hand").env("PGTANDEM_COPY_METHOD", "none");
    let holding = pgtandem.spawn(&["snapshot"]);
    wait_until("the snapshot is printed", PATIENCE, async || holding.stdout().contains("snapshot ")).await;
    to.execute("create table t (b numeric, extra text default 'own', a text, n int generated always as (id * 2) stored, id int primary key, at timestamptz default now()); insert into t (id, a, b) values (1, 'a', 1.10)").await;
    holding.terminate();
    assert_eq!(holding.wait(PATIENCE).await.code, Some(0));
    let mut daemon = pgtandem.spawn(&["run"]);
    following(&mut daemon, PATIENCE).await;

    from.execute("insert into t values (2, 'two', 2.20), (3, null, null); update t set id = 10, b = 1.1 where id = 1; delete from t where id = 3; update t set a = a || '!'").await;

    cut_over(&pgtandem, daemon).await;
    let rows = to.query_strings("select id, a, b, extra, n, at is not null from t order by id").await;
    assert_eq!(rows, ["2|two!|2.20|own|4|t", "10|a!|1.1|own|20|t"]);
}

/// The stream names partitions, so that those of the target must be the same; it stops before a row is applied.
#[tokio::test]
async fn a_target_with_other_partitions_is_named() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    let table = "create table p (id int primary key, v text) partition by range (id)";
    from.execute(&format!("{table}; create table p_low partition of p for values from (0) to (10); create table p_high partition of p for values from (10) to (100)")).await;
    let pgtandem = Pgtandem::new(&from, &to, "apart").env("PGTANDEM_COPY_METHOD", "none");
    let holding = pgtandem.spawn(&["snapshot"]);
    wait_until("the snapshot is printed", PATIENCE, async || holding.stdout().contains("snapshot ")).await;
    to.execute(&format!("{table}; create table p_all partition of p default")).await;
    holding.terminate();
    assert_eq!(holding.wait(PATIENCE).await.code, Some(0));
    let stopped = pgtandem.run(&["run"]).await;
    assert_eq!(stopped.code, Some(4), "{stopped}");
    assert!(stopped.stderr.contains("TABLE p ") || stopped.stderr.contains("public.p_"), "{stopped}");
}

/// Everything that may be done to a partitioned table without a change of the schema, from the top and from below.
#[tokio::test]
async fn truncates_reach_exactly_what_they_reached() {
    let schema = "
        create table p (id int primary key, v text) partition by range (id);
        create table p_1 partition of p for values from (0) to (100);
        create table p_2 partition of p for values from (100) to (200) partition by list (id);
        create table p_2_rest partition of p_2 default;
        create table refers (id serial primary key, p int references p);
        create table one (id serial primary key, v text); create table two (id serial primary key, one int references one);
        create table three (id serial primary key, two int references two, me int references three);
        create table parent (id int primary key); create table child (more text) inherits (parent);
        alter table child replica identity full;
        create function fill(r int) returns void language sql as $$
            insert into p select i, 'r' || r from generate_series(1, 199) i on conflict (id) do nothing;
            insert into refers (p) select 150; insert into one (v) select 'r' || r from generate_series(1, 5);
            insert into two (one) select id from one; insert into three (two, me) select id, null from two; update three set me = id;
            insert into parent select i from generate_series(10 * r, 10 * r + 5) i on conflict do nothing; insert into child values (-r, 'c') $$;
        select fill(0);";
    let script = "
        select fill(ROUND);
        truncate refers; truncate p_1 cascade;
        select fill(ROUND); truncate p_2 cascade;
        select fill(ROUND); truncate p cascade; select fill(ROUND);
        truncate one cascade; select fill(ROUND);
        truncate three, two, one restart identity; select fill(ROUND);
        begin; truncate only parent; insert into parent values (-ROUND * 100); savepoint s; truncate parent; rollback to s; commit;
        begin; truncate child; select fill(ROUND); truncate three restart identity; rollback;";
    Case::new("truncates").schema(schema).script(script).covering(&[0, 4]).also_by_subscription().moves().await;
}
