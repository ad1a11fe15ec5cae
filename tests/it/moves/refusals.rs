//! Cutovers that fail: writes on the source come back or the switch is finished, following goes on, the next one succeeds.

use super::load::Load;
use super::stage::{LONG, Stage, scale};
use super::{GENTLE, finish};
use crate::harness::{PATIENCE, Running, versions_under_test, wait_until};

/// A move that follows under load, with these further settings.
async fn following(more: &str) -> (Stage, Load, Running) {
    let stage = Stage::new(versions_under_test(), scale(5)).await.configured(more);
    let load = Load::start(&stage, GENTLE);
    let mut daemon = stage.daemon(&[]);
    stage.wait_until_ready(&mut daemon).await;
    (stage, load, daemon)
}

/// The source takes writes and the target follows.
async fn goes_on(stage: &Stage, load: &Load) {
    load.wait_for_sales().await;
    stage.wait_for_more().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_fails_or_hangs_switches_nothing() {
    let (stage, load, daemon) = following("").await;
    stage.hook_shall("refuse");
    stage.fail_to_cut_over("60s", "the hook refuses").await;
    stage.hook_is_well();
    goes_on(&stage, &load).await;

    stage.hook_shall("hang");
    stage.fail_to_cut_over("10s", "did not end before").await;
    stage.hook_is_well();
    goes_on(&stage, &load).await;

    finish(&stage, load, daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_stays_locked_keeps_the_fence_open() {
    let (stage, load, daemon) = following("").await;
    let holder = stage.source.connect().await;
    // Given a lock that lets sales pass, and no fence.
    let lock = "set application_name = 'a long report'; begin; lock table takings in row exclusive mode";
    holder.batch_execute(lock).await.expect("lock a table");
    // When the fence cannot be prepared, then the cutover fails in time and names who is in the way.
    stage.fail_to_cut_over("6s", "a long report").await;
    goes_on(&stage, &load).await;
    // When it is prepared and cannot be closed, then too.
    holder.batch_execute("rollback").await.expect("unlock the table");
    stage.hook_shall("refuse");
    stage.fail_to_cut_over("60s", "the hook refuses").await;
    stage.hook_is_well();
    holder.batch_execute(lock).await.expect("lock a table");
    stage.fail_to_cut_over("6s", "a long report").await;
    goes_on(&stage, &load).await;
    holder.batch_execute("rollback").await.expect("unlock the table");
    finish(&stage, load, daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_behind_the_fence_lets_writers_go_on() {
    // Given a cutover that takes its time between the fence and the seal.
    let (stage, load, daemon) = following("verify = \"full\"").await;
    let asking = stage.program.spawn(&["cutover", "--timeout", "60s"]);
    stage.wait_for_step("verify", "running").await;
    // When the daemon dies there, then the fence lifts without anyone's help.
    daemon.kill();
    load.wait_for_sales().await;
    // And the next daemon says so to the one who asked, and follows on.
    let daemon = stage.daemon(&[]);
    let answer = asking.wait(LONG).await;
    assert_eq!(answer.code, Some(1), "{answer}");
    stage.wait_for_more().await;
    finish(&stage, load, daemon).await;
}

/// A move whose daemon died while the hook ran, and who asked for the cutover and waits for the answer.
async fn died_during_the_hook() -> (Stage, Load, Running) {
    let (stage, load, daemon) = following("").await;
    stage.hook_shall("hang");
    let asking = stage.program.spawn(&["cutover", "--timeout", "60s"]);
    wait_until("the hook hangs", PATIENCE, async || stage.file("hanging").exists()).await;
    daemon.kill();
    stage.hook_is_well();
    (stage, load, asking)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_during_the_hook_is_finished() {
    let (stage, load, asking) = died_during_the_hook().await;
    // When the next daemon finds the sealed fence, then it finishes the switch, and says so to the one who asked.
    let ended = stage.daemon(&[]).wait(LONG).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    let answer = asking.wait(LONG).await;
    assert_eq!(answer.code, Some(0), "{answer}");
    assert!(answer.stdout.contains("write pause"), "{answer}");
    load.settle(&stage).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_fails_after_a_death_is_undone() {
    let (stage, load, asking) = died_during_the_hook().await;
    stage.hook_shall("refuse");
    let daemon = stage.daemon(&[]);
    let answer = asking.wait(LONG).await;
    assert_eq!(answer.code, Some(1), "{answer}");
    stage.hook_is_well();
    goes_on(&stage, &load).await;
    finish(&stage, load, daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_schema_changes_does_not_meet_the_fence() {
    // Given a source that writes down each schema change, those of the fence too, in a table of the move.
    let stage = Stage::new(versions_under_test(), scale(1)).await;
    let log = "create table ddl_log (id uuid primary key default gen_random_uuid(), tag text,
                   at timestamptz not null default clock_timestamp());
               create function note_ddl() returns event_trigger language plpgsql as
                   $$ begin insert into public.ddl_log (tag) values (tg_tag); end $$;
               create event trigger note_ddl on ddl_command_end execute function note_ddl();
               create event trigger note_ddl_early on ddl_command_start execute function note_ddl()";
    stage.source.execute(log).await;
    let load = Load::start(&stage, GENTLE);
    let mut daemon = stage.daemon(&[]);
    stage.wait_until_ready(&mut daemon).await;
    // When a cutover fails behind the seal, then the fence lifts.
    stage.hook_shall("refuse");
    stage.fail_to_cut_over("60s", "the hook refuses").await;
    stage.hook_is_well();
    goes_on(&stage, &load).await;
    // And the next one happens. What the seal itself wrote down is the only thing that stays behind.
    stage.cut_over().await;
    let last = "begin; set local pgtandem.fence = 'pass';
                delete from ddl_log where id in (select id from ddl_log order by at desc limit 2); commit";
    stage.source.execute(last).await;
    let ended = daemon.wait(PATIENCE).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    load.settle(&stage).await;
}
