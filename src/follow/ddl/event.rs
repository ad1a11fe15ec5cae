//! What the capture says about one statement, and what is to be done for it. Pure.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::Deserialize;

use super::choice::Candidates;
use super::statement;
use crate::config::Scope;
use crate::postgres::{QualifiedName, quote_identifier};

/// One firing of an event trigger; see [`super::capture`].
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Event {
    event: String,
    /// The command tag.
    pub tag: String,
    /// Nothing, for a background worker that does not say what it runs.
    #[serde(default, deserialize_with = "text_or_nothing")]
    query: String,
    #[serde(default)]
    context: String,
    /// Process and time of the client's message: the statements of one text have it in common.
    #[serde(default)]
    session: String,
    /// Who made the change.
    pub role: Option<String>,
    /// The search path in which it was made.
    pub path: Option<String>,
    /// The settings under which it was made; none where the source does not know one.
    #[serde(default)]
    pub settings: HashMap<String, Option<String>>,
    /// Whether backslashes in its strings mean themselves: `standard_conforming_strings`.
    #[serde(default = "yes")]
    plain_backslashes: bool,
    #[serde(default)]
    pub objects: Vec<Object>,
    /// Tables that nothing identifies any more, and those that something identifies again.
    #[serde(default)]
    pub identities: Option<Identities>,
    /// Why the capture could not describe the statement.
    pub failed: Option<String>,
}

fn text_or_nothing<'d, D: serde::Deserializer<'d>>(deserializer: D) -> Result<String, D::Error> {
    Option::<String>::deserialize(deserializer).map(Option::unwrap_or_default)
}

fn yes() -> bool {
    true
}

/// Tables by schema and name; see [`super::publishing`].
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Identities {
    /// Their updates and deletes are not carried from here on.
    lost: Vec<(String, String)>,
    /// Theirs are carried again.
    gained: Vec<(String, String)>,
    /// They could not be published as they should be: changes may be missing from here on.
    #[serde(default)]
    failed: Vec<(String, String)>,
}

impl Identities {
    pub(super) fn lost(&self) -> impl Iterator<Item = QualifiedName> {
        names(&self.lost)
    }

    pub(super) fn gained(&self) -> impl Iterator<Item = QualifiedName> {
        names(&self.gained)
    }

    pub(super) fn failed(&self) -> impl Iterator<Item = QualifiedName> {
        names(&self.failed)
    }
}

fn names(pairs: &[(String, String)]) -> impl Iterator<Item = QualifiedName> {
    pairs.iter().map(|(schema, name)| QualifiedName::new(schema.clone(), name.clone()))
}

/// One object that was made, changed or dropped.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Object {
    #[serde(rename = "type")]
    kind: String,
    schema: Option<String>,
    identity: Option<String>,
    /// The table that it is, or belongs to.
    pub table: Option<Table>,
    /// Why a table is rewritten: the bits of `pg_event_trigger_table_rewrite_reason()`.
    reason: Option<i32>,
}

/// A relation as it stood right after the statement.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Table {
    schema: String,
    name: String,
    kind: String,
    permanent: bool,
    above: Vec<(String, String)>,
    /// Names; types; collations that are not the type's own.
    columns: Vec<(String, String, Option<String>)>,
    /// See [`super::describing::traits`].
    #[serde(default)]
    pub traits: Option<String>,
    /// Values of columns that were added without touching the rows: schema, table, column, an array of the value.
    pub missing: Vec<(String, String, String, String)>,
}

impl Table {
    pub(super) fn qualified(&self) -> QualifiedName {
        QualifiedName::new(self.schema.clone(), self.name.clone())
    }

    fn above(&self) -> Vec<QualifiedName> {
        self.above.iter().map(|(schema, name)| QualifiedName::new(schema.clone(), name.clone())).collect()
    }

    /// Names and types of its columns, in order; `None` if it is no table.
    pub(super) fn columns(&self) -> Option<Vec<(String, String)>> {
        let columns = || self.columns.iter().map(|(name, kind, _)| (name.clone(), kind.clone())).collect();
        matches!(self.kind.as_str(), "r" | "p").then(columns)
    }

    /// Whether it is a table of the move that stores rows.
    pub(super) fn moves(&self, scope: &Scope) -> bool {
        self.kind == "r" && self.permanent && scope.contains(&self.qualified(), &self.above())
    }
}

