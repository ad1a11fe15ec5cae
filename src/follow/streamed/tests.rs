//! Streams as a source would send them, against a model of what version 1 would have sent.

use bytes::BufMut;
use proptest::prelude::*;

use super::*;

const PLENTY: Bounds = Bounds { memory: usize::MAX, disk: u64::MAX, files: usize::MAX };
/// Every message goes to a file at once: a block of records takes more.
const FILES_ALONE: Bounds = Bounds { memory: 8 * 1024, ..PLENTY };
/// Some of a transaction is in its file, and some is not.
const FILES_BESIDE: Bounds = Bounds { memory: 24 * 1024, ..PLENTY };

/// What a transaction does. Subtransactions are numbered within it; 0 is the transaction itself.
#[derive(Clone, Debug)]
enum Act {
    /// Subtransaction, number of the row, its size.
    Insert(u32, u32, usize),
    /// Subtransaction, relation.
    Describe(u32, u32),
    Logical,
    /// The subtransaction is rolled back.
    RollBack(u32),
    /// The block ends, and what comes stands in a new one.
    NewBlock,
}

/// How it ends.
#[derive(Clone, Copy, Debug)]
enum Ending {
    Commit,
    RollBack,
    /// Not in this stream.
    Later,
}

#[derive(Clone, Debug)]
struct Transaction {
    acts: Vec<Act>,
    ending: Ending,
    /// Sent once it committed, as a small one.
    small: bool,
}

fn xid(transaction: usize, sub: u32) -> u32 {
    1000 * (transaction as u32 + 1) + sub
}

/// A message as version 1 writes it.
fn message(kind: u8, rest: impl FnOnce(&mut Vec<u8>)) -> Bytes {
    let mut bytes = vec![kind];
    rest(&mut bytes);
    bytes.into()
}

/// The same inside a block.
fn inside(xid: u32, message: &Bytes) -> Bytes {
    let mut bytes = vec![message[0]];
    bytes.put_u32(xid);
    bytes.put_slice(&message[1..]);
    bytes.into()
}

fn insert(relation: u32, row: u32, size: usize) -> Bytes {
    let value = format!("{row}:{}", "x".repeat(size));
    message(b'I', |bytes| {
        bytes.put_u32(relation);
        bytes.put_u8(b'N');
        bytes.put_u16(1);
        bytes.put_u8(b't');
        bytes.put_u32(value.len() as u32);
        bytes.put_slice(value.as_bytes());
    })
}

/// The number stands for the shape, and is its last four bytes.
fn relation(oid: u32, number: i32) -> Bytes {
    message(b'R', |bytes| {
        bytes.put_u32(oid);
        bytes.put_slice(b"public\0t\0d");
        bytes.put_u16(1);
        bytes.put_slice(b"\0c\0");
        bytes.put_u32(23);
        bytes.put_i32(number);
    })
}

/// Oid and number of a description.
fn described_as(message: &Message) -> Option<(u32, i32)> {
    match message {
        Message::Relation(relation) => Some((relation.oid, relation.columns[0].type_modifier)),
        _ => None,
    }
}

fn logical() -> Bytes {
    message(b'M', |bytes| {
        bytes.put_u8(1);
        bytes.put_u64(7);
        bytes.put_slice(b"prefix\0");
        bytes.put_u32(0);
    })
}

fn stream_start(xid: u32, first: bool) -> Bytes {
    message(b'S', |bytes| {
        bytes.put_u32(xid);
        bytes.put_u8(u8::from(first));
    })
}

fn stream_stop() -> Bytes {
    message(b'E', |_| {})
}

fn stream_abort(xid: u32, subxid: u32) -> Bytes {
    message(b'A', |bytes| {
        bytes.put_u32(xid);
        bytes.put_u32(subxid);
    })
}

fn stream_commit(xid: u32) -> Bytes {
    message(b'c', |bytes| {
        bytes.put_u32(xid);
        bytes.put_u8(0);
        bytes.put_u64(u64::from(xid));
        bytes.put_u64(u64::from(xid) + 1);
        bytes.put_i64(0);
    })
}

fn begin(xid: u32) -> Bytes {
    message(b'B', |bytes| {
        bytes.put_u64(u64::from(xid));
        bytes.put_i64(0);
        bytes.put_u32(xid);
    })
}

fn commit(xid: u32) -> Bytes {
    message(b'C', |bytes| {
        bytes.put_u8(0);
        bytes.put_u64(u64::from(xid));
        bytes.put_u64(u64::from(xid) + 1);
        bytes.put_i64(0);
    })
}

