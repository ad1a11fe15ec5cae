//! Running a captured statement on the target, and telling the state what it changed.

use std::collections::HashMap;

use super::event::{Candidates, Deed, Event, Table};
use crate::config::Ddl;
use crate::error::{Class, Doing, Error, Result};
use crate::follow::apply::Applier;
use crate::follow::change::Position;
use crate::postgres::wire::TextRow;
use crate::postgres::{Lsn, QualifiedName, quote_literal};
use crate::schema::hold_back;
use crate::state::{SchemaChange, copied_sql, copying_sql, hold_back_sql};

/// What a statement is refused with when its work is done already: duplicate column, object, schema, table, function, …
const ALREADY: [&str; 6] = ["42701", "42710", "42P04", "42P06", "42P07", "42723"];
/// … or, of one that drops or renames, when its object is not there: undefined column, function, table, object, schema.
const NOT_THERE: [&str; 5] = ["42703", "42883", "42P01", "42704", "3F000"];

/// `pg_event_trigger_table_rewrite_reason()`: a default that is not constant, and a change of type.
const NEW_DEFAULT: i32 = 2;
const NEW_TYPE: i32 = 4;

/// A table of the move and its oid on the target.
struct Known {
    name: QualifiedName,
    oid: String,
}

impl Applier {
    /// A description came through the capture's table.
    pub(in crate::follow) async fn schema_change(&mut self, text: &[u8]) -> Result<()> {
        let at = self.transaction.ok_or_else(|| Error::bug("a schema change outside a transaction"))?;
        self.schema.ordinal += 1;
        let event =
            Event::read(text).map_err(|why| Error::bug(format!("a captured schema change cannot be read: {why}")))?;
        if self.settings.ddl == Ddl::Stop {
            let change = self.describe(at, &event, &event.shown_text());
            let why = "follow.ddl is \"stop\"";
            return Err(self.refused(at, change, Error::new(Class::Operator, "ddl_refused", why)).await);
        }
        match event.deed(&self.settings.scope, &self.schema.seen) {
            Ok(Deed::Nothing) => {
                self.open_batch().await?;
                self.schema.in_batch = true;
                self.watch_identities(&event).await
            }
            Ok(Deed::Rewrite(table, reason)) => {
                *self.schema.rewritten.entry(table).or_default() |= reason;
                Ok(())
            }
            Ok(Deed::Run(candidates)) => self.replay(at, &event, &candidates, false).await,
            Ok(Deed::MakeAndCopy(statement)) => {
                let only = Candidates { statements: vec![(0, statement)], ..Candidates::default() };
                self.replay(at, &event, &only, true).await
            }
            Err(why) => {
                let change = self.describe(at, &event, &event.shown_text());
                if self.is_to_be_skipped(at).await? {
                    return Ok(());
                }
                Err(self.refused(at, change, Error::new(Class::Operator, "ddl_refused", why)).await)
            }
        }
    }

    async fn replay(&mut self, at: Position, event: &Event, candidates: &Candidates, filled: bool) -> Result<()> {
        let Some((_, statement)) = candidates.statements.first() else { return Ok(()) };
        self.open_batch().await?;
        self.schema.in_batch = true;
        let change = self.describe(at, event, &event.shown(statement));
        if self.is_to_be_skipped(at).await? {
            tracing::warn!(statement = change.statement, "a schema change is left out, as asked");
            if let Some((position, _)) = candidates.statements.first() {
                self.schema.seen.was(candidates, *position);
            }
            return self.watch_identities(event).await;
        }
        let before = self.known_tables().await?;
        let mut again = self.written_anew(event, statement).await?;
        self.pipeline()?.query("SAVEPOINT schema_change").await?;
        let (statement, state) = match self.execute_one_of(event, candidates).await {
            Ok(ran) => ran,
            Err(error) => return Err(self.refused(at, change, error).await),
        };
        self.pipeline()?.query("RELEASE SAVEPOINT schema_change").await?;
        let change = self.describe(at, event, &event.shown(&statement));
        tracing::info!(statement = change.statement, lsn = %at.commit_lsn, state, "schema change");
        again.extend(self.other_values(event).await?);
        self.take_note(at, event, &before, filled).await?;
        for table in again {
            self.copy_again(&table).await?;
        }
        self.watch_identities(event).await?;
        self.hold_back().await.doing(|| "holding back the triggers of a schema change")?;
        let note = change.sql(self.settings.move_name.as_str(), state, None);
        self.pipeline()?.query(&note).await.doing(|| "noting a schema change")?;
        // What was known of shapes and types may be another by now.
        self.relations.values_mut().for_each(|(_, plan)| *plan = None);
        self.types.clear();
        Ok(())
    }

