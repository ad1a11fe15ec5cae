//! The raw connections against real servers: every way to log in, the pinned settings, the commands of a walsender.

use pgtandem::postgres::replication::{Event, Walsender};
use pgtandem::postgres::wire::{Mode, Wire};
use pgtandem::postgres::{Ambient, ConnInfo, Server, Side};
use pgtandem::{Class, Error};

use super::harness::{Cluster, versions_under_test};

const LOGINS: &str = "\
hostssl all scram 127.0.0.1/32 scram-sha-256
hostssl replication scram 127.0.0.1/32 scram-sha-256
host all md5 127.0.0.1/32 md5
host all plain 127.0.0.1/32 password
host all all 127.0.0.1/32 trust";

fn server(url: &str) -> Server {
    Server::new(Side::Source, ConnInfo::parse(url, &Ambient::default()).unwrap(), "app").unwrap()
}

async fn connect(url: &str, mode: Mode) -> Result<Wire, Error> {
    Wire::connect(&server(url), "test", mode, &[("work_mem", "7MB")]).await
}

#[tokio::test]
async fn every_way_to_log_in_works_for_both_kinds_of_backend() {
    let cluster = Cluster::builder(versions_under_test().0).tls().set("wal_level", "logical").hba(LOGINS).start().await;
    cluster.execute("CREATE ROLE scram LOGIN REPLICATION PASSWORD 's c\\ram'").await;
    cluster.execute("CREATE ROLE plain LOGIN REPLICATION PASSWORD 'p'").await;
    cluster.execute("SET password_encryption = 'md5'; CREATE ROLE md5 LOGIN REPLICATION PASSWORD 'm'").await;
    let base = format!("host=localhost port={} dbname=postgres", cluster.port());
    let full = format!("{base} sslmode=verify-full sslrootcert={}", cluster.tls().ca.display());
    for url in [
        format!("{full} user=scram password='s c\\\\ram' channel_binding=require"),
        format!("{full} user=scram password='s c\\\\ram' channel_binding=disable"),
        format!("{base} user=md5 password=m sslmode=disable"),
        format!("{base} user=plain password=p sslmode=require"),
        format!("{base} user=postgres sslmode=prefer"),
    ] {
        for mode in [Mode::Sql, Mode::Replication] {
            let mut wire = connect(&url, mode).await.unwrap_or_else(|error| panic!("{mode:?}: {error}"));
            let shown = wire.query("SELECT current_setting('DateStyle'), current_setting('work_mem'), NULL, ''").await;
            let row = shown.unwrap().remove(0);
            let texts: Vec<Option<&str>> = row.iter().map(Option::as_deref).collect();
            assert_eq!(texts, [Some("ISO, YMD"), Some("7MB"), None, Some("")]);
        }
    }
    let bound =
        connect(&format!("{base} user=md5 password=m sslmode=require channel_binding=require"), Mode::Sql).await;
    assert_eq!(bound.err().unwrap().code(), "channel_binding_impossible");
    let wrong = connect(&format!("{full} user=scram password=wrong"), Mode::Replication).await.err().unwrap();
    assert_eq!((wrong.code(), wrong.class()), ("invalid_password", Class::Wait), "{wrong}");
    assert!(!wrong.to_string().contains("wrong"), "{wrong}");
}

#[tokio::test]
async fn a_refused_statement_leaves_the_connection_usable() {
    let cluster = Cluster::start(versions_under_test().0).await;
    let mut wire = connect(&cluster.url("postgres", "postgres"), Mode::Sql).await.unwrap();
    let error = wire.query("SELECT 1/0").await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("22012"));
    let error = wire.enter_copy("COPY nowhere FROM STDIN").await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("42P01"));
    assert_eq!(wire.query("SELECT 7").await.unwrap(), [[Some("7".to_owned())]]);
}

#[tokio::test]
async fn a_value_read_as_another_type_is_a_defect() {
    let cluster = Cluster::start(versions_under_test().0).await;
    let session = server(&cluster.url("postgres", "postgres")).connect("test").await.unwrap();
    let row = session.query_one("SELECT 1::int4", &[]).await.unwrap();
    for wrong in [row.try_get::<_, String>(0).unwrap_err(), row.try_get::<_, i32>(1).unwrap_err()] {
        assert_eq!(Error::from(wrong).class(), Class::Bug);
    }
    let unfit = session.query_one("SELECT $1::int4", &[&"text"]).await.unwrap_err();
    assert_eq!(Error::from(unfit).class(), Class::Bug);
}

#[tokio::test]
async fn a_slot_exports_a_snapshot_and_its_stream_begins_there() {
    let cluster = Cluster::builder(versions_under_test().0).set("wal_level", "logical").start().await;
    cluster.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION p FOR TABLE t").await;
    let server = server(&cluster.url("postgres", "postgres"));
    let mut walsender = Walsender::connect(&server, "cut").await.unwrap();
    let identity = cluster.query_strings("SELECT system_identifier FROM pg_control_system()").await;
    assert_eq!(identity, [walsender.identify_system().await.unwrap()]);
    let cut = walsender.create_slot("s", false).await.unwrap();
    cluster.execute("INSERT INTO t VALUES (1)").await;
    let session = server.connect("test").await.unwrap();
    session
        .batch_execute(&format!("BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT '{}'", cut.snapshot))
        .await
        .unwrap();
    let seen: i64 = session.query_one("SELECT count(*) FROM public.t", &[]).await.unwrap().get(0);
    assert_eq!(seen, 0, "the snapshot shows the moment of the cut");
    walsender.close().await;

    let options = [("proto_version", "1".to_owned()), ("publication_names", "\"p\"".to_owned())];
    let walsender = Walsender::connect(&server, "stream").await.unwrap();
    let mut stream = walsender.stream("s", cut.lsn, &options).await.unwrap();
    let mut kinds = String::new();
    while !kinds.ends_with('C') {
        match stream.buffered().unwrap() {
            Some(Event::Data { payload, .. }) => kinds.push(char::from(payload[0])),
            Some(Event::Keepalive { sent, .. }) => stream.confirm(sent, cut.lsn, false).await.unwrap(),
            None => drop(stream.fill().await.unwrap()),
        }
    }
    assert_eq!(kinds, "BRIC");
    stream.close().await;
    cluster.execute("SELECT pg_drop_replication_slot('s')").await;
}
