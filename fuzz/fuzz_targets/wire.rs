//! What a server may send before it is trusted: headers, errors, command tags.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pgtandem::postgres::wire::{affected, error_of, header};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(Some((_, length))) = header(bytes) {
        assert!(length >= 5);
    }
    assert!(!error_of(bytes).code().is_empty());
    affected(bytes);
});
