//! Which units of a table that is copied in parts are in the target.

use std::collections::HashMap;

use super::{Store, lsn};
use crate::copy::division::Range;
use crate::error::{Doing, Error, Result};
use crate::postgres::{Lsn, QualifiedName, quote_literal};

/// Rows of a table that stood in a range of it when a cut was taken, and that the target holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FinishedUnit {
    /// Which range.
    pub range: Range,
    /// As of which cut the target holds them.
    pub cut_lsn: Lsn,
    /// How many rows.
    pub rows: u64,
    /// Bytes sent, as COPY wrote them.
    pub bytes: u64,
}

/// A table that was begun, and what is there of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Begun {
    /// What the table was when it was opened; see [`opened_sql`].
    pub shape: String,
    /// Where the shares of its key begin, but for the first one, if its ranges are of these and not of its blocks.
    pub bounds: Option<Vec<String>>,
    /// In the order of their ranges.
    pub units: Vec<FinishedUnit>,
}

/// The statement that opens a table that is copied in parts, in the transaction that empties it. `shape` says which table that
/// is and what it looks like: units of another shape are not of this table. `bounds` as in [`Begun`].
#[must_use]
pub fn opened_sql(move_name: &str, table: &QualifiedName, shape: &str, bounds: Option<&[String]>) -> String {
    let this = this_table(move_name, table);
    let bounds = bounds.map_or_else(
        || "NULL".to_owned(),
        |bounds| {
            format!("ARRAY[{}]::text[]", bounds.iter().map(|bound| quote_literal(bound)).collect::<Vec<_>>().join(", "))
        },
    );
    format!(
        "UPDATE pgtandem.copy_table
         SET state = 'copying', cut_lsn = NULL, rows = 0, bytes = 0, shape = {}, bounds = {bounds} WHERE {this};
         {}",
        quote_literal(shape),
        forget_units_sql(move_name, table)
    )
}

/// The statement that goes with the rows of a unit, in their transaction.
#[must_use]
pub fn unit_sql(move_name: &str, table: &QualifiedName, unit: FinishedUnit) -> String {
    format!(
        "INSERT INTO pgtandem.copy_unit (move, schema_name, table_name, from_block, to_block, cut_lsn, rows, bytes)
         VALUES ({}, {}, {}, {}, {}, '{}', {}, {})",
        quote_literal(move_name),
        quote_literal(&table.schema),
        quote_literal(&table.name),
        unit.range.from,
        unit.range.to.map_or_else(|| "NULL".to_owned(), |to| to.to_string()),
        unit.cut_lsn,
        unit.rows,
        unit.bytes,
    )
}

/// The statement that brings the units of a table to a newer cut, in the transaction that does the same with their rows.
#[must_use]
pub fn units_at_sql(move_name: &str, table: &QualifiedName, cut: Lsn) -> String {
    format!("UPDATE pgtandem.copy_unit SET cut_lsn = '{cut}' WHERE {}", this_table(move_name, table))
}

/// The statement after which nothing is known of units of a table: it is copied, or begins anew.
#[must_use]
pub fn forget_units_sql(move_name: &str, table: &QualifiedName) -> String {
    format!("DELETE FROM pgtandem.copy_unit WHERE {}", this_table(move_name, table))
}

fn this_table(move_name: &str, table: &QualifiedName) -> String {
    format!(
        "move = {} AND schema_name = {} AND table_name = {}",
        quote_literal(move_name),
        quote_literal(&table.schema),
        quote_literal(&table.name)
    )
}

impl Store {
    /// The tables that have units in the target.
    ///
    /// # Errors
    /// The connection's.
    pub async fn begun(&self) -> Result<HashMap<QualifiedName, Begun>> {
        let session = self.session().await?;
        let rows = session
            .get()?
            .query(
                "SELECT u.schema_name, u.table_name, COALESCE(t.shape, ''), u.from_block, u.to_block, u.cut_lsn::text, u.rows, u.bytes
                 FROM pgtandem.copy_unit u JOIN pgtandem.copy_table t USING (move, schema_name, table_name)
                 WHERE u.move = $1 AND t.state = 'copying'
                 ORDER BY 1, 2, 4",
                &[&self.name().as_str()],
            )
            .await
            .doing(|| "reading the units of the copy")?;
        let mut begun: HashMap<QualifiedName, Begun> = HashMap::new();
        for row in &rows {
            let count = |at: usize| -> Result<u64> { Ok(u64::try_from(row.try_get::<_, i64>(at)?).unwrap_or(0)) };
            let to = row.try_get::<_, Option<i64>>(4)?.map(|to| u64::try_from(to).unwrap_or(0));
            let cut_lsn = lsn(row.try_get(5)?)?.ok_or_else(|| Error::bug("a unit of the copy has no cut"))?;
            let unit =
                FinishedUnit { range: Range { from: count(3)?, to }, cut_lsn, rows: count(6)?, bytes: count(7)? };
            let table = begun.entry(QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? }).or_default();
            table.shape = row.try_get(2)?;
            table.units.push(unit);
        }
        // For themselves: they may be many, and long.
        let sql =
            "SELECT schema_name, table_name, bounds FROM pgtandem.copy_table WHERE move = $1 AND bounds IS NOT NULL";
        for row in session.get()?.query(sql, &[&self.name().as_str()]).await.doing(|| "reading the bounds of units")? {
            let table = QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? };
            if let Some(begun) = begun.get_mut(&table) {
                begun.bounds = row.try_get(2)?;
            }
        }
        Ok(begun)
    }

    /// What the target holds of a table that is not copied yet is thrown away when it is copied.
    ///
    /// # Errors
    /// The connection's.
    pub async fn forget_units(&self, table: &QualifiedName) -> Result<()> {
        let name = self.name().as_str();
        // Without its shape, what may still be committed counts no more either.
        let sql = format!(
            "UPDATE pgtandem.copy_table SET shape = NULL, bounds = NULL WHERE {}; {}",
            this_table(name, table),
            forget_units_sql(name, table)
        );
        self.execute(&sql).await.doing(|| format!("forgetting the units of table {}", table.plain()))
    }
}
