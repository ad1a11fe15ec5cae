//! What was measured: tables in Markdown for people on stdout, JSON for programs in a file.

use anyhow::Result;
use serde_json::{Value, json};

use super::CopyOptions;
use super::contender::Contender;
use super::contender::pgcopydb::{Peers, Which};
use super::dataset::Dataset;
use super::rounds::Results;
use super::traffic::Loss;
use super::trial::Trial;
use crate::measure::Costs;
use crate::options::Options;
use crate::outcome::Outcome;
use crate::programs::Programs;
use crate::report::head::{self, Head};
use crate::report::numbers::{mebibytes, median};

/// Everything so far.
pub(crate) struct Report<'a> {
    options: &'a Options,
    copy: &'a CopyOptions,
    head: Head,
    all: Vec<Results>,
}

impl<'a> Report<'a> {
    /// Looks at the machine, and asks every program for its version.
    pub(crate) async fn begin(
        options: &'a Options,
        copy: &'a CopyOptions,
        programs: &Programs,
        peers: &Peers,
        settings: Vec<(&'static str, String)>,
    ) -> Result<Self> {
        let mut asked = Vec::new();
        if copy.wants(Contender::Pgtandem) {
            asked.push(("pgtandem", programs.pgtandem.clone()));
        }
        for (name, which, contender) in
            [("pgcopydb", Which::Debian, Contender::Pgcopydb), ("newer pgcopydb", Which::Newer, Contender::PgcopydbNew)]
        {
            if let Some(program) = peers.program(which).filter(|_| copy.wants(contender)) {
                asked.push((name, program.to_owned()));
            }
        }
        let head = Head::look(options, programs, asked, settings).await?;
        Ok(Self { options, copy, head, all: Vec::new() })
    }

    pub(crate) fn print_head(&self) {
        self.head.print();
        println!("- {} tables at once, {} indexes at once", self.copy.jobs, self.copy.index_jobs);
    }

    /// Takes the results of a data set, and prints them.
    pub(crate) fn add(&mut self, results: Results) {
        println!("\n{}", table(&results));
        self.all.push(results);
    }

    /// Whether everybody was done, and every target that was compared is identical to the source.
    pub(crate) fn all_good(&self) -> bool {
        self.trials().all(|(_, trial)| trial.seconds().is_some())
    }

    pub(crate) fn print_verdict(&self) {
        let bad = self.trials().filter(|(_, trial)| trial.seconds().is_none());
        let bad: Vec<String> =
            bad.map(|(results, trial)| format!("- {}: {}", results.dataset.name(), trial.line())).collect();
        if bad.is_empty() {
            let compared = self.trials().filter(|(_, trial)| trial.differences.is_some()).count();
            println!("\nEvery target that was compared is identical to the source ({compared} comparisons).");
        } else {
            println!("\nNot good:\n\n{}", bad.join("\n"));
        }
    }

    pub(crate) fn write_json(&self) -> Result<()> {
        let results = self.all.iter().map(|results| {
            json!({
                "dataset": results.dataset.name(), "title": results.title, "bytes": results.bytes,
                "copies": results.trials.iter().map(Trial::json).collect::<Vec<_>>(),
            })
        });
        let mut document = self.head.json();
        document.insert("jobs".to_owned(), json!(self.copy.jobs));
        document.insert("index_jobs".to_owned(), json!(self.copy.index_jobs));
        document.insert("datasets".to_owned(), Value::Array(results.collect()));
        document.insert("good".to_owned(), json!(self.all_good()));
        head::write_json(&json!(document), self.options)
    }

    fn trials(&self) -> impl Iterator<Item = (&Results, &Trial)> {
        self.all.iter().flat_map(|results| results.trials.iter().map(move |trial| (results, trial)))
    }
}

/// One data set: a line for each contender. Times are compared with those of the first.
fn table(results: &Results) -> String {
    let against = results.contenders.first().copied();
    let base = against.and_then(|first| median(&seconds(&of(results, first))));
    let ratio = format!("× {}", against.map_or("", Contender::name));
    let columns = ["", "median s", "best", "worst", &ratio, "of it ANALYZE"];
    let mut head: Vec<&str> = columns.to_vec();
    head.extend(extra_columns(results.dataset));
    head.extend([
        "CPU s program",
        "CPU s source",
        "CPU s target",
        "memory program",
        "memory source",
        "memory target",
        "target",
    ]);
    let alignment: Vec<&str> =
        (0..head.len()).map(|at| if at == 0 || at + 1 == head.len() { "---" } else { "--:" }).collect();
    let mut lines = vec![
        format!("### {}: {}", results.dataset.name(), results.title),
        String::new(),
        format!("It takes {} on the source's disk, indexes included.", mebibytes(results.bytes)),
        String::new(),
        format!("| {} |", head.join(" | ").trim_start()),
        format!("|{}|", alignment.join("|")),
    ];
    for &contender in &results.contenders {
        let cells = line(contender, &of(results, contender), results.dataset, base);
        lines.push(format!("| {} |", cells.join(" | ")));
    }
    lines.join("\n")
}

fn of(results: &Results, contender: Contender) -> Vec<&Trial> {
    results.trials.iter().filter(|trial| trial.contender == contender).collect()
}

fn seconds(trials: &[&Trial]) -> Vec<f64> {
    trials.iter().filter_map(|trial| trial.seconds()).collect()
}

/// What is told of this data set alone.
fn extra_columns(dataset: Dataset) -> &'static [&'static str] {
    match dataset {
        Dataset::Many => &["until the first row, s"],
        Dataset::Busy => &["pgbench/s undisturbed", "transactions lost", "lost, in s"],
        _ => &[],
    }
}

