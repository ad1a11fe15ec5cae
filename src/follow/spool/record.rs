//! The bytes of a segment.
//!
//! A segment begins with [`MAGIC`] and the position at which it begins. Then there are records: a header of [`HEADER`] bytes,
//! and what was received. All numbers are big-endian.
//!
//! | bytes | what |
//! |---|---|
//! | 4 | length of the payload; its highest bit: the payload is a description that was sent before, told again |
//! | 4 | CRC-32C of the record's place in the file, of length and position, and of the payload |
//! | 8 | position: where the message begins in the log |
//! | … | payload: a message of pgoutput, protocol version 1 |
//!
//! A record without a payload says that nothing more committed before its position. With its place in the sum, a
//! record counts only where it was written.

use std::io::{self, Read};

use bytes::{Buf, Bytes, BytesMut};

use super::checksum::Checksum;
use super::peek::{Seen, peek};
use crate::postgres::Lsn;

/// What a segment begins with; the last two bytes are the version of the format.
pub(super) const MAGIC: [u8; 8] = *b"pgtspl01";

/// Length of the beginning of a segment.
pub(super) const PREFACE: usize = MAGIC.len() + 8;

/// Length of the header of a record.
pub(super) const HEADER: usize = 4 + 4 + 8;

/// Of the length: the payload is told again.
const AGAIN: u32 = 1 << 31;

/// Only the beginning of a message is looked at, in bytes; that of a TRUNCATE, which may be longer, does not matter there.
const LOOKED_AT: usize = 32;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub start: Lsn,
    /// A description that another segment has already.
    pub again: bool,
    /// Empty: nothing more committed before `start`.
    pub payload: Bytes,
}

/// What cannot have been written by us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Damaged(pub &'static str);

/// The beginning of a segment.
pub(super) fn preface(start: Lsn) -> [u8; PREFACE] {
    let mut bytes = [0; PREFACE];
    let (magic, position) = bytes.split_at_mut(MAGIC.len());
    magic.copy_from_slice(&MAGIC);
    position.copy_from_slice(&start.as_u64().to_be_bytes());
    bytes
}

/// The header of the record that stands at `place`; `None` for a payload that is longer than any can be.
pub(super) fn header(place: u64, start: Lsn, again: bool, payload: &[u8]) -> Option<[u8; HEADER]> {
    let length = u32::try_from(payload.len()).ok().filter(|length| length & AGAIN == 0)?;
    let length = (length | if again { AGAIN } else { 0 }).to_be_bytes();
    let start = start.as_u64().to_be_bytes();
    let mut sum = sum_of_header(place, length, start);
    sum.add(payload);
    let mut bytes = [0; HEADER];
    for (to, from) in bytes.iter_mut().zip(length.into_iter().chain(sum.value().to_be_bytes()).chain(start)) {
        *to = from;
    }
    Some(bytes)
}

fn sum_of_header(place: u64, length: [u8; 4], start: [u8; 8]) -> Checksum {
    let mut sum = Checksum::new();
    sum.add(&place.to_be_bytes());
    sum.add(&length);
    sum.add(&start);
    sum
}

/// A header that was read, not yet believed.
#[derive(Clone, Copy, Debug)]
struct Header {
    length: [u8; 4],
    sum: u32,
    start: [u8; 8],
}

impl Header {
    fn read(mut bytes: &[u8]) -> Option<Self> {
        let length = bytes.try_get_u32().ok()?.to_be_bytes();
        let sum = bytes.try_get_u32().ok()?;
        Some(Self { length, sum, start: bytes.try_get_u64().ok()?.to_be_bytes() })
    }

    fn payload(&self) -> usize {
        (u32::from_be_bytes(self.length) & !AGAIN) as usize
    }

    fn start(&self) -> Lsn {
        Lsn::new(u64::from_be_bytes(self.start))
    }

    fn again(&self) -> bool {
        u32::from_be_bytes(self.length) & AGAIN != 0
    }
}

