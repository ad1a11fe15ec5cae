//! Following under control: requests, a cutover when ready, and the point at which `run --until` ends.

use std::cell::Cell;
use std::future::Future;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::{Supervisor, Until};
use crate::config::Engine;
use crate::cutover::{Cutover, refusal};
use crate::error::{Class, Error, Result};
use crate::follow::lookout;
use crate::follow::subscription::health::Health;
use crate::leftover::identity;
use crate::postgres::{QualifiedName, Session};
use crate::state::{Phase, Request, RequestKind, Store};

/// How often it looks for requests and readiness, beside what NOTIFY says.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How often it looks for new tables that nothing identifies.
const LOOK_FOR_NEW_EVERY: Duration = Duration::from_secs(3);

/// Between two attempts of `--cutover-when-ready`; each failed one has kept writers waiting, so the pause grows.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// What steering came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Told to stop.
    Stopped,
    /// What `until` asks for is reached.
    Reached,
    /// The application is on the target.
    Switched,
    /// There are tables to copy.
    CopyAgain,
}

/// See the module's first line.
pub(super) struct Steering<'a> {
    supervisor: &'a Supervisor<'a>,
    epoch: i64,
    /// A cutover is under way: the end of following does not break it off from outside.
    busy: Cell<bool>,
    /// Following ended meanwhile, or the daemon stops: a cutover that is not decided yet gives up.
    alone: CancellationToken,
}

impl<'a> Steering<'a> {
    pub(super) fn new(supervisor: &'a Supervisor<'a>, epoch: i64) -> Self {
        Self { supervisor, epoch, busy: Cell::new(false), alone: supervisor.stop.child_token() }
    }

    /// Runs beside following, and ends both.
    ///
    /// A cutover under way is not broken off when following ends: behind the seal that is no failure any more, and before
    /// it the marker does not arrive and the cutover undoes itself.
    pub(super) async fn beside(
        &self,
        following: impl Future<Output = Result<()>>,
        stop: &CancellationToken,
    ) -> Result<Decision> {
        let mut following = std::pin::pin!(following);
        let mut steering = std::pin::pin!(self.steer());
        let mut ended = None;
        loop {
            tokio::select! {
                end = &mut following, if ended.is_none() => {
                    if !self.busy.get() {
                        return end.map(|()| Decision::Stopped);
                    }
                    self.alone.cancel();
                    ended = Some(end);
                }
                decision = &mut steering => {
                    stop.cancel();
                    let ended = match ended {
                        Some(ended) => ended,
                        None => following.await,
                    };
                    return match decision {
                        Ok(Decision::Switched) => Ok(Decision::Switched),
                        Ok(decision) => ended.map(|()| decision),
                        Err(error) => Err(error),
                    };
                }
            }
        }
    }

    async fn steer(&self) -> Result<Decision> {
        let s = self.supervisor;
        tokio::select! {
            decision = self.take_requests() => decision,
            never = lookout::run(s.config, &s.source, &s.target, &s.store, &s.telemetry, self.health()) => match never {},
        }
    }

    /// The look at the worker, where it is the server's.
    fn health(&self) -> Option<Health> {
        let s = self.supervisor;
        (s.config.follow.engine == Engine::Subscription)
            .then(|| Health::new(s.target.clone(), s.config.name.clone(), s.gate.clone(), s.config.follow.missing_row))
    }

