//! Tables without a replica identity: how many updates and deletes the source had counted before each one's cut.

use super::Store;
use crate::error::{Doing, Result};
use crate::postgres::{QualifiedName, quote_literal};

impl Store {
    /// Writes the counts down, before a cut: a table that is copied already keeps the count from before its own.
    ///
    /// # Errors
    /// The connection's.
    pub async fn remember_unkeyed(&self, tables: &[(QualifiedName, i64)]) -> Result<()> {
        for chunk in tables.chunks(1000) {
            let values = self.values(chunk);
            self.execute(&format!(
                "INSERT INTO pgtandem.unkeyed_table AS known (move, schema_name, table_name, changes) VALUES {values}
                 ON CONFLICT (move, schema_name, table_name) DO UPDATE SET changes = excluded.changes
                 WHERE NOT EXISTS (
                     SELECT FROM pgtandem.copy_table t
                     WHERE t.move = known.move AND t.schema_name = known.schema_name
                       AND t.table_name = known.table_name AND t.state = 'copied')"
            ))
            .await
            .doing(|| "remembering the tables without a replica identity")?;
        }
        Ok(())
    }

    /// What was written down.
    ///
    /// # Errors
    /// The connection's.
    pub async fn unkeyed(&self) -> Result<Vec<(QualifiedName, i64)>> {
        let session = self.session().await?;
        let rows = session
            .get()?
            .query(
                "SELECT schema_name, table_name, changes FROM pgtandem.unkeyed_table WHERE move = $1 ORDER BY 1, 2",
                &[&self.name.as_str()],
            )
            .await
            .doing(|| "reading the tables without a replica identity")?;
        rows.iter()
            .map(|row| Ok((QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? }, row.try_get(2)?)))
            .collect()
    }

    /// From now on this count counts as the one from before the cut: both sides were found to agree, or the source's
    /// counter began anew.
    ///
    /// # Errors
    /// The connection's.
    pub async fn reset_unkeyed(&self, table: &QualifiedName, count: i64) -> Result<()> {
        self.execute(&format!(
            "UPDATE pgtandem.unkeyed_table SET changes = {count}
             WHERE move = {} AND schema_name = {} AND table_name = {}",
            quote_literal(self.name.as_str()),
            quote_literal(&table.schema),
            quote_literal(&table.name)
        ))
        .await
        .doing(|| format!("remembering the counter of table {}", table.plain()))
    }
}
