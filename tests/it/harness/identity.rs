//! Gives a copied data directory a system identifier of its own.
//!
//! All copies of a template would have the template's identifier, and look like one server to a product that
//! refuses to move a server onto itself. The identifier stands in `global/pg_control`, under a CRC-32C, and in
//! the first page of each WAL segment, which has no checksum (`ControlFileData` in `catalog/pg_control.h`,
//! `XLogLongPageHeaderData` in `access/xlog_internal.h`).

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Where a WAL segment's first page has the identifier: after the 24 bytes of the short page header.
const WAL_IDENTIFIER_OFFSET: u64 = 24;

/// Writes a new identifier into the data directory of a server that is not running and was shut down cleanly.
pub fn renew(data: &Path) {
    let identifier = new_identifier();
    let control = data.join("global/pg_control");
    let mut bytes = fs::read(&control).expect("read pg_control");
    let checksum = checksum_offset(&bytes);
    bytes[..8].copy_from_slice(&identifier.to_ne_bytes());
    let renewed = crc32c(&bytes[..checksum]);
    bytes[checksum..checksum + 4].copy_from_slice(&renewed.to_ne_bytes());
    // In place, so that owner and mode stay.
    fs::File::options().write(true).open(&control).and_then(|file| file.write_all_at(&bytes, 0)).expect("pg_control");

    for entry in fs::read_dir(data.join("pg_wal")).expect("list pg_wal").flatten() {
        if entry.file_name().len() == "000000010000000000000001".len() {
            let segment = fs::File::options().write(true).open(entry.path()).expect("open a WAL segment");
            segment.write_all_at(&identifier.to_ne_bytes(), WAL_IDENTIFIER_OFFSET).expect("write a WAL segment");
        }
    }
}

/// Made as initdb does: time in the upper bits, the process in the lowest.
fn new_identifier() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
    (now.as_secs() << 32) | (u64::from(now.subsec_nanos()) & !0xfff) | u64::from(std::process::id() & 0xfff)
}

/// The checksum covers all that stands before it; its place differs between versions.
fn checksum_offset(control: &[u8]) -> usize {
    (200..512)
        .step_by(4)
        .find(|&at| crc32c(&control[..at]).to_ne_bytes() == control[at..at + 4])
        .expect("pg_control holds its own CRC-32C")
}

fn crc32c(bytes: &[u8]) -> u32 {
    const REVERSED_POLYNOMIAL: u32 = 0x82f6_3b78;
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(
            crc ^ u32::from(byte),
            |crc, _| {
                if crc & 1 == 1 { (crc >> 1) ^ REVERSED_POLYNOMIAL } else { crc >> 1 }
            },
        )
    })
}
