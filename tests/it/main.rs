//! The tests against real PostgreSQL servers, in one binary: one subject, one file.
//!
//! `scripts/provision.sh` brings the servers; `make test` does both. CONTRIBUTING.md says how to run one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod harness;

mod applying;
mod archive;
mod clean;
mod command_line;
mod connecting;
mod copy;
mod copy_methods;
mod demo;
mod differential;
mod docs;
mod early;
mod followed;
mod harness_itself;
mod leftover;
mod moves;
mod pgoutput;
mod preflight;
mod refusals;
mod regression_database;
mod schema;
mod schema_changes;
mod scope;
mod sets;
mod spool;
mod streamed;
mod subscription;
mod telemetry;
mod unkeyed;
mod wal;
mod wire;
mod workers;
