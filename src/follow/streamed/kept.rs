//! The messages of one transaction in progress: in memory, and what was moved away from there in a file.
//!
//! Both hold the same bytes: blocks of whole records, a record for each message. A message is copied once, from where it was
//! received into a block. To keep it there would be cheaper at first sight; but the blocks into which the connection reads are
//! shared by everything that came along, so one message of a transaction that stays open would hold on to a quarter of a
//! megabyte of others, and moving a transaction to its file would give back nothing. So what is counted here is what is held.
//!
//! The file has no name: it is removed when it is made, and goes with the process, however that ends. Only its owner could
//! have opened it meanwhile.

use std::fs::File;
use std::io::{self, Read, Seek, Write};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::postgres::Lsn;

/// Before each message: its length, its transaction, its position.
const HEADER: usize = 4 + 4 + 8;

/// Blocks grow with what they hold together, so that a small transaction takes little, in bytes.
const SMALLEST_BLOCK: usize = 8 * 1024;
const LARGEST_BLOCK: usize = 1024 * 1024;

/// The messages of one transaction, in their order: those of the file come first.
#[derive(Debug, Default)]
pub(super) struct Kept {
    blocks: Vec<BytesMut>,
    /// Of all blocks, in bytes.
    capacity: usize,
    file: Option<Spilled>,
}

#[derive(Debug)]
struct Spilled {
    file: File,
    bytes: u64,
}

/// A message that was kept.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// The transaction or subtransaction that it belongs to.
    pub xid: u32,
    /// Its position in the log.
    pub start: Lsn,
    /// As protocol version 1 writes it.
    pub message: Bytes,
}

impl Kept {
    /// Adds a message: its kind, and what comes after kind and xid.
    pub(super) fn push(&mut self, xid: u32, start: Lsn, kind: u8, rest: &[u8]) -> io::Result<()> {
        let length = u32::try_from(rest.len() + 1).map_err(|_| damaged("a message is longer than any can be"))?;
        let needed = HEADER + 1 + rest.len();
        let fits = self.blocks.last().is_some_and(|block| block.capacity() - block.len() >= needed);
        if !fits {
            let block = BytesMut::with_capacity(self.capacity.clamp(SMALLEST_BLOCK, LARGEST_BLOCK).max(needed));
            self.capacity += block.capacity();
            self.blocks.push(block);
        }
        if let Some(block) = self.blocks.last_mut() {
            block.put_u32(length);
            block.put_u32(xid);
            block.put_u64(start.as_u64());
            block.put_u8(kind);
            block.put_slice(rest);
        }
        Ok(())
    }

    /// What it holds of the memory, in bytes.
    pub(super) fn in_memory(&self) -> usize {
        self.capacity
    }

    /// What it holds of the disk, in bytes.
    pub(super) fn on_disk(&self) -> u64 {
        self.file.as_ref().map_or(0, |spilled| spilled.bytes)
    }

    /// Whether it has a file.
    pub(super) fn has_file(&self) -> bool {
        self.file.is_some()
    }

    /// What [`Kept::spill`] would write.
    pub(super) fn to_spill(&self) -> u64 {
        self.blocks.iter().map(|block| 4 + block.len() as u64).sum()
    }

    /// Moves what is in memory to the end of the file. After an error it is good for nothing but being dropped.
    pub(super) fn spill(&mut self) -> io::Result<()> {
        if self.file.is_none() {
            // Open to its owner alone, and removed already.
            self.file = Some(Spilled { file: tempfile::tempfile()?, bytes: 0 });
        }
        let Some(spilled) = &mut self.file else { return Ok(()) };
        for block in self.blocks.drain(..) {
            let length = u32::try_from(block.len()).map_err(|_| damaged("a block is longer than any can be"))?;
            spilled.file.write_all(&length.to_be_bytes())?;
            spilled.file.write_all(&block)?;
            spilled.bytes += 4 + u64::from(length);
        }
        self.capacity = 0;
        Ok(())
    }

    /// Gives everything back, in order.
    pub(super) fn into_records(self) -> io::Result<Records> {
        let file = match self.file {
            Some(mut spilled) => {
                spilled.file.rewind()?;
                Some(spilled)
            }
            None => None,
        };
        Ok(Records { file, blocks: self.blocks.into_iter(), rest: Bytes::new() })
    }
}

