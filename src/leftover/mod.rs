//! What the stream does not carry: rows of unlogged tables, large objects, materialized views, and, where the configuration
//! says so, what updates and deletes did to tables without a replica identity.
//!
//! Owns how each of them gets to the target. Promises that behind the fence the target holds exactly what the source does
//! ([`Rest::carry`] proves it or fails), that most of it is brought before ([`Ahead::carry`]), so that writers wait for the
//! difference only, and that a daemon that lost the move, or a cutover that was given up, commits nothing any more. Must never
//! remove a large object of the target that this move did not make.
//!
//! Sequences are such a thing too; they are read and set in an instant, by the cutover itself.

mod buckets;
pub mod identity;
mod objects;
mod rows;
mod views;

use std::collections::HashSet;
use std::fmt;
use std::ops::AddAssign;
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::sync::Mutex;

use crate::config::{Config, WithoutIdentity};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::catalog::{self, ReplicaIdentity};
use crate::postgres::{QualifiedName, Server, Session};
use crate::state::{Store, fence_sql, preparing_sql};
use crate::telemetry::Telemetry;
use objects::Objects;
use rows::{Leftover, Pair};

pub use views::refresh;

/// Before the fence it is tried so often to leave little for behind it.
const PASSES: usize = 4;
/// That is little.
const LITTLE_BYTES: u64 = 1 << 20;
/// How long a pass before the fence waits for a lock of somebody else.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a pass behind it does, on the target: nobody else should be there.
const SHORT_PATIENCE: Duration = Duration::from_millis(1500);

/// What carrying needs to know.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The move's configuration.
    pub config: &'a Config,
    /// Where from.
    pub source: &'a Server,
    /// Where to.
    pub target: &'a Server,
    /// The state of the move.
    pub store: &'a Store,
    /// Of the daemon that runs.
    pub epoch: i64,
    /// The cutover that it is for.
    pub cutover: i64,
}

impl Context<'_> {
    /// Stands right before each COMMIT on the target.
    fn guard(&self) -> String {
        format!("{}; {}", preparing_sql(self.cutover), fence_sql(self.store.name().as_str(), self.epoch))
    }
}

/// Within which limits of time a pass runs.
#[derive(Clone, Copy, Debug)]
enum Exactly {
    /// As long as it takes.
    Unhurried,
    /// While writers wait.
    Until(Instant),
}

impl Exactly {
    /// What the servers hold our statements to.
    fn limits(self) -> String {
        let (lock, statement) = match self {
            Self::Unhurried => (PATIENCE, 0),
            Self::Until(deadline) => {
                (SHORT_PATIENCE, deadline.saturating_duration_since(Instant::now()).as_millis().max(1))
            }
        };
        format!("SET lock_timeout = {}; SET statement_timeout = {statement}", lock.as_millis())
    }
}

/// What travelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Tables that differed.
    pub tables: u64,
    /// Rows that were sent.
    pub rows: u64,
    /// Rows of the target that they took the place of.
    pub gone: u64,
    /// Large objects that differed.
    pub objects: u64,
    /// Bytes that were sent.
    pub bytes: u64,
}

impl AddAssign for Carried {
    fn add_assign(&mut self, more: Self) {
        self.tables += more.tables;
        self.rows += more.rows;
        self.gone += more.gone;
        self.objects += more.objects;
        self.bytes += more.bytes;
    }
}

impl Carried {
    fn is_nothing(&self) -> bool {
        self.tables == 0 && self.objects == 0
    }
}

impl fmt::Display for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_nothing() {
            return f.write_str("nothing differed");
        }
        let Self { tables, rows, gone, objects, bytes } = self;
        write!(f, "{rows} rows of {tables} tables in place of {gone}, {objects} large objects; {bytes} bytes")
    }
}

/// What is left over, and how long it took to look at all of it.
pub struct Ahead {
    tables: Vec<Leftover>,
    /// Whether large objects are to be carried; also where there are none yet, for the first may come any moment.
    objects: bool,
    /// Whether there are some.
    some_objects: bool,
    expected: Duration,
}

impl Ahead {
    /// Finds what there is to carry.
    ///
    /// # Errors
    /// Class no: the target lacks a table, or has other columns. The connections'.
    pub async fn find(context: &Context<'_>) -> Result<Self> {
        let (source, target) = tokio::try_join!(context.source.connect("carry"), context.target.connect("carry"))?;
        // A server goes on for a while with what it was told by a daemon that is gone.
        for (session, server) in [(&source, context.source), (&target, context.target)] {
            session.end_others(&server.application_name("carry")).await.doing(|| "ending an earlier pass")?;
        }
        let tables = leftovers(&source, &target, context.config, context.store).await?;
        let objects = context.config.large_objects;
        let some_objects = objects && objects::any(&source, context.store).await?;
        Ok(Self { tables, objects, some_objects, expected: Duration::ZERO })
    }

