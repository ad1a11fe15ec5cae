//! `copy.method = "dump"`: what is seen of it while it goes on, what a death costs, and what becomes of the archive.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

use crate::harness::{
    Cluster, Database, PATIENCE, Pgtandem, Running, assert_same, client_program, versions_under_test, wait_until,
};

/// The first and the last table of an archive in its own order, and one that has nothing in it.
const CONTENT: &str = "create table a_first (id int primary key, v text);
    insert into a_first select i, 'first' from generate_series(1, 1000) i;
    create table m_empty (id int primary key);
    create table z_last (id int primary key, v text);
    insert into z_last select i, 'last' from generate_series(1, 1000) i";

const ARCHIVE: &str = "pgtandem-app.dump";

/// A source with content, an empty target, and a folder that outlives the daemon.
struct Sides {
    _clusters: (Cluster, Cluster),
    from: Database,
    to: Database,
    pgtandem: Pgtandem,
    folder: TempDir,
}

impl Sides {
    async fn with(versions: (u16, u16), content: &str, copy: &str) -> Self {
        let clusters = (Cluster::start(versions.0).await, Cluster::start(versions.1).await);
        let (from, to) = (clusters.0.create_database("app").await, clusters.1.create_database("app").await);
        from.execute(content).await;
        let folder = tempfile::tempdir().unwrap();
        let pgtandem = Pgtandem::new(&from, &to, "app")
            .working_in(folder.path())
            .config(&format!("[copy]\nmethod = \"dump\"\n{copy}\n[follow]\nddl = \"stop\"\n"));
        Self { _clusters: clusters, from, to, pgtandem, folder }
    }

    fn archive(&self) -> PathBuf {
        self.folder.path().join(ARCHIVE)
    }

    /// A pg_restore that waits before it loads rows until it may: until the file `go` is there.
    fn with_a_restore_that_waits(&mut self) -> TempDir {
        let programs = tempfile::tempdir().unwrap();
        let at = |name: &str| programs.path().join(name);
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in *--data-only*) touch '{}'; while [ ! -e '{}' ]; do sleep 0.01; done;; esac\nexec '{}' \"$@\"\n",
            at("reached").display(),
            at("go").display(),
            client_program(18, "pg_restore").display()
        );
        std::fs::write(at("pg_restore"), script).unwrap();
        std::fs::set_permissions(at("pg_restore"), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink(client_program(18, "pg_dump"), at("pg_dump")).unwrap();
        let path = format!("{}:{}", programs.path().display(), std::env::var_os("PATH").unwrap().display());
        self.pgtandem = self.pgtandem.clone().env("PATH", path);
        programs
    }

    async fn status(&self) -> serde_json::Value {
        let status = self.pgtandem.run(&["status", "--json"]).await;
        serde_json::from_str(&status.stdout).unwrap_or_else(|e| panic!("{e}: {status}"))
    }

    async fn states(&self) -> Vec<String> {
        self.to.query_strings("select table_name || ' ' || state from pgtandem.copy_table order by 1").await
    }

    /// Where the rows of a table lie: emptying it makes another file.
    async fn file_of(&self, table: &str) -> String {
        self.to.query_string(&format!("select pg_relation_filenode('{table}')::text")).await
    }

    async fn arrives(&self, mut daemon: Running) {
        daemon.wait_for_log("entering phase follow", PATIENCE).await;
        let done = self.pgtandem.run(&["cutover", "--timeout", "60s"]).await;
        assert_eq!(done.code, Some(0), "{done}\n{}", daemon.stderr());
        assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));
        assert_same(&self.from, &self.to).await;
    }
}

/// Kills the daemon in the middle of the restore, with the first table finished and the last one not. Returns the session that holds that
/// one, and the folder of the programs.
async fn broken_off(sides: &mut Sides) -> (tokio_postgres::Client, TempDir) {
    let programs = sides.with_a_restore_that_waits();
    let mut daemon = sides.pgtandem.spawn(&["run"]);
    wait_until("pg_restore begins", PATIENCE, async || programs.path().join("reached").exists()).await;
    let blocker = sides.to.connect().await;
    blocker.batch_execute("begin; lock table z_last in access exclusive mode").await.unwrap();
    std::fs::write(programs.path().join("go"), "").unwrap();
    daemon.wait_for_log("copied public.a_first", PATIENCE).await;
    daemon.kill();
    (blocker, programs)
}