/// How long the record at the front is with its header, once that is there.
pub(super) fn length(bytes: &[u8]) -> Option<usize> {
    Header::read(bytes).map(|header| HEADER + header.payload())
}

/// Takes the record off the front, which stands at `place` of its file; `None` while it is not there whole.
pub(super) fn take(bytes: &mut BytesMut, place: u64) -> Result<Option<Record>, Damaged> {
    let Some(header) = Header::read(bytes) else { return Ok(None) };
    if bytes.len() - HEADER < header.payload() {
        return Ok(None);
    }
    let mut record = bytes.split_to(HEADER + header.payload()).freeze();
    let payload = record.split_off(HEADER);
    let mut sum = sum_of_header(place, header.length, header.start);
    sum.add(&payload);
    if sum.value() != header.sum {
        return Err(Damaged("the checksum of a record does not fit"));
    }
    Ok(Some(Record { start: header.start(), again: header.again(), payload }))
}

/// What a segment holds that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Whole {
    /// Up to this place of the file.
    pub place: u64,
    /// Everything that committed before is in it, or before it.
    pub end: Lsn,
}

/// Reads a segment from its beginning to where whole, undamaged transactions end. `None` if not even its beginning is whole.
///
/// # Errors
/// The disk's.
pub(super) fn scan(file: &mut impl Read, bytes: u64, start: Lsn) -> io::Result<Option<Whole>> {
    let mut found = [0; PREFACE];
    if bytes < PREFACE as u64 {
        return Ok(None);
    }
    file.read_exact(&mut found)?;
    if found != preface(start) {
        return Ok(None);
    }
    let mut place = PREFACE as u64;
    let mut whole = Whole { place, end: start };
    let mut inside = false;
    let mut buffer = vec![0; 256 * 1024];
    while bytes - place >= HEADER as u64 {
        let mut header = [0; HEADER];
        file.read_exact(&mut header)?;
        let Some(header) = Header::read(&header) else { break };
        let payload = header.payload() as u64;
        if bytes - place - (HEADER as u64) < payload {
            break;
        }
        let Some(beginning) = checked(file, &header, place, &mut buffer)? else { break };
        place += HEADER as u64 + payload;
        match peek(&beginning) {
            None if payload == 0 && !inside => whole = Whole { place, end: header.start() },
            Some(Seen::Begin { .. }) if !inside => inside = true,
            Some(Seen::Commit { end }) if inside => {
                inside = false;
                whole = Whole { place, end };
            }
            Some(Seen::Begin { .. } | Seen::Commit { .. }) => break,
            _ => {}
        }
    }
    Ok(Some(whole))
}

