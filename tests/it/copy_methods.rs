//! `copy.method` is about the first copy only: whatever came to the move later is copied from the source, and neither an
//! old archive nor rows of somebody else are taken for what the move wrote.

use tempfile::TempDir;

use crate::harness::{Cluster, Database, PATIENCE, Pgtandem, Running, assert_same, client_program, wait_until};

const CONTENT: &str = "create table account (id int primary key, owner text);
    insert into account select i, 'first' from generate_series(1, 100) i";
const NEW_TABLE: &str = "create table later (id int primary key, v text)";

/// A source with content, an empty target, and a folder that outlives the daemon.
struct Sides {
    _clusters: (Cluster, Cluster),
    from: Database,
    to: Database,
    pgtandem: Pgtandem,
    folder: TempDir,
}

impl Sides {
    async fn with(content: &str, method: &str) -> Self {
        let clusters = Cluster::pair().await;
        let (from, to) = (clusters.0.create_database("app").await, clusters.1.create_database("app").await);
        from.execute(content).await;
        let folder = tempfile::tempdir().unwrap();
        let pgtandem = Pgtandem::new(&from, &to, "app")
            .working_in(folder.path())
            .config(&format!("[copy]\nmethod = \"{method}\"\n[follow]\nddl = \"stop\"\n"));
        Self { _clusters: clusters, from, to, pgtandem, folder }
    }

    /// Changes that the first copy did not see, then a new table: the daemon stops until the target has it too.
    async fn a_table_is_added_while(&self, mut daemon: Running) {
        daemon.wait_for_log("entering phase follow", PATIENCE).await;
        self.from
            .execute("update account set owner = 'second' where id <= 50; delete from account where id > 90")
            .await;
        let applied = "select count(*) || ' ' || count(*) filter (where owner = 'second') from account";
        wait_until("the changes are applied", PATIENCE, async || self.to.query_string(applied).await == "90 50").await;
        self.from.execute(&format!("{NEW_TABLE}; insert into later values (1, 'before the copy')")).await;
        let stopped = daemon.wait(PATIENCE).await;
        assert!(stopped.code == Some(4) && stopped.stderr.contains("table_added"), "{stopped}");
        self.to.execute(NEW_TABLE).await;
    }

    /// The move goes on, carries what both tables see, and arrives whole.
    async fn it_arrives_whole(&self) {
        let mut daemon = self.pgtandem.spawn(&["run"]);
        daemon.wait_for_log("entering phase follow", PATIENCE).await;
        self.from
            .execute("insert into later values (2, 'streamed'); update account set owner = 'third' where id = 1")
            .await;
        let done = self.pgtandem.run(&["cutover", "--timeout", "60s"]).await;
        assert_eq!(done.code, Some(0), "{done}\n{}", daemon.stderr());
        assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));
        assert_same(&self.from, &self.to).await;
    }
}

#[tokio::test]
async fn a_table_that_is_new_while_following_does_not_bring_the_archive_back() {
    let mut sides = Sides::with(CONTENT, "dump").await;
    sides.pgtandem = sides.pgtandem.env("PGTANDEM_COPY_KEEP_ARCHIVE", "true");
    sides.a_table_is_added_while(sides.pgtandem.spawn(&["run"])).await;
    assert!(sides.folder.path().join("pgtandem-app.dump/rows").is_dir(), "the archive is there");
    sides.it_arrives_whole().await;
}

#[tokio::test]
async fn a_table_that_is_new_while_following_was_not_copied_by_hand() {
    let sides = Sides::with(CONTENT, "none").await;
    let holding = sides.pgtandem.spawn(&["snapshot"]);
    wait_until("the snapshot is printed", PATIENCE, async || holding.stdout().contains("snapshot ")).await;
    sides.to.execute(CONTENT).await;
    holding.terminate();
    assert_eq!(holding.wait(PATIENCE).await.code, Some(0));
    sides.a_table_is_added_while(sides.pgtandem.spawn(&["run"])).await;
    sides.it_arrives_whole().await;
}

/// What a tool does that changes a large table by filling another one and exchanging their names.
#[tokio::test]
async fn a_table_that_was_exchanged_for_a_new_one_is_not_published_in_its_place() {
    let sides = Sides::with(CONTENT, "copy").await;
    let mut daemon = sides.pgtandem.spawn(&["run"]);
    daemon.wait_for_log("entering phase follow", PATIENCE).await;
    daemon.terminate();
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));
    sides
        .from
        .execute(
            "create table account_new (like account including all); insert into account_new select id, 'new' from account;
             alter table account rename to account_old; alter table account_new rename to account",
        )
        .await;
    // Given that the target has a place for the old one too, as the daemon asks.
    sides.to.execute("create table account_old (like account including all)").await;
    let stopped = sides.pgtandem.run(&["run"]).await;
    assert!(stopped.code == Some(4) && stopped.stderr.contains("table_not_published"), "{stopped}");
}

