//! `pgtandem demo`: the arguments, the screen and the signals of the demo; the story itself is [`crate::demo`].

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tokio_util::sync::CancellationToken;

use crate::demo::{self, Narrator, Options};
use crate::error::Result;

/// Without a terminal, how things stand is said this often.
const PLAIN_PAUSE: Duration = Duration::from_secs(3);

/// Moves a database under live traffic between two throw-away servers of this machine, and proves that nothing was lost.
///
/// Nothing else on the machine is touched, and everything is removed afterwards. In a checkout `make demo` brings the
/// servers first.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  pgtandem demo --rows 200000 --keep")]
pub struct Args {
    /// Rows of the largest table; the other tables follow.
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1_000..=100_000_000))]
    pub rows: u64,
    /// Leaves both servers up, and prints how to reach and how to stop them.
    #[arg(long)]
    pub keep: bool,
    /// The demo's own hook: asks the demo behind this socket to switch.
    #[arg(long, value_name = "SOCKET", hide = true)]
    pub switch: Option<PathBuf>,
}

/// Runs the demo, or its hook.
///
/// # Errors
/// See [`demo::tell`] and [`demo::switch::ask`].
pub async fn run(args: &Args, stop: &CancellationToken) -> Result<()> {
    if let Some(socket) = &args.switch {
        return demo::switch::ask(socket).await;
    }
    let screen = Screen::new();
    let result = demo::tell(Options { rows: args.rows, keep: args.keep }, &screen, stop).await;
    screen.clear();
    result
}

/// The terminal, or whatever stdout is.
struct Screen {
    bar: Option<ProgressBar>,
    /// When the plain output last said how things stand.
    said: Mutex<Option<Instant>>,
    began: Instant,
}

impl Screen {
    fn new() -> Self {
        let bar = (std::io::stdout().is_terminal() && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new_spinner();
            bar.set_style(
                ProgressStyle::with_template("  {spinner} {wide_msg}")
                    .unwrap_or_else(|_| ProgressStyle::default_spinner()),
            );
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar, said: Mutex::new(None), began: Instant::now() }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn print(&self, text: &str) {
        // A reader of our output that went away is no reason to stop before everything is removed.
        let write = || writeln!(std::io::stdout().lock(), "{text}").ok();
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        };
    }
}

impl Narrator for Screen {
    fn chapter(&self, title: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message("");
        }
        let seconds = self.began.elapsed().as_secs();
        let (strong, plain) = if self.bar.is_some() { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
        self.print(&format!("\n{strong}{title}{plain}  [{}:{:02}]", seconds / 60, seconds % 60));
    }

    fn line(&self, text: &str) {
        self.print(format!("  {text}").trim_end());
    }

    fn live(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_owned());
            return;
        }
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_none_or(|at| at.elapsed() >= PLAIN_PAUSE) {
            *said = Some(Instant::now());
            self.line(text);
        }
    }
}
