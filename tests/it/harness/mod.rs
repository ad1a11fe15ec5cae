//! Throw-away PostgreSQL servers and the real binary, for tests.
//!
//! Owns what a test needs around the product: servers of every version ([`Cluster`]), their databases
//! ([`Database`]), the program under test ([`Pgtandem`]), the proof that nothing was lost ([`assert_same`]), and
//! waiting ([`wait_until`]). Promises that nothing outlives the test, whether it passes, panics or is
//! killed, and that any number of tests run at once. Must never touch a server that it did not start.
//!
//! ```ignore
//! let (source, target) = Cluster::pair().await;
//! let (from, to) = (source.create_database("app").await, target.create_database("app").await);
//! from.execute("create table t (id int primary key)").await;
//! let done = Pgtandem::new(&from, &to, "app").run(&["check"]).await;
//! assert_eq!(done.code, Some(0), "{done}");
//! ```
#![allow(dead_code, unused_imports, reason = "a toolbox: not every tool is in use at every moment")]

mod catalog;
mod cluster;
mod compare;
mod database;
mod guard;
mod identity;
mod pgtandem;
mod port;
mod provision;
mod tls;

pub use self::pgtandem::{Finished, Pgtandem, Running, config};
pub use catalog::{assert_same_catalog, catalog_differences};
pub use cluster::{Cluster, ClusterBuilder, PASSWORD, Stop};
pub use compare::{assert_same, differences};
pub use database::Database;
pub use provision::{VERSIONS, client_program, server_bin, versions_under_test};
pub use tls::TlsFiles;

use std::time::{Duration, Instant};

/// How long anything local may take before a test calls it stuck; far above what a busy machine needs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` holds; panics with `description` once `patience` is over.
pub async fn wait_until(description: &str, patience: Duration, mut condition: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < patience, "waited {patience:?} in vain: {description}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
