//! What processes cost: processor time and memory, as `/proc` tells them.
//!
//! Four roles are told apart. The walsender of a slot, which decodes. The source: where all of its sessions count, as in a copy.
//! The daemon: the program that was started, with all its children. The target: every process that its server has started since
//! the measuring began, so the sessions or the worker that apply, and not the checkpointer and its like.
//!
//! Processes are looked at until the measuring ends. What one that has gone meanwhile used after the last look is not missed on
//! the servers, nor of a program that has ended: whoever waited for a process was told its processor time by the kernel.

use std::collections::{HashMap, HashSet};
use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Whose work it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    Walsender,
    Source,
    Daemon,
    Target,
}

/// What the processes of one role used.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Cost {
    /// Processor time, user and system, in seconds.
    pub(crate) cpu_seconds: f64,
    /// The most memory in bytes, of all processes of the role together. For the daemon, all that was resident; with children, what
    /// they share counted once. For the server's processes what is private to them, since most of what is resident there are the
    /// shared buffers.
    pub(crate) peak_bytes: u64,
}

/// What a drain or a copy used.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Costs {
    pub(crate) walsender: Cost,
    /// All sessions of the source; nothing where only the walsender is looked at.
    pub(crate) source: Cost,
    pub(crate) daemon: Cost,
    pub(crate) target: Cost,
}

impl Costs {
    pub(crate) fn json(&self) -> Value {
        let one = |cost: Cost| json!({"cpu_seconds": cost.cpu_seconds, "peak_bytes": cost.peak_bytes});
        json!({
            "walsender": one(self.walsender), "source": one(self.source), "daemon": one(self.daemon),
            "target": one(self.target),
        })
    }
}

/// A process id is used again some day; with the time of its start it is unique.
type Identity = (u32, u64);

/// Watches the processes of one drain or copy.
pub(crate) struct Watch {
    servers: Vec<ServerWatch>,
    walsenders: HashSet<u32>,
    daemon: Option<u32>,
    /// Processor time, in ticks, of every process that was seen.
    seen: HashMap<Identity, (Role, u64)>,
    peaks: HashMap<Role, u64>,
    /// Processor time, in ticks, of the children that this program had waited for when the measuring began.
    waited_before: u64,
    ticks_per_second: f64,
}

/// One server whose sessions count.
struct ServerWatch {
    role: Role,
    postmaster: u32,
    /// The processes that were there before, with the processor time that they had used, in ticks.
    before: HashMap<Identity, u64>,
    /// Processor time, in ticks, of the processes that had ended before.
    ended_before: u64,
}

impl Watch {
    /// Begins to watch; `target` is the postmaster of the server that is applied to.
    pub(crate) fn begin(target: Option<u32>) -> Result<Self> {
        let mut watch = Self {
            servers: Vec::new(),
            walsenders: HashSet::new(),
            daemon: None,
            seen: HashMap::new(),
            peaks: HashMap::new(),
            waited_before: times(std::process::id()).context("reading this program's times")?.of_children,
            ticks_per_second: rustix::param::clock_ticks_per_second() as f64,
        };
        if let Some(postmaster) = target {
            watch.server(Role::Target, postmaster)?;
        }
        Ok(watch)
    }

    /// Watches all sessions of a server that begin from now on.
    pub(crate) fn server(&mut self, role: Role, postmaster: u32) -> Result<()> {
        let there = children(postmaster)?.into_iter().filter_map(|pid| Some((pid, times(pid)?)));
        let before = there.map(|(pid, times)| ((pid, times.started), times.own)).collect();
        let ended_before = times(postmaster).context("reading the times of a server")?.of_children;
        self.servers.push(ServerWatch { role, postmaster, before, ended_before });
        Ok(())
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
        let born = self.servers.iter().map(|server| Ok((server.role, server.born()?))).collect::<Result<Vec<_>>>()?;
        for (role, pids) in born {
            self.note(role, &pids);
        }
        if let Some(daemon) = self.daemon {
            let family = family(daemon)?;
            self.note(Role::Daemon, &family);
        }
        Ok(())
    }

