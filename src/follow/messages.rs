//! What each message of the stream means: changes are collected, relations are remembered, all else has its place.

use std::sync::Arc;

use super::apply::{Applier, out_of_place};
use super::change::{Change, Position, Row};
use super::reader::Delivery;
use super::relation::{Plan, mending, type_names_query};
use super::target_table::{TargetTable, target_table, target_table_query};
use crate::error::{Doing, Error, Result};
use crate::postgres::pgoutput::{Message, Relation, Value};
use crate::postgres::{Lsn, quote_literal};

/// What the stream announced of a relation.
pub(super) struct Announced {
    pub relation: Relation,
    /// What committed before is in the table's copy.
    cut: Option<Lsn>,
    /// Made when the first change needs it.
    pub plan: Option<Arc<Plan>>,
}

impl Announced {
    fn is_copied(&self, at: Position) -> bool {
        self.cut.is_some_and(|cut| at.commit_lsn < cut)
    }
}

impl Applier {
    pub(super) async fn deliver(&mut self, delivery: Delivery) -> Result<()> {
        match delivery {
            Delivery::Idle(lsn) => {
                if lsn > self.written() {
                    self.idle = Some(lsn);
                }
                Ok(())
            }
            // Nearly everything ends here. A future for each message would cost more than all else that is done with it.
            Delivery::Message(message) => match self.at_once(message)? {
                None => Ok(()),
                Some(message) => self.message(message).await,
            },
        }
    }

