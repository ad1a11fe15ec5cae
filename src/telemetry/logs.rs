//! Logs on stderr: text for people, or one JSON object a line; colour only where asked for.

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt};

use crate::config::{Log, LogFormat};
use crate::error::{Class, Error, Result};
use crate::telemetry::progress::Terminal;

/// Starts logging for the whole process, panics included. Lines go to the terminal that also shows the bars.
///
/// # Errors
/// Class usage: the level is no filter. A bug: logging was started before.
pub fn start(log: &Log, colour: bool, terminal: &Terminal) -> Result<()> {
    let filter = EnvFilter::try_new(&log.level)
        .map_err(|e| Error::new(Class::Usage, "log_level", format!("log.level {:?}: {e}", log.level)))?;
    let output = match log.format {
        LogFormat::Text => fmt::layer().with_writer(terminal.clone()).with_ansi(colour).boxed(),
        LogFormat::Json => fmt::layer().with_writer(terminal.clone()).json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(output.with_filter(filter))
        .try_init()
        .map_err(|e| Error::bug(format!("logging was started before: {e}")))?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(())
}

/// A panic is a defect: it is logged like an error, so that it is found where everything else is.
fn log_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let payload = panic.payload();
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    tracing::error!(code = "bug", place, "pgtandem panicked: {}", text.unwrap_or("without a message"));
}
