//! What was measured: tables for people on stdout, JSON for programs in a file.

mod table;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::contender::Contender;
use crate::drain::Drain;
use crate::machine::Machine;
use crate::options::Options;
use crate::programs::Programs;
use crate::rounds::Results;
use crate::servers::SETTINGS;
use crate::steady::Steady;

/// Everything so far.
pub(crate) struct Report {
    machine: Machine,
    versions: Vec<(&'static str, String)>,
    rounds: u32,
    scale: f64,
    workloads: Vec<Results>,
    steady: Vec<Steady>,
}

impl Report {
    /// Looks at the machine, and asks every program for its version.
    pub(crate) async fn begin(options: &Options, programs: &Programs) -> Result<Self> {
        let mut versions = vec![
            ("source", version(programs.source.bin.join("postgres")).await?),
            ("targets", version(programs.target.bin.join("postgres")).await?),
            ("clients", version(programs.pgbench()).await?),
        ];
        if options.wants(Contender::Pgtandem) || options.wants(Contender::PgtandemTwo) {
            versions.push(("pgtandem", version(&programs.pgtandem).await?));
        }
        if let Some(peer) = programs.pgcopydb.as_ref().filter(|_| options.wants(Contender::Pgcopydb)) {
            versions.push(("pgcopydb", version(&peer.program).await?));
        }
        Ok(Self {
            machine: Machine::look(),
            versions,
            rounds: options.rounds,
            scale: options.scale,
            workloads: Vec::new(),
            steady: Vec::new(),
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
        let steady: Vec<Value> = self.steady.iter().map(Steady::json).collect();
        let document = json!({
            "machine": self.machine.json(), "versions": versions, "settings": settings, "rounds": self.rounds,
            "scale": self.scale, "workloads": workloads, "steady": steady, "good": self.all_good(),
        });
        std::fs::write(path, format!("{document:#}\n")).with_context(|| format!("writing {}", path.display()))
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

async fn version(program: impl AsRef<std::path::Path>) -> Result<String> {
    let program = program.as_ref();
    let asking = || format!("asking {} for its version", program.display());
    let output = Command::new(program).arg("--version").output().await.with_context(asking)?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("unknown").to_owned())
}
