//! Messages made by hand. `tests/it/pgoutput.rs` has those that PostgreSQL sent.

use proptest::prelude::*;

use super::*;
use crate::postgres::QualifiedName;

/// Builds messages as the server would.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn byte(mut self, b: u8) -> Self {
        self.0.push(b);
        self
    }
    fn bytes(mut self, b: &[u8]) -> Self {
        self.0.extend_from_slice(b);
        self
    }
    fn name(self, s: &str) -> Self {
        self.bytes(s.as_bytes()).byte(0)
    }
    fn done(self) -> Bytes {
        Bytes::from(self.0)
    }
}

fn row(kind: u8) -> Writer {
    Writer::default()
        .byte(kind)
        .bytes(&4u16.to_be_bytes())
        .byte(b'n')
        .byte(b'u')
        .byte(b't')
        .bytes(&3i32.to_be_bytes())
        .bytes(b"abc")
        .byte(b't')
        .bytes(&0i32.to_be_bytes())
}

fn update() -> Bytes {
    Writer::default().byte(b'U').bytes(&7u32.to_be_bytes()).bytes(&row(b'K').0).bytes(&row(b'N').0).done()
}

#[test]
fn a_row_hands_out_its_values() {
    let Message::Update { relation, old: Some(OldTuple::Key(_)), new } = Message::decode(&update()).unwrap() else {
        panic!("not an update with a key")
    };
    assert_eq!(relation, 7);
    assert_eq!(
        new.values().collect::<Vec<_>>(),
        [Value::Null, Value::Unchanged, Value::Text(b"abc"), Value::Text(b"")]
    );
}

#[test]
fn a_relation_names_its_key() {
    let bytes = Writer::default()
        .byte(b'R')
        .bytes(&7u32.to_be_bytes())
        .name("")
        .name("t")
        .byte(b'd')
        .bytes(&1u16.to_be_bytes())
        .byte(1)
        .name("id")
        .bytes(&23u32.to_be_bytes())
        .bytes(&(-1i32).to_be_bytes())
        .done();
    let Message::Relation(relation) = Message::decode(&bytes).unwrap() else { panic!("not a relation") };
    assert_eq!(relation.name, QualifiedName::new("pg_catalog", "t"));
    assert!(relation.columns[0].key);
}

#[test]
fn every_prefix_of_a_message_is_an_error() {
    let whole = update();
    for end in 0..whole.len() {
        assert!(Message::decode(&whole.slice(..end)).is_err(), "{end} bytes");
    }
}

#[test]
fn bytes_left_over_are_an_error() {
    let longer = Writer(update().to_vec()).byte(0).done();
    assert_eq!(Message::decode(&longer), Err(Malformed::LeftOver(1)));
}

#[test]
fn a_negative_length_is_an_error() {
    let bytes = Writer::default()
        .byte(b'I')
        .bytes(&7u32.to_be_bytes())
        .byte(b'N')
        .bytes(&1u16.to_be_bytes())
        .byte(b't')
        .bytes(&(-5i32).to_be_bytes())
        .done();
    assert_eq!(Message::decode(&bytes), Err(Malformed::Length("a value", -5)));
}

/// Stream Start of transaction 5.
fn block() -> Bytes {
    Writer::default().byte(b'S').bytes(&5u32.to_be_bytes()).byte(1).done()
}

fn streamed_insert() -> Bytes {
    Writer::default().byte(b'I').bytes(&6u32.to_be_bytes()).bytes(&7u32.to_be_bytes()).bytes(&row(b'N').0).done()
}

#[test]
fn changes_inside_a_block_name_their_transaction() {
    let mut decoder = Decoder::new(Protocol::V2);
    assert_eq!(decoder.decode(&block()).unwrap().message, Message::StreamStart { xid: 5, first: true });
    let inside = decoder.decode(&streamed_insert()).unwrap();
    assert_eq!(inside.xid, Some(6));
    assert!(matches!(inside.message, Message::Insert { relation: 7, .. }));
    assert_eq!(decoder.decode(&Bytes::from_static(b"E")).unwrap().message, Message::StreamStop);
    let outside = decoder.decode(&update()).unwrap();
    assert_eq!(outside.xid, None);
}

#[test]
fn blocks_do_not_nest_and_hold_no_commit() {
    let mut decoder = Decoder::new(Protocol::V2);
    let stop = Bytes::from_static(b"E");
    assert_eq!(decoder.decode(&stop), Err(Malformed::OutOfPlace("Stream Stop")));
    decoder.decode(&block()).unwrap();
    let commit = Writer::default().byte(b'C').byte(0).bytes(&[0; 24]).done();
    for misplaced in [block(), commit] {
        assert!(matches!(decoder.decode(&misplaced), Err(Malformed::OutOfPlace(_))), "{misplaced:?}");
    }
    decoder.decode(&stop).unwrap();
}

#[test]
fn an_error_leaves_the_decoder_where_it_was() {
    let mut decoder = Decoder::new(Protocol::V2);
    let longer = Writer(block().to_vec()).byte(0).done();
    assert_eq!(decoder.decode(&longer), Err(Malformed::LeftOver(1)));
    decoder.decode(&update()).expect("outside of any block");
    decoder.decode(&block()).unwrap();
    decoder.decode(&Bytes::from_static(b"Ex")).unwrap_err();
    assert_eq!(decoder.decode(&streamed_insert()).unwrap().xid, Some(6), "the block goes on");
}

#[test]
fn where_an_abort_happened_is_told_to_parallel_streams_alone() {
    let short = Writer::default().byte(b'A').bytes(&[0; 8]).done();
    let long = Writer(short.to_vec()).bytes(&[0; 16]).done();
    for protocol in [Protocol::V2, Protocol::V3, Protocol::V4 { parallel: false }] {
        Decoder::new(protocol).decode(&short).unwrap();
        assert_eq!(Decoder::new(protocol).decode(&long), Err(Malformed::LeftOver(16)));
    }
    let mut parallel = Decoder::new(Protocol::V4 { parallel: true });
    assert!(matches!(parallel.decode(&short), Err(Malformed::Truncated(_))));
    parallel.decode(&long).unwrap();
}

#[test]
fn unknown_flags_and_times_out_of_range_are_refused() {
    let commit = Writer::default().byte(b'C').byte(2).bytes(&[0; 24]).done();
    assert!(matches!(Message::decode(&commit), Err(Malformed::Unknown { byte: 2, .. })));
    let end_of_time = Writer::default().byte(b'B').bytes(&[0; 8]).bytes(&i64::MAX.to_be_bytes()).bytes(&[0; 4]).done();
    assert_eq!(Message::decode(&end_of_time), Err(Malformed::Time(i64::MAX)));
}

proptest! {
    #[test]
    fn no_bytes_bring_the_decoder_down(bytes: Vec<u8>) {
        drop(Message::decode(&Bytes::from(bytes)));
    }

    #[test]
    fn no_damaged_message_brings_the_decoder_down(at in 0usize..60, to: u8) {
        let mut bytes = update().to_vec();
        let at = at % bytes.len();
        bytes[at] = to;
        if let Ok(Message::Update { new, .. }) = Message::decode(&Bytes::from(bytes)) {
            prop_assert_eq!(new.values().count(), new.len());
        }
    }
}
