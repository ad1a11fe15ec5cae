//! The server's own subscription, with its defaults. Its worker runs in the target server.

use anyhow::{Context, Result};
use tokio_postgres::Client;

use crate::servers::Server;
use crate::stage::{DATABASE, PUBLICATION, Stage};

/// A subscription to the slot of a drain.
pub(crate) struct Subscription<'a> {
    target: &'a Server,
    client: Client,
}

impl<'a> Subscription<'a> {
    /// Makes it, disabled.
    pub(crate) async fn create(stage: &Stage<'a>, slot: &str) -> Result<Self> {
        let target = &stage.servers.target;
        let client = target.connect(DATABASE).await?;
        let source = stage.servers.source.conninfo_with_password(DATABASE);
        let create = format!(
            "CREATE SUBSCRIPTION bench CONNECTION '{source}' PUBLICATION {PUBLICATION}
             WITH (create_slot = false, slot_name = '{slot}', copy_data = false, enabled = false)"
        );
        client.batch_execute(&create).await.context("creating the subscription")?;
        Ok(Self { target, client })
    }

    pub(crate) async fn enable(self) -> Result<Self> {
        self.client.batch_execute("ALTER SUBSCRIPTION bench ENABLE").await.context("enabling the subscription")?;
        Ok(self)
    }

    /// The worker's complaints are in the server's log.
    pub(crate) fn last_words(&self) -> String {
        self.target.last_words()
    }

    pub(crate) async fn drop(self) -> Result<()> {
        for statement in [
            "ALTER SUBSCRIPTION bench DISABLE",
            "ALTER SUBSCRIPTION bench SET (slot_name = NONE)",
            "DROP SUBSCRIPTION bench",
        ] {
            self.client.batch_execute(statement).await.context(statement)?;
        }
        Ok(())
    }
}
