//! The read-only HTTP side: metrics, probes, status and a page for people.
//!
//! Owns one listener and the routes. Promises that nothing that comes in over it changes the move: there are only
//! GET routes, and other methods are answered with 405. Must never show what [`super::status`] does not.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::{Stream, stream};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::Telemetry;
use super::status::REFRESH;
use crate::error::{Class, Error, Result};

/// Everything in one file: no request leaves the daemon's own address.
const PAGE: &str = include_str!("page.html");
/// The page may run its own script and style and talk to its own server, nothing else.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'";
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Pages open at the same time; each costs one status a second.
const WATCHERS: usize = 64;
/// How long a request in progress may hold up the end of the daemon.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// How long the end of the daemon waits for a last scrape: above the usual interval of 10 s.
const LAST_SCRAPE: Duration = Duration::from_secs(15);
/// A scrape within this says that another one will come.
const SCRAPED_LATELY: Duration = Duration::from_secs(60);

/// A bound listener that does not answer yet.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
}

#[derive(Clone)]
struct App {
    telemetry: Telemetry,
    cancel: CancellationToken,
    watchers: Arc<Semaphore>,
}

impl Listener {
    /// Binds `http.listen`. A daemon whose dashboards and probes would see nothing does not start.
    ///
    /// # Errors
    /// Class usage: the address is taken, not of this machine, or not ours to bind.
    pub async fn bind(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).await.map_err(|e| refused(address, e))?;
        let address = listener.local_addr().map_err(|e| refused(address, e))?;
        Ok(Self { listener, address })
    }

    /// Where it listens; differs from what was asked for if that was port 0.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until cancelled; event streams end with it.
    ///
    /// # Errors
    /// The listener broke.
    pub async fn serve(self, telemetry: Telemetry, cancel: CancellationToken) -> Result<()> {
        tracing::info!(address = %self.address, "status and metrics at http://{}/", self.address);
        let app = App { telemetry, cancel: cancel.clone(), watchers: Arc::new(Semaphore::new(WATCHERS)) };
        let serving = axum::serve(self.listener, routes(app)).with_graceful_shutdown(cancel.clone().cancelled_owned());
        let deadline = async {
            cancel.cancelled().await;
            tokio::time::sleep(LAST_ANSWERS).await;
        };
        tokio::select! {
            ended = serving.into_future() => ended.map_err(|e| Error::from(e).doing("answering HTTP requests")),
            () = deadline => Ok(()),
        }
    }
}

fn refused(address: SocketAddr, error: std::io::Error) -> Error {
    Error::new(Class::Usage, "http_listen", format!("cannot listen on {address}: {error}"))
        .doing("starting the HTTP side")
        .hint("set http.listen (PGTANDEM_HTTP_LISTEN) to a free address of this machine, or to \"\" to turn it off")
        .because(error)
}

/// Keeps the end of a move in sight: returns once `/metrics` was asked again, [`LAST_SCRAPE`] have passed, or `stop` is
/// cancelled. Where nobody scrapes, nobody is waited for.
pub async fn linger(telemetry: &Telemetry, stop: &CancellationToken) {
    let mut scraped = telemetry.0.scraped.subscribe();
    let waits = scraped.borrow_and_update().is_some_and(|last| last.elapsed() < SCRAPED_LATELY);
    if waits && !stop.is_cancelled() {
        tracing::info!("waiting until the last figures were scraped, {} s at most", LAST_SCRAPE.as_secs());
        // Whichever comes first, the daemon ends.
        tokio::select! {
            () = stop.cancelled() => {}
            _ = scraped.changed() => {}
            () = tokio::time::sleep(LAST_SCRAPE) => {}
        }
    }
}

fn routes(app: App) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { text(StatusCode::OK, "ok\n".to_owned()) }))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .route("/events", get(events))
        .with_state(app)
}

async fn page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, PAGE_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, PAGE).into_response()
}

async fn metrics(State(app): State<App>) -> Response {
    let printed = app.telemetry.metrics_text();
    app.telemetry.0.scraped.send_replace(Some(Instant::now()));
    match printed {
        Ok(body) => typed(StatusCode::OK, METRICS_TYPE, body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

async fn readyz(State(app): State<App>) -> Response {
    match app.telemetry.readiness() {
        Ok(()) => text(StatusCode::OK, "ready\n".to_owned()),
        Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}

async fn status(State(app): State<App>) -> Response {
    match app.telemetry.status().to_json() {
        Ok(body) => typed(StatusCode::OK, "application/json", body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

async fn events(State(app): State<App>) -> Response {
    match Arc::clone(&app.watchers).try_acquire_owned() {
        Ok(seat) => Sse::new(watch(app, seat)).into_response(),
        Err(_) => text(StatusCode::SERVICE_UNAVAILABLE, "too many pages are open\n".to_owned()),
    }
}

/// One status a second until the daemon ends; the seat is free again once the reader went away.
fn watch(app: App, seat: OwnedSemaphorePermit) -> impl Stream<Item = Result<Event, Infallible>> {
    let mut ticks = interval(REFRESH);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    stream::unfold((app, ticks, seat), |(app, mut ticks, seat)| async move {
        let event = next_event(&app, &mut ticks).await?;
        Some((Ok(event), (app, ticks, seat)))
    })
}

async fn next_event(app: &App, ticks: &mut Interval) -> Option<Event> {
    app.cancel.run_until_cancelled(ticks.tick()).await?;
    // A status that cannot be printed is a defect that `/status` shows; here it ends the stream.
    app.telemetry.status().to_json().ok().map(|json| Event::default().data(json))
}

fn text(code: StatusCode, body: String) -> Response {
    typed(code, "text/plain; charset=utf-8", body)
}

fn typed(code: StatusCode, kind: &'static str, body: String) -> Response {
    let headers: [(HeaderName, &str); 2] = [(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-store")];
    (code, headers, body).into_response()
}
