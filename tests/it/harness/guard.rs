//! Ends what a test has started when the test process itself cannot: after SIGKILL no destructor runs.
//!
//! A shell holds the read end of a pipe. When the test process dies, in whatever way, the kernel closes the
//! other end, and the shell ends the processes and removes the folder. It has a process group of its own, so
//! that an interrupt from the terminal or the test runner does not reach it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Ends every process that works in `$1/data`, kindly first, so that it frees its shared memory, then removes `$1`.
const END_CLUSTER: &str = r#"
cat >/dev/null
each() {
    for process in /proc/[0-9]*; do
        [ "$(readlink "$process/cwd" 2>/dev/null)" = "$1/data" ] && "$2" "${process#/proc/}"
    done
}
kindly() { kill -QUIT "$1" 2>/dev/null; }
firmly() { kill -KILL "$1" 2>/dev/null; }
if [ -d "$1" ]; then
    each "$1" kindly; sleep 2; each "$1" firmly; sleep 0.2
    rm -rf "$1"
fi
"#;

/// Ends the process `$1`, if it still is the program `$2`, and removes the folder `$3`.
const END_PROGRAM: &str = r#"
cat >/dev/null
[ "$(readlink "/proc/$1/exe" 2>/dev/null)" = "$2" ] && kill -KILL "$1"
rm -rf "$3"
"#;

/// A shell that waits for the death of this process. Dropping it calls it off.
pub struct Guard(Child);

impl Guard {
    /// Watches over a cluster in `folder`.
    pub fn over_cluster(folder: &Path) -> Self {
        Self::spawn(END_CLUSTER, &[folder.as_os_str()])
    }

    /// Watches over one `program` that runs as process `id` and works in `folder`.
    pub fn over_program(id: u32, program: &Path, folder: &Path) -> Self {
        Self::spawn(END_PROGRAM, &[id.to_string().as_ref(), program.as_os_str(), folder.as_os_str()])
    }

    fn spawn(script: &str, arguments: &[&std::ffi::OsStr]) -> Self {
        let shell = Command::new("sh")
            .args(["-c", script, "guard"])
            .args(arguments)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("start the guard");
        Self(shell)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The shell's `cat` ends by itself, with the pipe; the shell must be gone before that.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Every live process whose working folder is `data`: a postmaster and all of its children, orphans too.
pub fn processes_in(data: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|id: &u32| fs::read_link(format!("/proc/{id}/cwd")).is_ok_and(|folder| folder == data))
        .collect()
}

/// Sends a signal; a process that is gone already is no error.
pub fn signal(id: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) {
        kill_process(pid, signal).ok();
    }
}

/// Waits, without a runtime, until `condition` holds; false once `patience` is over.
pub fn wait_blocking(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    while !condition() {
        if started.elapsed() > patience {
            return false;
        }
        #[allow(clippy::disallowed_methods, reason = "for destructors, which cannot await")]
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}
