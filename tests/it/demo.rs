//! The demo's own parts against a real server: its database, its clients, its switch and its comparison. A copy of the
//! database inside the same server plays the target.
//!
//! Any PostgreSQL that the demo finds will do; `scripts/provision.sh` brings some.

use std::process::Stdio;
use std::time::{Duration, Instant};

use pgtandem::demo::compare::{Comparison, compare};
use pgtandem::demo::installation::{self, Installation};
use pgtandem::demo::load::{AddressFile, Load};
use pgtandem::demo::schema::{self, APPLICATION, DATABASE, Scale};
use pgtandem::demo::servers::{Cluster, Folder, SUPERUSER, ServerUser};
use pgtandem::demo::summary::read_receipts;
use pgtandem::demo::switch::{Held, Switchboard, ask};
use pgtandem::postgres::Side;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::ChildStdout;

const COPY: &str = "copy_of_shop";

fn installations() -> (Installation, Installation) {
    installation::choose(&installation::find(&installation::starting_points())).expect("a PostgreSQL to test with")
}

async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition().await {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn address(cluster: &Cluster, database: &str) -> String {
    let (port, password) = (cluster.port(), cluster.password());
    format!("host=127.0.0.1 port={port} dbname={database} user={APPLICATION} password={password}")
}

/// Copies the whole database inside its server. From then on the original is closed to the clients, as behind a fence.
async fn copy_database(cluster: &Cluster) {
    let admin = cluster.connect(SUPERUSER, "postgres").await.unwrap();
    admin.batch_execute(&format!("ALTER DATABASE {DATABASE} CONNECTION LIMIT 0")).await.unwrap();
    until("the sessions of the clients to end", async || {
        admin
            .batch_execute(&format!(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{DATABASE}'"
            ))
            .await
            .unwrap();
        admin.batch_execute(&format!("CREATE DATABASE {COPY} TEMPLATE {DATABASE} OWNER {APPLICATION}")).await.is_ok()
    })
    .await;
}

async fn compared(cluster: &Cluster) -> Comparison {
    let source = Held::open(cluster.connect(SUPERUSER, DATABASE).await.unwrap()).await.unwrap();
    let target = Held::open(cluster.connect(SUPERUSER, COPY).await.unwrap()).await.unwrap();
    compare(&source, &target, |_| ()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_follow_the_address_and_nothing_acknowledged_is_missed() {
    let (installation, _) = installations();
    let user = ServerUser::choose().unwrap();
    let folder = Folder::create(user).unwrap();
    let cluster = Cluster::start(Side::Source, &installation, user, &folder).await.unwrap();
    let scale = Scale::from_rows(2_000);
    schema::create_database(&cluster).await.unwrap();

    // Given a filled database with clients.
    let sizes = schema::create(&cluster, scale).await.unwrap();
    let events = sizes.iter().find(|table| table.name.name == "event").expect("the partitions are one table");
    assert_eq!(events.rows, 2_000);
    let file = AddressFile::new(folder.path().join("address"));
    file.write(&address(&cluster, DATABASE)).unwrap();
    let load = Load::start(file.clone(), scale);
    until("the first transactions", async || load.acknowledged() > 300).await;

    // When the database is closed to them, copied, and the address leads to the copy.
    copy_database(&cluster).await;
    let before = load.acknowledged();
    let comparison = compared(&cluster).await;
    file.write(&address(&cluster, COPY)).unwrap();
    until("transactions on the copy", async || load.acknowledged() > before + 300).await;
    let record = load.stop().await.unwrap();

    // Then both were equal at that moment, and nothing that was acknowledged is missing from the copy.
    assert!(comparison.equal(), "{comparison:#?}");
    assert!(comparison.rows() > 3_000 && comparison.sequences >= 7 && comparison.definitions > 30, "{comparison:#?}");
    assert!(record.error_count() > 0, "each client lost its session");
    let copy = cluster.connect(SUPERUSER, COPY).await.unwrap();
    let receipts = read_receipts(&copy, &record, scale).await.unwrap();
    assert_eq!(receipts.acknowledged, record.acknowledged() as u64);
    assert_eq!((receipts.lost.len(), receipts.ghosts.len()), (0, 0), "{receipts:?}");
    assert_eq!(receipts.balance, receipts.expected_balance);

    // A lost ticket and a cent too many are noticed.
    copy.batch_execute(
        "DELETE FROM shop.receipts WHERE (client, ticket) = (0, (SELECT min(ticket) FROM shop.receipts WHERE client = 0));
         UPDATE bank.account SET balance = balance + 1 WHERE id = 1",
    )
    .await
    .unwrap();
    let receipts = read_receipts(&copy, &record, scale).await.unwrap();
    assert_eq!(receipts.lost.len(), 1);
    assert_eq!(receipts.balance, receipts.expected_balance + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_difference_is_shown_where_it_is() {
    let (_, installation) = installations();
    let user = ServerUser::choose().unwrap();
    let folder = Folder::create(user).unwrap();
    let cluster = Cluster::start(Side::Source, &installation, user, &folder).await.unwrap();
    schema::create_database(&cluster).await.unwrap();
    schema::create(&cluster, Scale::from_rows(1_000)).await.unwrap();
    copy_database(&cluster).await;
    assert!(compared(&cluster).await.equal());

    let copy = cluster.connect(SUPERUSER, COPY).await.unwrap();
    copy.batch_execute(
        "UPDATE shop.customer SET tags = ARRAY[NULL, 'changed'] WHERE id = 7;
         DELETE FROM shop.event WHERE id = 5;
         INSERT INTO shop.cart SELECT * FROM shop.cart LIMIT 1;
         SELECT setval('shop.invoice_number', 42);
         DROP INDEX shop.customer_tags;
         ALTER TABLE shop.orders DISABLE TRIGGER record;
         DROP TABLE shop.receipts",
    )
    .await
    .unwrap();

    let comparison = compared(&cluster).await;

    let different: Vec<&str> =
        comparison.tables.iter().filter(|table| !table.equal).map(|table| table.name.name.as_str()).collect();
    assert_eq!(different, ["cart", "customer", "event", "receipts"]);
    let differences = |name: &str| {
        let table = comparison.tables.iter().find(|table| table.name.name == name).unwrap();
        table.differences.join("\n")
    };
    assert!(differences("customer").contains("{NULL,changed}"), "{}", differences("customer"));
    assert!(differences("customer").contains("only on the source: (7,"), "{}", differences("customer"));
    assert!(differences("event").contains("only on the source: (5,"), "{}", differences("event"));
    assert!(
        differences("cart").starts_with("only on the target: "),
        "a row that is there twice: {}",
        differences("cart")
    );
    assert_eq!(differences("receipts"), "only the source has this table");
    let sequences = comparison.different_sequences.join("\n");
    assert!(sequences.contains(r#"only on the target: sequence "shop"."invoice_number" at 42"#), "{sequences}");
    let definitions = comparison.different_definitions.join("\n");
    assert!(definitions.contains("only on the source: index shop.customer_tags"), "{definitions}");
    assert!(definitions.contains("only on the target: trigger record on shop.orders, disabled"), "{definitions}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hook_switches_the_address_once_both_sides_are_held() {
    let (lowest, highest) = installations();
    let user = ServerUser::choose().unwrap();
    let folder = Folder::create(user).unwrap();
    let source = Cluster::start(Side::Source, &lowest, user, &folder).await.unwrap();
    let target = Cluster::start(Side::Target, &highest, user, &folder).await.unwrap();
    for cluster in [&source, &target] {
        schema::create_database(cluster).await.unwrap();
        let session = cluster.connect(APPLICATION, DATABASE).await.unwrap();
        session
            .batch_execute("CREATE SCHEMA s; CREATE TABLE s.t (n serial); INSERT INTO s.t VALUES (1)")
            .await
            .unwrap();
    }
    let file = AddressFile::new(folder.path().join("address"));
    file.write("old").unwrap();
    let switchboard = Switchboard::open(folder.path()).unwrap();
    let socket = switchboard.socket().to_owned();

    let (asked, moment) = tokio::join!(ask(&socket), switchboard.serve(&source, &target, &file, "new"));
    asked.unwrap();
    let moment = moment.unwrap();

    assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "new");
    // What is written after the switch is not part of what was held.
    let session = target.connect(APPLICATION, DATABASE).await.unwrap();
    session.batch_execute("INSERT INTO s.t VALUES (2)").await.unwrap();
    let comparison = compare(&moment.source, &moment.target, |_| ()).await.unwrap();
    assert!(comparison.equal(), "{comparison:#?}");
    assert_eq!((comparison.rows(), comparison.sequences), (1, 1));
}

/// The next port that the demo says a server listens on.
async fn announced_port(lines: &mut Lines<BufReader<ChildStdout>>) -> u16 {
    loop {
        let line = lines.next_line().await.unwrap().expect("the demo ended too soon");
        if let Some((_, rest)) = line.split_once(", port ") {
            return rest.split_once(')').unwrap().0.parse().unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demo_that_is_stopped_or_killed_leaves_no_server_behind() {
    for signal in [Signal::TERM, Signal::KILL] {
        let mut demo = tokio::process::Command::new(env!("CARGO_BIN_EXE_pgtandem"))
            .args(["demo", "--rows", "1000000"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
        let ports = [announced_port(&mut lines).await, announced_port(&mut lines).await];

        let pid = i32::try_from(demo.id().unwrap()).ok().and_then(Pid::from_raw).unwrap();
        kill_process(pid, signal).unwrap();
        let status = demo.wait().await.unwrap();

        assert_eq!(status.code(), (signal == Signal::TERM).then_some(1), "{status}");
        for port in ports {
            until("the servers to be gone", async || TcpStream::connect(("127.0.0.1", port)).await.is_err()).await;
        }
    }
}
