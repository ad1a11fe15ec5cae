//! The decoder against what PostgreSQL 13 to 18 really send: each kind of message of each version of the protocol.
//!
//! `pgoutput/recorded/` holds the bytes, `pgoutput/recorder.rs` made them, and `pgoutput/encoder.rs` writes messages back.

mod encoder;
mod recorder;
mod recording;
mod seeds;

use std::collections::BTreeSet;

use bytes::Bytes;
use pgtandem::postgres::pgoutput::{Decoded, Decoder, Message, OldTuple, Protocol, Tuple, Value};
use proptest::prelude::*;

use encoder::encode;
use recording::{Recording, recordings};

/// One recorded message, and the decoder as it was before it.
struct Recorded {
    before: Decoder,
    bytes: Bytes,
    decoded: Decoded,
}

/// All messages of a recording, each of which must be readable.
fn decoded(recording: &Recording) -> Vec<Recorded> {
    let mut decoder = Decoder::new(recording.protocol);
    let decode = |bytes: Bytes| {
        let before = decoder.clone();
        let decoded = decoder.decode(&bytes).unwrap_or_else(|malformed| panic!("{recording}: {malformed}: {bytes:?}"));
        Recorded { before, bytes, decoded }
    };
    recording.messages().into_iter().map(decode).collect()
}

fn everything() -> Vec<(Recording, Vec<Recorded>)> {
    recordings().into_iter().map(|recording| (recording, decoded(&recording))).collect()
}

/// The rows that a message holds.
fn tuples(message: &Message) -> Vec<&Tuple> {
    match message {
        Message::Insert { new, .. } | Message::Update { old: None, new, .. } => vec![new],
        Message::Update { old: Some(old), new, .. } => vec![old.tuple(), new],
        Message::Delete { old, .. } => vec![old.tuple()],
        _ => Vec::new(),
    }
}

#[test]
fn every_kind_of_message_of_every_version_is_read() {
    for (recording, messages) in everything() {
        let seen: BTreeSet<&str> = messages.iter().map(|recorded| recorded.decoded.message.kind()).collect();
        let mut expected: BTreeSet<&str> = BTreeSet::new();
        expected.extend(["Begin", "Commit", "Origin", "Relation", "Type", "Insert", "Update", "Delete", "Truncate"]);
        if recording.version >= 14 {
            expected.insert("Message");
        }
        if recording.protocol >= Protocol::V2 {
            expected.extend(["Stream Start", "Stream Stop", "Stream Commit", "Stream Abort"]);
        }
        if recording.protocol >= Protocol::V3 {
            expected.extend(["Begin Prepare", "Prepare", "Commit Prepared", "Rollback Prepared", "Stream Prepare"]);
        }
        assert_eq!(seen, expected, "{recording}");
    }
}

#[test]
fn every_message_is_written_back_byte_for_byte() {
    for (recording, messages) in everything() {
        for recorded in messages {
            assert_eq!(encode(&recorded.decoded).bytes, recorded.bytes, "{recording}: {:?}", recorded.decoded);
        }
    }
}

/// What a recording holds beyond the kinds of its messages, in words.
fn details(recording: &Recording, messages: &[Recorded]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for Recorded { decoded: Decoded { xid, message }, .. } in messages {
        for value in tuples(message).iter().flat_map(|tuple| tuple.values()) {
            found.insert(match value {
                Value::Null => "a NULL".to_owned(),
                Value::Unchanged => "an unchanged value".to_owned(),
                Value::Text(_) => "a value as text".to_owned(),
                Value::Binary(_) => "a value in binary".to_owned(),
            });
        }
        if xid.is_some() {
            found.insert(format!("{} in a block", message.kind()));
        }
        let said = match message {
            Message::Relation(relation) if relation.columns.is_empty() => "a relation without columns".to_owned(),
            Message::Relation(relation) => format!("the identity {}", char::from(relation.identity)),
            Message::Update { old: None, .. } => "an update without an old row".to_owned(),
            Message::Update { old: Some(OldTuple::Key(_)), .. } => "an update with an old key".to_owned(),
            Message::Update { old: Some(OldTuple::Full(_)), .. } => "an update with an old row".to_owned(),
            Message::Delete { old: OldTuple::Key(_), .. } => "a delete by key".to_owned(),
            Message::Delete { old: OldTuple::Full(_), .. } => "a delete by row".to_owned(),
            Message::Truncate { relations, cascade, restart_identity } => {
                let several = if relations.len() > 1 { "several" } else { "one" };
                format!("a truncate of {several}, cascade {cascade}, restart {restart_identity}")
            }
            Message::Logical { transactional, .. } => format!("a message, transactional {transactional}"),
            Message::StreamStart { first, .. } => format!("a block, first {first}"),
            Message::StreamAbort { xid, subxid, aborted } => {
                let all = if xid == subxid { "a transaction" } else { "a subtransaction" };
                format!("an abort of {all}, with its place {}", aborted.is_some())
            }
            _ => continue,
        };
        found.insert(said);
    }
    assert!(!found.is_empty(), "{recording}");
    found
}

