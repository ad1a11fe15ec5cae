//! Forwards the rows of COPYs from one server to the other, straight through.
//!
//! A row leaves the source in a CopyData message, and that very message is what the target wants to read; so is the CopyDone at the
//! end. So the bytes go on as they came: only the headers are walked, to count rows and to see the end. Nothing is parsed, nothing is
//! framed again, and a row of 1 GiB takes no more memory than a small one. While one gulp is written, the next is read.
//!
//! Several COPYs are one string of statements on each side: the target reads the rows of the next one when it is done with those of the
//! one before, so with small tables nobody waits for an answer.
//!
//! COPY's binary form begins with a header, which comes in one message with the first row, and ends with a trailer, which comes in a
//! message of its own: there is one message more than there are rows.
//!
//! Promises that the rows seen here, those that the source says it sent and those that the target says it took
//! are the same number, and that a COPY that failed on one side is not fed or drained to its end on the other.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use postgres_protocol::message::{backend, frontend};

use crate::error::{Class, Error, Result};
use crate::postgres::wire::{self, Frame, Wire};

/// How long a target may take to answer that it gave a COPY up.
const FAREWELL: Duration = Duration::from_secs(5);

/// How COPY writes rows down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// For any column.
    Text,
    /// For columns whose binary form both sides read alike.
    Binary,
}

/// Rows and bytes that went through: bytes as COPY writes them, without the protocol's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// How many rows.
    pub rows: u64,
    /// How many bytes.
    pub bytes: u64,
}

/// One COPY from side to side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pass {
    /// What an error is told with where there are several passes, such as "copying the table public.t".
    pub doing: String,
    /// What the source runs: a COPY TO STDOUT.
    pub read: String,
    /// What the target runs: a COPY FROM STDIN of the same form.
    pub write: String,
    /// The form of both.
    pub form: Form,
}

/// Hears how far COPYs are.
pub trait Advance {
    /// So much more of a pass went through. The COPY goes on when this is done, so it may take its time.
    fn advanced(&mut self, pass: usize, more: Moved) -> impl Future<Output = ()> + Send;
}

/// Nobody needs to know.
impl Advance for () {
    async fn advanced(&mut self, _: usize, _: Moved) {}
}

impl std::ops::AddAssign for Moved {
    fn add_assign(&mut self, more: Self) {
        self.rows += more.rows;
        self.bytes += more.bytes;
    }
}

/// Runs `passes` one after another and forwards every row. Each side hears of all of them at once, so the next one begins without a word
/// to and fro. The source runs `after` behind them.
///
/// Answers of the target are read when there is time. They must fit into a socket's buffer: see [`super::plan`].
///
/// Not cancellation safe: when dropped, or after an error, both connections are good for nothing but being dropped.
///
/// # Errors
/// Those of either server, with the side named; class bug if the counts disagree.
pub async fn forward(
    source: &mut Wire,
    target: &mut Wire,
    passes: &[Pass],
    after: &str,
    to_tell: &mut impl Advance,
) -> Result<Vec<Moved>> {
    let read: Vec<&str> = passes.iter().map(|pass| pass.read.as_str()).chain([after]).collect();
    let write: Vec<&str> = passes.iter().map(|pass| pass.write.as_str()).collect();
    let mut way = Way {
        source,
        target,
        passes,
        walk: Walk::new(passes),
        sent: Vec::new(),
        taken: Vec::new(),
        is_answered: false,
    };
    way.source.enter_copy(&read.join("; ")).await.map_err(|error| way.on_source(error))?;
    way.target.enter_copy(&write.join("; ")).await.map_err(|error| way.on_target(error))?;
    let mut gulp = Vec::new();
    let mut has_ended = false;
    while !has_ended {
        gulp.clear();
        has_ended = way.gulp(&mut gulp).await?;
        way.pass_on(&gulp, has_ended).await?;
        for (pass, more) in way.walk.advanced.drain(..) {
            to_tell.advanced(pass, more).await;
        }
    }
    way.finish().await
}

/// Both ends of [`forward`].
struct Way<'a> {
    source: &'a mut Wire,
    target: &'a mut Wire,
    passes: &'a [Pass],
    walk: Walk,
    /// Rows of each pass that is through, as the source counts them.
    sent: Vec<u64>,
    /// The same of the target.
    taken: Vec<u64>,
    /// The target has said its last word, which may come before anybody waits for it.
    is_answered: bool,
}

/// Pieces of what the source sent, which follow one another on their way to the target.
type Gulp = Vec<Bytes>;

