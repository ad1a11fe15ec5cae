//! What was measured: tables for people on stdout, JSON for programs in a file.

pub(crate) mod head;
pub(crate) mod numbers;
mod table;

use anyhow::Result;
use serde_json::{Value, json};

use self::head::Head;
use crate::contender::Contender;
use crate::drain::Drain;
use crate::options::Options;
use crate::programs::Programs;
use crate::rounds::Results;
use crate::steady::Steady;

/// Everything so far.
pub(crate) struct Report {
    head: Head,
    workloads: Vec<Results>,
    steady: Vec<Steady>,
}

impl Report {
    /// Looks at the machine, and asks every program for its version.
    pub(crate) async fn begin(options: &Options, programs: &Programs) -> Result<Self> {
        let mut asked = Vec::new();
        if options.wants(Contender::Pgtandem) || options.wants(Contender::PgtandemTwo) {
            asked.push(("pgtandem", programs.pgtandem.clone()));
        }
        if let Some(peer) = programs.pgcopydb.as_ref().filter(|_| options.wants(Contender::Pgcopydb)) {
            asked.push(("pgcopydb", peer.program.clone()));
        }
        let head = Head::look(options, programs, asked, Vec::new()).await?;
        Ok(Self { head, workloads: Vec::new(), steady: Vec::new() })
    }

    pub(crate) fn print_head(&self) {
        self.head.print();
    }

    /// Takes the results of a workload, and prints them.
    pub(crate) fn add(&mut self, results: Results) {
        println!("\n{}", table::of_drains(&results));
        self.workloads.push(results);
    }

    /// The same for the steady state.
    pub(crate) fn add_steady(&mut self, title: &str, steady: Vec<Steady>) {
        println!("\n{}", table::of_steady(title, &steady));
        self.steady.extend(steady);
    }

    /// Whether every target that was drained was identical to the source, and nobody failed who is to drain everything.
    pub(crate) fn all_good(&self) -> bool {
        self.bad().is_empty()
    }

    pub(crate) fn print_verdict(&self) {
        let compared = self.drains().filter(|(_, drain)| drain.is_drained() && drain.differences.is_some()).count();
        let drained = compared + self.steady.len();
        let unable: Vec<String> = self.undrained(false).collect();
        if !unable.is_empty() {
            println!("\nPeers that did not drain:\n\n{}", unable.join("\n"));
        }
        let bad = self.bad();
        if bad.is_empty() {
            println!("\nEvery drained target is identical to the source ({drained} comparisons).");
        } else {
            println!("\nNot good:\n\n{}", bad.join("\n"));
        }
    }

    pub(crate) fn write_json(&self, options: &Options) -> Result<()> {
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
        let steady: Vec<Value> = self.steady.iter().map(Steady::json).collect();
        let mut document = self.head.json();
        document.insert("workloads".to_owned(), json!(workloads));
        document.insert("steady".to_owned(), json!(steady));
        document.insert("good".to_owned(), json!(self.all_good()));
        head::write_json(&json!(document), options)
    }

    fn drains(&self) -> impl Iterator<Item = (&Results, &Drain)> {
        self.workloads.iter().flat_map(|results| results.drains.iter().map(move |drain| (results, drain)))
    }

    /// A line for everything that went wrong.
    fn bad(&self) -> Vec<String> {
        let steady = self.steady.iter().filter(|steady| !steady.differences.is_empty()).map(|steady| {
            format!("- (g) {}: DIFFERENT from the source: {}", steady.contender.name(), steady.differences.join("; "))
        });
        self.undrained(true).chain(steady).collect()
    }

    /// A line for each drain that did not bring the target to what the source holds, of those who must, or of the others.
    fn undrained(&self, must: bool) -> impl Iterator<Item = String> {
        self.drains()
            .filter(move |(_, drain)| drain.contender.must_drain() == must && !drain.is_drained())
            .map(|(results, drain)| format!("- ({}) {}", results.kind.letter(), drain.line()))
    }
}