fn early() -> impl Strategy<Value = Early> {
    prop_oneof![3 => Just(Early::Applied), 1 => Just(Early::NotApplied), 1 => Just(Early::GivenUp)]
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        8 => (0u32..4, any::<u32>(), prop_oneof![4 => 0usize..50, 1 => 0usize..9000]).prop_map(|(s, r, n)| Act::Insert(s, r, n)),
        2 => (0u32..4, 0u32..3).prop_map(|(s, r)| Act::Describe(s, r)),
        1 => Just(Act::Logical),
        1 => (1u32..4).prop_map(Act::RollBack),
        2 => Just(Act::NewBlock),
    ]
}

fn transaction() -> impl Strategy<Value = Transaction> {
    let ending = prop_oneof![4 => Just(Ending::Commit), 1 => Just(Ending::RollBack), 1 => Just(Ending::Later)];
    (prop::collection::vec(act(), 0..25), ending, prop::bool::weighted(0.3))
        .prop_map(|(acts, ending, small)| Transaction { acts, ending, small })
}

/// What the source sends, and what comes out of it; descriptions are numbered as they are sent, and repeated ones left out.
struct Played {
    sent: Vec<Bytes>,
    expected: Vec<Message>,
}

/// How far a transaction is.
struct Playing<'a> {
    acts: std::slice::Iter<'a, Act>,
    began: bool,
    /// What it would bring, and who of it did that.
    holds: Vec<(u32, Bytes)>,
    ended: bool,
}

impl<'a> Playing<'a> {
    fn of(transaction: &'a Transaction) -> Self {
        Self { acts: transaction.acts.iter(), began: false, holds: Vec::new(), ended: false }
    }
}

/// Plays transactions, a block of one after a block of another as `turns` say.
fn play(transactions: &[Transaction], turns: &[usize]) -> Played {
    let mut played = Played { sent: Vec::new(), expected: Vec::new() };
    let mut number = 0;
    let mut next = || {
        number += 1;
        number
    };
    let mut all: Vec<Playing<'_>> = transactions.iter().map(Playing::of).collect();
    let everyone = (0..transactions.len()).cycle().take(transactions.len() * 30);
    for at in turns.iter().map(|turn| turn % transactions.len()).chain(everyone) {
        let Transaction { ending, small, .. } = transactions[at];
        let Playing { acts, began, holds, ended } = &mut all[at];
        if *ended {
            continue;
        }
        let top = xid(at, 0);
        let mut over = true;
        let mut rolled_back = None;
        let first = !std::mem::replace(began, true);
        if !small {
            played.sent.push(stream_start(top, first));
        }
        for act in acts.by_ref() {
            let (sub, message) = match *act {
                Act::Insert(sub, row, size) => (sub, insert(1, row, size)),
                Act::Describe(sub, oid) => (sub, relation(oid, next())),
                Act::Logical => (0, logical()),
                // A rollback is told between blocks.
                Act::RollBack(sub) => {
                    rolled_back = Some(sub);
                    over = false;
                    break;
                }
                Act::NewBlock => {
                    over = false;
                    break;
                }
            };
            holds.push((xid(at, sub), message.clone()));
            if !small {
                played.sent.push(inside(xid(at, sub), &message));
            }
        }
        if !small {
            played.sent.push(stream_stop());
        }
        if let Some(sub) = rolled_back {
            if !small {
                played.sent.push(stream_abort(top, xid(at, sub)));
            }
            holds.retain(|(own, message)| *own != xid(at, sub) || (message[0] == b'R' && !small));
        }
        if !over {
            continue;
        }
        *ended = true;
        match ending {
            Ending::Commit => {
                if small {
                    for (_, message) in holds.iter_mut().filter(|(_, message)| message[0] == b'R') {
                        let &[_, a, b, c, d, ..] = &message[..] else { unreachable!() };
                        *message = relation(u32::from_be_bytes([a, b, c, d]), next());
                    }
                }
                let messages: Vec<Bytes> = [begin(top)]
                    .into_iter()
                    .chain(holds.drain(..).map(|(_, message)| message))
                    .chain([commit(top)])
                    .collect();
                played.expected.extend(messages.iter().map(|message| Message::decode(message).unwrap()));
                if small { played.sent.extend(messages) } else { played.sent.push(stream_commit(top)) }
            }
            Ending::RollBack if !small => played.sent.push(stream_abort(top, top)),
            _ => {}
        }
    }
    played
}

/// What becomes of a transaction that can be applied early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Early {
    /// At its commit all of it is there.
    Applied,
    /// At its commit it is not.
    NotApplied,
    /// Nothing is taken of it.
    GivenUp,
}

