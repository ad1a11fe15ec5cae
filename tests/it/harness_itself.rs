//! The harness keeps its promises: what the other tests rely on.

use std::process::{Command, Stdio};

use crate::harness::{
    Cluster, Database, PATIENCE, Pgtandem, Stop, VERSIONS, assert_same, assert_same_catalog, catalog_differences,
    client_program, differences, versions_under_test, wait_until,
};

/// Where the test that gets killed writes down the data directory of its cluster.
const VICTIM: &str = "HARNESS_VICTIM";

#[tokio::test]
async fn every_version_starts_at_the_same_time() {
    let starting = VERSIONS.map(|version| tokio::spawn(Cluster::start(version)));
    for (task, version) in starting.into_iter().zip(VERSIONS) {
        let cluster = task.await.expect("start");
        let answer = cluster.query_strings("show server_version").await;
        assert!(answer[0].starts_with(&format!("{version}.")), "{answer:?}");
        assert_eq!(cluster.query_strings("show wal_level").await, ["logical"]);
    }
}

#[tokio::test]
async fn a_crash_keeps_what_was_committed_and_nothing_else() {
    let mut cluster = Cluster::start(16).await;
    cluster.execute("create table t (id int); insert into t values (1)").await;
    let open = cluster.connect().await;
    open.batch_execute("begin; insert into t values (2)").await.expect("an open transaction");

    cluster.crash().await;
    assert!(cluster.database("postgres").try_connect().await.is_err());
    cluster.start_again().await;

    assert!(cluster.log().contains("was not properly shut down"));
    assert_eq!(cluster.query_strings("select id from t").await, ["1"]);
}

#[tokio::test]
async fn a_restart_keeps_the_port_and_takes_new_settings() {
    let mut cluster = Cluster::builder(13).set("max_replication_slots", "3").start().await;
    assert_eq!(cluster.query_strings("show max_replication_slots").await, ["3"]);
    let port = cluster.port();

    cluster.set("max_replication_slots", "5");
    cluster.set("application_name", "it's quoted");
    cluster.stop(Stop::Immediate).await;
    cluster.start_again().await;
    cluster.restart().await;

    assert_eq!(cluster.port(), port);
    assert_eq!(cluster.query_strings("show max_replication_slots").await, ["5"]);
}

#[tokio::test]
async fn a_reload_changes_who_may_log_in() {
    let cluster = Cluster::start(15).await;
    cluster.set_hba("host all all 127.0.0.1/32 reject\n");
    cluster.reload().await;
    let refusal = cluster.database("postgres").try_connect().await.expect_err("rejected");
    assert_eq!(refusal.code().map(tokio_postgres::error::SqlState::code), Some("28000"));
}

#[tokio::test]
async fn two_clusters_of_one_version_are_two_servers() {
    let (one, other) = tokio::join!(Cluster::start(15), Cluster::start(15));
    let identifier = "select system_identifier from pg_control_system()";
    assert_ne!(one.query_strings(identifier).await, other.query_strings(identifier).await);
    // The WAL carries the identifier too: recovery reads it.
    let mut one = one;
    one.execute("create table t as select generate_series(1, 1000) as id").await;
    one.crash().await;
    one.start_again().await;
    assert_eq!(one.query_strings("select count(*) from t").await, ["1000"]);
}

#[tokio::test]
async fn tls_is_verified_by_libpq_and_by_rustls() {
    let cluster = Cluster::builder(17).tls().start().await;
    let ssl = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";
    assert_eq!(cluster.query_strings(ssl).await, ["t"]);

    for version in [16, 18] {
        let psql = |url: String| async move {
            let psql = tokio::process::Command::new(client_program(version, "psql"))
                .args(["-XAtc", ssl, &url])
                .output()
                .await
                .expect("start psql");
            (String::from_utf8_lossy(&psql.stdout).into_owned(), String::from_utf8_lossy(&psql.stderr).into_owned())
        };
        let url = cluster.url("postgres", "postgres");
        assert_eq!(psql(url.clone()).await, ("t\n".to_owned(), String::new()), "psql {version}");

        let stranger = Cluster::builder(17).tls().start().await;
        let ca = |cluster: &Cluster| cluster.tls().ca.to_string_lossy().replace('/', "%2F");
        let distrusted = url.replace(&ca(&cluster), &ca(&stranger));
        assert_ne!(distrusted, url);
        assert!(psql(distrusted).await.1.contains("certificate verify failed"), "psql {version}");
    }
}

