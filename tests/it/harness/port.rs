//! A TCP port that belongs to one cluster for its whole life.
//!
//! A server that restarts must find its port free again. So ports are taken from below the kernel's range for
//! outgoing connections, and held by a file lock, which the kernel gives back however the test ends.

use std::fs::{File, OpenOptions};
use std::net::TcpListener;
use std::path::PathBuf;

/// Below 32768, where Linux starts to hand out ports to clients.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// A port that no other cluster of any test process has.
pub struct Port {
    number: u16,
    _held: File,
}

impl Port {
    /// Takes a free port; the search starts at another place in each process, so that tests seldom meet.
    pub fn take() -> Self {
        let folder = lock_folder();
        let span = PORTS.end - PORTS.start;
        let start = (std::process::id().wrapping_mul(131) % u32::from(span)) as u16;
        (0..span)
            .map(|step| PORTS.start + (start + step) % span)
            .find_map(|number| Self::try_take(&folder, number))
            .expect("no free port")
    }

    fn try_take(folder: &std::path::Path, number: u16) -> Option<Self> {
        let file = folder.join(number.to_string());
        let held = OpenOptions::new().create(true).truncate(false).write(true).open(file).expect("port lock file");
        held.try_lock().ok()?;
        TcpListener::bind(("127.0.0.1", number)).ok()?;
        Some(Self { number, _held: held })
    }

    pub fn number(&self) -> u16 {
        self.number
    }
}

fn lock_folder() -> PathBuf {
    let user = rustix::process::geteuid().as_raw();
    let folder = std::env::temp_dir().join(format!("pgtandem-test-ports-{user}"));
    std::fs::create_dir_all(&folder).expect("folder of port locks");
    folder
}
