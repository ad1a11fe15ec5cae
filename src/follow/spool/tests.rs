//! What is written comes back, from any position on and whatever the end of the files went through.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;

use super::files::{Owner, Spool, remove_folder};
use super::playing::Playing;
use super::writer::{SPOOL_FULL, Writer};
use crate::config::MoveName;
use crate::error::{Class, Result};
use crate::postgres::Lsn;
use crate::postgres::replication::Event;
use crate::state::{MoveRecord, Phase};
use crate::telemetry::Telemetry;

const PLENTY: u64 = 1 << 40;
/// Where all spools of these tests begin.
const BEGIN: u64 = 1000;

fn name() -> MoveName {
    MoveName::new("app").unwrap()
}

fn record(source: &str, slot_lsn: u64) -> MoveRecord {
    MoveRecord {
        blockers: Vec::new(),
        phase: Phase::Copy,
        phase_since: String::new(),
        source_identity: serde_json::json!({ "system_identifier": source }),
        slot_lsn: Some(Lsn::new(slot_lsn)),
        last_cut_lsn: None,
        constraints_done: false,
        error: None,
    }
}

fn open_as(folder: &Path, name: &MoveName, record: &MoveRecord, make: bool) -> Result<Option<Arc<Spool>>> {
    let owner = Owner::of(name, record).unwrap();
    let telemetry = Telemetry::new(name, Duration::from_secs(1));
    Ok(Spool::open(folder, &owner, telemetry, make)?.map(Arc::new))
}

fn open(folder: &Path) -> Arc<Spool> {
    let spool = open_as(folder, &name(), &record("1", BEGIN), true).unwrap().unwrap();
    spool.sweep().unwrap();
    if spool.last().is_none() {
        spool.begin_segment(Lsn::new(BEGIN)).unwrap();
    }
    spool
}

/// A transaction in short: the relations that it has rows of, and whether the source describes them again, and what goes on after it.
#[derive(Clone, Debug)]
struct Transaction {
    rows: Vec<(u32, bool)>,
    idle_after: bool,
}

fn transactions(most: usize) -> impl Strategy<Value = Vec<Transaction>> {
    let transaction = (prop::collection::vec((1u32..5, prop::bool::weighted(0.2)), 0..6), any::<bool>())
        .prop_map(|(rows, idle_after)| Transaction { rows, idle_after });
    prop::collection::vec(transaction, 1..most)
}

fn begin(commit: u64) -> Bytes {
    [&[b'B'][..], &commit.to_be_bytes(), &[0; 12]].concat().into()
}

fn commit(at: u64) -> Bytes {
    [&[b'C', 0][..], &at.to_be_bytes(), &(at + 10).to_be_bytes(), &[0; 8]].concat().into()
}

/// A description, with its number.
fn relation(oid: u32, number: u32) -> Bytes {
    [&[b'R'][..], &oid.to_be_bytes(), &number.to_be_bytes()].concat().into()
}

fn described_type(number: u32) -> Bytes {
    [&[b'Y'][..], &number.to_be_bytes()].concat().into()
}

/// A row, with the number of the description that counts for it.
fn row(oid: u32, number: u32, at: u64) -> Bytes {
    [&[b'I'][..], &oid.to_be_bytes(), &number.to_be_bytes(), &at.to_be_bytes()].concat().into()
}

/// The commit of the transaction of that place.
fn commit_of(at: usize) -> u64 {
    BEGIN + 100 + at as u64 * 100
}

/// A connection to a source that begins to send with the transaction of this place.
fn send(transactions: &[Transaction], first: usize, writer: &mut Writer) -> Result<Vec<Bytes>> {
    let mut numbers: HashMap<u32, u32> = HashMap::new();
    let mut sent = Vec::new();
    for (at, transaction) in transactions.iter().enumerate().skip(first) {
        let commit_at = commit_of(at);
        let mut messages = vec![begin(commit_at)];
        for &(oid, altered) in &transaction.rows {
            if altered || !numbers.contains_key(&oid) {
                let number = commit_at as u32;
                numbers.insert(oid, number);
                messages.extend([described_type(number), relation(oid, number)]);
            }
            messages.push(row(oid, numbers[&oid], commit_at));
        }
        messages.push(commit(commit_at));
        for message in messages {
            writer.append(Lsn::new(commit_at - 1), &message)?;
            sent.push(message);
        }
        if transaction.idle_after {
            writer.passed(Lsn::new(commit_at + 20));
            writer.sync()?;
        }
    }
    Ok(sent)
}

