//! How long pgtandem takes from the copy's start until its first row is on its way: the time between two lines of its log, the
//! one that says that it enters the phase, and the one that says what its workers begin with.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;
use tokio_postgres::Client;

const ENTERING: &str = "entering phase copy";
const COPYING: &str = "copying";

/// Seconds, as the log tells; `any` server does the reckoning.
pub(crate) async fn seconds(log: &Path, any: &Client) -> Result<f64> {
    let text = std::fs::read_to_string(log).with_context(|| format!("reading {}", log.display()))?;
    let (from, to) = moments(&text).context("the log of pgtandem does not say when it began to copy")?;
    let sql = "SELECT extract(epoch FROM $2::text::timestamptz - $1::text::timestamptz)::float8";
    Ok(any.query_one(sql, &[&from, &to]).await.context("reckoning with moments of the log")?.try_get(0)?)
}

/// The moments of both lines.
fn moments(log: &str) -> Option<(String, String)> {
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let when = |message: &str| {
        let line = lines.iter().find(|line| line.get("message").and_then(Value::as_str) == Some(message))?;
        Some(line.get("timestamp")?.as_str()?.to_owned())
    };
    Some((when(ENTERING)?, when(COPYING)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_moments_are_found() {
        let log = "{\"timestamp\":\"2026-01-01T00:00:01.5Z\",\"message\":\"entering phase copy\"}\nno JSON\n\
                   {\"timestamp\":\"2026-01-01T00:00:02.5Z\",\"tables\":1,\"message\":\"copying\"}\n";
        assert_eq!(moments(log), Some(("2026-01-01T00:00:01.5Z".to_owned(), "2026-01-01T00:00:02.5Z".to_owned())));
        assert_eq!(moments(""), None);
    }
}
