//! Ends what was started when this program cannot do so itself: after a signal that kills it, no destructor runs.
//!
//! A shell waits at the read end of a pipe. When this process dies, in whatever way, the kernel closes the other end, and
//! the shell does its work. It has a process group of its own, so that an interrupt from the terminal does not end it first.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};

use anyhow::{Context, Result};

use crate::servers::ServerUser;

/// Stops the server of data directory `$2` by the pg_ctl `$1`.
const STOP_SERVER: &str = r#"cat >/dev/null; "$1" stop -s -m immediate -D "$2""#;
/// Ends the process group `$1`.
const END_PROCESS: &str = r#"cat >/dev/null; kill -TERM -- "-$1""#;
/// Removes the folder `$1`, once the servers in it are stopped.
const REMOVE_FOLDER: &str = r#"
cat >/dev/null
tries=0
while [ "$tries" -lt 120 ] && ls "$1"/*/data/postmaster.pid >/dev/null 2>&1; do
    sleep 0.5
    tries=$((tries + 1))
done
rm -rf "$1""#;

/// A shell that waits for the death of this process. Dropping it calls it off.
#[derive(Debug)]
pub(crate) struct Guard(Child);

impl Guard {
    pub(crate) fn over_server(user: ServerUser, pg_ctl: &OsStr, data: &OsStr) -> Result<Self> {
        Self::spawn(user, STOP_SERVER, &[pg_ctl, data])
    }

    pub(crate) fn over_process(id: u32) -> Result<Self> {
        Self::spawn(ServerUser::Same, END_PROCESS, &[OsStr::new(&id.to_string())])
    }

    pub(crate) fn over_folder(folder: &OsStr) -> Result<Self> {
        Self::spawn(ServerUser::Same, REMOVE_FOLDER, &[folder])
    }

    fn spawn(user: ServerUser, script: &str, arguments: &[&OsStr]) -> Result<Self> {
        user.command("sh")
            .args(["-c", script, "guard"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map(Self)
            .context("starting the shell that cleans up after a kill")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The shell must be gone before the pipe is closed, or it would do its work.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
