//! A schema arrives complete: after every step, `pg_dump --schema-only` prints the same on both sides. What cannot be the
//! same is taken out of the comparison in one place, [`comparable`], each with its reason.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use pgtandem::config::{MoveName, Scope, TablePattern};
use pgtandem::postgres::{Ambient, ConnInfo, Lsn, Server, Side, catalog};
use pgtandem::schema::{
    Archive, DataArchive, DumpRequest, Listeners, Loading, Programs, Restorer, can_set_replica_role, dump,
};
use pgtandem::state::Store;
use pgtandem::telemetry::Telemetry;

use crate::harness::{Cluster, Database, PASSWORD, client_program};

mod rights;

const CHINOOK: &str = include_str!("../schemas/chinook.sql");
const PAGILA: &str = include_str!("../schemas/pagila.sql");
const ROLES: &str = "CREATE ROLE shop_owner; CREATE ROLE shop_reader; CREATE ROLE \"Shop Clerk\";
                     CREATE ROLE rental_owner; CREATE ROLE rental_staff;";
const TWO: NonZeroUsize = NonZeroUsize::new(2).unwrap();

/// Two servers, the source loaded with a schema and rows.
struct Sides {
    clusters: (Cluster, Cluster),
    databases: (Database, Database),
    source: Server,
    target: Server,
    store: Store,
    programs: Programs,
    telemetry: Telemetry,
    scope: Scope,
}

impl Sides {
    async fn with(sql: &str) -> Self {
        let clusters = Cluster::pair().await;
        for cluster in [&clusters.0, &clusters.1] {
            cluster.execute(ROLES).await;
        }
        let databases = (clusters.0.create_database("app").await, clusters.1.create_database("app").await);
        databases.0.execute(sql).await;
        let (source, target) = (server(Side::Source, &databases.0), server(Side::Target, &databases.1));
        let store = Store::new(target.clone(), MoveName::new("app").unwrap());
        store.install(&serde_json::json!({})).await.unwrap();
        let majors = (u32::from(clusters.0.version()), u32::from(clusters.1.version()));
        let programs = Programs::find(majors.0, majors.1).await.unwrap();
        let (telemetry, scope) = (Telemetry::default(), Scope::default());
        Self { clusters, databases, source, target, store, programs, telemetry, scope }
    }

    fn request<'a>(&'a self, snapshot: Option<&'a str>) -> DumpRequest<'a> {
        DumpRequest { source: &self.source, programs: &self.programs, scope: &self.scope, snapshot }
    }

    fn restorer<'a>(&'a self, archive: &'a Archive) -> Restorer<'a> {
        let Self { target, store, programs, telemetry, .. } = self;
        Restorer { target, store, programs, archive, telemetry }
    }

    async fn copy_rows(&self) {
        let folder = tempfile::tempdir().unwrap();
        let tables = self.tables().await;
        let sizes: Vec<_> = tables.iter().map(|table| (table.name.clone(), table.bytes)).collect();
        self.store.plan_tables(&sizes).await.unwrap();
        let session = self.source.connect("copy").await.unwrap();
        session.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await.unwrap();
        let snapshot: String = session.query_one("SELECT pg_export_snapshot()", &[]).await.unwrap().get(0);
        let cut = Lsn::new(42);
        let mut archive = DataArchive::open(folder.path(), self.store.name(), "here").unwrap();
        let listeners = Listeners { telemetry: &self.telemetry, store: &self.store };
        archive.dump(self.request(Some(&snapshot)), cut, &tables, TWO, listeners).await.unwrap();
        let archive = DataArchive::open(folder.path(), self.store.name(), "here").unwrap();
        assert_eq!(archive.cut().unwrap(), Some(cut));
        let Self { target, store, programs, telemetry, .. } = self;
        let loading = Loading { target, store, programs, telemetry, epoch: 0, workers: TWO };
        archive.restore(loading).await.unwrap();
        // As a death between the rows and the word that they are copied leaves it.
        self.databases.1.execute("UPDATE pgtandem.copy_table SET state = 'copying', cut_lsn = NULL").await;
        archive.restore(loading).await.unwrap();
        let copied = self.store.tables().await.unwrap();
        assert_eq!(copied.len(), tables.len());
        assert!(copied.iter().all(|table| table.cut_lsn == Some(cut)));
    }

