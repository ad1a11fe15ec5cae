//! Whether a database can be moved: everything that stands in the way, said before the move begins.
//!
//! Owns every question asked of the two servers beforehand. Each check asks one thing and answers with [`Finding`]s that
//! say what is the case, why it matters and the exact statement that mends it; all of them are asked, whatever
//! the first one found, and one that cannot be answered is a finding too. Must never change anything that
//! lasts on either side: what can only be known by doing is done inside a transaction that is rolled back, and
//! no lock is waited for.
//!
//! `docs/preflight.md` has a row for every kind of finding.

mod connection;
mod database;
mod encoding;
mod extensions;
mod finding;
mod grants;
mod identity;
mod large_objects;
mod look;
mod owned;
mod pooled;
mod privileges;
mod programs;
mod replication;
mod report;
mod restorable;
mod roles;
mod schema_objects;
mod schemas;
mod settings;
mod subscriptions;
mod tables;
mod target;
mod wal;
mod worker;

use std::collections::HashMap;

use tokio_postgres::Client;

pub use finding::{Finding, Kind, Severity};
pub use identity::{identity, same_server};
pub use report::Report;
pub use subscriptions::subscriptions_enabled;

use crate::config::Config;
use crate::error::{Class, Error, Result};
use crate::postgres::{Server, Session, Side, catalog};
use crate::state::{Phase, Store};
use look::{Look, Place};

/// Every kind of finding there is, by group.
pub fn kinds() -> impl Iterator<Item = &'static Kind> {
    [
        connection::KINDS,
        pooled::KINDS,
        identity::KINDS,
        replication::KINDS,
        privileges::KINDS,
        tables::KINDS,
        schema_objects::KINDS,
        large_objects::KINDS,
        subscriptions::KINDS,
        extensions::KINDS,
        restorable::KINDS,
        encoding::KINDS,
        settings::KINDS,
        wal::KINDS,
        worker::KINDS,
        target::KINDS,
        roles::KINDS,
        schemas::KINDS,
        database::KINDS,
        programs::KINDS,
    ]
    .into_iter()
    .flatten()
}

/// Asks both servers everything. Changes nothing on either side.
pub async fn run(config: &Config, source: &Server, target: &Server) -> Report {
    let mut found = Vec::new();
    found.extend(addresses(source));
    found.extend(addresses(target));
    let (ours, theirs) = tokio::join!(sessions(source), sessions(target));
    let (source_sessions, target_sessions) = match (ours, theirs) {
        (Ok(source), Ok(target)) => (source, target),
        (ours, theirs) => {
            found.extend(ours.err().map(|error| connection::failed(Side::Source, &error)));
            found.extend(theirs.err().map(|error| connection::failed(Side::Target, &error)));
            return Report::new(found);
        }
    };
    for (side, [first, second]) in [(Side::Source, &source_sessions), (Side::Target, &target_sessions)] {
        let outcome = pooled::by_behaviour(side, first, second).await.map(|found| found.into_iter().collect());
        answer(&mut found, side, "whether a pooler stands between", outcome);
    }
    let begun = match Store::new(target.clone(), config.name.clone()).find().await {
        Ok(record) => record.is_some_and(|record| record.phase != Phase::Preflight || record.slot_lsn.is_some()),
        Err(error) => {
            found.push(connection::cannot_look(Side::Target, "whether this move has begun", &error));
            false
        }
    };
    let role = replication::connection(source).await;
    answer(&mut found, Side::Source, "whether a replication connection is let in", role);
    found.extend(examine(config, [source, target], &source_sessions[0], &target_sessions[0], begun).await);
    Report::new(found)
}

/// For those who are about to begin a move: logs every finding, and refuses if one of them blocks.
///
/// # Errors
/// Class no: there are blocking findings. Class wait: a server cannot be reached.
pub async fn require(config: &Config, source: &Server, target: &Server) -> Result<()> {
    let report = run(config, source, target).await;
    for finding in &report.findings {
        tracing::info!(code = finding.code, severity = finding.severity.as_str(), "preflight: {}", finding.what);
    }
    let blocking = report.blocking().count();
    if blocking == 0 {
        return Ok(());
    }
    let (class, code) =
        if report.unreachable() { (Class::Wait, "unreachable") } else { (Class::No, "preflight_blocked") };
    let message = format!("{blocking} findings block the move\n{}", report.to_text(false));
    Err(Error::new(class, code, message).hint("mend them and start again; `pgtandem check` shows them any time"))
}

/// Two sessions: one to ask with, one beside it.
async fn sessions(server: &Server) -> Result<[Session; 2]> {
    Ok([server.connect("check").await?, server.connect("check").await?])
}

/// What the addresses alone tell.
fn addresses(server: &Server) -> Vec<Finding> {
    let hosts = server.conninfo().hosts().iter().filter(|host| !host.is_unix());
    hosts.filter_map(|host| pooled::by_address(server.side(), &host.name(), host.port)).collect()
}