/// What is to be done for an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Deed {
    /// It concerns nothing of the move, or another event brings it.
    Nothing,
    /// The statement that follows writes every row of this table anew; the bits say why.
    Rewrite(QualifiedName, i32),
    /// One of these is run on the target.
    Run(Candidates),
    /// This statement is run, and the rows that a query put into the table are copied.
    MakeAndCopy(String),
}

impl Event {
    pub(super) fn read(text: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(text).map_err(|error| error.to_string())
    }

    /// For a person: what the client sent, or less where that may hold a password.
    pub(super) fn shown(&self, statement: &str) -> String {
        let secret = ["USER MAPPING", "SERVER", "FOREIGN"].iter().any(|word| self.tag.contains(word));
        if secret { format!("{} (options hidden)", self.tag) } else { statement.chars().take(500).collect() }
    }

    /// Of what the client sent, the statements that it may be, where none of them could be chosen. Others beside them may hold what
    /// is nobody's business.
    pub(super) fn shown_text(&self) -> String {
        let fits = |statement: &&str| statement::has_tag(statement, &self.tag);
        let statements: Vec<&str> = statement::split(&self.query).into_iter().filter(fits).collect();
        if statements.is_empty() { self.tag.clone() } else { self.shown(&statements.join("; ")) }
    }

    /// Decides what is to be done.
    ///
    /// # Errors
    /// Why the statement is not known.
    pub(super) fn deed(&self, scope: &Scope) -> Result<Deed, String> {
        if let Some(why) = &self.failed {
            return Err(format!("the source could not describe it: {why}"));
        }
        if self.event == "table_rewrite" {
            let rewrite = self.objects.first().and_then(|o| Some((o.schema.clone()?, o.identity.clone()?, o.reason?)));
            let (schema, name, reason) = rewrite.ok_or("the source does not say which table is rewritten")?;
            return Ok(Deed::Rewrite(QualifiedName::new(schema, name), reason));
        }
        // Materialized views are filled when the first copy is complete, and again at the cutover.
        if matches!(self.tag.as_str(), "REINDEX" | "CLUSTER" | "REFRESH MATERIALIZED VIEW") || self.is_out_of(scope) {
            return Ok(Deed::Nothing);
        }
        // Without one it would be made as whoever applies, who may do more.
        if self.role.is_none() {
            return Err("the source does not say who made it".into());
        }
        if matches!(self.tag.as_str(), "CREATE TABLE AS" | "SELECT INTO") {
            let table = self.objects.iter().find_map(|object| object.table.as_ref());
            return table
                .map(|table| Deed::MakeAndCopy(table.creation()))
                .ok_or_else(|| "its table is not known".into());
        }
        let Some(mut candidates) = self.candidates()? else { return Ok(Deed::Nothing) };
        if matches!(self.tag.as_str(), "CREATE INDEX" | "DROP INDEX" | "ALTER TABLE") {
            for (_, text) in &mut candidates.statements {
                *text = statement::without_concurrently(text);
            }
        }
        Ok(Deed::Run(candidates))
    }

    /// Whether all that it is about belongs to tables outside the scope. What was dropped does not say where it belonged.
    fn is_out_of(&self, scope: &Scope) -> bool {
        let outside = |object: &Object| {
            object.table.as_ref().is_some_and(|table| {
                matches!(table.kind.as_str(), "r" | "p") && !scope.contains(&table.qualified(), &table.above())
            })
        };
        !self.objects.is_empty() && self.objects.iter().all(outside)
    }

    /// The statement itself, or those that it may be; `None` for a part of an extension's script, which comes with the
    /// extension.
    fn candidates(&self) -> Result<Option<Candidates>, String> {
        let text = match statement::inner(&self.context) {
            Ok(text) => text.unwrap_or(&self.query),
            Err(()) => return Err("it was run inside a function that does not tell its statements".into()),
        };
        let text = if self.plain_backslashes {
            Cow::Borrowed(text)
        } else {
            Cow::Owned(statement::with_plain_backslashes(text))
        };
        let text: &str = &text;
        let statements = statement::split(text);
        let with_tag: Vec<(usize, &str)> =
            statements.iter().copied().enumerate().filter(|(_, s)| statement::has_tag(s, &self.tag)).collect();
        if with_tag.is_empty() {
            let of_extension = |s: &&&str| statement::first_words(s, 2).get(1).is_some_and(|word| word == "EXTENSION");
            return match statements.iter().find(of_extension) {
                Some(_) => Ok(None),
                None => Err(format!("no {} is found in what the client sent", self.tag)),
            };
        }
        let names: Vec<String> = self.objects.iter().filter_map(Object::bare_name).collect();
        let is_named = |s: &str| names.iter().any(|name| statement::mentions(s, name));
        let mut found: Vec<(usize, &str)> = with_tag.iter().copied().filter(|(_, s)| is_named(s)).collect();
        if found.is_empty() {
            found = with_tag;
        }
        let rolls_back = statements
            .iter()
            .any(|s| statement::first_words(s, 1).first().is_some_and(|word| word == "ROLLBACK" || word == "ABORT"));
        let statements = found.into_iter().map(|(at, s)| (at, s.to_owned())).collect();
        Ok(Some(Candidates { text: format!("{} {text}", self.session), statements, rolls_back }))
    }
}

