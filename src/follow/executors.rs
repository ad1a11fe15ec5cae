//! Opens the connections that apply, and ends them where their own end would not do.

use std::sync::{Arc, Mutex, PoisonError};

use super::STOP_GRACE;
use super::executor::Executor;
use super::pipeline::Pipeline;
use crate::config::{MissingRow, MoveName};
use crate::error::{Doing, Error, Result};
use crate::postgres::wire::{Mode, Wire};
use crate::postgres::{Server, leftovers};
use crate::telemetry::Telemetry;

/// `$1` process ids, `$2` application name.
const END_SESSION: &str = "
    SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
    WHERE pid = ANY ($1) AND application_name = $2 AND datname = pg_catalog.current_database()";

/// Those of one run. Clones share what was opened.
#[derive(Clone)]
pub(super) struct Executors {
    pub target: Server,
    pub move_name: MoveName,
    pub epoch: i64,
    pub missing_row: MissingRow,
    /// Whether a session may set `session_replication_role = replica`.
    pub replica_role: bool,
    pub telemetry: Telemetry,
    /// The process ids of what was opened.
    pub backends: Arc<Mutex<Vec<i32>>>,
}

impl Executors {
    /// # Errors
    /// Those of the connection, and of its settings.
    pub(super) async fn open(&self, worker: u16) -> Result<Executor> {
        let wire = self.connection().await?;
        self.backends.lock().unwrap_or_else(PoisonError::into_inner).push(wire.process_id());
        Ok(Executor {
            pipeline: Pipeline::new(wire),
            move_name: self.move_name.clone(),
            epoch: self.epoch,
            missing_row: self.missing_row,
            telemetry: self.telemetry.clone(),
            worker,
            open: None,
        })
    }

    async fn connection(&self) -> Result<Wire> {
        let mut wire = Wire::connect(&self.target, "apply", Mode::Sql, &[]).await?;
        // Nobody reads while rows are sent: a warning for each of them would fill the way back until nothing moves any more.
        wire.query("SET client_min_messages = error").await.doing(|| "silencing warnings for apply")?;
        if self.replica_role {
            wire.query("SET session_replication_role = replica").await.doing(|| "switching off triggers for apply")?;
        }
        Ok(wire)
    }

    /// Ends the applying sessions of earlier runs. The move is ours, so nobody else has one; but a server that waits for a
    /// lock does not notice that its client is gone, and each of them would keep the locks of its batch. Returns once they are gone.
    pub(super) async fn end_earlier(&self) -> Result<()> {
        let session = self.target.connect("catalog").await?;
        leftovers::end(&session, &self.target.application_name("apply")).await
    }

    /// Ends all that were opened, see [`Executors::end`].
    pub(super) async fn end_all(&self) {
        let backends = self.backends.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.end(&backends).await;
    }

    /// Ends sessions. A server that waits for a lock does not notice that its client is gone, and would keep the locks of
    /// the batch until then. If it cannot be reached, the end of the connection has to do.
    pub(super) async fn end(&self, backends: &[i32]) {
        // Something between may have made up the process id: it must be a session of that name.
        let application_name = self.target.application_name("apply");
        let ended = async {
            let session = self.target.connect("stop").await?;
            session.query(END_SESSION, &[&backends, &application_name]).await.map(drop).map_err(Error::from)
        };
        match tokio::time::timeout(STOP_GRACE, ended).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the session of the batch could not be ended"),
            Err(_) => tracing::debug!("the session of the batch could not be ended in time"),
        }
    }
}
