//! The record of schema changes that arrived from the source: what became of each.

use super::Store;
use crate::error::{Doing, Result};
use crate::postgres::{Lsn, quote_literal};

/// A statement that changed the source's schema.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaChange {
    /// The commit of its transaction.
    pub lsn: Lsn,
    /// Which of that transaction.
    pub ordinal: i32,
    /// The command tag.
    pub tag: String,
    /// Its text, as far as it may be shown.
    pub statement: String,
    /// Who ran it.
    pub role: String,
}

impl SchemaChange {
    /// Writes it down, as a part of a transaction: `carried`, `found` or `refused`. What a person marked as `skip` stays so.
    #[must_use]
    pub fn sql(&self, move_name: &str, state: &str, error: Option<&str>) -> String {
        let [name, tag, statement, role, state] =
            [move_name, &self.tag, &self.statement, &self.role, state].map(quote_literal);
        format!(
            "INSERT INTO pgtandem.ddl AS known (move, lsn, ordinal, tag, statement, role, state, error)
             VALUES ({name}, '{}', {}, {tag}, {statement}, {role}, {state}, {})
             ON CONFLICT (move, lsn, ordinal) DO UPDATE SET state = excluded.state, error = excluded.error, seen_at = now()
             WHERE known.state <> 'skip'",
            self.lsn,
            self.ordinal,
            error.map_or_else(|| "NULL".to_owned(), quote_literal)
        )
    }
}

impl Store {
    /// Writes down what became of a schema change.
    ///
    /// # Errors
    /// The connection's.
    pub async fn note_schema_change(&self, change: &SchemaChange, state: &str, error: Option<&str>) -> Result<()> {
        self.execute(&change.sql(self.name.as_str(), state, error)).await.doing(|| "noting a schema change")
    }
}
