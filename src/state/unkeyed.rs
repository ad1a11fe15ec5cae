//! Tables without a replica identity: how many updates and deletes the source had counted before the first cut.

use super::Store;
use crate::error::{Doing, Result};
use crate::postgres::{QualifiedName, quote_literal};

impl Store {
    /// Writes the counts down, once: a table that is known keeps its first count.
    ///
    /// # Errors
    /// The connection's.
    pub async fn remember_unkeyed(&self, tables: &[(QualifiedName, i64)]) -> Result<()> {
        for chunk in tables.chunks(1000) {
            let values = chunk
                .iter()
                .map(|(table, count)| {
                    format!(
                        "({}, {}, {}, {count})",
                        quote_literal(self.name.as_str()),
                        quote_literal(&table.schema),
                        quote_literal(&table.name)
                    )
                })
                .collect::<Vec<_>>()
                .join(", ");
            self.execute(&format!(
                "INSERT INTO pgtandem.unkeyed_table (move, schema_name, table_name, changes) VALUES {values}
                 ON CONFLICT (move, schema_name, table_name) DO NOTHING"
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
}
