//! What many changes come to: for each row the state before and after all of them.
//!
//! Pure. [`stages`] takes the changes of a stretch of the stream, in their order, and says how they can be applied in few
//! statements: for each table the rows to delete, to update and to insert.
//!
//! # Why the result is the same
//!
//! - Nothing on the target reacts to applied rows: foreign keys, triggers and rules are held back or do not fire for us, and a
//!   table where one would is [`Plan::observed`], which sends the whole stretch down the ordered path. So the changes of two
//!   tables cannot notice each other, and a table's outcome is the outcome of each of its rows.
//! - A row is known by the text of its key. The stream always prints a stored value in the same way, so all changes of one row
//!   carry the same text, as long as its key is not changed; a table in which a key changes takes the ordered path. Two texts
//!   that are the same key to the server (1.0 and 1.00) stand for two rows in turn, of which the first is deleted before the
//!   second is inserted.
//! - Of one row only the last state counts. A value that an UPDATE leaves out is the one before.
//! - Deletes go first, then updates, then inserts: what the stretch ends with exists, so no state of a row that was left behind
//!   within it is needed. What can notice is a second unique index or an exclusion constraint, in the middle of the updates:
//!   two rows that exchange a value. The server then refuses the statement, and the ordered path is taken instead.
//! - Rows without a key, under REPLICA IDENTITY FULL, are known by their look. Rows that look the same are interchangeable, so
//!   whichever of them a change meant, another one may be taken.
//! - A CHECK or a domain that reads another table may notice the order of tables. It then refuses a row, and the whole stretch takes
//!   the ordered path.
//! - The changes of a row contradict each other (two inserts, an update after a delete)? Then something is not as assumed: the
//!   ordered path is taken, where the server decides.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use ahash::RandomState;

use super::change::{Change, Row};
use super::relation::{Finder, Plan};
use crate::postgres::pgoutput::{Tuple, Value};

/// Fewer changes of a table than this are applied one by one: statements for sets take longer to begin.
const SET_FROM: usize = 8;

/// The same where rows are found by their look: without an index each of them takes a walk over the whole table, …
const WALKS_FROM: usize = 2;
/// … with one it does not, and a set does.
const LOOKUPS_UP_TO: usize = 64;

/// A row beyond this, in bytes, takes more than one copy in a set, and the ordered path one.
const LARGE_ROW: usize = 16 << 20;
/// One message holds less than a gigabyte, and a set of rows without a key is one message.
const LARGE_SET: usize = 256 << 20;

/// What is applied at once. Stages follow each other; the tables of one are independent.
#[derive(Debug)]
pub(super) enum Stage<'c> {
    Tables(Vec<Group<'c>>),
    Truncate(&'c Change),
}

/// The changes of one table.
#[derive(Debug)]
pub(super) struct Group<'c> {
    pub plan: &'c Arc<Plan>,
    pub how: How<'c>,
}

#[derive(Debug)]
pub(super) enum How<'c> {
    /// One by one, in their order.
    Ordered(Vec<&'c Change>),
    /// By key.
    Keyed(Keyed<'c>),
    /// By look.
    Alike(Alike<'c>),
}

/// In this order: deletes, updates, inserts.
#[derive(Debug, Default)]
pub(super) struct Keyed<'c> {
    pub deletes: Vec<Key<'c>>,
    pub updates: Vec<Updates<'c>>,
    pub inserts: Vec<Cow<'c, Tuple>>,
}

/// Updates that write the same columns.
#[derive(Debug)]
pub(super) struct Updates<'c> {
    /// Positions in the relation, without the key.
    pub set: Vec<usize>,
    pub rows: Vec<(Key<'c>, Cow<'c, Tuple>)>,
}

/// In this order: deletes, updates, inserts.
#[derive(Debug, Default)]
pub(super) struct Alike<'c> {
    pub deletes: Vec<&'c Tuple>,
    pub updates: Vec<(&'c Tuple, &'c Tuple)>,
    pub inserts: Vec<&'c Tuple>,
}

