//! The record of schema changes that arrived from the source: what became of each.

use super::Store;
use sha2::{Digest, Sha256};

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
    /// Where it stands in the text that the client sent, and that text.
    pub chosen: Option<(String, i64)>,
}

/// What a text is known by in the state, as an expression: it may be long, and hold what is not to be shown.
#[must_use]
pub fn text_digest(text: &str) -> String {
    let digest = Sha256::digest(text.as_bytes());
    quote_literal(&digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

impl SchemaChange {
    /// With its place in the text that the client sent, where that is known.
    #[must_use]
    pub fn chosen(self, text: &str, position: Option<usize>) -> Self {
        let position = position.filter(|_| !text.is_empty()).and_then(|position| i64::try_from(position).ok());
        Self { chosen: position.map(|position| (text.to_owned(), position)), ..self }
    }

    /// Writes it down, as a part of a transaction: `carried`, `found` or `refused`. What a person marked as `skip` stays so.
    #[must_use]
    pub fn sql(&self, move_name: &str, state: &str, error: Option<&str>) -> String {
        let [name, tag, statement, role, state] =
            [move_name, &self.tag, &self.statement, &self.role, state].map(quote_literal);
        let (digest, position) = match &self.chosen {
            Some((text, position)) => (text_digest(text), position.to_string()),
            None => ("NULL".to_owned(), "NULL".to_owned()),
        };
        format!(
            "INSERT INTO pgtandem.ddl AS known (move, lsn, ordinal, tag, statement, role, state, error, text_digest, position)
             VALUES ({name}, '{}', {}, {tag}, {statement}, {role}, {state}, {}, {digest}, {position})
             ON CONFLICT (move, lsn, ordinal) DO UPDATE SET
                 state = CASE known.state WHEN 'skip' THEN 'skip' ELSE excluded.state END,
                 error = CASE known.state WHEN 'skip' THEN known.error ELSE excluded.error END,
                 seen_at = now(), text_digest = excluded.text_digest, position = excluded.position",
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
