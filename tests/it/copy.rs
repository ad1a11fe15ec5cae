//! The copy against real servers: every row of the cut, whatever is in it and whatever dies, and a stream that goes on
//! exactly where the cut ends.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use pgtandem::config::{Config, Environment, Flags, Settings, TablePattern};
use pgtandem::copy::{self, Context, Outcome, by_hand, cut, publication};
use pgtandem::error::Class;
use pgtandem::follow::spool::Spooling;
use pgtandem::postgres::pgoutput::{Message, Tuple, Value};
use pgtandem::postgres::replication::{Event, Walsender};
use pgtandem::postgres::{Ambient, ConnInfo, Lsn, QualifiedName, Server, Side, catalog};
use pgtandem::state::{Leadership, Store, TableState};
use pgtandem::telemetry::Telemetry;
use tokio_util::sync::CancellationToken;

mod keys;
mod slow;
mod small;

use crate::harness::{Cluster, Database, PATIENCE, Pgtandem, assert_same, versions_under_test, wait_until};

/// A move whose schema is the same on both sides already.
struct Move {
    source: Database,
    target: Database,
    config: Config,
    context: Context,
    _leadership: Leadership,
    _clusters: (Cluster, Cluster),
}

impl Move {
    async fn new(schema: &str) -> Self {
        Self::configured(Cluster::pair().await, schema, &[]).await
    }

    async fn configured(clusters: (Cluster, Cluster), schema: &str, more: &[(&str, &str)]) -> Self {
        let (source, target) = (clusters.0.create_database("app").await, clusters.1.create_database("app").await);
        source.execute(schema).await;
        target.execute(schema).await;
        let through = more.iter().find(|(key, _)| *key == "target_port");
        let port = format!(":{}/", clusters.1.port());
        let target_url = through.map_or(target.url(), |(_, relay)| target.url().replace(&port, &format!(":{relay}/")));
        let flags = Flags {
            source: Some(source.url()),
            target: Some(target_url),
            name: Some("app".to_owned()),
            ..Flags::default()
        };
        let mut settings = Settings::gather(&flags, Environment::of([])).unwrap().config().unwrap();
        for (key, value) in more {
            match *key {
                "target_port" => {}
                "split_above" => settings.copy.split_above = value.parse().unwrap(),
                "workers" => settings.copy.workers = value.parse().unwrap(),
                "max_bytes_per_second" => settings.copy.max_bytes_per_second = value.parse().unwrap(),
                other => panic!("{other}"),
            }
        }
        let config = settings;
        let server = |side, info: &ConnInfo| Server::new(side, info.clone(), "app").unwrap();
        let (from, to) = (server(Side::Source, &config.source), server(Side::Target, &config.target));
        let store = Store::new(to.clone(), config.name.clone());
        store.install(&serde_json::json!({})).await.unwrap();
        let leadership = store.try_lead().await.unwrap().unwrap();
        let context = Context {
            source: from,
            target: to.clone(),
            store,
            epoch: leadership.epoch(),
            scope: config.scope.clone(),
            settings: config.copy.clone(),
            telemetry: Telemetry::default(),
            captured: false,
            spooling: Spooling::new(&config, &Telemetry::default()),
            finish: Arc::new(copy::Finish::new(&to, config.copy.index_workers, std::collections::HashMap::new())),
            cancel: CancellationToken::new(),
        };
        Self { source, target, config, context, _leadership: leadership, _clusters: clusters }
    }

    async fn publish(&self) -> Vec<String> {
        let session = self.context.source.connect("test").await.unwrap();
        let tables = catalog::tables(&*session).await.unwrap();
        publication::ensure(&self.context.source, &self.config, &tables, &self.context.telemetry).await.unwrap()
    }

    async fn first_cut(&self) -> (Walsender, pgtandem::postgres::replication::Cut) {
        let Context { source, store, telemetry, cancel, .. } = &self.context;
        self.publish().await;
        cut::first(source, store, telemetry, cancel).await.unwrap()
    }

    async fn another_cut(&self) -> (Walsender, pgtandem::postgres::replication::Cut) {
        let Context { source, store, telemetry, cancel, .. } = &self.context;
        self.publish().await;
        cut::another(source, store, telemetry, cancel).await.unwrap()
    }

    async fn copy(&self) -> Outcome {
        let (walsender, cut) = self.first_cut().await;
        copy::run(&self.context, walsender, &cut).await.unwrap()
    }

    /// Copies under the first cut, and dies once `enough` is true.
    async fn begin_and_die(&self, enough: impl AsyncFn() -> bool) -> pgtandem::postgres::replication::Cut {
        let (walsender, cut) = self.first_cut().await;
        self.die_copying(walsender, &cut, enough).await;
        cut
    }

