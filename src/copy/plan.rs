//! Which table is copied by whom: units of work, those of large tables first. Pure.
//!
//! # Why units are small
//!
//! A table above `copy.split_above` is cut into many more units than there are workers. A worker that is done takes the next
//! one, so all end at about the same time whatever a unit turns out to hold; and a death loses what was in flight, which is
//! one unit of each worker.
//!
//! # Why small tables are one unit
//!
//! What a transaction and its statements take is more than what the rows of a small table take. So neighbours in the plan that are small
//! go over together, each by a COPY of its own.

use std::collections::HashMap;

use super::division::{Division, Range};
use super::pump::{Form, Moved};
use crate::config::TablePattern;
use crate::postgres::QualifiedName;
use crate::postgres::catalog::{ReplicaIdentity, Table};
use crate::state::{Begun, FinishedUnit, TableRecord, TableState};

/// What one worker copies in one go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// What it holds.
    pub content: Content,
    /// Begins only once every table that is not late is copied.
    pub late: bool,
}

/// Rows that are one transaction of the target; which of [`Plan::tables`] they are of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// All rows of these tables: one table, or several small ones.
    Tables(Vec<usize>),
    /// Some rows of a table.
    Part(usize, Range),
}

/// How a table comes into the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Emptied, filled and recorded in one transaction.
    Whole,
    /// Emptied, then filled unit by unit.
    Parts(Division),
    /// These units are there; the others are added to them.
    Rest(Division, Vec<FinishedUnit>),
}

/// What is known of a table when the copy is planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The table of the source, as the cut shows it.
    pub table: Table,
    /// What tells this table from another one of its name, and from what it was before it was rewritten or altered.
    pub shape: String,
    /// How it can be read in ranges; `None` where each range would take a reading of the whole table, and where nobody asked.
    pub division: Option<Division>,
    /// Both sides read the binary form of all its columns alike.
    pub binary: bool,
    /// Its rows are checked against those of other tables: it comes last.
    pub late: bool,
}

impl Candidate {
    /// How its rows are written down.
    pub(super) fn form(&self) -> Form {
        if self.binary { Form::Binary } else { Form::Text }
    }
}

/// What units come to together.
pub(super) fn total(units: &[FinishedUnit]) -> Moved {
    let mut total = Moved::default();
    for unit in units {
        total += Moved { rows: unit.rows, bytes: unit.bytes };
    }
    total
}

/// A table that is not copied yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// The table and what is known of it.
    pub of: Candidate,
    /// How it is copied.
    pub manner: Manner,
    /// In how many units, without those that are there.
    pub parts: usize,
    /// An earlier run began it: what the target holds of it is ours.
    pub begun: bool,
}

/// See [`plan`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The tables to copy.
    pub tables: Vec<Planned>,
    /// What to do, in this order.
    pub units: Vec<Unit>,
}

/// How large tables are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Splitting {
    /// In bytes; a table above is copied in units.
    pub above: u64,
    /// Of how many bytes a block is.
    pub block_size: u64,
}

/// About so large is a unit, in bytes of heap and TOAST.
const UNIT: u64 = 32 << 20;

/// A table is never divided into many more units than this.
pub(super) const MOST_PARTS: u64 = 4096;

/// A smaller table may go over together with others, in bytes of heap and TOAST.
pub(super) const SMALL: u64 = 256 << 10;

/// So many small tables are one unit at most.
const MOST_TOGETHER: usize = 32;

/// So many columns they have at most: the servers' answers about all of them have to wait in a socket's buffer, see [`super::pump`].
const MOST_COLUMNS: usize = 4096;