    async fn take_requests(&self) -> Result<Decision> {
        let s = self.supervisor;
        let mut listener: Option<Session> = None;
        let (mut next_attempt, mut pause) = (Instant::now(), FIRST_PAUSE);
        let mut look_for_new = Instant::now();
        loop {
            if s.stop.is_cancelled() || self.alone.is_cancelled() {
                return Ok(Decision::Stopped);
            }
            if s.options.until == Until::Follow && s.telemetry.overview().lag.bytes == Some(0) {
                tracing::info!("the lag reached zero");
                return Ok(Decision::Reached);
            }
            if s.options.cutover_when_ready && Instant::now() >= next_attempt && s.telemetry.ready() {
                match self.cut_over(None, s.config.cutover.timeout).await {
                    Ok(_) => return Ok(Decision::Switched),
                    Err(error) if error.class() == Class::No => {
                        tracing::warn!(
                            code = error.code(),
                            "{error}; following goes on, the next attempt in {pause:?}"
                        );
                        next_attempt = Instant::now() + pause;
                        pause = (pause * 2).min(LONGEST_PAUSE);
                    }
                    Err(error) => return Err(error),
                }
                continue;
            }
            if Instant::now() >= look_for_new {
                look_for_new = Instant::now() + LOOK_FOR_NEW_EVERY;
                if self.copies_what_came_without_identity().await? {
                    return Ok(Decision::CopyAgain);
                }
            }
            if listener.as_ref().is_none_or(|session| session.is_closed()) {
                listener = Some(s.store.listen().await?);
            }
            while let Some(request) = s.store.take_request(self.epoch).await? {
                if let Some(decision) = self.serve(&request).await? {
                    return Ok(decision);
                }
                if self.alone.is_cancelled() {
                    return Ok(Decision::Stopped);
                }
            }
            let Some(session) = &mut listener else { continue };
            tokio::select! {
                () = s.stop.cancelled() => return Ok(Decision::Stopped),
                _ = session.notification() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }

    /// Answers a request; what it decided, if following ends with it.
    async fn serve(&self, request: &Request) -> Result<Option<Decision>> {
        let s = self.supervisor;
        match request.kind {
            RequestKind::Cutover => {
                let argument = |name: &str| request.arguments.get(name);
                let timeout = argument("timeout_ms")
                    .and_then(serde_json::Value::as_u64)
                    .map_or(s.config.cutover.timeout, Duration::from_millis);
                if argument("dry_run").and_then(serde_json::Value::as_bool) == Some(true) {
                    let rehearsed = self.cutover().rehearse(timeout).await;
                    let answer = match &rehearsed {
                        Ok(drain) => serde_json::json!({"drain_seconds": drain.as_secs_f64()}),
                        Err(error) => refusal(error),
                    };
                    s.store.answer(request.id, rehearsed.is_ok(), &answer).await?;
                    return Ok(None);
                }
                match self.cut_over(Some(request.id), timeout).await {
                    Ok(pause) => {
                        let answer = serde_json::json!({"write_pause_seconds": pause.as_secs_f64()});
                        // The switch stands, whether or not the one who asked hears of it.
                        if let Err(error) = s.store.answer(request.id, true, &answer).await {
                            tracing::warn!(%error, "the request could not be answered");
                        }
                        Ok(Some(Decision::Switched))
                    }
                    Err(error) if error.class() == Class::No => {
                        s.store.answer(request.id, false, &refusal(&error)).await?;
                        Ok(None)
                    }
                    Err(error) => Err(error),
                }
            }
            RequestKind::Verify => {
                let error = Error::new(
                    Class::No,
                    "not_available",
                    "verifying while following is not available in this version",
                );
                s.store.answer(request.id, false, &refusal(&error)).await?;
                Ok(None)
            }
            RequestKind::Resync => {
                mark_for_copying(&s.store, self.epoch, request).await?;
                Ok(Some(Decision::CopyAgain))
            }
        }
    }

    /// Whether there is a table now that is to be copied for that.
    async fn copies_what_came_without_identity(&self) -> Result<bool> {
        let s = self.supervisor;
        let came = match identity::came_without(s.config, &s.source, &s.store).await {
            Ok(came) => came,
            // Following itself says what is wrong with a server.
            Err(error) => {
                tracing::debug!(%error, "new tables without a replica identity cannot be looked for");
                return Ok(false);
            }
        };
        if came.is_empty() {
            return Ok(false);
        }
        let names = came.iter().map(QualifiedName::plain).collect::<Vec<_>>().join(", ");
        tracing::info!(tables = names, "came without a replica identity: being given one, and copied");
        s.store.copy_again(self.epoch, &came).await?;
        Ok(true)
    }

    fn cutover(&self) -> Cutover<'_> {
        let s = self.supervisor;
        Cutover {
            config: s.config,
            source: &s.source,
            target: &s.target,
            store: &s.store,
            durable: s.durable.subscribe(),
            marker: &s.marker,
            gate: &s.gate,
            telemetry: &s.telemetry,
            epoch: self.epoch,
            cancel: self.alone.clone(),
        }
    }

    async fn cut_over(&self, request: Option<i64>, timeout: Duration) -> Result<Duration> {
        let s = self.supervisor;
        self.busy.set(true);
        s.store.set_phase(Phase::Cutover).await?;
        let switched = self.cutover().run(request, timeout).await;
        self.busy.set(false);
        match switched {
            Ok(switched) => {
                s.store.set_phase(Phase::Done).await?;
                s.telemetry.phase(Phase::Done);
                Ok(switched.write_pause)
            }
            Err(error) => {
                if error.class() == Class::No {
                    s.store.set_phase(Phase::Follow).await?;
                    s.telemetry.phase(Phase::Follow);
                }
                Err(error)
            }
        }
    }
}

/// Writes down the tables that the request names, to be copied again, and answers it.
pub(super) async fn mark_for_copying(store: &Store, epoch: i64, request: &Request) -> Result<()> {
    let tables = named_tables(&request.arguments);
    let names: Vec<String> = tables.iter().map(QualifiedName::plain).collect();
    tracing::info!(tables = names.join(", "), "asked to copy tables again");
    store.copy_again(epoch, &tables).await?;
    store.answer(request.id, true, &serde_json::json!({"tables": names})).await
}

/// `{"tables": [["schema", "name"], …]}`
fn named_tables(arguments: &serde_json::Value) -> Vec<QualifiedName> {
    let pairs = arguments.get("tables").and_then(serde_json::Value::as_array).map_or(&[][..], Vec::as_slice);
    let text =
        |pair: &serde_json::Value, at: usize| pair.get(at).and_then(serde_json::Value::as_str).map(str::to_owned);
    pairs.iter().filter_map(|pair| Some(QualifiedName { schema: text(pair, 0)?, name: text(pair, 1)? })).collect()
}
