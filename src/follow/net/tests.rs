//! The net effect of changes, by example and by property.

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes, BytesMut};
use proptest::prelude::*;

use super::*;
use crate::follow::change::Position;
use crate::follow::relation::tests::planned;
use crate::postgres::Lsn;
use crate::postgres::pgoutput::Message;

/// A row of text; `None` is a value that was left out.
pub(in crate::follow) type Fields = Vec<Option<String>>;

pub(in crate::follow) fn tuple(fields: &[Option<String>]) -> Tuple {
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

pub(in crate::follow) fn row(fields: &[&str]) -> Fields {
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
