//! What is seen of two real servers: samples of the source, and the status with and without a daemon.

use pgtandem::config::Config;
use pgtandem::postgres::{Lsn, QualifiedName, Server, Side};
use pgtandem::state::{Phase, Store};
use pgtandem::telemetry::status::{Collector, Print, Status, print};
use pgtandem::telemetry::{Telemetry, sampler};
use tokio_util::sync::CancellationToken;

use crate::harness::{Cluster, PATIENCE, Stop, config, wait_until};

/// A move that follows, with nobody following.
async fn begun(config: &Config, source: &Cluster) -> (Store, Lsn) {
    let slot = "SELECT lsn::text FROM pg_create_logical_replication_slot('pgtandem_app', 'pgoutput')";
    let cut: Lsn = source.query_strings(slot).await[0].parse().expect("an LSN");
    let target = Server::new(Side::Target, config.target.clone(), "app").expect("a target");
    let store = Store::new(target, config.name.clone());
    store.install(&serde_json::json!({})).await.expect("install");
    store.begin(&serde_json::json!({})).await.expect("begin");
    store.plan_tables(&[(QualifiedName::new("public", "orders"), 1000)]).await.expect("plan");
    store.record_slot(cut).await.expect("record the slot");
    store.set_phase(Phase::Follow).await.expect("follow");
    (store, cut)
}

async fn look(config: &Config) -> Status {
    Collector::new(config).expect("a collector").collect().await.expect("a status")
}

#[tokio::test]
async fn the_status_without_a_daemon_comes_from_both_servers() {
    let (mut source, target) = Cluster::pair().await;
    let config = config(&source.database("postgres").url(), &target.database("postgres").url());

    // Given a target that knows nothing, then that is said.
    let status = look(&config).await;
    assert_eq!((status.phase, status.phase_since), ("preflight", None));

    // Given a move that follows, when nobody follows, then slot, head, progress and lag are there and it is not ready.
    let (_store, cut) = begun(&config, &source).await;
    source.execute("CREATE TABLE t AS SELECT generate_series(1, 1000)").await;
    let status = look(&config).await;
    assert_eq!(status.phase, "follow");
    assert!(status.source.version.is_some_and(|version| version.starts_with(&source.version().to_string())));
    assert!(status.target.version.is_some_and(|version| version.starts_with(&target.version().to_string())));
    assert_eq!(status.target.progress_lsn, Some(cut.to_string()));
    assert!(status.lag.bytes.is_some_and(|bytes| bytes > 0), "{:?}", status.lag);
    let slot = status.source.slot.expect("the slot");
    assert_eq!((slot.name.as_str(), slot.active), ("pgtandem_app", false));
    assert!(slot.retained_wal_bytes.is_some_and(|bytes| bytes > 0) && slot.confirmed_lsn.is_some());
    assert!(!status.ready && status.blockers.iter().any(|blocker| blocker.code == "no_daemon"));

    // Given a source that is down, then the rest is still said.
    source.stop(Stop::Immediate).await;
    let status = look(&config).await;
    assert_eq!((status.phase, status.source), ("follow", Default::default()));
    assert!(status.error.is_some());
}

#[tokio::test]
async fn the_command_prints_one_document() {
    let (source, target) = Cluster::pair().await;
    let config = config(&source.database("postgres").url(), &target.database("postgres").url());
    let (store, _) = begun(&config, &source).await;
    let blocker = serde_json::json!({"code": "unkeyed_changed", "message": "m", "hint": "h"});
    store.set_blockers(std::slice::from_ref(&blocker)).await.expect("blockers");
    let stop = CancellationToken::new();

    let mut json = Vec::new();
    print(&config, Print { json: true, ..Print::default() }, &mut json, &stop).await.expect("print");
    let document: serde_json::Value = serde_json::from_slice(&json).expect("one JSON document");
    assert_eq!((&document["phase"], json.last()), (&"follow".into(), Some(&b'\n')));
    assert!(document["blockers"].as_array().expect("blockers").contains(&blocker), "{document}");
    assert_eq!(document["ready"], false);

    let mut text = Vec::new();
    print(&config, Print::default(), &mut text, &stop).await.expect("print");
    let text = String::from_utf8(text).expect("text");
    assert!(text.contains("app: follow") && text.contains("pgtandem run"), "{text}");
}

#[tokio::test]
async fn the_sampler_survives_the_source() {
    let (mut source, target) = Cluster::pair().await;
    // A role that may see neither the walsenders nor anything else.
    source.execute("CREATE ROLE plain LOGIN").await;
    let plain = source.database("postgres").with_user("plain", "");
    source.set_hba("host all all 127.0.0.1/32 trust\nhost replication all 127.0.0.1/32 trust\n");
    source.reload().await;
    let config = config(&plain.url(), &target.database("postgres").url());
    begun(&config, &source).await;
    let telemetry = Telemetry::new(&config.name, config.cutover.max_lag);
    let server = Server::new(Side::Source, config.source.clone(), "app").expect("a source");
    let cancel = CancellationToken::new();
    let running = sampler::run(server, config.name.slot(), telemetry.clone(), cancel.clone());
    let sampler = tokio::spawn(running);

    wait_until("the source to be sampled", PATIENCE, async || telemetry.status().source.slot.is_some()).await;

    source.crash().await;
    let error = || {
        let text = telemetry.metrics_text().expect("metrics");
        text.lines().any(|line| line.starts_with("pgtandem_errors_total") && line.ends_with(" 1"))
    };
    wait_until("the outage to be counted", PATIENCE, async || error()).await;
    let before = telemetry.status().source.head_lsn;
    source.start_again().await;
    source.execute("CREATE TABLE t AS SELECT generate_series(1, 1000)").await;
    wait_until("the source to be sampled again", PATIENCE, async || telemetry.status().source.head_lsn != before).await;

    cancel.cancel();
    sampler.await.expect("the sampler ends when asked to");
}
