//! Which statement of a text made a captured change, and running it as it was run on the source.
//!
//! A text may hold several statements that fit what was captured. Three things tell them apart, in this order: the state of the
//! table after each of them; the order in which statements of one text run; and where neither can tell, a person.
//!
//! # After a death in the middle of a text
//!
//! Statements of one text may commit in several transactions. Which of them ran last stands in `pgtandem.ddl`, written in the
//! target transaction that holds the statement's work. So whatever the daemon dies of, the next one finds there exactly the
//! statements whose work is there, and looks for the next change behind the last of them.

use super::describing::{MEANINGFUL, traits};
use super::event::{Event, Table};
use super::statement;
use crate::error::{Class, Doing, Error, Result};
use crate::follow::apply::Applier;
use crate::postgres::{QualifiedName, quote_literal};
use crate::state::text_digest;

/// What a statement is refused with when its work is done already: duplicate column, object, schema, table, function, …
const ALREADY: [&str; 6] = ["42701", "42710", "42P04", "42P06", "42P07", "42723"];
/// … or, of one that drops or renames, when its object is not there: undefined column, function, table, object, schema.
const NOT_THERE: [&str; 5] = ["42703", "42883", "42P01", "42704", "3F000"];

/// The statements of a text that may be the one, the likeliest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Candidates {
    /// The text, and which message of the client it was; empty if there is no such text.
    pub text: String,
    /// Each with its place in the text.
    pub statements: Vec<(usize, String)>,
    /// Some of them may have been rolled back.
    pub rolls_back: bool,
}

impl Candidates {
    /// It is known which one.
    pub(super) fn only(statement: String) -> Self {
        Self { statements: vec![(0, statement)], ..Self::default() }
    }

    /// Statements run in their order: those behind the last one come first. A function may run its text more than once, and
    /// then none is behind.
    pub(super) fn behind(&mut self, last: usize) {
        let before = self.statements.iter().take_while(|(at, _)| *at <= last).count();
        if before < self.statements.len() {
            self.statements.drain(..before);
        }
    }

    /// Whether the order does not tell which one: some may have left nothing behind on the source.
    fn is_out_of_order(&self) -> bool {
        self.statements.len() > 1
            && (self.rolls_back || self.statements.iter().any(|(_, text)| statement::may_do_nothing(text)))
    }

    /// The one that the order tells, for the record.
    pub(super) fn next(&self) -> Option<usize> {
        self.statements.first().map(|(at, _)| *at).filter(|_| !self.is_out_of_order())
    }
}

/// What became of a change.
pub(super) struct Ran {
    pub statement: String,
    pub position: usize,
    /// As the state calls it.
    pub state: &'static str,
}

/// How much a table of the target is like that of the source.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Likeness {
    Same,
    /// As far as columns tell, or nothing can be compared.
    Alike,
    Other,
}

impl Applier {
    /// Leaves out what ran before, as the state has it.
    pub(super) async fn narrow(&mut self, candidates: &mut Candidates) -> Result<()> {
        if candidates.statements.len() < 2 || candidates.text.is_empty() {
            return Ok(());
        }
        let sql = format!(
            "SELECT position::text FROM pgtandem.ddl
             WHERE move = {} AND text_digest = {} AND position IS NOT NULL
             ORDER BY lsn DESC, ordinal DESC LIMIT 1",
            quote_literal(self.settings.move_name.as_str()),
            text_digest(&candidates.text)
        );
        let rows =
            self.pipeline()?.query(&sql).await.doing(|| "looking for the statements of a text that ran before")?;
        let last = rows.first().and_then(|row| row.first()?.as_ref()?.parse().ok());
        if let Some(last) = last {
            candidates.behind(last);
        }
        Ok(())
    }

