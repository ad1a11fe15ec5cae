//! The spool of a move as the phases see it: begun, joined, ended; and never read or filled where it does not fit the slot.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::super::inflow::NEARLY_PLAYED;
use super::super::reading::{self, Opening};
use super::super::slot::Slot;
use super::files::{Owner, Spool, remove_folder, unusable};
use super::playing::Playing;
use super::spooler::Spooler;
use crate::config::{Config, MoveName};
use crate::error::{Class, Error, Result};
use crate::postgres::{Lsn, Server};
use crate::state::{MoveRecord, Store};
use crate::telemetry::Telemetry;

/// The spool of a move, and whoever fills it. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Spooling(Arc<Inner>);

struct Inner {
    name: MoveName,
    /// `None`: there is no spool.
    folder: Option<PathBuf>,
    most: u64,
    telemetry: Telemetry,
    work: tokio::sync::Mutex<Work>,
    failure: Failure,
}

/// What is open and what runs.
#[derive(Default)]
struct Work {
    spool: Option<Arc<Spool>>,
    filling: Option<Filling>,
}

/// The task that fills the spool. Dropped, it is told to stop.
struct Filling {
    stop: CancellationToken,
    ended: CancellationToken,
    _stopped_with_us: DropGuard,
}

/// Why filling ended, if it was not told to.
struct Failure {
    error: Arc<Mutex<Option<Error>>>,
    count: watch::Sender<u64>,
}

/// What is needed to fill the spool.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// Where changes come from.
    pub source: &'a Server,
    /// The state of the move.
    pub store: &'a Store,
    /// The publications to stream.
    pub publications: &'a [String],
}

impl Spooling {
    /// Touches nothing yet.
    #[must_use]
    pub fn new(config: &Config, telemetry: &Telemetry) -> Self {
        Self(Arc::new(Inner {
            name: config.name.clone(),
            folder: config.follow.spool.as_deref().map(|folder| folder_of(folder, &config.name)),
            most: config.follow.spool_max_bytes,
            telemetry: telemetry.clone(),
            work: tokio::sync::Mutex::default(),
            failure: Failure { error: Arc::default(), count: watch::channel(0).0 },
        }))
    }

    /// Has changes received and kept from now on, if there is a slot; does nothing if that is so already. Without a spool only the slot
    /// is looked at: a copy that could not be followed is not worth its hours.
    ///
    /// # Errors
    /// Class operator: the folder is somebody else's or cannot be used; the slot is not ours any more, or was confirmed beyond what the
    /// target and the spool hold. The connections'.
    pub async fn begin(&self, Source { source, store, publications }: Source<'_>) -> Result<()> {
        let mut work = self.0.work.lock().await;
        if work.goes_on().await {
            return Ok(());
        }
        let Some(record) = store.find().await?.filter(|record| record.slot_lsn.is_some()) else { return Ok(()) };
        let slot = Slot::new(source, &self.0.name);
        let progress = store.durable_progress().await?.lsn;
        let spool = self.open(&mut work, &record, true).await?;
        let version = self.check(&slot, spool.as_deref(), progress).await?;
        let Some(spool) = spool else { return Ok(()) };
        let opening = Opening {
            source: source.clone(),
            role: "spool",
            slot,
            record: Some(record),
            publications: publications.to_vec(),
            version,
            from: progress,
            protocol: reading::protocol(version, false),
        };
        self.fill(&mut work, spool, opening)
    }

