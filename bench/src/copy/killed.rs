//! pgtandem, killed on its way as a power cut would: all its processes at once, at half of the copy, and again at nine tenths. It is
//! started again at once each time.
//!
//! How far it is it says itself, over HTTP. What counts are rows: all are of the same length, and how many there are is known.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::contender::pgtandem::{UNTIL_COPY, commands};
use super::ground::Ground;
use super::stopwatch::Stopwatch;
use crate::process::Background;
use crate::say;

/// At these parts of the rows.
const KILLED_AT: [f64; 2] = [0.5, 0.9];

/// How often it is asked how far it is.
const ASK_EVERY: Duration = Duration::from_millis(20);

pub(super) async fn copy(ground: &Ground<'_>, clock: &mut Stopwatch<'_>) -> Result<()> {
    let all = ground.content.rows();
    for part in KILLED_AT {
        // Each run listens on a port of its own: nothing of the one before is in its way.
        let commands = commands(ground)?;
        let mut daemon = clock.start_logged(commands.command(&UNTIL_COPY), &commands.log)?;
        let done = clock.during(until(part, all, commands.port, &mut daemon)).await?;
        daemon.kill().await?;
        say(format!("killed at {:.1} % after {:.2} s", done * 100.0, clock.seconds()));
    }
    let commands = commands(ground)?;
    clock.run_logged(commands.command(&UNTIL_COPY), &commands.log).await
}

/// Waits until this part of all rows is copied; which part it was then.
async fn until(part: f64, all: i64, port: u16, daemon: &mut Background) -> Result<f64> {
    loop {
        if let Some(status) = daemon.ended()? {
            bail!("it ended with {status} before it was killed at {part}: {}", daemon.last_words());
        }
        // Nobody listens at first, and nobody has counted rows.
        if let Ok(status) = status(port).await
            && let Some(rows) = status.pointer("/copy/rows_done").and_then(Value::as_i64)
        {
            let done = rows as f64 / all as f64;
            if done >= part {
                return Ok(done);
            }
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// `GET /status`. The answer ends with the connection.
async fn status(port: u16) -> Result<Value> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.context("connecting to the daemon")?;
    stream.write_all(b"GET /status HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.context("reading the status")?;
    let answer = String::from_utf8(answer).context("reading the status")?;
    let (_, body) = answer.split_once("\r\n\r\n").context("the status has no body")?;
    serde_json::from_str(body).context("reading the status")
}
