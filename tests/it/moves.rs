//! Whole moves under load: a pgbench database moves while clients write, and whatever dies or is refused on the way, both
//! sides are identical at the switch and nothing that was acknowledged is missing.
//!
//! `PGTANDEM_TEST_SCALE` raises the size of the database.

mod copies;
mod deaths;
mod load;
mod refusals;
mod rights;
mod stage;
mod stops;

use load::Load;
use stage::{Stage, scale};
use tokio::sync::Mutex;

use crate::harness::{PATIENCE, Running, versions_under_test};

/// A pace of pgbench that leaves the machine to what the test is about.
const GENTLE: &[&str] = &["-R", "300"];

/// The scale of pgbench in whole moves: two million accounts. The pace below stays: it is what an unoptimised build keeps
/// up with, and what is at stake here is completeness, not speed.
const WHOLE: u32 = 20;

/// The pace of pgbench in whole moves: 400 transactions a second, which two cores can also follow with an unoptimised
/// build beside another test. `PGTANDEM_TEST_RATE` sets another one; 0 lets pgbench run as fast as it can.
fn pace() -> Vec<&'static str> {
    match stage::number::<u32>("PGTANDEM_TEST_RATE") {
        Some(0) => Vec::new(),
        Some(rate) => vec!["-R", Box::leak(rate.to_string().into_boxed_str())],
        None => vec!["-R", "400"],
    }
}

/// From following to the end: more load, the cutover, the daemon's end, the comparison.
async fn finish(stage: &Stage, load: Load, mut daemon: Running) {
    stage.wait_until_it_follows(&mut daemon).await;
    load.wait_for_sales().await;
    stage.cut_over().await;
    let ended = daemon.wait(PATIENCE).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    load.settle(stage).await;
}

/// Held by a whole move, for runners that run tests as threads; nextest has the group `whole-moves`.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

async fn moves(versions: (u16, u16), scale: u32) {
    let _alone = ONE_AT_A_TIME.lock().await;
    // Given a database under load.
    let stage = Stage::new(versions, scale).await;
    let load = Load::start(&stage, &pace());
    // When it is moved, then it arrives whole.
    let daemon = stage.daemon(&[]);
    finish(&stage, load, daemon).await;
    // And the pause of the writes is known afterwards.
    let status = stage.program.run(&["status", "--json"]).await;
    assert_eq!(status.code, Some(0), "{status}");
    let status: serde_json::Value = serde_json::from_str(&status.stdout).expect("JSON");
    assert_eq!(status["phase"], "done", "{status}");
    assert_eq!(status["cutover"]["state"], "done", "{status}");
    assert!(status["cutover"]["write_pause_seconds"].as_f64().is_some_and(|pause| pause > 0.0), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_under_load_moves_from_15_to_15() {
    moves((15, 15), scale(WHOLE)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_under_load_moves_from_13_to_18() {
    moves((13, 18), scale(WHOLE)).await;
}

/// From 16 to 17, unless `TEST_POSTGRES` says otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_under_load_moves() {
    moves(versions_under_test(), scale(WHOLE)).await;
}
