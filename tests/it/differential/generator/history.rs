//! Random changes: what happens to the tables, in several sessions whose transactions overlap.

use proptest::prelude::*;

use super::schema::{Placed, Table};

/// One thing that happens. Numbers are taken modulo what there is.
#[derive(Clone, Debug)]
pub enum Event {
    /// A statement of a session, inside its transaction, which it opens if need be.
    Change {
        session: u8,
        table: u8,
        change: Change,
    },
    /// TRUNCATE of some tables.
    Truncate {
        session: u8,
        tables: Vec<u8>,
        cascade: bool,
        restart: bool,
    },
    Savepoint {
        session: u8,
    },
    RollbackToSavepoint {
        session: u8,
    },
    Commit {
        session: u8,
    },
    Rollback {
        session: u8,
    },
    /// Two-phase: decided at the end of the stage, or by the next of its kind.
    Prepare {
        session: u8,
    },
    Decide {
        commit: bool,
    },
    /// A logical message of somebody else.
    Message {
        session: u8,
        transactional: bool,
    },
    /// REPLICA IDENTITY FULL, or what it was.
    Identity {
        table: u8,
        full: bool,
    },
    /// SIGKILL for the daemon, and the next one.
    Kill,
}

/// What happens to a table.
#[derive(Clone, Debug)]
pub enum Change {
    Insert {
        key: u8,
        value: u8,
        wide: bool,
    },
    InsertMany {
        from: u8,
        count: u8,
        value: u8,
    },
    Copy {
        from: u8,
        count: u8,
    },
    Upsert {
        key: u8,
        value: u8,
    },
    /// Sets one column of the rows that are picked.
    Set {
        pick: Pick,
        column: u8,
        value: u8,
    },
    /// The key of one row.
    SetKey {
        pick: Pick,
        to: u8,
    },
    /// Two rows exchange their keys, or their values of the second unique index.
    Swap {
        one: u8,
        other: u8,
        keys: bool,
    },
    /// The keys of all rows.
    Shift {
        by: i8,
    },
    Delete {
        pick: Pick,
    },
    /// Gone and there again.
    Replace {
        key: u8,
        value: u8,
    },
}

/// Which rows.
#[derive(Clone, Copy, Debug)]
pub enum Pick {
    Key(u8),
    /// One of them, also where nothing tells it from its like.
    Any(u8),
    Some(u8),
    All,
}

pub fn event() -> impl Strategy<Value = Event> {
    let session = 0..3u8;
    prop_oneof![
        40 => (session.clone(), any::<u8>(), change()).prop_map(|(session, table, change)| Event::Change { session, table, change }),
        2 => (session.clone(), prop::collection::vec(any::<u8>(), 1..4), any::<bool>(), any::<bool>())
            .prop_map(|(session, tables, cascade, restart)| Event::Truncate { session, tables, cascade, restart }),
        3 => session.clone().prop_map(|session| Event::Savepoint { session }),
        2 => session.clone().prop_map(|session| Event::RollbackToSavepoint { session }),
        9 => session.clone().prop_map(|session| Event::Commit { session }),
        2 => session.clone().prop_map(|session| Event::Rollback { session }),
        2 => session.clone().prop_map(|session| Event::Prepare { session }),
        1 => any::<bool>().prop_map(|commit| Event::Decide { commit }),
        1 => (session, any::<bool>()).prop_map(|(session, transactional)| Event::Message { session, transactional }),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(table, full)| Event::Identity { table, full }),
        1 => Just(Event::Kill),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (any::<u8>(), any::<u8>(), prop::bool::weighted(0.2)).prop_map(|(key, value, wide)| Change::Insert { key, value, wide }),
        2 => (any::<u8>(), any::<u8>(), any::<u8>()).prop_map(|(from, count, value)| Change::InsertMany { from, count, value }),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(from, count)| Change::Copy { from, count }),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(key, value)| Change::Upsert { key, value }),
        6 => (pick(), any::<u8>(), any::<u8>()).prop_map(|(pick, column, value)| Change::Set { pick, column, value }),
        3 => (pick(), any::<u8>()).prop_map(|(pick, to)| Change::SetKey { pick, to }),
        2 => (any::<u8>(), any::<u8>(), any::<bool>()).prop_map(|(one, other, keys)| Change::Swap { one, other, keys }),
        1 => prop::sample::select(vec![-1i8, 1, 20, -20]).prop_map(|by| Change::Shift { by }),
        3 => pick().prop_map(|pick| Change::Delete { pick }),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(key, value)| Change::Replace { key, value }),
    ]
}

