//! The command line: one file per command, and the only place that prints to stdout.
//!
//! A command gets the validated [`Config`], its own arguments and the token that the first SIGTERM or SIGINT cancels.
//! What it prints for people or programs goes to stdout; errors are returned, and printed to stderr by [`main`].

use std::ffi::OsString;
use std::io::{IsTerminal as _, Write as _};
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

use crate::config::{Config, Environment, Flags, LogFormat, Settings};
use crate::error::{Error, Result};
use crate::telemetry::logs;
use crate::telemetry::progress::Terminal;

pub mod check;
pub mod clean;
pub mod completions;
pub mod cutover;
pub mod demo;
pub mod resync;
pub mod rollback;
pub mod run;
pub mod signals;
pub mod snapshot;
pub mod status;
pub mod verify;

use signals::Stop;

/// Moves a live PostgreSQL database to another server with near-zero downtime.
#[derive(Parser)]
#[command(name = "pgtandem", version, arg_required_else_help = true, after_help = EXAMPLE)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLE: &str = "\
Example:
  export PGTANDEM_SOURCE_URL='postgresql://app@old.example.org/shop?sslmode=verify-full'
  export PGTANDEM_TARGET_URL='postgresql://app@new.example.org/shop?sslmode=verify-full'
  pgtandem check && pgtandem run          # and, in another terminal, once status says ready:
  pgtandem cutover

Passwords are best left to PGPASSFILE or ~/.pgpass: an argument can be seen by every user of the machine.
Exit codes: 0 done, 1 the answer is no, 2 usage or configuration, 3 a server cannot be reached or refuses,
4 an operator must decide, 5 another daemon holds this move, 70 a bug.";

/// The flags of every command.
#[derive(clap::Args)]
struct Global {
    /// Configuration file [default: pgtandem.toml in the working folder, if there]
    #[arg(short, long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Connection string of the server that the application uses today
    #[arg(long, global = true, value_name = "URL")]
    source: Option<String>,
    /// Connection string of the server that it will use
    #[arg(long, global = true, value_name = "URL")]
    target: Option<String>,
    /// Name of the move [default: app]
    #[arg(long, global = true)]
    name: Option<String>,
    /// error, warn, info, debug, trace, or a filter such as info,pgtandem::follow=debug [default: info]
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<String>,
    /// text or json, on stderr [default: text]
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    Check(check::Args),
    Run(run::Args),
    Status(status::Args),
    Verify(verify::Args),
    Cutover(cutover::Args),
    Rollback(rollback::Args),
    Resync(resync::Args),
    Snapshot(snapshot::Args),
    Clean(clean::Args),
    Demo(demo::Args),
    Completions(completions::Args),
}

impl Command {
    /// Whether errors, too, are wanted as JSON.
    fn json(&self) -> bool {
        match self {
            Self::Check(args) => args.json,
            Self::Status(args) => args.json,
            Self::Verify(args) => args.json,
            Self::Cutover(args) => args.json,
            Self::Rollback(args) => args.json,
            Self::Snapshot(args) => args.json,
            _ => false,
        }
    }

    /// Whether the command ends by itself, and well, once the token is cancelled. Any other is broken off: it has
    /// nothing to tidy up, and its answer would be missing.
    fn stops_cleanly(&self) -> bool {
        match self {
            Self::Run(_) | Self::Snapshot(_) | Self::Cutover(_) | Self::Demo(_) => true,
            Self::Status(args) => args.watch,
            _ => false,
        }
    }
}

/// How a command ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It did what it was asked.
    Done,
    /// It was interrupted before its answer came.
    BrokenOff,
}

impl End {
    fn exit_code(self, stop: &Stop) -> ExitCode {
        match self {
            Self::Done => ExitCode::SUCCESS,
            Self::BrokenOff => stop.exit_code(),
        }
    }
}

/// The whole program, from its arguments to its exit code.
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(refusal) => return refuse(&refusal, &arguments),
    };
    let environment = Environment::of_process();
    let colour = std::io::stderr().is_terminal() && !environment.no_color();
    let mut json = cli.command.json();
    let done = std::panic::catch_unwind(AssertUnwindSafe(|| start(cli, environment, colour, &mut json)));
    let end = done.unwrap_or_else(|_| Err(Error::bug("pgtandem panicked; the line above says where")));
    match end {
        Ok(code) => code,
        Err(error) => {
            print_error(&error, json, colour);
            ExitCode::from(error.class().exit_code())
        }
    }
}

