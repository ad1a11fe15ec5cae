//! Each step as it happens: told to the log and the metrics, and to a task of its own that writes it to the state, so that
//! nobody waits for the journal.

use std::future::Future;
use std::time::Instant;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::Cutover;
use crate::error::{Class, Error, Result};
use crate::state::{StepRecord, Store};
use crate::telemetry::Telemetry;

/// See the module's first lines.
pub(super) struct Journal {
    telemetry: Telemetry,
    /// The cutover's number.
    pub(super) id: i64,
    ordinal: i32,
    writer: mpsc::UnboundedSender<(i32, StepRecord)>,
    /// Ends the step that is under way.
    pub(super) cancel: CancellationToken,
}

impl Journal {
    pub(super) fn begin(cutover: &Cutover<'_>, id: i64) -> (Self, JoinHandle<()>) {
        let (writer, mut steps) = mpsc::unbounded_channel::<(i32, StepRecord)>();
        let store = Store::new(cutover.target.clone(), cutover.config.name.clone());
        let task = tokio::spawn(async move {
            while let Some((ordinal, step)) = steps.recv().await {
                if let Err(error) = store.journal_step(id, ordinal, &step).await {
                    tracing::warn!(%error, step = step.name, "a step could not be written to the journal");
                }
            }
        });
        let (telemetry, cancel) = (cutover.telemetry.clone(), cutover.cancel.clone());
        (Self { telemetry, id, ordinal: 0, writer, cancel }, task)
    }

    /// Does one step, until `deadline` at the latest.
    pub(super) async fn step<T>(
        &mut self,
        name: &str,
        deadline: Instant,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        self.step_told(name, deadline, async { Ok((work.await?, None)) }).await
    }

    /// As [`Journal::step`], with words for the journal about what was done.
    pub(super) async fn step_told<T>(
        &mut self,
        name: &str,
        deadline: Instant,
        work: impl Future<Output = Result<(T, Option<String>)>>,
    ) -> Result<T> {
        self.ordinal += 1;
        let began = Instant::now();
        self.write(name, "running", None, None);
        let outcome = tokio::select! {
            outcome = work => outcome,
            () = self.cancel.cancelled() => {
                Err(Error::new(Class::No, "given_up", "the daemon was told to stop, or following ended")
                    .hint("ask again once `pgtandem status` says that the target follows"))
            }
            () = tokio::time::sleep_until(deadline.into()) => {
                Err(Error::new(Class::No, "cutover_timeout", "cutover.timeout ran out")
                    .hint("raise cutover.timeout, or find out what made this step slow"))
            }
        };
        let seconds = Some(began.elapsed().as_secs_f64());
        match outcome {
            Ok((value, told)) => {
                self.write(name, "done", seconds, told);
                Ok(value)
            }
            Err(error) => {
                let error = error.doing(format!("cutover step {name}"));
                self.write(name, "failed", seconds, Some(error.to_string()));
                Err(error)
            }
        }
    }

    /// A step that is not done, and why.
    pub(super) fn skip(&mut self, name: &str, why: &str) {
        self.ordinal += 1;
        self.write(name, "skipped", None, Some(why.to_owned()));
    }

    fn write(&self, name: &str, state: &str, seconds: Option<f64>, detail: Option<String>) {
        self.telemetry.cutover_step(name, state, seconds);
        let step = StepRecord { name: name.to_owned(), state: state.to_owned(), seconds, detail };
        if self.writer.send((self.ordinal, step)).is_err() {
            tracing::debug!("nobody writes the journal any more");
        }
    }
}