    async fn die_copying(
        &self,
        walsender: Walsender,
        cut: &pgtandem::postgres::replication::Cut,
        enough: impl AsyncFn() -> bool,
    ) {
        tokio::select! {
            done = copy::run(&self.context, walsender, cut) => panic!("it was to die before: {done:?}"),
            () = wait_until("enough is there", PATIENCE, enough) => {}
        }
    }

    /// How many units of a table are in the target.
    async fn units(&self, table: &str) -> usize {
        let sql = format!("select count(*) from pgtandem.copy_unit where table_name = '{table}'");
        self.target.query_string(&sql).await.parse().unwrap()
    }

    /// The transactions that wrote the rows of a table of the target.
    async fn written_by(&self, table: &str) -> BTreeSet<String> {
        self.target.query_strings(&format!("select distinct xmin::text from {table}")).await.into_iter().collect()
    }

    async fn states(&self) -> BTreeMap<String, TableState> {
        self.context.store.tables().await.unwrap().into_iter().map(|t| (t.name.plain(), t.state)).collect()
    }

    /// Ids of the rows of `public.ledger` that the slot streams, with the commit position of each, up to the position
    /// that the source has now.
    async fn streamed(&self) -> Vec<(Lsn, i64)> {
        let end: Lsn = self.source.query_string("select pg_current_wal_lsn()").await.parse().unwrap();
        // A commit after `end`, so that the stream has something to end with.
        self.source.execute("insert into public.ledger values (0)").await;
        let walsender = Walsender::connect(&self.context.source, "test").await.unwrap();
        let names = [self.config.name.publication(), self.config.name.insert_publication()].join(",");
        let options = [("proto_version", "1".to_owned()), ("publication_names", names)];
        let mut stream = walsender.stream(&self.config.name.slot(), Lsn::ZERO, &options).await.unwrap();
        let (mut found, mut commit) = (Vec::new(), Lsn::ZERO);
        loop {
            while let Some(event) = stream.buffered().unwrap() {
                let Event::Data { payload, .. } = event else { continue };
                match Message::decode(&payload).unwrap() {
                    Message::Begin { commit_lsn, .. } if commit_lsn >= end => return found,
                    Message::Begin { commit_lsn, .. } => commit = commit_lsn,
                    Message::Insert { new, .. } => found.push((commit, first_column(&new))),
                    _ => {}
                }
            }
            tokio::time::timeout(PATIENCE, stream.fill()).await.expect("the stream goes on").unwrap();
        }
    }

    /// Each row of the ledger is in the target's copy or in the stream after the table's cut, and in one of them only.
    async fn assert_ledger_meets_the_stream(&self) {
        let mut expected = self.source.query_strings("select id from public.ledger order by id").await;
        let tables = self.context.store.tables().await.unwrap();
        let ledger = tables.iter().find(|t| t.name == QualifiedName::new("public", "ledger")).unwrap();
        let cut = ledger.cut_lsn.expect("the ledger is copied");
        let mut found = self.target.query_strings("select id from public.ledger").await;
        let copied = found.len();
        let streamed = self.streamed().await;
        let later = streamed.into_iter().filter(|(commit, _)| *commit >= cut).map(|(_, id)| id.to_string());
        found.extend(later);
        assert!(copied > 0 && copied < found.len(), "both sides of the cut hold rows: {copied} of {}", found.len());
        found.sort_by_key(|id| id.parse::<i64>().unwrap());
        expected.sort_by_key(|id| id.parse::<i64>().unwrap());
        assert!(found == expected, "{} rows arrive, {} are expected", found.len(), expected.len());
    }
}

fn first_column(tuple: &Tuple) -> i64 {
    match tuple.values().next() {
        Some(Value::Text(text)) => std::str::from_utf8(text).unwrap().parse().unwrap(),
        other => panic!("an id, not {other:?}"),
    }
}

const AWKWARD: &str = r#"
    create schema "s.1 ""q""";
    create type "s.1 ""q""".mood as enum ('so, so', 'gr"eat', '\.');
    create table "s.1 ""q"""."Tab\le, TABLE x" (
        "select" int primary key, "ünï""cödé.col" text, m "s.1 ""q""".mood, dropped int,
        g text generated always as ("ünï""cödé.col" || '!') stored,
        i int generated always as identity);
    alter table "s.1 ""q"""."Tab\le, TABLE x" drop column dropped;
    create table nothing ();
    create table only_generated (g int generated always as (42) stored);
    create table empty (id int);
    create table types (
        id int primary key, f4 real, f8 double precision, n numeric, b bytea, t text, j jsonb, ts timestamptz, iv interval,
        d date, tm time, bits bit varying, arr int[], texts text[], r int4range, u uuid, net inet, pt point, mo money, x xml,
        v tsvector, c char(5));
    create table parent (id int, name text);
    create table child (more text) inherits (parent);
    create table parts (id int, region text, primary key (id, region)) partition by list (region);
    create table parts_eu partition of parts for values in ('eu') partition by range (id);
    create table parts_eu_low partition of parts_eu for values from (0) to (100);
    create table parts_eu_high partition of parts_eu for values from (100) to (200);
    create table parts_rest partition of parts default;