/// Everything that is asked over one session on each side.
async fn examine(
    config: &Config,
    servers: [&Server; 2],
    source: &Client,
    target: &Client,
    begun: bool,
) -> Vec<Finding> {
    let (source, target) = tokio::join!(Place::new(Side::Source, source), Place::new(Side::Target, target));
    let (source, target) = match (source, target) {
        (Ok(source), Ok(target)) => (source, target),
        (source, target) => {
            let mut found = Vec::new();
            found.extend(source.err().map(|error| connection::failed(Side::Source, &error)));
            found.extend(target.err().map(|error| connection::failed(Side::Target, &error)));
            return found;
        }
    };
    let (tables, unknown) = match catalog::members(source.client, &config.scope).await {
        Ok(tables) => (tables, None),
        Err(error) => (HashMap::new(), Some(connection::cannot_look(Side::Source, "which tables move", &error))),
    };
    let look = Look { config, source, target, begun, tables };
    let mut found = connection::versions(&look);
    found.extend(unknown);
    found.extend(connection::standby(&look));
    ask_source(&look, &mut found).await;
    ask_target(&look, &mut found).await;
    ask_both(&look, &mut found).await;
    let reach = worker::reach(&look, servers[0], servers[1]).await;
    answer(&mut found, Side::Target, "whether it reaches the source", reach);
    for place in look.places() {
        // What came after its end was never asked.
        found.extend(place.client.is_closed().then(|| connection::lost(place.side)));
    }
    found
}

async fn ask_source(look: &Look<'_>, found: &mut Vec<Finding>) {
    let (source, side) = (&look.source, Side::Source);
    answer(found, side, "wal_level", replication::wal_level(source).await);
    answer(found, side, "the replication slots", replication::slots(look).await);
    answer(found, side, "the walsenders", replication::walsenders(source).await);
    answer(found, side, "whether the role may replicate", replication::right(source).await);
    answer(found, side, "the publications of the move", replication::publications(look).await);
    answer(found, side, "transactions in progress", replication::in_progress(source).await);
    answer(found, side, "whether a publication can be made", privileges::publishing(look).await);
    answer(found, side, "who owns the tables", privileges::ownership(look).await);
    answer(found, side, "which schemas can be entered", privileges::schemas(look).await);
    answer(found, side, "what can be read", privileges::reading(look).await);
    answer(found, side, "what can be locked", privileges::locking(look).await);
    answer(found, side, "row-level security", privileges::row_level_security(look).await);
    answer(found, side, "the replica identity of the tables", tables::replica_identity(look).await);
    answer(found, side, "what a worker compares rows by", worker::identity_without_equality(look).await);
    answer(found, side, "the types of the columns", tables::identifiers_as_data(look).await);
    answer(found, side, "unlogged, foreign and inheriting tables", schema_objects::special_relations(look).await);
    answer(found, side, "its provider's schemas", schema_objects::providers_schemas(look).await);
    answer(found, side, "the large objects", large_objects::on_source(look).await);
    answer(found, side, "event triggers, publications and subscriptions", schema_objects::database_objects(look).await);
    answer(found, side, "whether a subscription feeds its tables", subscriptions::subscriber(look).await);
    answer(found, side, "wal_sender_timeout", settings::walsender_timeout(source).await);
    answer(found, side, "idle_replication_slot_timeout", settings::idle_slot_timeout(source).await);
    answer(found, side, "logical_decoding_work_mem", settings::decoding_memory(source).await);
    answer(found, side, "max_slot_wal_keep_size", wal::limit(source).await);
    answer(found, side, "the WAL on disk", wal::on_disk(source).await);
}

async fn ask_target(look: &Look<'_>, found: &mut Vec<Finding>) {
    let (target, side) = (&look.target, Side::Target);
    answer(found, side, "whether it can be written to", connection::read_only(target).await);
    answer(found, side, "whether a schema can be made", privileges::creating(look).await);
    answer(found, side, "forced row-level security", privileges::target_row_level_security(look).await);
    answer(found, side, "session_replication_role", privileges::replication_role(target).await);
    answer(found, side, "what it holds already", target::empty(look).await);
    answer(found, side, "large objects", large_objects::on_target(look).await);
    answer(found, side, "its event triggers", schema_objects::target_event_triggers(look).await);
    answer(found, side, "whether the subscription's name is free", worker::stranger(look).await);
    answer(found, side, "whether it can have the subscription", worker::rights(look).await);
    answer(found, side, "its worker processes", settings::worker_processes(look).await);
}

async fn ask_both(look: &Look<'_>, found: &mut Vec<Finding>) {
    let side = Side::Target;
    answer(found, side, "whether it is the source", identity::same(look).await);
    answer(found, side, "its roles", roles::roles(look).await);
    answer(found, side, "schemas of both sides", schemas::existing(look).await);
    answer(found, side, "grants on the catalog", roles::catalog_grants(look).await);
    answer(found, side, "default privileges", roles::default_privileges(look).await);
    answer(found, side, "whether event triggers can be made", schema_objects::event_triggers(look).await);
    answer(found, side, "its own settings and grants", database::properties(look).await);
    answer(found, side, "its tablespaces", target::tablespaces(look).await);
    answer(found, side, "its extensions", extensions::extensions(look).await);
    answer(found, side, "the libraries of functions", restorable::libraries(look).await);
    answer(found, Side::Source, "generated columns", restorable::generated_in_children(look).await);
    answer(found, side, "its encoding and locale", encoding::database_locale(look).await);
    answer(found, side, "its collations", encoding::column_collations(look).await);
    answer(found, Side::Source, "the client programs", programs::find(look).await);
    answer(found, side, "its disk", target::disk(look).await);
    answer(found, side, "the size of the lock tables", settings::lock_table(look).await);
    for place in look.places() {
        answer(found, place.side, "free connections", settings::connections(look, place).await);
        answer(found, place.side, "synchronous_standby_names", settings::synchronous_standbys(place).await);
        answer(found, place.side, "settings of the role", settings::overridden(place).await);
    }
}

/// Takes what a check found; a check that failed is a finding.
fn answer(found: &mut Vec<Finding>, side: Side, question: &str, outcome: Result<Vec<Finding>>) {
    match outcome {
        Ok(more) => found.extend(more),
        Err(error) => found.push(connection::cannot_look(side, question, &error)),
    }
}

#[cfg(test)]
mod tests;
