//! Brings what an earlier run copied of a table to the cut of this one.
//!
//! # Why units of two cuts meet exactly
//!
//! The target holds, of some ranges of the table, the rows that stood there at an earlier cut. It is to hold the rows that
//! stand there at the new one; the other ranges are then copied as the new cut shows them, and the table is as of one cut.
//!
//! A row that nobody touched between the two cuts stands where it stood. In ranges of blocks: rows move only when the table is rewritten,
//! and then its shape is another, and nothing of it is kept. In ranges of the key: it has the same key, and the bounds of the ranges are
//! those that were written down when the table was opened. Every row that somebody touched is named by the stream between the two
//! cuts: an insert and an update by the new row, an update and a delete by what identifies the old one. So for each key that the
//! stream names, what the target holds under it is removed, and what the new cut shows under it in those ranges is put there.
//! It does not matter in which order or how often a key is named, nor that a row may have left the ranges or come into them: for
//! the keys that are named, the ranges are made anew, and for all others nothing changed.
//!
//! This happens in one transaction of the target, together with the units' new cut. A death before it leaves the units as they
//! were, and the next run asks the stream from their cut on. The stream is read for this without confirming anything.
//!
//! Where a change names no key (no key is known, the stream tells rows by another one, a value of it was left out), or where the stream does
//! not name every change (the table was published in another way, or not all the time), the table begins anew.

use bytes::{BufMut, Bytes, BytesMut};
use std::collections::{HashMap, HashSet};

use super::Context;
use super::division::{Division, Range};
use super::plan::{self, Manner, Plan, Planned};
use super::statements::{self, KeyColumn};
use super::worker::Worker;
use crate::error::{Doing, Result};
use crate::follow::peek;
use crate::follow::spool::Source;
use crate::postgres::catalog::{ReplicaIdentity, Table};
use crate::postgres::pgoutput::{Message, OldTuple, Relation, Tuple, Value};
use crate::postgres::replication::Cut;
use crate::postgres::{Lsn, QualifiedName, copy_text};

/// Keys are sent to the target in pieces of this size, in bytes.
const PIECE: usize = 1 << 20;

/// A key that comes again soon is not kept twice; so much is remembered of each table for that, in bytes.
const REMEMBERED: usize = 4 << 20;

/// A table that goes on, and what the stream says of it.
pub(super) struct Rest<'a> {
    /// Which of the plan's tables.
    pub at: usize,
    pub planned: &'a Planned,
    pub division: &'a Division,
    pub ranges: Vec<Range>,
    pub key: Vec<KeyColumn>,
    /// Changes that committed before are in what is there.
    since: Lsn,
    /// Where the columns of the key stand in the rows of the stream.
    places: Option<Vec<usize>>,
    /// Lines of a COPY that wait to be sent.
    waiting: Vec<u8>,
    remembered: HashSet<Bytes>,
    remembered_bytes: usize,
    /// Keys were sent to the target.
    pub touched: bool,
    /// It begins anew.
    lost: bool,
}

/// Brings the units of all tables of the plan that go on to the cut. Returns the tables of which that cannot be done: nothing of
/// them counts any more.
///
/// # Errors
/// The connections'; class retry if the slot is still in use.
pub(super) async fn settle(
    context: &Context,
    cut: &Cut,
    plan: &Plan,
    worker: &mut Worker,
) -> Result<Vec<QualifiedName>> {
    let mut rests = Vec::new();
    let session = context.source.connect("copy").await?;
    for (at, planned) in plan.tables.iter().enumerate() {
        let Manner::Rest(division, units) = &planned.manner else { continue };
        let equalities =
            session.query(statements::EQUALITIES, &[&planned.of.table.oid]).await.doing(|| "looking for the key")?;
        let equalities = equalities.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
        let key = key(&planned.of.table, &equalities.collect::<Result<_>>()?);
        rests.push(Rest {
            at,
            planned,
            division,
            ranges: plan::joined(units),
            key,
            since: units.iter().map(|unit| unit.cut_lsn).min().unwrap_or(cut.lsn),
            places: None,
            waiting: Vec::new(),
            remembered: HashSet::new(),
            remembered_bytes: 0,
            touched: false,
            lost: false,
        });
    }
    drop(session);
    let Some(since) = rests.iter().map(|rest| rest.since).min() else { return Ok(Vec::new()) };
    context.telemetry.activity("looking for what changed in tables that are copied in part");
    read(context, &mut rests, since, cut.lsn, worker).await?;
    let mut lost = Vec::new();
    for rest in rests {
        let name = &rest.planned.of.table.name;
        if rest.lost {
            tracing::warn!(table = %name.plain(), "what changed since its copy began has no key that tells it: the table is copied anew");
            lost.push(name.clone());
        } else {
            worker
                .bring_to_cut(context, cut, &rest)
                .await
                .doing(|| format!("going on with the table {}", name.plain()))?;
        }
    }
    Ok(lost)
}

