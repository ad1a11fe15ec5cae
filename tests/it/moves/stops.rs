//! Clean stops, and daemons that share a move.

use super::load::Load;
use super::stage::{LONG, Stage, scale};
use super::{GENTLE, finish};
use crate::harness::{PATIENCE, versions_under_test};

#[tokio::test(flavor = "multi_thread")]
async fn a_move_can_be_made_in_steps() {
    let stage = Stage::new(versions_under_test(), scale(5)).await;
    let load = Load::start(&stage, GENTLE);
    // When asked for the copy only, then it ends with it.
    let ended = stage.daemon(&["--until", "copy"]).wait(LONG).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    let left = "select 1 from pgtandem.copy_table where state <> 'copied'";
    assert_eq!(stage.target.query_strings(left).await, Vec::<String>::new());
    load.wait_for_sales().await;
    // When asked to follow until the lag reached zero, then it goes on from there and ends with that.
    let before = stage.transactions().await;
    let ended = stage.daemon(&["--until", "follow"]).wait(LONG).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(stage.transactions().await > before, "nothing was followed");
    // When asked to cut over when ready, then the move ends.
    load.wait_for_sales().await;
    let ended = stage.daemon(&["--cutover-when-ready"]).wait(LONG).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    load.settle(&stage).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_is_clean_in_the_copy_and_while_following() {
    let stage = Stage::new(versions_under_test(), scale(5)).await;
    let load = Load::start(&stage, GENTLE);
    for phase in ["copy", "follow"] {
        let mut daemon = stage.daemon(&[]);
        stage.wait_for_phase(&mut daemon, phase).await;
        daemon.terminate();
        let ended = daemon.wait(PATIENCE).await;
        assert_eq!(ended.code, Some(0), "in phase {phase}: {ended}");
        load.wait_for_sales().await;
    }
    finish(&stage, load, stage.daemon(&[])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_takes_over() {
    let stage = Stage::new(versions_under_test(), scale(5)).await;
    let load = Load::start(&stage, GENTLE);
    let mut first = stage.daemon(&[]);
    stage.wait_for_phase(&mut first, "follow").await;
    // Given a second daemon that waits, and a third that does not want to.
    let mut second = stage.daemon(&[]);
    second.wait_for_log("standby", PATIENCE).await;
    let third = stage.daemon(&["--no-standby"]).wait(PATIENCE).await;
    assert_eq!(third.code, Some(5), "{third}");
    assert!(first.is_running() && second.is_running());
    // When the first dies, then the second goes on.
    first.kill();
    stage.wait_for_more().await;
    finish(&stage, load, second).await;
}