fn pick() -> impl Strategy<Value = Pick> {
    prop_oneof![
        4 => any::<u8>().prop_map(Pick::Key),
        3 => any::<u8>().prop_map(Pick::Any),
        2 => any::<u8>().prop_map(Pick::Some),
        1 => Just(Pick::All),
    ]
}

/// A table of the schema by any number.
pub fn placed(all: &[Table], number: u8) -> Placed<'_> {
    Placed { at: usize::from(number) % all.len(), all }
}

/// The statements of a change; none where the table cannot take it. COPY's data is in its second line and beyond.
pub fn statements(table: Placed<'_>, change: &Change) -> Vec<String> {
    let name = table.name();
    let key = table.table().key;
    let writes = matches!(change, Change::Insert { .. } | Change::InsertMany { .. } | Change::Copy { .. });
    if !writes && !table.identified() {
        return Vec::new();
    }
    match *change {
        Change::Insert { key: k, value, wide } => vec![insert(table, k, value, wide)],
        Change::InsertMany { from, count, value } if key.counts() || key == super::schema::Key::None => {
            let (columns, values) = row("i", table, value, false);
            let last = i32::from(from) + i32::from(count % 64);
            vec![format!("insert into {name} ({columns}) select {values} from generate_series({from}, {last}) i")]
        }
        Change::InsertMany { from, value, .. } => {
            vec![insert(table, from, value, false), insert(table, from.wrapping_add(1), value, true)]
        }
        Change::Copy { from, count } => {
            let two = if key == super::schema::Key::Two { ", k2" } else { "" };
            let rows = (0..count % 32).map(|i| {
                let literal = if key.counts() || key == super::schema::Key::None {
                    (u32::from(from) + u32::from(i)).to_string()
                } else {
                    return String::new();
                };
                let two = if two.is_empty() { "" } else { "\t1" };
                format!("{literal}\t{i}\t\\N{two}\n")
            });
            let rows: String = rows.collect();
            if rows.trim().is_empty() {
                Vec::new()
            } else {
                vec![format!("copy {name} (k, n, big{two}) from stdin\n{rows}")]
            }
        }
        Change::Upsert { key: k, value } => {
            let target = match key {
                super::schema::Key::Two => "(k2, k)",
                super::schema::Key::Deferrable | super::schema::Key::None => return Vec::new(),
                _ => "(k)",
            };
            vec![format!("{} on conflict {target} do update set n = excluded.n + 1", insert(table, k, value, false))]
        }
        Change::Set { pick, column, value } => {
            vec![format!("update {name} set {} where {}", assignment(table, column, value), condition(table, pick))]
        }
        Change::SetKey { pick, to } => {
            vec![format!("update {name} set k = {} where {}", key.literal(to), condition(table, pick))]
        }
        Change::Swap { one, other, keys: true } => {
            let (one, other) = (key.literal(one), key.literal(other));
            let aside = if key.counts() { "-50".to_owned() } else { key.literal(15) };
            vec![
                format!("update {name} set k = {aside} where k = {one}"),
                format!("update {name} set k = {one} where k = {other}"),
                format!("update {name} set k = {other} where k = {aside}"),
            ]
        }
        Change::Swap { one, other, keys: false } if table.has_unique() && table.table().unique == Some(true) => {
            let (one, other) = (one % 8, other % 8);
            vec![format!(
                "update {name} set u = case u when {one} then {other} else {one} end where u in ({one}, {other})"
            )]
        }
        Change::Swap { one, other, keys: false } if table.has_unique() => {
            let (one, other) = (one % 8, other % 8);
            vec![
                format!("update {name} set u = -1 where u = {one}"),
                format!("update {name} set u = {one} where u = {other}"),
                format!("update {name} set u = {other} where u = -1"),
            ]
        }
        Change::Swap { .. } => Vec::new(),
        Change::Shift { by } if key.counts() => vec![format!("update {name} set k = k + ({by})")],
        Change::Shift { .. } => vec![format!("update {name} set n = n + 1")],
        Change::Delete { pick } => vec![format!("delete from {name} where {}", condition(table, pick))],
        Change::Replace { key: k, value } => vec![
            format!("delete from {name} where k = {}", key.literal(k)),
            insert(table, k, value, true),
            format!("update {name} set n = n + 1 where k = {}", key.literal(k)),
        ],
    }
}

