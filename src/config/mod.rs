//! File + environment + flags → one validated [`Config`]. Nothing else reads them.
//!
//! Whoever holds a `Config` never checks it again: names, sizes, durations, addresses and connection strings
//! are parsed here, and a value out of range is an error that names the key, the value and the range.

pub mod environment;
mod judge;
pub mod keys;
pub mod settings;
mod units;

pub use environment::Environment;
pub use settings::{Flags, Settings};

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use crate::postgres::{ConnInfo, QualifiedName};

/// The validated configuration of one move.
#[derive(Clone, Debug)]
pub struct Config {
    /// The name in every slot, publication and state row.
    pub name: MoveName,
    /// Which tables move.
    pub scope: Scope,
    /// Whether large objects are carried at the cutover.
    pub large_objects: bool,
    /// Where the data is.
    pub source: ConnInfo,
    /// `source.url_from_target`: how the target server reaches the source, if not by `source.url`.
    pub source_from_target: Option<ConnInfo>,
    /// Where it goes.
    pub target: ConnInfo,
    /// `[copy]`
    pub copy: Copy,
    /// `[follow]`
    pub follow: Follow,
    /// `[cutover]`
    pub cutover: Cutover,
    /// `[http] listen`; `None` turns it off.
    pub http: Option<SocketAddr>,
    /// `[log]`
    pub log: Log,
}

/// `[a-z0-9_]{1,40}`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MoveName(String);

impl MoveName {
    /// Parses a name.
    ///
    /// # Errors
    /// The text is empty, longer than 40 or has another character than `[a-z0-9_]`.
    pub fn new(text: &str) -> Result<Self, String> {
        let fits = (1..=40).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if fits { Ok(Self(text.to_owned())) } else { Err(format!("{text:?} does not match [a-z0-9_]{{1,40}}")) }
    }

    /// The bare name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The replication slot of the move: `pgtandem_<name>`.
    #[must_use]
    pub fn slot(&self) -> String {
        format!("pgtandem_{}", self.0)
    }

    /// The publication of the tables whose every change is carried: `pgtandem_<name>`.
    #[must_use]
    pub fn publication(&self) -> String {
        format!("pgtandem_{}", self.0)
    }

    /// The publication of tables without a replica identity, which carries inserts and truncates only, so that
    /// the source never refuses an UPDATE because of us: `pgtandem_<name>_inserts`.
    #[must_use]
    pub fn insert_publication(&self) -> String {
        format!("pgtandem_{}_inserts", self.0)
    }

    /// Both publications: together they are what the stream carries.
    #[must_use]
    pub fn publications(&self) -> [String; 2] {
        [self.publication(), self.insert_publication()]
    }
}

impl fmt::Display for MoveName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `[move] include` and `exclude`: patterns over `schema.table`, where `*` stands for any run of characters.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// Empty: every table that is not a system's or an extension's.
    pub include: Vec<TablePattern>,
    /// Taken away from what is included.
    pub exclude: Vec<TablePattern>,
}

impl Scope {
    /// Whether a user table is part of the move. Whoever names a partitioned table means its partitions too, so a
    /// partition is asked about together with the partitioned tables `above` it.
    #[must_use]
    pub fn contains(&self, table: &QualifiedName, above: &[QualifiedName]) -> bool {
        let named = |patterns: &[TablePattern]| {
            std::iter::once(table).chain(above).any(|t| patterns.iter().any(|p| p.matches(&t.schema, &t.name)))
        };
        (self.include.is_empty() || named(&self.include)) && !named(&self.exclude)
    }

    /// Whether a table is excluded by its own name, for one that is gone and has nothing above it any more.
    #[must_use]
    pub fn excludes(&self, table: &QualifiedName) -> bool {
        self.exclude.iter().any(|pattern| pattern.matches(&table.schema, &table.name))
    }
}

/// One pattern, such as `public.*` or `app.audit_*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablePattern {
    schema: String,
    table: String,
}

impl TablePattern {
    /// Parses `schema.table`; a pattern without a dot means the schema `public`.
    ///
    /// # Errors
    /// An empty half.
    pub fn new(text: &str) -> Result<Self, String> {
        let (schema, table) = text.split_once('.').unwrap_or(("public", text));
        if schema.is_empty() || table.is_empty() {
            return Err(format!("{text:?} is not a pattern like public.* or app.orders"));
        }
        Ok(Self { schema: schema.to_owned(), table: table.to_owned() })
    }

    /// Both halves as patterns of SQL's LIKE.
    #[must_use]
    pub fn as_like(&self) -> [String; 2] {
        let like = |half: &str| half.replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_").replace('*', "%");
        [like(&self.schema), like(&self.table)]
    }

