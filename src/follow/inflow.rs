//! Everything that committed from a position on, wherever it is: first what the spool holds, then the slot's own stream from
//! exactly there on.
//!
//! Promises that nothing comes twice and nothing is missing where one goes over into the other: both leave out transactions whose
//! commit record begins before the position that they are asked for, and the stream is asked for the position up to which
//! the spool holds everything. While the spool is played it may still be filled; whoever fills it is told to stop when little is
//! left, and the slot is free before the stream is opened.
//!
//! [`Inflow::recall`] is for whoever wants to read changes without following.

use std::sync::Arc;

use tokio::task::JoinHandle;

use super::reading::{self, Opening};
use super::slot::Slot;
use super::spool::{Playing, Source, Spool, Spooling};
use crate::error::{Error, Result};
use crate::postgres::Lsn;
use crate::postgres::replication::{Event, ReplicationStream};

/// With less left to play than this, the spool is not filled any further, in bytes.
pub(super) const NEARLY_PLAYED: u64 = 16 << 20;

/// See the module's first lines. It gives what a [`ReplicationStream`] gives.
pub struct Inflow {
    state: State,
    /// What the spool durably holds, or did until progress had passed it.
    floor: Lsn,
    spool: Option<Arc<Spool>>,
}

enum State {
    Spool(Box<Replay>),
    Live(ReplicationStream),
}

/// The spool, on its way to the stream. Each wait is a task, so that whoever waits may look away and come back.
struct Replay {
    playing: Playing,
    spooling: Spooling,
    opening: Opening,
    stage: Stage,
}

enum Stage {
    /// It may be filled still.
    Playing,
    /// Whoever fills it was told to stop.
    Ending(JoinHandle<()>),
    /// It grows no more.
    Ended,
    /// All of it was played.
    Opening(JoinHandle<Result<ReplicationStream>>),
}

impl Inflow {
    /// Opens the stream of `opening`; what `spool` holds of it comes from there. The caller has made sure that the spool holds everything
    /// from `opening.from` to its end ([`Spooling::join`]).
    ///
    /// # Errors
    /// Those of opening the stream, where there is no spool.
    pub(super) async fn open(opening: Opening, spool: Option<(Arc<Spool>, Spooling)>) -> Result<Self> {
        let Some((spool, spooling)) = spool else {
            return Ok(Self { state: State::Live(opening.open().await?), floor: Lsn::ZERO, spool: None });
        };
        let playing = Playing::new(Arc::clone(&spool), opening.from);
        let replay = Replay { playing, spooling, opening, stage: Stage::Playing };
        Ok(Self { state: State::Spool(Box::new(replay)), floor: Lsn::ZERO, spool: Some(spool) })
    }

    /// Everything that committed from `from` on, for whoever only looks at it: whole transactions, as protocol version 1 sends them. Nothing
    /// is confirmed or let go of by that. While it is read nobody may follow or fill the spool ([`Spooling::end`]): the slot serves one.
    ///
    /// To read up to another position: take what [`Inflow::buffered`] has, else wait for [`Inflow::gulp`], until a Begin whose commit
    /// record begins at or beyond that position comes, or a keepalive beyond it between two transactions. Call [`Inflow::confirm`] with a
    /// `durable` of zero every second or so, which keeps the source company. In the end, [`Inflow::close`].
    ///
    /// # Errors
    /// Class operator: the slot, together with the spool, does not reach back as far as `from`. Those of opening the stream.
    pub async fn recall(spooling: &Spooling, source: Source<'_>, from: Lsn) -> Result<Self> {
        let Source { source, store, publications } = source;
        let slot = Slot::new(source, store.name());
        let record = store.find().await?;
        let (version, spool) = spooling.held(&slot, record.as_ref(), from).await?;
        let opening = Opening {
            source: source.clone(),
            role: "stream",
            slot,
            record,
            publications: publications.to_vec(),
            version,
            from,
            protocol: reading::protocol(version, false),
        };
        Self::open(opening, spool.map(|spool| (spool, spooling.clone()))).await
    }