async fn restored_by_halves(copy: &str) {
    // 17 and later programs are not for targets before 17.
    let mut sides = Sides::with((16, 17), CONTENT, copy).await;
    let (blocker, _programs) = broken_off(&mut sides).await;
    assert!(sides.states().await.contains(&"a_first copied".to_owned()), "{:?}", sides.states().await);
    assert!(sides.states().await.contains(&"z_last copying".to_owned()), "{:?}", sides.states().await);
    let status = sides.status().await;
    assert!(status["copy"]["tables_done"].as_u64().is_some_and(|done| (1..3).contains(&done)), "{status}");
    let before = sides.file_of("a_first").await;
    blocker.batch_execute("rollback").await.unwrap();
    // When the source changes and the daemon is started again, then nothing is dumped, and only what is left is restored.
    sides.from.execute("update a_first set v = 'changed' where id <= 10; delete from z_last where id > 900").await;
    let mut daemon = sides.pgtandem.spawn(&["run"]);
    daemon.wait_for_log("going on with the restore", PATIENCE).await;
    daemon.wait_for_log("entering phase follow", PATIENCE).await;
    assert!(!daemon.stderr().contains("dumping rows into"), "{}", daemon.stderr());
    assert_eq!(sides.file_of("a_first").await, before, "the first table was restored again");
    sides.arrives(daemon).await;
}

#[tokio::test]
async fn a_restore_that_was_broken_off_goes_on_with_what_is_left() {
    restored_by_halves("workers = 4").await;
}

#[tokio::test]
async fn a_restore_by_one_worker_that_was_broken_off_goes_on_with_what_is_left() {
    restored_by_halves("workers = 1").await;
}

/// Where the archive is gone with its container, the tables that it did not bring come from the source.
#[tokio::test]
async fn an_archive_that_is_gone_in_the_middle_is_not_needed() {
    let mut sides = Sides::with((16, 17), CONTENT, "").await;
    let (blocker, _programs) = broken_off(&mut sides).await;
    blocker.batch_execute("rollback").await.unwrap();
    std::fs::remove_dir_all(sides.archive()).unwrap();
    sides.from.execute("update a_first set v = 'changed' where id <= 10; delete from z_last where id > 900").await;
    let before = sides.file_of("a_first").await;
    let mut daemon = sides.pgtandem.spawn(&["run"]);
    daemon.wait_for_log("entering phase follow", PATIENCE).await;
    assert_eq!(sides.file_of("a_first").await, before);
    sides.arrives(daemon).await;
}

#[tokio::test]
async fn an_archive_that_is_complete_is_gone_on_with_and_a_damaged_one_is_made_again() {
    let mut sides = Sides::with((16, 17), CONTENT, "keep_archive = true").await;
    let programs = sides.with_a_restore_that_waits();
    let until_it_restores = async |sides: &Sides| {
        let reached = programs.path().join("reached");
        let daemon = sides.pgtandem.spawn(&["run"]);
        wait_until("pg_restore begins", PATIENCE, async || reached.exists()).await;
        std::fs::remove_file(reached).unwrap();
        daemon.kill().stderr
    };
    assert!(until_it_restores(&sides).await.contains("dumping rows into"));
    let again = until_it_restores(&sides).await;
    assert!(!again.contains("dumping rows into") && again.contains("restoring rows from"), "{again}");
    // When a file of it is gone
    let rows = std::fs::read_dir(sides.archive().join("rows")).unwrap();
    let file = rows.map(|entry| entry.unwrap().path()).find(|path| path.extension().is_some_and(|e| e == "gz"));
    std::fs::remove_file(file.unwrap()).unwrap();
    let damaged = until_it_restores(&sides).await;
    assert!(damaged.contains("the archive is not what it was") && damaged.contains("dumping rows into"), "{damaged}");
    // then the next one is as good as new.
    std::fs::write(programs.path().join("go"), "").unwrap();
    let daemon = sides.pgtandem.spawn(&["run"]);
    sides.arrives(daemon).await;
    assert!(sides.archive().join("rows/toc.dat").is_file(), "it was to be kept");
}