/// Also where nothing at all was there to be copied by hand.
#[tokio::test]
async fn a_move_that_begins_without_tables_takes_the_first_one_in() {
    for method in ["dump", "none"] {
        let sides = Sides::with("create schema still_empty", method).await;
        if method == "none" {
            let holding = sides.pgtandem.spawn(&["snapshot"]);
            wait_until("the snapshot is printed", PATIENCE, async || holding.stdout().contains("snapshot ")).await;
            sides.to.execute("create schema still_empty").await;
            holding.terminate();
            assert_eq!(holding.wait(PATIENCE).await.code, Some(0));
        }
        let followed = sides.pgtandem.run(&["run", "--until", "follow"]).await;
        assert_eq!(followed.code, Some(0), "{followed}");
        sides.from.execute(&format!("{CONTENT}; {NEW_TABLE}; insert into later values (1, 'before the copy')")).await;
        sides.to.execute(&format!("create table account (id int primary key, owner text); {NEW_TABLE}")).await;
        sides.it_arrives_whole().await;
    }
}

#[tokio::test]
async fn an_archive_is_not_loaded_over_rows_of_someone_else() {
    let sides = Sides::with(CONTENT, "dump").await;
    // Given rows that came to the target after the schema did.
    let schema = sides.pgtandem.clone().env("PGTANDEM_COPY_METHOD", "none").run(&["run"]).await;
    assert!(schema.stderr.contains("no_snapshot"), "{schema}");
    sides.to.execute("insert into account values (7, 'somebody')").await;
    for _ in 0..2 {
        let refused = sides.pgtandem.run(&["run"]).await;
        assert!(refused.code == Some(4) && refused.stderr.contains("target_table_not_empty"), "{refused}");
        assert_eq!(sides.to.query_strings("select owner from account").await, ["somebody"]);
    }
    // When they are gone, then the archive that was made meanwhile is loaded.
    sides.to.execute("truncate account").await;
    let moved = sides.pgtandem.run(&["run", "--cutover-when-ready"]).await;
    assert_eq!(moved.code, Some(0), "{moved}");
    assert_same(&sides.from, &sides.to).await;
}

/// A rehearsal leaves its archive behind, with rows of that day.
#[tokio::test]
async fn the_archive_of_a_rehearsal_is_not_taken_for_the_move() {
    let mut sides = Sides::with(CONTENT, "dump").await;
    sides.pgtandem = sides.pgtandem.env("PGTANDEM_COPY_KEEP_ARCHIVE", "true");
    let rehearsal = sides.pgtandem.run(&["run", "--until", "copy"]).await;
    assert_eq!(rehearsal.code, Some(0), "{rehearsal}");
    assert_eq!(sides.pgtandem.run(&["clean", "--yes"]).await.code, Some(0));
    sides.to.execute("drop table account").await;
    sides.from.execute("update account set owner = 'after the rehearsal'").await;
    // When the daemon dies once it has a cut and before it has an archive of it
    let mut daemon = sides.pgtandem.spawn(&["run"]);
    daemon.wait_for_log("took the first cut", PATIENCE).await;
    daemon.kill();
    // then the next one dumps the rows again.
    let moved = sides.pgtandem.run(&["run", "--cutover-when-ready"]).await;
    assert_eq!(moved.code, Some(0), "{moved}");
    assert_same(&sides.from, &sides.to).await;
}

#[tokio::test]
async fn an_archive_holds_the_rows_that_the_copy_would_take() {
    let scratch = "create unlogged table scratch (v text); insert into scratch values ('of no worth')";
    let sides = Sides::with(&format!("{CONTENT}; {scratch}"), "dump").await;
    let copied = sides.pgtandem.run(&["run", "--until", "copy"]).await;
    assert_eq!(copied.code, Some(0), "{copied}");
    let rows = "select (select count(*) from account) || ' ' || (select count(*) from scratch)";
    assert_eq!(sides.to.query_string(rows).await, "100 0");
}

/// TRUNCATE leaves nothing of a table for those who look at it through an older snapshot, as pg_dump does.
#[tokio::test]
async fn an_archive_of_a_table_that_was_emptied_before_it_was_read_is_made_again() {
    use std::os::unix::fs::PermissionsExt;

    let mut sides = Sides::with(CONTENT, "dump").await;
    sides.from.execute("create table beside (id int); insert into beside values (1)").await;
    // Given a pg_dump that waits between the cut and its first look at a row.
    let programs = tempfile::tempdir().unwrap();
    let at = |name: &str| programs.path().join(name);
    let real = client_program(18, "pg_dump");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *--data-only*) touch '{}'; while [ ! -e '{}' ]; do sleep 0.01; done;; esac\nexec '{}' \"$@\"\n",
        at("reached").display(),
        at("go").display(),
        real.display()
    );
    std::fs::write(at("pg_dump"), script).unwrap();
    std::fs::set_permissions(at("pg_dump"), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink(client_program(18, "pg_restore"), at("pg_restore")).unwrap();
    let path = format!("{}:{}", programs.path().display(), std::env::var_os("PATH").unwrap().display());
    sides.pgtandem = sides.pgtandem.env("PATH", path);

    let mut daemon = sides.pgtandem.spawn(&["run"]);
    wait_until("pg_dump begins", PATIENCE, async || at("reached").exists()).await;
    sides
        .from
        .execute(
            "begin; update account set owner = 'last' where id = 1; truncate account;
             insert into account values (1000, 'new'); commit; delete from account where id = 2",
        )
        .await;
    std::fs::write(at("go"), "").unwrap();

    daemon.wait_for_log("table_rewritten", PATIENCE).await;
    daemon.wait_for_log("entering phase follow", PATIENCE).await;
    let done = sides.pgtandem.run(&["cutover", "--timeout", "60s"]).await;
    assert_eq!(done.code, Some(0), "{done}\n{}", daemon.stderr());
    assert_same(&sides.from, &sides.to).await;
}