impl Way<'_> {
    fn on_source(&self, error: Error) -> Error {
        self.during(self.walk.pass, error.doing("reading from the source"))
    }

    fn on_target(&self, error: Error) -> Error {
        self.during(self.taken.len(), error.doing("writing to the target"))
    }

    fn during(&self, pass: usize, error: Error) -> Error {
        match self.passes.get(pass) {
            Some(pass) if self.passes.len() > 1 => error.doing(pass.doing.as_str()),
            _ => error,
        }
    }

    /// Takes everything that was read from the source. True if that is all that there will ever be.
    async fn gulp(&mut self, gulp: &mut Gulp) -> Result<bool> {
        loop {
            let piece = self.walk.take(self.source.inbound())?;
            if !piece.is_empty() {
                gulp.push(piece);
            }
            if !self.walk.is_aside {
                return Ok(false);
            }
            let Some(frame) = self.source.buffered_message()? else { return Ok(false) };
            match frame.tag {
                backend::COMMAND_COMPLETE_TAG if self.sent.len() < self.passes.len() => {
                    self.sent.push(wire::affected(&frame.body));
                    self.walk.next(self.passes);
                }
                backend::READY_FOR_QUERY_TAG => return Ok(true),
                backend::ERROR_RESPONSE_TAG => return Err(self.give_up(gulp, wire::error_of(&frame.body)).await),
                // CopyOutResponse of the next pass, the end of what comes after them, notices.
                backend::COPY_OUT_RESPONSE_TAG
                | backend::COMMAND_COMPLETE_TAG
                | backend::NOTICE_RESPONSE_TAG
                | backend::PARAMETER_STATUS_TAG
                | backend::NOTIFICATION_RESPONSE_TAG => {}
                tag => return Err(self.on_source(wire::unexpected(tag, "COPY TO STDOUT"))),
            }
        }
    }

    /// Sends a gulp on while the next one is read.
    async fn pass_on(&mut self, gulp: &Gulp, is_last: bool) -> Result<()> {
        let joined;
        let bytes = match &gulp[..] {
            [piece] => piece,
            // Of small tables: to send each piece alone would cost more.
            pieces => {
                joined = pieces.concat();
                &joined[..]
            }
        };
        let (sent, read) = if is_last {
            (self.target.send(bytes).await, Ok(0))
        } else {
            tokio::join!(self.target.send(bytes), self.source.fill())
        };
        self.refused()?;
        sent.map_err(|error| self.on_target(error))?;
        match read {
            Ok(_) => Ok(()),
            Err(error) => Err(self.give_up(&[], error).await),
        }
    }

    /// Looks, without waiting, whether the target ended a COPY with an error: it would read and throw away everything that follows.
    fn refused(&mut self) -> Result<()> {
        if let Some(read) = self.target.fill().now_or_never() {
            read.map_err(|error| self.on_target(error))?;
        }
        while let Some(frame) = self.target.buffered_frame()? {
            self.answered(&frame)?;
        }
        Ok(())
    }

    /// Takes an answer of the target.
    fn answered(&mut self, frame: &Frame) -> Result<()> {
        match frame.tag {
            backend::COPY_IN_RESPONSE_TAG => {}
            backend::COMMAND_COMPLETE_TAG => self.taken.push(wire::affected(&frame.body)),
            backend::READY_FOR_QUERY_TAG => self.is_answered = true,
            backend::ERROR_RESPONSE_TAG => return Err(self.on_target(wire::error_of(&frame.body))),
            tag => return Err(self.on_target(wire::unexpected(tag, "COPY FROM STDIN"))),
        }
        Ok(())
    }

    /// The source failed: the target is told, so that its log says why, and the source's error is what counts. In the
    /// middle of a row nothing can be told; dropping the connection ends the COPY just as well.
    async fn give_up(&mut self, gulp: &[Bytes], error: Error) -> Error {
        if self.walk.missing == 0 {
            let told = async {
                // The end of a row whose beginning is sent is among it.
                self.target.send(&gulp.concat()).await?;
                frontend::copy_fail("the source ended the COPY early", self.target.outbound())?;
                self.target.flush().await?;
                self.target.finish().await
            };
            // Expected to fail.
            drop(tokio::time::timeout(FAREWELL, told).await);
        }
        self.on_source(error)
    }

    /// Everything is sent: hears the target out, and compares the counts.
    async fn finish(mut self) -> Result<Vec<Moved>> {
        // Under TLS the end may still be with us.
        self.target.flush().await.map_err(|error| self.on_target(error))?;
        while !self.is_answered {
            let frame = self.target.frame().await.map_err(|error| self.on_target(error))?;
            self.answered(&frame)?;
        }
        for pass in 0..self.passes.len() {
            let (sent, taken) = (self.sent.get(pass).copied(), self.taken.get(pass).copied());
            let rows = self.walk.moved.get(pass).map(|moved| moved.rows);
            if rows.is_none() || sent != rows || taken != rows {
                let error = Error::bug(format!(
                    "the source sent {sent:?} rows, {rows:?} passed through, the target took {taken:?}"
                ));
                return Err(self.during(pass, error));
            }
        }
        Ok(self.walk.moved)
    }
}

