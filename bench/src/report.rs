//! What was measured: tables for people on stdout, JSON for programs in a file.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::contender::Contender;
use crate::drain::{Drain, Outcome};
use crate::machine::Machine;
use crate::measure::Costs;
use crate::options::Options;
use crate::programs::Programs;
use crate::servers::SETTINGS;
use crate::stage::Results;

/// Everything so far.
pub(crate) struct Report {
    machine: Machine,
    versions: Vec<(&'static str, String)>,
    rounds: u32,
    scale: f64,
    workloads: Vec<Results>,
}

impl Report {
    /// Looks at the machine, and asks every program for its version.
    pub(crate) async fn begin(options: &Options, programs: &Programs) -> Result<Self> {
        let mut versions = vec![
            ("source", version(programs.source.bin.join("postgres")).await?),
            ("targets", version(programs.target.bin.join("postgres")).await?),
            ("clients", version(programs.pgbench()).await?),
        ];
        if options.contenders.contains(&Contender::Pgtandem) {
            versions.push(("pgtandem", version(&programs.pgtandem).await?));
        }
        Ok(Self {
            machine: Machine::look(),
            versions,
            rounds: options.rounds,
            scale: options.scale,
            workloads: Vec::new(),
        })
    }

    pub(crate) fn print_head(&self) {
        println!("Machine: {}\n", self.machine.line());
        for (what, version) in &self.versions {
            println!("- {what}: {version}");
        }
        let settings: Vec<String> = SETTINGS
            .iter()
            .filter(|(name, _)| !["listen_addresses", "unix_socket_directories", "log_line_prefix"].contains(name))
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        println!("- all servers: {}; everything else as it is by default", settings.join(", "));
        println!("- {} rounds, scale {}; seconds are medians", self.rounds, self.scale);
    }

    /// Takes the results of a workload, and prints them.
    pub(crate) fn add(&mut self, results: Results) {
        println!("\n{}", table(&results));
        self.workloads.push(results);
    }

    /// Whether every target that was drained was identical to the source, and nobody failed who is to drain everything.
    pub(crate) fn all_good(&self) -> bool {
        self.bad().is_empty()
    }

    pub(crate) fn print_verdict(&self) {
        let drained = self.drains().filter(|(_, drain)| drain.differences.is_some()).count();
        let bad = self.bad();
        if bad.is_empty() {
            println!("\nEvery drained target is identical to the source ({drained} drains).");
        } else {
            println!("\nNot good:\n\n{}", bad.join("\n"));
        }
    }

    pub(crate) fn write_json(&self, options: &Options) -> Result<()> {
        let Some(path) = &options.json else { return Ok(()) };
        let versions: serde_json::Map<String, Value> =
            self.versions.iter().map(|(what, version)| ((*what).to_owned(), json!(version))).collect();
        let settings: serde_json::Map<String, Value> =
            SETTINGS.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        let workloads: Vec<Value> = self
            .workloads
            .iter()
            .map(|results| {
                json!({
                    "letter": results.kind.letter().to_string(), "title": results.title,
                    "backlog_bytes": results.backlog_bytes,
                    "drains": results.drains.iter().map(Drain::json).collect::<Vec<_>>(),
                })
            })
            .collect();
        let document = json!({
            "machine": self.machine.json(), "versions": versions, "settings": settings,
            "rounds": self.rounds, "scale": self.scale, "workloads": workloads, "good": self.all_good(),
        });
        std::fs::write(path, format!("{document:#}\n")).with_context(|| format!("writing {}", path.display()))
    }

    fn drains(&self) -> impl Iterator<Item = (&Results, &Drain)> {
        self.workloads.iter().flat_map(|results| results.drains.iter().map(move |drain| (results, drain)))
    }

    /// A line for each drain that went wrong.
    fn bad(&self) -> Vec<String> {
        self.drains()
            .filter(|(_, drain)| {
                let differs = drain.differences.as_ref().is_some_and(|found| !found.is_empty());
                differs || !matches!(drain.outcome, Outcome::Drained(_))
            })
            .map(|(results, drain)| format!("- ({}) {}", results.kind.letter(), drain.line()))
            .collect()
    }
}

async fn version(program: impl AsRef<std::path::Path>) -> Result<String> {
    let program = program.as_ref();
    let asking = || format!("asking {} for its version", program.display());
    let output = Command::new(program).arg("--version").output().await.with_context(asking)?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("unknown").to_owned())
}

/// One workload: a line for each contender.
fn table(results: &Results) -> String {
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

fn line(contender: Contender, drains: &[&Drain], times: &[f64], native: Option<f64>) -> String {
    let name = contender.name();
    let Some(typical) = median(times) else {
        let outcome = drains.iter().find_map(|drain| match &drain.outcome {
            Outcome::Over(seconds) => Some(format!("over {seconds:.0}")),
            Outcome::Failed(_) => Some("failed".to_owned()),
            Outcome::Drained(_) => None,
        });
        let over = outcome.unwrap_or_default();
        return format!("| {name} | {over} | | | | | | | | | | | not drained |");
    };
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2}"));
    let drained = || drains.iter().filter(|drain| matches!(drain.outcome, Outcome::Drained(_)));
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
    let checked: Vec<_> = drains.iter().filter_map(|drain| drain.differences.as_ref()).collect();
    match checked.iter().filter(|found| !found.is_empty()).count() {
        _ if checked.is_empty() => "none".to_owned(),
        0 => format!("identical ({} of {})", checked.len(), drains.len()),
        different => format!("DIFFERENT ({different} of {})", drains.len()),
    }
}

/// The seconds of every drain of a contender that got done.
fn times(results: &Results, contender: Contender) -> Vec<f64> {
    let of = results.drains.iter().filter(|drain| drain.contender == contender);
    of.filter_map(|drain| match drain.outcome {
        Outcome::Drained(seconds) => Some(seconds),
        _ => None,
    })
    .collect()
}

/// The middle one, or the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    Some((sorted[sorted.len() / 2 - 1] + upper) / 2.0)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