"#;

const AWKWARD_ROWS: &str = r#"
    insert into "s.1 ""q"""."Tab\le, TABLE x" ("select", "ünï""cödé.col", m) values
        (1, E'tab\tnewline\ncr\rbackslash\\ \\.', 'so, so'), (2, '', 'gr"eat'), (3, null, '\.'), (4, 'null', null), (5, '\N', null);
    insert into nothing select from generate_series(1, 7);
    insert into only_generated select from generate_series(1, 3);
    insert into types values
        (1, 'NaN', '-0', 'NaN', '\x00ff5c27', E'\\.', '{"a": [1, null, "\u00e9"]}', 'infinity', '-1 year 2 days -03:00',
         '0044-03-15 BC', '24:00:00', b'1011', '[0:1]={1,null}', '{"a,b","\"q\"",null,"NULL"}', '(1,5]',
         '00000000-0000-0000-0000-000000000001', '::1/64', '(1.5,-0)', -1234567.89, '<a>1</a><b/>', 'a:1A b', 'x'),
        (2, 1e-45, 5e-324, 1e1000, decode(repeat('0a0d095c', 100), 'hex'), repeat(E'\n\\', 5000), 'null', '-infinity', '0', 'infinity',
         '00:00', '', '{}', '{{a,b},{c,d}}', 'empty', 'ffffffff-ffff-ffff-ffff-ffffffffffff', '10.0.0.1', '(0,0)', 0, '', '', ''),
        (3, 3.4028235e38, 1.7976931348623157e308, 0.10, '', '', '0', '0001-01-01 00:00:00.000001+00 BC', '178000000 years', '-infinity',
         '23:59:59.999999', null, null, null, null, null, null, null, null, null, null, null);
    insert into parent select i, 'p' || i from generate_series(1, 10) i;
    insert into child select i, 'c' || i, 'more' from generate_series(1, 20) i;
    insert into parts select i, case when i % 3 = 0 then 'eu' else 'us' end from generate_series(0, 199) i;
"#;

#[tokio::test]
async fn every_kind_of_table_and_value_arrives() {
    // Given servers whose settings would change how values print, each in another way.
    let (from, to) = versions_under_test();
    let source = Cluster::builder(from).set("datestyle", "German").set("intervalstyle", "sql_standard");
    let source = source.set("bytea_output", "escape").set("extra_float_digits", "0").set("statement_timeout", "60s");
    let target = Cluster::builder(to).set("timezone", "Asia/Kolkata").set("datestyle", "SQL, DMY");
    let moved = Move::configured(tokio::join!(source.start(), target.start()), AWKWARD, &[]).await;
    moved.source.execute(AWKWARD_ROWS).await;

    assert_eq!(moved.copy().await, Outcome::Complete);

    // Sequences are set by the cutover; here, so that nothing but them is left out of the comparison.
    let value = r#"select setval('"s.1 ""q"""."Tab\le, TABLE x_i_seq"', 5)"#;
    moved.target.execute(value).await;
    assert_same(&moved.source, &moved.target).await;
    assert!(moved.states().await.values().all(|state| *state == TableState::Copied));
    let only = "select count(*) from only parent";
    assert_eq!(moved.target.query_strings(only).await, ["10"], "a parent's children are copied once");
    let rows = moved.context.store.tables().await.unwrap().iter().map(|t| t.rows).sum::<u64>();
    assert_eq!(rows, 5 + 7 + 3 + 3 + 10 + 20 + 200);
    // Statistics are there afterwards.
    let session = moved.context.source.connect("test").await.unwrap();
    let tables = catalog::tables(&*session).await.unwrap();
    copy::analyze(&moved.context.target, &tables, moved.config.copy.index_workers, &moved.context.telemetry)
        .await
        .unwrap();
    assert_eq!(moved.target.query_strings("select reltuples from pg_class where relname = 'parts'").await, ["200"]);
}

/// Many units, so slow that there is time to die between them.
const SLOW: &[(&str, &str)] = &[("split_above", "2000000"), ("workers", "2"), ("max_bytes_per_second", "8000000")];

const LARGE: &str = "
    create table large (id bigint primary key, filler text);
    alter table large set (autovacuum_enabled = off);
    create table ledger (id bigint);
    create table small (id int primary key);";

const LARGE_ROWS: &str = "
    insert into large select i, repeat(md5(i::text), 8) from generate_series(1, 200000) i;
    delete from large where id % 7 = 0;
    insert into small select generate_series(1, 100);
    insert into ledger select generate_series(1, 1000);";