    fn describe(&self, at: Position, event: &Event, shown: &str) -> SchemaChange {
        SchemaChange {
            lsn: at.commit_lsn,
            ordinal: self.schema.ordinal,
            tag: event.tag.clone(),
            statement: shown.to_owned(),
            role: event.role.clone().unwrap_or_default(),
        }
    }

    /// A person may have said that this one is to be left out.
    async fn is_to_be_skipped(&mut self, at: Position) -> Result<bool> {
        let question = format!(
            "SELECT 1 FROM pgtandem.ddl WHERE move = {} AND lsn = '{}' AND ordinal = {} AND state = 'skip'",
            quote_literal(self.settings.move_name.as_str()),
            at.commit_lsn,
            self.schema.ordinal
        );
        Ok(!self.pipeline()?.query(&question).await.doing(|| "looking for schema changes to leave out")?.is_empty())
    }

    /// The error for whoever must help, which also stands in the state, where it can be marked to be left out.
    async fn refused(&self, at: Position, change: SchemaChange, error: Error) -> Error {
        let name = self.settings.move_name.as_str();
        let said = error.to_string();
        if let Err(error) = self.store.note_schema_change(&change, "refused", Some(&said)).await {
            tracing::warn!(%error, "a refused schema change could not be noted in the state");
        }
        let message = format!(
            "a schema change of transaction {} (committed at {}, by role {}) cannot be made on the target: {}: {said}",
            at.xid, at.commit_lsn, change.role, change.statement
        );
        Error::new(Class::Operator, "ddl_refused", message).hint(format!(
            "mend the cause on the target, and it is tried again. Or make the change there by another way and leave this one out: \
             UPDATE pgtandem.ddl SET state = 'skip' WHERE move = '{name}' AND lsn = '{}' AND ordinal = {} (on the target); \
             `pgtandem resync` copies a table again whose rows it changed",
            at.commit_lsn, change.ordinal
        ))
    }

