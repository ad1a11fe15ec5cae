//! What the state knows about each table's copy.

use std::fmt::Display;
use std::str::FromStr;

use super::{Store, lsn, only_the_leader, unknown_word};
use crate::error::{Doing, Error, Result};
use crate::postgres::{Lsn, QualifiedName, quote_literal};

/// How far the copy of a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TableState {
    /// Not begun.
    Pending,
    /// Rows are on their way, none is visible in the target.
    Copying,
    /// All rows of its cut are in the target, committed together with this word.
    Copied,
}

impl TableState {
    /// All of them, in order.
    pub const ALL: [Self; 3] = [Self::Pending, Self::Copying, Self::Copied];

    /// The word in the state, the status and the metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Copying => "copying",
            Self::Copied => "copied",
        }
    }
}

impl FromStr for TableState {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == text).ok_or_else(|| unknown_word("table state", text))
    }
}

/// A table of the move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableRecord {
    /// Schema and name.
    pub name: QualifiedName,
    /// How far its copy is.
    pub state: TableState,
    /// The cut it was copied under: changes that committed before are skipped. `None` until copied.
    pub cut_lsn: Option<Lsn>,
    /// Rows copied.
    pub rows: u64,
    /// Bytes sent so far, as COPY prints them.
    pub bytes: u64,
    /// The source's size of heap and TOAST when the copy was planned.
    pub bytes_total: u64,
}

/// The statement that a copy worker runs in the transaction that holds the rows, so that rows and state commit
/// together or not at all. `tables`: each with its rows and bytes.
#[must_use]
pub fn copied_sql(move_name: &str, cut: Lsn, tables: &[(&QualifiedName, u64, u64)]) -> String {
    let row = |(table, rows, bytes): &(&QualifiedName, u64, u64)| {
        let [name, schema, table] = [move_name, &table.schema, &table.name].map(quote_literal);
        format!("({name}, {schema}, {table}, 'copied', '{cut}', {rows}, {bytes})")
    };
    format!(
        "INSERT INTO pgtandem.copy_table (move, schema_name, table_name, state, cut_lsn, rows, bytes)
         VALUES {}
         ON CONFLICT (move, schema_name, table_name)
         DO UPDATE SET state = 'copied', cut_lsn = excluded.cut_lsn, rows = excluded.rows, bytes = excluded.bytes,
                       shape = NULL, bounds = NULL",
        tables.iter().map(row).collect::<Vec<_>>().join(", ")
    )
}

/// The statement that opens a table for being copied from nothing: units of it that are there count no more.
#[must_use]
pub fn copying_sql(move_name: &str, table: &QualifiedName) -> String {
    format!(
        "UPDATE pgtandem.copy_table SET state = 'copying', cut_lsn = NULL, rows = 0, bytes = 0, shape = NULL, bounds = NULL
         WHERE move = {} AND schema_name = {} AND table_name = {}",
        quote_literal(move_name),
        quote_literal(&table.schema),
        quote_literal(&table.name),
    )
}

/// Fails with a division by zero (22012), and with it the transaction, unless `epoch` is the move's. Until the
/// transaction ends no other daemon can take the move, so it stands right before the COMMIT.
#[must_use]
pub fn fence_sql(move_name: &str, epoch: i64) -> String {
    format!(
        "SELECT 1 / count(*) FROM (
             SELECT FROM pgtandem.progress WHERE move = {} AND epoch = {epoch} FOR SHARE) AS mine",
        quote_literal(move_name),
    )
}

impl Store {
    /// Every table that is pending was copied by hand under this cut.
    ///
    /// # Errors
    /// The connection's.
    pub async fn record_all_copied(&self, cut: Lsn) -> Result<()> {
        self.execute(&format!(
            "UPDATE pgtandem.copy_table SET state = 'copied', cut_lsn = '{cut}' WHERE move = {} AND state = 'pending'",
            quote_literal(self.name.as_str())
        ))
        .await
        .doing(|| "recording the tables as copied")
    }

    /// These tables are copied again by the next walk through the phases, under a new cut. What the target holds of them was
    /// written by the move, so it is thrown away then. One that was not copied yet keeps its state.
    ///
    /// # Errors
    /// The connection's; class retry if the move is not of this epoch any more.
    pub async fn copy_again(&self, epoch: i64, tables: &[QualifiedName]) -> Result<()> {
        let mut sql = String::from("BEGIN");
        for table in tables {
            sql.push_str(&format!("; {} AND state = 'copied'", copying_sql(self.name.as_str(), table)));
        }
        sql.push_str(&format!("; {}; COMMIT", fence_sql(self.name.as_str(), epoch)));
        self.execute(&sql).await.map_err(only_the_leader).doing(|| "asking for tables to be copied again")
    }

