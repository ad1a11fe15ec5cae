//! Undoing, and what a start does about a cutover that an earlier daemon left in the middle.

use std::time::{Duration, Instant};

use super::{fence, hook};
use crate::config::{Config, Fence as FenceKind};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::Server;
use crate::state::{CutoverRecord, CutoverState, Store};

/// How long undoing, or writing down the end, is tried before the error is handed up, and how long each time.
const UNDO_PATIENCE: Duration = Duration::from_secs(30);
const ATTEMPT: Duration = Duration::from_secs(10);

/// Tries again what fails, for [`UNDO_PATIENCE`]: a connection may be lost, a server may restart.
pub(super) async fn persistently(what: &str, attempt: impl AsyncFn() -> Result<()>) -> Result<()> {
    let began = Instant::now();
    loop {
        let error = match tokio::time::timeout(ATTEMPT, attempt()).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => {
                Error::new(Class::Retry, "cutover_stuck", format!("the cutover could not be {what} within {ATTEMPT:?}"))
            }
        };
        if began.elapsed() > UNDO_PATIENCE || error.code() == "leadership_lost" {
            return Err(error);
        }
        tracing::error!(%error, "the cutover could not be {what} yet; trying again");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Writes on the source come back, and what was enabled on the target goes off again. Can be repeated.
pub(super) async fn undo(
    config: &Config,
    source: &Server,
    store: &Store,
    id: i64,
    epoch: i64,
    cause: &Error,
) -> Result<()> {
    if config.cutover.fence == FenceKind::Lock {
        // The deed beside the word: an open fence means "undone" whatever the journal says, and the source must not wait
        // for the target to come back. Nor must a source that does not come back leave the word standing, for the next
        // start would find a seal and finish what was given up here.
        let (lifted, reconsidered) =
            tokio::join!(fence::lift(source, config.name.as_str(), id), store.reconsider_cutover(id, epoch));
        lifted?;
        if let Err(error) = reconsidered {
            tracing::debug!(%error, "the decision could not be taken back yet");
        }
    }
    store.abort_cutover(id, epoch, &error_json(cause)).await
}

/// What a start found of an earlier cutover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovered {
    /// There was nothing unfinished.
    Nothing,
    /// It was undone; following goes on.
    Undone,
    /// It was finished: the application is on the target.
    Finished,
}

/// Undoes or finishes what an earlier daemon left in the middle, and answers who asked it for something. See the module's
/// first lines.
///
/// # Errors
/// The connections'; class no if the hook failed, after which the cutover is undone.
pub async fn recover(
    config: &Config,
    source: &Server,
    target: &Server,
    store: &Store,
    epoch: i64,
) -> Result<Recovered> {
    let died = Error::new(Class::No, "daemon_ended", "the daemon ended before it answered");
    let recovered = match store.last_cutover().await? {
        Some(last) => recover_from(config, source, target, store, epoch, &last).await?,
        None => Recovered::Nothing,
    };
    if recovered != Recovered::Finished {
        store.answer_running(false, &refusal(&died)).await?;
    }
    Ok(recovered)
}

async fn recover_from(
    config: &Config,
    source: &Server,
    target: &Server,
    store: &Store,
    epoch: i64,
    last: &CutoverRecord,
) -> Result<Recovered> {
    let died = Error::new(Class::No, "daemon_ended", "the daemon ended in the middle of the cutover");
    let undone_for = async |error: &Error| {
        undo(config, source, store, last.id, epoch, error).await.doing(|| "undoing the cutover that was under way")?;
        store.fail_running_steps(last.id, "the daemon ended").await?;
        store.answer_running(false, &refusal(error)).await?;
        tracing::warn!("a cutover was under way when the daemon ended; it was undone, writes on the source are on");
        Ok(Recovered::Undone)
    };
    match last.state {
        CutoverState::Aborted => return Ok(Recovered::Nothing),
        CutoverState::Done => {}
        CutoverState::Preparing => return undone_for(&died).await,
        CutoverState::Switching => {
            let stands =
                config.cutover.fence != FenceKind::Lock || fence::is_sealed(source, config.name.as_str()).await?;
            if !stands {
                return undone_for(&died).await;
            }
            tracing::warn!("a cutover was past its decision when the daemon ended; finishing it");
            // A hook that said yes is believed.
            if !last.steps.iter().any(|step| step.name == "switch" && step.state == "done") {
                let addresses = hook::Addresses::find(source, target).await;
                let deadline = Instant::now() + config.cutover.timeout;
                if let Err(error) = hook::run(config, &addresses, deadline).await {
                    return undone_for(&error).await;
                }
            }
        }
    }
    // Also for a cutover that was done already: its daemon may have ended before it answered.
    let pause = store.finish_cutover(last.id).await?;
    store.answer_running(true, &serde_json::json!({"write_pause_seconds": pause})).await?;
    Ok(Recovered::Finished)
}

/// The answer to a request that came to nothing.
#[must_use]
pub fn refusal(error: &Error) -> serde_json::Value {
    serde_json::json!({"error": error_json(error)})
}

/// An error as it stands in the state and in answers.
#[must_use]
pub fn error_json(error: &Error) -> serde_json::Value {
    serde_json::json!({
        "code": error.code(),
        "message": error.to_string(),
        "hint": error.hint_text(),
    })
}