#[test]
fn every_variant_of_the_messages_was_recorded() {
    for (recording, messages) in everything() {
        let found = details(&recording, &messages);
        let value = if recording.binary { "a value in binary" } else { "a value as text" };
        let mut expected = vec![
            "a NULL",
            "an unchanged value",
            value,
            "the identity d",
            "the identity f",
            "the identity i",
            "the identity n",
            "a relation without columns",
            "an update without an old row",
            "an update with an old key",
            "an update with an old row",
            "a delete by key",
            "a delete by row",
            "a truncate of one, cascade false, restart false",
            "a truncate of several, cascade true, restart false",
            "a truncate of several, cascade false, restart true",
        ];
        if recording.version >= 14 {
            expected.extend(["a message, transactional true", "a message, transactional false"]);
        }
        if recording.protocol >= Protocol::V2 {
            expected.extend(["a block, first true", "a block, first false"]);
            expected.extend(["Relation in a block", "Insert in a block", "Update in a block", "Delete in a block"]);
            expected.extend(["Truncate in a block", "Message in a block"]);
            let told = recording.protocol == Protocol::V4 { parallel: true };
            expected.extend(if told {
                ["an abort of a transaction, with its place true", "an abort of a subtransaction, with its place true"]
            } else {
                [
                    "an abort of a transaction, with its place false",
                    "an abort of a subtransaction, with its place false",
                ]
            });
        }
        let missing: Vec<_> = expected.into_iter().filter(|&detail| !found.contains(detail)).collect();
        assert!(missing.is_empty(), "{recording} lacks {missing:?}; it has {found:#?}");
    }
}

/// A row that was recorded comes out as the values that went in.
#[test]
fn the_values_are_those_of_the_script() {
    for (recording, messages) in everything() {
        let rows: Vec<Vec<Value<'_>>> = messages
            .iter()
            .filter(|recorded| recorded.decoded.message.kind() == "Insert")
            .flat_map(|recorded| tuples(&recorded.decoded.message))
            .map(|tuple| tuple.values().collect())
            .collect();
        let number = 7i32.to_be_bytes();
        let expected = if recording.binary {
            [Value::Binary(&number), Value::Null, Value::Binary("naïve".as_bytes())]
        } else {
            [Value::Text(b"7"), Value::Null, Value::Text("naïve".as_bytes())]
        };
        assert!(rows.iter().any(|row| row.starts_with(&expected)), "{recording}");
    }
}

#[test]
fn every_prefix_of_every_message_is_an_error() {
    for (recording, messages) in everything() {
        for Recorded { before, bytes, .. } in messages {
            for end in 0..bytes.len() {
                let prefix = before.clone().decode(&bytes.slice(..end));
                assert!(prefix.is_err(), "{recording}: {end} bytes of {bytes:?} are {prefix:?}");
            }
        }
    }
}

#[test]
fn a_byte_after_any_message_is_an_error() {
    for (recording, messages) in everything() {
        for Recorded { before, bytes, .. } in messages {
            let longer = Bytes::from([&bytes[..], b"\0"].concat());
            assert!(before.clone().decode(&longer).is_err(), "{recording}: {bytes:?}");
        }
    }
}