    /// Adds the tables that are not known yet, as pending. Known ones keep their state.
    ///
    /// `tables` is name and size in bytes.
    ///
    /// # Errors
    /// The connection's.
    pub async fn plan_tables(&self, tables: &[(QualifiedName, u64)]) -> Result<()> {
        for chunk in tables.chunks(1000) {
            let values = self.values(chunk);
            self.execute(&format!(
                "INSERT INTO pgtandem.copy_table (move, schema_name, table_name, bytes_total) VALUES {values}
                 ON CONFLICT (move, schema_name, table_name) DO NOTHING"
            ))
            .await
            .doing(|| "planning the tables")?;
        }
        Ok(())
    }

    /// A row of `VALUES` for each table: the move, its schema, its name, a number.
    pub(super) fn values(&self, tables: &[(QualifiedName, impl Display)]) -> String {
        let mut values = String::new();
        for (table, number) in tables {
            let [name, schema, table] = [self.name.as_str(), &table.schema, &table.name].map(quote_literal);
            let comma = if values.is_empty() { "" } else { ", " };
            values.push_str(&format!("{comma}({name}, {schema}, {table}, {number})"));
        }
        values
    }

    /// Neither side has the table at `lsn`: changes of it that committed before are skipped, and nothing of it is copied.
    ///
    /// # Errors
    /// The connection's.
    pub async fn record_gone(&self, table: &QualifiedName, lsn: Lsn) -> Result<()> {
        self.execute(&copied_sql(self.name.as_str(), lsn, &[(table, 0, 0)]))
            .await
            .doing(|| format!("letting go of table {}", table.plain()))
    }

    /// Forgets a table that neither side has any more.
    ///
    /// # Errors
    /// The connection's.
    pub async fn forget_table(&self, table: &QualifiedName) -> Result<()> {
        self.execute(&format!(
            "DELETE FROM pgtandem.copy_table WHERE move = {} AND schema_name = {} AND table_name = {}",
            quote_literal(self.name.as_str()),
            quote_literal(&table.schema),
            quote_literal(&table.name)
        ))
        .await
        .doing(|| format!("forgetting table {}", table.plain()))
    }

    /// All tables of the move, by name.
    ///
    /// # Errors
    /// The connection's.
    pub async fn tables(&self) -> Result<Vec<TableRecord>> {
        let session = self.session().await?;
        let rows = session
            .get()?
            .query(
                "SELECT schema_name, table_name, state, cut_lsn::text, rows, bytes, bytes_total
                 FROM pgtandem.copy_table WHERE move = $1 ORDER BY 1, 2",
                &[&self.name.as_str()],
            )
            .await
            .doing(|| "reading the tables of the move")?;
        rows.iter()
            .map(|row| {
                let count = |at: usize| -> Result<u64> { Ok(u64::try_from(row.try_get::<_, i64>(at)?).unwrap_or(0)) };
                Ok(TableRecord {
                    name: QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? },
                    state: row.try_get::<_, String>(2)?.parse()?,
                    cut_lsn: lsn(row.try_get(3)?)?,
                    rows: count(4)?,
                    bytes: count(5)?,
                    bytes_total: count(6)?,
                })
            })
            .collect()
    }

    /// Says for `status` how far tables in flight are: name, rows, bytes. Finished tables are left alone, and those that are being
    /// recorded at this moment: each waiting for the other would be a deadlock.
    ///
    /// # Errors
    /// The connection's.
    pub async fn report_copying(&self, tables: &[(QualifiedName, u64, u64)]) -> Result<()> {
        if tables.is_empty() {
            return Ok(());
        }
        let values = tables
            .iter()
            .map(|(table, rows, bytes)| {
                format!(
                    "({}, {}, {rows}::int8, {bytes}::int8)",
                    quote_literal(&table.schema),
                    quote_literal(&table.name)
                )
            })
            .collect::<Vec<_>>()
            .join(", ");
        self.execute(&format!(
            "WITH free AS (
                 SELECT v.* FROM (VALUES {values}) v (schema_name, table_name, rows, bytes)
                 JOIN pgtandem.copy_table t USING (schema_name, table_name)
                 WHERE t.move = {name} AND t.state <> 'copied'
                 FOR NO KEY UPDATE OF t SKIP LOCKED)
             UPDATE pgtandem.copy_table t SET state = 'copying', rows = free.rows, bytes = free.bytes FROM free
             WHERE t.move = {name} AND t.schema_name = free.schema_name AND t.table_name = free.table_name AND t.state <> 'copied'",
            name = quote_literal(self.name.as_str())
        ))
        .await
        .doing(|| "reporting the copy")
    }
}