    /// For whoever is about to read everything from progress, `opening.from`, on: makes sure that it is there, in the spool or on the
    /// source, and has the spool filled further while it is long. Returns the source's `server_version_num`, and the spool if it holds something
    /// of that.
    ///
    /// # Errors
    /// As [`Spooling::begin`].
    pub(in crate::follow) async fn join(
        &self,
        slot: &Slot,
        record: Option<&MoveRecord>,
        publications: &[String],
        progress: Lsn,
    ) -> Result<(i32, Option<Arc<Spool>>)> {
        let mut work = self.0.work.lock().await;
        let goes_on = work.goes_on().await;
        let (version, spool) = self.look(&mut work, slot, record, progress).await?;
        let Some(spool) = spool else { return Ok((version, None)) };
        if goes_on {
            return Ok((version, Some(spool)));
        }
        if !spool.holds_from(progress) {
            // Everything in it is on the target, or the source still has it.
            spool.empty();
            return Ok((version, None));
        }
        if Playing::new(Arc::clone(&spool), progress).left() > NEARLY_PLAYED {
            let opening = Opening {
                source: slot.source().clone(),
                role: "spool",
                slot: slot.clone(),
                record: record.cloned(),
                publications: publications.to_vec(),
                version,
                from: progress,
                protocol: reading::protocol(version, false),
            };
            self.fill(&mut work, Arc::clone(&spool), opening)?;
        }
        Ok((version, Some(spool)))
    }

    /// For whoever only looks: the same, without having it filled and without letting anything go.
    ///
    /// # Errors
    /// As [`Spooling::begin`].
    pub(in crate::follow) async fn held(
        &self,
        slot: &Slot,
        record: Option<&MoveRecord>,
        from: Lsn,
    ) -> Result<(i32, Option<Arc<Spool>>)> {
        let mut work = self.0.work.lock().await;
        let (version, spool) = self.look(&mut work, slot, record, from).await?;
        Ok((version, spool.filter(|spool| spool.holds_from(from))))
    }

    async fn look(
        &self,
        work: &mut Work,
        slot: &Slot,
        record: Option<&MoveRecord>,
        from: Lsn,
    ) -> Result<(i32, Option<Arc<Spool>>)> {
        let spool = match record {
            Some(record) => self.open(work, record, false).await?,
            None => None,
        };
        let version = self.check(slot, spool.as_deref(), from).await?;
        Ok((version, spool))
    }

    /// Whether everything that the spool holds is on the target, and nobody fills it.
    pub async fn is_behind(&self, progress: Lsn) -> bool {
        let work = self.0.work.lock().await;
        !work.is_filling() && work.spool.as_ref().is_none_or(|spool| spool.end() <= progress)
    }

    /// Whether the spool holds what the target does not, or is being filled. If neither, nothing of it is left. Not to be asked while its
    /// end is read.
    ///
    /// # Errors
    /// As [`Spooling::begin`].
    pub async fn is_ahead(&self, store: &Store) -> Result<bool> {
        let mut work = self.0.work.lock().await;
        if work.is_filling() {
            return Ok(true);
        }
        if self.0.folder.is_none() {
            return Ok(false);
        }
        let Some(record) = store.find().await? else { return Ok(false) };
        let Some(spool) = self.open(&mut work, &record, false).await? else { return Ok(false) };
        let is_ahead = spool.end() > store.progress().await?.lsn;
        if !is_ahead {
            spool.empty();
        }
        Ok(is_ahead)
    }

    /// Ends the filling, and waits for that; the connection to the slot is closed then. What is durable stays. Cancellation safe.
    pub async fn end(&self) {
        let mut work = self.0.work.lock().await;
        if let Some(filling) = &work.filling {
            filling.stop.cancel();
            filling.ended.cancelled().await;
        }
        work.filling = None;
    }

    /// The same, and lets the folder go.
    pub async fn close(&self) {
        self.end().await;
        self.0.work.lock().await.spool = None;
    }