#[tokio::test]
async fn a_large_table_is_copied_in_parts() {
    let (source, target) = tokio::join!(Cluster::start(14), Cluster::start(18));
    let moved = Move::configured((source, target), LARGE, &[("split_above", "4000000"), ("workers", "4")]).await;
    moved.source.execute(LARGE_ROWS).await;
    assert_eq!(moved.copy().await, Outcome::Complete);
    assert_same(&moved.source, &moved.target).await;
}

/// Inserts the next ids into the ledger, several transactions at once that overlap, until told to stop.
fn write_ledger(source: &Database, stop: &CancellationToken) -> Vec<tokio::task::JoinHandle<()>> {
    (0..3i64)
        .map(|writer| {
            let (source, stop) = (source.clone(), stop.clone());
            tokio::spawn(async move {
                let client = source.connect().await;
                let mut id = 1_000_000 * (writer + 1);
                while !stop.is_cancelled() {
                    id += 3;
                    let sql = format!(
                        "begin; insert into ledger values ({id}); savepoint s; insert into ledger values (-1);
                         rollback to s; insert into ledger values ({}); commit",
                        id + 1
                    );
                    client.batch_execute(&sql).await.unwrap();
                }
            })
        })
        .collect()
}

#[tokio::test]
async fn the_stream_goes_on_exactly_where_the_cut_ends() {
    let moved = Move::new(LARGE).await;
    moved.source.execute(LARGE_ROWS).await;
    let stop = CancellationToken::new();
    let writers = write_ledger(&moved.source, &stop);

    moved.copy().await;

    stop.cancel();
    for writer in writers {
        writer.await.unwrap();
    }
    moved.assert_ledger_meets_the_stream().await;
}

#[tokio::test]
async fn a_copy_that_was_killed_goes_on_under_another_cut() {
    let mut moved = Move::configured(Cluster::pair().await, LARGE, SLOW).await;
    moved.source.execute(LARGE_ROWS).await;
    let stop = CancellationToken::new();
    let writers = write_ledger(&moved.source, &stop);

    // Given a copy that dies while some parts of the large table are in the target and the ledger is not.
    let first = moved.begin_and_die(async || moved.units("large").await >= 3).await;
    assert_eq!(moved.states().await["public.large"], TableState::Copying);

    // When the next start takes another cut.
    moved.source.execute("update large set filler = 'changed' where id % 1000 = 1").await;
    let there = moved.written_by("large").await;
    moved.context.settings.max_bytes_per_second = 0;
    let (walsender, second) = moved.another_cut().await;
    assert!(second.lsn > first.lsn);
    assert_eq!(moved.context.store.find().await.unwrap().unwrap().last_cut_lsn, Some(second.lsn));
    assert_eq!(copy::run(&moved.context, walsender, &second).await.unwrap(), Outcome::Complete);

    // Then what was there stayed, everything is there once, and the slot still begins at the first cut.
    assert!(there.is_subset(&moved.written_by("large").await), "no unit was copied twice");
    stop.cancel();
    for writer in writers {
        writer.await.unwrap();
    }
    let sum = "select count(*), sum(hashtext(l::text)) from large l";
    assert_eq!(moved.source.query_strings(sum).await, moved.target.query_strings(sum).await);
    moved.assert_ledger_meets_the_stream().await;
    // And a third run finds nothing to do.
    let (walsender, third) = moved.another_cut().await;
    assert_eq!(copy::run(&moved.context, walsender, &third).await.unwrap(), Outcome::Complete);
    assert_eq!(moved.source.query_strings(sum).await, moved.target.query_strings(sum).await);
}

const CHANGING: &str = "
    create table changing (a text, b int, v text, wide text, primary key (a, b));
    alter table changing set (autovacuum_enabled = off);
    alter table changing alter wide set storage external;
    create table unkeyed (id int, v text);
    alter table unkeyed replica identity full;
    create table twice (id int primary key, v text);
    create table renewed (id int primary key, v text);
    create table named (id int not null, v text);
    alter table named replica identity full;
    create table widened (id int primary key, v text, x int);
    create table parted (id int, v text, primary key (id)) partition by range (id);
    create table part partition of parted default;
    create table missed (id int primary key, v text);";

const CHANGING_ROWS: &str = r"
    insert into changing
        select E'key\t\\' || i % 10, i, repeat(md5(i::text), 5), case when i % 100 = 0 then repeat('w' || i, 2000) end
        from generate_series(1, 60000) i;
    insert into unkeyed select i, repeat(md5(i::text), 5) from generate_series(1, 40000) i;
    insert into twice select i, repeat(md5(i::text), 5) from generate_series(1, 40000) i;
    insert into renewed select i, repeat(md5(i::text), 5) from generate_series(1, 40000) i;
    insert into named select i, repeat(md5(i::text), 5) from generate_series(1, 40000) i;
    insert into widened select i, repeat(md5(i::text), 5), 1 from generate_series(1, 40000) i;
    insert into parted select i, repeat(md5(i::text), 5) from generate_series(1, 40000) i;
    insert into missed select i, repeat(md5(i::text), 5) from generate_series(1, 40000) i;";

