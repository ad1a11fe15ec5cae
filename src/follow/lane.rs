//! The way of work to the target: one piece is run while the next one is collected.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::executor::{End, Executor, Work};
use crate::error::{Error, Result};

/// See the module's first lines.
pub(super) struct Lane {
    idle: Option<Box<Executor>>,
    running: Option<Running>,
    process_id: i32,
}

type Running = Pin<Box<dyn Future<Output = (Box<Executor>, Result<Option<End>>)> + Send>>;

impl Lane {
    pub(super) fn new(executor: Executor) -> Self {
        let process_id = executor.pipeline.process_id();
        Self { idle: Some(Box::new(executor)), running: None, process_id }
    }

    /// Of its session on the target.
    pub(super) fn process_id(&self) -> i32 {
        self.process_id
    }

    /// Whether work can be started, and the executor be had.
    pub(super) fn is_free(&self) -> bool {
        self.running.is_none()
    }

    /// Starts the work. It goes on only while [`Lane::finished`] is awaited.
    ///
    /// # Errors
    /// Class bug: something runs, or something failed.
    pub(super) fn start(&mut self, work: Work) -> Result<()> {
        let mut executor = self.idle.take().ok_or_else(out_of_turn)?;
        self.running = Some(Box::pin(async move {
            let outcome = executor.run(&work).await;
            (executor, outcome)
        }));
        Ok(())
    }

    /// Waits for what runs; the end that is durable now, if it had one. Never, if nothing runs. Cancellation safe: what runs
    /// goes on with the next call.
    ///
    /// # Errors
    /// Those of the work. The connection then is good for nothing any more.
    pub(super) async fn finished(&mut self) -> Result<Option<End>> {
        poll_fn(|context| self.poll_finished(context)).await
    }

    /// The same for whoever waits for several.
    pub(super) fn poll_finished(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<End>>> {
        let Some(running) = &mut self.running else { return Poll::Pending };
        let (executor, outcome) = ready!(running.as_mut().poll(context));
        self.running = None;
        let end = outcome?;
        self.idle = Some(executor);
        Poll::Ready(Ok(end))
    }

    /// The executor, which must be free.
    ///
    /// # Errors
    /// Class bug: something runs, or something failed.
    pub(super) fn executor(&mut self) -> Result<&mut Executor> {
        self.idle.as_deref_mut().ok_or_else(out_of_turn)
    }
}

fn out_of_turn() -> Error {
    Error::bug("the connection to the target was used out of turn")
}
