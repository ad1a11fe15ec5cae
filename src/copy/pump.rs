//! Forwards the rows of one COPY from one server to the other, straight through.
//!
//! A row leaves the source in a CopyData message, and that very message is what the target wants to read. So the bytes
//! go on as they came: only the headers are walked, to count rows and to see the end. Nothing is parsed, nothing is
//! framed again, and a row of 1 GiB takes no more memory than a small one. While one gulp is written, the next is read.
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

use crate::error::{Class, Doing, Error, Result};
use crate::postgres::wire::{self, Wire};

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

/// Hears how far a COPY is.
pub trait Advance {
    /// So much more went through. The COPY goes on when this is done, so it may take its time.
    fn advanced(&mut self, more: Moved) -> impl Future<Output = ()> + Send;
}

/// Nobody needs to know.
impl Advance for () {
    async fn advanced(&mut self, _: Moved) {}
}

impl std::ops::AddAssign for Moved {
    fn add_assign(&mut self, more: Self) {
        self.rows += more.rows;
        self.bytes += more.bytes;
    }
}

/// Runs `read` on the source and `write` on the target, both of the same form, and forwards every row.
///
/// Not cancellation safe: when dropped, or after an error, both connections are good for nothing but being dropped.
///
/// # Errors
/// Those of either server, with the side named; class bug if the counts disagree.
pub async fn forward(
    (source, read): (&mut Wire, &str),
    (target, write): (&mut Wire, &str),
    form: Form,
    to_tell: &mut impl Advance,
) -> Result<Moved> {
    source.enter_copy(read).await.doing(|| "reading from the source")?;
    target.enter_copy(write).await.doing(|| "writing to the target")?;
    let mut walk = Walk { header: form == Form::Binary, ..Walk::default() };
    loop {
        let before = walk.moved;
        let gulp = walk.take(source.inbound())?;
        if walk.ended || walk.aside {
            target.send(&gulp).await.doing(|| "writing to the target")?;
        } else {
            let (sent, read) = tokio::join!(target.send(&gulp), source.fill());
            refused(target)?;
            sent.doing(|| "writing to the target")?;
            if let Err(error) = read {
                return Err(give_up(target, &walk, error).await);
            }
        }
        let Moved { rows, bytes } = walk.moved;
        to_tell.advanced(Moved { rows: rows - before.rows, bytes: bytes - before.bytes }).await;
        if walk.aside {
            walk.skip_aside(source).await.doing(|| "reading from the source")?;
        }
        if walk.ended {
            break;
        }
    }
    // CopyDone and the command tag, or the error that ended the COPY early.
    let sent = match source.finish().await {
        Ok(count) => count,
        Err(error) => return Err(give_up(target, &walk, error).await),
    };
    frontend::copy_done(target.outbound());
    target.flush().await.doing(|| "writing to the target")?;
    let taken = target.finish().await.doing(|| "writing to the target")?;
    if sent != walk.moved.rows || taken != walk.moved.rows {
        return Err(Error::bug(format!(
            "the source sent {sent} rows, {} passed through, the target took {taken}",
            walk.moved.rows
        )));
    }
    Ok(walk.moved)
}

/// Looks, without waiting, whether the target ended the COPY: it would read and throw away everything that follows.
fn refused(target: &mut Wire) -> Result<()> {
    match target.fill().now_or_never() {
        None => return Ok(()),
        Some(read) => read.doing(|| "writing to the target")?,
    };
    match target.buffered_frame()? {
        None => Ok(()),
        Some(frame) if frame.tag == backend::ERROR_RESPONSE_TAG => {
            Err(wire::error_of(&frame.body).doing("writing to the target"))
        }
        Some(frame) => Err(wire::unexpected(frame.tag, "COPY FROM STDIN")),
    }
}

