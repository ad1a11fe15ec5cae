//! Which of several workers applies which change.
//!
//! Pure. With `follow.workers` above 1 a batch is divided into shares, one for each worker, that are applied at the same time. A
//! table belongs to one worker, chosen by its name; one with many changes in the batch is split by the key of its rows.
//!
//! # Why the result is the same
//!
//! - All changes of one row go to one worker, in their order. A row is known by the text of its key. A table is split only
//!   where equal keys have equal texts ([`Plan::splits`]), so no two workers ever meet at one row.
//! - Two rows of one table can notice each other through a unique index or an exclusion constraint. A table is split only if
//!   every such index holds all columns of the key: rows that conflict there have the same key, and so the same worker.
//! - An update that changes the key concerns two rows: its table is not split in this batch.
//! - Two tables cannot notice each other, for the reasons that [`super::net`] gives. A batch with a TRUNCATE, or with
//!   a table where something on the target reacts to applied rows, is not divided at all.
//!
//! # After a death
//!
//! Shares are committed one after the other, each with the worker's own progress, the first worker's last, together with the
//! progress of the move. A death in between leaves the shares of some workers on the target, and the batch not. The next run gets
//! the same source transactions again, and must leave out exactly what those workers have. So the division is written down
//! with each worker's progress, and [`Division::worker`] depends on nothing but that and the change itself: never on what
//! else was in the batch, nor on the version of pgtandem.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::change::{Change, Row};
use super::net::Key;
use super::relation::{Finder, Plan};
use crate::postgres::pgoutput::Tuple;
use crate::postgres::{Lsn, QualifiedName};
use crate::state::WorkersAhead;

/// Fewer changes than this are not worth a second transaction.
const DIVIDE_FROM: usize = 16;

/// A table with so many changes in a batch is split.
const SPLIT_FROM: usize = 16;

/// How a batch is divided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Division {
    /// How many workers share it, the first included.
    pub workers: u16,
    /// The tables that are split by key.
    pub split: BTreeSet<QualifiedName>,
}

impl Division {
    /// How this batch is divided among so many workers; `None` if one of them shall apply it whole.
    pub(super) fn of(changes: &[Change], workers: u16) -> Option<Self> {
        if workers < 2 || changes.len() < DIVIDE_FROM {
            return None;
        }
        let mut tables: HashMap<u64, (&Plan, usize, bool)> = HashMap::new();
        for change in changes {
            if change.plan.observed || matches!(change.row, Row::Truncate(_)) {
                return None;
            }
            let (plan, count, _) =
                tables.entry(change.plan.generation).or_insert((&change.plan, 0, change.plan.splits()));
            *count += 1;
            if plan.splits() && key(change).is_none() {
                tables.insert(change.plan.generation, (&change.plan, 0, false));
            }
        }
        // Two shapes of a table in the same batch may have different keys.
        let mut names = HashSet::new();
        let whole: HashSet<&QualifiedName> = tables
            .values()
            .filter(|(plan, _, splits)| !names.insert(&plan.name) || !splits)
            .map(|(plan, ..)| &plan.name)
            .collect();
        let split = tables
            .values()
            .filter(|(plan, count, _)| *count >= SPLIT_FROM && !whole.contains(&plan.name))
            .map(|(plan, ..)| plan.name.clone())
            .collect();
        Some(Self { workers, split })
    }

    /// Whose change it is, from 0 on.
    pub(super) fn worker(&self, change: &Change) -> u16 {
        let name = &change.plan.name;
        let mut hash = Fnv::default();
        hash.part(name.schema.as_bytes());
        hash.part(name.name.as_bytes());
        if self.split.contains(name)
            && let Some(key) = key(change)
        {
            key.parts().iter().for_each(|part| hash.part(part));
        }
        hash.among(self.workers)
    }

    /// The shares, one for each worker.
    pub(super) fn deal(&self, changes: Vec<Change>) -> Vec<Vec<Change>> {
        let mut shares: Vec<Vec<Change>> = (0..self.workers).map(|_| Vec::new()).collect();
        for change in changes {
            if let Some(share) = shares.get_mut(usize::from(self.worker(&change))) {
                share.push(change);
            }
        }
        shares
    }
}

/// What some workers have on the target already of a batch that was not completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ahead {
    /// The end of that batch.
    pub until: Lsn,
    /// How it was divided.
    pub division: Division,
    /// Whose shares are there.
    pub done: BTreeSet<u16>,
}

impl Ahead {
    /// Whether the change is on the target already.
    pub(super) fn has(&self, change: &Change) -> bool {
        // A commit that begins before the end of the batch is in it.
        change.at.commit_lsn < self.until && self.done.contains(&self.division.worker(change))
    }
}

impl From<WorkersAhead> for Ahead {
    fn from(WorkersAhead { until, workers, split, done }: WorkersAhead) -> Self {
        Self { until, division: Division { workers, split }, done }
    }
}

/// The key of the row that is changed; `None` where there is none, or two.
fn key(change: &Change) -> Option<Key<'_>> {
    let Finder::Key(columns) = &change.plan.finder else { return None };
    let of = |tuple| Key::of(columns, tuple);
    match &change.row {
        Row::Insert(tuple) | Row::Delete(tuple) => of(tuple),
        Row::Update { old, new } => {
            let key = of(new)?;
            old.as_ref().is_none_or(|old: &Tuple| of(old).as_ref() == Some(&key)).then_some(key)
        }
        Row::Truncate(_) => None,
    }
}