fn play(spool: &Arc<Spool>, from: Lsn, gulp: usize) -> Result<Vec<Event>> {
    let mut playing = Playing::new(Arc::clone(spool), from);
    let mut events = Vec::new();
    loop {
        while let Some(event) = playing.buffered()? {
            events.push(event);
        }
        if playing.read(gulp)? == 0 {
            assert_eq!(playing.left(), 0);
            return Ok(events);
        }
    }
}

fn payloads(events: Vec<Event>) -> Vec<Bytes> {
    let payload = |event| match event {
        Event::Data { payload, .. } => Some(payload),
        Event::Keepalive { .. } => None,
    };
    events.into_iter().filter_map(payload).collect()
}

fn is_description(message: &Bytes) -> bool {
    matches!(message[0], b'R' | b'Y')
}

/// Before each row the description that counts for it, with its type right before it.
fn assert_described(messages: &[Bytes]) {
    let mut known: HashMap<&[u8], &[u8]> = HashMap::new();
    for (at, message) in messages.iter().enumerate() {
        match message[0] {
            b'R' => {
                assert_eq!(messages[at - 1], [&[b'Y'][..], &message[5..]].concat());
                known.insert(&message[1..5], &message[5..]);
            }
            b'I' => assert_eq!(known[&message[1..5]], &message[5..9]),
            _ => {}
        }
    }
}

fn segments_in(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "spool"));
    files.sort();
    files
}

proptest! {
    /// With one connection, everything comes back as it came; from any position on, and in any number of segments, what the source
    /// would send from there.
    #[test]
    fn what_was_written_is_played(
        transactions in transactions(12),
        segment in 100u64..1500,
        from in 0usize..14,
        gulp in 1usize..200,
    ) {
        let place = tempfile::tempdir().unwrap();
        let spool = open(place.path());
        let mut writer = Writer::open(Arc::clone(&spool), PLENTY).unwrap().with_segments_of(segment);
        let sent = send(&transactions, 0, &mut writer).unwrap();
        writer.sync().unwrap();

        prop_assert_eq!(&payloads(play(&spool, Lsn::new(BEGIN), gulp).unwrap()), &sent);

        // The commit itself, and right behind it.
        for position in [commit_of(from), commit_of(from) + 1] {
            let position = position.min(spool.end().as_u64());
            let played = payloads(play(&spool, Lsn::new(position), gulp).unwrap());
            assert_described(&played);
            let from = (0..transactions.len()).find(|at| commit_of(*at) >= position);
            let later = from.map_or(&[][..], |from| {
                let begins = sent.iter().position(|message| *message == begin(commit_of(from))).unwrap();
                &sent[begins..]
            });
            let rows = |messages: &[Bytes]| -> Vec<Bytes> {
                messages.iter().filter(|message| !is_description(message)).cloned().collect()
            };
            prop_assert_eq!(rows(&played), rows(later));
        }
    }

    /// A death: the last file ends anywhere, or a byte of it did not reach the disk. What is whole before counts, and from its end on the
    /// source is asked again.
    #[test]
    fn after_a_death_it_goes_on_behind_the_last_whole_transaction(
        transactions in transactions(8),
        segment in 100u64..1500,
        cut: prop::sample::Index,
        corrupted: Option<std::num::NonZeroU8>,
    ) {
        let place = tempfile::tempdir().unwrap();
        {
            let spool = open(place.path());
            let mut writer = Writer::open(Arc::clone(&spool), PLENTY).unwrap().with_segments_of(segment);
            send(&transactions, 0, &mut writer).unwrap();
            writer.sync().unwrap();
        }
        let last = segments_in(place.path()).pop().unwrap();
        let mut bytes = fs::read(&last).unwrap();
        let at = cut.index(bytes.len());
        match corrupted {
            Some(with) => bytes[at] ^= with.get(),
            None => bytes.truncate(at),
        }
        fs::write(&last, &bytes).unwrap();

        let spool = open(place.path());
        let end = spool.end().as_u64();
        let first = (0..=transactions.len()).find(|at| commit_of(*at) >= end).unwrap();
        let mut writer = Writer::open(Arc::clone(&spool), PLENTY).unwrap().with_segments_of(segment);
        prop_assert_eq!(writer.end().as_u64(), end);
        send(&transactions, first, &mut writer).unwrap();
        writer.sync().unwrap();
        drop((writer, spool));

        let spool = open(place.path());
        let played = payloads(play(&spool, Lsn::new(BEGIN), 64).unwrap());
        let expected: Vec<Bytes> = (0..transactions.len()).map(|at| commit(commit_of(at))).collect();
        let commits: Vec<Bytes> = played.iter().filter(|message| message[0] == b'C').cloned().collect();
        prop_assert_eq!(commits, expected);
        assert_described(&played);
        let rows: usize = transactions.iter().map(|transaction| transaction.rows.len()).sum();
        prop_assert_eq!(played.iter().filter(|message| message[0] == b'I').count(), rows);
    }

    /// Wherever a byte of a file that is not the last one changed: it is noticed.
    #[test]
    fn a_corrupted_byte_in_the_middle_is_an_error(cut: prop::sample::Index, with in 1u8..) {
        let place = tempfile::tempdir().unwrap();
        three_segments(place.path());
        let first = segments_in(place.path()).remove(0);
        let mut bytes = fs::read(&first).unwrap();
        let at = cut.index(bytes.len());
        bytes[at] ^= with;
        fs::write(&first, &bytes).unwrap();
        let error = play(&open(place.path()), Lsn::new(BEGIN), 100).unwrap_err();
        prop_assert_eq!((error.code(), error.class()), ("spool_damaged", Class::Operator));
    }
}

