//! The whole story on two throw-away servers under live traffic: what `pgtandem demo` does.
//!
//! Owns: the servers it starts, a realistic database, the clients that write to it, and the proofs that nothing was
//! lost. Promises: the move itself is made by the real commands (`run`, `cutover`, `status`) as child processes, never
//! by a shortcut; everything that was started is ended and removed, whichever way the demo ends, unless it is to be
//! kept. Must never: touch a server that it did not start itself.
//!
//! | file | what it owns |
//! |---|---|
//! | [`installation`] | which PostgreSQL versions this machine has |
//! | [`servers`] | starting, stopping and removing a throw-away server |
//! | [`guard`] | ending what was started when the demo itself cannot |
//! | [`schema`] | the database of the demo and its content |
//! | [`load`] | the clients: transactions, tickets, reconnecting |
//! | [`figures`] | latencies and gaps out of the clients' samples |
//! | [`daemon`] | `pgtandem run` and `pgtandem cutover` as children, and what they say |
//! | [`switch`] | the moment of the switch: both sides held as they are, then the new address |
//! | [`compare`] | both sides row for row, as of that moment |
//! | [`story`] | the order of things |
//! | [`summary`] | the figures and the verdict |

pub mod compare;
pub mod daemon;
pub mod figures;
pub mod guard;
pub mod installation;
pub mod load;
pub mod schema;
pub mod servers;
pub mod story;
pub mod summary;
pub mod switch;

pub use story::{Options, tell};

/// Shows what happens. The demo says it once; how it looks is decided by who implements this.
pub trait Narrator: Send + Sync {
    /// A new chapter.
    fn chapter(&self, title: &str);
    /// A line that stays.
    fn line(&self, text: &str);
    /// How things stand now; the next call may overwrite it.
    fn live(&self, text: &str);
}

/// `1234567` as `1,234,567`.
#[must_use]
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes for people, in the units of the configuration file: `3.4 MiB`.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "for people, rounded anyway")]
pub fn human_bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn bytes_take_the_unit_that_fits() {
        for (bytes, text) in [(1023, "1023 B"), (1024, "1.0 KiB"), (3_565_158, "3.4 MiB"), (5 << 40, "5.0 TiB")] {
            assert_eq!(human_bytes(bytes), text);
        }
    }
}
