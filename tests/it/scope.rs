//! `[move] include` and `exclude` with partitioned tables: whoever names one means its partitions, in every step of a move.

use crate::harness::{Cluster, Database, PATIENCE, Pgtandem, Running, assert_same};

/// Events in partitions of two levels, one of which has a schema and a sequence of its own, and a table beside them.
const CONTENT: &str = "create schema archive;
    create table events (id bigserial, year int not null, what text, primary key (id, year)) partition by range (year);
    create table events_2024 partition of events for values from (2024) to (2025);
    create table archive.old partition of events for values from (2000) to (2024) partition by range (year);
    create table archive.old_2023 partition of archive.old for values from (2023) to (2024);
    create table archive.old_2022 partition of archive.old for values from (2022) to (2023);
    create table account (id int primary key);
    insert into events (year, what) select 2022 + i % 3, 'first' from generate_series(1, 300) i;
    insert into account select generate_series(1, 10)";

const TABLES: &str = "select string_agg(relname, ' ' order by relname) from pg_class c
    join pg_namespace n on n.oid = relnamespace where nspname in ('public', 'archive') and relkind in ('r', 'p')";

struct Sides {
    _clusters: (Cluster, Cluster),
    from: Database,
    to: Database,
    pgtandem: Pgtandem,
}

impl Sides {
    async fn with(scope: &str) -> Self {
        let clusters = Cluster::pair().await;
        let (from, to) = (clusters.0.create_database("app").await, clusters.1.create_database("app").await);
        from.execute(CONTENT).await;
        let config = format!("[move]\n{scope}\n[cutover]\nverify = \"full\"\n");
        Self { pgtandem: Pgtandem::new(&from, &to, "app").config(&config), _clusters: clusters, from, to }
    }

    async fn following(&self) -> Running {
        let mut daemon = self.pgtandem.spawn(&["run"]);
        daemon.wait_for_log("entering phase follow", PATIENCE).await;
        daemon
    }

    async fn cut_over(&self, daemon: Running) {
        let done = self.pgtandem.run(&["cutover", "--timeout", "60s"]).await;
        assert_eq!(done.code, Some(0), "{done}\n{}", daemon.stderr());
        assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));
    }

    /// Whether the source refuses a write after the switch.
    async fn is_sealed(&self, statement: &str) -> bool {
        self.from.connect().await.batch_execute(statement).await.is_err()
    }
}

#[tokio::test]
async fn a_partitioned_table_that_is_included_moves_with_all_its_partitions() {
    let sides = Sides::with("include = [\"public.events\"]").await;
    let daemon = sides.following().await;
    // When rows come, change, and wander from one partition to another,
    sides
        .from
        .execute(
            "insert into events (year, what) select 2022 + i % 3, 'second' from generate_series(1, 30) i;
             update events set what = 'changed' where id % 7 = 0; update events set year = 2024 where id = 1;
             delete from archive.old_2022 where id % 5 = 0",
        )
        .await;
    sides.cut_over(daemon).await;
    // then all of them arrive, the sequence goes on, and nothing else came along.
    assert_eq!(sides.to.query_string(TABLES).await, "events events_2024 old old_2022 old_2023");
    sides.to.execute("insert into events (year, what) values (2023, 'on the target')").await;
    assert_eq!(sides.to.query_string("select max(id) from events").await, "331");
    sides
        .to
        .execute("delete from events where what = 'on the target'; create table account (id int primary key)")
        .await;
    sides.to.execute("insert into account select generate_series(1, 10)").await;
    assert!(sides.is_sealed("insert into archive.old_2023 (year, what) values (2023, 'too late')").await);
    assert!(!sides.is_sealed("update account set id = id").await, "it has not moved");
    assert_eq!(sides.pgtandem.run(&["clean", "--yes"]).await.code, Some(0));
    sides.to.execute("select setval('events_id_seq', 330)").await;
    assert_same(&sides.from, &sides.to).await;
}

#[tokio::test]
async fn a_partitioned_table_that_is_excluded_stays_with_all_its_partitions() {
    let sides = Sides::with("include = [\"public.*\", \"archive.*\"]\nexclude = [\"public.events\"]").await;
    let daemon = sides.following().await;
    sides
        .from
        .execute("insert into events (year, what) values (2024, 'second'); insert into account values (11)")
        .await;
    sides.cut_over(daemon).await;
    assert_eq!(sides.to.query_string(TABLES).await, "account");
    assert_eq!(sides.to.query_string("select count(*) from account").await, "11");
    assert!(!sides.is_sealed("insert into events (year, what) values (2023, 'later')").await, "it has not moved");
}

#[tokio::test]
async fn a_partition_moves_alone_under_the_tables_above_it() {
    let sides = Sides::with("include = [\"archive.old_2023\"]").await;
    let daemon = sides.following().await;
    sides
        .from
        .execute("insert into events (year, what) select 2022 + i % 3, 'second' from generate_series(1, 30) i")
        .await;
    sides.cut_over(daemon).await;
    assert_eq!(sides.to.query_string(TABLES).await, "events old old_2023");
    let rows = "select count(*) || ' ' || sum(id) from archive.old_2023";
    assert_eq!(sides.to.query_string(rows).await, sides.from.query_string(rows).await);
    // The key of the next row comes from the sequence of the table above.
    sides.to.execute("insert into events (year, what) values (2023, 'on the target')").await;
    assert_eq!(sides.to.query_string("select max(id) from events").await, "331");
}

#[tokio::test]
async fn a_partition_that_is_excluded_stays_behind_alone() {
    let sides = Sides::with("exclude = [\"archive.old_2022\"]").await;
    let daemon = sides.following().await;
    sides
        .from
        .execute("insert into events (year, what) select 2022 + i % 3, 'second' from generate_series(1, 30) i")
        .await;
    sides.cut_over(daemon).await;
    assert_eq!(sides.to.query_string(TABLES).await, "account events events_2024 old old_2023");
    let rows = "select count(*) || ' ' || sum(id) from events where year <> 2022";
    assert_eq!(sides.to.query_string(rows).await, sides.from.query_string(rows).await);
}

#[tokio::test]
async fn the_checks_look_at_the_partitions_of_an_included_table() {
    let sides = Sides::with("include = [\"public.log\"]").await;
    let log = "create table log (line text) partition by list (line); create table log_rest partition of log default";
    sides.from.execute(log).await;
    let checked = sides.pgtandem.run(&["check"]).await;
    assert!(checked.stdout.contains("public.log_rest") && !checked.stdout.contains("events"), "{checked}");
}