    /// The steps of a move up to following, once each.
    async fn arrive_without_foreign_keys<'s>(&'s self, archive: &'s Archive) -> Restorer<'s> {
        let restorer = self.restorer(archive);
        restorer.before_data(TWO).await.unwrap();
        self.copy_rows().await;
        restorer.after_data(TWO).await.unwrap();
        restorer.hold_back().await.unwrap();
        restorer
    }

    /// What a cutover that is given up does to the target.
    async fn cut_over_in_vain(&self) {
        let id = self.store.begin_cutover(None, 0).await.unwrap();
        let (lock, deadline) = (Duration::from_secs(5), Instant::now() + Duration::from_secs(60));
        let release = async || self.store.release_in_cutover(id, 0, lock, deadline).await;
        // A release can be repeated, and adds no foreign key twice.
        release().await.unwrap();
        release().await.unwrap();
        self.store.abort_cutover(id, 0, &serde_json::json!({"code": "test"})).await.unwrap();
        // One that was delivered late changes nothing.
        assert_eq!(release().await.unwrap_err().code(), "leadership_lost");
    }

    async fn tables(&self) -> Vec<catalog::Table> {
        let session = self.source.connect("copy").await.unwrap();
        catalog::tables_in_scope(&*session, &self.scope).await.unwrap()
    }

    /// Both schemas as pg_dump of the newer server prints them.
    fn schemas(&self) -> (String, String) {
        let version = [15, 16, 18]
            .into_iter()
            .find(|&version| version >= self.clusters.0.version().max(self.clusters.1.version()));
        let dump = |database: &Database| {
            let output = std::process::Command::new(client_program(version.unwrap(), "pg_dump"))
                .args(["--schema-only", "--exclude-schema=pgtandem", "--dbname", &database.url()])
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            comparable(&String::from_utf8(output.stdout).unwrap())
        };
        (dump(&self.databases.0), dump(&self.databases.1))
    }
}

fn server(side: Side, database: &Database) -> Server {
    let conninfo = ConnInfo::parse(&database.url(), &Ambient::default()).unwrap();
    Server::new(side, conninfo, "app").unwrap()
}

/// Without what cannot be the same:
/// - pg_dump's comments and its random `\restrict` keys;
/// - publications, which never travel;
/// - the owner of the schema `public` where it is the one that every server is born with: a superuser before 15, else
///   `pg_database_owner`;
/// - multirange types, which versions before 14 do not have;
/// - qualified columns in the text of views, which versions from 16 on print only where they are needed.
fn comparable(dump: &str) -> String {
    let unsaid = |line: &&str| {
        let noise = line.is_empty() || line.starts_with("--") || line.starts_with('\\');
        noise
            || line.contains(" PUBLICATION ")
            || ["postgres;", "pg_database_owner;"]
                .iter()
                .any(|owner| line.strip_prefix("ALTER SCHEMA public OWNER TO ") == Some(owner))
            || line.contains("multirange_type_name")
    };
    let lines = dump.lines().filter(|line| !unsaid(line));
    lines
        .map(|line| if line.starts_with(' ') { unqualified(line) } else { line.to_owned() })
        .collect::<Vec<_>>()
        .join("\n")
}

/// `rental.store,` is `store`.
fn unqualified(line: &str) -> String {
    let words = line.trim_end_matches(',').split_inclusive(|c: char| !(c.is_alphanumeric() || c == '_'));
    words.filter(|word| !word.ends_with('.')).collect()
}