/// What comes out of a stream, where nothing is applied early.
fn out(streamed: &mut Streamed, sent: &[Bytes]) -> Result<Vec<Message>> {
    out_with(streamed, sent, &[Early::NotApplied])
}

/// What comes out of a stream, and of what was applied early. The transactions that can be have their turns with `earlies`.
fn out_with(streamed: &mut Streamed, sent: &[Bytes], earlies: &[Early]) -> Result<Vec<Message>> {
    let mut earlies = earlies.iter().copied().cycle();
    let (mut out, mut applied, mut fate) = (Vec::new(), Vec::new(), Early::GivenUp);
    for (at, payload) in sent.iter().enumerate() {
        let mut early = Vec::new();
        match streamed.take(Lsn::new(at as u64), payload)? {
            Taken::Passed(message) => out.push(message),
            Taken::Kept => {}
            Taken::Early(Part::Block { begins, .. }) => {
                if let Some(begins) = begins {
                    fate = earlies.next().unwrap();
                    assert_eq!(applied, [], "one at a time");
                    begins.given_up.store(fate == Early::GivenUp, Ordering::Relaxed);
                }
            }
            Taken::Early(Part::Message(message)) => {
                assert_ne!(fate, Early::GivenUp);
                applied.push(message);
            }
            Taken::Early(Part::RolledBack) => applied.clear(),
            Taken::Early(Part::Commits { .. }) => unreachable!("the reader makes it"),
            Taken::EarlyCommits(_) => {
                streamed.settle_early(fate == Early::Applied)?;
                early = std::mem::take(&mut applied);
                early.retain(|_| fate == Early::Applied);
            }
        }
        while let Some(step) = streamed.step()? {
            out.extend(step.message);
            out.append(&mut early);
        }
    }
    Ok(out)
}

/// Without the descriptions that were there before. After each commit the newest of those that were there counts.
fn without_repeated(messages: Vec<Message>) -> Vec<Message> {
    let (mut seen, mut newest, mut last) = (HashSet::new(), HashMap::new(), HashMap::new());
    messages
        .into_iter()
        .filter(|message| {
            if matches!(message, Message::Commit { .. }) {
                assert_eq!(newest, last, "an older description counts");
            }
            let Some((oid, number)) = described_as(message) else { return true };
            last.insert(oid, number);
            newest.entry(oid).and_modify(|newest| *newest = number.max(*newest)).or_insert(number);
            seen.insert(number)
        })
        .collect()
}

proptest! {
    #[test]
    fn what_comes_out_is_what_version_1_would_have_sent(
        mut transactions in prop::collection::vec(transaction(), 1..5),
        turns in prop::collection::vec(any::<usize>(), 0..60),
        early in prop::collection::vec(early(), 1..5),
    ) {
        // A subtransaction that was rolled back does nothing more.
        for transaction in &mut transactions {
            let mut gone = HashSet::new();
            transaction.acts.retain(|act| match act {
                Act::RollBack(sub) => gone.insert(*sub),
                Act::Insert(sub, ..) | Act::Describe(sub, ..) => !gone.contains(sub),
                _ => true,
            });
        }
        let played = play(&transactions, &turns);
        let mut outs = Vec::new();
        let none = vec![Early::GivenUp];
        for (bounds, early) in [PLENTY, FILES_ALONE, FILES_BESIDE].into_iter().flat_map(|one| [(one, &none), (one, &early)]) {
            let mut streamed = Streamed::new(Protocol::V2, bounds);
            outs.push(without_repeated(out_with(&mut streamed, &played.sent, early).unwrap()));
            let held: usize = streamed.unfinished.values().map(Unfinished::in_memory).sum();
            let disk: u64 = streamed.unfinished.values().map(|unfinished| unfinished.kept.on_disk()).sum();
            prop_assert_eq!(streamed.held(), Held { memory: held, disk });
            prop_assert_eq!(streamed.files, streamed.unfinished.values().filter(|one| one.kept.has_file()).count());
        }
        for out in outs {
            prop_assert_eq!(out, played.expected.clone());
        }
    }

    #[test]
    fn no_message_brings_us_down(messages: Vec<Vec<u8>>) {
        let mut streamed = Streamed::new(Protocol::V2, PLENTY);
        streamed.take(Lsn::ZERO, &stream_start(1, true)).unwrap();
        for message in messages {
            drop(streamed.take(Lsn::ZERO, &message.into()));
        }
    }
}

