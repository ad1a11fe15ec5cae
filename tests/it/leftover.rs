//! What the stream does not carry arrives all the same: rows of unlogged tables, large objects, materialized views, and what
//! updates did to tables without a replica identity.

use crate::harness::{
    Cluster, Database, Finished, PASSWORD, PATIENCE, Pgtandem, Running, assert_same, versions_under_test, wait_until,
};

mod came;
mod objects;
mod unkeyed;
mod unlogged;

/// Two servers and a database on each.
struct Sides {
    servers: (Cluster, Cluster),
    from: Database,
    to: Database,
    pgtandem: Pgtandem,
}

impl Sides {
    async fn new((one, two): (u16, u16)) -> Self {
        let servers = tokio::join!(Cluster::start(one), Cluster::start(two));
        let (from, to) = (servers.0.create_database("app").await, servers.1.create_database("app").await);
        Self { pgtandem: Pgtandem::new(&from, &to, "app"), servers, from, to }
    }

    /// Roles that own their database and nothing more do the moving, and own what is made with [`Sides::as_owner`].
    async fn without_a_superuser(versions: (u16, u16)) -> Self {
        let mut sides = Self::new(versions).await;
        for (server, database) in [(&sides.servers.0, &sides.from), (&sides.servers.1, &sides.to)] {
            server.execute(&format!("create role app login replication password '{PASSWORD}'")).await;
            server.execute("alter database app owner to app").await;
            database.execute("grant all on schema public to app").await;
        }
        sides.pgtandem = Pgtandem::new(&sides.as_owner(), &sides.to.with_user("app", PASSWORD), "app");
        sides
    }

    fn as_owner(&self) -> Database {
        self.from.with_user("app", PASSWORD)
    }

    /// With these lines of configuration.
    fn configured(mut self, text: &str) -> Self {
        self.pgtandem = self.pgtandem.config(text);
        self
    }

    async fn following(&self) -> Running {
        let daemon = self.pgtandem.spawn(&["run"]);
        self.follows(&daemon).await;
        daemon
    }

    /// Waits until this daemon takes requests: nobody else holds the move any more.
    async fn follows(&self, daemon: &Running) {
        let takes = "select count(*) > 0 from pg_stat_activity where application_name = 'pgtandem app requests'
                     and backend_start > (select max(backend_start) from pg_stat_activity
                                          where application_name = 'pgtandem app lock')";
        wait_until("the move follows", PATIENCE, async || {
            let log = daemon.stderr();
            log.contains("error:") || log.contains("phase") && self.to.query_string(takes).await == "t"
        })
        .await;
        assert!(!daemon.stderr().contains("error:"), "{}", daemon.stderr());
    }

    /// The cutover happens, and the daemon ends well; returns what was printed.
    async fn cut_over(&self, daemon: Running) -> String {
        let done = self.ask("3m").await;
        assert_eq!(done.code, Some(0), "{done}\n{}", daemon.stderr());
        let ended = daemon.wait(PATIENCE).await;
        assert_eq!(ended.code, Some(0), "{ended}");
        done.stdout
    }

    async fn ask(&self, timeout: &str) -> Finished {
        self.pgtandem.spawn(&["cutover", "--timeout", timeout]).wait(4 * PATIENCE).await
    }

    async fn same(&self) {
        assert_same(&self.from, &self.to).await;
    }

    /// The detail of a step of the newest cutover, as the journal has it.
    async fn detail(&self, step: &str) -> String {
        self.to
            .query_string(&format!(
                "select coalesce(detail, '') from pgtandem.cutover_step where name = '{step}'
                 and cutover_id = (select max(id) from pgtandem.cutover)"
            ))
            .await
    }

    /// Waits until a step of the newest cutover is under way.
    async fn wait_for_step(&self, step: &str) {
        let running = format!(
            "select count(*) from pgtandem.cutover_step where name = '{step}' and state = 'running'
             and cutover_id = (select max(id) from pgtandem.cutover)"
        );
        wait_until(&format!("step {step}"), PATIENCE, async || self.to.query_string(&running).await == "1").await;
    }
}

/// The number before these words.
fn number_before(text: &str, words: &str) -> u64 {
    let (before, _) = text.split_once(words).unwrap_or_else(|| panic!("no {words:?} in {text:?}"));
    before.split(|c: char| !c.is_ascii_digit()).next_back().and_then(|n| n.parse().ok()).expect("a number")
}

