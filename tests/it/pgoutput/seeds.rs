//! The recordings as a first corpus for `cargo fuzz run pgoutput`.
//!
//!     cargo test --test it pgoutput::seeds -- --ignored

use std::path::Path;

use pgtandem::postgres::pgoutput::{Message, Protocol};

use super::{Recorded, everything};

/// Each stream as a whole, and each of its messages alone, behind the block that it stands in.
#[test]
#[ignore = "writes to fuzz/corpus"]
fn sow() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/pgoutput");
    std::fs::create_dir_all(&folder).expect("folder of the corpus");
    for (recording, messages) in everything() {
        let choice = match recording.protocol {
            Protocol::V1 => 0,
            Protocol::V2 => 1,
            Protocol::V3 => 2,
            Protocol::V4 { parallel: false } => 3,
            Protocol::V4 { parallel: true } => 4,
        };
        let write = |name: String, messages: &[&Recorded]| {
            let mut seed = vec![choice];
            for Recorded { bytes, .. } in messages {
                seed.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
                seed.extend_from_slice(bytes);
            }
            std::fs::write(folder.join(name), seed).expect("write a seed");
        };
        write(format!("{recording}"), &messages.iter().collect::<Vec<_>>());
        let mut block = None;
        for (at, recorded) in messages.iter().enumerate() {
            match recorded.decoded.message {
                Message::StreamStart { .. } => block = Some(recorded),
                Message::StreamStop => block = None,
                _ => write(format!("{recording}-{at}"), &block.into_iter().chain([recorded]).collect::<Vec<_>>()),
            }
        }
    }
}
