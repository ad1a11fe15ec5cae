//! The metrics of the contract: names, labels and help texts in one place.
//!
//! Counters are counted where something happens, by [`super::Telemetry`]; gauges are set from the model right before
//! a scrape, so that what is unknown (no sample of the source yet) is left out instead of shown as zero. Units are
//! base units. The label `table` is bounded: beyond the first [`LABELLED_TABLES`] tables all share one value.

use prometheus::core::Collector;
use prometheus::{Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry, TextEncoder};

use crate::error::{Class, Error, Result};
use crate::postgres::Side;
use crate::state::{Phase, TableState};

/// How many tables get a label value of their own.
pub const LABELLED_TABLES: usize = 1000;
/// The label value of all tables beyond.
pub const OTHER_TABLES: &str = "(other)";

/// `pg_replication_slots.wal_status`
pub const WAL_STATUS: [&str; 4] = ["reserved", "extended", "unreserved", "lost"];
/// `pgtandem_apply_changes_total{op}`
pub const OPERATIONS: [&str; 4] = ["insert", "update", "delete", "truncate"];

const CLASSES: [Class; 7] =
    [Class::Retry, Class::Wait, Class::Operator, Class::Usage, Class::No, Class::Held, Class::Bug];

/// Every metric, registered in a registry of its own.
pub struct Metrics {
    registry: Registry,
    pub(super) phase: GaugeVec,
    pub(super) ready: Gauge,
    pub(super) blocker: GaugeVec,
    pub(super) lag_bytes: GaugeVec,
    pub(super) lag_seconds: Optional,
    pub(super) last_commit: Optional,
    pub(super) slot_active: Optional,
    pub(super) slot_retained: Optional,
    pub(super) slot_safe: Optional,
    pub(super) slot_wal_status: GaugeVec,
    pub(super) copy_tables: GaugeVec,
    pub(super) copy_rows: IntCounterVec,
    pub(super) copy_bytes: IntCounterVec,
    pub(super) dump_bytes: IntCounter,
    pub(super) copy_eta: Optional,
    pub(super) transactions: IntCounter,
    pub(super) changes: IntCounterVec,
    pub(super) batch_duration: Histogram,
    pub(super) batch_changes: Histogram,
    pub(super) fallbacks: IntCounterVec,
    pub(super) queue_bytes: GaugeVec,
    pub(super) errors: IntCounterVec,
    pub(super) reconnects: IntCounterVec,
    pub(super) missing_rows: IntCounterVec,
    pub(super) different_rows: GaugeVec,
    pub(super) verified: Optional,
    pub(super) cutover_step: GaugeVec,
    pub(super) write_pause: Optional,
}

impl Metrics {
    /// All of them, with the counters whose labels are known at 0.
    #[must_use]
    pub fn new() -> Self {
        let make = Maker { registry: Registry::new() };
        let build_info = make.gauges("build_info", "1, for the version that runs", &["version"]);
        set(&build_info, env!("CARGO_PKG_VERSION"), 1.0);
        let metrics = Self {
            phase: make.gauges("phase", "1 for the phase that the move is in, 0 for the others", &["phase"]),
            ready: make.gauge("ready", "1 while following within cutover.max_lag with nothing in the way of a cutover"),
            blocker: make.gauges("blocker", "1 for what keeps the move from going on or from a cutover", &["code"]),
            lag_bytes: make.gauges(
                "replication_lag_bytes",
                "WAL between the source's head and what was sent, received, applied and confirmed",
                &["stage"],
            ),
            lag_seconds: make.optional("replication_lag_seconds", "How old the target is, by the source's clock"),
            last_commit: make.optional(
                "last_applied_commit_timestamp_seconds",
                "Commit time of the last applied transaction on the source",
            ),
            slot_active: make.optional("slot_active", "1 while a connection reads the slot on the source"),
            slot_retained: make.optional("slot_retained_wal_bytes", "WAL that the source keeps because of the slot"),
            slot_safe: make.optional(
                "slot_safe_wal_bytes",
                "WAL that can still be written before the slot may be lost; absent without a limit",
            ),
            slot_wal_status: make.gauges(
                "slot_wal_status",
                "1 for the slot's wal_status, 0 for the others",
                &["status"],
            ),
            copy_tables: make.gauges("copy_tables", "Tables of the move by the state of their copy", &["state"]),
            copy_rows: make.counters("copy_rows_total", "Rows sent to the target by the copy", &["table"]),
            copy_bytes: make.counters("copy_bytes_total", "Bytes sent to the target by the copy", &["table"]),
            dump_bytes: make
                .counter("dump_bytes_total", "Bytes of rows read into the archive of copy.method = \"dump\""),
            copy_eta: make.optional("copy_eta_seconds", "Estimated time until all rows are copied; absent if unknown"),
            transactions: make.counter("apply_transactions_total", "Source transactions applied to the target"),
            changes: make.counters("apply_changes_total", "Changes applied to the target", &["op"]),
            batch_duration: make.histogram(
                "apply_batch_duration_seconds",
                "From a batch's first statement to its commit",
                vec![0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0],
            ),
            batch_changes: make.histogram(
                "apply_batch_changes",
                "Changes in a batch",
                vec![1.0, 10.0, 100.0, 1e3, 5e3, 1e4, 2.5e4, 5e4, 1e5, 2.5e5, 5e5, 1e6, 1e7],
            ),
            fallbacks: make.counters("apply_fallbacks_total", "Batches that took a slower path", &["reason"]),
            queue_bytes: make.gauges("queue_bytes", "Bytes waiting in a queue of the daemon", &["queue"]),
            errors: make.counters("errors_total", "Errors handled, by class and SQLSTATE", &["class", "sqlstate"]),
            reconnects: make.counters("reconnects_total", "Connections lost and made again", &["side"]),
            missing_rows: make.counters(
                "missing_rows_total",
                "Updates and deletes that found no row on the target",
                &["table"],
            ),
            different_rows: make.gauges(
                "verify_different_rows",
                "Rows that differed when the table was last compared",
                &["table"],
            ),
            verified: make.optional(
                "verify_last_success_timestamp_seconds",
                "When both sides were last compared and found equal; absent until then",
            ),
            cutover_step: make.gauges("cutover_step_duration_seconds", "Duration of the cutover's steps", &["step"]),
            write_pause: make.optional(
                "write_pause_seconds",
                "From the first refused write on the source to the first accepted one on the target",
            ),
            registry: make.registry,
        };
        metrics.begin();
        metrics
    }

