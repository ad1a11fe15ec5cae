//! What a copy does beside its rows, and the other ways to copy: through an archive of pg_dump, and by hand from a snapshot.

use std::process::Output;

use tokio::process::Command;

use super::load::Load;
use super::stage::{Stage, scale};
use super::{GENTLE, finish};
use crate::harness::{Database, PATIENCE, assert_same_catalog, client_program, versions_under_test, wait_until};

/// Every kind of index and key, and what is written down beside them.
const INDEXED: &str = r#"
    create table "indexed t" (
        a int not null, b text collate "C", c int, d int4range, e int not null, f timestamptz default now(),
        constraint "the key" primary key (a) include (b) with (fillfactor = 70),
        constraint later unique (c, e) deferrable initially deferred,
        constraint apart exclude using gist (d with &&));
    create unique index "of both" on "indexed t" (e, (lower(b)) desc nulls last) where c > 0;
    create index guessed on "indexed t" ((c + e));
    alter index guessed alter column 1 set statistics 17;
    create unique index identity on "indexed t" (e);
    alter table "indexed t" replica identity using index identity;
    alter table "indexed t" cluster on later;
    create statistics together on c, e from "indexed t";
    create table parted (id int, at date, primary key (id, at)) partition by range (at);
    create index on parted (at);
    create table parted_1 partition of parted for values from ('2020-01-01') to ('2021-01-01');
    create table parted_2 partition of parted default;
    insert into "indexed t" select i, 'b' || i, i, int4range(i, i + 1), i from generate_series(1, 5000) i;
    insert into parted select i, '2020-01-01'::date + i % 700 from generate_series(1, 5000) i"#;

#[tokio::test(flavor = "multi_thread")]
async fn indexes_are_there_as_soon_as_their_tables_are() {
    // Given a copy that would take long, with the indexed tables first.
    let slow =
        "[copy]\nfirst = [\"public.indexed t\", \"public.parted\"]\nworkers = 1\nmax_bytes_per_second = \"2MiB\"\n";
    let mut stage = Stage::new(versions_under_test(), scale(5)).await.configured(slow);
    stage.source.execute(INDEXED).await;
    let mut daemon = stage.daemon(&[]);
    stage.wait_for_phase(&mut daemon, "copy").await;
    // Then their indexes and keys are there while others are copied, all but those that need the archive.
    let built = "select 1 from pg_constraint where conname = 'the key' and contype = 'p'";
    wait_until("the first table has its key", PATIENCE, async || stage.state(built).await.is_some()).await;
    let open = "select count(*) from pgtandem.copy_table where state <> 'copied'";
    assert_ne!(stage.target.query_string(open).await, "0", "all were copied before");
    assert_eq!(stage.state("select 1 from pg_constraint where conname = 'apart'").await, None);
    // When it is killed there and goes on faster, then both catalogs are the same.
    daemon.kill();
    stage.program = stage.program.env("PGTANDEM_COPY_MAX_BYTES_PER_SECOND", "0");
    let load = Load::start(&stage, GENTLE);
    let mut daemon = stage.daemon(&[]);
    stage.wait_until_it_follows(&mut daemon).await;
    assert_same_catalog(&stage.source, &stage.target).await;
    let gathered = "select count(*) from pg_statistic_ext_data";
    assert_eq!(stage.target.query_string(gathered).await, "1", "statistics objects are filled");
    finish(&stage, load, daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_can_travel_in_an_archive() {
    let stage = Stage::new(versions_under_test(), scale(5)).await.configured("[copy]\nmethod = \"dump\"\n");
    let load = Load::start(&stage, GENTLE);
    // When the daemon dies while the archive is written or restored, and the archive is gone with its container, then the
    // next one goes on.
    let mut daemon = stage.daemon(&[]);
    stage.wait_for_phase(&mut daemon, "copy").await;
    daemon.kill();
    let daemon = stage.daemon(&[]);
    finish(&stage, load, daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_can_be_copied_by_hand() {
    let stage = Stage::new(versions_under_test(), scale(5)).await.configured("[copy]\nmethod = \"none\"\n");
    let load = Load::start(&stage, GENTLE);
    // Given a snapshot that is held.
    let holding = stage.program.spawn(&["snapshot"]);
    wait_until("the snapshot is printed", PATIENCE, async || holding.stdout().contains("snapshot ")).await;
    let printed = holding.stdout();
    let snapshot = printed.split_whitespace().nth(1).expect("the name of the snapshot");
    load.wait_for_sales().await;
    // When it is dumped while clients write, and restored.
    let archive = stage.file("by-hand");
    let archive = archive.to_str().expect("a path");
    postgres_program(
        "pg_dump",
        &stage.source,
        &["--snapshot", snapshot, "--no-publications", "--no-subscriptions", "-Fd", "-j2", "-f", archive],
    )
    .await;
    holding.terminate();
    let ended = holding.wait(PATIENCE).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    postgres_program("pg_restore", &stage.target, &["-j2", archive]).await;
    // Then the move goes on from there.
    let daemon = stage.daemon(&[]);
    finish(&stage, load, daemon).await;
}

/// A program of 18 or, since 18's output needs 18 to read, of 16 where the target is not newer.
async fn postgres_program(name: &str, database: &Database, arguments: &[&str]) {
    let version = if versions_under_test().1 > 16 { 18 } else { 16 };
    let Output { status, stderr, .. } = Command::new(client_program(version, name))
        .arg(format!("--dbname={}", database.url()))
        .args(arguments)
        .kill_on_drop(true)
        .output()
        .await
        .expect("start a program");
    assert!(status.success(), "{name}: {}", String::from_utf8_lossy(&stderr));
}
