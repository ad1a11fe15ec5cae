//! What is looked at every few seconds while following, apart from the stream: tables made or dropped since the copy, and
//! tables without a replica identity. What is found is a blocker for as long as it is so; nothing found here ends a move.

use std::time::Duration;

use super::{scope, unkeyed};
use crate::config::Config;
use crate::error::Result;
use crate::postgres::Server;
use crate::state::Store;
use crate::telemetry::{Blocker, Telemetry};

/// How often.
const EVERY: Duration = Duration::from_secs(5);

/// See the module's first lines.
pub struct Lookout {
    source: Server,
    target: Server,
    store: Store,
    config: Config,
    telemetry: Telemetry,
    unkeyed: unkeyed::Watch,
}

impl Lookout {
    /// Looks at nothing yet.
    #[must_use]
    pub fn new(source: &Server, target: &Server, store: &Store, config: &Config, telemetry: &Telemetry) -> Self {
        Self {
            source: source.clone(),
            target: target.clone(),
            store: store.clone(),
            config: config.clone(),
            telemetry: telemetry.clone(),
            unkeyed: unkeyed::Watch::default(),
        }
    }

    /// What is made or dropped, once; to be awaited before the move may count as ready.
    ///
    /// # Errors
    /// The connections'.
    pub async fn first(&self) -> Result<()> {
        self.telemetry.blockers(scope::check(&self.source, &self.store, &self.config).await?);
        Ok(())
    }

    /// Looks again and again; never ends. A look that fails is tried again: following itself says what is wrong with a server.
    pub async fn run(mut self) -> std::convert::Infallible {
        loop {
            match self.look().await {
                Ok(blockers) => self.telemetry.blockers(blockers),
                Err(error) => tracing::debug!(%error, "cannot look at the tables in scope"),
            }
            tokio::time::sleep(EVERY).await;
        }
    }

    async fn look(&mut self) -> Result<Vec<Blocker>> {
        let mut blockers = scope::check(&self.source, &self.store, &self.config).await?;
        blockers.extend(self.unkeyed.check(&self.source, &self.target, &self.store).await?);
        Ok(blockers)
    }
}