/// Plans the copy of all `tables` that the state does not know as copied.
///
/// Those that match one of `first` come first, in the order of `first`; then the largest, whose indexes take longest. `begun` is what
/// the target holds of tables that were begun.
#[must_use]
pub fn plan(
    tables: Vec<Candidate>,
    records: &[TableRecord],
    begun: &HashMap<QualifiedName, Begun>,
    first: &[TablePattern],
    splitting: Splitting,
) -> Plan {
    let states: HashMap<&QualifiedName, TableState> = records.iter().map(|r| (&r.name, r.state)).collect();
    let mut plan = Plan::default();
    for of in tables {
        let name = &of.table.name;
        let state = states.get(name).copied().unwrap_or(TableState::Pending);
        if state == TableState::Copied {
            continue;
        }
        let at = plan.tables.len();
        let there = begun.get(name).filter(|begun| state == TableState::Copying && can_go_on(&of, begun));
        let (manner, ranges) = match (there, &of.division) {
            (Some(there), Some(division)) => {
                let missing = missing(&of.table, division, &there.units, splitting);
                (Manner::Rest(division.clone(), there.units.clone()), missing)
            }
            (_, Some(division)) if is_divided(&of.table, division, splitting) => {
                (Manner::Parts(division.clone()), missing(&of.table, division, &[], splitting))
            }
            _ => (Manner::Whole, Vec::new()),
        };
        let contents: Vec<Content> = match manner {
            Manner::Whole => vec![Content::Tables(vec![at])],
            Manner::Parts(_) | Manner::Rest(..) => ranges.into_iter().map(|range| Content::Part(at, range)).collect(),
        };
        let parts = contents.len();
        plan.units.extend(contents.into_iter().map(|content| Unit { content, late: of.late }));
        plan.tables.push(Planned { of, manner, parts, begun: state == TableState::Copying });
    }
    let tables = &plan.tables;
    let place = |unit: &Unit| {
        let table = unit.first_table().and_then(|at| tables.get(at)).map(|planned| &planned.of.table);
        let wanted = table.and_then(|table| first.iter().position(|pattern| is_meant(pattern, table)));
        (unit.late, wanted.unwrap_or(first.len()), std::cmp::Reverse(table.map_or(0, |table| table.bytes)))
    };
    // Stable: the units of a table stay in the order of its ranges.
    let mut units = std::mem::take(&mut plan.units);
    units.sort_by_cached_key(place);
    plan.units = together(units, &plan.tables);
    plan
}

/// Makes neighbours one unit where they are small; so far each table is one of its own. A table that an earlier run began stays alone: what the target holds of it is removed.
fn together(units: Vec<Unit>, tables: &[Planned]) -> Vec<Unit> {
    let columns_of = |content: &Content| {
        let Content::Tables(of) = content else { return None };
        let planned = tables.get(*of.first()?)?;
        (planned.of.table.bytes <= SMALL && !planned.begun).then_some(planned.of.table.columns.len())
    };
    let mut joined: Vec<Unit> = Vec::new();
    let mut columns = None;
    for unit in units {
        let more = columns_of(&unit.content);
        let both = columns.zip(more).map(|(columns, more)| columns + more).filter(|&both| both <= MOST_COLUMNS);
        if let (Some(both), Some(Unit { content: Content::Tables(before), late }), Content::Tables(these)) =
            (both, joined.last_mut(), &unit.content)
            && *late == unit.late
            && before.len() < MOST_TOGETHER
        {
            before.extend(these);
            columns = Some(both);
        } else {
            joined.push(unit);
            columns = more;
        }
    }
    joined
}

impl Unit {
    fn first_table(&self) -> Option<usize> {
        match &self.content {
            Content::Tables(tables) => tables.first().copied(),
            Content::Part(table, _) => Some(*table),
        }
    }

    /// Its tables, each in a unit of its own.
    pub(super) fn alone(&self) -> Vec<Self> {
        let late = self.late;
        match &self.content {
            Content::Tables(tables) => {
                tables.iter().map(|&at| Self { content: Content::Tables(vec![at]), late }).collect()
            }
            Content::Part(..) => vec![self.clone()],
        }
    }
}

/// A partitioned table stands for its partitions.
fn is_meant(pattern: &TablePattern, table: &Table) -> bool {
    std::iter::once(&table.name).chain(&table.above).any(|name| pattern.matches(&name.schema, &name.name))
}

/// What was copied under an earlier cut can be brought to this one: it is the same table, and what changed in it was published.
fn can_go_on(of: &Candidate, begun: &Begun) -> bool {
    begun.shape == of.shape && !begun.units.is_empty() && of.table.identity != ReplicaIdentity::Nothing
}

fn is_divided(table: &Table, division: &Division, splitting: Splitting) -> bool {
    let has_columns = table.columns.iter().any(|column| !column.generated);
    table.bytes > splitting.above && has_columns && division.places(table.heap_bytes / splitting.block_size.max(1)) >= 2
}

/// Into how many units a table is divided that has this many bytes.
pub(super) fn parts(bytes: u64, above: u64) -> u64 {
    bytes.div_ceil(UNIT.min(above).max(bytes / MOST_PARTS).max(1))
}

/// The ranges of a table that are not there, each about as large as a unit is to be. Together with `there` they hold every row
/// once, also those of blocks that come to the table later.
fn missing(table: &Table, division: &Division, there: &[FinishedUnit], splitting: Splitting) -> Vec<Range> {
    let places = division.places(table.heap_bytes / splitting.block_size.max(1));
    let step = match division {
        Division::Blocks => places.div_ceil(parts(table.bytes, splitting.above).max(1)),
        // Each share is a unit.
        Division::Key(_) => 1,
    };
    let step = step.max(1);
    let mut ranges = Vec::new();
    let mut fill = |mut from: u64, to: Option<u64>| {
        let end = to.unwrap_or(places);
        while end.saturating_sub(from) > step {
            ranges.push(Range { from, to: Some(from + step) });
            from += step;
        }
        if to.is_none_or(|to| from < to) {
            ranges.push(Range { from, to });
        }
    };
    let mut from = Some(0);
    for unit in there {
        let Some(begin) = from else { break };
        if begin < unit.range.from {
            fill(begin, Some(unit.range.from));
        }
        from = unit.range.to;
    }
    if let Some(begin) = from {
        fill(begin, None);
    }
    ranges
}