/// The texts of the key's columns, in the order of [`Finder::Key`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key<'c> {
    One(&'c [u8]),
    Many(Box<[&'c [u8]]>),
}

impl<'c> Key<'c> {
    /// `None` if a part of it is not there.
    pub(super) fn of(columns: &[usize], tuple: &'c Tuple) -> Option<Self> {
        let mut values = tuple.values();
        if let [column] = columns {
            return text(values.nth(*column)?).map(Self::One);
        }
        let row: Vec<Value<'c>> = values.collect();
        let parts = columns.iter().map(|&at| text(*row.get(at)?));
        parts.collect::<Option<_>>().map(Self::Many)
    }

    pub(super) fn parts(&self) -> &[&'c [u8]] {
        match self {
            Self::One(part) => std::slice::from_ref(part),
            Self::Many(parts) => parts,
        }
    }

    /// Orders numbers without a sign by their value, and whatever else in some way: neighbours in the key are mostly
    /// neighbours in the index.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        let one = |a: &[u8], b: &[u8]| a.len().cmp(&b.len()).then_with(|| a.cmp(b));
        self.parts()
            .iter()
            .zip(other.parts())
            .map(|(a, b)| one(a, b))
            .find(|o| o.is_ne())
            .unwrap_or(std::cmp::Ordering::Equal)
    }
}

fn text(value: Value<'_>) -> Option<&[u8]> {
    match value {
        Value::Text(bytes) => Some(bytes),
        Value::Null | Value::Unchanged | Value::Binary(_) => None,
    }
}

/// How the changes can be applied. `is_ordered` tells of a table that shall take the ordered path.
pub(super) fn stages(changes: &[Change], is_ordered: impl Fn(&Plan) -> bool) -> Vec<Stage<'_>> {
    let mut stages = Vec::new();
    let mut tables: Vec<Table<'_>> = Vec::new();
    let mut places: HashMap<u64, usize, RandomState> = HashMap::default();
    for change in changes {
        if matches!(change.row, Row::Truncate(_)) {
            close(&mut tables, &mut stages);
            places.clear();
            stages.push(Stage::Truncate(change));
            continue;
        }
        let place = *places.entry(change.plan.generation).or_insert_with(|| {
            tables.push(Table::new(&change.plan, is_ordered(&change.plan)));
            tables.len() - 1
        });
        if let Some(table) = tables.get_mut(place) {
            table.add(change);
        }
    }
    close(&mut tables, &mut stages);
    stages
}

fn close<'c>(tables: &mut Vec<Table<'c>>, stages: &mut Vec<Stage<'c>>) {
    if !tables.is_empty() {
        stages.push(Stage::Tables(tables.drain(..).map(Table::group).collect()));
    }
}

/// The changes of one table, while they are collected.
struct Table<'c> {
    plan: &'c Arc<Plan>,
    all: Vec<&'c Change>,
    bytes: usize,
    rows: Rows<'c>,
}

