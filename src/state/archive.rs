//! What `status` is told while rows travel into an archive.

use super::Store;
use crate::error::{Doing, Result};
use crate::postgres::{QualifiedName, quote_literal};

impl Store {
    /// Says how far tables are on their way into an archive: name, rows, bytes. Their state stays what it is, for of a table
    /// that is `pending` the target holds nothing that is ours.
    ///
    /// # Errors
    /// The connection's.
    pub async fn report_dumping(&self, tables: &[(QualifiedName, u64, u64)]) -> Result<()> {
        for chunk in tables.chunks(1000) {
            let values = chunk.iter().map(|(table, rows, bytes)| {
                format!(
                    "({}, {}, {rows}::int8, {bytes}::int8)",
                    quote_literal(&table.schema),
                    quote_literal(&table.name)
                )
            });
            let values = values.collect::<Vec<_>>().join(", ");
            self.execute(&format!(
                "UPDATE pgtandem.copy_table t SET rows = v.rows, bytes = v.bytes
                 FROM (VALUES {values}) v (schema_name, table_name, rows, bytes)
                 WHERE t.move = {} AND t.schema_name = v.schema_name AND t.table_name = v.table_name
                   AND t.state = 'pending'",
                quote_literal(self.name.as_str())
            ))
            .await
            .doing(|| "reporting the dump")?;
        }
        Ok(())
    }
}
