//! What the stream announced of relations and types, and what becomes of a row by it.

use std::collections::HashMap;
use std::sync::Arc;

use ahash::RandomState;

use super::change::{Change, Position};
use super::pipeline::Pipeline;
use super::relation::{Plan, mending, type_names_query};
use super::target_table::{TargetTable, target_table, target_table_query};
use crate::error::{Doing, Error, Result};
use crate::postgres::pgoutput::{Message, Relation};
use crate::postgres::{Lsn, QualifiedName};

/// See the module's first lines.
#[derive(Default)]
pub(super) struct Announced {
    /// By the oid that the stream gives them.
    relations: HashMap<u32, Shape, RandomState>,
    types: HashMap<u32, QualifiedName>,
}

/// What was announced of one relation.
pub(super) struct Shape {
    pub relation: Relation,
    /// What committed before is in the table's copy.
    pub cut: Option<Lsn>,
    /// Made when the first change needs it.
    plan: Option<Arc<Plan>>,
}

impl Shape {
    pub(super) fn is_copied(&self, at: Position) -> bool {
        self.cut.is_some_and(|cut| at.commit_lsn < cut)
    }
}

/// What becomes of the message of a row.
pub(super) enum Row {
    /// It is to be applied.
    Change(Change),
    /// It is in the table's copy.
    Copied,
    /// Its relation needs a plan first.
    Unplanned(Message),
}

impl Announced {
    /// The source announces a shape. Whether the target has it is asked when a row needs it: a table whose changes are all
    /// in its copy already, or that is gone on both sides, needs no place on the target.
    pub(super) fn announce(&mut self, relation: Relation, cut: Option<Lsn>) {
        match self.relations.get(&relation.oid) {
            Some(known) if known.relation == relation => {}
            _ => drop(self.relations.insert(relation.oid, Shape { relation, cut, plan: None })),
        }
    }

    pub(super) fn name_type(&mut self, oid: u32, name: QualifiedName) {
        self.types.insert(oid, name);
    }

    /// What the stream said of a relation.
    pub(super) fn shape(&self, oid: u32) -> Result<&Shape> {
        match self.relations.get(&oid) {
            Some(known) => Ok(known),
            None => Err(Error::bug(format!("a change of relation {oid}, which the stream did not describe"))),
        }
    }

    /// Reads a row of a relation into a change.
    ///
    /// # Errors
    /// Class bug: nothing was announced of its relation, or another width; or it is no row.
    pub(super) fn row(&self, relation: u32, at: Position, message: Message) -> Result<Row> {
        let known = self.shape(relation)?;
        if known.is_copied(at) {
            return Ok(Row::Copied);
        }
        let Some(plan) = known.plan.clone() else { return Ok(Row::Unplanned(message)) };
        Ok(Row::Change(match message {
            Message::Insert { new, .. } => Change::insert(plan, at, new)?,
            Message::Update { old, new, .. } => Change::update(plan, at, old, new)?,
            Message::Delete { old, .. } => Change::delete(plan, at, old)?,
            other => return Err(Error::bug(format!("{} was taken for a row", other.kind()))),
        }))
    }

    /// The plan of a relation, if it was made.
    pub(super) fn planned(&self, oid: u32) -> Result<Option<Arc<Plan>>> {
        Ok(self.shape(oid)?.plan.clone())
    }

    /// Makes the plan of a relation, for which it asks the target. `generation` is one that no other plan has.
    ///
    /// # Errors
    /// Class operator: the target has no table of that shape; the hint has the statement that would give it the shape.
    pub(super) async fn plan(&mut self, oid: u32, pipeline: &mut Pipeline, generation: u64) -> Result<Arc<Plan>> {
        let name = self.shape(oid)?.relation.name.clone();
        let rows = pipeline.query(&target_table_query(&name)).await;
        let rows = rows.doing(|| format!("reading the shape of table {} on the target", name.plain()))?;
        let target = target_table(&rows)?;
        let Some(known) = self.relations.get_mut(&oid) else {
            return Err(Error::bug(format!("relation {oid} was forgotten")));
        };
        match Plan::new(&known.relation, target.as_ref(), &self.types, generation) {
            Ok(plan) => Ok(Arc::clone(known.plan.insert(Arc::new(plan)))),
            Err(error) => Err(self.with_what_mends(error, oid, target.as_ref(), pipeline).await),
        }
    }

    /// The error with the statement that would give the target the shape of the source.
    async fn with_what_mends(
        &self,
        error: Error,
        oid: u32,
        target: Option<&TargetTable>,
        pipeline: &mut Pipeline,
    ) -> Error {
        let (Some(known), Some(target)) = (self.relations.get(&oid), target) else { return error };
        let (relation, query) = (&known.relation, type_names_query(&known.relation, &self.types));
        let Ok(rows) = pipeline.query(&query).await else { return error };
        let names: Vec<String> = rows.into_iter().flatten().flatten().collect();
        let statement = mending(relation, target, &self.types, &names);
        error.hint(format!(
            "run on the target: {statement} (a renamed column is RENAME COLUMN instead; if old rows got other values: \
             `pgtandem resync {}`). Nothing of the change was applied",
            relation.name.plain()
        ))
    }

    /// The cuts of tables may be others now.
    pub(super) fn move_cuts(&mut self, cuts: &HashMap<QualifiedName, Lsn>) {
        for known in self.relations.values_mut() {
            known.cut = cuts.get(&known.relation.name).copied();
        }
    }

    /// What was known of the target's shapes, and of types, may be another by now.
    pub(super) fn forget_plans(&mut self) {
        self.relations.values_mut().for_each(|known| known.plan = None);
        self.types.clear();
    }

    /// Not every version announces a relation again when only its schema has another name.
    pub(super) fn rename(&mut self, old: &QualifiedName, new: &QualifiedName) {
        for known in self.relations.values_mut().filter(|known| known.relation.name == *old) {
            known.relation.name = new.clone();
        }
    }
}
