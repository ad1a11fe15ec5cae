//! A stream of pgoutput messages: nothing panics, and what is read can be written back byte for byte.
//!
//! The input is a byte that chooses the protocol, then messages as the recordings hold them: each behind its length in
//! four bytes. A length beyond the end takes what is there.
#![no_main]

#[path = "../../tests/it/pgoutput/encoder.rs"]
#[allow(dead_code)]
mod encoder;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use pgtandem::postgres::pgoutput::{Decoder, Message, Protocol, Tuple};

fuzz_target!(|input: &[u8]| {
    let Some((&choice, rest)) = input.split_first() else { return };
    let mut decoder = Decoder::new(match choice % 5 {
        0 => Protocol::V1,
        1 => Protocol::V2,
        2 => Protocol::V3,
        3 => Protocol::V4 { parallel: false },
        _ => Protocol::V4 { parallel: true },
    });
    let mut rest = Bytes::copy_from_slice(rest);
    while let Some((&length, _)) = rest.split_first_chunk::<4>() {
        drop(rest.split_to(4));
        let length = (u32::from_be_bytes(length) as usize).min(rest.len());
        let bytes = rest.split_to(length);
        match decoder.decode(&bytes) {
            Err(malformed) => assert!(!malformed.to_string().is_empty()),
            Ok(decoded) => {
                rows(&decoded.message).iter().for_each(|row| assert_eq!(row.values().count(), row.len()));
                // The one thing that can be written in two ways, of which the server uses the other.
                let spelled_out = bytes.windows(11).any(|window| window == b"pg_catalog\0");
                assert!(spelled_out || encoder::encode(&decoded).bytes == bytes, "{decoded:?}");
            }
        }
    }
});

fn rows(message: &Message) -> Vec<&Tuple> {
    match message {
        Message::Insert { new, .. } | Message::Update { old: None, new, .. } => vec![new],
        Message::Update { old: Some(old), new, .. } => vec![old.tuple(), new],
        Message::Delete { old, .. } => vec![old.tuple()],
        _ => Vec::new(),
    }
}
