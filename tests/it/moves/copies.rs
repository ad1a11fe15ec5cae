//! The other ways to copy: through an archive of pg_dump, and by hand from a snapshot.

use std::process::Output;

use tokio::process::Command;

use super::load::Load;
use super::stage::{Stage, scale};
use super::{GENTLE, finish};
use crate::harness::{Database, PATIENCE, client_program, versions_under_test, wait_until};

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