/// Views are as of the moment before the fence, each after those that it reads.
#[tokio::test]
async fn materialized_views_are_refreshed_before_the_fence() {
    let sides = Sides::without_a_superuser(versions_under_test()).await;
    sides
        .as_owner()
        .execute(
            "create table t (id int primary key); insert into t select generate_series(1, 10);
             create materialized view a_last as select 0 as n;
             create materialized view z_first as select count(*) n from t;
             create view between as select n from z_first;
             drop materialized view a_last;
             create materialized view a_last as select n from between;
             create materialized view never as select * from t with no data",
        )
        .await;
    let daemon = sides.following().await;
    sides.from.execute("insert into t select generate_series(11, 30)").await;
    wait_until("the rows arrive", PATIENCE, async || sides.to.query_string("select count(*) from t").await == "30")
        .await;
    assert_eq!(sides.to.query_string("select n from a_last").await, "10");

    sides.cut_over(daemon).await;

    assert_eq!(sides.detail("refresh").await, "2 materialized views");
    assert_eq!(sides.to.query_string("select n from a_last").await, "30");
    let filled = "select relispopulated from pg_class where relname = 'never'";
    assert_eq!(sides.to.query_string(filled).await, "f");
}

#[tokio::test]
async fn views_are_left_alone_where_the_configuration_says_so() {
    let sides = Sides::new(versions_under_test()).await.configured("[cutover]\nrefresh = false");
    sides
        .from
        .execute("create table t (id int primary key); create materialized view m as select count(*) n from t")
        .await;
    let daemon = sides.following().await;
    sides.from.execute("insert into t values (1)").await;
    let printed = sides.cut_over(daemon).await;
    assert!(printed.contains("cutover.refresh = false"), "{printed}");
    assert_eq!(sides.to.query_string("select n from m").await, "0");
}

/// A view that fails only now refuses the cutover by its name, and following goes on.
#[tokio::test]
async fn a_view_that_cannot_be_refreshed_refuses_the_cutover() {
    let sides = Sides::new(versions_under_test()).await;
    sides
        .from
        .execute("create table t (id int primary key); create materialized view inverse as select 1 / id as i from t")
        .await;
    let daemon = sides.following().await;
    sides.from.execute("insert into t values (0)").await;
    let refused = sides.ask("20s").await;
    assert!(refused.code == Some(1) && refused.stderr.contains("public.inverse"), "{refused}");
    sides.from.execute("update t set id = 2").await;
    sides.cut_over(daemon).await;
    assert_eq!(sides.to.query_string("select i from inverse").await, "0");
}

/// Every kind of sequence, those too that a narrowed scope does not name and that its tables need.
#[tokio::test]
async fn sequences_arrive_where_they_stand_also_under_a_narrowed_scope() {
    let sides = Sides::without_a_superuser(versions_under_test()).await.configured("[move]\ninclude = ['public.t*']");
    sides
        .as_owner()
        .execute(
            r#"create sequence free_one start 50; create sequence untouched start 7;
               create table t (id serial primary key, n int default nextval('free_one'));
               create table "t Odd ""x" ("Id ""y" bigint generated always as identity primary key);
               create table other (id serial primary key);
               create sequence "t down ""q" increment -5 maxvalue 100 minvalue -100 start 100 cycle;
               create sequence t_round minvalue 1 maxvalue 3 cycle;
               insert into t select from generate_series(1, 3)"#,
        )
        .await;
    let daemon = sides.following().await;
    sides
        .from
        .execute(
            r#"insert into t select from generate_series(1, 4); insert into "t Odd ""x" select from generate_series(1, 9);
               select nextval('"t down ""q"') from generate_series(1, 45); select nextval('t_round') from generate_series(1, 5);
               insert into other select from generate_series(1, 5)"#,
        )
        .await;
    sides.cut_over(daemon).await;
    let (ours, theirs) = (positions(&sides.from).await, positions(&sides.to).await);
    assert_eq!(theirs, ours);
    assert!(ours.contains(&"untouched 7 f".to_owned()) && ours.contains(&"free_one 56 t".to_owned()), "{ours:?}");
    assert!(!theirs.iter().any(|one| one.starts_with("other")), "{theirs:?}");
}

/// Name, value and whether it was handed out, without the sequence of the table that stays behind.
async fn positions(database: &Database) -> Vec<String> {
    let names = "select relname from pg_class where relkind = 'S' and relnamespace = 'public'::regnamespace
                 and relname <> 'other_id_seq' order by 1";
    let mut found = Vec::new();
    for name in database.query_strings(names).await {
        let quoted = name.replace('"', "\"\"");
        let at = database
            .query_string(&format!("select last_value || ' ' || is_called::text::char from public.\"{quoted}\""))
            .await;
        found.push(format!("{name} {at}"));
    }
    found
}