impl Object {
    /// Its own name, without schema, arguments and quotes.
    fn bare_name(&self) -> Option<String> {
        if let Some(table) = self.table.as_ref().filter(|_| self.kind == "table") {
            return Some(table.name.clone());
        }
        let identity = self.identity.as_deref()?;
        let mut name = String::new();
        let mut quoted = false;
        for c in identity.chars() {
            match c {
                '"' => quoted = !quoted,
                '.' if !quoted => name.clear(),
                '(' | ' ' if !quoted => break,
                c => name.push(c),
            }
        }
        Some(name)
    }
}

impl Table {
    /// A table like this one, empty.
    fn creation(&self) -> String {
        let column = |(name, kind, collation): &(String, String, Option<String>)| match collation {
            Some(collation) => format!("{} {kind} COLLATE {collation}", quote_identifier(name)),
            None => format!("{} {kind}", quote_identifier(name)),
        };
        let columns = self.columns.iter().map(column).collect::<Vec<_>>().join(", ");
        let unlogged = if self.permanent { "" } else { "UNLOGGED " };
        format!("CREATE {unlogged}TABLE {} ({columns})", self.qualified())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(tag: &str, query: &str, identity: &str) -> Event {
        let event = json!({
            "event": "ddl_command_end", "tag": tag, "query": query, "session": "1 2", "role": "app",
            "context": "PL/pgSQL function pgtandem.capture_app() line 1 at GET DIAGNOSTICS",
            "objects": [{"type": "table", "schema": "public", "identity": identity, "table": null}],
        });
        Event::read(event.to_string().as_bytes()).unwrap()
    }

    fn candidates(event: &Event) -> Option<Candidates> {
        match event.deed(&Scope::default()).unwrap() {
            Deed::Run(candidates) => Some(candidates),
            _ => None,
        }
    }

    /// The likeliest statement.
    fn run(event: &Event) -> Option<String> {
        Some(candidates(event)?.statements.first()?.1.clone())
    }

    #[test]
    fn each_statement_of_a_text_is_found_by_its_tag_and_its_name() {
        let text = "create table a (); insert into a default values; create table b (); alter table a add x int; alter table a drop x";
        assert_eq!(run(&event("CREATE TABLE", text, "public.a")).unwrap(), "create table a ()");
        assert_eq!(run(&event("CREATE TABLE", text, "public.b")).unwrap(), "create table b ()");
        let mut both = candidates(&event("ALTER TABLE", text, "public.a")).unwrap();
        let place = both.next().unwrap();
        assert_eq!(both.statements[0].1, "alter table a add x int");
        both.behind(place);
        assert_eq!(both.statements, [(4, "alter table a drop x".to_owned())]);
    }

    #[test]
    fn strings_are_read_as_the_source_read_them() {
        let mut event = event("CREATE TABLE", r"create table a (v text default '\'; drop table b --')", "public.a");
        event.plain_backslashes = false;
        assert_eq!(run(&event).unwrap(), r"create table a (v text default E'\'; drop table b --')");
    }

    #[test]
    fn what_an_extension_makes_comes_with_the_extension() {
        let run = |tag| run(&event(tag, "alter extension x update", "public.f()"));
        assert_eq!(run("DROP FUNCTION"), None);
        assert_eq!(run("ALTER EXTENSION").as_deref(), Some("alter extension x update"));
    }

    #[test]
    fn a_statement_that_is_not_in_the_text_is_refused() {
        let refused = event("CREATE TABLE", "select make()", "public.t").deed(&Scope::default());
        assert!(refused.is_err_and(|why| why.contains("CREATE TABLE")));
    }

    #[test]
    fn options_of_a_server_are_not_shown() {
        let event = event("CREATE USER MAPPING", "create user mapping … password 'x'", "u");
        assert_eq!(event.shown_text(), "CREATE USER MAPPING (options hidden)");
    }
}
