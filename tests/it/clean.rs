//! `clean`, and requests to a daemon, against a move that was begun and that nobody runs.

use pgtandem::postgres::replication::Walsender;
use pgtandem::postgres::{Lsn, Server, Side};
use pgtandem::state::{HeldBack, Phase, RequestKind, Store};

use crate::harness::{Cluster, PATIENCE, Pgtandem, config, wait_until};

/// Both servers with the table `t` and its trigger, and the move `app` between them: its slot, publication and closed
/// fence on the source; its state on the target, with the trigger held back.
struct Begun {
    source: Cluster,
    target: Cluster,
    store: Store,
    program: Pgtandem,
}

const TABLE: &str = "CREATE TABLE t (id int);
    CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TRIGGER touch BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f()";
const OURS: &str = "CREATE PUBLICATION pgtandem_app FOR TABLE t;
    CREATE SCHEMA pgtandem;
    CREATE FUNCTION pgtandem.fence_app() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''moved''; END';
    CREATE TRIGGER pgtandem_app_fence BEFORE INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION pgtandem.fence_app()";
const LEFT: &str = "SELECT slot_name::text FROM pg_replication_slots
    UNION ALL SELECT pubname::text FROM pg_publication
    UNION ALL SELECT nspname::text FROM pg_namespace WHERE nspname = 'pgtandem'
    UNION ALL SELECT tgname::text FROM pg_trigger WHERE tgname LIKE 'pgtandem%'";
const TRIGGER: &str = "SELECT tgenabled::text FROM pg_trigger WHERE tgname = 'touch'";

impl Begun {
    async fn in_phase(phase: Phase) -> Self {
        let (source, target) = Cluster::pair().await;
        let (from, to) = (source.database("postgres"), target.database("postgres"));
        source.execute(TABLE).await;
        target.execute(TABLE).await;
        source.execute(OURS).await;
        let slot = "SELECT slot_name::text FROM pg_create_logical_replication_slot('pgtandem_app', 'pgoutput')";
        source.query_strings(slot).await;
        let config = config(&from.url(), &to.url());
        let server = Server::new(Side::Target, config.target.clone(), "app").expect("a target");
        let store = Store::new(server, config.name.clone());
        store.install(&serde_json::json!({})).await.expect("install");
        store.begin(&serde_json::json!({})).await.expect("begin");
        let touch = HeldBack {
            what: "trigger touch on public.t".to_owned(),
            enable: "ALTER TABLE public.t ENABLE TRIGGER touch".to_owned(),
            disable: "ALTER TABLE public.t DISABLE TRIGGER touch".to_owned(),
        };
        store.hold_back(&[touch]).await.expect("hold back");
        store.set_phase(phase).await.expect("enter the phase");
        Self { program: Pgtandem::new(&from, &to, "app"), source, target, store }
    }

    async fn source_is_clean(&self) {
        assert_eq!(self.source.query_strings(LEFT).await, [""; 0]);
        self.source.execute("INSERT INTO t VALUES (1)").await;
    }
}

#[tokio::test]
async fn the_fence_of_a_later_move_stays() {
    // Given a target that is the source of another move, which was switched.
    let begun = Begun::in_phase(Phase::Done).await;
    let fence = "CREATE FUNCTION pgtandem.fence_next() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''moved''; END';
        CREATE TRIGGER pgtandem_next_fence BEFORE INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION pgtandem.fence_next()";
    begun.target.execute(fence).await;
    let cleaned = begun.program.run(&["clean", "--yes"]).await;
    assert_eq!(cleaned.code, Some(0), "{cleaned}");
    assert_eq!(begun.target.query_strings(LEFT).await, ["pgtandem", "pgtandem_next_fence"]);
    let state = "SELECT relname::text FROM pg_class WHERE relnamespace = 'pgtandem'::regnamespace";
    assert_eq!(begun.target.query_strings(state).await, [""; 0]);
}

#[tokio::test]
async fn what_was_held_back_comes_back_before_the_state_goes() {
    let begun = Begun::in_phase(Phase::Follow).await;
    assert_eq!(begun.target.query_strings(TRIGGER).await, ["D"]);
    let cleaned = begun.program.run(&["clean", "--yes"]).await;
    assert_eq!(cleaned.code, Some(0), "{cleaned}");
    for line in [
        "source: removed the slot pgtandem_app\n",
        "source: removed the fence; writes are let in again\n",
        "source: removed the publication pgtandem_app\n",
        "target: brought back the trigger touch on public.t\n",
        "target: removed the state of the move\n",
    ] {
        assert!(cleaned.stdout.contains(line), "{cleaned}");
    }
    begun.source_is_clean().await;
    assert_eq!(begun.target.query_strings(TRIGGER).await, ["O"]);
    assert_eq!(begun.target.query_strings(LEFT).await, [""; 0]);
}

#[tokio::test]
async fn after_a_cutover_what_the_owner_disabled_stays_so() {
    let begun = Begun::in_phase(Phase::Done).await;
    let cleaned = begun.program.run(&["clean", "--yes"]).await;
    assert_eq!(cleaned.code, Some(0), "{cleaned}");
    begun.source_is_clean().await;
    assert_eq!(begun.target.query_strings(TRIGGER).await, ["D"]);
}

