//! pgtandem moves a live PostgreSQL database to another server with near-zero downtime: it copies the
//! database once, follows the source by logical replication, and switches over in a fraction of a second.
//!
//! # Where things are
//!
//! | room | what it owns |
//! |---|---|
//! | [`cli`] | one file per command; the only place that prints to stdout |
//! | [`config`] | file + environment + flags → one validated `Config`; nothing else reads them |
//! | [`postgres`] | one server: connecting, TLS, the wire, pgoutput, catalog, identifiers, LSN |
//! | [`preflight`] | each check: what it asks, why it matters, what to do about it |
//! | [`schema`] | pg_dump / pg_restore, sections, what is held back until the cutover |
//! | [`copy`] | planning, workers, indexes, resuming |
//! | [`follow`] | stream → transaction → batch → apply |
//! | [`verify`] | comparing both sides at a cut |
//! | [`cutover`] | the steps, the fence, the journal |
//! | [`leftover`] | what the stream does not carry: unlogged tables, large objects, materialized views |
//! | [`state`] | the `pgtandem` schema in the target: the only durable memory |
//! | [`telemetry`] | metrics, status, HTTP, logs, progress bars |
//! | [`supervisor`] | phases, tasks, restarts |
//! | [`demo`] | the whole story on two throw-away servers |
//!
//! # The way of the data
//!
//! ```text
//! source ──COPY──────────► copy ───────────────► target
//!    │                       ▲ same cut            ▲
//!    └─START_REPLICATION─► stream ─► decode ─► transaction ─► batch ─► apply (+ progress, one commit)
//!                            ▲                                            │
//!                            └──────────── confirmed LSN ◄────────────────┘
//! ```
//!
//! One direction, one owner per step, queues bounded in bytes between them.

pub mod cli;
pub mod config;
pub mod copy;
pub mod cutover;
pub mod demo;
pub mod error;
pub mod follow;
pub mod leftover;
pub mod postgres;
pub mod preflight;
pub mod schema;
pub mod state;
pub mod supervisor;
pub mod telemetry;
pub mod verify;

pub use error::{Class, Error, Result};