/// The beginning of a payload, if its sum fits.
fn checked(file: &mut impl Read, header: &Header, place: u64, buffer: &mut [u8]) -> io::Result<Option<Vec<u8>>> {
    let mut sum = sum_of_header(place, header.length, header.start);
    let mut beginning = Vec::new();
    let mut left = header.payload();
    while left > 0 {
        let most = left.min(buffer.len());
        let Some(piece) = buffer.get_mut(..most) else { break };
        file.read_exact(piece)?;
        sum.add(piece);
        if beginning.is_empty() {
            beginning.extend_from_slice(piece.get(..LOOKED_AT).unwrap_or(piece));
        }
        left -= most;
    }
    Ok((sum.value() == header.sum).then_some(beginning))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn add(file: &mut Vec<u8>, start: u64, payload: &[u8]) {
        let header = header(file.len() as u64, Lsn::new(start), false, payload).unwrap();
        file.extend_from_slice(&header);
        file.extend_from_slice(payload);
    }

    fn begin(commit: u64) -> Vec<u8> {
        [&[b'B'][..], &commit.to_be_bytes(), &[0; 12]].concat()
    }

    fn commit(end: u64) -> Vec<u8> {
        [&[b'C', 0][..], &(end - 1).to_be_bytes(), &end.to_be_bytes(), &[0; 8]].concat()
    }

    /// A segment of transactions with so many rows each, and where it is whole: place and end.
    fn segment(transactions: &[Vec<Vec<u8>>]) -> (Vec<u8>, Vec<(u64, u64)>) {
        let mut file = preface(Lsn::new(100)).to_vec();
        let mut whole = vec![(file.len() as u64, 100)];
        for (at, rows) in transactions.iter().enumerate() {
            let end = 200 + at as u64 * 100;
            add(&mut file, end - 50, &begin(end - 1));
            for row in rows {
                add(&mut file, end - 40, &[&[b'I', 0, 0, 0, 1], &row[..]].concat());
            }
            add(&mut file, end - 1, &commit(end));
            whole.push((file.len() as u64, end));
            if at % 2 == 0 {
                add(&mut file, end + 10, &[]);
                whole.push((file.len() as u64, end + 10));
            }
        }
        (file, whole)
    }

    fn scanned(file: &[u8]) -> Option<(u64, u64)> {
        let whole = scan(&mut &file[..], file.len() as u64, Lsn::new(100)).unwrap()?;
        Some((whole.place, whole.end.as_u64()))
    }

    fn transactions() -> impl Strategy<Value = Vec<Vec<Vec<u8>>>> {
        prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..4), 0..5)
    }

    proptest! {
        #[test]
        fn records_come_back(payloads: Vec<Vec<u8>>, again: bool) {
            let mut file = BytesMut::new();
            for (at, payload) in payloads.iter().enumerate() {
                let header = header(file.len() as u64, Lsn::new(at as u64), again, payload).unwrap();
                file.extend_from_slice(&header);
                file.extend_from_slice(payload);
            }
            let mut place = 0;
            for (at, payload) in payloads.iter().enumerate() {
                prop_assert_eq!(length(&file), Some(HEADER + payload.len()));
                let record = take(&mut file, place).unwrap().unwrap();
                prop_assert_eq!((record.start, record.again), (Lsn::new(at as u64), again));
                prop_assert_eq!(&record.payload[..], &payload[..]);
                place += (HEADER + payload.len()) as u64;
            }
            prop_assert_eq!(take(&mut file, place), Ok(None));
        }

        /// Cut at every byte: what is whole before it counts, and nothing else.
        #[test]
        fn a_segment_that_is_cut_ends_with_its_last_whole_transaction(transactions in transactions()) {
            let (file, whole) = segment(&transactions);
            for cut in 0..=file.len() {
                let expected = whole.iter().rev().find(|(place, _)| *place <= cut as u64).copied();
                prop_assert_eq!(scanned(&file[..cut]), expected, "cut at {}", cut);
            }
        }

        #[test]
        fn nothing_counts_from_a_corrupted_byte_on(transactions in transactions(), at: prop::sample::Index, with in 1u8..) {
            let (mut file, whole) = segment(&transactions);
            let at = at.index(file.len());
            file[at] ^= with;
            let expected = whole.iter().rev().find(|(place, _)| *place <= at as u64).copied();
            prop_assert_eq!(scanned(&file), expected);
        }

        #[test]
        fn no_bytes_bring_us_down(bytes: Vec<u8>, place: u64) {
            scanned(&bytes);
            let mut with_preface = preface(Lsn::new(100)).to_vec();
            with_preface.extend_from_slice(&bytes);
            scanned(&with_preface);
            drop(take(&mut BytesMut::from(&bytes[..]), place));
        }
    }

    #[test]
    fn a_record_at_another_place_is_damaged() {
        let payload = b"payload";
        let mut bytes = BytesMut::from(&header(16, Lsn::new(1), false, payload).unwrap()[..]);
        bytes.extend_from_slice(payload);
        assert!(take(&mut bytes.clone(), 16).unwrap().is_some());
        assert!(take(&mut bytes, 17).is_err());
    }
}
