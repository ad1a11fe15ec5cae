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
//! - The changes of a row contradict each other (two inserts, an update after a delete)? Then something is not as assumed: the
//!   ordered path is taken, where the server decides.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use super::change::{Change, Row};
use super::relation::{Finder, Plan};
use crate::postgres::pgoutput::{Tuple, Value};

/// Fewer changes of a table than this are applied one by one: statements for sets take longer to begin.
const SET_FROM: usize = 8;

/// The same where rows are found by their look: without an index each of them takes a walk over the whole table, …
const WALKS_FROM: usize = 2;
/// … with one it does not, and a set does.
const LOOKUPS_UP_TO: usize = 64;

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
    fn of(columns: &[usize], tuple: &'c Tuple) -> Option<Self> {
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
    let mut places: HashMap<u64, usize> = HashMap::new();
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
    rows: Rows<'c>,
}

enum Rows<'c> {
    /// With the positions of the key's columns.
    Keyed(&'c [usize], HashMap<Key<'c>, State<'c>>),
    Alike(Looks<'c>),
    /// The source publishes nothing but inserts: there is nothing to find.
    Inserted(Vec<&'c Tuple>),
    Ordered,
}

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
            Finder::Key(columns) => Rows::Keyed(columns, HashMap::new()),
            Finder::WholeRow => Rows::Alike(Looks::default()),
            Finder::Nothing => Rows::Inserted(Vec::new()),
        };
        Self { plan, all: Vec::new(), rows }
    }

    fn add(&mut self, change: &'c Change) {
        self.all.push(change);
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
        let Self { plan, all, rows } = self;
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
fn add_keyed<'c>(rows: &mut HashMap<Key<'c>, State<'c>>, columns: &[usize], row: &'c Row) -> Option<()> {
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

fn keyed<'c>(plan: &Plan, rows: HashMap<Key<'c>, State<'c>>) -> Keyed<'c> {
    let mut rows: Vec<(Key<'c>, State<'c>)> = rows.into_iter().collect();
    rows.sort_unstable_by(|(a, _), (b, _)| a.order(b));
    let mut net = Keyed::default();
    for (key, state) in rows {
        match state {
            State::Inserted(row) => net.inserts.push(row),
            State::Updated(row) => {
                let set = plan.set_by(&row);
                match net.updates.iter_mut().find(|updates| updates.set == set) {
                    Some(updates) => updates.rows.push((key, row)),
                    None => net.updates.push(Updates { set, rows: vec![(key, row)] }),
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
    now: HashMap<&'c [u8], Vec<usize>>,
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
mod tests {
    use std::collections::BTreeMap;

    use bytes::{BufMut, Bytes, BytesMut};
    use proptest::prelude::*;

    use super::super::change::Position;
    use super::super::relation::tests::planned;
    use super::*;
    use crate::postgres::Lsn;
    use crate::postgres::pgoutput::Message;

    /// A row of text; `None` is a value that was left out.
    type Fields = Vec<Option<String>>;

    fn tuple(fields: &[Option<String>]) -> Tuple {
        let mut bytes = BytesMut::from(&b"I\0\0\0\x01N"[..]);
        bytes.put_u16(fields.len() as u16);
        for field in fields {
            match field {
                None => bytes.put_u8(b'u'),
                Some(text) => {
                    bytes.put_u8(b't');
                    bytes.put_u32(text.len() as u32);
                    bytes.put_slice(text.as_bytes());
                }
            }
        }
        match Message::decode(&Bytes::from(bytes)).unwrap() {
            Message::Insert { new, .. } => new,
            other => panic!("{other:?}"),
        }
    }

    fn fields(tuple: &Tuple) -> Fields {
        tuple
            .values()
            .map(|value| match value {
                Value::Text(bytes) => Some(String::from_utf8(bytes.to_vec()).unwrap()),
                _ => None,
            })
            .collect()
    }

    fn row(fields: &[&str]) -> Fields {
        fields.iter().map(|field| (*field != "?").then(|| (*field).to_owned())).collect()
    }

    fn change(plan: &Arc<Plan>, row: Row) -> Change {
        Change { plan: Arc::clone(plan), at: Position { commit_lsn: Lsn::new(1), xid: 1 }, row }
    }

    fn insert(plan: &Arc<Plan>, new: &[&str]) -> Change {
        change(plan, Row::Insert(tuple(&row(new))))
    }

    fn update(plan: &Arc<Plan>, new: &[&str]) -> Change {
        change(plan, Row::Update { old: None, new: tuple(&row(new)) })
    }

    fn delete(plan: &Arc<Plan>, key: &str) -> Change {
        change(plan, Row::Delete(tuple(&row(&[key, "?", "?"]))))
    }

    /// Enough other rows that a set is worth it.
    fn others(plan: &Arc<Plan>) -> Vec<Change> {
        (100..100 + SET_FROM).map(|id| insert(plan, &[&id.to_string(), "o", "o"])).collect()
    }

    fn net(changes: &[Change]) -> Option<&'static str> {
        match stages(changes, |_| false).first() {
            Some(Stage::Tables(groups)) => Some(match groups.first()?.how {
                How::Ordered(_) => "ordered",
                How::Keyed(_) => "keyed",
                How::Alike(_) => "alike",
            }),
            _ => None,
        }
    }

    #[test]
    fn changes_that_contradict_each_other_and_keys_that_change_take_the_ordered_path() {
        let plan = Arc::new(planned(Finder::Key(vec![0]), 3));
        let with = |changes: &[Change]| {
            let mut all = others(&plan);
            all.extend_from_slice(changes);
            net(&all)
        };
        assert_eq!(with(&[insert(&plan, &["1", "a", "b"])]), Some("keyed"));
        assert_eq!(with(&[insert(&plan, &["1", "a", "b"]), insert(&plan, &["1", "a", "b"])]), Some("ordered"));
        assert_eq!(with(&[delete(&plan, "1"), update(&plan, &["1", "a", "b"])]), Some("ordered"));
        assert_eq!(with(&[delete(&plan, "1"), delete(&plan, "1")]), Some("ordered"));
        let moved = Row::Update { old: Some(tuple(&row(&["1", "?", "?"]))), new: tuple(&row(&["2", "a", "b"])) };
        assert_eq!(with(&[change(&plan, moved)]), Some("ordered"));
        assert_eq!(net(&[insert(&plan, &["1", "a", "b"])]), Some("ordered"), "few changes are no set");
    }

    #[test]
    fn a_truncate_stands_between_what_came_before_and_after() {
        let plan = Arc::new(planned(Finder::Key(vec![0]), 3));
        let changes = [
            insert(&plan, &["1", "a", "b"]),
            change(&plan, Row::Truncate("TRUNCATE t".into())),
            insert(&plan, &["1", "a", "b"]),
        ];
        let stages = stages(&changes, |_| false);
        assert!(matches!(stages.as_slice(), [Stage::Tables(_), Stage::Truncate(_), Stage::Tables(_)]), "{stages:?}");
    }

    #[test]
    fn numbers_are_applied_in_their_order() {
        let plan = Arc::new(planned(Finder::Key(vec![0]), 3));
        let ids = ["10", "9", "100", "1", "33", "2", "5", "77"];
        let changes: Vec<Change> = ids.iter().map(|id| delete(&plan, id)).collect();
        let stages = stages(&changes, |_| false);
        let Some(Stage::Tables(groups)) = stages.first() else { panic!() };
        let How::Keyed(net) = &groups[0].how else { panic!() };
        let keys: Vec<_> = net.deletes.iter().map(|key| std::str::from_utf8(key.parts()[0]).unwrap()).collect();
        assert_eq!(keys, ["1", "2", "5", "9", "10", "33", "77", "100"]);
    }

    /// What a client does to a table of its own; the changes are those that a stream would tell.
    #[derive(Clone, Debug)]
    enum Deed {
        Put(u8, u8),
        /// Leaves the last column alone.
        Touch(u8, u8),
        Remove(u8),
    }

    fn deeds() -> impl Strategy<Value = Vec<Deed>> {
        let deed = prop_oneof![
            (0..6u8, 0..3u8).prop_map(|(id, v)| Deed::Put(id, v)),
            (0..6u8, 0..3u8).prop_map(|(id, v)| Deed::Touch(id, v)),
            (0..6u8).prop_map(Deed::Remove),
        ];
        proptest::collection::vec(deed, SET_FROM..60)
    }

    proptest! {
        #[test]
        fn rows_with_a_key_end_as_the_source_has_them(deeds in deeds(), there in proptest::collection::btree_set(0..6u8, 0..6)) {
            let plan = Arc::new(planned(Finder::Key(vec![0]), 3));
            let begin: BTreeMap<String, Fields> =
                there.iter().map(|id| (id.to_string(), row(&[&id.to_string(), "old", "toast"]))).collect();
            let mut source = begin.clone();
            let mut changes = Vec::new();
            for deed in deeds {
                match deed {
                    Deed::Put(id, v) => {
                        let (id, v) = (id.to_string(), v.to_string());
                        let new = [id.as_str(), v.as_str(), v.as_str()];
                        let known = source.insert(id.clone(), row(&new)).is_some();
                        changes.push(if known { update(&plan, &new) } else { insert(&plan, &new) });
                    }
                    Deed::Touch(id, v) => {
                        let (id, v) = (id.to_string(), v.to_string());
                        if let Some(known) = source.get_mut(&id) {
                            known[1] = Some(v.clone());
                            changes.push(update(&plan, &[&id, &v, "?"]));
                        }
                    }
                    Deed::Remove(id) => {
                        if source.remove(&id.to_string()).is_some() {
                            changes.push(delete(&plan, &id.to_string()));
                        }
                    }
                }
            }
            let mut target = begin;
            for stage in stages(&changes, |_| false) {
                let Stage::Tables(groups) = stage else { panic!() };
                for group in groups {
                    let net = match group.how {
                        How::Keyed(net) => net,
                        How::Ordered(few) => {
                            prop_assert!(few.len() < SET_FROM);
                            return Ok(());
                        }
                        How::Alike(_) => panic!(),
                    };
                    let name = |key: &Key<'_>| String::from_utf8(key.parts()[0].to_vec()).unwrap();
                    for key in &net.deletes {
                        prop_assert!(target.remove(&name(key)).is_some(), "a delete finds its row");
                    }
                    for updates in &net.updates {
                        for (key, new) in &updates.rows {
                            let known = target.get_mut(&name(key));
                            prop_assert!(known.is_some(), "an update finds its row");
                            let (known, new) = (known.unwrap(), fields(new));
                            updates.set.iter().for_each(|&at| known[at] = new[at].clone());
                        }
                    }
                    for new in &net.inserts {
                        let new = fields(new);
                        prop_assert!(!new.contains(&None), "an insert is complete");
                        prop_assert!(target.insert(new[0].clone().unwrap(), new).is_none(), "an insert finds no row");
                    }
                }
            }
            prop_assert_eq!(source, target);
        }

        #[test]
        fn rows_without_a_key_end_as_the_source_has_them(
            deeds in proptest::collection::vec((0..3u8, 0..3u8, 0..3u8), SET_FROM..60),
            there in proptest::collection::vec(0..3u8, 0..6),
        ) {
            let plan = Arc::new(planned(Finder::WholeRow, 1));
            let look = |v: u8| tuple(&row(&[&v.to_string()]));
            let mut source = there.clone();
            let mut changes = Vec::new();
            for (what, old, new) in deeds {
                let place = source.iter().position(|&v| v == old);
                match (what, place) {
                    (0, _) => {
                        source.push(new);
                        changes.push(change(&plan, Row::Insert(look(new))));
                    }
                    (1, Some(place)) => {
                        source[place] = new;
                        changes.push(change(&plan, Row::Update { old: Some(look(old)), new: look(new) }));
                    }
                    (_, Some(place)) => {
                        source.swap_remove(place);
                        changes.push(change(&plan, Row::Delete(look(old))));
                    }
                    (_, None) => {}
                }
            }
            let mut target: Vec<Fields> = there.iter().map(|&v| fields(&look(v))).collect();
            for stage in stages(&changes, |_| false) {
                let Stage::Tables(groups) = stage else { panic!() };
                let How::Alike(net) = &groups[0].how else { return Ok(()) };
                let mut take = |look: &Tuple| {
                    let place = target.iter().position(|row| *row == fields(look));
                    place.map(|place| target.swap_remove(place))
                };
                for old in &net.deletes {
                    prop_assert!(take(old).is_some(), "a delete finds its row");
                }
                // One statement: all rows are found before one is changed.
                for (old, _) in &net.updates {
                    prop_assert!(take(old).is_some(), "an update finds its row");
                }
                target.extend(net.updates.iter().map(|(_, new)| fields(new)));
                target.extend(net.inserts.iter().map(|new| fields(new)));
            }
            let mut source: Vec<Fields> = source.iter().map(|&v| fields(&look(v))).collect();
            source.sort();
            target.sort();
            prop_assert_eq!(source, target);
        }
    }
}