/// clap's message, without what looks like a connection string in a wrong place.
fn refuse(refusal: &clap::Error, arguments: &[OsString]) -> ExitCode {
    let secrets = arguments.iter().map(|argument| argument.to_string_lossy()).filter(|argument| {
        (argument.contains("://") || argument.contains("password")) && refusal.to_string().contains(argument.as_ref())
    });
    let hidden = secrets.fold(None, |text: Option<String>, secret| {
        Some(text.unwrap_or_else(|| refusal.to_string()).replace(secret.as_ref(), "<connection string>"))
    });
    let printed = match hidden {
        Some(text) => write!(std::io::stderr(), "{text}"),
        None => refusal.print(),
    };
    // Nobody is left to tell if even stderr is closed.
    drop(printed);
    ExitCode::from(u8::try_from(refusal.exit_code()).unwrap_or(2))
}

fn start(cli: Cli, environment: Environment, colour: bool, json: &mut bool) -> Result<ExitCode> {
    if let Command::Completions(args) = &cli.command {
        return completions::run(args, &mut Cli::command()).map(|()| ExitCode::SUCCESS);
    }
    let Global { config, source, target, name, log_level, log_format } = cli.global;
    let settings = Settings::gather(&Flags { config, source, target, name, log_level, log_format }, environment)?;
    let log = settings.log()?;
    *json |= log.format == LogFormat::Json;
    let terminal = Terminal::stderr();
    logs::start(&log, colour, &terminal)?;
    // The demo makes its own servers.
    let config = match &cli.command {
        Command::Demo(_) => None,
        _ => Some(settings.config()?),
    };
    let stop = signals::listen()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        let work = execute(&cli.command, config.as_ref(), &terminal, &stop);
        if cli.command.stops_cleanly() {
            return work.await.map(|end| end.exit_code(&stop));
        }
        tokio::select! {
            done = work => done.map(|end| end.exit_code(&stop)),
            () = stop.token().cancelled() => Ok(stop.exit_code()),
        }
    });
    // Connections say goodbye; a task that is stuck does not hold the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    done
}

async fn execute(command: &Command, config: Option<&Config>, terminal: &Terminal, stop: &Stop) -> Result<End> {
    let stop = stop.token();
    let config = match (command, config) {
        (Command::Demo(args), _) => return demo::run(args, stop).await.map(|()| End::Done),
        (_, Some(config)) => config,
        (_, None) => return Err(Error::bug("the configuration was not read")),
    };
    match command {
        Command::Check(args) => check::run(config, args).await,
        Command::Run(args) => run::run(config, args, terminal, stop).await,
        Command::Status(args) => status::run(config, args, stop).await,
        Command::Verify(args) => verify::run(config, args).await,
        Command::Cutover(args) => return cutover::run(config, args, stop).await,
        Command::Rollback(args) => rollback::run(config, args).await,
        Command::Resync(args) => resync::run(config, args).await,
        Command::Snapshot(args) => snapshot::run(config, args, stop).await,
        Command::Clean(args) => clean::run(config, args).await,
        Command::Demo(_) | Command::Completions(_) => Ok(()),
    }
    .map(|()| End::Done)
}

/// Says to stderr what went wrong and what to do about it: one line of JSON for programs, else for people.
fn print_error(error: &Error, json: bool, colour: bool) {
    let text = if json {
        serde_json::json!({"error": {
            "class": error.class().as_str(),
            "code": error.code(),
            "message": error.to_string(),
            "sqlstate": error.sqlstate(),
            "hint": error.hint_text(),
        }})
        .to_string()
    } else {
        let (red, bold, plain) = if colour { ("\x1b[1;31m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
        let hint = error.hint_text().map(|hint| format!("\n{bold}hint:{plain} {hint}")).unwrap_or_default();
        format!("{red}error:{plain} {error} [{}]{hint}", error.code())
    };
    // Nobody is left to tell if even stderr is closed.
    drop(writeln!(std::io::stderr(), "{text}"));
}

/// A command that a later version brings.
fn not_available(command: &str) -> Error {
    let message = format!("`pgtandem {command}` is not available in this version");
    Error::new(crate::Class::Usage, "not_available", message).hint("CHANGELOG.md says what each version can do")
}

#[cfg(test)]
mod tests;