    /// What was used so far.
    pub(crate) fn costs(&self) -> Costs {
        let seen = |wanted: Role| self.seen.values().filter(|(role, _)| *role == wanted).map(|(_, ticks)| ticks).sum();
        let of = |wanted: Role| {
            let told = match wanted {
                Role::Walsender => None,
                Role::Daemon => times(std::process::id()).map(|now| now.of_children - self.waited_before),
                Role::Source | Role::Target => {
                    self.servers.iter().find(|server| server.role == wanted).and_then(ServerWatch::used)
                }
            };
            let seen: u64 = seen(wanted);
            let cpu_seconds = seen.max(told.unwrap_or(0)) as f64 / self.ticks_per_second;
            Cost { cpu_seconds, peak_bytes: self.peaks.get(&wanted).copied().unwrap_or(0) }
        };
        Costs {
            walsender: of(Role::Walsender),
            source: of(Role::Source),
            daemon: of(Role::Daemon),
            target: of(Role::Target),
        }
    }

    fn note(&mut self, role: Role, pids: &[u32]) {
        let mut bytes = 0;
        for &pid in pids {
            // A process may end between two files.
            let Some(times) = times(pid) else { continue };
            self.seen.insert((pid, times.started), (role, times.own));
            bytes += match role {
                Role::Daemon if pids.len() == 1 => memory(pid, "status", "VmHWM:"),
                Role::Daemon => memory(pid, "smaps_rollup", "Pss:"),
                _ => memory(pid, "status", "RssAnon:"),
            }
            .unwrap_or(0);
        }
        let peak = self.peaks.entry(role).or_default();
        *peak = bytes.max(*peak);
    }
}

impl ServerWatch {
    /// The processes that are there and were not before.
    fn born(&self) -> Result<Vec<u32>> {
        let before: HashSet<u32> = self.before.keys().map(|(pid, _)| *pid).collect();
        Ok(children(self.postmaster)?.into_iter().filter(|pid| !before.contains(pid)).collect())
    }

    /// Processor time, in ticks, of all processes that were not there before: of those that have ended, as the postmaster was
    /// told, without what those from before had used until then; and of those that are there.
    fn used(&self) -> Option<u64> {
        let now: HashMap<Identity, u64> = children(self.postmaster)
            .ok()?
            .into_iter()
            .filter_map(|pid| times(pid).map(|times| ((pid, times.started), times.own)))
            .collect();
        let ended = times(self.postmaster)?.of_children - self.ended_before;
        let gone: u64 = self.before.iter().filter(|(who, _)| !now.contains_key(who)).map(|(_, ticks)| ticks).sum();
        let born: u64 = now.iter().filter(|(who, _)| !self.before.contains_key(who)).map(|(_, ticks)| ticks).sum();
        Some(ended.saturating_sub(gone) + born)
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

/// Of one process, in ticks. See proc(5): fields 22, 14 and 15, 16 and 17.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Times {
    /// When it started.
    started: u64,
    /// What it has used.
    own: u64,
    /// What those of its children have used that have ended.
    of_children: u64,
}

fn times(pid: u32) -> Option<Times> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    times_of(&stat)
}

fn times_of(stat: &str) -> Option<Times> {
    // The name, in parentheses, may hold anything, so fields are counted from its end.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Times { started: number(22)?, own: number(14)? + number(15)?, of_children: number(16)? + number(17)? })
}

/// Bytes, as a line of one of the process's files tells them.
fn memory(pid: u32, file: &str, wanted: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(wanted))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_whatever_the_name_is() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 100 0 0 0 7 5 3 1 20 0 1 0 12345 1000 20 0";
        assert_eq!(times_of(stat), Some(Times { started: 12345, own: 12, of_children: 4 }));
        assert_eq!(times_of("nonsense"), None);
    }

    #[test]
    fn this_very_process_is_seen() {
        let mut watch = Watch::begin(None).expect("begin");
        watch.daemon(Some(std::process::id()));
        watch.look().expect("look");
        assert!(watch.costs().daemon.peak_bytes > 0);
    }

    #[test]
    fn a_program_that_has_ended_is_counted_though_nobody_looked() {
        let watch = Watch::begin(None).expect("begin");
        let work = "i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done";
        std::process::Command::new("sh").args(["-c", work]).status().expect("run");
        assert!(watch.costs().daemon.cpu_seconds > 0.0);
    }
}
