//! The whole of telemetry, seen from outside: reports go in, metrics, status, text and HTTP come out.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::http::Listener;
use super::metrics::LABELLED_TABLES;
use super::status::{Style, render_text};
use super::*;
use crate::state::{CutoverRecord, CutoverState, MoveRecord, Progress, StepRecord, TableRecord};

const DEADLINE: Duration = Duration::from_secs(20);
const NOW: i64 = 1_700_000_000_000_000;

/// Every metric of the contract with its type and labels.
const CONTRACT: [(&str, &str, &[&str]); 29] = [
    ("pgtandem_build_info", "gauge", &["version"]),
    ("pgtandem_phase", "gauge", &["phase"]),
    ("pgtandem_ready", "gauge", &[]),
    ("pgtandem_blocker", "gauge", &["code"]),
    ("pgtandem_replication_lag_bytes", "gauge", &["stage"]),
    ("pgtandem_replication_lag_seconds", "gauge", &[]),
    ("pgtandem_last_applied_commit_timestamp_seconds", "gauge", &[]),
    ("pgtandem_slot_active", "gauge", &[]),
    ("pgtandem_slot_retained_wal_bytes", "gauge", &[]),
    ("pgtandem_slot_safe_wal_bytes", "gauge", &[]),
    ("pgtandem_slot_wal_status", "gauge", &["status"]),
    ("pgtandem_copy_tables", "gauge", &["state"]),
    ("pgtandem_copy_rows_total", "counter", &["table"]),
    ("pgtandem_copy_bytes_total", "counter", &["table"]),
    ("pgtandem_dump_bytes_total", "counter", &[]),
    ("pgtandem_copy_eta_seconds", "gauge", &[]),
    ("pgtandem_apply_transactions_total", "counter", &[]),
    ("pgtandem_apply_changes_total", "counter", &["op"]),
    ("pgtandem_apply_batch_duration_seconds", "histogram", &[]),
    ("pgtandem_apply_batch_changes", "histogram", &[]),
    ("pgtandem_apply_fallbacks_total", "counter", &["reason"]),
    ("pgtandem_queue_bytes", "gauge", &["queue"]),
    ("pgtandem_errors_total", "counter", &["class", "sqlstate"]),
    ("pgtandem_reconnects_total", "counter", &["side"]),
    ("pgtandem_missing_rows_total", "counter", &["table"]),
    ("pgtandem_verify_different_rows", "gauge", &["table"]),
    ("pgtandem_verify_last_success_timestamp_seconds", "gauge", &[]),
    ("pgtandem_cutover_step_duration_seconds", "gauge", &["step"]),
    ("pgtandem_write_pause_seconds", "gauge", &[]),
];

fn orders() -> QualifiedName {
    QualifiedName::new("public", "orders")
}

fn sample() -> SourceSample {
    SourceSample {
        version: "15.8".into(),
        head: Lsn::new(0x2000),
        now_micros: NOW,
        slot: "pgtandem_app".into(),
        slot_active: true,
        confirmed: Some(Lsn::new(0x1000)),
        retained_wal_bytes: Some(4096),
        safe_wal_bytes: Some(1 << 30),
        wal_limit_bytes: Some(1 << 30),
        wal_status: Some("reserved".into()),
        sent: Some(Lsn::new(0x1f00)),
    }
}

fn app() -> Telemetry {
    Telemetry::new(&MoveName::new("app").unwrap(), Duration::from_secs(1))
}

/// Following, with everything applied.
fn following() -> Telemetry {
    let telemetry = app();
    telemetry.phase(Phase::Follow);
    telemetry.source(sample());
    telemetry.applied(Lsn::new(0x2000), Some(NOW - 5_000_000));
    telemetry
}