/// Every way in which a row can change, leave its place, or come to another one.
const CHANGES: &str = r"
    delete from changing where b % 97 = 0;
    vacuum changing;
    update changing set v = v || 'longer' where b % 13 = 0;
    update changing set v = 'again' where b % 26 = 0;
    update changing set v = 'twice' || v where b % 26 = 0;
    insert into changing select a, b + 1000000, v, wide from changing where b % 31 = 0;
    update changing set b = -b where b % 50 = 0;
    update changing set a = '', v = 'of wide ones' where b % 700 = 0;
    begin; delete from changing where b % 41 = 0; rollback;
    begin; insert into changing values ('gone', 1, null, null); delete from changing where a = 'gone'; commit;
    delete from changing where b % 43 = 0;
    insert into changing select E'key\t\\' || i % 10, i, 'back', null from generate_series(43, 43000, 43) i on conflict do nothing;";

#[tokio::test]
async fn what_changes_between_two_starts_is_brought_into_the_units_that_are_there() {
    changes_are_brought_into_units(Cluster::pair().await, CHANGING).await;
}

async fn changes_are_brought_into_units(clusters: (Cluster, Cluster), schema: &str) {
    let mut moved = Move::configured(clusters, schema, SLOW).await;
    moved.source.execute(CHANGING_ROWS).await;
    let (some, more) = (3, 7);
    moved.begin_and_die(async || moved.units("changing").await >= some).await;
    let there = moved.written_by("changing").await;

    // It dies twice more: before anything was added, and after some was.
    for statement in CHANGES.split(';') {
        moved.source.execute(statement).await;
    }
    moved.context.settings.max_bytes_per_second = 1;
    let (walsender, cut) = moved.another_cut().await;
    let brought = format!("select count(*) > 0 from pgtandem.copy_unit where cut_lsn = '{}'", cut.lsn);
    moved.die_copying(walsender, &cut, async || moved.target.query_string(&brought).await == "t").await;
    for statement in CHANGES.split(';') {
        moved.source.execute(&statement.replace("1000000", "2000000")).await;
    }
    moved.context.settings.max_bytes_per_second = 8_000_000;
    let (walsender, cut) = moved.another_cut().await;
    moved.die_copying(walsender, &cut, async || moved.units("changing").await >= more).await;
    moved.source.execute("update changing set v = 'last' where b % 11 = 0").await;

    moved.context.settings.max_bytes_per_second = 0;
    let (walsender, cut) = moved.another_cut().await;
    assert_eq!(copy::run(&moved.context, walsender, &cut).await.unwrap(), Outcome::Complete);

    assert_same(&moved.source, &moved.target).await;
    assert!(there.is_subset(&moved.written_by("changing").await), "what nobody touched stayed");
    assert_eq!(moved.units("changing").await, 0, "nothing is remembered of a table that is copied");
}

#[tokio::test]
async fn a_table_goes_on_only_where_every_change_can_be_told() {
    let mut moved = Move::configured(Cluster::pair().await, CHANGING, SLOW).await;
    moved.source.execute(CHANGING_ROWS).await;
    let tables = ["unkeyed", "twice", "renewed", "named", "widened", "part", "missed", "changing"];
    // Given that each of them was begun.
    for (at, table) in tables.into_iter().enumerate() {
        moved.context.settings.first = vec![TablePattern::new(table).unwrap()];
        let (walsender, cut) = if at == 0 { moved.first_cut().await } else { moved.another_cut().await };
        moved.die_copying(walsender, &cut, async || moved.units(table).await > 0).await;
    }
    let mut there = BTreeMap::new();
    for table in tables {
        there.insert(table, moved.written_by(table).await);
    }

    // When a row without a key changes, a table is emptied and filled again, another one is made anew, one gets another identity, one
    // a column in place of another, and two change while the stream does not tell of it.
    let publication = moved.config.name.publication();
    let changes = format!(
        "update unkeyed set v = 'changed' where id = 17;
        truncate twice; insert into twice select generate_series(1, 5);
        drop table renewed; create table renewed (id int primary key, v text); insert into renewed values (1, 'new');
        update named set v = 'changed' where id = 17;
        alter table named add primary key (id), replica identity default;
        alter table widened drop column x; alter table widened add column x int default 7;
        alter table parted detach partition part;
        update part set v = 'changed' where id = 17;
        alter table parted attach partition part default;
        alter publication {publication} drop table missed;
        update missed set v = 'changed' where id = 17;
        alter publication {publication} add table only missed"
    );
    for statement in changes.split(';') {
        moved.source.execute(statement).await;
    }
    moved.context.settings.max_bytes_per_second = 0;
    let (walsender, cut) = moved.another_cut().await;
    assert_eq!(copy::run(&moved.context, walsender, &cut).await.unwrap(), Outcome::Complete);

    // Then these begin anew, and the other one went on.
    assert_same(&moved.source, &moved.target).await;
    for table in tables {
        let kept = there[table].is_subset(&moved.written_by(table).await);
        assert_eq!(kept, table == "changing", "{table}");
    }
}

