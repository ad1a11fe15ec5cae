//! For those who copy by hand: the cut of `pgtandem snapshot`, and taking their copy over (`copy.method = "none"`).

use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::error::{Class, Doing, Error, Result};
use crate::follow::unkeyed;
use crate::leftover::identity;
use crate::postgres::replication::{Cut, Walsender};
use crate::postgres::{QualifiedName, Server, catalog};
use crate::state::Store;
use crate::telemetry::Telemetry;

use super::{cut, publication};

/// Makes publications and slot, and writes the tables down as pending. The state must be installed, and the move must
/// not have a slot yet: its snapshot could not be had again.
///
/// # Errors
/// Class operator: the move has its slot already. Those of [`publication::ensure`] and [`cut::first`].
pub async fn offer(
    source: &Server,
    store: &Store,
    config: &Config,
    telemetry: &Telemetry,
    cancel: &CancellationToken,
) -> Result<(Walsender, Cut)> {
    if store.find().await?.is_some_and(|found| found.slot_lsn.is_some()) {
        return Err(Error::new(
            Class::Operator,
            "slot_exists",
            format!("the move {} has its slot already, and the snapshot of that moment is gone", store.name()),
        )
        .hint("go on with `pgtandem run`, or begin anew: `pgtandem clean`, then `pgtandem snapshot`"));
    }
    let session = source.connect("snapshot").await?;
    let mut tables = catalog::tables_in_scope(&*session, &config.scope).await?;
    if identity::give(config, source, store, &tables).await? {
        tables = catalog::tables_in_scope(&*session, &config.scope).await?;
    }
    publication::ensure(source, config, &tables, telemetry).await?;
    unkeyed::remember(source, store, &tables).await?;
    let sizes: Vec<(QualifiedName, u64)> = tables.into_iter().map(|table| (table.name, table.bytes)).collect();
    store.plan_tables(&sizes).await?;
    cut::first(source, store, telemetry, cancel).await
}

/// Takes every table that is pending over as copied under the move's first cut. To be called before anything else
/// was copied: tables that came to the move later are not in the copy made by hand.
///
/// # Errors
/// Class operator: there is no cut, because `pgtandem snapshot` was not run.
pub async fn accept(store: &Store) -> Result<()> {
    let found = store.find().await?;
    let Some(lsn) = found.as_ref().and_then(|found| found.slot_lsn) else {
        return Err(Error::new(
            Class::Operator,
            "no_snapshot",
            "copy.method is \"none\", but no snapshot was made to copy from",
        )
        .hint("run `pgtandem snapshot`, copy the rows from the snapshot that it prints, then start again"));
    };
    if found.is_some_and(|found| found.last_cut_lsn != Some(lsn)) {
        // The copy goes on under a newer cut, which only tables of a later day need.
        return Ok(());
    }
    store.adopt_large_objects().await?;
    store.record_all_copied(lsn).await.doing(|| "taking over the copy made by hand")
}
