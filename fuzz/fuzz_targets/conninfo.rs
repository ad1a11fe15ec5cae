//! Connection strings: any text is one, or an error that can be shown.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pgtandem::postgres::{Ambient, ConnInfo};

fuzz_target!(|text: &str| {
    match ConnInfo::parse(text, &Ambient::default()) {
        Ok(conninfo) => assert!(!format!("{conninfo:?}").is_empty()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
