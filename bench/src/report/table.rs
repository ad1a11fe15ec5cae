//! The tables, in Markdown.

use super::numbers::{mebibytes, median};
use crate::contender::Contender;
use crate::drain::Drain;
use crate::measure::Costs;
use crate::outcome::Outcome;
use crate::rounds::Results;
use crate::steady::{Lags, Steady};

/// One backlog: a line for each contender.
pub(super) fn of_drains(results: &Results) -> String {
    let mut lines = vec![
        format!("### ({}) {}", results.kind.letter(), results.title),
        String::new(),
        format!("The backlog is {} of the source's log.", mebibytes(results.backlog_bytes)),
        String::new(),
        "| | median s | best | worst | × native | of it until streaming | CPU s walsender | CPU s daemon | CPU s target \
         | memory daemon | memory walsender | memory target | target |"
            .to_owned(),
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|".to_owned(),
    ];
    let native = times(results, Contender::Native);
    for contender in <Contender as clap::ValueEnum>::value_variants() {
        let drains: Vec<&Drain> = results.drains.iter().filter(|drain| drain.contender == *contender).collect();
        if !drains.is_empty() {
            lines.push(line(*contender, &drains, &times(results, *contender), median(&native)));
        }
    }
    lines.join("\n")
}

/// The steady state: a line for each contender.
pub(super) fn of_steady(title: &str, all: &[Steady]) -> String {
    let mut lines = vec![
        format!("### (g) {title}"),
        String::new(),
        "| | highest rate followed | bound by | lag at half of it: rate | 50th percentile | 99th | worst | tries | target |"
            .to_owned(),
        "|---|--:|---|--:|--:|--:|--:|--:|---|".to_owned(),
    ];
    for steady in all {
        let (half, lags) = steady.at_half.clone().map_or((None, Lags::default()), |(rate, lags)| (Some(rate), lags));
        let seconds = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{:.0} ms", value * 1000.0));
        let rate = |value: Option<f64>| value.map_or_else(|| "none".to_owned(), |value| format!("{value:.0}/s"));
        let cells = [
            steady.contender.name().to_owned(),
            rate(steady.rate),
            if steady.bound_by_source { "the source" } else { "the lag" }.to_owned(),
            rate(half),
            seconds(lags.percentile(50.0)),
            seconds(lags.percentile(99.0)),
            seconds(lags.worst()),
            steady.trials.len().to_string(),
            if steady.differences.is_empty() { "identical" } else { "DIFFERENT" }.to_owned(),
        ];
        lines.push(format!("| {} |", cells.join(" | ")));
    }
    lines.join("\n")
}

fn line(contender: Contender, drains: &[&Drain], times: &[f64], native: Option<f64>) -> String {
    let name = contender.name();
    let Some(typical) = median(times) else {
        let instead = drains.first().map_or_else(String::new, |drain| match &drain.outcome {
            Outcome::Over(seconds) => format!("over {seconds:.0}"),
            Outcome::Failed(_) => "failed".to_owned(),
            Outcome::Done(seconds) => format!("({seconds:.2})"),
        });
        return format!("| {name} | {instead} | | | | | | | | | | | {} |", verdict(drains));
    };
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2}"));
    let drained = || drains.iter().filter(|drain| drain.is_drained());
    let cost = |of: fn(&Costs) -> f64| median(&drained().map(|drain| of(&drain.costs)).collect::<Vec<_>>());
    let memory = |of: fn(&Costs) -> u64| {
        let most = drained().map(|drain| of(&drain.costs)).max().unwrap_or(0);
        if most == 0 { String::new() } else { mebibytes(most) }
    };
    let streaming = median(&drained().filter_map(|drain| drain.streaming_after).collect::<Vec<_>>());
    let cells = [
        name.to_owned(),
        number(Some(typical)),
        number(times.iter().copied().reduce(f64::min)),
        number(times.iter().copied().reduce(f64::max)),
        number(native.map(|native| typical / native)),
        number(streaming),
        number(cost(|costs| costs.walsender.cpu_seconds)),
        number(cost(|costs| costs.daemon.cpu_seconds).filter(|_| contender != Contender::Native)),
        number(cost(|costs| costs.target.cpu_seconds).filter(|_| contender != Contender::Null)),
        memory(|costs| costs.daemon.peak_bytes),
        memory(|costs| costs.walsender.peak_bytes),
        memory(|costs| costs.target.peak_bytes),
        verdict(drains),
    ];
    format!("| {} |", cells.join(" | "))
}

fn verdict(drains: &[&Drain]) -> String {
    let different = drains.iter().filter(|drain| drain.differs()).count();
    let identical = drains.iter().filter(|drain| drain.is_drained() && drain.differences.is_some()).count();
    let drained = drains.iter().filter(|drain| drain.is_drained()).count();
    match drains.len() {
        all if different > 0 => format!("DIFFERENT ({different} of {all})"),
        all if drained < all => format!("not drained ({} of {all})", all - drained),
        all if identical > 0 => format!("identical ({identical} of {all})"),
        _ => "none".to_owned(),
    }
}

/// The seconds of every drain of a contender that brought the target to what the source holds.
fn times(results: &Results, contender: Contender) -> Vec<f64> {
    let of = results.drains.iter().filter(|drain| drain.contender == contender);
    of.filter_map(|drain| match drain.outcome {
        Outcome::Done(seconds) if drain.is_drained() => Some(seconds),
        _ => None,
    })
    .collect()
}