#[test]
fn lying_lengths_and_counts_are_errors_and_cost_no_memory() {
    let recorded = everything();
    let at_first = peak_of_memory();
    let mut lies = 0;
    for (recording, messages) in &recorded {
        for Recorded { before, bytes, decoded } in messages {
            for field in encode(decoded).lengths {
                let all_ones: &[u8] = &[0xff; 4][..field.len()];
                let largest = &[&[0x7f], &all_ones[1..]].concat()[..];
                for lie in [all_ones, largest] {
                    let mut lying = bytes.to_vec();
                    lying[field.clone()].copy_from_slice(lie);
                    let read = before.clone().decode(&Bytes::from(lying));
                    assert!(read.is_err(), "{recording}: {lie:?} at {field:?} of {bytes:?} is {read:?}");
                    lies += 1;
                }
            }
        }
    }
    assert!(lies > 1000, "only {lies} lies");
    // The smallest of the promised sizes would be two gibibytes, and eight as a list of relations; threads of other tests
    // take their part meanwhile.
    let grown = peak_of_memory() - at_first;
    assert!(grown < 0x7000_0000, "a lie was believed: {grown} bytes were reserved");
}

/// The most memory that this process ever reserved, in bytes.
fn peak_of_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("read /proc/self/status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).expect("a line VmPeak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number of kB") * 1024
}

#[test]
fn what_is_new_in_a_version_is_refused_in_the_ones_before() {
    for (recording, messages) in everything() {
        for Recorded { bytes, decoded, .. } in messages {
            let needs = match decoded.message {
                Message::StreamStart { .. } | Message::StreamCommit { .. } | Message::StreamAbort { .. } => {
                    Protocol::V2
                }
                Message::BeginPrepare(_)
                | Message::Prepare(_)
                | Message::CommitPrepared { .. }
                | Message::RollbackPrepared { .. }
                | Message::StreamPrepare(_) => Protocol::V3,
                _ => continue,
            };
            for protocol in [Protocol::V1, Protocol::V2].into_iter().filter(|&older| older < needs) {
                let read = Decoder::new(protocol).decode(&bytes);
                assert!(read.is_err(), "{recording}: {protocol:?} reads {bytes:?} as {read:?}");
            }
        }
    }
}

/// How a message is damaged; places are taken modulo its length.
#[derive(Clone, Debug)]
enum Damage {
    Flip(usize, u8),
    Set(usize, u8),
    Cut(usize, usize),
    Insert(usize, Vec<u8>),
}

impl Damage {
    fn any() -> impl Strategy<Value = Self> {
        prop_oneof![
            (any::<usize>(), 0u8..8).prop_map(|(at, bit)| Self::Flip(at, bit)),
            (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Self::Set(at, byte)),
            (any::<usize>(), 1usize..20).prop_map(|(at, count)| Self::Cut(at, count)),
            (any::<usize>(), prop::collection::vec(any::<u8>(), 1..8)).prop_map(|(at, what)| Self::Insert(at, what)),
        ]
    }

    fn strike(&self, bytes: &mut Vec<u8>) {
        let place = |at: usize| at % bytes.len().max(1);
        match *self {
            Self::Flip(at, bit) if !bytes.is_empty() => {
                let at = place(at);
                bytes[at] ^= 1 << bit;
            }
            Self::Set(at, byte) if !bytes.is_empty() => {
                let at = place(at);
                bytes[at] = byte;
            }
            Self::Cut(at, count) if !bytes.is_empty() => {
                let at = place(at);
                drop(bytes.drain(at..(at + count).min(bytes.len())));
            }
            Self::Insert(at, ref what) => {
                let at = place(at);
                drop(bytes.splice(at..at, what.iter().copied()));
            }
            _ => {}
        }
    }
}

/// A damaged message is an error, or it reads as exactly what stands there.
#[test]
fn no_damage_brings_the_decoder_down_or_is_read_over() {
    let all: Vec<Recorded> = everything().into_iter().flat_map(|(_, messages)| messages).collect();
    let damages = prop::collection::vec(Damage::any(), 1..4);
    proptest!(ProptestConfig::with_cases(20_000), |(which in 0..all.len(), damages in damages)| {
        let recorded = &all[which];
        let mut bytes = recorded.bytes.to_vec();
        damages.iter().for_each(|damage| damage.strike(&mut bytes));
        if let Ok(decoded) = recorded.before.clone().decode(&Bytes::from(bytes.clone())) {
            for tuple in tuples(&decoded.message) {
                prop_assert_eq!(tuple.values().count(), tuple.len());
            }
            prop_assert_eq!(encode(&decoded).bytes, bytes);
        }
    });
}
