//! The figures and the verdict.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::pin::pin;
use std::time::Duration;

use futures_util::TryStreamExt;
use tokio_postgres::Client;

use super::compare::Comparison;
use super::figures::Figures;
use super::load::Record;
use super::schema::{OPENING_BALANCE, Scale};
use super::{grouped, human_bytes};
use crate::error::{Class, Doing, Error, Result};

/// How many kinds of client errors are shown.
const SHOWN_ERRORS: usize = 5;

/// The first copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copy {
    /// Bytes of table data.
    pub bytes: u64,
    /// Rows.
    pub rows: u64,
    /// From the first look that saw it to the first that saw it over.
    pub length: Duration,
}

impl fmt::Display for Copy {
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "for people"
    )]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.length.as_secs_f64();
        let rate = if seconds > 0.0 { (self.bytes as f64 / seconds) as u64 } else { 0 };
        let (bytes, rows) = (human_bytes(self.bytes), grouped(self.rows));
        write!(f, "copied {rows} rows, {bytes}, in {seconds:.1} s ({}/s)", human_bytes(rate))
    }
}

/// What became of the clients' tickets and of the accounts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Receipts {
    /// Transactions that were acknowledged to a client.
    pub acknowledged: u64,
    /// Acknowledged, and not on the target.
    pub lost: Vec<(i32, i64)>,
    /// On the target, though its client was told that it failed.
    pub ghosts: Vec<(i32, i64)>,
    /// Sent off and never answered; each may be there or not.
    pub unanswered: u64,
    /// The sum of all balances on the target, in cents.
    pub balance: i64,
    /// What it must be.
    pub expected_balance: i64,
}

/// Compares what the clients were told with what the target has now.
///
/// # Errors
/// The target's.
pub async fn read_receipts(target: &Client, record: &Record, scale: Scale) -> Result<Receipts> {
    let rows = target
        .query_raw("SELECT client, ticket FROM shop.receipts", std::iter::empty::<&str>())
        .await
        .doing(|| "reading the receipts")?;
    let mut found = HashSet::new();
    let mut rows = pin!(rows);
    while let Some(row) = rows.try_next().await.doing(|| "reading the receipts")? {
        found.insert((row.try_get::<_, i32>(0)?, row.try_get::<_, i64>(1)?));
    }
    let balance = target
        .query_one("SELECT coalesce(sum(balance::bigint), 0)::bigint FROM bank.account", &[])
        .await
        .doing(|| "adding up the balances")?;
    let expected_balance = i64::try_from(scale.customers).unwrap_or(i64::MAX).saturating_mul(OPENING_BALANCE);
    Ok(Receipts { balance: balance.try_get(0)?, expected_balance, ..settle(record, &found) })
}

/// What was promised against what is there.
fn settle(record: &Record, found: &HashSet<(i32, i64)>) -> Receipts {
    let tickets = |pick: fn(&super::load::ClientRecord) -> &[i64]| -> HashSet<(i32, i64)> {
        (0..).zip(&record.clients).flat_map(|(number, client)| pick(client).iter().map(move |t| (number, *t))).collect()
    };
    let acknowledged = tickets(|client| &client.acknowledged);
    let unanswered = tickets(|client| &client.unanswered);
    let mut lost: Vec<_> = acknowledged.difference(found).copied().collect();
    let mut ghosts: Vec<_> =
        found.iter().filter(|ticket| !acknowledged.contains(ticket) && !unanswered.contains(ticket)).copied().collect();
    lost.sort_unstable();
    ghosts.sort_unstable();
    Receipts {
        acknowledged: acknowledged.len() as u64,
        lost,
        ghosts,
        unanswered: unanswered.len() as u64,
        ..Receipts::default()
    }
}

/// The clients' figures by stretch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stretches {
    /// The clients alone on the source.
    pub alone: Figures,
    /// While the data was copied and followed.
    pub moving: Figures,
    /// From the start of the cutover to the end of the load: the switch is in it.
    pub switching: Figures,
    /// On the target.
    pub after: Figures,
}

/// Everything that the demo found out.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Major versions of source and target.
    pub versions: (u16, u16),
    /// What was moved, with indexes.
    pub data_bytes: u64,
    /// The first copy.
    pub copy: Copy,
    /// What the clients saw.
    pub stretches: Stretches,
    /// The longest time in which one client had nothing acknowledged, around the switch.
    pub longest_client_gap: Duration,
    /// Seconds and bytes, while following.
    pub max_lag: (f64, u64),
    /// As the cutover measured it.
    pub write_pause_seconds: Option<f64>,
    /// What the demo's own look at both sides added to it.
    pub look_took: Duration,
    /// What the clients saw fail.
    pub errors: BTreeMap<String, u64>,
    /// The tickets.
    pub receipts: Receipts,
    /// Row for row.
    pub comparison: Comparison,
}

