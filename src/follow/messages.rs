//! What each message of the stream means: changes are collected, relations are remembered, all else has its place.

use std::sync::Arc;

use super::announced::Row as Read;
use super::apply::{Applier, out_of_place};
use super::change::{Change, Position, Row};
use super::reader::Delivery;
use super::relation::Plan;
use crate::error::{Doing, Error, Result};
use crate::postgres::pgoutput::{Message, Relation, Value};
use crate::postgres::quote_literal;

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
            Delivery::Early(early) => self.early(early).await,
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
        let at = self.transaction.ok_or_else(|| out_of_place("a change"))?;
        match self.announced.row(relation, at, message)? {
            Read::Change(change) => self.collect(change),
            Read::Copied => {}
            Read::Unplanned(message) => return Ok(Some(message)),
        }
        Ok(None)
    }

    async fn message(&mut self, message: Message) -> Result<()> {
        match message {
            Message::Commit { end_lsn, commit_micros, .. } => {
                return self.end_transaction(end_lsn, commit_micros).await;
            }
            Message::Relation(relation) => self.relation(relation),
            Message::Type { oid, name } => self.announced.name_type(oid, name),
            Message::Insert { relation, new } if self.schema.is_capture(relation) => {
                let Some(Value::Text(text)) = new.values().next() else {
                    return Err(Error::bug("a captured schema change holds no text"));
                };
                // It may want a lock that the one in progress has.
                self.give_up_early("a schema change comes before its end").await;
                // The rows before it are on the target before it runs.
                self.settle().await?;
                self.schema_change(text).await?;
                // It may have moved the cuts.
                self.announced.move_cuts(&self.settings.cuts);
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

    fn relation(&mut self, relation: Relation) {
        if relation.name == self.settings.capture {
            return self.schema.announce(relation.oid);
        }
        let cut = self.settings.cuts.get(&relation.name).copied();
        self.announced.announce(relation, cut);
    }

    /// The plan of a relation, and where we are; `None` if the change is in the table's copy already.
    async fn plan(&mut self, oid: u32) -> Result<Option<(Arc<Plan>, Position)>> {
        let at = self.transaction.ok_or_else(|| out_of_place("a change"))?;
        if self.announced.shape(oid)?.is_copied(at) {
            return Ok(None);
        }
        if let Some(plan) = self.announced.planned(oid)? {
            return Ok(Some((plan, at)));
        }
        self.free().await?;
        let generation = self.next_generation();
        let plan = self.announced.plan(oid, &mut self.lane.executor()?.pipeline, generation).await?;
        Ok(Some((plan, at)))
    }

    pub(super) fn next_generation(&mut self) -> u64 {
        self.generations += 1;
        self.generations
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
        self.collect(Change { plan: first, at, row: Row::Truncate(sql.into()) });
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