/// Ranges that follow one another, as one.
#[must_use]
pub fn joined(units: &[FinishedUnit]) -> Vec<Range> {
    let mut joined: Vec<Range> = Vec::new();
    for unit in units {
        match joined.last_mut() {
            Some(last) if last.to == Some(unit.range.from) => last.to = unit.range.to,
            _ => joined.push(unit.range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::super::division::Shares;
    use super::*;
    use crate::postgres::Lsn;
    use crate::postgres::catalog::Column;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const SPLITTING: Splitting = Splitting { above: 1 << 30, block_size: 8192 };

    fn table(name: &str, heap_bytes: u64, bytes: u64) -> Candidate {
        let table = Table {
            oid: 1,
            name: QualifiedName::new("public", name),
            columns: vec![Column {
                name: "id".to_owned(),
                type_name: "int8".to_owned(),
                generated: false,
                identity_always: false,
            }],
            primary_key: Vec::new(),
            identity: ReplicaIdentity::Full,
            above: Vec::new(),
            heap_bytes,
            bytes,
        };
        Candidate { table, shape: "this".to_owned(), division: Some(Division::Blocks), binary: false, late: false }
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

    fn unit(from: u64, to: Option<u64>) -> FinishedUnit {
        FinishedUnit { range: Range { from, to }, cut_lsn: Lsn::new(1), rows: 0, bytes: 0 }
    }

    fn by_key(bounds: &[&str]) -> Division {
        Division::Key(Shares::new("id", "text", bounds))
    }

    fn simply(tables: Vec<Candidate>) -> Plan {
        plan(tables, &[], &HashMap::new(), &[], SPLITTING)
    }

    /// Names of the units' tables, without repetitions in a row.
    fn order(plan: &Plan) -> Vec<&str> {
        let tables = plan.units.iter().flat_map(|unit| match &unit.content {
            Content::Tables(tables) => tables.clone(),
            Content::Part(table, _) => vec![*table],
        });
        let mut order: Vec<_> = tables.map(|at| plan.tables[at].of.table.name.name.as_str()).collect();
        order.dedup();
        order
    }

    #[test]
    fn finished_tables_stay_and_begun_ones_begin_again() {
        let tables = ["done", "begun", "new"].map(|name| table(name, 0, 0)).to_vec();
        let records = [record("done", TableState::Copied), record("begun", TableState::Copying)];
        let plan = plan(tables, &records, &HashMap::new(), &[], SPLITTING);
        let planned: Vec<_> = plan.tables.iter().map(|p| (p.of.table.name.name.as_str(), p.begun)).collect();
        assert_eq!(planned, [("begun", true), ("new", false)]);
        assert_eq!(plan.units.len(), 2, "what was begun goes alone");
    }

    #[test]
    fn the_largest_table_comes_first_unless_another_one_is_wanted_first() {
        let tables = || {
            vec![table("small", 1 << 20, 1 << 20), table("huge", 3 << 30, 3 << 30), table("large", 1 << 30, 1 << 30)]
        };
        assert_eq!(order(&simply(tables())), ["huge", "large", "small"]);
        let first = [TablePattern::new("public.sm*").unwrap()];
        let wanted = plan(tables(), &[], &HashMap::new(), &first, SPLITTING);
        assert_eq!(order(&wanted), ["small", "huge", "large"]);
    }

    #[test]
    fn small_tables_go_over_together() {
        let mut tables: Vec<Candidate> = (0..100).map(|at| table(&format!("t{at}"), 8192, 8192)).collect();
        tables[99].late = true;
        tables.push(table("large", 1 << 20, 1 << 20));
        let records = [record("t98", TableState::Copying)];
        let plan = plan(tables, &records, &HashMap::new(), &[], SPLITTING);
        let sizes: Vec<usize> = plan
            .units
            .iter()
            .map(|unit| match &unit.content {
                Content::Tables(tables) => tables.len(),
                Content::Part(..) => 0,
            })
            .collect();
        // The large one, those that are small, the one that was begun, the one that is late.
        assert_eq!(sizes, [1, 32, 32, 32, 2, 1, 1]);
        assert!(plan.tables.iter().all(|planned| planned.parts == 1));
    }

    #[test]
    fn tables_of_very_many_columns_stay_alone() {
        let mut wide = table("wide", 0, 0);
        wide.table.columns = vec![wide.table.columns[0].clone(); 1600];
        let plan = simply(vec![wide.clone(), wide.clone(), wide]);
        assert_eq!(plan.units[0].content, Content::Tables(vec![0, 1]));
        assert_eq!(plan.units[1].content, Content::Tables(vec![2]));
    }

    #[test]
    fn what_is_checked_against_others_comes_last() {
        let mut tables = vec![table("checked", 3 << 30, 3 << 30), table("small", 1, 1)];
        tables[0].late = true;
        let first = [TablePattern::new("checked").unwrap()];
        assert_eq!(order(&plan(tables, &[], &HashMap::new(), &first, SPLITTING)), ["small", "checked"]);
    }

    #[test]
    fn a_table_is_divided_by_what_its_source_can_read() {
        let huge = |division| simply(vec![Candidate { division, ..table("huge", 9 << 30, 9 << 30) }]).units;
        assert_eq!(huge(None).len(), 1);
        assert_eq!(huge(Some(Division::Blocks)).len(), 9 * 32);
        let shares = huge(Some(by_key(&["b", "c"])));
        let of = |from, to| Content::Part(0, Range { from, to });
        let contents: Vec<_> = shares.into_iter().map(|unit| unit.content).collect();
        assert_eq!(contents, [of(0, Some(1)), of(1, Some(2)), of(2, None)]);
        // A key of one value divides nothing.
        assert_eq!(huge(Some(by_key(&[])))[0].content, Content::Tables(vec![0]));
    }

    #[test]
    fn units_of_the_same_table_are_kept_and_those_of_another_are_not() {
        let records = [record("t", TableState::Copying)];
        let begun = |shape: &str| {
            let units = vec![unit(0, Some(4096)), unit(8192, Some(12288))];
            HashMap::from([(QualifiedName::new("public", "t"), Begun { shape: shape.to_owned(), bounds: None, units })])
        };
        let of = |shape: &str, candidate: Candidate| plan(vec![candidate], &records, &begun(shape), &[], SPLITTING);
        let kept = of("this", table("t", 2 << 30, 2 << 30));
        assert!(matches!(&kept.tables[0].manner, Manner::Rest(_, units) if units.len() == 2));
        assert_eq!(kept.tables[0].parts, 64 - 2);
        assert_eq!(of("another", table("t", 2 << 30, 2 << 30)).tables[0].manner, Manner::Parts(Division::Blocks));
        let mut unpublished = table("t", 2 << 30, 2 << 30);
        unpublished.table.identity = ReplicaIdentity::Nothing;
        assert_eq!(of("this", unpublished).tables[0].manner, Manner::Parts(Division::Blocks));
        // Also where it would not be divided any more.
        assert!(matches!(of("this", table("t", 1 << 20, 1 << 20)).tables[0].manner, Manner::Rest(..)));
    }

    #[test]
    fn ranges_that_touch_are_one() {
        let units = [unit(0, Some(3)), unit(3, Some(5)), unit(7, Some(9)), unit(9, None)];
        assert_eq!(joined(&units), [Range { from: 0, to: Some(5) }, Range { from: 7, to: None }]);
    }

    proptest! {
        /// What is there and what is missing are all places, each once, whatever is there and whatever size the units have by now.
        #[test]
        fn every_place_is_there_once(
            heap in 0..1u64 << 42, toast in 0..1u64 << 42, above in 1..1u64 << 40,
            ends in proptest::collection::btree_set(0..1u64 << 30, 0..12), finished: [bool; 13],
            shares in proptest::option::of(0..200_usize),
        ) {
            let last = shares.map_or(u64::MAX, |shares| shares as u64);
            let ends: BTreeSet<u64> = ends.iter().map(|end| end % last.saturating_add(1)).collect();
            let ends = ends.into_iter().map(Some).chain([None]);
            let mut from = 0;
            let mut there = Vec::new();
            for (to, finished) in ends.zip(finished) {
                if finished && to != Some(from) {
                    there.push(unit(from, to));
                }
                from = to.unwrap_or(0);
            }
            let division = shares.map_or(Division::Blocks, |shares| by_key(&vec!["k"; shares]));
            let table = table("t", heap, heap + toast).table;
            let found = missing(&table, &division, &there, Splitting { above, block_size: 8192 });
            let mut all: Vec<Range> = there.iter().map(|unit| unit.range).chain(found).collect();
            all.sort_by_key(|range| range.from);
            prop_assert_eq!(all[0].from, 0);
            prop_assert_eq!(all[all.len() - 1].to, None);
            for pair in all.windows(2) {
                prop_assert_eq!(pair[0].to, Some(pair[1].from));
                prop_assert!(pair[0].from < pair[1].from);
            }
        }
    }
}