    /// Whether both halves match.
    #[must_use]
    pub fn matches(&self, schema: &str, table: &str) -> bool {
        wildcard(self.schema.as_bytes(), schema.as_bytes()) && wildcard(self.table.as_bytes(), table.as_bytes())
    }
}

/// `*` matches any run of bytes, also an empty one; everything else itself.
fn wildcard(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|skip| wildcard(rest, text.get(skip..).unwrap_or_default())),
        Some((byte, rest)) => text.split_first().is_some_and(|(first, more)| first == byte && wildcard(rest, more)),
    }
}

/// How the first copy is made.
#[derive(Clone, Debug)]
pub struct Copy {
    /// `copy.method`
    pub method: CopyMethod,
    /// Tables (or parts of one) copied at the same time.
    pub workers: NonZeroUsize,
    /// Indexes built at the same time.
    pub index_workers: NonZeroUsize,
    /// In bytes; a larger table is copied in parts, by several workers.
    pub split_above: u64,
    /// Tables that are copied before all others, in this order.
    pub first: Vec<TablePattern>,
    /// Of all workers together, as COPY writes rows; 0: no bound.
    pub max_bytes_per_second: u64,
    /// Whether the archive of `copy.method = "dump"` stays once its rows are on the target.
    pub keep_archive: bool,
}

/// `copy.method`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMethod {
    /// Parallel COPY through the daemon.
    Copy,
    /// `pg_dump -Fd -j` and `pg_restore -j`, as two steps.
    Dump,
    /// By hand, from `pgtandem snapshot`.
    None,
}

/// How changes are carried.
#[derive(Clone, Debug)]
pub struct Follow {
    /// `follow.engine`
    pub engine: Engine,
    /// Target connections that apply.
    pub workers: NonZeroUsize,
    /// A batch is committed at the latest after this.
    pub batch_max_delay: Duration,
    /// In bytes; a batch is committed once it holds this much.
    pub batch_max_bytes: u64,
    /// In bytes; the disk for transactions that the source sends while they are in progress. 0: it is not asked to.
    pub spill_max_bytes: u64,
    /// `follow.spool`; `None`: what comes while rows are copied stays on the source.
    pub spool: Option<PathBuf>,
    /// In bytes; the disk for the spool.
    pub spool_max_bytes: u64,
    /// `follow.ddl`
    pub ddl: Ddl,
    /// `follow.missing_row`
    pub missing_row: MissingRow,
    /// `follow.without_identity`
    pub without_identity: WithoutIdentity,
}

/// `follow.engine`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Ours.
    Stream,
    /// The server's.
    Subscription,
}

/// `follow.ddl`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ddl {
    /// Carry schema changes where that is possible, stop where not.
    Replicate,
    /// Stop at each schema change.
    Stop,
}

/// `follow.missing_row`: what an UPDATE or DELETE that finds no row on the target means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingRow {
    /// The sides differ: stop.
    Stop,
    /// Write it down and go on.
    Record,
}

/// `follow.without_identity`: what becomes of updates and deletes of tables without a replica identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WithoutIdentity {
    /// They are watched for; a table that had some refuses the cutover.
    Watch,
    /// Such tables are given `REPLICA IDENTITY FULL` on the source, so that they are followed like others.
    Full,
    /// The difference is carried behind the fence of the cutover.
    Copy,
}

/// How the switch is made.
#[derive(Clone, Debug)]
pub struct Cutover {
    /// Ready below this lag.
    pub max_lag: Duration,
    /// The fence lifts by itself after this.
    pub timeout: Duration,
    /// `cutover.fence`
    pub fence: Fence,
    /// `cutover.verify`
    pub verify: CutoverVerify,
    /// Whether materialized views are refreshed shortly before the fence closes.
    pub refresh: bool,
    /// Arm the way back before writes are let in.
    pub reverse: bool,
    /// Program and arguments run for the switch; empty: none.
    pub hook: Vec<String>,
    /// Admin connection of PgBouncer, if it is part of the switch.
    pub pgbouncer: Option<ConnInfo>,
    /// The database to pause there; empty: all.
    pub pgbouncer_database: String,
}

/// `cutover.fence`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// Table locks, then triggers that refuse writes.
    Lock,
    /// `default_transaction_read_only` and terminated sessions.
    ReadOnly,
    /// The user stops writes himself.
    None,
}

/// `cutover.verify`: what is compared after the drain, inside the timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutoverVerify {
    /// Nothing.
    Off,
    /// Row counts.
    Counts,
    /// Every row.
    Full,
}

/// `[log]`
#[derive(Clone, Debug)]
pub struct Log {
    /// A `tracing` filter: `info`, or `info,pgtandem::follow=debug`.
    pub level: String,
    /// `log.format`
    pub format: LogFormat,
}

/// `log.format`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

#[cfg(test)]
mod tests;