/// The source failed: the target is told, so that its log says why, and the source's error is what counts. In the
/// middle of a row nothing can be told; dropping the connection ends the COPY just as well.
async fn give_up(target: &mut Wire, walk: &Walk, error: Error) -> Error {
    let error = error.doing("reading from the source");
    if walk.missing > 0 {
        return error;
    }
    let told = async {
        frontend::copy_fail("the source ended the COPY early", target.outbound())?;
        target.flush().await?;
        target.finish().await
    };
    // Expected to fail.
    drop(tokio::time::timeout(FAREWELL, told).await);
    error
}

/// Walks over the messages of a COPY TO STDOUT.
#[derive(Debug, Default)]
struct Walk {
    moved: Moved,
    /// The next CopyData is the one that is no row.
    header: bool,
    /// Bytes of the current CopyData that have not come yet.
    missing: usize,
    /// Next is a message that ends the COPY.
    ended: bool,
    /// Next is a notice or the like, which is not for the target.
    aside: bool,
}

impl Walk {
    /// Takes everything from the front of `inbound` that belongs to CopyData messages, the last one in part.
    fn take(&mut self, inbound: &mut BytesMut) -> Result<Bytes> {
        let mut at = 0;
        loop {
            let here = self.missing.min(inbound.len() - at);
            self.missing -= here;
            at += here;
            let Some((tag, length)) = wire::header(inbound.get(at..).unwrap_or_default())? else { break };
            match tag {
                backend::COPY_DATA_TAG => {
                    self.missing = length;
                    self.moved.rows += u64::from(!std::mem::take(&mut self.header));
                    self.moved.bytes += (length - 5) as u64;
                }
                backend::NOTICE_RESPONSE_TAG | backend::PARAMETER_STATUS_TAG | backend::NOTIFICATION_RESPONSE_TAG => {
                    self.aside = true;
                    break;
                }
                _ => {
                    self.ended = true;
                    break;
                }
            }
        }
        Ok(inbound.split_to(at).freeze())
    }

    /// Throws one message away that is not part of the COPY.
    async fn skip_aside(&mut self, source: &mut Wire) -> Result<()> {
        loop {
            match wire::header(source.inbound())? {
                Some((_, length)) if source.inbound().len() >= length => {
                    drop(source.inbound().split_to(length));
                    self.aside = false;
                    return Ok(());
                }
                _ => source.fill().await?,
            };
        }
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

    proptest! {
        /// However the bytes arrive, every CopyData goes on unchanged, and nothing else does.
        #[test]
        fn rows_go_through_unchanged(rows: Vec<Vec<u8>>, cuts in proptest::collection::vec(1..40usize, 0..50)) {
            let data: Vec<u8> = rows.iter().flat_map(|row| message(b'd', row)).collect();
            let mut all = data.clone();
            all.extend(message(b'c', b""));
            let mut sizes = cuts.into_iter();
            let (mut walk, mut inbound, mut forwarded, mut rest) = (Walk::default(), BytesMut::new(), Vec::new(), &*all);
            while !rest.is_empty() {
                let (now, later) = rest.split_at(sizes.next().unwrap_or(rest.len()).min(rest.len()));
                inbound.extend_from_slice(now);
                rest = later;
                forwarded.extend_from_slice(&walk.take(&mut inbound).unwrap());
            }
            prop_assert!(walk.ended && !walk.aside);
            prop_assert_eq!(forwarded, data);
            prop_assert_eq!(walk.moved.rows, rows.len() as u64);
            prop_assert_eq!(walk.moved.bytes, rows.iter().map(Vec::len).sum::<usize>() as u64);
        }
    }

    #[test]
    fn a_notice_is_not_forwarded() {
        let mut inbound = BytesMut::from(&message(b'd', b"1\n")[..]);
        inbound.extend(message(b'N', b"hello"));
        let mut walk = Walk::default();
        assert_eq!(walk.take(&mut inbound).unwrap(), message(b'd', b"1\n"));
        assert!(walk.aside && !walk.ended);
    }
}