/// Three transactions of 300 bytes and more, a segment for each.
fn three_segments(folder: &Path) {
    let spool = open(folder);
    let mut writer = Writer::open(Arc::clone(&spool), PLENTY).unwrap().with_segments_of(100);
    let transaction = Transaction { rows: vec![(1, false); 5], idle_after: true };
    send(&vec![transaction; 3], 0, &mut writer).unwrap();
    writer.sync().unwrap();
    assert_eq!(segments_in(folder).len(), 3);
}

#[test]
fn a_file_that_is_missing_in_the_middle_is_an_error() {
    let place = tempfile::tempdir().unwrap();
    three_segments(place.path());
    fs::remove_file(segments_in(place.path()).remove(1)).unwrap();
    let error = play(&open(place.path()), Lsn::new(BEGIN), 100).unwrap_err();
    assert_eq!(error.code(), "spool_damaged");
}

#[test]
fn a_segment_in_the_making_is_made_again() {
    let place = tempfile::tempdir().unwrap();
    three_segments(place.path());
    let end = open(place.path()).end();
    fs::write(place.path().join(format!("{:016X}.spool", end.as_u64())), b"pgt").unwrap();
    let spool = open(place.path());
    assert_eq!(spool.end(), end);
    assert_eq!(segments_in(place.path()).len(), 3, "what is no segment is swept away before anything is written");
    assert_eq!(payloads(play(&spool, Lsn::new(BEGIN), 100).unwrap()).iter().filter(|m| m[0] == b'C').count(), 3);
}

#[test]
fn what_progress_has_passed_is_let_go_of() {
    let place = tempfile::tempdir().unwrap();
    three_segments(place.path());
    let spool = open(place.path());
    let before = spool.bytes();
    spool.let_go(Lsn::new(commit_of(0)), false);
    assert_eq!((segments_in(place.path()).len(), spool.bytes()), (3, before), "the first one is needed");
    spool.let_go(Lsn::new(commit_of(1)), false);
    assert_eq!(segments_in(place.path()).len(), 2);
    assert!(spool.bytes() < before);
    spool.let_go(spool.end(), false);
    assert_eq!(segments_in(place.path()).len(), 1, "somebody may be writing to the last one");
    spool.let_go(spool.end(), true);
    assert_eq!((segments_in(place.path()).len(), spool.range()), (0, None));
}

