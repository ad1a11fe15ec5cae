//! Names of objects and their quoting. A name that reaches SQL went through here.
//! See <https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-IDENTIFIERS>.

use std::fmt;

/// `name` as a quoted identifier. Always quoted: no list of keywords has to be kept.
#[must_use]
pub fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `text` as a string literal that reads the same whatever `standard_conforming_strings` says.
#[must_use]
pub fn quote_literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') { format!(" E'{}'", quoted.replace('\\', "\\\\")) } else { format!("'{quoted}'") }
}

/// The schema and the name of a table, sequence or other object of a schema.
///
/// `Display` prints it quoted, ready for SQL; [`QualifiedName::plain`] is for people.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QualifiedName {
    /// The schema, as the catalog holds it.
    pub schema: String,
    /// The name inside the schema, as the catalog holds it.
    pub name: String,
}

impl QualifiedName {
    /// From the catalog's two columns.
    #[must_use]
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> Self {
        Self { schema: schema.into(), name: name.into() }
    }

    /// `schema.name` without quotes: for logs, metrics and status, never for SQL.
    #[must_use]
    pub fn plain(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }
}

impl fmt::Display for QualifiedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", quote_identifier(&self.schema), quote_identifier(&self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_survive_quotes_dots_and_backslashes() {
        assert_eq!(quote_identifier(r#"a"b.c\d"#), r#""a""b.c\d""#);
        assert_eq!(QualifiedName::new("s.1", "Ta\"b").to_string(), r#""s.1"."Ta""b""#);
    }

    #[test]
    fn literals_survive_quotes_and_backslashes() {
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal(r"a\b'c"), r" E'a\\b''c'");
    }
}