#[tokio::test]
async fn without_the_right_to_make_temporary_tables_a_table_begins_anew() {
    let mut moved = Move::configured(Cluster::pair().await, LARGE, SLOW).await;
    moved.source.execute(LARGE_ROWS).await;
    moved.begin_and_die(async || moved.units("large").await >= 3).await;
    let there = moved.written_by("large").await;
    moved.source.execute("update large set filler = 'changed' where id = 1").await;
    // Given that the target's role may write all that is there, and make nothing.
    moved
        .target
        .execute(&format!(
            "revoke temporary on database {} from public; create role writer login password 'writes';
             grant all on all tables in schema public to writer; grant usage on schema pgtandem to writer;
             grant all on all tables in schema pgtandem to writer",
            moved.target.name()
        ))
        .await;
    let url = moved.target.with_user("writer", "writes").url();
    let info = ConnInfo::parse(&url, &Ambient::default()).unwrap();
    moved.context.target = Server::new(Side::Target, info, "app").unwrap();

    moved.context.settings.max_bytes_per_second = 0;
    let (walsender, cut) = moved.another_cut().await;
    assert_eq!(copy::run(&moved.context, walsender, &cut).await.unwrap(), Outcome::Complete);

    assert_same(&moved.source, &moved.target).await;
    assert!(there.is_disjoint(&moved.written_by("large").await), "it was emptied first");
}

#[tokio::test]
async fn a_stop_leaves_nothing_half_done() {
    let moved = Move::new(LARGE).await;
    moved.source.execute(LARGE_ROWS).await;
    let (walsender, cut) = moved.first_cut().await;
    let holder = moved.target.connect().await;
    holder.batch_execute("begin; lock table large in share mode").await.unwrap();
    let stop = async {
        wait_until("the small tables are copied", PATIENCE, async || {
            moved.states().await.get("public.ledger") == Some(&TableState::Copied)
        })
        .await;
        moved.context.cancel.cancel();
    };
    let (outcome, ()) = tokio::join!(copy::run(&moved.context, walsender, &cut), stop);
    assert_eq!(outcome.unwrap(), Outcome::Stopped);
    drop(holder);
    assert_eq!(moved.target.query_strings("select count(*) from large").await, ["0"]);
}

#[tokio::test]
async fn rows_of_someone_else_are_not_removed() {
    let moved = Move::new(LARGE).await;
    moved.source.execute(LARGE_ROWS).await;
    moved.target.execute("insert into small values (-1)").await;
    let (walsender, cut) = moved.first_cut().await;
    let error = copy::run(&moved.context, walsender, &cut).await.unwrap_err();
    assert_eq!((error.class(), error.code()), (Class::Operator, "target_table_not_empty"), "{error}");
    assert!(error.to_string().contains("public.small"), "{error}");
    assert_ne!(moved.states().await["public.small"], TableState::Copying, "the next start must refuse it too");
    assert_eq!(moved.target.query_strings("select * from small").await, ["-1"]);
}

#[tokio::test]
async fn a_table_that_was_rewritten_after_the_cut_is_copied_under_another() {
    let moved = Move::new(LARGE).await;
    moved.source.execute(LARGE_ROWS).await;
    let (walsender, cut) = moved.first_cut().await;
    // An older snapshot sees this table empty from here on.
    moved.source.execute("alter table small alter column id type bigint").await;
    moved.target.execute("alter table small alter column id type bigint").await;

    let error = copy::run(&moved.context, walsender, &cut).await.unwrap_err();
    assert_eq!((error.class(), error.code()), (Class::Retry, "table_rewritten"), "{error}");

    let (walsender, cut) = moved.another_cut().await;
    assert_eq!(copy::run(&moved.context, walsender, &cut).await.unwrap(), Outcome::Complete);
    assert_same(&moved.source, &moved.target).await;
}

