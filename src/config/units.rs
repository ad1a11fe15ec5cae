//! Sizes and durations as people write them.

use std::time::Duration;

const UNITS: &[(&str, u64)] = &[
    ("b", 1),
    ("kb", 1000),
    ("kib", 1 << 10),
    ("mb", 1_000_000),
    ("mib", 1 << 20),
    ("gb", 1_000_000_000),
    ("gib", 1 << 30),
    ("tb", 1_000_000_000_000),
    ("tib", 1 << 40),
];

/// `32MiB`, `64kB`, `1.5 GiB` or plain bytes; in bytes. `kB` is 1000 bytes, `KiB` 1024.
pub(super) fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let unit = unit.trim().to_ascii_lowercase();
    let factor = if unit.is_empty() { 1 } else { UNITS.iter().find(|(name, _)| *name == unit)?.1 };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let whole = whole.parse::<u64>().ok()?.checked_mul(factor)?;
    if fraction.is_empty() {
        return (!digits.ends_with('.')).then_some(whole);
    }
    // Nine digits are more than anyone writes, and their product with a terabyte fits.
    if fraction.len() > 9 || factor == 1 {
        return None;
    }
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let part = u128::from(fraction.parse::<u64>().ok()?) * u128::from(factor) / scale;
    whole.checked_add(u64::try_from(part).ok()?)
}

/// The largest binary unit that divides `bytes`: `32MiB`.
pub(super) fn show_size(bytes: u64) -> String {
    let unit = [(1u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match unit.iter().find(|(factor, _)| bytes > 0 && bytes.is_multiple_of(*factor)) {
        Some((factor, name)) => format!("{}{name}", bytes / factor),
        None => format!("{bytes}B"),
    }
}

/// `200ms`, `30s`, `1m 30s`.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    humantime::parse_duration(text.trim()).ok()
}

/// As [`parse_duration`] reads it.
pub(super) fn show_duration(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, bytes) in
            [("1GiB", 1 << 30), ("32 mib", 32 << 20), ("64kB", 64_000), ("64KiB", 65_536), ("7", 7), ("1.5KiB", 1536)]
        {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for text in ["", "GiB", "1 GiBs", "-1", "1.", "1..5GiB", "1.5", "99999999999TiB", "1 2", "1e3"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_back(bytes: u64) {
            prop_assert_eq!(parse_size(&show_size(bytes)), Some(bytes));
        }

        #[test]
        fn any_text_is_a_size_or_not(text: String) {
            let _size = parse_size(&text);
            let _duration = parse_duration(&text);
        }
    }
}
