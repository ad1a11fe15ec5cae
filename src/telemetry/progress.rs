//! Progress on the terminal of whoever runs the daemon: bars if it is one, plain log lines otherwise.
//!
//! Owns stderr together with the log: [`Terminal`] is also the log's writer and takes the bars away while a line is
//! written, so that the two never mix. Must never hold up the move: it only looks, a few times a second.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Write};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::fmt::MakeWriter;

use super::text::{bytes, count, duration};
use super::{Overview, Telemetry, Way};
use crate::state::Phase;

const REDRAW_EVERY: Duration = Duration::from_millis(250);
const LINE_EVERY: Duration = Duration::from_secs(5);
/// Table lines at the same time.
const LINES: usize = 8;

/// Stderr, shared by bars and log. Cheap to clone; all clones are the same terminal.
#[derive(Clone, Debug)]
pub struct Terminal {
    bars: MultiProgress,
    interactive: bool,
}

impl Terminal {
    /// Bars if stderr is a terminal.
    #[must_use]
    pub fn stderr() -> Self {
        if io::stderr().is_terminal() {
            Self { bars: MultiProgress::with_draw_target(ProgressDrawTarget::stderr()), interactive: true }
        } else {
            Self::plain()
        }
    }

    /// Never bars: for a log in JSON, which programs read.
    #[must_use]
    pub fn plain() -> Self {
        Self { bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()), interactive: false }
    }

    /// Whether bars are drawn.
    #[must_use]
    pub fn is_interactive(&self) -> bool {
        self.interactive
    }
}

/// Writes to stderr while the bars are away.
#[derive(Debug)]
pub struct BesideBars<'a>(&'a MultiProgress);

impl Write for BesideBars<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write_all(line)).map(|()| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl<'a> MakeWriter<'a> for Terminal {
    type Writer = BesideBars<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        BesideBars(&self.bars)
    }
}

/// Shows the progress until cancelled.
pub async fn show(telemetry: Telemetry, terminal: Terminal, cancel: CancellationToken) {
    if terminal.interactive {
        let mut bars = Bars::new(terminal.bars);
        every(REDRAW_EVERY, &cancel, || bars.draw(&telemetry.overview())).await;
        bars.clear();
    } else {
        let mut last = String::new();
        every(LINE_EVERY, &cancel, || log_line(&telemetry.overview(), &mut last)).await;
    }
}

async fn every(period: Duration, cancel: &CancellationToken, mut act: impl FnMut()) {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    while cancel.run_until_cancelled(ticks.tick()).await.is_some() {
        act();
    }
}

/// Nothing is logged while nothing moves.
fn log_line(overview: &Overview, last: &mut String) {
    let line = match overview.phase {
        Phase::Copy => copy_line(overview),
        Phase::Catchup | Phase::Follow | Phase::Cutover => follow_line(overview),
        _ => return,
    };
    if line != *last {
        tracing::info!("{line}");
        *last = line;
    }
}

/// One line about the copy.
fn copy_line(overview: &Overview) -> String {
    let copy = &overview.copy;
    let eta = copy.eta_seconds.map(|eta| format!(", about {} left", duration(eta as f64))).unwrap_or_default();
    let (done, tables) = match overview.way {
        Way::Direct => ("copied", copy.tables_done),
        Way::Dump => ("dumped", overview.tables_dumped),
        Way::Restore => ("restored", copy.tables_done),
    };
    format!(
        "{done} {} of {} tables, {} rows, {}{eta}",
        count(tables),
        count(copy.tables_total),
        count(copy.rows_done),
        bytes(copy.bytes_done)
    )
}

/// One line about following.
fn follow_line(overview: &Overview) -> String {
    let lag = match (overview.lag.bytes, overview.lag.seconds) {
        (Some(wal), Some(seconds)) => format!("{}, {}", bytes(wal), duration(seconds)),
        (Some(wal), None) => bytes(wal),
        (None, _) => "not known".to_owned(),
    };
    let rate = overview.transactions_per_second.map(|rate| format!(", {rate:.0} transactions/s")).unwrap_or_default();
    format!("lag {lag}{rate}")
}

/// The bars: all bytes, a line for each table in flight, following.
struct Bars {
    all: MultiProgress,
    overall: Option<ProgressBar>,
    tables: BTreeMap<String, ProgressBar>,
    follow: Option<ProgressBar>,
}

impl Bars {
    fn new(all: MultiProgress) -> Self {
        Self { all, overall: None, tables: BTreeMap::new(), follow: None }
    }

    fn draw(&mut self, overview: &Overview) {
        let copying = overview.phase == Phase::Copy;
        self.draw_overall(overview, copying);
        self.draw_tables(overview);
        let following = matches!(overview.phase, Phase::Catchup | Phase::Follow | Phase::Cutover);
        self.draw_follow(overview, following);
    }

    fn draw_overall(&mut self, overview: &Overview, wanted: bool) {
        if !wanted {
            remove(&self.all, self.overall.take());
            return;
        }
        let bar = self.overall.get_or_insert_with(|| {
            let bar = self.all.insert(0, ProgressBar::new(0));
            bar.set_style(style("{wide_bar} {percent:>3}%  {msg}"));
            bar
        });
        bar.set_length(overview.copy.bytes_done + overview.copy_bytes_left);
        bar.set_position(overview.copy.bytes_done);
        let line = copy_line(overview);
        bar.set_message(match &overview.activity {
            Some(activity) => format!("{line}; {activity}"),
            None => line,
        });
    }

    fn draw_tables(&mut self, overview: &Overview) {
        let wanted: BTreeMap<_, _> = overview
            .in_flight
            .iter()
            .take(LINES)
            .map(|(table, total)| (super::redact::shown(&format!("{}.{}", table.schema, table.name)), (table, *total)))
            .collect();
        let gone: Vec<_> = self.tables.keys().filter(|name| !wanted.contains_key(*name)).cloned().collect();
        for name in gone {
            remove(&self.all, self.tables.remove(&name));
        }
        for (name, (table, total)) in wanted {
            let all = &self.all;
            let bar = self.tables.entry(name.clone()).or_insert_with(|| {
                let bar = all.add(ProgressBar::new(0));
                bar.set_style(style("  {bar:20} {msg}"));
                bar
            });
            bar.set_length(total.max(table.bytes));
            bar.set_position(table.bytes);
            bar.set_message(format!("{name}  {} rows, {}", count(table.rows), bytes(table.bytes)));
        }
    }

    fn draw_follow(&mut self, overview: &Overview, wanted: bool) {
        if !wanted {
            remove(&self.all, self.follow.take());
            return;
        }
        let bar = self.follow.get_or_insert_with(|| {
            let bar = self.all.add(ProgressBar::new_spinner());
            bar.set_style(style("{spinner} {msg}"));
            bar
        });
        let line = follow_line(overview);
        bar.set_message(match &overview.activity {
            Some(activity) => format!("{}: {line}; {activity}", overview.phase),
            None => format!("{}: {line}", overview.phase),
        });
        bar.tick();
    }

    fn clear(&mut self) {
        remove(&self.all, self.overall.take());
        remove(&self.all, self.follow.take());
        for bar in std::mem::take(&mut self.tables).into_values() {
            remove(&self.all, Some(bar));
        }
    }
}

fn remove(all: &MultiProgress, bar: Option<ProgressBar>) {
    if let Some(bar) = bar {
        bar.finish_and_clear();
        all.remove(&bar);
    }
}

/// A template with a mistake shows a plain bar.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
