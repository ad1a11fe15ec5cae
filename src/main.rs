//! The program: everything is in the library, beginning with [`pgtandem::cli::main`].

use std::process::ExitCode;

fn main() -> ExitCode {
    pgtandem::cli::main(std::env::args_os())
}