fn line(contender: Contender, trials: &[&Trial], dataset: Dataset, base: Option<f64>) -> Vec<String> {
    let times = seconds(trials);
    let good: Vec<&&Trial> = trials.iter().filter(|trial| trial.seconds().is_some()).collect();
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2}"));
    let whole = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.0}"));
    let middle =
        |of: &dyn Fn(&Trial) -> Option<f64>| median(&good.iter().filter_map(|trial| of(trial)).collect::<Vec<_>>());
    let cost = |of: fn(&Costs) -> f64| number(middle(&|trial| Some(of(&trial.costs))));
    let memory = |of: fn(&Costs) -> u64| {
        let most = good.iter().map(|trial| of(&trial.costs)).max().unwrap_or(0);
        if most == 0 { String::new() } else { mebibytes(most) }
    };
    let typical = match median(&times) {
        Some(typical) => number(Some(typical)),
        None => trials.first().map_or_else(String::new, |trial| instead(trial)),
    };
    let mut cells = vec![
        contender.name().to_owned(),
        typical,
        number(times.iter().copied().reduce(f64::min)),
        number(times.iter().copied().reduce(f64::max)),
        number(median(&times).zip(base).map(|(typical, base)| typical / base)),
        number(middle(&|trial| trial.statistics)),
    ];
    match dataset {
        Dataset::Many => cells.push(number(middle(&|trial| trial.planning))),
        Dataset::Busy => cells.extend([
            whole(middle(&|trial| trial.loss.map(|loss| loss.undisturbed))),
            whole(middle(&|trial| trial.loss.as_ref().map(Loss::lost))),
            number(middle(&|trial| trial.loss.map(|loss| loss.lost() / loss.undisturbed))),
        ]),
        _ => {}
    }
    cells.extend([
        cost(|costs| costs.daemon.cpu_seconds),
        cost(|costs| costs.source.cpu_seconds),
        cost(|costs| costs.target.cpu_seconds),
        memory(|costs| costs.daemon.peak_bytes),
        memory(|costs| costs.source.peak_bytes),
        memory(|costs| costs.target.peak_bytes),
        verdict(trials),
    ]);
    cells
}

/// What stands where no time does.
fn instead(trial: &Trial) -> String {
    match &trial.outcome {
        Outcome::Over(seconds) => format!("over {seconds:.0}"),
        Outcome::Failed(_) => "failed".to_owned(),
        Outcome::Done(seconds) => format!("({seconds:.2})"),
    }
}

fn verdict(trials: &[&Trial]) -> String {
    let all = trials.len();
    let different = trials.iter().filter(|trial| trial.differs()).count();
    let done = trials.iter().filter(|trial| trial.seconds().is_some()).count();
    let compared = trials.iter().filter(|trial| trial.seconds().is_some() && trial.differences.is_some()).count();
    if different > 0 {
        format!("DIFFERENT ({different} of {all})")
    } else if done < all {
        format!("failed ({} of {all})", all - done)
    } else if compared > 0 {
        format!("identical ({compared} of {all})")
    } else {
        "not compared".to_owned()
    }
}