impl Summary {
    /// For people, one after the other.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!(
                "PostgreSQL {} to {}, {} with indexes",
                self.versions.0,
                self.versions.1,
                human_bytes(self.data_bytes)
            ),
            self.copy.to_string(),
            format!("lag while following: at most {:.1} s, {}", self.max_lag.0, human_bytes(self.max_lag.1)),
            String::new(),
            format!("{:<24} {:>8} {:>8} {:>9} {:>9} {:>9}", "clients", "commits", "per s", "p50", "p99", "longest"),
            stretch("alone on the source", &self.stretches.alone),
            stretch("during copy and follow", &self.stretches.moving),
            stretch("from the cutover on", &self.stretches.switching),
            stretch("on the target", &self.stretches.after),
            String::new(),
            match self.write_pause_seconds {
                Some(seconds) => format!("write pause, measured by the cutover: {:.0} ms", seconds * 1000.0),
                None => "write pause, measured by the cutover: not reported".to_owned(),
            },
            format!("    of that, the demo's own look at both sides: {}", ms(self.look_took)),
            format!("longest time without any acknowledged commit: {}", ms(self.stretches.switching.longest_gap)),
            format!("longest time of one client without one: {}", ms(self.longest_client_gap)),
        ];
        lines.extend(self.error_lines());
        lines.push(String::new());
        lines.extend(
            self.claims().into_iter().map(|(holds, claim)| format!("{} {claim}", if holds { "yes" } else { "NO " })),
        );
        lines
    }

    fn error_lines(&self) -> Vec<String> {
        let total: u64 = self.errors.values().sum();
        let mut lines = vec![format!("client errors: {total}, each followed by a reconnect")];
        lines.extend(self.errors.iter().take(SHOWN_ERRORS).map(|(text, count)| format!("    {count} × {text}")));
        if self.errors.len() > SHOWN_ERRORS {
            lines.push(format!("    and {} other kinds", self.errors.len() - SHOWN_ERRORS));
        }
        lines
    }

    /// What must hold, and whether it does.
    fn claims(&self) -> Vec<(bool, String)> {
        let Receipts { acknowledged, lost, ghosts, unanswered, balance, expected_balance } = &self.receipts;
        let first = |tickets: &[(i32, i64)]| match tickets.first() {
            Some((client, ticket)) => format!(" (first: client {client}, ticket {ticket})"),
            None => String::new(),
        };
        let comparison = &self.comparison;
        let different = comparison.tables.iter().filter(|table| !table.equal).count();
        vec![
            (
                comparison.equal(),
                format!(
                    "both sides equal at the switch: {} tables with {} rows, {} sequences, {} definitions; different: {different}, {}, {}",
                    comparison.tables.len(),
                    grouped(comparison.rows()),
                    comparison.sequences,
                    comparison.definitions,
                    comparison.different_sequences.len(),
                    comparison.different_definitions.len()
                ),
            ),
            (
                lost.is_empty() && *acknowledged > 0,
                format!("{} acknowledged transactions, lost: {}{}", grouped(*acknowledged), lost.len(), first(lost)),
            ),
            (
                ghosts.is_empty(),
                format!(
                    "refused transactions on the target: {}{}; unanswered ones: {unanswered}",
                    ghosts.len(),
                    first(ghosts)
                ),
            ),
            (balance == expected_balance, format!("sum of the balances: {balance}, expected {expected_balance}")),
            (
                self.stretches.after.transactions > 0,
                format!(
                    "the clients went on at the target: {} commits",
                    grouped(self.stretches.after.transactions as u64)
                ),
            ),
        ]
    }

    /// Whether all of it holds.
    ///
    /// # Errors
    /// Class no, naming what does not hold.
    pub fn verdict(&self) -> Result<()> {
        let failed: Vec<String> =
            self.claims().into_iter().filter(|(holds, _)| !holds).map(|(_, claim)| claim).collect();
        if failed.is_empty() {
            return Ok(());
        }
        Err(Error::new(Class::No, "not_proven", format!("the move is not proven: {}", failed.join("; "))))
    }
}

fn stretch(name: &str, figures: &Figures) -> String {
    format!(
        "{name:<24} {:>8} {:>8.0} {:>9} {:>9} {:>9}",
        grouped(figures.transactions as u64),
        figures.rate(),
        ms(figures.p50),
        ms(figures.p99),
        ms(figures.max)
    )
}

fn ms(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::super::load::ClientRecord;
    use super::*;

    fn record() -> Record {
        let client = |acknowledged: &[i64], unanswered: &[i64]| ClientRecord {
            acknowledged: acknowledged.to_vec(),
            unanswered: unanswered.to_vec(),
            samples: Vec::new(),
        };
        Record { clients: vec![client(&[1, 2, 4], &[3]), client(&[1], &[2])], errors: BTreeMap::new() }
    }

    #[test]
    fn an_acknowledged_ticket_must_be_there_and_a_refused_one_must_not() {
        let receipts = settle(&record(), &HashSet::from([(0, 1), (0, 3), (0, 4), (1, 1), (1, 9)]));
        assert_eq!(receipts.lost, [(0, 2)]);
        assert_eq!(receipts.ghosts, [(1, 9)], "an unanswered ticket may be there");
        assert_eq!((receipts.acknowledged, receipts.unanswered), (4, 2));
    }

    fn proven() -> Summary {
        let mut summary = Summary { receipts: settle(&record(), &HashSet::new()), ..Summary::default() };
        summary.receipts.lost.clear();
        summary.stretches.after.transactions = 1;
        summary
    }

    #[test]
    fn the_verdict_names_what_does_not_hold() {
        assert!(proven().verdict().is_ok());
        let mut summary = proven();
        summary.receipts.lost.push((2, 7));
        let error = summary.verdict().unwrap_err();
        assert_eq!(error.class().exit_code(), 1);
        assert!(error.to_string().contains("client 2, ticket 7"), "{error}");

        let mut summary = proven();
        summary.receipts.balance += 1;
        assert!(summary.verdict().is_err());

        let mut summary = proven();
        summary.comparison.different_sequences.push("only on the source: s".into());
        assert!(summary.verdict().is_err());
    }

    #[test]
    fn a_copy_has_a_rate_once_it_took_time() {
        let copy = Copy { bytes: 10 << 20, rows: 1000, length: Duration::from_secs(2) };
        assert_eq!(copy.to_string(), "copied 1,000 rows, 10.0 MiB, in 2.0 s (5.0 MiB/s)");
        assert!(Copy::default().to_string().ends_with("(0 B/s)"));
    }
}
