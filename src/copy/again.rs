//! Copying tables again: which tables the words of a person mean.
//!
//! What follows is the ordinary copy: a table that the state does not call copied is copied under a new cut, and the
//! stream's changes from before that cut are skipped.

use crate::config::TablePattern;
use crate::error::{Class, Error, Result};
use crate::postgres::{QualifiedName, Server, catalog};
use crate::state::Store;

/// The tables of the move that `words` name: `schema.table`, without a schema in `public`, `*` for any run of characters. A
/// partitioned table stands for its partitions.
///
/// # Errors
/// Class usage: a word is no name. Class no: it names no table of the move. The connections'.
pub async fn named(source: &Server, store: &Store, words: &[String]) -> Result<Vec<QualifiedName>> {
    let session = source.connect("catalog").await?;
    let there = catalog::tables(&*session).await?;
    let known = store.tables().await?;
    let mut found = Vec::new();
    for word in words {
        let pattern = TablePattern::new(word)
            .map_err(|why| Error::new(Class::Usage, "table_name", why).hint("write schema.table"))?;
        let named = |name: &QualifiedName| pattern.matches(&name.schema, &name.name);
        let before = found.len();
        for record in &known {
            let above = there.iter().find(|table| table.name == record.name).map(|table| table.above.as_slice());
            if named(&record.name) || above.unwrap_or_default().iter().any(named) {
                found.push(record.name.clone());
            }
        }
        if found.len() == before {
            let message = format!("{word} is no table of the move {}", store.name());
            return Err(Error::new(Class::No, "table_unknown", message).hint("`pgtandem status --json` lists them"));
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}