/// The messages of a transaction, one after the other. The file is read a block at a time.
#[derive(Debug)]
pub(super) struct Records {
    /// Its length counts down: what was not read yet.
    file: Option<Spilled>,
    blocks: std::vec::IntoIter<BytesMut>,
    /// Of the block in hand.
    rest: Bytes,
}

impl Records {
    pub(super) fn next(&mut self) -> io::Result<Option<Record>> {
        while self.rest.is_empty() {
            match self.block()? {
                Some(block) => self.rest = block,
                None => return Ok(None),
            }
        }
        record(&mut self.rest).map(Some)
    }

    fn block(&mut self) -> io::Result<Option<Bytes>> {
        match &mut self.file {
            Some(spilled) if spilled.bytes > 0 => spilled.block().map(Some),
            _ => Ok(self.blocks.next().map(BytesMut::freeze)),
        }
    }
}

impl Spilled {
    fn block(&mut self) -> io::Result<Bytes> {
        let mut length = [0; 4];
        self.file.read_exact(&mut length)?;
        let length = u32::from_be_bytes(length);
        // Looked at before anything is allocated.
        self.bytes = self
            .bytes
            .checked_sub(4 + u64::from(length))
            .ok_or_else(|| damaged("a block of the temporary file is longer than the file"))?;
        let mut block = vec![0; length as usize];
        self.file.read_exact(&mut block)?;
        Ok(block.into())
    }
}

/// Takes a record off the front of a block.
fn record(rest: &mut Bytes) -> io::Result<Record> {
    if rest.len() < HEADER {
        return Err(damaged("a block ends in the middle of a record"));
    }
    let (length, xid, start) = (rest.get_u32() as usize, rest.get_u32(), Lsn::new(rest.get_u64()));
    if length == 0 || length > rest.len() {
        return Err(damaged("the length of a record is not that of a message"));
    }
    Ok(Record { xid, start, message: rest.split_to(length) })
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kept(rests: &[Vec<u8>], spilled_after: &[usize]) -> Kept {
        let mut kept = Kept::default();
        for (at, rest) in rests.iter().enumerate() {
            kept.push(at as u32, Lsn::new(at as u64 * 10), b'I', rest).unwrap();
            if spilled_after.contains(&at) {
                let expected = kept.on_disk() + kept.to_spill();
                kept.spill().unwrap();
                assert_eq!((kept.on_disk(), kept.in_memory()), (expected, 0));
            }
        }
        kept
    }

    fn read(kept: Kept) -> Vec<Record> {
        let mut records = kept.into_records().unwrap();
        std::iter::from_fn(|| records.next().unwrap()).collect()
    }

    proptest! {
        #[test]
        fn what_was_kept_comes_back_in_order(
            rests in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20_000), 0..40),
            spilled_after in prop::collection::vec(0usize..40, 0..4),
        ) {
            let there = read(kept(&rests, &spilled_after));
            prop_assert_eq!(there.len(), rests.len());
            for (at, (record, rest)) in there.iter().zip(&rests).enumerate() {
                prop_assert_eq!((record.xid, record.start), (at as u32, Lsn::new(at as u64 * 10)));
                prop_assert_eq!(record.message.first(), Some(&b'I'));
                prop_assert_eq!(&record.message[1..], &rest[..]);
            }
        }

        #[test]
        fn no_bytes_of_a_block_bring_us_down(bytes: Vec<u8>) {
            let mut rest = Bytes::from(bytes);
            while !rest.is_empty() && record(&mut rest).is_ok() {}
        }
    }

    #[test]
    fn a_length_that_lies_is_an_error() {
        for (at, what) in [(0, "longer than the file"), (4, "not that of a message")] {
            let mut kept = kept(&[vec![1; 100]], &[0]);
            let spilled = kept.file.as_mut().unwrap();
            spilled.file.seek(io::SeekFrom::Start(at)).unwrap();
            spilled.file.write_all(&u32::MAX.to_be_bytes()).unwrap();
            let error = kept.into_records().unwrap().next().unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
        }
    }

    #[test]
    fn a_file_that_ends_too_early_is_an_error() {
        let mut kept = kept(&[vec![1; 100], vec![2; 100]], &[1]);
        kept.file.as_mut().unwrap().file.set_len(150).unwrap();
        let mut records = kept.into_records().unwrap();
        assert_eq!(records.next().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