#[tokio::test]
async fn the_source_is_freed_without_the_target() {
    let begun = Begun::in_phase(Phase::Follow).await;
    // Given a target that is away: the name is asked for, and --yes goes on and says what remains.
    let away = begun.program.clone().env("PGTANDEM_TARGET_URL", "host=127.0.0.1 port=1 user=u dbname=d");
    let asked = away.run(&["clean"]).await;
    assert!(asked.code == Some(1) && asked.stderr.contains("not_confirmed"), "{asked}");
    assert!(!begun.source.query_strings(LEFT).await.is_empty());
    let cleaned = away.run(&["clean", "--yes"]).await;
    assert!(cleaned.code == Some(3) && cleaned.stderr.contains("target_not_cleaned"), "{cleaned}");
    assert!(cleaned.stderr.contains("warning: "), "{cleaned}");
    begun.source_is_clean().await;
    // When it is back, then the rest goes.
    let rest = begun.program.run(&["clean", "--yes"]).await;
    assert_eq!(rest.code, Some(0), "{rest}");
    assert_eq!(begun.target.query_strings(TRIGGER).await, ["O"]);
    let again = begun.program.run(&["clean", "--yes"]).await;
    assert!(again.code == Some(0) && again.stdout.contains("nothing of the move app"), "{again}");
}

#[tokio::test]
async fn a_slot_that_is_read_is_not_taken_from_a_stranger() {
    let begun = Begun::in_phase(Phase::Follow).await;
    let stranger = begun.target.create_database("stranger").await;
    let program = begun.program.clone().env("PGTANDEM_TARGET_URL", stranger.url());
    // Given somebody who reads the slot.
    let url = begun.source.database("postgres").url();
    let server = Server::new(Side::Source, config(&url, &url).source, "app").expect("a source");
    let options = [("proto_version", "1".to_owned()), ("publication_names", "pgtandem_app".to_owned())];
    let walsender = Walsender::connect(&server, "stream").await.expect("a walsender");
    let reader = walsender.stream("pgtandem_app", Lsn::ZERO, &options).await.expect("a stream");
    let refused = program.run(&["clean", "--yes"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("daemon_running"), "{refused}");
    assert!(!begun.source.query_strings(LEFT).await.is_empty());
    drop(reader);
    // When nobody does any more, then --yes takes it, with a warning.
    let free = "SELECT active::text FROM pg_replication_slots";
    wait_until("the slot to be free", PATIENCE, async || begun.source.query_strings(free).await == ["false"]).await;
    let cleaned = program.run(&["clean", "--yes"]).await;
    assert!(cleaned.code == Some(0) && cleaned.stderr.contains("the target knows no move app"), "{cleaned}");
    begun.source_is_clean().await;
}

#[tokio::test]
async fn a_request_of_a_newer_client_is_answered_with_no() {
    let begun = Begun::in_phase(Phase::Follow).await;
    let ask = "INSERT INTO pgtandem.request (move, kind, arguments, expires_at)
               VALUES ('app', 'levitate', '{}', now() + interval '1 minute')";
    begun.target.execute(ask).await;
    let known = begun.store.submit(RequestKind::Cutover, &serde_json::json!({}), PATIENCE).await.expect("submit");
    let taken = begun.store.take_request(0).await.expect("take").expect("a request");
    assert_eq!(taken.id, known);
    let answer = "SELECT state || ' ' || (answer #>> '{error,code}') FROM pgtandem.request WHERE kind = 'levitate'";
    assert_eq!(begun.target.query_strings(answer).await, ["failed unknown_request"]);
}

#[tokio::test]
async fn an_interrupted_cutover_is_called_off_or_goes_on() {
    let begun = Begun::in_phase(Phase::Follow).await;
    let leadership = begun.store.try_lead().await.expect("lead").expect("the move");
    let state = "SELECT state FROM pgtandem.request ORDER BY id DESC LIMIT 1";
    let waiting = async || begun.target.query_strings(state).await == ["waiting"];
    // Given a request that no daemon has taken, when the command is interrupted, then it is withdrawn.
    let asking = begun.program.spawn(&["cutover"]);
    wait_until("the request", PATIENCE, waiting).await;
    asking.terminate();
    let ended = asking.wait(PATIENCE).await;
    assert!(ended.code == Some(143) && ended.stderr.contains("called off"), "{ended}");
    assert_eq!(begun.target.query_strings(state).await, ["expired"]);
    // Given one that a daemon works on, then it goes on, and that is said.
    let asking = begun.program.spawn(&["cutover"]);
    wait_until("the request", PATIENCE, waiting).await;
    begun.store.take_request(leadership.epoch()).await.expect("take").expect("a request");
    asking.terminate();
    let ended = asking.wait(PATIENCE).await;
    assert!(ended.code == Some(143) && ended.stderr.contains("goes on in the daemon"), "{ended}");
    assert_eq!(begun.target.query_strings(state).await, ["running"]);
    drop(leadership);
}
