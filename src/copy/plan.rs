//! Which table is copied by whom: units of work, largest first. Pure.

use std::collections::{HashMap, HashSet};

use crate::postgres::QualifiedName;
use crate::postgres::catalog::Table;
use crate::state::{TableRecord, TableState};

/// A range of blocks of a heap; the last one has no end, so that blocks added since it was planned are in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// The first block.
    pub from: u64,
    /// The first block that is not in it any more.
    pub to: Option<u64>,
}

/// What one worker copies in one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Which of [`Plan::tables`].
    pub table: usize,
    /// `None`: the whole table.
    pub blocks: Option<Blocks>,
    /// About how much it is; decides the order only.
    pub bytes: u64,
    /// Begins only once every table that is not late is copied.
    pub late: bool,
}

/// A table that is not copied yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// The table of the source.
    pub table: Table,
    /// In how many units it is copied.
    pub parts: usize,
    /// An earlier run began it: what the target holds of it is ours, and is thrown away.
    pub begun: bool,
}

/// See [`plan`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The tables to copy.
    pub tables: Vec<Planned>,
    /// What to do, largest first.
    pub units: Vec<Unit>,
}

/// How large tables are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Splitting {
    /// In bytes; a table above is copied by several workers.
    pub above: u64,
    /// Of how many bytes a block is.
    pub block_size: u64,
    /// How many workers there are.
    pub workers: usize,
}

/// A table is never divided into more units than this.
const MOST_PARTS: u64 = 4096;

/// Plans the copy of all `tables` that the state does not know as copied.
///
/// `late` are oids of tables whose rows are checked against those of others: they come last.
///
/// `splitting` is `None` where the source cannot read a range of blocks without reading the whole table: before
/// PostgreSQL 14.
#[must_use]
pub fn plan(tables: Vec<Table>, records: &[TableRecord], late: &HashSet<u32>, splitting: Option<Splitting>) -> Plan {
    let states: HashMap<&QualifiedName, TableState> = records.iter().map(|r| (&r.name, r.state)).collect();
    let mut plan = Plan::default();
    for table in tables {
        let state = states.get(&table.name).copied().unwrap_or(TableState::Pending);
        if state == TableState::Copied {
            continue;
        }
        let at = plan.tables.len();
        let ranges = splitting.map(|s| ranges(&table, s)).unwrap_or_default();
        let parts = ranges.len().max(1);
        let bytes = table.bytes / parts as u64;
        let late = late.contains(&table.oid);
        if ranges.is_empty() {
            plan.units.push(Unit { table: at, blocks: None, bytes, late });
        } else {
            plan.units.extend(ranges.into_iter().map(|blocks| Unit { table: at, blocks: Some(blocks), bytes, late }));
        }
        plan.tables.push(Planned { table, parts, begun: state == TableState::Copying });
    }
    // Stable: the parts of a table stay in the order of its blocks.
    plan.units.sort_by_key(|unit| (unit.late, std::cmp::Reverse(unit.bytes)));
    plan
}

/// The ranges of a table that is large enough to be divided; empty for others.
fn ranges(table: &Table, splitting: Splitting) -> Vec<Blocks> {
    let blocks = table.heap_bytes / splitting.block_size.max(1);
    let worth_it = table.bytes > splitting.above && splitting.workers > 1;
    let has_columns = table.columns.iter().any(|column| !column.generated);
    if !worth_it || !has_columns || blocks < 2 {
        return Vec::new();
    }
    let parts = table.bytes.div_ceil(splitting.above.max(1)).max(splitting.workers as u64).min(MOST_PARTS).min(blocks);
    let bound = |part: u64| u64::try_from(u128::from(blocks) * u128::from(part) / u128::from(parts)).unwrap_or(blocks);
    (0..parts).map(|part| Blocks { from: bound(part), to: (part + 1 < parts).then(|| bound(part + 1)) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::catalog::{Column, ReplicaIdentity};
    use proptest::prelude::*;

    const SPLITTING: Splitting = Splitting { above: 1 << 30, block_size: 8192, workers: 4 };

    fn table(name: &str, heap_bytes: u64, bytes: u64) -> Table {
        Table {
            oid: 1,
            name: QualifiedName::new("public", name),
            columns: vec![Column {
                name: "id".to_owned(),
                type_name: "int8".to_owned(),
                generated: false,
                identity_always: false,
            }],
            primary_key: Vec::new(),
            identity: ReplicaIdentity::Nothing,
            above: Vec::new(),
            heap_bytes,
            bytes,
        }
    }

    fn record(name: &str, state: TableState) -> TableRecord {
        TableRecord {
            name: QualifiedName::new("public", name),
            state,
            cut_lsn: None,
            rows: 0,
            bytes: 0,
            bytes_total: 0,
        }
    }

    #[test]
    fn finished_tables_stay_and_begun_ones_begin_again() {
        let tables = ["done", "begun", "new"].map(|name| table(name, 0, 0)).to_vec();
        let records = [record("done", TableState::Copied), record("begun", TableState::Copying)];
        let plan = plan(tables, &records, &HashSet::new(), Some(SPLITTING));
        let planned: Vec<_> = plan.tables.iter().map(|p| (p.table.name.name.as_str(), p.begun)).collect();
        assert_eq!(planned, [("begun", true), ("new", false)]);
        assert_eq!(plan.units.len(), 2);
    }

    #[test]
    fn the_largest_unit_comes_first() {
        let tables =
            vec![table("small", 1 << 20, 1 << 20), table("huge", 3 << 30, 3 << 30), table("large", 1 << 30, 1 << 30)];
        let plan = plan(tables, &[], &HashSet::new(), Some(SPLITTING));
        let order: Vec<_> = plan.units.iter().map(|u| plan.tables[u.table].table.name.name.as_str()).collect();
        assert_eq!(order, ["large", "huge", "huge", "huge", "huge", "small"]);
    }

    #[test]
    fn what_is_checked_against_others_comes_last() {
        let mut tables = vec![table("checked", 3 << 30, 3 << 30), table("small", 1, 1)];
        tables[0].oid = 7;
        let plan = plan(tables, &[], &HashSet::from([7]), Some(SPLITTING));
        let late: Vec<_> = plan.units.iter().map(|u| (plan.tables[u.table].table.name.name.as_str(), u.late)).collect();
        assert_eq!(late[0], ("small", false));
        assert!(late.len() > 2 && late[1..].iter().all(|unit| *unit == ("checked", true)), "{late:?}");
    }

    #[test]
    fn an_old_source_or_a_single_worker_divides_nothing() {
        let tables = || vec![table("huge", 9 << 30, 9 << 30)];
        assert_eq!(plan(tables(), &[], &HashSet::new(), None).units.len(), 1);
        assert_eq!(plan(tables(), &[], &HashSet::new(), Some(Splitting { workers: 1, ..SPLITTING })).units.len(), 1);
    }

    proptest! {
        #[test]
        fn ranges_hold_every_block_once(heap in 0..1u64 << 45, toast in 0..1u64 << 45, above in 1..1u64 << 40, workers in 1..64usize) {
            let found = ranges(&table("t", heap, heap + toast), Splitting { above, block_size: 8192, workers });
            if let (Some(first), Some(last)) = (found.first(), found.last()) {
                prop_assert_eq!(first.from, 0);
                prop_assert_eq!(last.to, None);
                prop_assert!(found.len() <= MOST_PARTS as usize);
                for pair in found.windows(2) {
                    prop_assert_eq!(pair[0].to, Some(pair[1].from));
                    prop_assert!(pair[0].from < pair[1].from);
                }
            }
        }
    }
}