#[tokio::test]
async fn a_missing_column_and_a_refused_row_are_said() {
    let moved = Move::new(LARGE).await;
    moved.source.execute(LARGE_ROWS).await;
    moved.target.execute("alter table small drop column id").await;
    let (walsender, cut) = moved.first_cut().await;
    let error = copy::run(&moved.context, walsender, &cut).await.unwrap_err();
    assert_eq!((error.class(), error.sqlstate()), (Class::Operator, Some("42703")), "{error}");
    assert!(error.to_string().contains("public.small") && error.hint_text().is_some(), "{error}");

    // A COPY that the target ends early is not fed to its end.
    moved.target.execute("alter table small add column id int; alter table large add check (id <> 1)").await;
    let (walsender, cut) = moved.another_cut().await;
    let error = copy::run(&moved.context, walsender, &cut).await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("23514"), "{error}");
}

#[tokio::test]
async fn a_daemon_that_lost_the_move_commits_nothing() {
    let moved = Move::new(LARGE).await;
    moved.source.execute(LARGE_ROWS).await;
    let (walsender, cut) = moved.first_cut().await;
    moved.target.execute("update pgtandem.progress set epoch = epoch + 1").await;
    let error = copy::run(&moved.context, walsender, &cut).await.unwrap_err();
    assert_eq!(error.code(), "leadership_lost", "{error}");
    assert!(moved.states().await.values().all(|state| *state != TableState::Copied));
    assert_eq!(moved.target.query_strings("select count(*) from large").await, ["0"]);
}

#[tokio::test]
async fn a_locked_table_of_the_source_is_waited_for() {
    let moved = Move::new(LARGE).await;
    moved.source.execute(LARGE_ROWS).await;
    let (walsender, cut) = moved.first_cut().await;
    let holder = moved.source.connect().await;
    holder.batch_execute("begin; lock table small in access exclusive mode").await.unwrap();
    let release = async {
        wait_until("a worker waits for the lock", PATIENCE, async || {
            let waits = "select count(*) > 0 from pg_locks where not granted and relation = 'small'::regclass";
            moved.source.query_string(waits).await == "t"
        })
        .await;
        holder.batch_execute("rollback").await.unwrap();
    };
    let (outcome, ()) = tokio::join!(copy::run(&moved.context, walsender, &cut), release);
    assert_eq!(outcome.unwrap(), Outcome::Complete);
    assert_same(&moved.source, &moved.target).await;
}

#[tokio::test]
async fn publications_never_refuse_an_update_and_follow_the_tables() {
    let moved = Move::new(AWKWARD).await;
    moved.source.execute(AWKWARD_ROWS).await;
    let members = "select pubname, schemaname || '.' || tablename from pg_publication_tables order by 1, 2";
    assert_eq!(moved.publish().await, ["pgtandem_app", "pgtandem_app_inserts"]);
    let published = moved.source.query_strings(members).await;
    for expected in [
        "pgtandem_app|public.parts_eu_low",
        "pgtandem_app|public.types",
        "pgtandem_app_inserts|public.parent",
        "pgtandem_app_inserts|public.child",
        "pgtandem_app_inserts|public.nothing",
    ] {
        assert!(published.iter().any(|line| line == expected), "{expected} in {published:#?}");
    }
    moved.source.execute("update parent set name = 'x'; delete from child; update types set t = 'y'").await;

    // A second time nothing changes; a new partition is there by itself; a new table is added.
    moved.publish().await;
    assert_eq!(moved.source.query_strings(members).await, published);
    moved
        .source
        .execute("create table parts_us partition of parts for values in ('xx'); create table late (id int)")
        .await;
    assert!(moved.source.query_strings(members).await.contains(&"pgtandem_app|public.parts_us".to_owned()));
    moved.source.execute("alter table types drop constraint types_pkey").await;
    moved.publish().await;
    let published = moved.source.query_strings(members).await;
    assert!(published.contains(&"pgtandem_app_inserts|public.late".to_owned()), "{published:#?}");
    assert!(published.contains(&"pgtandem_app_inserts|public.types".to_owned()), "{published:#?}");
    assert!(!published.contains(&"pgtandem_app|public.types".to_owned()), "{published:#?}");
}

#[tokio::test]
async fn a_slot_without_a_record_is_made_again() {
    let moved = Move::new(LARGE).await;
    moved.source.execute("select pg_create_logical_replication_slot('pgtandem_app', 'pgoutput')").await;
    let (_walsender, cut) = moved.first_cut().await;
    let slots = "select confirmed_flush_lsn from pg_replication_slots";
    assert_eq!(moved.source.query_strings(slots).await, [cut.lsn.to_string()]);
    assert_eq!(moved.context.store.find().await.unwrap().unwrap().slot_lsn, Some(cut.lsn));
}