#[tokio::test]
async fn nothing_is_left_after_the_end() {
    let mut crashed = Cluster::start(18).await;
    let running = Cluster::start(14).await;
    crashed.crash().await;
    let folders = [crashed.data(), running.data()];
    let segments = folders.clone().map(|data| shared_memory_segment(&data));
    assert!(segments.iter().all(|id| shared_memory_segments().contains(id)));

    drop((crashed, running));

    for data in &folders {
        assert!(!data.parent().expect("folder of the cluster").exists());
        assert!(!works_in(data), "a process still works in {}", data.display());
    }
    assert!(segments.iter().all(|id| !shared_memory_segments().contains(id)));
}

#[tokio::test]
async fn nothing_is_left_after_the_test_process_is_killed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let note = folder.path().join("data");
    let mut victim = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "--ignored", "harness_itself::keeps_a_cluster_until_it_is_killed"])
        .env(VICTIM, &note)
        .stdout(Stdio::null())
        .spawn()
        .expect("start the victim");
    let noted = async || std::fs::read_to_string(&note).is_ok_and(|text| text.ends_with('\n'));
    wait_until("the victim's cluster is up", PATIENCE, noted).await;
    let data = std::path::PathBuf::from(std::fs::read_to_string(&note).expect("note").trim_end());
    let segment = shared_memory_segment(&data);
    assert!(works_in(&data));

    victim.kill().expect("kill the victim");
    victim.wait().expect("wait for the victim");

    let gone = async || !data.parent().expect("folder of the cluster").exists() && !works_in(&data);
    wait_until("its cluster is gone", PATIENCE, gone).await;
    assert!(!shared_memory_segments().contains(&segment));
}

#[tokio::test]
#[ignore = "run by the test above, which kills it"]
async fn keeps_a_cluster_until_it_is_killed() {
    let Some(note) = std::env::var_os(VICTIM) else { return };
    let cluster = Cluster::start(15).await;
    std::fs::write(note, format!("{}\n", cluster.data().display())).expect("write the note");
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn the_binary_runs_for_the_versions_that_were_asked_for() {
    let (source, target) = Cluster::pair().await;
    assert_eq!((source.version(), target.version()), versions_under_test());
    let program = Pgtandem::new(&source.database("postgres"), &target.database("postgres"), "app");
    let done = program.run(&["--version"]).await;
    assert_eq!(done.code, Some(0), "{done}");
    let killed = program.spawn(&["--version"]).kill();
    assert!(killed.code.is_none_or(|code| code == 0), "{killed}");
}

#[tokio::test]
async fn the_client_programs_reach_every_server_that_they_are_made_for() {
    for server in VERSIONS {
        let cluster = Cluster::start(server).await;
        cluster.execute("create table carried (id int)").await;
        for client in [16, 18].into_iter().filter(|&client| client >= server) {
            let dump = Command::new(client_program(client, "pg_dump"))
                .args(["--schema-only", "--dbname", &cluster.url("postgres", "postgres")])
                .output()
                .expect("start pg_dump");
            let printed = String::from_utf8_lossy(&dump.stdout);
            let said = String::from_utf8_lossy(&dump.stderr);
            assert!(dump.status.success(), "pg_dump {client} of {server}: {said}");
            assert!(printed.contains("CREATE TABLE public.carried"), "pg_dump {client} of {server}: {printed}");
        }
    }
}

fn shared_memory_segment(data: &std::path::Path) -> String {
    let text = std::fs::read_to_string(data.join("postmaster.pid")).expect("pid file");
    text.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)).expect("segment").to_owned()
}

fn shared_memory_segments() -> Vec<String> {
    let table = std::fs::read_to_string("/proc/sysvipc/shm").expect("list of segments");
    table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).map(str::to_owned).collect()
}

fn works_in(data: &std::path::Path) -> bool {
    let processes = std::fs::read_dir("/proc").expect("list processes").flatten();
    processes.into_iter().any(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == data))
}

#[tokio::test]
async fn differences_are_seen_row_by_row() {
    let cluster = Cluster::start(16).await;
    let (ours, theirs) = (cluster.create_database("ours").await, cluster.create_database("it's \"theirs\"").await);
    let same = "create schema \"A.b\"; create table \"A.b\".\"t'x\" (id int, \"Q q\" text, at timestamptz default '2024-02-29 12:00+02');
         insert into \"A.b\".\"t'x\" values (1, 'x'), (1, 'x'), (2, null), (3, '');
         create table parts (id int) partition by range (id);
         create table parts_1 partition of parts for values from (0) to (10);
         insert into parts values (1), (2); create table nothing (); insert into nothing default values;
         create sequence s; select nextval('s'); create extension hstore";
    both(&ours, &theirs, same).await;
    theirs.execute("alter database \"it's \"\"theirs\"\"\" set timezone = 'Asia/Tokyo'").await;
    assert_same(&ours, &theirs).await;

    // A duplicate less, NULL for '', a partition's row, a sequence, a table, a row without columns.
    ours.execute("create table extra (id int)").await;
    theirs
        .execute(
            "delete from \"A.b\".\"t'x\" where ctid = '(0,1)'; update \"A.b\".\"t'x\" set \"Q q\" = null where id = 3;
             update parts set id = 3 where id = 2; select nextval('s'); insert into nothing default values",
        )
        .await;
    let found = differences(&ours, &theirs).await;
    assert_eq!(found.len(), 5, "{found:#?}");
    let report = found.join("\n");
    for part in [
        "table public.extra is missing on the target",
        "2 rows only on the source, 1 only on the target",
        "only on the target: (,\"2024-02-29 10:00:00+00\",3)",
        "table public.parts: 1 rows only on the source",
        "sequence public.s: (last_value|is_called) 1|t on the source, 2|t on the target",
    ] {
        assert!(report.contains(part), "{part} not in {report}");
    }
}

