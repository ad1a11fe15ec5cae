//! The spool: while rows are copied, changes are kept here and the source may forget them; whatever dies, nothing is lost.
//!
//! The copy, and the application of changes, are held up by rows whose CHECK asks for a lock that the test has on the target.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use pgtandem::follow::Inflow;
use pgtandem::follow::spool::{Source, Spooling};
use pgtandem::postgres::pgoutput::Message;
use pgtandem::postgres::replication::Event;
use pgtandem::postgres::{Lsn, Server, Side};
use pgtandem::state::Store;
use pgtandem::telemetry::Telemetry;
use tokio_postgres::Client;

use crate::differential::case::{cut_over, following};
use crate::followed::get;
use crate::harness::{
    Cluster, ClusterBuilder, Database, PATIENCE, Pgtandem, Running, assert_same, config, differences, wait_until,
};
use crate::streamed::run;

/// Whoever writes a row to one of the last two waits while the test has a lock; `before_the_cut` holds the copy, and
/// `behind_the_cut` what follows.
const CONTENT: &str = "
    create function let_through(key int) returns bool language plpgsql as
        $$ begin perform pg_advisory_xact_lock_shared(key); return true; end $$;
    create type mood as enum ('calm', 'busy');
    create table t (id int primary key, v text, m mood default 'calm');
    create table no_key (line text);
    create table before_the_cut (id int primary key, check (let_through(1)));
    create table behind_the_cut (id int primary key, check (let_through(2)));
    insert into t select i, 'old' from generate_series(1, 100) i;
    insert into before_the_cut values (1)";

/// Two servers, a move with a spool between them, and what holds it up.
struct Stage {
    _source: Cluster,
    _target: Cluster,
    from: Database,
    to: Database,
    folder: tempfile::TempDir,
    pgtandem: Pgtandem,
    copy_gate: Client,
    apply_gate: Client,
    rounds: std::cell::Cell<u32>,
}

impl Stage {
    async fn new(versions: (u16, u16)) -> Self {
        Self::with(Cluster::builder(versions.0), versions.1).await
    }

    /// The copy will be held up.
    async fn with(source: ClusterBuilder, target: u16) -> Self {
        let (source, target) = tokio::join!(source.start(), Cluster::start(target));
        let (from, to) = (source.create_database("app").await, target.create_database("app").await);
        from.execute(CONTENT).await;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let pgtandem = Pgtandem::new(&from, &to, "app")
            .env("PGTANDEM_HTTP_LISTEN", "127.0.0.1:0")
            .env("PGTANDEM_FOLLOW_SPOOL", folder.path().join("spool"));
        let (copy_gate, apply_gate) = (to.connect().await, to.connect().await);
        run(&copy_gate, "select pg_advisory_lock(1)").await;
        Self { _source: source, _target: target, from, to, folder, pgtandem, copy_gate, apply_gate, rounds: 0.into() }
    }

    fn spool(&self) -> PathBuf {
        self.folder.path().join("spool").join("app")
    }