    /// Gives every known label value its first sample, so that a rate sees the first event.
    fn begin(&self) {
        for phase in Phase::ALL {
            set(&self.phase, phase.as_str(), 0.0);
        }
        for status in WAL_STATUS {
            set(&self.slot_wal_status, status, 0.0);
        }
        for state in TableState::ALL {
            set(&self.copy_tables, state.as_str(), 0.0);
        }
        for operation in OPERATIONS {
            add(&self.changes, operation, 0);
        }
        for class in CLASSES {
            self.error(class, "", 0);
        }
        for side in [Side::Source, Side::Target] {
            add(&self.reconnects, side.as_str(), 0);
        }
    }

    /// Counts errors; `sqlstate` is empty for those that no server sent.
    pub(super) fn error(&self, class: Class, sqlstate: &str, count: u64) {
        if let Ok(counter) = self.errors.get_metric_with_label_values(&[class.as_str(), sqlstate]) {
            counter.inc_by(count);
        }
    }

    /// The Prometheus text format.
    ///
    /// # Errors
    /// A defect: the registry holds something that cannot be printed.
    pub fn text(&self) -> Result<String> {
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .map_err(|e| Error::bug(format!("the metrics cannot be printed: {e}")))
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// A gauge without labels that is left out while its value is unknown.
pub struct Optional(GaugeVec);

impl Optional {
    /// Shows the value, or nothing.
    pub(super) fn set(&self, value: Option<f64>) {
        match value {
            Some(value) => {
                if let Ok(gauge) = self.0.get_metric_with_label_values::<&str>(&[]) {
                    gauge.set(value);
                }
            }
            None => self.0.reset(),
        }
    }
}

/// Sets the gauge of one label value.
pub(super) fn set(gauges: &GaugeVec, label: &str, value: f64) {
    if let Ok(gauge) = gauges.get_metric_with_label_values(&[label]) {
        gauge.set(value);
    }
}

/// Counts on the counter of one label value; 0 makes it appear.
pub(super) fn add(counters: &IntCounterVec, label: &str, count: u64) {
    if let Ok(counter) = counters.get_metric_with_label_values(&[label]) {
        counter.inc_by(count);
    }
}

/// Makes metrics under the name of the project.
struct Maker {
    registry: Registry,
}

impl Maker {
    fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.keep(Gauge::with_opts(options(name, help)))
    }

    fn optional(&self, name: &str, help: &str) -> Optional {
        Optional(self.gauges(name, help, &[]))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.keep(GaugeVec::new(options(name, help), labels))
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.keep(IntCounter::with_opts(options(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.keep(IntCounterVec::new(options(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: Vec<f64>) -> Histogram {
        let options = HistogramOpts { common_opts: options(name, help), buckets };
        self.keep(Histogram::with_opts(options))
    }

    #[expect(
        clippy::expect_used,
        reason = "fails only for a malformed or doubled name; all names are constants of this file, made in every test"
    )]
    fn keep<M: Collector + Clone + 'static>(&self, metric: prometheus::Result<M>) -> M {
        let metric = metric.expect("a well-formed name");
        self.registry.register(Box::new(metric.clone())).expect("a name of its own");
        metric
    }
}

fn options(name: &str, help: &str) -> Opts {
    Opts::new(format!("pgtandem_{name}"), help)
}
