//! Death of the daemon, at random and in every phase, and of either server: the move goes on and nothing is lost.
//!
//! The random moments come from a seed that is printed; `PGTANDEM_TEST_SEED` repeats it, as far as the machine does.

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::load::Load;
use super::stage::{LONG, PHASES, Stage, number, scale};
use super::{GENTLE, finish};
use crate::harness::{Cluster, PATIENCE, Running, versions_under_test, wait_until};

/// A small generator of random numbers, which a printed seed repeats.
struct Xorshift(u64);

impl Xorshift {
    fn new() -> Self {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_nanos() as u64;
        let seed = number("PGTANDEM_TEST_SEED").unwrap_or(clock);
        println!("PGTANDEM_TEST_SEED={seed}");
        Self(seed.max(1))
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    /// A moment within this time from now.
    fn moment(&mut self, within: Duration) -> Duration {
        Duration::from_micros(self.below(within.as_micros() as u64))
    }
}

/// Kills the daemon once `phase` is reached and this much later.
async fn kill_in(stage: &Stage, mut daemon: Running, phase: &str, later: Duration) {
    stage.wait_for_phase(&mut daemon, phase).await;
    // Not a wait for something: the moment of the death is what the test chooses.
    tokio::time::sleep(later).await;
    let seen = PHASES[stage.reached().await];
    let killed = daemon.kill();
    assert_eq!(killed.status.signal(), Some(9), "it ended before it was killed: {killed}");
    println!("killed {later:?} after phase {phase} was reached, in phase {seen}");
}

/// Has the daemon cut over and kills it in the middle, this much after the cutover began.
async fn kill_in_a_cutover(stage: &Stage, mut daemon: Running, later: Duration) {
    stage.wait_until_it_follows(&mut daemon).await;
    // However fast it is, it does not end before it dies.
    stage.hook_shall("hang");
    let asking = stage.program.spawn(&["cutover", "--timeout", "60s"]);
    kill_in(stage, daemon, "cutover", later).await;
    stage.hook_is_well();
    // The next daemon answers, whether it undoes or finishes.
    let mut next = stage.daemon(&[]);
    let answer = asking.wait(LONG).await;
    println!("the one who asked was told: {:?}", answer.code);
    let done =
        stage.state("select state from pgtandem.cutover order by id desc limit 1").await.as_deref() == Some("done");
    assert_eq!(answer.code, Some(if done { 0 } else { 1 }), "{answer}");
    if done {
        let ended = next.wait(LONG).await;
        assert_eq!(ended.code, Some(0), "{ended}");
    } else {
        stage.wait_until_it_follows(&mut next).await;
        next.kill();
    }
}

/// A move whose daemon dies up to `kills` times, spread over the phases, the last but one time in a cutover. Returns how
/// often it died before the move was done.
async fn survives(random: &mut Xorshift, kills: u64) -> u64 {
    let stage = Stage::new(versions_under_test(), scale(5)).await;
    let load = Load::start(&stage, GENTLE);
    let mut deaths = 0;
    for kill in 0..kills {
        if PHASES[stage.reached().await] == "done" {
            println!("the move was done after {deaths} deaths");
            break;
        }
        // The early phases are passed once, so they get the early deaths.
        let daemon = stage.daemon(&[]);
        match kill * 10 / kills {
            0 | 1 => kill_in(&stage, daemon, "schema", random.moment(Duration::from_millis(600))).await,
            2..=4 => kill_in(&stage, daemon, "copy", random.moment(Duration::from_millis(1500))).await,
            5 | 6 => kill_in(&stage, daemon, "catchup", random.moment(Duration::from_millis(800))).await,
            _ if kill + 2 == kills => {
                kill_in_a_cutover(&stage, daemon, random.moment(Duration::from_millis(300))).await;
            }
            _ => kill_in(&stage, daemon, "follow", random.moment(Duration::from_millis(1500))).await,
        }
        deaths += 1;
    }
    end_under_load(&stage, load).await;
    deaths
}

/// However far it is: a last daemon brings the move to its end.
async fn end_under_load(stage: &Stage, load: Load) {
    let mut daemon = stage.daemon(&[]);
    stage.wait_until_it_follows(&mut daemon).await;
    if PHASES[stage.reached().await] != "done" {
        return finish(stage, load, daemon).await;
    }
    let ended = daemon.wait(LONG).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    load.settle(stage).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_deaths_of_the_daemon_change_nothing() {
    // Where the cutover is finished in spite of the tenth death, nothing is left that an eleventh could come to.
    let deaths = survives(&mut Xorshift::new(), 11).await;
    assert!(deaths >= 10, "only {deaths} deaths");
}

/// For a quiet night: `PGTANDEM_TEST_KILLS=500 cargo test --test it many_deaths -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes hours"]
async fn many_deaths_of_the_daemon_change_nothing() {
    let mut random = Xorshift::new();
    let mut left: u64 = number("PGTANDEM_TEST_KILLS").unwrap_or(500);
    // Each move takes some of them, so that each phase sees many.
    while left > 0 {
        left -= survives(&mut random, left.min(10)).await;
        println!("{left} deaths are left");
    }
}

/// Large tables in small units, and slowly, so that a death finds some of them there.
const IN_UNITS: &str = "[copy]\nsplit_above = \"1MiB\"\nmax_bytes_per_second = \"12MiB\"\n";

const UNITS: &str = "select 1 from pgtandem.copy_unit limit 1";

/// A move whose daemon dies up to `kills` times while it copies, and while it catches up. One of three moves keeps changes in a
/// spool, and one of three reads tables by their keys.
async fn survives_copying(random: &mut Xorshift, kills: u64) -> u64 {
    let (mut from, to) = versions_under_test();
    if random.below(3) == 0 {
        println!("from 13, by keys");
        from = 13;
    }
    let mut stage = Stage::new((from, to), scale(5)).await.configured(IN_UNITS);
    if random.below(3) == 0 {
        println!("with a spool");
        let folder = stage.file("spool");
        stage.program = stage.program.env("PGTANDEM_FOLLOW_SPOOL", folder);
    }
    let load = Load::start(&stage, GENTLE);
    // One of them certainly leaves a table in part.
    let daemon = stage.daemon(&[]);
    wait_until("a unit is there", LONG, async || stage.state(UNITS).await.is_some()).await;
    daemon.kill();
    let (mut deaths, mut with_units) = (1, 1);
    while deaths < kills {
        let daemon = stage.daemon(&[]);
        match stage.reached().await {
            0..=2 => kill_in(&stage, daemon, "copy", random.moment(Duration::from_millis(2500))).await,
            3 => kill_in(&stage, daemon, "catchup", random.moment(Duration::from_millis(500))).await,
            _ => break,
        }
        deaths += 1;
        with_units += u64::from(stage.state(UNITS).await.is_some());
    }
    println!("{deaths} deaths, {with_units} of them left a table that was copied in part");
    end_under_load(&stage, load).await;
    deaths
}

#[tokio::test(flavor = "multi_thread")]
async fn deaths_in_the_copy_change_nothing() {
    let deaths = survives_copying(&mut Xorshift::new(), 6).await;
    assert!(deaths >= 3, "only {deaths} deaths");
}

/// For a quiet hour: `PGTANDEM_TEST_KILLS=1000 cargo test --test it many_deaths_in_the_copy -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes an hour"]
async fn many_deaths_in_the_copy_change_nothing() {
    let mut random = Xorshift::new();
    let mut left: u64 = number("PGTANDEM_TEST_KILLS").unwrap_or(1000);
    while left > 0 {
        left = left.saturating_sub(survives_copying(&mut random, left.min(25)).await.max(1));
        println!("{left} deaths are left");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_in_each_phase_changes_nothing() {
    let stage = Stage::new(versions_under_test(), scale(5)).await;
    let load = Load::start(&stage, GENTLE);
    for phase in ["preflight", "schema", "copy", "catchup", "follow"] {
        kill_in(&stage, stage.daemon(&[]), phase, Duration::ZERO).await;
    }
    kill_in_a_cutover(&stage, stage.daemon(&[]), Duration::ZERO).await;
    end_under_load(&stage, load).await;
}

/// A move that follows under load.
async fn following() -> (Stage, Load, Running) {
    let stage = Stage::new(versions_under_test(), scale(5)).await;
    let load = Load::start(&stage, GENTLE);
    let mut daemon = stage.daemon(&[]);
    stage.wait_for_phase(&mut daemon, "follow").await;
    (stage, load, daemon)
}

async fn crash_and_return(server: &mut Cluster) {
    server.crash().await;
    server.start_again().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crashes_of_either_server_change_nothing() {
    let (mut stage, load, daemon) = following().await;
    // When the source crashes and comes back, then following goes on.
    crash_and_return(&mut stage.source_server).await;
    load.wait_for_sales().await;
    stage.wait_for_more().await;
    // When the target does, then too.
    crash_and_return(&mut stage.target_server).await;
    stage.wait_for_more().await;
    finish(&stage, load, daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_ended_by_an_administrator_change_nothing() {
    let (stage, load, daemon) = following().await;
    for (side, role) in
        [(&stage.source, "stream"), (&stage.target, "apply"), (&stage.target, "lock"), (&stage.target, "state")]
    {
        let sessions = format!("from pg_stat_activity where application_name = 'pgtandem app {role}'");
        let known = format!("select pid {sessions}");
        wait_until(&format!("there is a session {role}"), PATIENCE, async || {
            !side.query_strings(&known).await.is_empty()
        })
        .await;
        side.execute(&format!("select pg_terminate_backend(pid) {sessions}")).await;
        stage.wait_for_more().await;
    }
    finish(&stage, load, daemon).await;
}
