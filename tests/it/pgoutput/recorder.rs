//! Makes the recordings: one fixed script, played to each version while its stream is written down.
//!
//!     cargo test --test it pgoutput::recorder -- --ignored
//!
//! Positions, times and numbers of transactions differ each time; the messages and their order do not.

use bytes::Bytes;
use pgtandem::postgres::pgoutput::Protocol;
use pgtandem::postgres::replication::{Event, ReplicationStream, Walsender};
use pgtandem::postgres::{Ambient, ConnInfo, Lsn, Server, Side};
use tokio_postgres::Client;

use super::recording::{Recording, recordings};
use crate::harness::{Cluster, Database, VERSIONS};

const BEFORE: &str = include_str!("script.sql");

#[tokio::test]
#[ignore = "replaces what is recorded"]
async fn record() {
    for version in VERSIONS {
        let cluster = Cluster::builder(version)
            .set("autovacuum", "off")
            .set("logical_decoding_work_mem", "64kB")
            .set("max_prepared_transactions", "5")
            .start()
            .await;
        cluster.execute("select pg_replication_origin_create('elsewhere')").await;
        for recording in recordings().into_iter().filter(|recording| recording.version == version) {
            let database = cluster.create_database(&recording.to_string()).await;
            let mut recorder = Recorder::start(recording, &database).await;
            recorder.play().await;
            recording.write(&recorder.end().await);
            database.execute("select pg_drop_replication_slot('recorder')").await;
        }
    }
}

struct Recorder {
    recording: Recording,
    stream: ReplicationStream,
    /// Plays the script.
    session: Client,
    /// Moves the log on while the script has a transaction open.
    clock: Client,
    messages: Vec<Bytes>,
}

impl Recorder {
    async fn start(recording: Recording, database: &Database) -> Self {
        database.execute(BEFORE).await;
        let two_phase = recording.protocol >= Protocol::V3;
        let create = if two_phase {
            "select pg_create_logical_replication_slot('recorder', 'pgoutput', false, true)"
        } else {
            "select pg_create_logical_replication_slot('recorder', 'pgoutput')"
        };
        database.execute(create).await;
        let conninfo = ConnInfo::parse(&database.url(), &Ambient::default()).unwrap();
        let server = Server::new(Side::Source, conninfo, "recorder").unwrap();
        let walsender = Walsender::connect(&server, "stream").await.unwrap();
        let stream = walsender.stream("recorder", Lsn::ZERO, &options(recording)).await.unwrap();
        let (session, clock) = (database.connect().await, database.connect().await);
        Self { recording, stream, session, clock, messages: Vec::new() }
    }

    async fn end(self) -> Vec<Bytes> {
        self.stream.close().await;
        self.messages
    }

    /// Runs statements, each in a transaction of its own unless they say otherwise, and waits until all was received.
    async fn step(&mut self, statements: &[&str]) {
        for sql in statements {
            self.session
                .batch_execute(sql)
                .await
                .unwrap_or_else(|error| panic!("{}: {error:?}: {sql}", self.recording));
        }
        self.receive().await;
    }

    /// Receives all that was written so far, also by transactions that go on.
    async fn receive(&mut self) {
        // A commit of another session brings the records of the open transaction to disk, from where they are read.
        self.clock.batch_execute("insert into clock values (now())").await.unwrap();
        let row = self.clock.query_one("select pg_current_wal_flush_lsn()::text", &[]).await.unwrap();
        let end: Lsn = row.get::<_, &str>(0).parse().unwrap();
        self.stream.confirm(Lsn::ZERO, Lsn::ZERO, true).await.unwrap();
        loop {
            match self.stream.buffered().unwrap() {
                Some(Event::Data { payload, .. }) => self.messages.push(Bytes::copy_from_slice(&payload)),
                Some(Event::Keepalive { sent, .. }) if sent >= end => return,
                Some(Event::Keepalive { .. }) => self.stream.confirm(Lsn::ZERO, Lsn::ZERO, true).await.unwrap(),
                None => drop(self.stream.fill().await.unwrap()),
            }
        }
    }

    async fn play(&mut self) {
        self.rows().await;
        self.truncates().await;
        self.origins().await;
        if self.recording.version >= 14 {
            self.messages().await;
        }
        self.shapes().await;
        self.large_transactions().await;
        self.prepared_transactions().await;
    }

