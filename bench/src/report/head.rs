//! What stands before every report: the machine, the programs' versions, the settings.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::machine::Machine;
use crate::options::Options;
use crate::programs::Programs;
use crate::servers::SETTINGS;

/// See the module's first lines.
pub(crate) struct Head {
    machine: Machine,
    versions: Vec<(&'static str, String)>,
    /// Settings of the servers beside those that are always there.
    more: Vec<(&'static str, String)>,
    rounds: u32,
    scale: f64,
}

impl Head {
    /// Looks at the machine, and asks the servers, the clients and these programs for their versions.
    pub(crate) async fn look(
        options: &Options,
        programs: &Programs,
        asked: Vec<(&'static str, PathBuf)>,
        more: Vec<(&'static str, String)>,
    ) -> Result<Self> {
        let mut all = vec![
            ("source", programs.source.bin.join("postgres")),
            ("targets", programs.target.bin.join("postgres")),
            ("clients", programs.pgbench()),
        ];
        all.extend(asked);
        let mut versions = Vec::new();
        for (what, program) in all {
            versions.push((what, version(&program).await?));
        }
        Ok(Self { machine: Machine::look(), versions, more, rounds: options.rounds, scale: options.scale })
    }

    pub(crate) fn print(&self) {
        println!("Machine: {}\n", self.machine.line());
        for (what, version) in &self.versions {
            println!("- {what}: {version}");
        }
        let hidden = ["listen_addresses", "unix_socket_directories", "log_line_prefix"];
        let settings = SETTINGS.iter().filter(|(name, _)| !hidden.contains(name));
        let settings = settings.map(|(name, value)| format!("{name}={value}"));
        let more = self.more.iter().map(|(name, value)| format!("{name}={value}"));
        let all: Vec<String> = settings.chain(more).collect();
        println!("- all servers: {}; everything else as it is by default", all.join(", "));
        let rounds = if self.rounds == 1 { "round" } else { "rounds" };
        println!("- {} {rounds}, scale {}; seconds are medians", self.rounds, self.scale);
    }

    /// The same for programs, as the first fields of a document.
    pub(crate) fn json(&self) -> serde_json::Map<String, Value> {
        let versions: serde_json::Map<String, Value> =
            self.versions.iter().map(|(what, version)| ((*what).to_owned(), json!(version))).collect();
        let more = self.more.iter().map(|(name, value)| (*name, value.as_str()));
        let settings: serde_json::Map<String, Value> =
            SETTINGS.iter().copied().chain(more).map(|(name, value)| (name.to_owned(), json!(value))).collect();
        let fields = [
            ("machine", self.machine.json()),
            ("versions", json!(versions)),
            ("settings", json!(settings)),
            ("rounds", json!(self.rounds)),
            ("scale", json!(self.scale)),
        ];
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Writes a document where the user wants it, if anywhere.
pub(crate) fn write_json(document: &Value, options: &Options) -> Result<()> {
    let Some(path) = &options.json else { return Ok(()) };
    std::fs::write(path, format!("{document:#}\n")).with_context(|| format!("writing {}", path.display()))
}

/// The first line of what a program says of itself.
pub(crate) async fn version(program: &Path) -> Result<String> {
    let asking = || format!("asking {} for its version", program.display());
    let output = Command::new(program).arg("--version").output().await.with_context(asking)?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("unknown").to_owned())
}
