//! What is looked at every few seconds while following, apart from the stream: tables without a replica identity, and the
//! worker of a subscription. What is found is a blocker for as long as it is so; nothing found here ends a move.

use std::convert::Infallible;
use std::time::Duration;

use super::subscription::health::Health;
use super::unkeyed;
use crate::config::{Config, WithoutIdentity};
use crate::postgres::Server;
use crate::state::Store;
use crate::telemetry::{Blocker, Telemetry};

/// How often.
const EVERY: Duration = Duration::from_secs(5);

/// Looks again and again; never ends. A look that fails is tried again: following itself says what is wrong with a server.
pub async fn run(
    config: &Config,
    source: &Server,
    target: &Server,
    store: &Store,
    telemetry: &Telemetry,
    mut worker: Option<Health>,
) -> Infallible {
    let mut watch = unkeyed::Watch::default();
    let mut kept = None;
    loop {
        let looked = async {
            let unwell = match &mut worker {
                Some(worker) => worker.check(telemetry).await?,
                None => None,
            };
            let mut blockers = if config.follow.without_identity == WithoutIdentity::Copy {
                // What differs is carried by the cutover.
                Vec::new()
            } else {
                watch.check(source, target, store).await?
            };
            blockers.extend(unwell);
            Ok::<_, crate::Error>(blockers)
        };
        match looked.await {
            Ok(blockers) => {
                let found: Vec<_> = blockers.iter().map(Blocker::to_json).collect();
                telemetry.blockers(&blockers);
                // For whoever asks without the daemon; no harm if it fails once.
                if kept.as_ref() != Some(&found) && store.set_blockers(&found).await.is_ok() {
                    kept = Some(found);
                }
            }
            Err(error) => tracing::debug!(%error, "tables without a replica identity cannot be looked at"),
        }
        tokio::time::sleep(EVERY).await;
    }
}