    fn segments(&self) -> usize {
        let Ok(entries) = fs::read_dir(self.spool()) else { return 0 };
        entries.filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|e| e == "spool")).count()
    }

    /// A daemon whose copy waits for the gate.
    async fn held_in_the_copy(&self) -> Running {
        let daemon = self.pgtandem.spawn(&["run"]);
        self.somebody_waits_for(1).await;
        daemon
    }

    async fn somebody_waits_for(&self, gate: u32) {
        let waiting = format!(
            "select count(*) from pg_locks where locktype = 'advisory' and objid = {gate} and not granted
             and pid in (select pid from pg_stat_activity)"
        );
        wait_until("somebody waits for the gate", PATIENCE, async || self.to.query_string(&waiting).await != "0").await;
    }

    async fn let_the_copy_go_on(&self) {
        run(&self.copy_gate, "select pg_advisory_unlock(1)").await;
    }

    async fn hold_what_follows(&self) {
        run(&self.apply_gate, "select pg_advisory_lock(2)").await;
    }

    async fn let_what_follows_go_on(&self) {
        run(&self.apply_gate, "select pg_advisory_unlock(2)").await;
    }

    /// Changes of every kind, other ones each time.
    async fn change(&self) {
        let round = self.rounds.get() + 1;
        self.rounds.set(round);
        let first = round * 1000;
        self.from
            .execute(&format!(
                "insert into t select i, repeat('x', 200) || i from generate_series({first}, {first} + 499) i;
                 update t set v = v || ' {round}', m = 'busy' where id % 3 = 0 and id < 1000000;
                 delete from t where id between {first} + 100 and {first} + 150;
                 insert into no_key select 'line {round}' from generate_series(1, 20);
                 insert into behind_the_cut values ({round})"
            ))
            .await;
        self.from
            .execute(&format!(
                "begin; truncate no_key; insert into no_key values ('after {round}'); savepoint s;
                 delete from t where id < 1000000; rollback to s; commit; begin; delete from t where id < 1000000; rollback"
            ))
            .await;
    }

    /// A daemon whose copy waits for the gate, and whose spool has no more room for what changed, which its log says like this.
    async fn has_no_room(&self, said: &str) -> Running {
        let mut daemon = self.held_in_the_copy().await;
        self.change().await;
        self.all_is_confirmed().await;
        self.from.execute("insert into t select i, repeat('y', 500) from generate_series(1000000, 1005000) i").await;
        daemon.wait_for_log(said, PATIENCE).await;
        wait_until("nothing is received", PATIENCE, async || !self.is_received().await).await;
        self.change().await;
        daemon
    }

    /// It dies, and finds no more room than before.
    async fn dies_without_room(&self, daemon: Running, said: &str) -> Running {
        daemon.kill();
        let mut daemon = self.held_in_the_copy().await;
        daemon.wait_for_log(said, PATIENCE).await;
        daemon
    }

    async fn is_received(&self) -> bool {
        let active = "select active from pg_replication_slots where slot_name = 'pgtandem_app'";
        self.from.query_string(active).await == "t"
    }

    async fn head(&self) -> String {
        self.from.query_string("select pg_current_wal_insert_lsn()").await
    }

    /// Waits until the source was told that it may forget everything up to here.
    async fn all_is_confirmed(&self) {
        let head = self.head().await;
        let confirmed = format!(
            "select confirmed_flush_lsn >= '{head}' from pg_replication_slots where slot_name = 'pgtandem_app'"
        );
        wait_until("the source may forget what was kept", PATIENCE, async || {
            self.from.query_string(&confirmed).await == "t"
        })
        .await;
    }

    async fn phase(&self) -> String {
        self.to.query_string("select phase from pgtandem.move").await
    }

    async fn become_the_same(&self, daemon: &mut Running) {
        wait_until("both sides hold the same", 2 * PATIENCE, async || {
            assert!(daemon.is_running(), "{}", daemon.stderr());
            differences(&self.from, &self.to).await.is_empty()
        })
        .await;
    }

    /// Both sides become the same, and nothing is left of the spool.
    async fn ends(&self, mut daemon: Running) {
        following(&mut daemon, 2 * PATIENCE).await;
        self.become_the_same(&mut daemon).await;
        self.change().await;
        self.all_is_confirmed().await;
        // What was confirmed may be in the spool once more: with a subscription, following goes back to it once.
        self.become_the_same(&mut daemon).await;
        wait_until("nothing is left of the spool", PATIENCE, async || self.segments() == 0).await;
        daemon.terminate();
        let ended = daemon.wait(PATIENCE).await;
        assert_eq!(ended.code, Some(0), "{ended}");
        assert!(!ended.stderr.contains(" ERROR "), "{ended}");
    }
}

async fn changes_are_kept_while_rows_are_copied(versions: (u16, u16)) {
    let stage = Stage::new(versions).await;
    let daemon = stage.held_in_the_copy().await;
    for _ in 0..3 {
        stage.change().await;
        stage.all_is_confirmed().await;
        assert_eq!(stage.phase().await, "copy");
    }
    assert!(stage.segments() > 0);
    let metrics = get(&daemon, "/metrics").await;
    let gauge = metrics.lines().find_map(|line| line.strip_prefix("pgtandem_queue_bytes{queue=\"spool\"} "));
    assert!(gauge.unwrap().parse::<f64>().unwrap() > 100_000.0, "{metrics}");
    stage.let_the_copy_go_on().await;
    stage.ends(daemon).await;
}

#[tokio::test]
async fn changes_are_kept_while_rows_are_copied_from_13() {
    changes_are_kept_while_rows_are_copied((13, 18)).await;
}

#[tokio::test]
async fn changes_are_kept_while_rows_are_copied_from_15() {
    changes_are_kept_while_rows_are_copied((15, 15)).await;
}

#[tokio::test]
async fn changes_are_kept_while_rows_are_copied_from_18() {
    changes_are_kept_while_rows_are_copied((18, 18)).await;
}