    /// Runs the statement; of several, the one after which the table looks as it did on the source. Returns it, and what became
    /// of it.
    async fn execute_one_of(&mut self, event: &Event, candidates: &Candidates) -> Result<(String, &'static str)> {
        let several = candidates.statements.len() > 1;
        let wanted = event
            .objects
            .iter()
            .find_map(|object| object.table.as_ref())
            .and_then(|t| Some((t.qualified(), t.columns()?)));
        if several && candidates.rolls_back && wanted.is_none() {
            let message = "the client sent several such statements in one text and rolled some back: which one it was is not known";
            return Err(Error::new(Class::Operator, "ddl_refused", message));
        }
        let mut refusal = None;
        for (position, statement) in &candidates.statements {
            let outcome = match self.execute_as(event, statement).await {
                Ok(()) => Ok("carried"),
                Err(error) if is_done_already(&error, statement) => {
                    self.pipeline()?.query("ROLLBACK TO SAVEPOINT schema_change").await?;
                    tracing::warn!(tag = event.tag, %error, "the target has this schema change already");
                    Ok("found")
                }
                Err(error) => Err(error),
            };
            let fits = match (&outcome, &wanted) {
                (Ok(_), Some((table, columns))) if several => self.columns_of(table).await? == *columns,
                (Ok(_), _) => true,
                (Err(_), _) => false,
            };
            match outcome {
                Ok(state) if fits => {
                    self.schema.seen.was(candidates, *position);
                    return Ok((statement.clone(), state));
                }
                Ok(_) => {}
                Err(error) => refusal = refusal.or(Some(error)),
            }
            self.pipeline()?.query("ROLLBACK TO SAVEPOINT schema_change").await?;
        }
        Err(refusal.unwrap_or_else(|| {
            let message =
                "none of the statements that the client sent in one text leaves the table as it is on the source";
            Error::new(Class::Operator, "ddl_refused", message)
        }))
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

    async fn execute_as(&mut self, event: &Event, statement: &str) -> Result<()> {
        let own = self
            .pipeline()?
            .query("SELECT pg_catalog.current_setting('role'), pg_catalog.current_setting('search_path')")
            .await?;
        let own = |at: usize| own.first().and_then(|row| row.get(at).cloned().flatten()).unwrap_or_default();
        let set = |role: &str, path: &str| {
            format!(
                "SELECT pg_catalog.set_config('search_path', {}, true), pg_catalog.set_config('role', {}, true)",
                quote_literal(path),
                quote_literal(role)
            )
        };
        let (role, path) = (event.role.as_deref().unwrap_or("none"), event.path.as_deref().unwrap_or_default());
        self.pipeline()?.query(&set(role, path)).await.doing(|| format!("becoming the role {role}"))?;
        self.pipeline()?.query(statement).await?;
        self.pipeline()?.query(&set(&own(0), &own(1))).await?;
        Ok(())
    }

    async fn known_tables(&mut self) -> Result<Vec<Known>> {
        let sql = format!(
            "SELECT t.schema_name, t.table_name, c.oid::text
             FROM pgtandem.copy_table t
             JOIN pg_catalog.pg_namespace n ON n.nspname = t.schema_name
             JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = t.table_name
             WHERE t.move = {}",
            quote_literal(self.settings.move_name.as_str())
        );
        let rows = self.pipeline()?.query(&sql).await.doing(|| "looking for the tables of the move on the target")?;
        Ok(rows.iter().filter_map(|row| Some(Known { name: name(row, 0)?, oid: row.get(2)?.clone()? })).collect())
    }

    /// Of the tables that the statement writes anew, those whose values may come out another way here.
    async fn written_anew(&mut self, event: &Event, statement: &str) -> Result<Vec<QualifiedName>> {
        let mut again = Vec::new();
        if !event.tag.starts_with("ALTER ") {
            return Ok(again);
        }
        for (table, reason) in std::mem::take(&mut self.schema.rewritten) {
            let plain =
                reason & NEW_DEFAULT == 0 && (reason & NEW_TYPE == 0 || self.is_plain(&table, statement).await?);
            if !plain {
                again.push(table);
            }
        }
        Ok(again)
    }

    /// Whether a change of type gives the same on both sides: by the server's own cast, between types whose text is the same
    /// under every setting.
    async fn is_plain(&mut self, table: &QualifiedName, statement: &str) -> Result<bool> {
        if super::statement::first_words(statement, usize::MAX).iter().any(|word| word == "USING") {
            return Ok(false);
        }
        let sql = format!(
            "SELECT 1 FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
             WHERE a.attrelid = pg_catalog.to_regclass({}) AND a.attnum > 0 AND NOT a.attisdropped
               AND (t.typcategory NOT IN ('N', 'S', 'B') OR t.oid >= 10000 OR t.typname ~ '^(money|float|reg|oid)')",
            quote_literal(&table.to_string())
        );
        Ok(self.pipeline()?.query(&sql).await.doing(|| "looking at the types of a table")?.is_empty())
    }

    /// Tables in whose old rows an added column has another value than on the source.
    async fn other_values(&mut self, event: &Event) -> Result<Vec<QualifiedName>> {
        let mut wanted: HashMap<QualifiedName, HashMap<String, String>> = HashMap::new();
        for (schema, table, column, value) in
            event.objects.iter().filter_map(|o| o.table.as_ref()).flat_map(|t| &t.missing)
        {
            let table = QualifiedName::new(schema.clone(), table.clone());
            wanted.entry(table).or_default().insert(column.clone(), value.clone());
        }
        let mut again = Vec::new();
        for (table, values) in wanted {
            let sql = format!(
                "SELECT attname::text, attmissingval::text FROM pg_catalog.pg_attribute
                 WHERE attrelid = pg_catalog.to_regclass({}) AND atthasmissing",
                quote_literal(&table.to_string())
            );
            let rows = self.pipeline()?.query(&sql).await.doing(|| "looking at the columns of a table")?;
            let differs = rows.iter().any(|row| {
                let text = |at: usize| row.get(at).cloned().flatten();
                text(0).and_then(|column| values.get(&column).map(|wanted| Some(wanted) != text(1).as_ref()))
                    == Some(true)
            });
            if differs {
                again.push(table);
            }
        }
        Ok(again)
    }

    /// Tells the state, and those who watch, which tables came, went or have another name.
    async fn take_note(&mut self, at: Position, event: &Event, before: &[Known], filled: bool) -> Result<()> {
        let oids = before.iter().map(|known| known.oid.as_str()).collect::<Vec<_>>().join(",");
        let sql = format!(
            "SELECT n.nspname::text, c.relname::text, c.oid::text
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE c.oid = ANY ('{{{oids}}}'::oid[]) AND c.relpersistence = 'p'"
        );
        let rows = self.pipeline()?.query(&sql).await.doing(|| "looking for the tables of the move on the target")?;
        let now: HashMap<String, QualifiedName> =
            rows.iter().filter_map(|row| Some((row.get(2)?.clone()?, name(row, 0)?))).collect();
        for known in before {
            match now.get(&known.oid) {
                None => self.forget(&known.name).await?,
                Some(name) if *name != known.name => self.rename(&known.name, name).await?,
                Some(_) => {}
            }
        }
        let known: Vec<&QualifiedName> = now.values().collect();
        let tables = event.objects.iter().filter_map(|object| object.table.as_ref());
        let new: Vec<QualifiedName> = tables
            .filter(|table| table.moves(&self.settings.scope))
            .map(Table::qualified)
            .filter(|name| !known.contains(&name))
            .collect();
        for name in new {
            // A table that was there before, outside the move, brings rows along.
            let empty = !filled && event.tag.starts_with("CREATE ");
            self.begin_table(&name, at, empty).await?;
        }
        Ok(())
    }

    /// A table that nothing identifies is compared behind the fence of the cutover. When something identifies it again, it is
    /// copied: what was updated in between was not carried.
    async fn watch_identities(&mut self, event: &Event) -> Result<()> {
        let Some(identities) = &event.identities else { return Ok(()) };
        let move_name = quote_literal(self.settings.move_name.as_str());
        for table in identities.lost() {
            let [schema, name] = [&table.schema, &table.name].map(|part| quote_literal(part));
            let sql = format!(
                "INSERT INTO pgtandem.unkeyed_table (move, schema_name, table_name, changes)
                 VALUES ({move_name}, {schema}, {name}, 0) ON CONFLICT DO NOTHING"
            );
            self.pipeline()?.query(&sql).await.doing(|| "watching a table without a replica identity")?;
        }
        for table in identities.gained() {
            let sql = format!("DELETE FROM pgtandem.unkeyed_table WHERE {}", self.row_of(&table));
            self.pipeline()?.query(&sql).await.doing(|| "watching a table without a replica identity")?;
            self.copy_again(&table).await?;
        }
        Ok(())
    }

    async fn begin_table(&mut self, table: &QualifiedName, at: Position, empty: bool) -> Result<()> {
        let move_name = self.settings.move_name.as_str();
        let sql = copied_sql(move_name, table, at.commit_lsn, 0, 0);
        self.pipeline()?.query(&sql).await.doing(|| format!("taking in table {}", table.plain()))?;
        self.settings.cuts.insert(table.clone(), at.commit_lsn);
        self.moved.change(|moved| {
            moved.insert(table.clone());
        });
        if empty { Ok(()) } else { self.copy_again(table).await }
    }

    /// Triggers, rules and identities that came with the statement are disabled before the next row.
    async fn hold_back(&mut self) -> Result<()> {
        let mut found = Vec::new();
        for (kind, question) in hold_back::questions() {
            for row in self.pipeline()?.query(&question).await? {
                found.push(hold_back::object(kind, &row.into_iter().flatten().collect::<Vec<_>>()));
            }
        }
        if found.is_empty() {
            return Ok(());
        }
        let sql = hold_back_sql(self.settings.move_name.as_str(), &found);
        self.pipeline()?.query(&sql).await.map(drop)
    }

    async fn forget(&mut self, table: &QualifiedName) -> Result<()> {
        let sql =
            ["copy_table", "unkeyed_table"].map(|of| format!("DELETE FROM pgtandem.{of} WHERE {}", self.row_of(table)));
        self.pipeline()?.query(&sql.join("; ")).await.doing(|| format!("letting go of table {}", table.plain()))?;
        self.settings.cuts.remove(table);
        self.moved.change(|moved| {
            moved.remove(table);
        });
        Ok(())
    }

    async fn rename(&mut self, old: &QualifiedName, new: &QualifiedName) -> Result<()> {
        let [schema, name] = [&new.schema, &new.name].map(|part| quote_literal(part));
        let mut sql = ["copy_table", "unkeyed_table"]
            .map(|of| {
                format!(
                    "UPDATE pgtandem.{of} SET schema_name = {schema}, table_name = {name} WHERE {}; ",
                    self.row_of(old)
                )
            })
            .concat();
        let [plain_old, plain_new, quoted_old, quoted_new] =
            [old.plain(), new.plain(), old.to_string() + " ", new.to_string() + " "].map(|text| quote_literal(&text));
        sql.push_str(&format!(
            "UPDATE pgtandem.held_back SET what = replace(what, {plain_old}, {plain_new}),
                    enable = replace(enable, {quoted_old}, {quoted_new}), disable = replace(disable, {quoted_old}, {quoted_new})
             WHERE move = {} AND disable LIKE '%' || {quoted_old} || '%'",
            quote_literal(self.settings.move_name.as_str())
        ));
        self.pipeline()?.query(&sql).await.doing(|| format!("renaming table {}", old.plain()))?;
        if let Some(cut) = self.settings.cuts.remove(old) {
            self.settings.cuts.insert(new.clone(), cut);
        }
        self.moved.change(|moved| {
            moved.remove(old);
            moved.insert(new.clone());
        });
        // Not every version announces the relation again when only its schema has another name.
        for (relation, _) in self.relations.values_mut().filter(|(relation, _)| relation.name == *old) {
            relation.name = new.clone();
        }
        Ok(())
    }

    async fn copy_again(&mut self, table: &QualifiedName) -> Result<()> {
        let sql = copying_sql(self.settings.move_name.as_str(), table) + " RETURNING 1";
        let rows =
            self.pipeline()?.query(&sql).await.doing(|| format!("asking for a copy of table {}", table.plain()))?;
        if !rows.is_empty() {
            tracing::info!(table = %table.plain(), "the table is copied again after the schema change");
            self.schema.copy_again = true;
            // What comes until then is in that copy, and may not fit what the target holds meanwhile.
            self.settings.cuts.insert(table.clone(), Lsn::new(u64::MAX));
        }
        Ok(())
    }

    fn row_of(&self, table: &QualifiedName) -> String {
        let [move_name, schema, name] =
            [self.settings.move_name.as_str(), &table.schema, &table.name].map(quote_literal);
        format!("move = {move_name} AND schema_name = {schema} AND table_name = {name}")
    }
}

fn name(row: &TextRow, at: usize) -> Option<QualifiedName> {
    Some(QualifiedName::new(row.get(at)?.clone()?, row.get(at + 1)?.clone()?))
}

fn is_done_already(error: &Error, statement: &str) -> bool {
    let Some(sqlstate) = error.sqlstate() else { return false };
    // Of several actions some may not be done.
    if super::statement::has_several_parts(statement) {
        return false;
    }
    let words = super::statement::first_words(statement, usize::MAX);
    if words.iter().any(|word| word == "OWNED" || word == "OWNER") {
        return false;
    }
    ALREADY.contains(&sqlstate)
        || NOT_THERE.contains(&sqlstate) && words.iter().any(|word| word == "DROP" || word == "RENAME")
}