#[test]
fn a_full_spool_keeps_what_is_whole() {
    let place = tempfile::tempdir().unwrap();
    let spool = open(place.path());
    let mut writer = Writer::open(Arc::clone(&spool), 1000).unwrap();
    let transactions = vec![Transaction { rows: vec![(1, false); 5], idle_after: false }; 9];
    let error = send(&transactions, 0, &mut writer).unwrap_err();
    assert_eq!((error.code(), error.class()), (SPOOL_FULL, Class::Wait));
    let end = writer.settle().unwrap();
    writer.cut_back();
    let on_disk = fs::metadata(segments_in(place.path()).remove(0)).unwrap().len();
    assert!(on_disk <= 1000 && on_disk == spool.bytes(), "{on_disk}");
    let played = payloads(play(&spool, Lsn::new(BEGIN), 100).unwrap());
    let last = played.last().unwrap().clone();
    assert!(played.len() > 7 && (0..9).any(|at| last == commit(commit_of(at)) && end.as_u64() == commit_of(at) + 10));
}

#[test]
fn a_folder_of_somebody_else_is_refused_and_kept() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("app");
    drop(open(&folder));
    for (name, record) in [(MoveName::new("other").unwrap(), record("1", BEGIN)), (name(), record("2", BEGIN))] {
        let error = open_as(&folder, &name, &record, true).unwrap_err();
        assert_eq!((error.code(), error.class()), ("spool_folder_taken", Class::Operator));
    }
    assert_eq!(segments_in(&folder).len(), 1);

    let strange = place.path().join("strange");
    fs::create_dir(&strange).unwrap();
    fs::write(strange.join("holiday.jpg"), "").unwrap();
    assert_eq!(open_as(&strange, &name(), &record("1", BEGIN), true).unwrap_err().code(), "spool_folder_taken");
    assert!(open_as(&strange, &name(), &record("1", BEGIN), false).unwrap().is_none());
    assert_eq!(fs::read_dir(&strange).unwrap().count(), 1);
}

#[test]
fn what_another_slot_sent_is_not_read_and_goes() {
    let place = tempfile::tempdir().unwrap();
    three_segments(place.path());
    let later = record("1", BEGIN + 5);
    assert!(open_as(place.path(), &name(), &later, false).unwrap().is_none());
    assert_eq!(segments_in(place.path()).len(), 3);
    let spool = open_as(place.path(), &name(), &later, true).unwrap().unwrap();
    assert_eq!((spool.range(), segments_in(place.path()).len()), (None, 0));
}

#[test]
fn one_process_at_a_time_works_in_a_folder() {
    let place = tempfile::tempdir().unwrap();
    let spool = open(place.path());
    let error = open_as(place.path(), &name(), &record("1", BEGIN), false).unwrap_err();
    assert_eq!((error.code(), error.class()), ("spool_in_use", Class::Retry));
    drop(spool);
    open_as(place.path(), &name(), &record("1", BEGIN), false).unwrap();
}

#[test]
fn only_what_is_the_moves_own_is_removed() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("app");
    assert!(!remove_folder(&folder, &name()).unwrap());
    drop(open(&folder));
    assert_eq!(remove_folder(&folder, &MoveName::new("other").unwrap()).unwrap_err().code(), "spool_folder_taken");
    fs::write(folder.join("note of mine"), "").unwrap();
    assert!(remove_folder(&folder, &name()).unwrap());
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    fs::remove_file(folder.join("note of mine")).unwrap();
    drop(open(&folder));
    assert!(remove_folder(&folder, &name()).unwrap() && !folder.exists());
}

#[test]
fn files_are_for_their_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("app");
    let _spool = open(&folder);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder), 0o700);
    for entry in fs::read_dir(&folder).unwrap() {
        assert_eq!(mode(&entry.unwrap().path()), 0o600);
    }
}
