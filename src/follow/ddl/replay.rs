//! Running a captured statement on the target, and telling the state what it changed.

use std::collections::{HashMap, HashSet};

use super::choice::Candidates;
use super::event::{Deed, Event, Table};
use crate::config::Ddl;
use crate::error::{Class, Doing, Error, Result};
use crate::follow::apply::Applier;
use crate::follow::change::Position;
use crate::postgres::wire::TextRow;
use crate::postgres::{Lsn, QualifiedName, quote_literal};
use crate::schema::hold_back;
use crate::state::{SchemaChange, copied_sql, copying_sql, hold_back_sql};

/// `pg_event_trigger_table_rewrite_reason()`: a default that is not constant, and a change of type.
const NEW_DEFAULT: i32 = 2;
const NEW_TYPE: i32 = 4;

/// A column that was added without touching the rows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct FilledColumn {
    table: QualifiedName,
    column: String,
    number: String,
}

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
        let event = match Event::read(text) {
            Ok(event) => event,
            Err(_) if self.is_to_be_skipped(at).await? => return Ok(()),
            Err(why) => {
                let ordinal = self.schema.ordinal;
                let (tag, statement, role) = ("unknown".to_owned(), "not known".to_owned(), String::new());
                let change = SchemaChange { lsn: at.commit_lsn, ordinal, tag, statement, role, chosen: None };
                let message = format!("what the source captured cannot be read: {why}");
                return Err(self.refused(at, change, Error::new(Class::Operator, "ddl_refused", message)).await);
            }
        };
        if self.settings.ddl == Ddl::Stop {
            let change = self.describe(at, &event, &event.shown_text());
            let why = "follow.ddl is \"stop\"";
            return Err(self.refused(at, change, Error::new(Class::Operator, "ddl_refused", why)).await);
        }
        match event.deed(&self.settings.scope) {
            Ok(Deed::Nothing) => {
                self.open_batch().await?;
                self.schema.in_batch = true;
                self.watch_identities(&event).await
            }
            Ok(Deed::Rewrite(table, reason)) => {
                *self.schema.rewritten.entry(table).or_default() |= reason;
                Ok(())
            }
            Ok(Deed::Run(candidates)) => self.replay(at, &event, candidates, false).await,
            Ok(Deed::MakeAndCopy(statement)) => self.replay(at, &event, Candidates::only(statement), true).await,
            Err(why) => {
                let change = self.describe(at, &event, &event.shown_text());
                if self.is_to_be_skipped(at).await? {
                    return Ok(());
                }
                Err(self.refused(at, change, Error::new(Class::Operator, "ddl_refused", why)).await)
            }
        }
    }

    async fn replay(&mut self, at: Position, event: &Event, mut candidates: Candidates, filled: bool) -> Result<()> {
        self.open_batch().await?;
        self.schema.in_batch = true;
        self.narrow(&mut candidates).await?;
        let Some((_, statement)) = candidates.statements.first() else { return Ok(()) };
        let change = self.describe(at, event, &event.shown(statement));
        if self.is_to_be_skipped(at).await? {
            tracing::warn!(statement = change.statement, "a schema change is left out, as asked");
            let change = change.chosen(&candidates.text, candidates.next());
            let note = change.sql(self.settings.move_name.as_str(), "skip", None);
            self.pipeline()?.query(&note).await.doing(|| "noting a schema change")?;
            return self.watch_identities(event).await;
        }
        let before = self.known_tables().await?;
        let mut again = self.written_anew(event, statement).await?;
        let columns_before = self.filled_columns(event).await?;
        self.pipeline()?.query("SAVEPOINT schema_change").await?;
        let ran = match self.execute_one_of(event, &candidates).await {
            Ok(ran) => ran,
            Err(error) => return Err(self.refused(at, change, error).await),
        };
        self.pipeline()?.query("RELEASE SAVEPOINT schema_change").await?;
        let state = ran.state;
        let change =
            self.describe(at, event, &event.shown(&ran.statement)).chosen(&candidates.text, Some(ran.position));
        tracing::info!(statement = change.statement, lsn = %at.commit_lsn, state, "schema change");
        // What was there already may have been made with another value; else only the columns that are new can have one.
        let known = if state == "found" { HashMap::new() } else { columns_before };
        again.extend(self.other_values(event, &known).await?);
        self.take_note(at, event, &before, filled).await?;
        for table in again {
            self.copy_again(&table).await?;
        }
        self.watch_identities(event).await?;
        self.hold_back().await.doing(|| "holding back the triggers of a schema change")?;
        let note = change.sql(self.settings.move_name.as_str(), state, None);
        self.pipeline()?.query(&note).await.doing(|| "noting a schema change")?;
        self.announced.forget_plans();
        Ok(())
    }

    fn describe(&self, at: Position, event: &Event, shown: &str) -> SchemaChange {
        SchemaChange {
            lsn: at.commit_lsn,
            ordinal: self.schema.ordinal,
            tag: event.tag.clone(),
            statement: shown.to_owned(),
            role: event.role.clone().unwrap_or_default(),
            chosen: None,
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

    /// The columns of these tables that were added without touching the old rows, and the value that those show there. A column
    /// that is dropped and added under the same name has another number.
    async fn filled_columns(&mut self, event: &Event) -> Result<HashMap<FilledColumn, Option<String>>> {
        let mut found = HashMap::new();
        let tables = event.objects.iter().filter_map(|object| object.table.as_ref()).flat_map(|table| &table.missing);
        let tables: HashSet<QualifiedName> =
            tables.map(|(schema, table, ..)| QualifiedName::new(schema.clone(), table.clone())).collect();
        for table in tables {
            let sql = format!(
                "SELECT attname::text, attnum::text, attmissingval::text FROM pg_catalog.pg_attribute
                 WHERE attrelid = pg_catalog.to_regclass({}) AND atthasmissing",
                quote_literal(&table.to_string())
            );
            let rows = self.pipeline()?.query(&sql).await.doing(|| "looking at the columns of a table")?;
            found.extend(rows.into_iter().filter_map(|row| {
                let [column, number, value] = <[_; 3]>::try_from(row).ok()?;
                Some((FilledColumn { table: table.clone(), column: column?, number: number? }, value))
            }));
        }
        Ok(found)
    }

    /// Tables in whose old rows a column that the statement added has another value than on the source. Those that were there
    /// before were compared when they came, and their rows may have been copied since.
    async fn other_values(
        &mut self,
        event: &Event,
        before: &HashMap<FilledColumn, Option<String>>,
    ) -> Result<Vec<QualifiedName>> {
        let mut wanted: HashMap<(QualifiedName, &str), &str> = HashMap::new();
        for (schema, table, column, value) in
            event.objects.iter().filter_map(|o| o.table.as_ref()).flat_map(|t| &t.missing)
        {
            wanted.insert((QualifiedName::new(schema.clone(), table.clone()), column), value);
        }
        let mut again = Vec::new();
        for (added, value) in
            self.filled_columns(event).await?.into_iter().filter(|(added, _)| !before.contains_key(added))
        {
            let wanted = wanted.get(&(added.table.clone(), added.column.as_str()));
            if wanted.is_some_and(|wanted| Some(*wanted) != value.as_deref()) && !again.contains(&added.table) {
                again.push(added.table);
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
    /// copied: what was updated in between was not carried. So is one that could not be published in time, after it was.
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
        for table in identities.failed() {
            self.copy_again(&table).await?;
        }
        Ok(())
    }

    async fn begin_table(&mut self, table: &QualifiedName, at: Position, empty: bool) -> Result<()> {
        let move_name = self.settings.move_name.as_str();
        let sql = copied_sql(move_name, at.commit_lsn, &[(table, 0, 0)]);
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
        self.announced.rename(old, new);
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