#[tokio::test]
async fn a_death_during_the_copy_loses_and_doubles_nothing() {
    let stage = Stage::new((16, 17)).await;
    for round in 0..4 {
        let daemon = stage.held_in_the_copy().await;
        stage.change().await;
        if round % 2 == 0 {
            stage.all_is_confirmed().await;
        }
        stage.change().await;
        daemon.kill();
        stage.change().await;
    }
    let daemon = stage.held_in_the_copy().await;
    stage.all_is_confirmed().await;
    stage.let_the_copy_go_on().await;
    stage.ends(daemon).await;
}

#[tokio::test]
async fn a_death_while_the_spool_is_played_loses_and_doubles_nothing() {
    deaths_while_it_is_played((15, 16), "1").await;
}

#[tokio::test]
async fn a_death_while_several_workers_play_it_loses_and_doubles_nothing() {
    deaths_while_it_is_played((18, 18), "3").await;
}

async fn deaths_while_it_is_played(versions: (u16, u16), workers: &str) {
    let mut stage = Stage::new(versions).await;
    stage.pgtandem = stage.pgtandem.clone().env("PGTANDEM_FOLLOW_WORKERS", workers);
    let mut daemon = stage.held_in_the_copy().await;
    for _ in 0..3 {
        stage.change().await;
        stage.all_is_confirmed().await;
    }
    stage.hold_what_follows().await;
    stage.let_the_copy_go_on().await;
    for _ in 0..3 {
        stage.somebody_waits_for(2).await;
        assert!(["catchup", "follow"].contains(&stage.phase().await.as_str()));
        stage.change().await;
        daemon.kill();
        stage.change().await;
        daemon = stage.pgtandem.spawn(&["run"]);
        daemon.wait_for_log("going on with the move", PATIENCE).await;
    }
    stage.let_what_follows_go_on().await;
    // And one somewhere on the way.
    wait_until("something arrived", PATIENCE, async || {
        stage.to.query_string("select count(*) > 1 from behind_the_cut").await == "t"
    })
    .await;
    daemon.kill();
    stage.ends(stage.pgtandem.spawn(&["run"])).await;
}

#[tokio::test]
async fn changes_are_kept_while_an_archive_is_restored() {
    let mut stage = Stage::new((16, 18)).await;
    stage.pgtandem = stage.pgtandem.clone().env("PGTANDEM_COPY_METHOD", "dump").working_in(stage.folder.path());
    let daemon = stage.held_in_the_copy().await;
    stage.change().await;
    stage.all_is_confirmed().await;
    daemon.kill();
    stage.change().await;
    let daemon = stage.held_in_the_copy().await;
    stage.all_is_confirmed().await;
    assert_eq!(stage.phase().await, "copy");
    stage.let_the_copy_go_on().await;
    stage.ends(daemon).await;
}

#[tokio::test]
async fn what_does_not_fit_stays_on_the_source() {
    let mut stage = Stage::new((14, 15)).await;
    stage.pgtandem = stage.pgtandem.clone().env("PGTANDEM_FOLLOW_SPOOL_MAX_BYTES", "1MiB");
    let said = "as much as follow.spool_max_bytes allows";
    let daemon = stage.has_no_room(said).await;
    let on_disk: u64 = fs::read_dir(stage.spool()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert!(on_disk < (1 << 20) + 4096, "{on_disk}");
    let daemon = stage.dies_without_room(daemon, said).await;
    stage.let_the_copy_go_on().await;
    stage.ends(daemon).await;
}

/// A small file system of its own.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf) -> Self {
        fs::create_dir_all(&at).unwrap();
        Self::succeeds(Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(&at));
        Self(at)
    }

    fn gets_room(&self) {
        Self::succeeds(Command::new("mount").args(["-o", "remount,size=64m"]).arg(&self.0));
    }

    fn succeeds(command: &mut Command) {
        assert!(command.status().unwrap().success(), "{command:?}");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let gone = Command::new("umount").arg("--lazy").arg(&self.0).status();
        if !gone.as_ref().is_ok_and(std::process::ExitStatus::success) {
            eprintln!("{} stays mounted: {gone:?}", self.0.display());
        }
    }
}