/// Walks over the messages of COPYs TO STDOUT.
#[derive(Debug, Default)]
struct Walk {
    /// What went through of each pass.
    moved: Vec<Moved>,
    /// What went through since that was told last, by pass.
    advanced: Vec<(usize, Moved)>,
    /// Which one is on its way.
    pass: usize,
    /// The next CopyData is the one that is no row.
    has_header: bool,
    /// Bytes of the current message that have not come yet.
    missing: usize,
    /// Next is a message that is not for the target.
    is_aside: bool,
}

impl Walk {
    fn new(passes: &[Pass]) -> Self {
        let moved = vec![Moved::default(); passes.len()];
        let has_header = passes.first().is_some_and(|pass| pass.form == Form::Binary);
        Self { moved, has_header, ..Self::default() }
    }

    /// The pass is through.
    fn next(&mut self, passes: &[Pass]) {
        self.pass += 1;
        self.has_header = passes.get(self.pass).is_some_and(|pass| pass.form == Form::Binary);
    }

    /// Takes everything from the front of `inbound` that belongs to CopyData and CopyDone messages, the last one in part: the target
    /// wants to read both as they are.
    fn take(&mut self, inbound: &mut BytesMut) -> Result<Bytes> {
        self.is_aside = false;
        let mut at = 0;
        let mut more = Moved::default();
        loop {
            let here = self.missing.min(inbound.len() - at);
            self.missing -= here;
            at += here;
            let Some((tag, length)) = wire::header(inbound.get(at..).unwrap_or_default())? else { break };
            match tag {
                backend::COPY_DATA_TAG => {
                    self.missing = length;
                    more.rows += u64::from(!std::mem::take(&mut self.has_header));
                    more.bytes += (length - 5) as u64;
                }
                backend::COPY_DONE_TAG => self.missing = length,
                _ => {
                    self.is_aside = true;
                    break;
                }
            }
        }
        if more != Moved::default() {
            self.advanced.push((self.pass, more));
            if let Some(moved) = self.moved.get_mut(self.pass) {
                *moved += more;
            }
        }
        Ok(inbound.split_to(at).freeze())
    }
}

/// The class under which a COPY that was refused because of what the other side's schema is, is shown.
pub(super) fn explain_schema(error: Error) -> Error {
    match error.sqlstate() {
        // Undefined table, column, object, schema; a column that is generated here.
        Some("42P01" | "42703" | "42704" | "3F000" | "42P10" | "428C9") => error
            .recoded(Class::Operator, "shape_differs")
            .hint("the table's shape changed since the schema was moved, or differs between the sides: bring the target's table to the source's shape"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut message = vec![tag];
        message.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        message.extend_from_slice(body);
        message
    }

    fn walk() -> Walk {
        Walk::new(&[Pass { doing: String::new(), read: String::new(), write: String::new(), form: Form::Text }])
    }

    proptest! {
        /// However the bytes arrive, every CopyData goes on unchanged, and nothing else does.
        #[test]
        fn rows_go_through_unchanged(rows: Vec<Vec<u8>>, cuts in proptest::collection::vec(1..40usize, 0..50)) {
            let mut all: Vec<u8> = rows.iter().flat_map(|row| message(b'd', row)).collect();
            all.extend(message(b'c', b""));
            let data_and_end = all.clone();
            all.extend(message(b'C', b"COPY 1\0"));
            let mut sizes = cuts.into_iter();
            let (mut walk, mut inbound, mut forwarded, mut rest) = (walk(), BytesMut::new(), Vec::new(), &*all);
            while !rest.is_empty() {
                let (now, later) = rest.split_at(sizes.next().unwrap_or(rest.len()).min(rest.len()));
                inbound.extend_from_slice(now);
                rest = later;
                forwarded.extend_from_slice(&walk.take(&mut inbound).unwrap());
            }
            prop_assert!(walk.is_aside);
            prop_assert_eq!(forwarded, data_and_end);
            let all = Moved { rows: rows.len() as u64, bytes: rows.iter().map(Vec::len).sum::<usize>() as u64 };
            prop_assert_eq!(walk.moved[0], all);
            let mut told = Moved::default();
            walk.advanced.iter().for_each(|&(_, more)| told += more);
            prop_assert_eq!(told, all);
        }
    }

    #[test]
    fn a_notice_is_not_forwarded() {
        let mut inbound = BytesMut::from(&message(b'd', b"1\n")[..]);
        inbound.extend(message(b'N', b"hello"));
        let mut walk = walk();
        assert_eq!(walk.take(&mut inbound).unwrap(), message(b'd', b"1\n"));
        assert!(walk.is_aside);
    }
}