    async fn rows(&mut self) {
        self.step(&[
            "insert into by_key values (2, 'wild', '', null)",
            "update by_key set note = 'uno' where id = 1",
            "update by_key set id = 3 where id = 2",
            "delete from by_key where id = 3",
            "insert into by_index values (1, 'one'), (2, null)",
            "update by_index set note = 'uno' where id = 1",
            "update by_index set id = 3 where id = 2",
            "delete from by_index where id = 3",
            "insert into in_full values (1, null, null), (2, '', null)",
            "update in_full set note = 'deux' where id = 2",
            "delete from in_full where id = 2",
            "insert into unnamed values (1)",
            "insert into nothing default values",
            r#"insert into "Sch.ema"."Tä""ble" values (1, 1.50)"#,
            r#"update "Sch.ema"."Tä""ble" set "\" = 'NaN'"#,
            "insert into kinds values (7, null, 'naïve', true, -1, 'NaN', 1e30, '\\x00ff', '0044-03-15 12:00 BC', 'infinity',
                 '1 year -2 days', '00000000-0000-0000-0000-000000000007', '{\"a\": null}', '{{1,2},{null,4}}', 5, (1, 'x'))",
            "begin; update kinds set b = false; savepoint s; delete from kinds; rollback to s; commit",
            "begin; insert into unnamed values (2); rollback",
            "begin; commit",
        ])
        .await;
        if self.recording.protocol == Protocol::V1 {
            // The old row holds the large value, and is sent whole.
            self.step(&["update in_full set note = 'uno' where large is not null"]).await;
        }
    }

    async fn truncates(&mut self) {
        self.step(&[
            "truncate by_index",
            "insert into parent values (1); insert into child values (1, 1)",
            "truncate parent cascade",
            "truncate parent, child restart identity",
        ])
        .await;
    }

    async fn origins(&mut self) {
        self.step(&[
            "select pg_replication_origin_session_setup('elsewhere')",
            "begin; select pg_replication_origin_xact_setup('5/ABCDEF01', '2001-02-03 04:05:06Z');
             insert into by_key values (10); commit",
            "begin; insert into by_key select generate_series(11, 13); insert into filler select generate_series(1, 600);
             commit",
            "select pg_replication_origin_session_reset()",
        ])
        .await;
    }

    async fn messages(&mut self) {
        self.step(&[
            "begin; select pg_logical_emit_message(true, 'inside', 'text'); insert into by_key values (20); commit",
            "select pg_logical_emit_message(true, 'alone', '\\x00ff'::bytea)",
            "select pg_logical_emit_message(false, 'beside', '')",
            "begin; select pg_logical_emit_message(false, 'rolled back, and yet', 'x'); rollback",
        ])
        .await;
    }

    /// The shape of a table changes, and is told again.
    async fn shapes(&mut self) {
        self.step(&[
            "alter table by_key add extra mood default 'wild'",
            "insert into by_key values (30)",
            "alter table by_index replica identity full",
            "insert into by_index values (30, 'x'); delete from by_index",
        ])
        .await;
    }

    /// What does not fit into 64 kB is streamed where that was asked for. Each piece is received before the next one is
    /// written, so that a transaction is still open when its pieces are sent.
    async fn large_transactions(&mut self) {
        const FILL: &str = "insert into filler select generate_series(1, 600)";
        self.step(&[
            "begin",
            "insert into by_key values (40), (41)",
            "update by_key set id = 42 where id = 41",
            "delete from by_key where id = 42",
            "insert into in_full values (40)",
            "update in_full set note = 'forty' where id = 40",
            FILL,
        ])
        .await;
        if self.recording.version >= 14 {
            self.step(&["select pg_logical_emit_message(true, 'large', 'text')"]).await;
        }
        self.step(&["truncate child", "insert into kinds (i) values (40)", FILL]).await;
        self.step(&["savepoint a", "insert into by_key values (43)", FILL]).await;
        self.step(&["rollback to a", "insert into by_key values (44)", FILL]).await;
        self.step(&["savepoint b", "insert into by_key values (45)", "release b", "commit"]).await;
        self.step(&["begin", "insert into by_key values (46)", FILL]).await;
        self.step(&["rollback"]).await;
    }

    /// Sent when they are prepared where that was asked for, and else when they commit.
    async fn prepared_transactions(&mut self) {
        const FILL: &str = "insert into filler select generate_series(1, 600)";
        self.step(&["begin", "insert into by_key values (50)", "prepare transaction 'commits'"]).await;
        self.step(&["commit prepared 'commits'"]).await;
        self.step(&["begin", "insert into by_key values (51)", "prepare transaction 'rolls back'"]).await;
        self.step(&["rollback prepared 'rolls back'"]).await;
        self.step(&["begin", "insert into by_key values (52)", FILL]).await;
        self.step(&["insert into by_key values (53)", "prepare transaction 'large'"]).await;
        self.step(&["commit prepared 'large'"]).await;
        self.step(&["begin", "insert into by_key values (54)", FILL]).await;
        self.step(&["prepare transaction 'large, rolls back'"]).await;
        self.step(&["rollback prepared 'large, rolls back'"]).await;
    }
}

fn options(recording: Recording) -> Vec<(&'static str, String)> {
    let (number, streaming, two_phase) = match recording.protocol {
        Protocol::V1 => ("1", None, false),
        Protocol::V2 => ("2", Some("on"), false),
        Protocol::V3 => ("3", Some("on"), true),
        Protocol::V4 { parallel: false } => ("4", Some("on"), true),
        Protocol::V4 { parallel: true } => ("4", Some("parallel"), true),
    };
    let mut options = vec![("proto_version", number.to_owned()), ("publication_names", "\"recorded\"".to_owned())];
    if recording.version >= 14 {
        options.push(("messages", "true".to_owned()));
        options.push(("binary", recording.binary.to_string()));
    }
    options.extend(streaming.map(|how| ("streaming", how.to_owned())));
    if two_phase {
        options.push(("two_phase", "on".to_owned()));
    }
    options
}