    /// Refuses if something else is left over by now than what was found before.
    ///
    /// # Errors
    /// Class no: a table came, went or changed. Those of [`Ahead::find`].
    pub async fn still(&self, context: &Context<'_>) -> Result<()> {
        same_tables(&self.tables, &Self::find(context).await?.tables)
    }

    /// Whether there is nothing to carry.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.tables.is_empty() && !self.objects
    }

    /// The unlogged tables, which have to be fenced as well.
    pub fn unlogged(&self) -> impl Iterator<Item = &QualifiedName> {
        self.tables.iter().filter(|left| !left.followed).map(|left| &left.table.name)
    }

    /// Whether large objects are carried.
    #[must_use]
    pub fn carries_objects(&self) -> bool {
        self.objects
    }

    /// Whether there were any when it was looked.
    #[must_use]
    pub fn has_objects(&self) -> bool {
        self.some_objects
    }

    /// Brings the target as near as it can while writes flow: again and again, until little is left.
    ///
    /// # Errors
    /// Class no: the target has a large object of somebody else. The connections'; the target's refusal.
    pub async fn carry(&mut self, context: &Context<'_>, telemetry: &Telemetry) -> Result<Carried> {
        let mut all = Carried::default();
        let mut before = u64::MAX;
        for _ in 0..PASSES {
            telemetry.activity("carrying what the stream does not");
            let began = Instant::now();
            let carried = self.connect(context).await?.pass(context, Exactly::Unhurried, Some(false)).await?;
            self.expected = began.elapsed();
            all += carried;
            let enough = carried.bytes <= LITTLE_BYTES || carried.bytes > before / 2;
            before = carried.bytes;
            if enough {
                break;
            }
        }
        if self.tables.iter().any(|left| left.followed) {
            let began = Instant::now();
            let found = self.connect(context).await?.pass(context, Exactly::Unhurried, Some(true)).await?;
            // Behind the fence the same look, and if it finds something, once more on the source and twice on the target.
            self.expected += if found.is_nothing() { began.elapsed() } else { began.elapsed() * 4 };
        }
        telemetry.activity("");
        Ok(all)
    }

    /// How long [`Rest::carry`] will take, as far as the last look tells.
    #[must_use]
    pub fn expected(&self) -> Duration {
        self.expected
    }

    /// Every connection that is needed behind the fence.
    ///
    /// # Errors
    /// The connections'.
    pub async fn connect(&self, context: &Context<'_>) -> Result<Rest> {
        let workers = context.config.copy.workers.get();
        let mut pairs = Vec::new();
        for _ in 0..workers.min(self.tables.len()) {
            pairs.push(Pair::connect(context).await?);
        }
        let at_once = if self.some_objects { workers } else { 1 };
        let objects = if self.objects { Some(Objects::connect(context, at_once).await?) } else { None };
        let catalogs = tokio::try_join!(context.source.connect("carry"), context.target.connect("carry"))?;
        Ok(Rest {
            tables: self.tables.clone(),
            at_once: pairs.len().max(1),
            pairs: Mutex::new(pairs),
            objects,
            catalogs,
        })
    }
}

/// What is carried behind the fence, with its connections.
pub struct Rest {
    tables: Vec<Leftover>,
    at_once: usize,
    pairs: Mutex<Vec<Pair>>,
    objects: Option<Objects>,
    /// To ask the source and the target whether something else is left over by now.
    catalogs: (Session, Session),
}

impl Rest {
    /// Whether there is nothing to carry.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.tables.is_empty() && self.objects.is_none()
    }

    /// Refuses if something else is left over by now, such as a table that lost its replica identity on the way to the fence:
    /// it would be neither carried nor proven. To be asked behind the fence and the drain, where nothing changes any more.
    ///
    /// # Errors
    /// Class no: a table came, went or changed. The connections'.
    pub async fn still(&self, config: &Config, store: &Store) -> Result<()> {
        let (source, target) = &self.catalogs;
        same_tables(&self.tables, &leftovers(source, target, config, store).await?)
    }

    /// Brings the target to exactly what the source holds, and proves it. Both must stand still.
    ///
    /// # Errors
    /// Class no: the proof failed, or an object of somebody else is in the way. The connections'; the target's refusal.
    pub async fn carry(self, context: &Context<'_>, deadline: Instant) -> Result<Carried> {
        self.pass(context, Exactly::Until(deadline), None).await
    }

    /// `followed`: only tables that the stream writes to (compared), or only what it does not write to; `None` for all.
    async fn pass(self, context: &Context<'_>, exactly: Exactly, followed: Option<bool>) -> Result<Carried> {
        let tables = self.tables.iter().filter(|left| followed.is_none_or(|followed| left.followed == followed));
        let rows: Vec<Carried> = stream::iter(tables)
            .map(|left| async {
                let pair = self.pairs.lock().await.pop();
                let mut pair = pair.ok_or_else(|| Error::bug("more tables at once than connections"))?;
                let carried = if followed == Some(true) {
                    pair.compare(context, left, exactly).await?
                } else {
                    pair.carry(context, left, exactly).await?
                };
                if !carried.is_nothing() && followed != Some(true) {
                    tracing::info!(table = %left.table.name.plain(), rows = carried.rows, gone = carried.gone, bytes = carried.bytes, "carried rows that are in no stream");
                }
                self.pairs.lock().await.push(pair);
                Ok::<_, Error>(carried)
            })
            .buffer_unordered(self.at_once)
            .try_collect()
            .await?;
        let mut all = Carried::default();
        rows.into_iter().for_each(|carried| all += carried);
        if let Some(objects) = &self.objects
            && followed != Some(true)
        {
            all += objects.carry(context, exactly).await?;
        }
        Ok(all)
    }
}