    /// Runs the statement, inside the savepoint `schema_change`; of several, the one after which the table looks as it did on
    /// the source.
    pub(super) async fn execute_one_of(&mut self, event: &Event, candidates: &Candidates) -> Result<Ran> {
        let several = candidates.statements.len() > 1;
        let wanted =
            event.objects.iter().filter_map(|object| object.table.as_ref()).find(|table| table.columns().is_some());
        let out_of_order = candidates.is_out_of_order();
        let (mut same, mut alike) = (Vec::new(), Vec::new());
        let mut refusal = None;
        for (position, statement) in &candidates.statements {
            match self.attempt(event, statement).await {
                Ok(state) => {
                    let ran = Ran { statement: statement.clone(), position: *position, state };
                    let likeness = if several { self.likeness(wanted).await? } else { Likeness::Same };
                    match likeness {
                        Likeness::Same if !out_of_order => return Ok(ran),
                        Likeness::Same => same.push(ran),
                        Likeness::Alike => alike.push(ran),
                        Likeness::Other => {}
                    }
                }
                Err(error) if alike.is_empty() && refusal.is_none() => refusal = Some(error),
                Err(_) => {}
            }
            self.pipeline()?.query("ROLLBACK TO SAVEPOINT schema_change").await?;
        }
        // Perhaps it was the one that the target refuses: then no other may pass for it that is not the same for certain.
        if let Some(error) = refusal.filter(|_| same.is_empty()) {
            return Err(error);
        }
        let likely = if same.is_empty() { alike } else { same };
        if likely.len() > 1 && out_of_order {
            return Err(Error::new(
                Class::Operator,
                "ddl_refused",
                "the client sent several such statements in one text, of which some may have been rolled back or have had nothing \
                 to do: which of them made this change cannot be told",
            ));
        }
        let Some(chosen) = likely.into_iter().next() else {
            let message =
                "none of the statements that the client sent in one text leaves the table as it is on the source";
            return Err(Error::new(Class::Operator, "ddl_refused", message));
        };
        let state = self.attempt(event, &chosen.statement).await?;
        Ok(Ran { state, ..chosen })
    }

    /// What became of the statement; the target is left as it is afterwards.
    async fn attempt(&mut self, event: &Event, statement: &str) -> Result<&'static str> {
        match self.execute_as(event, statement).await {
            Ok(()) => Ok("carried"),
            Err(error) if is_done_already(&error, statement) => {
                self.pipeline()?.query("ROLLBACK TO SAVEPOINT schema_change").await?;
                tracing::warn!(tag = event.tag, %error, "the target has this schema change already");
                Ok("found")
            }
            Err(error) => Err(error),
        }
    }

    async fn likeness(&mut self, wanted: Option<&Table>) -> Result<Likeness> {
        let Some(table) = wanted else { return Ok(Likeness::Alike) };
        if self.columns_of(&table.qualified()).await? != table.columns().unwrap_or_default() {
            return Ok(Likeness::Other);
        }
        let name = quote_literal(&table.qualified().to_string());
        let sql = traits(&format!("pg_catalog.to_regclass({name})"));
        let rows = self.pipeline()?.query(&sql).await.doing(|| "looking at a table")?;
        let same = table.traits.is_some() && rows.first().and_then(|row| row.first()) == Some(&table.traits);
        Ok(if same { Likeness::Same } else { Likeness::Alike })
    }

    async fn columns_of(&mut self, table: &QualifiedName) -> Result<Vec<(String, String)>> {
        let sql = format!(
            "SELECT attname::text, pg_catalog.format_type(atttypid, atttypmod) FROM pg_catalog.pg_attribute
             WHERE attrelid = pg_catalog.to_regclass({}) AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            quote_literal(&table.to_string())
        );
        let rows = self.pipeline()?.query(&sql).await.doing(|| "looking at the columns of a table")?;
        Ok(rows.iter().filter_map(|row| Some((row.first()?.clone()?, row.get(1)?.clone()?))).collect())
    }

    /// As the role that ran it, in its search path and under its settings; afterwards everything is as before. If the server
    /// refuses, the savepoint brings that back.
    async fn execute_as(&mut self, event: &Event, statement: &str) -> Result<()> {
        let own = self
            .pipeline()?
            .query("SELECT pg_catalog.current_setting('role'), pg_catalog.current_setting('search_path')")
            .await?;
        let own = |at: usize| own.first().and_then(|row| row.get(at).cloned().flatten()).unwrap_or_default();
        let (own_role, own_path) = (own(0), own(1));
        let (theirs, ours) = self.settings_for(event).await?;
        let role = event.role.as_deref().unwrap_or("none");
        let path = event.path.as_deref().unwrap_or_default();
        // The role comes last and goes first: it may be one that may set little.
        let mut before = theirs;
        before.extend([("search_path".to_owned(), path.to_owned()), ("role".to_owned(), role.to_owned())]);
        let mut after = vec![("role".to_owned(), own_role), ("search_path".to_owned(), own_path)];
        after.extend(ours);
        self.pipeline()?
            .query(&set_locally(&before))
            .await
            .doing(|| format!("becoming the role {role} with the settings of its session"))?;
        self.pipeline()?.one(statement).await?;
        self.pipeline()?.query(&set_locally(&after)).await?;
        Ok(())
    }

    /// Those settings of the source's session that the target knows and that are others here, and what they are here.
    async fn settings_for(&mut self, event: &Event) -> Result<(Vec<Setting>, Vec<Setting>)> {
        let names = MEANINGFUL.map(quote_literal).join(", ");
        let sql = format!(
            "SELECT name, setting, (SELECT pg_catalog.json_agg(spcname)::text FROM pg_catalog.pg_tablespace)
             FROM pg_catalog.pg_settings WHERE name IN ({names}) ORDER BY name"
        );
        let rows = self.pipeline()?.query(&sql).await.doing(|| "looking at the settings")?;
        let (mut theirs, mut ours) = (Vec::new(), Vec::new());
        for row in &rows {
            let [Some(name), Some(own), tablespaces] = row.as_slice() else { continue };
            let Some(Some(wanted)) = event.settings.get(name) else { continue };
            if wanted == own {
                continue;
            }
            if name == "default_tablespace" && !wanted.is_empty() && !lists(tablespaces.as_deref(), wanted) {
                // As in the restore of the schema.
                tracing::info!(tablespace = wanted, "the target has no such tablespace; its default one is used");
                continue;
            }
            theirs.push((name.clone(), wanted.clone()));
            ours.push((name.clone(), own.clone()));
        }
        Ok((theirs, ours))
    }
}