    /// Completes when filling ended for a reason that calls for a person.
    pub async fn failed(&self) -> Error {
        let mut count = self.0.failure.count.subscribe();
        loop {
            let error = self.0.failure.error.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(error) = error {
                return error;
            }
            if count.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// The files; those that are open already, if there are.
    async fn open(&self, work: &mut Work, record: &MoveRecord, make: bool) -> Result<Option<Arc<Spool>>> {
        let (Some(folder), Some(owner)) = (&self.0.folder, Owner::of(&self.0.name, record)) else { return Ok(None) };
        if work.spool.is_none() {
            let (folder, telemetry) = (folder.clone(), self.0.telemetry.clone());
            let opened = tokio::task::spawn_blocking(move || Spool::open(&folder, &owner, telemetry, make)).await;
            let opened = opened.map_err(|error| Error::bug(format!("opening the spool: {error}")))??;
            work.spool = opened.map(Arc::new);
        }
        Ok(work.spool.clone())
    }

    /// The slot must not stand beyond what we hold. Returns the source's `server_version_num`.
    async fn check(&self, slot: &Slot, spool: Option<&Spool>, progress: Lsn) -> Result<i32> {
        let held = || spool.filter(|spool| spool.holds_from(progress)).map_or(progress, Spool::end);
        let mut before = held();
        let mut checked = slot.check(before).await;
        // Whoever fills it goes on, and may have confirmed more while we asked.
        while checked.is_err() && held() > before {
            before = held();
            checked = slot.check(before).await;
        }
        let (Some(folder), Err(error)) = (&self.0.folder, &checked) else { return checked };
        if error.code() != "slot_advanced" {
            return checked;
        }
        let folder = folder.display();
        let what = match spool.and_then(Spool::range) {
            None => format!("the target holds everything up to {progress}, and the spool {folder} nothing"),
            Some((start, end)) => {
                format!(
                    "the target holds everything up to {progress}, and the spool {folder} what is from {start} to {end}"
                )
            }
        };
        checked.map_err(|error| {
            error.recoded(Class::Operator, "spool_lost").doing(what).hint(format!(
                "what is between is in a spool that is not there any more: bring {folder} back as it was, or start the daemon where it \
                 is. If it is lost, changes are missing: run `pgtandem clean`, empty the target and begin the move again"
            ))
        })
    }

    /// Fills the spool from its end on, or, where it holds nothing, from `opening.from` on.
    fn fill(&self, work: &mut Work, spool: Arc<Spool>, opening: Opening) -> Result<()> {
        let prepared = || {
            if !spool.holds_from(opening.from) {
                spool.empty();
            }
            spool.sweep()?;
            if spool.last().is_none() {
                spool.begin_segment(opening.from)?;
            }
            Ok(())
        };
        prepared().map_err(|error: std::io::Error| unusable(spool.folder(), &error))?;
        let folder = spool.folder().display().to_string();
        tracing::info!(folder, from = %spool.end(), "keeping changes in the spool");
        *self.0.failure.error.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let stop = CancellationToken::new();
        let ended = CancellationToken::new();
        let (error, count, over) =
            (Arc::clone(&self.0.failure.error), self.0.failure.count.clone(), ended.clone().drop_guard());
        let said = move |outcome: Result<()>| {
            *error.lock().unwrap_or_else(PoisonError::into_inner) = outcome.err();
            count.send_modify(|count| *count += 1);
            // Also where it is not said, because the task fell.
            drop(over);
        };
        let telemetry = self.0.telemetry.clone();
        Spooler { spool, most: self.0.most, opening, telemetry }.start(stop.clone(), said)?;
        work.filling = Some(Filling { stop: stop.clone(), ended, _stopped_with_us: stop.drop_guard() });
        Ok(())
    }
}

impl Work {
    /// Whether it is filled and goes on. One that was told to stop is waited for: whoever told it may have gone since.
    async fn goes_on(&mut self) -> bool {
        if let Some(filling) = &self.filling
            && filling.stop.is_cancelled()
        {
            filling.ended.cancelled().await;
            self.filling = None;
        }
        self.is_filling()
    }

    /// Whether somebody works at it.
    fn is_filling(&self) -> bool {
        self.filling.as_ref().is_some_and(|filling| !filling.ended.is_cancelled())
    }
}

/// The folder of a move below `follow.spool`.
fn folder_of(spool: &Path, name: &MoveName) -> PathBuf {
    spool.join(name.as_str())
}

/// Removes what the move has in its folder, and nothing else. Returns the folder if there was something.
///
/// # Errors
/// Class operator: the folder is another move's, or cannot be changed. Class retry: a process works in it.
pub fn clean(config: &Config) -> Result<Option<PathBuf>> {
    let Some(spool) = &config.follow.spool else { return Ok(None) };
    let folder = folder_of(spool, &config.name);
    Ok(remove_folder(&folder, &config.name)?.then_some(folder))
}