/// A move on which everything has happened at least once, in the middle of the copy.
fn eventful() -> Telemetry {
    let telemetry = app();
    telemetry.target_version("17.2");
    telemetry.copy_table(&orders(), TableState::Copying, 0, 0, 1000);
    telemetry.copy_table(&QualifiedName::new("public", "users"), TableState::Pending, 0, 0, 500);
    telemetry.copy_advanced(&orders(), 10, 250);
    telemetry.phase(Phase::Copy);
    telemetry.received(Lsn::new(0x1e00));
    telemetry.applied(Lsn::new(0x1800), Some(NOW - 2_500_000));
    telemetry.confirmed(Lsn::new(0x1400));
    telemetry.source(sample());
    telemetry.batch(BatchApplied { transactions: 3, inserts: 4, updates: 2, deletes: 1, ..BatchApplied::default() });
    telemetry.fallback("unique_index");
    telemetry.queue("changes", 77);
    telemetry.error(&Error::new(Class::Retry, "deadlock_detected", "deadlock detected").sqlstate_code("40P01"));
    telemetry.reconnected(Side::Target);
    telemetry.missing_row(&orders());
    telemetry.compared(&orders(), 2);
    telemetry.verified();
    telemetry.blockers(&[Blocker {
        code: "prepared_transaction",
        message: "one is open".into(),
        hint: "end it".into(),
    }]);
    telemetry.cutover(None);
    telemetry.cutover_step("fence", "done", Some(0.25));
    telemetry.cutover_step("drain", "running", None);
    telemetry.write_pause(Duration::from_millis(420));
    telemetry
}

/// The value of one line of the metrics, by its name with labels.
fn value(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

#[test]
fn every_metric_of_the_contract_is_there_with_its_type_and_labels() {
    let telemetry = eventful();
    // An estimate needs some seconds of history: those are made up.
    let start = Instant::now();
    let mut pace = eta::Pace::default();
    pace.observe(start, 0);
    pace.observe(start + Duration::from_secs(5), 250);
    telemetry.model().copy_pace = pace;
    let text = telemetry.metrics_text().unwrap();
    for (name, kind, labels) in CONTRACT {
        assert!(text.contains(&format!("# TYPE {name} {kind}\n")), "{name} is no {kind}:\n{text}");
        let series = text.lines().find(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']) || rest.starts_with("_count"))
        });
        let series = series.unwrap_or_else(|| panic!("{name} has no value:\n{text}"));
        let found: Vec<_> = series
            .split_once('{')
            .map(|(_, rest)| rest.split(',').filter_map(|pair| pair.split_once('=').map(|(label, _)| label)).collect())
            .unwrap_or_default();
        assert_eq!(found, labels, "labels of {series}");
    }
    let known = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    for name in known {
        assert!(CONTRACT.iter().any(|(known, ..)| *known == name), "{name} is not in the contract");
    }
}

