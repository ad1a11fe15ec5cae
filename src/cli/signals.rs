//! SIGTERM and SIGINT: the first asks for a clean stop, the second ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tokio_util::sync::CancellationToken;

use crate::error::{Doing as _, Result};

/// Whether, and by which signal, a stop was asked for.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    token: CancellationToken,
    signal: Arc<AtomicI32>,
}

impl Stop {
    /// Cancelled by the first signal.
    #[must_use]
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// The exit code of a command that was broken off: 130 after SIGINT, 143 after SIGTERM, as shells have it.
    #[must_use]
    pub fn exit_code(&self) -> std::process::ExitCode {
        let signal = self.signal.load(Ordering::SeqCst);
        std::process::ExitCode::from(u8::try_from(128 + signal).unwrap_or(1))
    }
}

/// Starts listening, on a thread of its own that lives as long as the process.
///
/// # Errors
/// The handlers cannot be installed.
pub fn listen() -> Result<Stop> {
    let stop = Stop::default();
    let mut signals = Signals::new([SIGINT, SIGTERM]).doing(|| "listening for signals")?;
    let told = stop.clone();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                if told.token.is_cancelled() {
                    end_at_once(signal);
                }
                tracing::info!(signal, "stopping cleanly; a second signal ends at once");
                told.signal.store(signal, Ordering::SeqCst);
                told.token.cancel();
            }
        })
        .doing(|| "listening for signals")?;
    Ok(stop)
}

#[expect(clippy::disallowed_methods, reason = "the second signal asks for exactly this: no clean stop")]
fn end_at_once(signal: i32) -> ! {
    std::process::exit(128 + signal)
}