/// The tables of which rows are in no stream, largest first.
async fn leftovers(source: &Session, target: &Session, config: &Config, store: &Store) -> Result<Vec<Leftover>> {
    let mut tables: Vec<Leftover> = catalog::unlogged_tables(&**source)
        .await?
        .into_iter()
        .filter(|table| config.scope.contains(&table.name, &table.above))
        .map(|table| Leftover { table, followed: false })
        .collect();
    if config.follow.without_identity == WithoutIdentity::Copy {
        let moved: HashSet<QualifiedName> = store.tables().await?.into_iter().map(|table| table.name).collect();
        // Also one that has an identity by now: what changed before then was not carried.
        let watched: HashSet<QualifiedName> = store.unkeyed().await?.into_iter().map(|(name, _)| name).collect();
        let without = catalog::tables(&**source).await?.into_iter().filter(|table| {
            moved.contains(&table.name) && (table.identity == ReplicaIdentity::Nothing || watched.contains(&table.name))
        });
        tables.extend(without.map(|table| Leftover { table, followed: true }));
    }
    tables.sort_by_key(|left| std::cmp::Reverse(left.table.bytes));
    same_shape(target, &tables).await?;
    Ok(tables)
}

fn same_tables(before: &[Leftover], now: &[Leftover]) -> Result<()> {
    let shape = |left: &Leftover| (left.table.oid, left.table.name.clone(), left.table.columns.clone());
    let (before, after): (Vec<_>, Vec<_>) = (before.iter().map(shape).collect(), now.iter().map(shape).collect());
    let changed = after.iter().find(|one| !before.contains(one)).or(before.iter().find(|one| !after.contains(one)));
    let Some((_, name, _)) = changed else { return Ok(()) };
    let message = format!("table {} came, went or was altered while the cutover was prepared", name.plain());
    Err(Error::new(Class::No, "leftover_shape", message).hint("cut over again, and leave the schema alone meanwhile"))
}

/// A server that works for a client that is gone notices it in time, where it can.
const NOTICE_OUR_END: &str = "SELECT pg_catalog.set_config(name, '5s', false) FROM pg_catalog.pg_settings
    WHERE name = 'client_connection_check_interval'";

/// `$1` schemas, `$2` names. The stored columns of tables of the target, in the order of their names.
const COLUMNS: &str = "
    SELECT c.oid IS NOT NULL,
           COALESCE((SELECT array_agg(a.attname::text ORDER BY a.attname::text COLLATE \"C\")
                     FROM pg_catalog.pg_attribute a
                     WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''), '{}')
    FROM unnest($1::text[], $2::text[]) WITH ORDINALITY t (schema_name, table_name, at)
    LEFT JOIN pg_catalog.pg_namespace n ON n.nspname = t.schema_name
    LEFT JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = t.table_name AND c.relkind = 'r'
    ORDER BY t.at";

/// Refuses by name what would fail later: a table that the target lacks, or has with other columns.
async fn same_shape(target: &tokio_postgres::Client, tables: &[Leftover]) -> Result<()> {
    let schemas: Vec<&str> = tables.iter().map(|left| left.table.name.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|left| left.table.name.name.as_str()).collect();
    let rows = target.query(COLUMNS, &[&schemas, &names]).await.doing(|| "looking at the target's tables")?;
    for (left, row) in tables.iter().zip(&rows) {
        let (there, theirs): (bool, Vec<String>) = (row.try_get(0)?, row.try_get(1)?);
        let mut ours: Vec<String> =
            left.table.columns.iter().filter(|column| !column.generated).map(|column| column.name.clone()).collect();
        ours.sort_unstable();
        if there && ours == theirs {
            continue;
        }
        let plain = left.table.name.plain();
        let (message, hint) = if there {
            (format!("table {plain} has other columns on the target than on the source"), "make the same change there")
        } else {
            (format!("the target has no table {plain}"), "create it there as it is on the source")
        };
        return Err(Error::new(Class::No, "leftover_shape", message)
            .hint(format!("{hint}, or exclude it (move.exclude), and cut over again")));
    }
    Ok(())
}
