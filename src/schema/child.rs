//! Running pg_dump and pg_restore: output bounded, every exit code read, the child killed when its future is dropped.
//!
//! The password goes by the environment only ([`Server::child_environment`]); arguments are visible to everyone on
//! the machine.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::Command;

use super::failure;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::Server;
use crate::postgres::server::REMOVED_FROM_CHILDREN;

/// The list of a hundred thousand tables with everything on them is about 40 MB.
const MAX_STDOUT: u64 = 256 << 20;
/// Enough for the first failures; the rest is read and dropped.
const MAX_STDERR: usize = 64 << 10;
/// A longer line (a statement of many kilobytes) is cut.
const MAX_LINE: u64 = 16 << 10;

/// One run of a client program.
pub(super) struct Child {
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(String, String)>,
}

impl Child {
    pub(super) fn new(program: PathBuf) -> Self {
        // Messages are read by `failure`, so they must be in the language that it knows.
        Self { program, arguments: Vec::new(), environment: vec![("LC_ALL".into(), "C".into())] }
    }

    pub(super) fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    pub(super) fn args<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// The server that the program connects to.
    pub(super) fn server(mut self, server: &Server, role: &str) -> Self {
        self.environment.extend(server.child_environment(role));
        self
    }

    /// pg_restore connects only when told a database by argument; everything else comes from the environment.
    pub(super) fn database_argument(self) -> Self {
        let name = self.environment.iter().rev().find(|(key, _)| key == "PGDATABASE").map(|(_, value)| value.clone());
        let escaped = name.unwrap_or_default().replace('\\', "\\\\").replace('\'', "\\'");
        self.arg(format!("--dbname=dbname='{escaped}'"))
    }

    /// Runs to the end and returns stdout.
    ///
    /// # Errors
    /// What [`failure::read`] makes of stderr when the exit code is not zero.
    pub(super) async fn run(self) -> Result<String> {
        self.run_watched(|_| {}).await
    }

    /// The same; `on_line` sees each line of stderr as it comes.
    pub(super) async fn run_watched(self, on_line: impl FnMut(&str)) -> Result<String> {
        let name = self.program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut command = Command::new(&self.program);
        for variable in REMOVED_FROM_CHILDREN {
            command.env_remove(variable);
        }
        let mut child = command
            .args(&self.arguments)
            .envs(self.environment)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .doing(|| format!("starting {}", self.program.display()))?;
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(Error::bug("a child without pipes"));
        };
        let (stdout, stderr) = tokio::join!(read_all(stdout), read_lines(stderr, on_line));
        let status = child.wait().await.doing(|| format!("waiting for {name}"))?;
        let stderr = stderr.doing(|| format!("reading what {name} says"))?;
        if !status.success() {
            return Err(failure::read(&name, &status.to_string(), &stderr));
        }
        let stdout = stdout.doing(|| format!("reading the output of {name}"))?;
        String::from_utf8(stdout).map_err(|e| {
            Error::new(Class::Operator, "not_utf8", format!("{name} printed a name that is not UTF-8")).because(e)
        })
    }
}

async fn read_all(pipe: impl AsyncRead + Unpin) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut limited = pipe.take(MAX_STDOUT);
    limited.read_to_end(&mut bytes).await?;
    if limited.limit() == 0 {
        return Err(Error::new(Class::Operator, "schema_too_large", format!("more than {MAX_STDOUT} bytes of output")));
    }
    Ok(bytes)
}

/// Keeps the first lines that are not mere progress.
async fn read_lines(pipe: impl AsyncRead + Unpin, mut on_line: impl FnMut(&str)) -> Result<String> {
    let mut reader = BufReader::new(pipe);
    let mut kept = String::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).await? == 0 {
            return Ok(kept);
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches('\n');
        on_line(text);
        if kept.len() < MAX_STDERR && !is_progress(text) {
            kept.push_str(text);
            kept.push('\n');
        }
    }
}

/// What `--verbose` prints: neither an error, nor a warning, nor what belongs to one.
fn is_progress(line: &str) -> bool {
    let says = ["pg_restore: ", "pg_dump: "].iter().find_map(|program| line.strip_prefix(program));
    says.is_some_and(|text| {
        !["error: ", "warning: ", "fatal: ", "detail: ", "hint: ", "from TOC entry ", "while "]
            .iter()
            .any(|start| text.starts_with(start))
    })
}

/// A file with one line for each argument, private to this user; gone when dropped.
pub(super) fn list_file<'a>(folder: &Path, lines: impl Iterator<Item = &'a str>) -> Result<tempfile::NamedTempFile> {
    use std::io::Write;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    for line in lines {
        writeln!(file, "{line}")?;
    }
    file.flush()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Child {
        Child::new("/bin/sh".into()).args(["-c", script])
    }

    #[tokio::test]
    async fn a_child_that_fails_is_an_error_with_its_words() {
        let error =
            shell("echo 'pg_restore: creating x' >&2; echo 'pg_restore: error: broken' >&2; exit 1").run().await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("broken") && !error.contains("creating"), "{error}");
    }

    #[tokio::test]
    async fn a_child_that_talks_without_end_does_not_fill_the_memory() {
        let mut lines = 0;
        let child =
            shell("i=0; while [ $i -lt 20000 ]; do echo 'pg_restore: error: again and again' >&2; i=$((i+1)); done");
        child.run_watched(|_| lines += 1).await.unwrap();
        assert_eq!(lines, 20_000);
        let kept = read_lines(&b"x\n".repeat(1 << 20)[..], |_| {}).await.unwrap();
        assert!(kept.len() <= MAX_STDERR + 2);
    }
}
