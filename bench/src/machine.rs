//! What all this ran on.

use std::fs;

use serde_json::{Value, json};

/// The machine, as far as it tells.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    cores: usize,
    cpu: String,
    memory_bytes: u64,
    kernel: String,
}

impl Machine {
    pub(crate) fn look() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let value = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            line.split_once(':').map(|(_, value)| value.trim().to_owned())
        };
        let unknown = || "unknown".to_owned();
        let memory = value(&text("/proc/meminfo"), "MemTotal");
        let kilobytes = memory.and_then(|memory| memory.split_whitespace().next()?.parse::<u64>().ok());
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            cpu: value(&text("/proc/cpuinfo"), "model name").unwrap_or_else(unknown),
            memory_bytes: kilobytes.unwrap_or(0) * 1024,
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
        }
    }

    /// In a line.
    pub(crate) fn line(&self) -> String {
        format!(
            "{} cores ({}), {:.1} GiB of memory, Linux {}",
            self.cores,
            self.cpu,
            self.memory_bytes as f64 / f64::from(1 << 30),
            self.kernel
        )
    }

    pub(crate) fn json(&self) -> Value {
        json!({"cores": self.cores, "cpu": self.cpu, "memory_bytes": self.memory_bytes, "kernel": self.kernel})
    }
}
