//! `completions`: the script that teaches a shell our command line.

use std::io::Write as _;

use crate::error::{Error, Result};

/// Print the completion script of a shell
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pgtandem completions bash > /etc/bash_completion.d/pgtandem")]
pub struct Args {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// Runs the command.
///
/// # Errors
/// Stdout is closed.
pub fn run(args: &Args, command: &mut clap::Command) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, command, "pgtandem", &mut script);
    std::io::stdout().write_all(&script).map_err(Error::from)
}