/// The columns by which the stream tells rows apart; empty if there are none.
fn key(table: &Table, equalities: &HashMap<String, String>) -> Vec<KeyColumn> {
    let names = match &table.identity {
        ReplicaIdentity::Key(names) => names,
        ReplicaIdentity::Full => &table.primary_key,
        ReplicaIdentity::Nothing => return Vec::new(),
    };
    let column = |name: &String| {
        let column = table.columns.iter().find(|column| column.name == *name)?;
        let equality = equalities.get(name)?.clone();
        Some(KeyColumn { name: name.clone(), type_name: column.type_name.clone(), equality })
    };
    names.iter().map(column).collect::<Option<Vec<_>>>().unwrap_or_default()
}

/// Reads the stream from one cut to the other, and sends the keys of changed rows to the target.
async fn read(context: &Context, rests: &mut [Rest<'_>], since: Lsn, until: Lsn, worker: &mut Worker) -> Result<()> {
    let Context { source, store, spooling, .. } = context;
    let publications = store.name().publications();
    let from = Source { source, store, publications: &publications };
    // The slot serves one reader.
    spooling.end().await;
    let mut stream = peek::Peek::open(spooling, from, since, until).await?;
    let at: HashMap<u32, usize> = rests.iter().enumerate().map(|(at, rest)| (rest.planned.of.table.oid, at)).collect();
    let mut commit = Lsn::ZERO;
    while let Some(message) = stream.next().await? {
        if let Message::Begin { commit_lsn, .. } = message {
            commit = commit_lsn;
        }
        for oid in relations(&message) {
            let Some(rest) = at.get(&oid).and_then(|&at| rests.get_mut(at)) else { continue };
            if !rest.lost && (commit >= rest.since || matches!(message, Message::Relation(_))) {
                rest.take(&message);
                if rest.waiting.len() >= PIECE {
                    worker.send_keys(rest).await?;
                }
            }
        }
    }
    for rest in rests {
        worker.send_keys(rest).await?;
        rest.remembered = HashSet::new();
    }
    stream.close().await;
    spooling.begin(Source { source, store, publications: &publications }).await
}

/// The relations that a message is about.
fn relations(message: &Message) -> Vec<u32> {
    match message {
        Message::Relation(relation) => vec![relation.oid],
        Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. } => {
            vec![*relation]
        }
        Message::Truncate { relations, .. } => relations.clone(),
        _ => Vec::new(),
    }
}

impl Rest<'_> {
    fn take(&mut self, message: &Message) {
        let known = match message {
            Message::Relation(relation) => {
                self.places = self.places(relation);
                true
            }
            Message::Insert { new, .. } => self.names(new, None),
            Message::Update { old, new, .. } => {
                let old = old.as_ref().map(OldTuple::tuple);
                self.names(new, old) && old.is_none_or(|old| self.names(old, None))
            }
            Message::Delete { old, .. } => self.names(old.tuple(), None),
            _ => false,
        };
        if !known {
            self.lose();
        }
    }

    /// It begins anew: nothing more needs to be known.
    pub(super) fn lose(&mut self) {
        self.lost = true;
        self.waiting = Vec::new();
        self.remembered = HashSet::new();
    }

    fn places(&self, relation: &Relation) -> Option<Vec<usize>> {
        // What tells the old row: the key that we know, or all of it.
        let mut told = relation.columns.iter().filter(|column| column.key);
        let same = told.clone().count() == self.key.len()
            && told.all(|column| self.key.iter().any(|known| known.name == column.name));
        if relation.identity != b'f' && !same {
            return None;
        }
        let place = |column: &KeyColumn| relation.columns.iter().position(|there| there.name == column.name);
        let places: Vec<usize> = self.key.iter().map(place).collect::<Option<_>>()?;
        (!places.is_empty()).then_some(places)
    }

    /// Keeps the key of a row. A value that an update left out is the one of the old row. False if the row does not tell its key.
    fn names(&mut self, row: &Tuple, old: Option<&Tuple>) -> bool {
        let Some(places) = &self.places else { return false };
        let mut line = BytesMut::new();
        for (k, &place) in places.iter().enumerate() {
            let value = match row.values().nth(place) {
                Some(Value::Unchanged) => old.and_then(|old| old.values().nth(place)),
                value => value,
            };
            let Some(Value::Text(text)) = value else { return false };
            if k > 0 {
                line.put_u8(b'\t');
            }
            copy_text::field(&mut line, text);
        }
        line.put_u8(b'\n');
        if !self.remembered.contains(&*line) {
            self.waiting.extend_from_slice(&line);
            self.remembered_bytes += line.len() + 64;
            if self.remembered_bytes > REMEMBERED {
                self.remembered.clear();
                self.remembered_bytes = 0;
            }
            self.remembered.insert(line.freeze());
        }
        true
    }

    /// What waits to be sent.
    pub(super) fn piece(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.waiting)
    }
}
