//! The ordered path: one change, one prepared statement.

use std::sync::Arc;

use super::change::{Change, Operation, Row};
use super::pipeline::{Pipeline, Purpose, StatementKey};
use super::relation::{Finder, Plan};
use crate::error::{Class, Error, Result};
use crate::postgres::pgoutput::{Tuple, Value};

impl Pipeline {
    /// Encodes the statement of one change.
    ///
    /// # Errors
    /// Those of the connection, and of the statements before, which are answered now and then. Class operator: the source
    /// tells nothing that identifies the row. Class bug: a value is needed that the stream leaves out.
    pub(super) async fn change(&mut self, change: &Change) -> Result<()> {
        match &change.row {
            Row::Insert(new) => self.insert(change, new).await,
            Row::Update { old, new } => self.update(change, old.as_ref(), new).await,
            Row::Delete(old) => self.delete(change, old).await,
            Row::Truncate(sql) => {
                let sql = Arc::clone(sql);
                let key = StatementKey::Text(Arc::clone(&sql));
                self.execute(key, move || sql.to_string(), std::iter::empty(), Purpose::row(change)).await
            }
        }
    }

    async fn insert(&mut self, change: &Change, new: &Tuple) -> Result<()> {
        let plan = &change.plan;
        let mut values = Vec::with_capacity(new.len());
        for (column, value) in new.values().enumerate() {
            if plan.is_written(column) {
                values.push(text(value, plan)?);
            }
        }
        let key = StatementKey::Row { generation: plan.generation, operation: Operation::Insert, mask: Vec::new() };
        self.execute(key, || plan.insert(), values.into_iter(), Purpose::row(change)).await
    }

    async fn update(&mut self, change: &Change, old: Option<&Tuple>, new: &Tuple) -> Result<()> {
        let plan = &change.plan;
        let mut values = Vec::with_capacity(new.len() + 2);
        let mut set = Vec::with_capacity(new.len());
        // True where the statement differs from the plain one: a column that it leaves alone.
        let mut mask = Vec::new();
        for (column, value) in new.values().enumerate() {
            if value == Value::Unchanged {
                mask.resize(new.len(), false);
                mark(&mut mask, column);
            } else if plan.is_written(column) {
                set.push(column);
                values.push(text(value, plan)?);
            }
        }
        let nulls = find(plan, old.unwrap_or(new), &mut values)?;
        mask.extend_from_slice(&nulls);
        let key = StatementKey::Row { generation: plan.generation, operation: Operation::Update, mask };
        self.execute(key, || plan.update(&set, &nulls), values.into_iter(), Purpose::row(change)).await
    }

    async fn delete(&mut self, change: &Change, old: &Tuple) -> Result<()> {
        let plan = &change.plan;
        let mut values = Vec::with_capacity(old.len());
        let nulls = find(plan, old, &mut values)?;
        let key = StatementKey::Row { generation: plan.generation, operation: Operation::Delete, mask: nulls.clone() };
        self.execute(key, || plan.delete(&nulls), values.into_iter(), Purpose::row(change)).await
    }
}

/// Appends the values that find the row; tells which columns are NULL, for [`Finder::WholeRow`].
fn find<'t>(plan: &Plan, before: &'t Tuple, values: &mut Vec<Option<&'t [u8]>>) -> Result<Vec<bool>> {
    match &plan.finder {
        Finder::Key(key) => {
            let row: Vec<Value<'t>> = before.values().collect();
            for &at in key {
                let value = row.get(at).copied().unwrap_or(Value::Null);
                let value = text(value, plan)?.ok_or_else(|| {
                    Error::bug(format!("the key of a row of table {} is NULL in the stream", plan.name.plain()))
                })?;
                values.push(Some(value));
            }
            Ok(Vec::new())
        }
        Finder::WholeRow => {
            let mut nulls = Vec::with_capacity(before.len());
            for value in before.values() {
                let value = text(value, plan)?;
                nulls.push(value.is_none());
                if value.is_some() {
                    values.push(value);
                }
            }
            Ok(nulls)
        }
        Finder::Nothing => Err(Error::new(
            Class::Operator,
            "no_replica_identity",
            format!(
                "the source sent an update or delete of table {}, which has no replica identity",
                plan.name.plain()
            ),
        )
        .hint("set REPLICA IDENTITY FULL on the table and copy it again")),
    }
}

/// A value as a parameter.
///
/// # Errors
/// Class bug: there is none.
pub(super) fn text<'t>(value: Value<'t>, plan: &Plan) -> Result<Option<&'t [u8]>> {
    match value {
        Value::Null => Ok(None),
        Value::Text(bytes) => Ok(Some(bytes)),
        Value::Unchanged | Value::Binary(_) => Err(Error::bug(format!(
            "the stream leaves out a value of table {} that is needed, or sends it in binary",
            plan.name.plain()
        ))),
    }
}

fn mark(mask: &mut [bool], at: usize) {
    if let Some(flag) = mask.get_mut(at) {
        *flag = true;
    }
}