#[tokio::test]
async fn an_archive_is_removed_once_its_rows_are_on_the_target() {
    let sides = Sides::with(versions_under_test(), CONTENT, "").await;
    let copied = sides.pgtandem.run(&["run", "--until", "copy"]).await;
    assert_eq!(copied.code, Some(0), "{copied}");
    assert!(copied.stderr.contains("removed the archive"), "{copied}");
    assert!(!sides.archive().exists(), "{:?}", std::fs::read_dir(sides.archive()));
    sides.arrives(sides.pgtandem.spawn(&["run"])).await;
}

/// Rows that take some seconds in either step: much text for pg_dump to pack, and a slow check for pg_restore.
const SLOW: &str = "create table small (id int primary key); insert into small values (1);
    create table packed (id int primary key, v text);
    insert into packed select i, (select string_agg(md5(i::text || j), '') from generate_series(1, 64) j)
        from generate_series(1, 40000) i;
    create function slow(id int) returns bool language sql volatile as $$
        select case when current_setting('application_name') like '% restore' then pg_sleep(0.02) is not null else true end $$;
    create table checked (id int primary key, constraint slowly check (public.slow(id)));
    insert into checked select generate_series(1, 200)";

#[tokio::test]
async fn both_steps_of_an_archive_can_be_watched() {
    let (sides, mut seen) = (Sides::with((16, 17), SLOW, "workers = 2").await, Vec::new());
    let mut daemon = sides.pgtandem.spawn(&["run", "--until", "copy"]);
    daemon.wait_for_log("dumping rows into", PATIENCE).await;
    while daemon.is_running() {
        let status = sides.status().await;
        let table = |name: &str| {
            let tables = status["tables"].as_array().unwrap();
            tables.iter().find(|table| table["name"] == name).cloned().unwrap_or_default()
        };
        let restoring = daemon.stderr().contains("restoring rows from");
        seen.push((restoring, table("packed"), table("checked"), status["copy"].clone()));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let ended = daemon.wait(PATIENCE).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    let bytes = |table: &serde_json::Value| table["bytes"].as_u64().unwrap_or(0);
    // While it is dumped, what pg_dump has read is seen, and nothing is copied.
    let dumping = seen.iter().filter(|(restoring, packed, _, _)| !restoring && bytes(packed) > 0);
    let dumping: Vec<_> = dumping.collect();
    assert!(!dumping.is_empty(), "{seen:#?}");
    assert!(dumping.iter().all(|(_, packed, _, copy)| packed["state"] == "copying" && copy["tables_done"] == 0));
    // While it is restored, the table in flight is seen beside those that are finished.
    let restoring = seen.iter().find(|(restoring, packed, checked, _)| {
        *restoring && packed["state"] == "copied" && checked["state"] == "copying" && bytes(checked) > 0
    });
    assert!(restoring.is_some(), "{seen:#?}");
    // The log tells both, and what COPY printed of a table is known to the byte.
    for line in ["dumped public.packed", "the archive is complete", "copied public.packed", "copied public.checked"] {
        assert!(ended.stderr.contains(line), "{line}: {ended}");
    }
    let printed = "select sum(length(id::text || E'\t' || v || E'\n'))::text from packed";
    let recorded = "select bytes::text from pgtandem.copy_table where table_name = 'packed'";
    assert_eq!(sides.to.query_string(recorded).await, sides.from.query_string(printed).await);
    let rows = "select string_agg(table_name || ' ' || rows, ', ' order by table_name) from pgtandem.copy_table";
    assert_eq!(sides.to.query_string(rows).await, "checked 200, packed 40000, small 1");
}

/// Sources before 14 do not show how far a COPY is: finished tables are seen.
#[tokio::test]
async fn an_archive_of_an_old_source_is_watched_table_by_table() {
    let sides = Sides::with((13, 18), CONTENT, "").await;
    let copied = sides.pgtandem.run(&["run", "--until", "copy"]).await;
    assert_eq!(copied.code, Some(0), "{copied}");
    for line in ["dumped public.a_first", "dumped public.m_empty", "copied public.z_last"] {
        assert!(copied.stderr.contains(line), "{line}: {copied}");
    }
    sides.arrives(sides.pgtandem.spawn(&["run"])).await;
}