    /// Does what needs nothing of the target; gives back what does.
    fn at_once(&mut self, message: Message) -> Result<Option<Message>> {
        let relation = match &message {
            Message::Begin { commit_lsn, xid, .. } => {
                self.transaction = Some(Position { commit_lsn: *commit_lsn, xid: *xid });
                self.reached.send_replace(*commit_lsn);
                self.idle = None;
                self.schema.begin();
                return Ok(None);
            }
            Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. } => {
                *relation
            }
            _ => return Ok(Some(message)),
        };
        if self.schema.is_capture(relation) {
            return Ok(Some(message));
        }
        let (at, known) = self.announced(relation)?;
        if known.is_copied(at) {
            return Ok(None);
        }
        let Some(plan) = known.plan.clone() else { return Ok(Some(message)) };
        match message {
            Message::Insert { new, .. } => {
                let change = Change::insert(plan, at, new)?;
                self.collect(change, |applied| applied.inserts += 1);
            }
            Message::Update { old, new, .. } => {
                let change = Change::update(plan, at, old, new)?;
                self.collect(change, |applied| applied.updates += 1);
            }
            Message::Delete { old, .. } => {
                let change = Change::delete(plan, at, old)?;
                self.collect(change, |applied| applied.deletes += 1);
            }
            other => return Ok(Some(other)),
        }
        Ok(None)
    }

    /// What the stream said of a relation, and where we are.
    fn announced(&self, oid: u32) -> Result<(Position, &Announced)> {
        let at = self.transaction.ok_or_else(|| out_of_place("a change"))?;
        match self.relations.get(&oid) {
            Some(known) => Ok((at, known)),
            None => Err(Error::bug(format!("a change of relation {oid}, which the stream did not describe"))),
        }
    }

    async fn message(&mut self, message: Message) -> Result<()> {
        match message {
            Message::Commit { end_lsn, commit_micros, .. } => {
                return self.end_transaction(end_lsn, commit_micros).await;
            }
            Message::Relation(relation) => self.relation(relation),
            Message::Type { oid, name } => {
                self.types.insert(oid, name);
            }
            Message::Insert { relation, new } if self.schema.is_capture(relation) => {
                let Some(Value::Text(text)) = new.values().next() else {
                    return Err(Error::bug("a captured schema change holds no text"));
                };
                // The rows before it are on the target before it runs.
                self.settle().await?;
                self.schema_change(text).await?;
                // It may have moved the cuts.
                for known in self.relations.values_mut() {
                    known.cut = self.settings.cuts.get(&known.relation.name).copied();
                }
            }
            Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. } => {
                self.plan(relation).await?;
                if let Some(left) = self.at_once(message)? {
                    return Err(Error::bug(format!("{} found no plan", left.kind())));
                }
            }
            Message::Truncate { relations, restart_identity, .. } => {
                return self.truncate(&relations, restart_identity).await;
            }
            // Where a change came from before it reached the source does not matter to the target, and other
            // programs' messages are theirs. The marker is recognised by its transaction.
            Message::Origin { .. } | Message::Logical { .. } => {}
            // Only whole transactions come here, put together where they came in parts; and a beginning was taken at once.
            Message::Begin { .. }
            | Message::StreamStart { .. }
            | Message::StreamStop
            | Message::StreamCommit { .. }
            | Message::StreamAbort { .. }
            | Message::BeginPrepare(_)
            | Message::Prepare(_)
            | Message::CommitPrepared { .. }
            | Message::RollbackPrepared { .. }
            | Message::StreamPrepare(_) => {
                return Err(Error::bug(format!("the stream holds {}, which was not asked for", message.kind())));
            }
        }
        Ok(())
    }

    /// The source announces a shape. Whether the target has it is asked when a row needs it: a table whose changes are all
    /// in its copy already, or that is gone on both sides, needs no place on the target.
    fn relation(&mut self, relation: Relation) {
        if relation.name == self.settings.capture {
            return self.schema.announce(relation.oid);
        }
        match self.relations.get(&relation.oid) {
            Some(known) if known.relation == relation => {}
            _ => {
                let cut = self.settings.cuts.get(&relation.name).copied();
                drop(self.relations.insert(relation.oid, Announced { relation, cut, plan: None }));
            }
        }
    }

    /// The plan of a relation, and where we are; `None` if the change is in the table's copy already.
    async fn plan(&mut self, oid: u32) -> Result<Option<(Arc<Plan>, Position)>> {
        let (at, known) = self.announced(oid)?;
        if known.is_copied(at) {
            return Ok(None);
        }
        if let Some(plan) = &known.plan {
            return Ok(Some((Arc::clone(plan), at)));
        }
        let (name, query) = (known.relation.name.clone(), target_table_query(&known.relation.name));
        self.free().await?;
        let rows = self.pipeline()?.query(&query).await;
        let rows = rows.doing(|| format!("reading the shape of table {} on the target", name.plain()))?;
        let target = target_table(&rows)?;
        self.generations += 1;
        let Some(known) = self.relations.get_mut(&oid) else {
            return Err(Error::bug(format!("relation {oid} was forgotten")));
        };
        match Plan::new(&known.relation, target.as_ref(), &self.types, self.generations) {
            Ok(plan) => Ok(Some((Arc::clone(known.plan.insert(Arc::new(plan))), at))),
            Err(error) => Err(self.with_what_mends(error, oid, target.as_ref()).await),
        }
    }

    /// The error with the statement that would give the target the shape of the source.
    async fn with_what_mends(&mut self, error: Error, oid: u32, target: Option<&TargetTable>) -> Error {
        let (Some(known), Some(target)) = (self.relations.get(&oid), target) else { return error };
        let (relation, query) = (known.relation.clone(), type_names_query(&known.relation, &self.types));
        let Ok(pipeline) = self.pipeline() else { return error };
        let Ok(rows) = pipeline.query(&query).await else { return error };
        let names: Vec<String> = rows.into_iter().flatten().flatten().collect();
        let statement = mending(&relation, target, &self.types, &names);
        error.hint(format!(
            "run on the target: {statement} (a renamed column is RENAME COLUMN instead; if old rows got other values: \
             `pgtandem resync {}`). Nothing of the change was applied",
            relation.name.plain()
        ))
    }

    /// The source lists every table that the statement emptied, also those that CASCADE reached, so the target must
    /// not cascade further than they say.
    async fn truncate(&mut self, relations: &[u32], restart_identity: bool) -> Result<()> {
        let mut plans = Vec::with_capacity(relations.len());
        let mut at = None;
        for &relation in relations {
            if let Some((plan, position)) = self.plan(relation).await? {
                at = Some(position);
                plans.push(plan);
            }
        }
        let (Some(at), Some(first)) = (at, plans.first().map(Arc::clone)) else { return Ok(()) };
        let mut names: Vec<String> = plans.iter().map(|plan| plan.truncated()).collect();
        names.extend(self.emptied_whole(&plans).await?);
        let restart = if restart_identity { " RESTART IDENTITY" } else { "" };
        let sql = format!("TRUNCATE {}{restart}", names.join(", "));
        self.collect(Change { plan: first, at, row: Row::Truncate(sql.into()) }, |applied| applied.truncates += 1);
        Ok(())
    }

    /// The partitioned tables on the target of which every partition is emptied. The stream names the partitions alone; a foreign
    /// key that refers to one of them belongs to a whole table, which the server wants to see emptied at the same time.
    async fn emptied_whole(&mut self, plans: &[Arc<Plan>]) -> Result<Vec<String>> {
        let listed: Vec<String> = plans.iter().map(|plan| quote_literal(&plan.name.to_string())).collect();
        let question = EMPTIED_WHOLE.replace("$1", &format!("ARRAY[{}]", listed.join(", ")));
        self.free().await?;
        let rows =
            self.pipeline()?.query(&question).await.doing(|| "looking for tables whose partitions are emptied")?;
        Ok(rows.into_iter().flatten().flatten().collect())
    }
}

/// `$1`: tables that are emptied, quoted.
const EMPTIED_WHOLE: &str = "
    WITH listed AS (
        SELECT pg_catalog.to_regclass(name)::pg_catalog.oid AS oid FROM unnest($1::text[]) AS names (name))
    SELECT DISTINCT pg_catalog.format('%I.%I', n.nspname, c.relname)
    FROM listed
    CROSS JOIN LATERAL pg_catalog.pg_partition_ancestors(listed.oid) AS above (oid)
    JOIN pg_catalog.pg_class c ON c.oid = above.oid AND c.relkind = 'p'
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE NOT EXISTS (
        SELECT FROM pg_catalog.pg_partition_tree(c.oid) AS below
        WHERE below.isleaf AND below.relid NOT IN (SELECT oid FROM listed WHERE oid IS NOT NULL))";