#[tokio::test]
async fn differences_of_the_catalog_are_seen_one_by_one() {
    let cluster = Cluster::start(18).await;
    let (ours, theirs) = (cluster.create_database("ours").await, cluster.create_database("theirs").await);
    cluster.execute("create role somebody").await;
    let same = "create table t (id int primary key, v text default 'x', w int, constraint positive check (w > 0));
         create table r (id int references t); create index t_w on t (w); create index t_x on t ((w + 1)); create statistics st on v, w from t;
         create sequence s; create type mood as enum ('a', 'b'); create domain d as int check (value > 0);
         create view vw as select id from t; create policy p on t using (true);
         create function f() returns trigger language plpgsql as 'begin return new; end';
         create trigger tr before insert on t for each row execute function f();
         create rule ru as on update to t do also select 1";
    both(&ours, &theirs, same).await;
    assert_same_catalog(&ours, &theirs).await;

    for (change, back, seen) in [
        ("alter table t alter v set default 'y'", "alter table t alter v set default 'x'", "column public.t.v"),
        ("alter table t alter w set not null", "alter table t alter w drop not null", "column public.t.w"),
        ("alter table t alter v set storage external", "alter table t alter v set storage extended", "storage e"),
        ("alter table t alter w set statistics 7", "alter table t alter w set statistics -1", "statistics 7"),
        ("alter table t replica identity full", "alter table t replica identity default", "identity f"),
        ("alter table t owner to somebody", "alter table t owner to postgres", "owner somebody"),
        ("alter table t enable row level security", "alter table t disable row level security", "row security t"),
        ("alter table t set (fillfactor = 50)", "alter table t reset (fillfactor)", "fillfactor=50"),
        ("grant select on t to somebody", "revoke select on t from somebody", "somebody=SELECT"),
        ("grant select (v) on t to somebody", "revoke select (v) on t from somebody", "somebody=SELECT"),
        (
            "comment on column t.v is 'note'",
            "comment on column t.v is null",
            "comment on table column public.t.v: note",
        ),
        ("alter table t disable trigger tr", "alter table t enable trigger tr", "trigger tr on public.t state D"),
        ("alter table r disable trigger all", "alter table r enable trigger all", "trigger of r_id_fkey"),
        ("alter table t disable rule ru", "alter table t enable rule ru", "rule ru on public.t state D"),
        ("alter index t_x alter column 1 set statistics 5", "", "statistics 1:5"),
        ("alter statistics st set statistics 9", "", "statistics CREATE STATISTICS"),
        ("alter policy p on t using (false)", "", "policy p on public.t"),
        ("alter sequence s cycle", "", "cycle t"),
        ("alter sequence s owned by t.id", "", "owned by public.t.id a"),
        ("alter type mood add value 'c'", "", "labels {a,b,c}"),
        ("alter domain d set default 7", "", "default 7"),
        ("alter table t drop constraint positive, add constraint positive check (w > 0) not valid", "", "validated f"),
        ("alter table r drop constraint r_id_fkey", "", "constraint r_id_fkey"),
        ("create or replace view vw as select id + 0 as id from t", "", "view public.vw"),
        (
            "create or replace function f() returns trigger language plpgsql as 'begin return null; end'",
            "",
            "return null",
        ),
        ("alter default privileges grant select on tables to somebody", "", "default privileges"),
        ("create cast (mood as int) with inout", "", "cast (public.mood AS integer)"),
    ] {
        theirs.execute(change).await;
        let found = catalog_differences(&ours, &theirs).await.join("\n");
        assert!(found.contains(seen), "after {change}, {seen:?} is not in {found:?}");
        // Then it is taken back, or made on the other side too.
        if back.is_empty() {
            ours.execute(change).await;
        } else {
            theirs.execute(back).await;
        }
        assert_same_catalog(&ours, &theirs).await;
    }
}

async fn both(ours: &Database, theirs: &Database, sql: &str) {
    ours.execute(sql).await;
    theirs.execute(sql).await;
}
