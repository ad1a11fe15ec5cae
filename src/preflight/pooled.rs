//! Whether an address leads to the server itself, or to a pooler that hands a session's statements to different servers.
//!
//! A move needs real sessions: a snapshot is held, locks are kept, settings are pinned, a slot is streamed.

use tokio_postgres::Client;

use super::Finding;
use super::finding::kinds;
use crate::error::Result;
use crate::postgres::Side;

const BACKEND: &str = "SELECT pg_catalog.pg_backend_pid()";

/// Where poolers listen by convention.
const POOLER_PORTS: [u16; 1] = [6432];

kinds! {
    POOLED_ADDRESS = Blocking "pooled_address" {
        what: "the address is that of a connection pooler",
        why: "a pooler does not keep a session: snapshots, locks and replication need the server itself",
        fix: "use the direct address (for Neon: the host name without -pooler)",
    }
    POOLED_SESSION = Blocking "pooled_session" {
        what: "statements of one session run in different server processes",
        why: "a pooler in transaction mode stands between: snapshots, locks and replication need the server itself",
        fix: "use the server's own address and port",
    }
}

/// What the address alone tells.
pub(super) fn by_address(side: Side, host: &str, port: u16) -> Option<Finding> {
    let (first, rest) = host.split_once('.').unwrap_or((host, ""));
    if let Some(direct) = first.strip_suffix("-pooler") {
        let direct = if rest.is_empty() { direct.to_owned() } else { format!("{direct}.{rest}") };
        let what = format!("{host} is the pooled address of this server");
        return Some(
            POOLED_ADDRESS.on(side, what).fix(format!("use the host {direct}")).objects(vec![host.to_owned()]),
        );
    }
    if host.ends_with(".pooler.supabase.com") && port == 6543 {
        let what = format!("{host}:{port} is a pooler in transaction mode");
        return Some(
            POOLED_ADDRESS
                .on(side, what)
                .fix("use the direct address db.<project>.supabase.co:5432")
                .objects(vec![host.to_owned()]),
        );
    }
    POOLER_PORTS.contains(&port).then(|| {
        let what = format!("port {port} of {host} is where PgBouncer listens by convention");
        let fix = "use the server's own port (usually 5432)";
        POOLED_ADDRESS.on(side, what).fix(fix).objects(vec![format!("{host}:{port}")])
    })
}

/// What the sessions tell: while one is inside a transaction, another that shares its process, or that has to change
/// its own, is not a session.
pub(super) async fn by_behaviour(side: Side, first: &Client, second: &Client) -> Result<Option<Finding>> {
    let before = backend(first).await?;
    second.batch_execute("BEGIN").await?;
    let seen: Result<_> = async { Ok((backend(second).await?, backend(first).await?)) }.await;
    second.batch_execute("ROLLBACK").await?;
    let (other, after) = seen?;
    Ok((before == other || before != after).then(|| {
        POOLED_SESSION.on(side, format!("one session of the {} was served by several processes", side.as_str()))
    }))
}

/// A simple query: poolers lose prepared statements, which would hide the answer behind an error.
async fn backend(client: &Client) -> Result<String> {
    let messages = client.simple_query(BACKEND).await?;
    let pid = messages.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    Ok(pid.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pooled_neon_address_is_refused_with_the_direct_one() {
        let found = by_address(Side::Source, "ep-cool-rain-123-pooler.eu-central-1.aws.neon.tech", 5432).unwrap();
        assert_eq!(found.code, "pooled_address");
        assert_eq!(found.fix.as_deref(), Some("use the host ep-cool-rain-123.eu-central-1.aws.neon.tech"));
    }

    #[test]
    fn a_direct_address_passes() {
        assert_eq!(by_address(Side::Source, "ep-cool-rain-123.eu-central-1.aws.neon.tech", 5432), None);
        assert_eq!(by_address(Side::Target, "pooler.example.com", 5432), None);
    }

    #[test]
    fn the_port_of_a_pooler_is_refused() {
        assert!(by_address(Side::Target, "db.example.com", 6432).is_some());
    }
}