#[test]
fn a_table_that_was_altered_meanwhile_keeps_its_newer_shape() {
    let (top, sub) = (xid(0, 0), xid(0, 1));
    let mut streamed = Streamed::new(Protocol::V2, PLENTY);
    let sent = [
        stream_start(top, true),
        inside(sub, &relation(7, 1)),
        inside(sub, &insert(7, 1, 0)),
        stream_stop(),
        stream_abort(top, sub),
        // With the savepoint its lock is gone.
        begin(9),
        relation(7, 2),
        insert(7, 2, 0),
        commit(9),
        stream_commit(top),
    ];

    let messages = out(&mut streamed, &sent).unwrap();

    let shapes: Vec<_> = messages.iter().filter_map(described_as).collect();
    assert_eq!(shapes, [(7, 2), (7, 1), (7, 2)]);
    let inserts = messages.iter().filter(|message| matches!(message, Message::Insert { .. })).count();
    assert_eq!(inserts, 1);
}

#[test]
fn what_does_not_fit_ends_with_an_error_that_says_why() {
    let fill = |bounds: Bounds| {
        let mut streamed = Streamed::new(Protocol::V2, bounds);
        for at in 0..100 {
            let sent = [stream_start(xid(at, 0), true), inside(xid(at, 0), &insert(1, 1, 5000)), stream_stop()];
            if let Err(error) = out(&mut streamed, &sent) {
                return error;
            }
        }
        panic!("it all fits");
    };
    for (bounds, why) in [
        (Bounds { disk: 30_000, ..FILES_ALONE }, "follow.spill_max_bytes"),
        (Bounds { files: 3, ..FILES_ALONE }, "files may be open"),
        (FILES_ALONE, "can be remembered"),
    ] {
        let error = fill(bounds);
        assert!(error.code() == SPILL_FAILED && error.to_string().contains(why), "{why}: {error}");
    }
}

/// What is applied early needs no room, as long as it is not given up.
#[test]
fn what_is_applied_early_is_not_kept_where_it_does_not_fit() {
    let top = xid(0, 0);
    let mut sent = vec![stream_start(top, true), inside(top, &relation(1, 1))];
    sent.extend((0..100).map(|row| inside(top, &insert(1, row, 5000))));
    sent.push(stream_stop());
    let none = Bounds { files: 0, ..FILES_ALONE };
    let with = |last: &[Bytes], early| {
        let mut streamed = Streamed::new(Protocol::V2, none);
        let sent: Vec<Bytes> = sent.iter().chain(last).cloned().collect();
        out_with(&mut streamed, &sent, &[early]).map(|out| (out, streamed.held(), streamed.files))
    };

    let (out, held, files) = with(&[stream_commit(top)], Early::Applied).unwrap();
    // Begin, its rows, what it described once more, Commit.
    assert_eq!(out.len(), 1 + 101 + 1 + 1);
    assert_eq!((held, files), (Held::default(), 0));
    with(&[stream_abort(top, top)], Early::Applied).unwrap();

    for (last, early) in [
        (stream_commit(top), Early::NotApplied),
        (stream_abort(top, xid(0, 1)), Early::Applied),
        (stream_commit(top), Early::GivenUp),
    ] {
        assert_eq!(with(&[last], early).unwrap_err().code(), SPILL_FAILED);
    }
}

#[test]
fn what_is_out_of_place_is_an_error_that_names_its_position() {
    let (open, change) = (stream_start(5, true), inside(5, &insert(1, 1, 0)));
    for (sent, why) in [
        (vec![stream_start(5, false)], "did not begin"),
        (vec![stream_commit(5)], "did not begin"),
        (vec![open.clone(), change.clone(), stream_stop(), open.clone()], "did not end"),
        (vec![open.clone(), open.clone()], "out of place"),
        (vec![open.clone(), change.slice(..4)], "in the middle of the xid"),
        // A message is read to its end when it comes out.
        (vec![open.clone(), change.slice(..12), stream_stop(), stream_commit(5)], "in the middle of"),
    ] {
        let error = out(&mut Streamed::new(Protocol::V2, PLENTY), &sent).unwrap_err();
        let text = error.to_string();
        assert!(error.code() == "stream_malformed" && text.contains(why) && text.contains("at 0/"), "{text}");
    }
    let nothing = out(&mut Streamed::new(Protocol::V2, PLENTY), &[stream_abort(5, 6), stream_abort(5, 5)]).unwrap();
    assert_eq!(nothing, [], "of what is not known nothing can have come out");
}

#[test]
fn under_version_1_everything_passes_through() {
    let mut streamed = Streamed::new(Protocol::V1, PLENTY);
    let sent = [begin(1), relation(1, 1), insert(1, 1, 0), commit(1)];
    assert_eq!(out(&mut streamed, &sent).unwrap().len(), sent.len());
    assert_eq!(streamed.held(), Held::default());
    assert_eq!(out(&mut streamed, &[stream_start(1, true)]).unwrap_err().code(), "stream_malformed");
}