/// As root: `cargo test --test it a_full_disk -- --ignored`.
#[tokio::test]
#[ignore = "mounts a file system"]
async fn a_full_disk_leaves_the_rest_on_the_source() {
    let stage = Stage::new((14, 15)).await;
    let disk = Disk::mount(stage.folder.path().join("spool"));
    let said = "No space left on device";
    let daemon = stage.has_no_room(said).await;
    let daemon = stage.dies_without_room(daemon, said).await;
    disk.gets_room();
    wait_until("the spool goes on", 3 * PATIENCE, async || stage.is_received().await).await;
    stage.all_is_confirmed().await;
    stage.let_the_copy_go_on().await;
    stage.ends(daemon).await;
}

/// A source that keeps little: without the spool it gives up the slot.
#[tokio::test]
async fn a_source_that_keeps_little_wal_keeps_the_slot() {
    let source = Cluster::builder(16).set("max_slot_wal_keep_size", "32MB").set("max_wal_size", "64MB");
    let stage = Stage::with(source, 16).await;
    let daemon = stage.held_in_the_copy().await;
    let begin = stage.head().await;
    for round in 0..6 {
        let first = 1_000_000 + round * 20_000;
        let rows = format!("insert into t select i, repeat('z', 900) from generate_series({first}, {first} + 19999) i");
        stage.from.execute(&rows).await;
        stage.all_is_confirmed().await;
        stage.from.execute("checkpoint").await;
    }
    let made = format!("select pg_wal_lsn_diff(pg_current_wal_lsn(), '{begin}') > 96 * 1024 * 1024");
    assert_eq!(stage.from.query_string(&made).await, "t");
    let status = "select wal_status from pg_replication_slots where slot_name = 'pgtandem_app'";
    assert!(["reserved", "extended"].contains(&stage.from.query_string(status).await.as_str()));
    assert!(stage.segments() > 1);
    stage.let_the_copy_go_on().await;
    stage.ends(daemon).await;
}

#[tokio::test]
async fn a_spool_that_is_lost_is_never_passed_over() {
    let stage = Stage::new((15, 17)).await;
    let daemon = stage.held_in_the_copy().await;
    stage.change().await;
    stage.all_is_confirmed().await;
    daemon.kill();
    let away = stage.folder.path().join("away");
    fs::rename(stage.spool(), &away).unwrap();

    let refused = stage.pgtandem.run(&["run"]).await;
    assert_eq!(refused.code, Some(4), "{refused}");
    assert!(refused.stderr.contains("spool_lost") && refused.stderr.contains("pgtandem clean"), "{refused}");
    let without = stage.pgtandem.clone().env("PGTANDEM_FOLLOW_SPOOL", "").run(&["run"]).await;
    assert_eq!(without.code, Some(4), "{without}");
    assert!(without.stderr.contains("slot_advanced") && without.stderr.contains("follow.spool"), "{without}");

    // A part of it is as good as nothing.
    fs::remove_dir_all(stage.spool()).ok();
    fs::rename(&away, stage.spool()).unwrap();
    let segment = fs::read_dir(stage.spool()).unwrap().map(|entry| entry.unwrap().path());
    let segment = segment.filter(|path| path.extension().is_some_and(|e| e == "spool")).max().unwrap();
    let whole = fs::read(&segment).unwrap();
    fs::write(&segment, &whole[..whole.len() / 2]).unwrap();
    let cut = stage.pgtandem.run(&["run"]).await;
    assert!(cut.code == Some(4) && cut.stderr.contains("spool_lost"), "{cut}");

    // It is brought back.
    fs::write(&segment, &whole).unwrap();
    let daemon = stage.held_in_the_copy().await;
    stage.let_the_copy_go_on().await;
    stage.ends(daemon).await;
}

/// The target's worker cannot read the spool: our own stream goes past it first.
#[tokio::test]
async fn a_subscription_takes_over_behind_the_spool() {
    let mut stage = Stage::new((16, 16)).await;
    stage.pgtandem = stage.pgtandem.clone().env("PGTANDEM_FOLLOW_ENGINE", "subscription");
    let daemon = stage.held_in_the_copy().await;
    stage.change().await;
    stage.all_is_confirmed().await;
    stage.let_the_copy_go_on().await;
    stage.ends(daemon).await;
}