/// Name and value.
type Setting = (String, String);

fn set_locally(settings: &[Setting]) -> String {
    let each = |(name, value): &Setting| {
        format!("pg_catalog.set_config({}, {}, true)", quote_literal(name), quote_literal(value))
    };
    format!("SELECT {}", settings.iter().map(each).collect::<Vec<_>>().join(", "))
}

/// Whether a JSON list of texts holds this one.
fn lists(json: Option<&str>, wanted: &str) -> bool {
    json.and_then(|json| serde_json::from_str::<Vec<String>>(json).ok())
        .is_some_and(|names| names.iter().any(|name| name == wanted))
}

fn is_done_already(error: &Error, statement: &str) -> bool {
    let Some(sqlstate) = error.sqlstate() else { return false };
    // Of several actions some may not be done.
    if statement::has_several_parts(statement) {
        return false;
    }
    let words = statement::first_words(statement, usize::MAX);
    if words.iter().any(|word| word == "OWNED" || word == "OWNER") {
        return false;
    }
    ALREADY.contains(&sqlstate)
        || NOT_THERE.contains(&sqlstate) && words.iter().any(|word| word == "DROP" || word == "RENAME")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(statements: &[&str]) -> Candidates {
        let statements = statements.iter().enumerate().map(|(at, text)| (at, (*text).to_owned())).collect();
        Candidates { text: "1 2 …".into(), statements, rolls_back: false }
    }

    #[test]
    fn what_ran_before_is_left_out_unless_that_is_everything() {
        let mut found = candidates(&["a", "b", "c"]);
        found.behind(0);
        assert_eq!(found.next(), Some(1));
        found.behind(2);
        assert_eq!(found.statements.len(), 2);
    }

    #[test]
    fn the_order_tells_nothing_where_a_statement_may_have_done_nothing() {
        assert_eq!(candidates(&["alter table t drop constraint if exists c", "alter table t add x int"]).next(), None);
        assert_eq!(candidates(&["alter table t drop constraint if exists c"]).next(), Some(0));
        assert_eq!(Candidates { rolls_back: true, ..candidates(&["a", "b"]) }.next(), None);
    }
}