    /// Whether what comes is the slot's own stream.
    pub(super) fn is_live(&self) -> bool {
        matches!(self.state, State::Live(_))
    }

    /// The next event, if it was read already.
    ///
    /// # Errors
    /// As [`ReplicationStream::buffered`]; class operator: a file of the spool is damaged.
    pub fn buffered(&mut self) -> Result<Option<Event>> {
        match &mut self.state {
            State::Spool(replay) => replay.playing.buffered(),
            State::Live(stream) => stream.buffered(),
        }
    }

    /// Reads on, about so many bytes at most, and waits if there is nothing. To be called when [`Inflow::buffered`] has nothing.
    /// Cancellation safe.
    ///
    /// # Errors
    /// Those of the connection, of the files, and of opening the stream behind them.
    pub async fn gulp(&mut self, most: usize) -> Result<usize> {
        loop {
            let replay = match &mut self.state {
                State::Live(stream) => return stream.gulp(most).await,
                State::Spool(replay) => replay,
            };
            let read = replay.playing.read(most)?;
            if matches!(replay.stage, Stage::Playing) && replay.playing.left() <= NEARLY_PLAYED {
                let spooling = replay.spooling.clone();
                replay.stage = Stage::Ending(tokio::spawn(async move { spooling.end().await }));
            }
            if read > 0 {
                return Ok(read);
            }
            match &mut replay.stage {
                Stage::Playing => return Err(Error::bug("a spool without an end ended")),
                Stage::Ending(task) => {
                    finished(task.await.map(Ok))?;
                    replay.stage = Stage::Ended;
                }
                Stage::Ended => {
                    let end = replay.playing.spool().end();
                    self.floor = end;
                    let opening = Opening { from: replay.opening.from.max(end), ..replay.opening.clone() };
                    tracing::info!(lsn = %opening.from, "the spool was read to its end; going on with the source's stream");
                    replay.stage = Stage::Opening(tokio::spawn(async move {
                        opening.slot.released().await?;
                        opening.slot.check(opening.from).await?;
                        opening.open().await
                    }));
                }
                Stage::Opening(task) => self.state = State::Live(finished(task.await)?),
            }
        }
    }

    /// Everything before `durable` is durable in the target. The source is told that it may forget everything before that, or before the end
    /// of what the spool holds, and segments that hold nothing else go. A `durable` of zero says nothing, and only keeps
    /// the source company. Returns what the source was told.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn confirm(&mut self, received: Lsn, durable: Lsn, ask_for_reply: bool) -> Result<Option<Lsn>> {
        if let Some(spool) = self.spool.as_ref().filter(|_| durable > Lsn::ZERO) {
            // Whoever fills it writes to the last segment.
            spool.let_go(durable, self.is_live());
        }
        let State::Live(stream) = &mut self.state else { return Ok(None) };
        let confirmed = if durable == Lsn::ZERO { durable } else { durable.max(self.floor) };
        stream.confirm(received.max(confirmed), confirmed, ask_for_reply).await?;
        Ok(Some(confirmed))
    }

    /// Ends it, so that the slot is free at once. Whoever fills the spool goes on, unless it was told to stop already: that is waited for,
    /// or it would stop the one who fills it next.
    pub async fn close(self) {
        match self.state {
            State::Live(stream) => stream.close().await,
            State::Spool(replay) => match replay.stage {
                Stage::Ending(task) => drop(task.await),
                Stage::Opening(task) => {
                    if let Ok(Ok(stream)) = task.await {
                        stream.close().await;
                    }
                }
                Stage::Playing | Stage::Ended => {}
            },
        }
    }
}

fn finished<T>(outcome: Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    outcome.map_err(|error| Error::bug(format!("going over from the spool to the stream: {error}")))?
}