#[tokio::test]
async fn a_cut_waits_for_old_transactions_and_can_be_given_up() {
    let moved = Move::new(LARGE).await;
    moved.publish().await;
    let old = moved.source.connect().await;
    old.batch_execute("begin; insert into small values (1)").await.unwrap();
    let Context { source, store, telemetry, cancel, .. } = &moved.context;
    let give_up = async {
        wait_until("the walsender waits", PATIENCE, async || {
            let waits = "select count(*) > 0 from pg_locks where not granted and locktype = 'transactionid'";
            moved.source.query_string(waits).await == "t"
        })
        .await;
        cancel.cancel();
    };
    let (error, ()) = tokio::join!(cut::first(source, store, telemetry, cancel), give_up);
    assert_eq!(error.map(|_| ()).unwrap_err().code(), "stopped");
    wait_until("nothing is left of the slot", Duration::from_secs(10), async || {
        moved.source.query_strings("select slot_name from pg_replication_slots").await.is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_copy_by_hand_is_taken_over() {
    let moved = Move::new(LARGE).await;
    moved.source.execute(LARGE_ROWS).await;
    let Context { source, store, telemetry, cancel, .. } = &moved.context;
    assert_eq!(by_hand::accept(store).await.unwrap_err().code(), "no_snapshot");
    let (_walsender, cut) = by_hand::offer(source, store, &moved.config, telemetry, cancel).await.unwrap();
    assert!(moved.states().await.values().all(|state| *state == TableState::Pending));
    by_hand::accept(store).await.unwrap();
    let tables = store.tables().await.unwrap();
    assert_eq!(tables.len(), 3);
    assert!(tables.iter().all(|t| t.state == TableState::Copied && t.cut_lsn == Some(cut.lsn)));
    let again = by_hand::offer(source, store, &moved.config, telemetry, cancel).await.map(|_| ()).unwrap_err();
    assert_eq!(again.code(), "slot_exists");
}

#[tokio::test]
async fn a_snapshot_is_held_for_a_dump_by_hand() {
    let (source, target) = Cluster::pair().await;
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(LARGE).await;
    from.execute("insert into small select generate_series(1, 10)").await;
    let mut holding = Pgtandem::new(&from, &to, "app").spawn(&["snapshot", "--json"]);
    wait_until("the snapshot is printed", PATIENCE, async || {
        assert!(holding.is_running(), "{}", holding.stderr());
        holding.stdout().ends_with('\n')
    })
    .await;
    let printed: serde_json::Value = serde_json::from_str(&holding.stdout()).unwrap();
    assert_eq!(printed["slot"], "pgtandem_app");

    // What is written now is not in the snapshot.
    from.execute("insert into small values (11)").await;
    let reader = from.connect().await;
    let begin = format!(
        "begin isolation level repeatable read; set transaction snapshot '{}'",
        printed["snapshot"].as_str().unwrap()
    );
    reader.batch_execute(&begin).await.unwrap();
    let count: i64 = reader.query_one("select count(*) from small", &[]).await.unwrap().get(0);
    assert_eq!(count, 10);

    holding.terminate();
    let done = holding.wait(PATIENCE).await;
    assert_eq!(done.code, Some(0), "{done}");
    let slot = "select slot_lsn from pgtandem.move";
    assert_eq!(to.query_strings(slot).await, [printed["lsn"].as_str().unwrap()]);
    let again = Pgtandem::new(&from, &to, "app").run(&["snapshot"]).await;
    assert_eq!(again.code, Some(4), "{again}");
}

#[tokio::test]
async fn a_table_that_is_dropped_during_the_copy_does_not_keep_it_from_ending() {
    let tables = "create table stays (id int primary key); create table goes (id int primary key);
                  insert into stays values (1)";
    let moved = Move::new("").await;
    moved.source.execute(tables).await;
    moved.target.execute("create table stays (id int primary key); create table goes (id int primary key)").await;
    // Given a run that planned both tables and began with one that is dropped then.
    let (walsender, _cut) = moved.first_cut().await;
    walsender.close().await;
    let names = ["stays", "goes"].map(|name| (QualifiedName::new("public", name), 0));
    let store = &moved.context.store;
    store.plan_tables(&names).await.unwrap();
    store.report_copying(&[(names[1].0.clone(), 1, 1)]).await.unwrap();
    moved.target.execute("insert into goes values (1)").await;
    moved.source.execute("drop table goes").await;
    // When the next one copies under another cut, then nothing is left to copy, and what the dead run left is gone.
    let (walsender, cut) = moved.another_cut().await;
    assert_eq!(copy::run(&moved.context, walsender, &cut).await.unwrap(), Outcome::Complete);
    let tables = store.tables().await.unwrap();
    assert!(
        tables.iter().all(|table| table.state == TableState::Copied && table.cut_lsn == Some(cut.lsn)),
        "{tables:?}"
    );
    assert!(moved.target.query_strings("select id from goes").await.is_empty());
    assert_eq!(moved.target.query_strings("select id from stays").await, ["1"]);
}