enum Rows<'c> {
    /// With the positions of the key's columns.
    Keyed(&'c [usize], States<'c>),
    Alike(Looks<'c>),
    /// The source publishes nothing but inserts: there is nothing to find.
    Inserted(Vec<&'c Tuple>),
    Ordered,
}

type States<'c> = HashMap<Key<'c>, State<'c>, RandomState>;

/// A row before and after.
enum State<'c> {
    /// It was not there, and is.
    Inserted(Cow<'c, Tuple>),
    /// It was there, and is another.
    Updated(Cow<'c, Tuple>),
    /// It was there, and is not.
    Deleted,
    /// It was there, went, and came again.
    Replaced(Cow<'c, Tuple>),
    /// It came and went.
    Gone,
}

impl<'c> Table<'c> {
    fn new(plan: &'c Arc<Plan>, ordered: bool) -> Self {
        let rows = match &plan.finder {
            _ if ordered || !plan.takes_sets() => Rows::Ordered,
            Finder::Key(columns) => Rows::Keyed(columns, States::default()),
            Finder::WholeRow => Rows::Alike(Looks::default()),
            Finder::Nothing => Rows::Inserted(Vec::new()),
        };
        Self { plan, all: Vec::new(), bytes: 0, rows }
    }

    fn add(&mut self, change: &'c Change) {
        self.all.push(change);
        let bytes = change.bytes();
        self.bytes += bytes;
        if bytes > LARGE_ROW || self.bytes > LARGE_SET {
            self.rows = Rows::Ordered;
        }
        let fits = match &mut self.rows {
            Rows::Ordered => return,
            Rows::Keyed(columns, rows) => add_keyed(rows, columns, &change.row),
            Rows::Alike(looks) => looks.add(&change.row),
            Rows::Inserted(rows) => match &change.row {
                Row::Insert(new) => {
                    rows.push(new);
                    Some(())
                }
                _ => None,
            },
        };
        if fits.is_none() {
            self.rows = Rows::Ordered;
        }
    }

    fn group(self) -> Group<'c> {
        let Self { plan, all, rows, .. } = self;
        let how = match rows {
            Rows::Ordered => How::Ordered(all),
            Rows::Alike(_) if all.len() < alike_from(plan) => How::Ordered(all),
            Rows::Keyed(..) | Rows::Inserted(_) if all.len() < SET_FROM => How::Ordered(all),
            Rows::Keyed(_, rows) => How::Keyed(keyed(plan, rows)),
            Rows::Inserted(rows) => {
                How::Keyed(Keyed { inserts: rows.into_iter().map(Cow::Borrowed).collect(), ..Keyed::default() })
            }
            Rows::Alike(looks) => How::Alike(looks.net()),
        };
        Group { plan, how }
    }
}

fn alike_from(plan: &Plan) -> usize {
    if plan.columns.iter().any(|column| column.leads) { LOOKUPS_UP_TO } else { WALKS_FROM }
}

/// `None`: the change does not fit what is known of its row, or its row cannot be told.
fn add_keyed<'c>(rows: &mut States<'c>, columns: &[usize], row: &'c Row) -> Option<()> {
    use std::collections::hash_map::Entry;
    match row {
        Row::Insert(new) => match rows.entry(Key::of(columns, new)?) {
            Entry::Vacant(entry) => drop(entry.insert(State::Inserted(Cow::Borrowed(new)))),
            Entry::Occupied(mut entry) => {
                let state = entry.get_mut();
                *state = match state {
                    State::Gone => State::Inserted(Cow::Borrowed(new)),
                    State::Deleted => State::Replaced(Cow::Borrowed(new)),
                    State::Inserted(_) | State::Updated(_) | State::Replaced(_) => return None,
                };
            }
        },
        Row::Update { old, new } => {
            let key = Key::of(columns, new)?;
            if let Some(old) = old
                && Key::of(columns, old)? != key
            {
                return None;
            }
            match rows.entry(key) {
                Entry::Vacant(entry) => drop(entry.insert(State::Updated(Cow::Borrowed(new)))),
                Entry::Occupied(mut entry) => match entry.get_mut() {
                    State::Inserted(row) | State::Updated(row) | State::Replaced(row) => {
                        *row = if new.leaves_out() { Cow::Owned(new.over(row)) } else { Cow::Borrowed(new) };
                    }
                    State::Deleted | State::Gone => return None,
                },
            }
        }
        Row::Delete(old) => match rows.entry(Key::of(columns, old)?) {
            Entry::Vacant(entry) => drop(entry.insert(State::Deleted)),
            Entry::Occupied(mut entry) => {
                let state = entry.get_mut();
                *state = match state {
                    State::Inserted(_) => State::Gone,
                    State::Updated(_) | State::Replaced(_) => State::Deleted,
                    State::Deleted | State::Gone => return None,
                };
            }
        },
        Row::Truncate(_) => return None,
    }
    Some(())
}

fn keyed<'c>(plan: &Plan, rows: States<'c>) -> Keyed<'c> {
    let mut rows: Vec<(Key<'c>, State<'c>)> = rows.into_iter().collect();
    rows.sort_unstable_by(|(a, _), (b, _)| a.order(b));
    let mut net = Keyed::default();
    // Most updates leave nothing out.
    let mut complete: Option<usize> = None;
    for (key, state) in rows {
        match state {
            State::Inserted(row) => net.inserts.push(row),
            State::Updated(row) => {
                let leaves_out = row.leaves_out();
                let place = complete.filter(|_| !leaves_out).unwrap_or_else(|| {
                    let set = plan.set_by(&row);
                    net.updates.iter().position(|updates| updates.set == set).unwrap_or_else(|| {
                        net.updates.push(Updates { set, rows: Vec::new() });
                        net.updates.len() - 1
                    })
                });
                if !leaves_out {
                    complete = Some(place);
                }
                if let Some(updates) = net.updates.get_mut(place) {
                    updates.rows.push((key, row));
                }
            }
            State::Deleted => net.deletes.push(key),
            State::Replaced(row) => {
                net.deletes.push(key);
                net.inserts.push(row);
            }
            State::Gone => {}
        }
    }
    net
}

/// Rows that are known by their look.
#[derive(Default)]
struct Looks<'c> {
    /// Before and after.
    rows: Vec<(Option<&'c Tuple>, Option<&'c Tuple>)>,
    /// Those that look so by now.
    now: HashMap<&'c [u8], Vec<usize>, RandomState>,
}

impl<'c> Looks<'c> {
    fn add(&mut self, row: &'c Row) -> Option<()> {
        match row {
            Row::Insert(new) => self.put(None, new),
            Row::Update { old, new } => {
                let old = old.as_ref().filter(|old| !old.leaves_out())?;
                match self.take(old) {
                    Some(at) => {
                        self.rows.get_mut(at)?.1 = Some(new);
                        self.now.entry(new.as_sent()).or_default().push(at);
                    }
                    None => self.put(Some(old), new),
                }
            }
            Row::Delete(old) => match self.take(old) {
                Some(at) => self.rows.get_mut(at)?.1 = None,
                None => self.rows.push((Some(old), None)),
            },
            Row::Truncate(_) => return None,
        }
        Some(())
    }

    fn put(&mut self, old: Option<&'c Tuple>, new: &'c Tuple) {
        self.now.entry(new.as_sent()).or_default().push(self.rows.len());
        self.rows.push((old, Some(new)));
    }

    /// One that looks so by now.
    fn take(&mut self, look: &Tuple) -> Option<usize> {
        self.now.get_mut(look.as_sent())?.pop()
    }

    fn net(self) -> Alike<'c> {
        let mut net = Alike::default();
        for row in self.rows {
            match row {
                (Some(old), Some(new)) => net.updates.push((old, new)),
                (Some(old), None) => net.deletes.push(old),
                (None, Some(new)) => net.inserts.push(new),
                (None, None) => {}
            }
        }
        net
    }
}

#[cfg(test)]
pub(super) mod tests;
