//! Reads everything and applies nothing, so that what is left is the time that the source takes to decode and to send.
//!
//! A reader that wakes for every message costs the walsender more than decoding does. This one empties a large receive buffer
//! a few times a second, and looks at no more of a message than it takes to see commits.

mod login;

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::{Buf, BufMut, BytesMut};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::sync::oneshot;

use crate::process::Background;
use crate::stage::{DATABASE, PUBLICATION, Stage};

/// How often the receive buffer is emptied.
const PAUSE: Duration = Duration::from_millis(20);

/// How often the source hears from us.
const STATUS_EVERY: Duration = Duration::from_secs(5);

/// Room for a read, in bytes.
const READ_ROOM: usize = 1 << 20;

/// In a message of the stream: where the plugin's message begins, after the kind, two positions and a time.
const PAYLOAD: usize = 1 + 8 + 8 + 8;

/// What the reader is told on its standard input, where no list of processes shows it.
pub(crate) struct Order {
    program: PathBuf,
    log: PathBuf,
    text: Value,
}

impl Order {
    pub(crate) fn of(stage: &Stage<'_>, slot: &str) -> Self {
        let source = &stage.servers.source;
        Self {
            program: stage.programs.itself.clone(),
            log: stage.servers.folder.path().join("null-reader.log"),
            text: json!({
                "port": source.port(), "password": source.password(), "database": DATABASE, "slot": slot,
                "publication": PUBLICATION, "done_after": stage.done_after,
            }),
        }
    }

    pub(crate) async fn start(self) -> Result<Reader> {
        let mut command = Command::new(&self.program);
        command.arg("--null-reader");
        let mut process = Background::start_conversation(command, &self.log)?;
        let mut stdin = process.child.stdin.take().context("the null reader has no standard input")?;
        let stdout = process.child.stdout.take().context("the null reader has no standard output")?;
        stdin.write_all(format!("{}\n", self.text).as_bytes()).await.context("telling the null reader what to read")?;
        let (said, done) = oneshot::channel();
        tokio::spawn(async move {
            let mut line = String::new();
            if BufReader::new(stdout).read_line(&mut line).await.is_ok_and(|length| length > 0) {
                // Nobody listens any more after a drain that took too long.
                said.send(()).ok();
            }
        });
        Ok(Reader { process, _stdin: stdin, done })
    }
}

/// A null reader that reads. It lives until it is stopped, so that what it used can be seen.
pub(crate) struct Reader {
    process: Background,
    _stdin: tokio::process::ChildStdin,
    done: oneshot::Receiver<()>,
}

impl Reader {
    pub(crate) fn process_id(&self) -> Option<u32> {
        self.process.id()
    }

    pub(crate) fn is_done(&mut self) -> Result<bool> {
        match self.done.try_recv() {
            Ok(()) => Ok(true),
            Err(oneshot::error::TryRecvError::Empty) => Ok(false),
            Err(oneshot::error::TryRecvError::Closed) => bail!("it ended: {}", self.process.last_words()),
        }
    }

    pub(crate) fn last_words(&self) -> String {
        self.process.last_words()
    }

    pub(crate) async fn stop(self) -> Result<()> {
        self.process.stop().await.map(drop)
    }
}

/// The reader itself: what this program does with `--null-reader`.
pub(crate) async fn read() -> Result<()> {
    let mut stdin = BufReader::new(tokio::io::stdin());
    let mut line = String::new();
    stdin.read_line(&mut line).await.context("reading the order")?;
    let order: Value = serde_json::from_str(&line).context("the order is no JSON")?;
    let text = |name: &str| order[name].as_str().with_context(|| format!("the order has no {name}"));
    let number = |name: &str| order[name].as_u64().with_context(|| format!("the order has no {name}"));

    let mut stream = login::connect(u16::try_from(number("port")?)?, text("database")?, text("password")?).await?;
    login::start(&mut stream, text("slot")?, text("publication")?).await?;
    read_until(stream, number("done_after")?).await?;

    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "done").and_then(|()| stdout.flush()).context("saying that it is done")?;
    drop(stdout);
    // Until the other side has seen enough.
    stdin.read_to_string(&mut line).await.context("waiting for the end")?;
    Ok(())
}

/// Reads until a transaction arrives whose commit record lies at `done_after` or later.
async fn read_until(mut stream: TcpStream, done_after: u64) -> Result<()> {
    let mut buffer = BytesMut::with_capacity(READ_ROOM);
    let mut told = Instant::now();
    loop {
        stream.readable().await?;
        loop {
            buffer.reserve(READ_ROOM);
            match stream.try_read_buf(&mut buffer) {
                Ok(0) => bail!("the source closed the connection"),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("reading the stream"),
            }
            let seen = take_messages(&mut buffer, done_after)?;
            if seen.done {
                return Ok(());
            }
            if seen.asked || told.elapsed() > STATUS_EVERY {
                told = Instant::now();
                stream.write_all(&status()).await.context("answering the source")?;
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What a gulp held.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    done: bool,
    /// The source wants an answer.
    asked: bool,
}

/// Takes all messages that are complete.
fn take_messages(buffer: &mut BytesMut, done_after: u64) -> Result<Seen> {
    let mut seen = Seen::default();
    while buffer.len() >= 5 {
        let length = usize::try_from((&buffer[1..5]).get_u32())?;
        if buffer.len() <= length {
            break;
        }
        let message = buffer.split_to(1 + length);
        let body = &message[5..];
        match message[0] {
            b'd' => match body.first() {
                Some(b'w') if body.get(PAYLOAD) == Some(&b'C') => {
                    let mut commit = body.get(PAYLOAD + 2..).unwrap_or_default();
                    seen.done |= commit.try_get_u64().context("a commit that ends too early")? >= done_after;
                }
                Some(b'k') => seen.asked |= body.last() == Some(&1),
                _ => {}
            },
            b'E' => bail!("the source says: {}", String::from_utf8_lossy(body).replace('\0', " ")),
            b'c' | b'C' => bail!("the source ended the stream"),
            _ => {}
        }
    }
    Ok(seen)
}

/// A status update that confirms nothing: the slot stays where it is.
fn status() -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u8(b'd');
    out.put_i32(4 + 1 + 8 * 4 + 1);
    out.put_u8(b'r');
    out.put_bytes(0, 8 * 4 + 1);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit_at(lsn: u64) -> Vec<u8> {
        let mut body = vec![b'w'];
        body.extend([0; 24]);
        body.extend([b'C', 0]);
        body.extend(lsn.to_be_bytes());
        let length = u32::try_from(body.len() + 4).expect("short");
        [&[b'd'][..], &length.to_be_bytes(), &body].concat()
    }

    #[test]
    fn the_last_commit_is_seen_once_it_is_complete() {
        let bytes = [commit_at(7), commit_at(9)].concat();
        let mut buffer = BytesMut::from(&bytes[..bytes.len() - 1]);
        assert_eq!(take_messages(&mut buffer, 9).expect("messages"), Seen::default());
        buffer.put_u8(bytes[bytes.len() - 1]);
        assert!(take_messages(&mut buffer, 9).expect("messages").done);
        assert!(buffer.is_empty());
    }
}