fn assert_equal(source: &str, target: &str) {
    let missing: Vec<_> = source.lines().filter(|line| !target.lines().any(|other| other == *line)).collect();
    let surplus: Vec<_> = target.lines().filter(|line| !source.lines().any(|other| other == *line)).collect();
    assert!(missing.is_empty() && surplus.is_empty(), "missing:\n{missing:#?}\nsurplus:\n{surplus:#?}");
    assert_eq!(source, target);
}

/// Every step of a move but the changes, each run twice.
async fn moves_whole(sql: &str) {
    let sides = Sides::with(sql).await;
    let archive = dump(sides.request(None)).await.unwrap();
    let restorer = sides.restorer(&archive);
    assert!(!restorer.is_restored().await.unwrap());
    restorer.before_data(TWO).await.unwrap();
    assert!(restorer.is_restored().await.unwrap());
    sides.copy_rows().await;
    for _ in 0..2 {
        restorer.after_data(TWO).await.unwrap();
        restorer.hold_back().await.unwrap();
        restorer.refresh_materialized_views().await.unwrap();
        restorer.foreign_keys(TWO).await.unwrap();
    }
    let enabled = "SELECT (SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal AND tgenabled <> 'D')
                          + (SELECT count(*) FROM pg_event_trigger WHERE evtenabled <> 'D')
                          + (SELECT count(*) FROM pg_rewrite r JOIN pg_class c ON c.oid = ev_class
                             WHERE relkind = 'r' AND ev_enabled <> 'D')";
    assert_eq!(sides.databases.1.query_string(enabled).await, "0");
    sides.cut_over_in_vain().await;
    assert_eq!(sides.databases.1.query_string(enabled).await, "0");
    sides.store.release_held_back().await.unwrap();

    let (source, target) = sides.schemas();
    assert_equal(&source, &target);
    sides.store.remove().await.unwrap();
    let differ = crate::harness::differences(&sides.databases.0, &sides.databases.1).await;
    // Sequences take their values at the cutover.
    let rows: Vec<_> = differ.iter().filter(|line| !line.contains("sequence")).collect();
    assert!(rows.is_empty(), "{rows:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_music_shop_arrives_complete() {
    moves_whole(CHINOOK).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_film_rental_arrives_complete() {
    moves_whole(PAGILA).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_keys_can_wait_for_the_cutover() {
    let sides = Sides::with(PAGILA).await;
    let archive = dump(sides.request(None)).await.unwrap();
    sides.arrive_without_foreign_keys(&archive).await;
    let session = sides.target.connect("test").await.unwrap();
    let keys = archive.foreign_keys().held_back(&session).await.unwrap();
    sides.store.hold_back(&keys).await.unwrap();
    // A cutover that is given up takes them away again.
    sides.cut_over_in_vain().await;
    let present = "SELECT count(*) FROM pg_constraint
                   WHERE contype = 'f' AND connamespace <> 'pgtandem'::regnamespace";
    assert_eq!(sides.databases.1.query_string(present).await, "0");
    sides.store.release_held_back().await.unwrap();
    let unchecked = "SELECT count(*) > 0 FROM pg_constraint WHERE contype = 'f' AND NOT convalidated";
    assert_eq!(sides.databases.1.query_string(unchecked).await, "t");
    archive.foreign_keys().validate(&sides.target, &sides.store).await;
    let (source, target) = sides.schemas();
    assert_equal(&source, &target);
}

/// Enough tables that several sessions share them, and what must come before or after them.
const MANY: &str = "
    create type mood as enum ('sad', 'happy');
    create schema other authorization shop_owner;
    create function fifth() returns int language sql immutable as 'select 5';
    do $$ begin
        for i in 1..260 loop
            execute format('create table plain%s (id bigserial primary key, name text not null default ''it''''s'')', i);
            execute format('comment on table plain%s is ''number %s''', i, i);
            execute format('create table other.t%s (id int default public.fifth(), m public.mood)', i);
            execute format('create table child%s () inherits (plain%s)', i, i);
        end loop;
        for i in 1..20 loop
            execute format('create table other.theirs%s (id int); alter table other.theirs%s owner to shop_owner', i, i);
        end loop;
    end $$;
    create view other.sum_of as select count(*) from plain1 join other.t1 using (id);
    create table parted (id int, at int) partition by list (at);
    create table part1 partition of parted for values in (1);
    grant select on plain3 to shop_reader;";

/// All of the schema but what waits for rows.
async fn arrives(sides: &Sides, restorer: &Restorer<'_>) {
    restorer.before_data(TWO).await.unwrap();
    assert!(restorer.is_restored().await.unwrap());
    restorer.after_data(TWO).await.unwrap();
    let (source, target) = sides.schemas();
    assert_equal(&source, &target);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_tables_are_made_in_several_sessions_and_come_out_the_same() {
    let sides = Sides::with(MANY).await;
    let archive = dump(sides.request(None)).await.unwrap();
    let restorer = sides.restorer(&archive);
    arrives(&sides, &restorer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_tables_of_which_one_is_refused_come_once_that_is_settled() {
    let sides = Sides::with(MANY).await;
    sides.clusters.1.execute("drop role shop_owner").await;
    let archive = dump(sides.request(None)).await.unwrap();
    let restorer = sides.restorer(&archive);
    let error = restorer.before_data(TWO).await.unwrap_err();
    assert_eq!(error.code(), "role_missing", "{error}");
    assert!(!restorer.is_restored().await.unwrap());
    sides.clusters.1.execute("create role shop_owner").await;
    arrives(&sides, &restorer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_role_stops_with_nothing_restored() {
    let sides = Sides::with(CHINOOK).await;
    sides.clusters.1.execute("DROP ROLE shop_owner").await;
    let archive = dump(sides.request(None)).await.unwrap();
    let error = sides.restorer(&archive).before_data(TWO).await.unwrap_err();
    assert_eq!(error.code(), "role_missing", "{error}");
    assert!(error.hint_text().unwrap().contains("CREATE ROLE \"shop_owner\" NOLOGIN;"));
    assert_eq!(sides.databases.1.query_string("SELECT to_regnamespace('shop') IS NULL").await, "t");
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_out_of_scope_stay_behind_with_what_needs_them() {
    let mut sides = Sides::with(CHINOOK).await;
    sides.scope.exclude = vec![TablePattern::new("shop.invoice*").unwrap()];
    let archive = dump(sides.request(None)).await.unwrap();
    let restorer = sides.arrive_without_foreign_keys(&archive).await;
    restorer.foreign_keys(TWO).await.unwrap();
    assert!(archive.left_out().iter().any(|what| what.contains("letzte Rechnung")), "{:?}", archive.left_out());
    let there = "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class
                 WHERE relnamespace = 'shop'::regnamespace AND relkind IN ('r', 'v')";
    assert_eq!(sides.databases.1.query_string(there).await, "Kunde & Straße album artist employee keyed refund");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_role_may_set_is_tried() {
    let sides = Sides::with("").await;
    let (target, database) = (&sides.clusters.1, &sides.databases.1);
    target.execute(&format!("CREATE ROLE mover LOGIN PASSWORD '{PASSWORD}'")).await;
    let probe = async |database: &Database| {
        can_set_replica_role(&server(Side::Target, database).connect("probe").await.unwrap()).await.unwrap()
    };
    assert!(probe(database).await, "a superuser");
    assert!(!probe(&database.with_user("mover", PASSWORD)).await, "a role like any other");
    if target.version() >= 15 {
        target.execute("GRANT SET ON PARAMETER session_replication_role TO mover").await;
        assert!(probe(&database.with_user("mover", PASSWORD)).await, "a role that was granted it");
    }
}