#[test]
fn values_are_what_was_reported() {
    let text = eventful().metrics_text().unwrap();
    for (series, expected) in [
        (r#"pgtandem_phase{phase="copy"}"#, 1.0),
        (r#"pgtandem_phase{phase="follow"}"#, 0.0),
        ("pgtandem_ready", 0.0),
        (r#"pgtandem_blocker{code="prepared_transaction"}"#, 1.0),
        (r#"pgtandem_replication_lag_bytes{stage="sent"}"#, 256.0),
        (r#"pgtandem_replication_lag_bytes{stage="received"}"#, 512.0),
        (r#"pgtandem_replication_lag_bytes{stage="applied"}"#, 2048.0),
        (r#"pgtandem_replication_lag_bytes{stage="confirmed"}"#, 3072.0),
        ("pgtandem_replication_lag_seconds", 2.5),
        ("pgtandem_last_applied_commit_timestamp_seconds", 1_699_999_997.5),
        (r#"pgtandem_slot_wal_status{status="reserved"}"#, 1.0),
        (r#"pgtandem_slot_wal_status{status="lost"}"#, 0.0),
        (r#"pgtandem_copy_tables{state="copying"}"#, 1.0),
        (r#"pgtandem_copy_tables{state="copied"}"#, 0.0),
        (r#"pgtandem_copy_rows_total{table="public.orders"}"#, 10.0),
        (r#"pgtandem_copy_bytes_total{table="public.users"}"#, 0.0),
        (r#"pgtandem_apply_changes_total{op="insert"}"#, 4.0),
        ("pgtandem_apply_batch_changes_sum", 7.0),
        (r#"pgtandem_errors_total{class="retry",sqlstate="40P01"}"#, 1.0),
        (r#"pgtandem_errors_total{class="bug",sqlstate=""}"#, 0.0),
        (r#"pgtandem_reconnects_total{side="source"}"#, 0.0),
        (r#"pgtandem_cutover_step_duration_seconds{step="fence"}"#, 0.25),
        ("pgtandem_write_pause_seconds", 0.42),
    ] {
        assert_eq!(value(&text, series), Some(expected), "{series} in\n{text}");
    }
}

#[test]
fn what_is_unknown_is_left_out_of_the_metrics() {
    let text = Telemetry::default().metrics_text().unwrap();
    for name in
        ["replication_lag_seconds", "slot_active", "slot_safe_wal_bytes", "write_pause_seconds", "copy_eta_seconds"]
    {
        assert!(!text.contains(&format!("pgtandem_{name}")), "{name} in\n{text}");
    }
}

#[test]
fn a_blocker_that_went_away_is_zero() {
    let telemetry = eventful();
    telemetry.metrics_text().unwrap();
    telemetry.blockers(&[]);
    assert_eq!(
        value(&telemetry.metrics_text().unwrap(), r#"pgtandem_blocker{code="prepared_transaction"}"#),
        Some(0.0)
    );
}

#[test]
fn many_tables_share_a_label() {
    let telemetry = app();
    for number in 0..LABELLED_TABLES + 5 {
        telemetry.copy_advanced(&QualifiedName::new("public", format!("t{number}")), 1, 1);
    }
    let text = telemetry.metrics_text().unwrap();
    let series = text.lines().filter(|line| line.starts_with("pgtandem_copy_rows_total{")).count();
    assert_eq!(series, LABELLED_TABLES + 1);
    assert_eq!(value(&text, r#"pgtandem_copy_rows_total{table="(other)"}"#), Some(5.0));
}

#[test]
fn the_status_document_is_the_one_of_the_contract() {
    let telemetry = eventful();
    telemetry.standing_error(Some(&Error::new(Class::Wait, "disk_full", "no space").hint("make room")));
    let mut status = telemetry.status();
    status.phase_since = Some("2026-01-02T03:04:05.678Z".into());
    let expected = concat!(
        r#"{"name":"app","phase":"copy","phase_since":"2026-01-02T03:04:05.678Z","#,
        r#""source":{"version":"15.8","head_lsn":"0/2000","slot":{"name":"pgtandem_app","active":true,"#,
        r#""confirmed_lsn":"0/1000","retained_wal_bytes":4096,"wal_status":"reserved"}},"#,
        r#""target":{"version":"17.2","progress_lsn":"0/1800"},"lag":{"bytes":2048,"seconds":2.5},"#,
        r#""copy":{"tables_total":2,"tables_done":0,"bytes_total":1500,"bytes_done":250,"rows_done":10,"eta_seconds":null},"#,
        r#""tables":[{"schema":"public","name":"orders","state":"copying","rows":10,"bytes":250},"#,
        r#"{"schema":"public","name":"users","state":"pending","rows":0,"bytes":0}],"#,
        r#""apply":{"transactions":3,"changes":7},"ready":false,"#,
        r#""blockers":[{"code":"prepared_transaction","message":"one is open","hint":"end it"}],"#,
        r#""cutover":{"state":"preparing","steps":[{"name":"fence","state":"done","seconds":0.25},"#,
        r#"{"name":"drain","state":"running","seconds":null}],"write_pause_seconds":0.42},"#,
        r#""error":{"code":"disk_full","message":"no space","hint":"make room"},"warnings":[]}"#
    );
    assert_eq!(status.to_json().unwrap(), expected);
}

#[test]
fn an_unknown_move_is_all_nulls_and_zeros() {
    let expected = concat!(
        r#"{"name":"app","phase":"preflight","phase_since":null,"source":{"version":null,"head_lsn":null,"slot":null},"#,
        r#""target":{"version":null,"progress_lsn":null},"lag":{"bytes":null,"seconds":null},"#,
        r#""copy":{"tables_total":0,"tables_done":0,"bytes_total":0,"bytes_done":0,"rows_done":0,"eta_seconds":null},"#,
        r#""tables":[],"apply":{"transactions":0,"changes":0},"ready":false,"blockers":[],"#,
        r#""cutover":{"state":null,"steps":[],"write_pause_seconds":null},"error":null,"warnings":[]}"#
    );
    assert_eq!(app().status().to_json().unwrap(), expected);
}

fn recorded() -> Recorded {
    let table = |name: &str, state, rows, bytes| TableRecord {
        name: QualifiedName::new("public", name),
        state,
        cut_lsn: None,
        rows,
        bytes,
        bytes_total: 1000,
    };
    Recorded {
        record: MoveRecord {
            blockers: vec![serde_json::json!({"code": "in_the_way", "message": "something", "hint": "move it"})],
            phase: Phase::Copy,
            phase_since: "2026-01-02T03:04:05.678Z".into(),
            source_identity: serde_json::Value::Null,
            slot_lsn: Some(Lsn::new(0x1000)),
            last_cut_lsn: None,
            constraints_done: false,
            error: Some(serde_json::json!({"code": "disk_full", "message": "no space", "hint": null})),
        },
        progress: Progress {
            lsn: Lsn::new(0x1800),
            commit_micros: Some(NOW - 2_500_000),
            transactions: 40,
            changes: 90,
        },
        tables: vec![table("orders", TableState::Copying, 5, 400), table("users", TableState::Copied, 9, 1200)],
        cutover: Some(CutoverRecord {
            id: 1,
            request_id: None,
            state: CutoverState::Aborted,
            write_pause_seconds: None,
            error: None,
            steps: vec![StepRecord { name: "fence".into(), state: "failed".into(), seconds: Some(1.5), detail: None }],
        }),
        daemon: false,
    }
}

#[test]
fn a_daemon_goes_on_counting_where_the_state_stands() {
    let telemetry = app();
    telemetry.resumed(&recorded());
    telemetry.phase(Phase::Copy);
    telemetry.source(sample());
    telemetry.copy_advanced(&orders(), 1, 100);
    telemetry.batch(BatchApplied { transactions: 2, inserts: 3, ..BatchApplied::default() });
    let status = telemetry.status();
    assert_eq!(status.phase_since.as_deref(), Some("2026-01-02T03:04:05.678Z"), "the same phase goes on");
    assert_eq!((status.apply.transactions, status.apply.changes), (42, 93));
    assert_eq!((status.copy.tables_done, status.copy.rows_done, status.copy.bytes_done), (1, 15, 1700));
    assert_eq!((status.lag.bytes, status.lag.seconds), (Some(2048), Some(2.5)));
    assert_eq!(status.cutover.state.as_deref(), Some("aborted"));
    assert_eq!(status.error.map(|error| error.code).as_deref(), Some("disk_full"));
}

#[test]
fn looking_again_at_the_state_counts_nothing_twice() {
    let telemetry = app();
    telemetry.resumed(&recorded());
    let first = telemetry.status();
    telemetry.resumed(&recorded());
    assert_eq!(telemetry.status(), first);
}

#[test]
fn a_copy_that_begins_again_begins_at_zero() {
    let telemetry = eventful();
    telemetry.copy_state(&orders(), TableState::Pending);
    assert_eq!(telemetry.status().copy.rows_done, 0);
    let text = telemetry.metrics_text().unwrap();
    assert_eq!(
        value(&text, r#"pgtandem_copy_rows_total{table="public.orders"}"#),
        Some(10.0),
        "a counter never shrinks"
    );
}

#[test]
fn ready_means_following_close_behind_with_nothing_in_the_way() {
    let telemetry = following();
    assert_eq!(telemetry.readiness(), Ok(()));

    let blocked = following();
    blocked.blockers(&[Blocker { code: "x", message: "something is in the way".into(), hint: String::new() }]);
    let elsewhere = following();
    elsewhere.phase(Phase::Catchup);
    let behind = following();
    behind.source(SourceSample { head: Lsn::new(0x9000), now_micros: NOW + 3_000_000, ..sample() });
    let lost = following();
    lost.source(SourceSample { wal_status: Some("lost".into()), ..sample() });
    let missing = following();
    missing.source(SourceSample {
        head: Lsn::new(0x2000),
        now_micros: NOW,
        slot: "s".into(),
        ..SourceSample::default()
    });
    let unread = following();
    unread.source(SourceSample { slot_active: false, ..sample() });
    let silent = following();
    silent.source_lost();
    let failing = following();
    failing.standing_error(Some(&Error::new(Class::Wait, "disk_full", "no space left")));
    for (telemetry, reason) in [
        (blocked, "something is in the way"),
        (elsewhere, "phase catchup"),
        (behind, "lag is 3.0 s"),
        (lost, "dropped WAL"),
        (missing, "is not on the source"),
        (unread, "no connection reads the slot"),
        (silent, "does not answer"),
        (failing, "no space left"),
    ] {
        let because = telemetry.readiness().unwrap_err();
        assert!(because.contains(reason), "{because:?} does not say {reason:?}");
        assert!(!telemetry.status().ready);
    }
}

#[test]
fn no_secret_is_shown_anywhere() {
    const SECRET: &str = "hunter2";
    let url = format!("postgresql://app:{SECRET}@db.example/app");
    let pairs = format!("host=db user=app password={SECRET}");
    let telemetry = eventful();
    let error = Error::new(Class::Wait, "x", format!("cannot reach {url}")).doing(pairs.clone()).hint(url.clone());
    telemetry.error(&error);
    telemetry.standing_error(Some(&error));
    telemetry.blockers(&[Blocker { code: "x", message: pairs.clone(), hint: url.clone() }]);
    telemetry.target_version(&url);
    telemetry.activity(&pairs);
    telemetry.source(SourceSample { version: url, ..sample() });
    let status = telemetry.status();
    let shown = [
        status.to_json().unwrap(),
        render_text(&status, Style::default()),
        telemetry.metrics_text().unwrap(),
        telemetry.readiness().unwrap_err(),
        format!("{:?} {status:?} {telemetry:?}", telemetry.overview()),
    ];
    for text in shown {
        assert!(!text.contains(SECRET), "{text}");
    }
}

#[test]
fn a_terminal_is_not_driven_by_names() {
    let telemetry = app();
    telemetry.copy_table(&QualifiedName::new("public", "evil\u{1b}[2J"), TableState::Copying, 0, 0, 10);
    let text = render_text(&telemetry.status(), Style::default());
    assert!(!text.contains('\u{1b}'), "{text}");
    assert!(text.contains("evil"), "{text}");
}

#[test]
fn the_text_says_what_the_phase_means_and_what_to_do() {
    let text = render_text(&following().status(), Style::default());
    for part in
        ["app: follow since", "The target follows the source.", "pgtandem cutover", "ready     yes", "0 B, 0.0 s"]
    {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
    assert!(render_text(&following().status(), Style { colour: true }).contains("\u{1b}[32mfollow"));
}

#[test]
fn numbers_are_written_for_people() {
    assert_eq!(["0", "999", "1,000", "1,234,567"], [0, 999, 1000, 1_234_567].map(text::count));
    assert_eq!(["0 B", "1023 B", "1.0 KiB", "1.5 GiB"], [0, 1023, 1024, 3 << 29].map(text::bytes));
    assert_eq!(text::bytes(u64::MAX), "16.0 EiB");
    assert_eq!(["0.0 s", "1 min 30 s", "2 h 5 min"], [0.0, 90.0, 7500.0].map(text::duration));
}

/// A live server for one test; ends with it.
struct Served {
    address: SocketAddr,
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<Result<()>>,
}

async fn serve(telemetry: Telemetry) -> Served {
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let (address, cancel) = (listener.address(), CancellationToken::new());
    Served { address, cancel: cancel.clone(), task: tokio::spawn(listener.serve(telemetry, cancel)) }
}

impl Served {
    async fn connect(&self, method: &str, path: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: pgtandem\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }

    /// The whole answer: status code, and head and body as text.
    async fn ask(&self, method: &str, path: &str) -> (u16, String) {
        let mut answer = String::new();
        let mut stream = self.connect(method, path).await;
        timeout(DEADLINE, stream.read_to_string(&mut answer)).await.expect("an answer in time").unwrap();
        let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
        (code, answer)
    }
}

#[tokio::test]
async fn each_path_answers() {
    let served = serve(following()).await;
    for (path, kind, part) in [
        ("/healthz", "text/plain", "ok"),
        ("/readyz", "text/plain", "ready"),
        ("/metrics", "text/plain; version=0.0.4", "pgtandem_phase{phase=\"follow\"} 1"),
        ("/status", "application/json", "{\"name\":\"app\",\"phase\":\"follow\""),
        ("/", "text/html", "new EventSource"),
    ] {
        let (code, answer) = served.ask("GET", path).await;
        assert_eq!(code, 200, "{path}: {answer}");
        assert!(answer.contains(&format!("content-type: {kind}")), "{path}: {answer}");
        assert!(answer.contains(part), "{path}: {answer}");
    }
    assert_eq!(served.ask("GET", "/nothing").await.0, 404);
}

#[tokio::test]
async fn nothing_can_be_changed_over_http() {
    let served = serve(following()).await;
    for path in ["/", "/metrics", "/healthz", "/readyz", "/status", "/events"] {
        for method in ["POST", "PUT", "DELETE", "PATCH"] {
            assert_eq!(served.ask(method, path).await.0, 405, "{method} {path}");
        }
    }
}

#[tokio::test]
async fn not_ready_says_why() {
    let served = serve(app()).await;
    let (code, answer) = served.ask("GET", "/readyz").await;
    assert_eq!(code, 503);
    assert!(answer.ends_with("the move is in phase preflight, not follow\n"), "{answer}");
}

#[tokio::test]
async fn events_carry_the_status_and_end_with_the_daemon() {
    let served = serve(following()).await;
    let mut lines = BufReader::new(served.connect("GET", "/events").await).lines();
    let mut next = async || timeout(DEADLINE, lines.next_line()).await.expect("a line in time").unwrap();
    let mut seen = 0;
    while seen < 2 {
        let line = next().await.expect("the stream goes on");
        if let Some(json) = line.strip_prefix("data: ") {
            let status: serde_json::Value = serde_json::from_str(json).unwrap();
            assert_eq!(status["phase"], "follow");
            seen += 1;
        }
    }
    served.cancel.cancel();
    while next().await.is_some() {}
    timeout(DEADLINE, served.task).await.expect("the end in time").unwrap().unwrap();
}

#[tokio::test]
async fn a_reader_that_never_finishes_does_not_hold_up_the_end() {
    let served = serve(following()).await;
    let mut stalled = TcpStream::connect(served.address).await.unwrap();
    stalled.write_all(b"GET /status HTTP/1.1\r\n").await.unwrap();
    served.cancel.cancel();
    timeout(DEADLINE, served.task).await.expect("the end in time").unwrap().unwrap();
}

#[tokio::test]
async fn an_address_in_use_is_a_clear_error() {
    let served = serve(app()).await;
    let error = Listener::bind(served.address).await.unwrap_err();
    assert_eq!((error.class(), error.code()), (Class::Usage, "http_listen"));
    assert!(error.to_string().contains(&served.address.to_string()), "{error}");
    assert!(error.hint_text().is_some_and(|hint| hint.contains("http.listen")));
}

#[tokio::test]
async fn the_end_waits_for_a_scrape_only_where_somebody_scrapes() {
    let (telemetry, stop) = (Telemetry::default(), CancellationToken::new());
    let served = serve(telemetry.clone()).await;
    // Given nobody who ever scraped, then nobody is waited for.
    assert!(http::linger(&telemetry, &stop).now_or_never().is_some());

    // Given one who does, then the end waits for the next scrape.
    served.ask("GET", "/metrics").await;
    let mut lingering = std::pin::pin!(http::linger(&telemetry, &stop));
    assert!(lingering.as_mut().now_or_never().is_none());
    served.ask("GET", "/status").await;
    assert!(lingering.as_mut().now_or_never().is_none());
    served.ask("GET", "/metrics").await;
    assert!(lingering.as_mut().now_or_never().is_some());

    // Given that the daemon is told to stop, then it does.
    stop.cancel();
    assert!(http::linger(&telemetry, &stop).now_or_never().is_some());
}