/// FNV-1a, 64 bits. It is part of the layout of the state: another one would find another worker after an upgrade.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    /// With its length before it, so that ("a", "bc") and ("ab", "c") differ.
    fn part(&mut self, bytes: &[u8]) {
        let length = (bytes.len() as u64).to_le_bytes();
        for byte in length.iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// Its low bits alone are no good: they hold little of the high bits of what went in.
    fn among(&self, workers: u16) -> u16 {
        let mixed = (self.0 ^ (self.0 >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        u16::try_from(mixed % u64::from(workers.max(1))).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::follow::change::Position;
    use crate::follow::net::tests::{row, tuple};
    use crate::follow::relation::tests::planned;

    fn plan(name: &str, generation: u64, splits: bool) -> Arc<Plan> {
        let mut plan = planned(Finder::Key(vec![0]), 2);
        plan.name = QualifiedName::new("public", name);
        plan.generation = generation;
        plan.columns.iter_mut().for_each(|column| column.parts = splits);
        Arc::new(plan)
    }

    fn change(plan: &Arc<Plan>, commit: u64, row: Row) -> Change {
        Change { plan: Arc::clone(plan), at: Position { commit_lsn: Lsn::new(commit), xid: 1 }, row }
    }

    fn insert(plan: &Arc<Plan>, key: u32) -> Change {
        change(plan, 1, Row::Insert(tuple(&row(&[&key.to_string(), "v"]))))
    }

    #[test]
    fn a_table_with_many_changes_is_split_and_a_row_stays_with_its_worker() {
        let (large, small) = (plan("large", 1, true), plan("small", 2, true));
        let mut changes: Vec<Change> = (0..200).map(|id| insert(&large, id)).collect();
        changes.extend((0..5).map(|id| insert(&small, id)));
        let division = Division::of(&changes, 3).unwrap();
        assert_eq!(division.split, BTreeSet::from([large.name.clone()]));
        let update = change(&large, 9, Row::Update { old: None, new: tuple(&row(&["7", "other"])) });
        assert_eq!(division.worker(&update), division.worker(&insert(&large, 7)));
        let shares = division.deal(changes);
        assert!(shares.iter().all(|share| share.len() > 30), "{:?}", shares.iter().map(Vec::len).collect::<Vec<_>>());
        let holders = shares.iter().filter(|share| share.iter().any(|change| change.plan.name == small.name)).count();
        assert_eq!(holders, 1, "a table with few changes has one worker");
    }

    #[test]
    fn a_batch_whose_order_can_be_noticed_is_not_divided() {
        let table = plan("t", 1, true);
        let mut changes: Vec<Change> = (0..50).map(|id| insert(&table, id)).collect();
        assert!(Division::of(&changes, 2).is_some());
        assert!(Division::of(&changes, 1).is_none() && Division::of(&changes[..5], 2).is_none());
        changes.push(change(&table, 1, Row::Truncate("TRUNCATE t".into())));
        assert!(Division::of(&changes, 2).is_none());
        changes.pop();
        let mut observed = planned(Finder::Key(vec![0]), 2);
        observed.observed = true;
        changes.push(insert(&Arc::new(observed), 1));
        assert!(Division::of(&changes, 2).is_none());
    }

    #[test]
    fn a_table_whose_keys_change_or_whose_rows_can_conflict_stays_with_one_worker() {
        let (moving, conflicting) = (plan("moving", 1, true), plan("conflicting", 2, false));
        let mut changes: Vec<Change> = (0..50).flat_map(|id| [insert(&moving, id), insert(&conflicting, id)]).collect();
        let (old, new) = (Some(tuple(&row(&["1", "?"]))), tuple(&row(&["99", "v"])));
        changes.push(change(&moving, 1, Row::Update { old, new }));
        changes.extend((100..150).map(|id| insert(&moving, id)));
        // The same table in another shape.
        changes.extend((200..250).map(|id| insert(&plan("moving", 3, true), id)));
        let division = Division::of(&changes, 4).unwrap();
        assert_eq!(division.split, BTreeSet::new());
        let shares = division.deal(changes);
        assert!(shares.iter().filter(|share| !share.is_empty()).count() <= 2);
    }

    #[test]
    fn the_worker_of_a_change_is_the_same_in_every_version() {
        let table = plan("t", 1, true);
        let division = Division { workers: 4, split: BTreeSet::from([table.name.clone()]) };
        let workers: Vec<u16> = (0..12).map(|id| division.worker(&insert(&table, id))).collect();
        let whole = Division { workers: 4, ..Division::default() };
        assert_eq!((workers, whole.worker(&insert(&table, 1))), (vec![1, 1, 1, 0, 0, 3, 3, 3, 1, 0, 2, 0], 2));
    }

    proptest! {
        /// What was left out because it is there, and what is applied again, are all changes, each once.
        #[test]
        fn after_a_death_each_change_is_applied_once(
            keys in prop::collection::vec((0u32..40, 0usize..3), 16..200), workers in 2u16..6, died in any::<u16>()) {
            let tables = [plan("a", 1, true), plan("b", 2, true), plan("c", 3, false)];
            let changes: Vec<Change> = keys.iter().map(|(key, table)| insert(&tables[*table], *key)).collect();
            let division = Division::of(&changes, workers).unwrap();
            let done: BTreeSet<u16> = (1..workers).filter(|worker| died & (1 << worker) != 0).collect();
            let ahead = Ahead { until: Lsn::new(2), division: division.clone(), done: done.clone() };
            let (there, again): (Vec<&Change>, Vec<&Change>) = changes.iter().partition(|change| ahead.has(change));
            let shares = division.deal(changes.clone());
            let committed: usize = done.iter().map(|worker| shares[usize::from(*worker)].len()).sum();
            prop_assert_eq!(there.len(), committed);
            prop_assert_eq!(again.len(), changes.len() - committed);
            prop_assert!(!ahead.has(&change(&tables[0], 2, Row::Insert(tuple(&row(&["1", "v"]))))), "of a later batch");
        }
    }
}
