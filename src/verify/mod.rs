//! Comparing both sides.
//!
//! Owns the two ways of comparing a table, by count and by digest. A digest does not depend on the order of rows: each
//! row is printed under the pinned settings of [`crate::postgres::server::PINNED_SETTINGS`], hashed, and the hashes are
//! added up. Both sides must be at the same cut when they are compared; that is the caller's part.

use std::num::NonZeroUsize;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::sync::Mutex;

use crate::error::{Doing, Error, Result};
use crate::postgres::{QualifiedName, Server, Session, quote_identifier};

/// How thoroughly to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Row counts.
    Counts,
    /// Every column of every row.
    Full,
}

/// What a table holds, as far as the depth tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Rows.
    pub rows: u64,
    /// The sum of the rows' hashes; `None` for counts.
    pub digest: Option<String>,
}

/// A table of which both sides hold something else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Schema and name.
    pub table: QualifiedName,
    /// What the source holds.
    pub source: Summary,
    /// What the target holds.
    pub target: Summary,
}

impl Difference {
    /// At least so many rows differ: the difference of the counts, or one where only the contents differ.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.source.rows.abs_diff(self.target.rows).max(1)
    }
}

/// Reads one table on one side.
///
/// # Errors
/// The connection's, or no privilege.
pub async fn summarize(session: &Session, table: &QualifiedName, columns: &[String], depth: Depth) -> Result<Summary> {
    let digest = match depth {
        Depth::Counts => "NULL::text".to_owned(),
        Depth::Full => {
            // Named columns, so that their order on each side does not matter. Half of an MD5 is 64 bits; their sum
            // as numeric cannot overflow, and two changes cancel each other out only by chance.
            let row = columns.iter().map(|c| format!("t.{}", quote_identifier(c))).collect::<Vec<_>>().join(", ");
            format!(
                "COALESCE(pg_catalog.sum(('x' || pg_catalog.left(pg_catalog.md5(ROW({row})::text), 16))::bit(64)::int8::numeric), 0)::text"
            )
        }
    };
    let row = session
        .query_one(&format!("SELECT pg_catalog.count(*), {digest} FROM ONLY {table} t"), &[])
        .await
        .doing(|| format!("reading table {} to compare it", table.plain()))?;
    Ok(Summary { rows: u64::try_from(row.try_get::<_, i64>(0)?).unwrap_or(0), digest: row.try_get(1)? })
}

/// A comparison that is ready to run: its connections are open.
pub struct Comparison {
    tables: Vec<(QualifiedName, Vec<String>)>,
    depth: Depth,
    pool: Mutex<Vec<(Session, Session)>>,
    at_once: usize,
}

impl Comparison {
    /// Opens up to `workers` connections to each side. `tables` is name and columns.
    ///
    /// # Errors
    /// The connections'.
    pub async fn prepare(
        source: &Server,
        target: &Server,
        tables: Vec<(QualifiedName, Vec<String>)>,
        depth: Depth,
        workers: NonZeroUsize,
    ) -> Result<Self> {
        let mut pool = Vec::new();
        for _ in 0..workers.get().min(tables.len()) {
            pool.push(tokio::try_join!(source.connect("verify"), target.connect("verify"))?);
        }
        let at_once = pool.len().max(1);
        Ok(Self { tables, depth, pool: Mutex::new(pool), at_once })
    }

    /// What will be compared.
    #[must_use]
    pub fn tables(&self) -> &[(QualifiedName, Vec<String>)] {
        &self.tables
    }

    /// How thoroughly.
    #[must_use]
    pub fn depth(&self) -> Depth {
        self.depth
    }

    /// Reads the source's tables as [`Comparison::run`] will.
    ///
    /// # Errors
    /// The connections', or no privilege.
    pub async fn rehearse(&self) -> Result<()> {
        stream::iter(&self.tables)
            .map(|(table, columns)| async move {
                let (from, to) = self.take().await?;
                let read = summarize(&from, table, columns, self.depth).await;
                self.pool.lock().await.push((from, to));
                read.map(drop)
            })
            .buffer_unordered(self.at_once)
            .try_collect()
            .await
    }

    /// Compares tables that stand still on both sides, and returns those that differ.
    ///
    /// # Errors
    /// The connections', or no privilege.
    pub async fn run(self) -> Result<Vec<Difference>> {
        let found: Vec<Option<Difference>> = stream::iter(&self.tables)
            .map(|(table, columns)| self.compare(table, columns))
            .buffer_unordered(self.at_once)
            .try_collect()
            .await?;
        Ok(found.into_iter().flatten().collect())
    }

    async fn compare(&self, table: &QualifiedName, columns: &[String]) -> Result<Option<Difference>> {
        let (from, to) = self.take().await?;
        let (source, target) =
            tokio::try_join!(summarize(&from, table, columns, self.depth), summarize(&to, table, columns, self.depth))?;
        self.pool.lock().await.push((from, to));
        let table = table.clone();
        Ok((source != target).then_some(Difference { table, source, target }))
    }

    async fn take(&self) -> Result<(Session, Session)> {
        let pair = self.pool.lock().await.pop();
        pair.ok_or_else(|| Error::bug("more comparisons than connections"))
    }
}