#[tokio::test]
async fn a_move_with_a_spool_is_cut_over_or_cleaned_away() {
    let stage = Stage::new((15, 18)).await;
    let daemon = stage.held_in_the_copy().await;
    stage.change().await;
    stage.all_is_confirmed().await;
    daemon.kill();
    fs::write(stage.spool().join("note of mine"), "").unwrap();
    wait_until("nobody has the move", PATIENCE, async || {
        let cleaned = stage.pgtandem.run(&["clean", "--yes"]).await;
        cleaned.code == Some(0) && cleaned.stdout.contains("removed the spool")
    })
    .await;
    assert_eq!(fs::read_dir(stage.spool()).unwrap().count(), 1, "what is not ours stays");
    fs::remove_dir_all(stage.spool()).unwrap();

    // The session of the dead daemon waits for the gate still.
    stage
        .to
        .execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'pgtandem app %'")
        .await;
    // Another beginning, and a table that is copied again while following.
    stage
        .to
        .execute("drop table t, no_key, before_the_cut, behind_the_cut; drop function let_through; drop type mood")
        .await;
    let mut daemon = stage.held_in_the_copy().await;
    stage.change().await;
    stage.let_the_copy_go_on().await;
    following(&mut daemon, PATIENCE).await;
    let gate = stage.to.connect().await;
    run(&gate, "select pg_advisory_lock(1)").await;
    let asking = stage.pgtandem.spawn(&["resync", "public.before_the_cut"]);
    stage.somebody_waits_for(1).await;
    stage.change().await;
    stage.all_is_confirmed().await;
    run(&gate, "select pg_advisory_unlock(1)").await;
    let asked = asking.wait(PATIENCE).await;
    assert_eq!(asked.code, Some(0), "{asked}");
    cut_over(&stage.pgtandem, daemon).await;
    assert_same(&stage.from, &stage.to).await;
    assert!(!stage.spool().exists(), "a move that is done needs none");
}

/// Somebody who only looks sees all of it, first from the files and then from the slot, and confirms nothing.
#[tokio::test]
async fn what_was_kept_is_recalled_and_stays() {
    let stage = Stage::new((16, 16)).await;
    let daemon = stage.held_in_the_copy().await;
    stage.change().await;
    stage.all_is_confirmed().await;
    daemon.kill();
    stage.change().await;
    let slot = "select confirmed_flush_lsn from pg_replication_slots where slot_name = 'pgtandem_app'";
    wait_until("the slot is free", PATIENCE, async || {
        stage.from.query_string("select active from pg_replication_slots").await == "f"
    })
    .await;
    let confirmed = stage.from.query_string(slot).await;

    let mut settings = config(&stage.from.url(), &stage.to.url());
    settings.follow.spool = Some(stage.folder.path().join("spool"));
    let telemetry = Telemetry::new(&settings.name, settings.cutover.max_lag);
    let server = |side, info: &pgtandem::postgres::ConnInfo| Server::new(side, info.clone(), "app").unwrap();
    let source = server(Side::Source, &settings.source);
    let store = Store::new(server(Side::Target, &settings.target), settings.name.clone());
    let spooling = Spooling::new(&settings, &telemetry);
    let publications = [settings.name.publication(), settings.name.insert_publication()];
    let begin = store.find().await.unwrap().unwrap().slot_lsn.unwrap();
    let from = Source { source: &source, store: &store, publications: &publications };
    let head: Lsn = stage.head().await.parse().unwrap();

    for _ in 0..2 {
        let mut inflow = Inflow::recall(&spooling, from, begin).await.unwrap();
        let mut rounds = Vec::new();
        'reading: loop {
            while let Some(event) = inflow.buffered().unwrap() {
                match event {
                    Event::Data { payload, .. } => match Message::decode(&payload).unwrap() {
                        Message::Begin { commit_lsn, .. } if commit_lsn >= head => break 'reading,
                        Message::Relation(relation) => rounds.push(relation.name.name),
                        Message::Commit { .. } => rounds.push("commit".to_owned()),
                        _ => {}
                    },
                    Event::Keepalive { sent, .. } if sent >= head => break 'reading,
                    Event::Keepalive { .. } => {}
                }
            }
            inflow.confirm(Lsn::ZERO, Lsn::ZERO, true).await.unwrap();
            inflow.gulp(1 << 16).await.unwrap();
        }
        inflow.close().await;
        // Each round has two transactions; the implicit one of several statements, and the one that is not rolled back.
        assert_eq!(rounds.iter().filter(|what| *what == "commit").count(), 4, "{rounds:?}");
        assert_eq!(rounds.iter().filter(|what| *what == "t").count(), 2, "{rounds:?}");
    }
    assert_eq!(stage.from.query_string(slot).await, confirmed);
    spooling.close().await;
    let daemon = stage.held_in_the_copy().await;
    stage.let_the_copy_go_on().await;
    stage.ends(daemon).await;
}