fn insert(table: Placed<'_>, key: u8, value: u8, wide: bool) -> String {
    let (columns, values) = row(&table.table().key.literal(key), table, value, wide);
    format!("insert into {} ({columns}) values ({values})", table.name())
}

/// Columns and values of a new row; `value` decides all but the key.
fn row(key: &str, table: Placed<'_>, value: u8, wide: bool) -> (String, String) {
    let mut columns = vec!["k".to_owned(), "n".to_owned(), "big".to_owned()];
    let mut values = vec![key.to_owned(), (value % 10).to_string(), big(value, wide)];
    if table.table().key == super::schema::Key::Two {
        columns.push("k2".to_owned());
        values.push((value % 3).to_string());
    }
    for (column, type_name, texts) in table.columns() {
        columns.push(column);
        values.push(literal(type_name, texts, value));
    }
    if table.has_unique() {
        columns.push("u".to_owned());
        values.push(nullable(value));
    }
    if table.reference().is_some() {
        columns.push("ref".to_owned());
        values.push(nullable(value / 2));
    }
    if table.has_span() {
        columns.push("span".to_owned());
        values.push(format!("int4range({0}, {0} + 3)", i32::from(value) * 2));
    }
    (columns.join(", "), values.join(", "))
}

/// NULL now and then, else a small number.
fn nullable(value: u8) -> String {
    if value.is_multiple_of(3) { "null".to_owned() } else { (value % 8).to_string() }
}

/// Wide ones are stored out of line.
fn big(value: u8, wide: bool) -> String {
    match value % 5 {
        0 => "null".to_owned(),
        _ if wide => format!("repeat(md5('{value}'), 200)"),
        _ => format!("'big {value}'"),
    }
}

fn literal(type_name: &str, texts: &[&str], value: u8) -> String {
    let at = usize::from(value) % (texts.len() + 1);
    texts.get(at).map_or_else(|| "null".to_owned(), |text| format!("'{}'::text::{type_name}", text.replace('\'', "''")))
}

fn assignment(table: Placed<'_>, column: u8, value: u8) -> String {
    let mut choices = vec![
        format!("n = {value}"),
        format!("big = {}", big(value, true)),
        format!("n = n + 1, big = {}", big(value, false)),
    ];
    choices.extend(
        table
            .columns()
            .into_iter()
            .map(|(name, type_name, texts)| format!("{name} = {}", literal(type_name, texts, value))),
    );
    if table.has_unique() {
        choices.push(format!("u = {}", nullable(value)));
    }
    if table.reference().is_some() {
        choices.push(format!("ref = {}", nullable(value)));
    }
    if table.has_span() {
        choices.push(format!("span = int4range({0}, {0} + 3)", i32::from(value) * 2));
    }
    if table.table().identity == 1 {
        choices.push("n = n - 1".to_owned());
    }
    choices.swap_remove(usize::from(column) % choices.len())
}

fn condition(table: Placed<'_>, pick: Pick) -> String {
    match pick {
        Pick::Key(k) => format!("k = {}", table.table().key.literal(k)),
        Pick::Any(n) => format!(
            "(tableoid, ctid) = (select tableoid, ctid from {} order by tableoid, ctid offset {} limit 1)",
            table.name(),
            n % 8
        ),
        Pick::Some(n) => format!("n % 3 = {}", n % 3),
        Pick::All => "true".to_owned(),
    }
}
