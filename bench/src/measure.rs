//! What processes cost: processor time and memory, as `/proc` tells them.
//!
//! Three roles are told apart. The walsender of the slot, which decodes. The daemon: the program that was started, with all
//! its children. The target: every process that its server has started since the measuring began, so the sessions or the
//! worker that apply, and not the checkpointer and its like. Processes are looked at until the drain ends; what one that
//! has gone meanwhile used after the last look is missed.

use std::collections::{HashMap, HashSet};
use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Whose work it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    Walsender,
    Daemon,
    Target,
}

/// What the processes of one role used.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Cost {
    /// Processor time, user and system, in seconds.
    pub(crate) cpu_seconds: f64,
    /// The most memory in bytes, of all processes of the role together. For the daemon, all that was resident; for the server's
    /// processes what is private to them, since most of what is resident there are the shared buffers.
    pub(crate) peak_bytes: u64,
}

/// What a drain used.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Costs {
    pub(crate) walsender: Cost,
    pub(crate) daemon: Cost,
    pub(crate) target: Cost,
}

impl Costs {
    pub(crate) fn json(&self) -> Value {
        let one = |cost: Cost| json!({"cpu_seconds": cost.cpu_seconds, "peak_bytes": cost.peak_bytes});
        json!({"walsender": one(self.walsender), "daemon": one(self.daemon), "target": one(self.target)})
    }
}

/// A process id is used again some day; with the time of its start it is unique.
type Identity = (u32, u64);

/// Watches the processes of one drain.
pub(crate) struct Watch {
    target: Option<u32>,
    /// The target's processes that were there before.
    before: HashSet<u32>,
    walsenders: HashSet<u32>,
    daemon: Option<u32>,
    /// Processor time of every process that was seen.
    seen: HashMap<Identity, (Role, f64)>,
    peaks: HashMap<Role, u64>,
    ticks_per_second: f64,
}

impl Watch {
    /// Begins to watch; `target` is the postmaster of the server that is applied to.
    pub(crate) fn begin(target: Option<u32>) -> Result<Self> {
        let before = target.map(children).transpose()?.unwrap_or_default();
        Ok(Self {
            target,
            before: before.into_iter().collect(),
            walsenders: HashSet::new(),
            daemon: None,
            seen: HashMap::new(),
            peaks: HashMap::new(),
            ticks_per_second: rustix::param::clock_ticks_per_second() as f64,
        })
    }

    pub(crate) fn walsender(&mut self, pid: u32) {
        self.walsenders.insert(pid);
    }

    pub(crate) fn daemon(&mut self, pid: Option<u32>) {
        self.daemon = pid;
    }

    /// Looks at every process.
    pub(crate) fn look(&mut self) -> Result<()> {
        let walsenders: Vec<u32> = self.walsenders.iter().copied().collect();
        self.note(Role::Walsender, &walsenders);
        if let Some(postmaster) = self.target {
            let born: Vec<u32> = children(postmaster)?.into_iter().filter(|pid| !self.before.contains(pid)).collect();
            self.note(Role::Target, &born);
        }
        if let Some(daemon) = self.daemon {
            let family = family(daemon)?;
            self.note(Role::Daemon, &family);
        }
        Ok(())
    }

    /// What was used so far.
    pub(crate) fn costs(&self) -> Costs {
        let of = |wanted: Role| {
            let seconds = self.seen.values().filter(|(role, _)| *role == wanted).map(|(_, seconds)| seconds).sum();
            Cost { cpu_seconds: seconds, peak_bytes: self.peaks.get(&wanted).copied().unwrap_or(0) }
        };
        Costs { walsender: of(Role::Walsender), daemon: of(Role::Daemon), target: of(Role::Target) }
    }

    fn note(&mut self, role: Role, pids: &[u32]) {
        let mut bytes = 0;
        for &pid in pids {
            // A process may end between two files.
            let Some((started, ticks)) = times(pid) else { continue };
            self.seen.insert((pid, started), (role, ticks as f64 / self.ticks_per_second));
            bytes += memory(pid, role).unwrap_or(0);
        }
        let peak = self.peaks.entry(role).or_default();
        *peak = bytes.max(*peak);
    }
}

fn children(pid: u32) -> Result<Vec<u32>> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    Ok(text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect())
}

/// A process and all that come from it. One that has ended has no children.
fn family(pid: u32) -> Result<Vec<u32>> {
    let mut all = vec![pid];
    let mut at = 0;
    while let Some(&next) = all.get(at) {
        let Ok(tasks) = fs::read_dir(format!("/proc/{next}/task")) else {
            at += 1;
            continue;
        };
        // A child belongs to the thread that started it.
        for task in tasks.flatten() {
            let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            all.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        at += 1;
    }
    Ok(all)
}

/// When a process started and what it has used, in ticks. See proc(5): fields 22, 14 and 15.
fn times(pid: u32) -> Option<(u64, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    times_of(&stat)
}

fn times_of(stat: &str) -> Option<(u64, u64)> {
    // The name, in parentheses, may hold anything, so fields are counted from its end.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some((number(22)?, number(14)? + number(15)?))
}

fn memory(pid: u32, role: Role) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let wanted = if role == Role::Daemon { "VmHWM:" } else { "RssAnon:" };
    let line = status.lines().find_map(|line| line.strip_prefix(wanted))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_whatever_the_name_is() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 100 0 0 0 7 5 0 0 20 0 1 0 12345 1000 20 0";
        assert_eq!(times_of(stat), Some((12345, 12)));
        assert_eq!(times_of("nonsense"), None);
    }

    #[test]
    fn this_very_process_is_seen() {
        let mut watch = Watch::begin(None).expect("begin");
        watch.daemon(Some(std::process::id()));
        watch.look().expect("look");
        assert!(watch.costs().daemon.peak_bytes > 0);
    }
}
