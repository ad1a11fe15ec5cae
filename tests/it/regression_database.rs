//! PostgreSQL's own regression database moves: all kinds of objects that its developers thought of, in one database.
//!
//!     scripts/regression-database.sh
//!     cargo test --test it regression_database -- --ignored --nocapture
//!
//! What does not arrive was named by `check`, or could not be loaded into the source in the first place.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgtandem::postgres::quote_literal;
use serde_json::Value;

use crate::harness::{Cluster, Database, Pgtandem, Running, client_program, differences, wait_until};

/// A busy machine takes its time for 680 tables.
const LONG: Duration = Duration::from_secs(600);

/// What the provided servers cannot have, since they were built without lz4.
const NEEDS_LZ4: [&str; 7] = ["lz4", "cmdata", "cmdata1", "cmdata2", "cmpart", "cmpart2", "compressmv"];

/// What `check` says of this database wherever it goes, and of servers like those of the tests.
const ALWAYS_NAMED: [&str; 12] = [
    "client_programs",
    "foreign_tables",
    "inheritance",
    "insert_only",
    "large_objects",
    "local_identifiers",
    "materialized_views",
    "publications",
    "table_without_columns",
    "target_disk_unseen",
    "unlogged_tables",
    "wal_unlimited",
];

/// Changes of every table that can have them: inserts into those that `check` says have no identity, UNKEYED, updates and
/// deletes of the others. As on a replica, so that neither a rule nor a trigger changes something else beside; what a table refuses is passed over.
const CHANGES: &str = r"
    set session_replication_role = replica;
    do $$
    declare t record; changed int := 0;
    begin
        for t in
            select format('%I.%I', n.nspname, c.relname) as name,
                   n.nspname || '.' || c.relname <> all (array[UNKEYED]) as keyed,
                   exists (select from pg_constraint f where f.confrelid = c.oid) as referenced,
                   (select format('%I', attname) from pg_attribute a
                    where a.attrelid = c.oid and attnum > 0 and not attisdropped and attgenerated = '' and attidentity <> 'a'
                    order by attnum desc limit 1) as last
            from pg_class c join pg_namespace n on n.oid = c.relnamespace
            where c.relkind = 'r' and c.relpersistence = 'p' and n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
            order by 1
        loop
            begin
                if t.keyed then
                    execute format('update only %1$s set %2$s = %2$s where ctid = any (array(select ctid from only %1$s limit 20))', t.name, t.last);
                    if not t.referenced then
                        execute format('delete from only %1$s where ctid = any (array(select ctid from only %1$s limit 2))', t.name);
                    end if;
                else
                    execute format('insert into %1$s select * from only %1$s limit 10', t.name);
                end if;
                changed := changed + 1;
            exception when others then null;
            end;
        end loop;
        if changed < 300 then raise 'only % tables were changed', changed; end if;
    end $$";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes, and needs scripts/regression-database.sh"]
async fn the_regression_database_moves_to_its_own_version() {
    let mover = Mover::new(15).await;

    let named = mover.check().await;

    assert_eq!(codes(&named), BTreeSet::from(ALWAYS_NAMED), "{named:#?}");
    mover.move_it(&named).await;
    // Every definition is there too, whatever kind of object it is.
    let (ours, theirs) = (definitions(&mover.source).await, definitions(&mover.target).await);
    let missing: Vec<_> = ours.difference(&theirs).collect();
    let added: Vec<_> = theirs.difference(&ours).collect();
    assert!(missing.is_empty() && added.is_empty(), "missing on the target: {missing:#?}\nonly there: {added:#?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes, and needs scripts/regression-database.sh"]
async fn the_regression_database_moves_to_18() {
    let mover = Mover::new(18).await;

    let named = mover.check().await;

    // The functions in C were built for 15, and two tables have what newer versions refuse. The fixes that are printed mend it.
    let mut expected = BTreeSet::from(ALWAYS_NAMED);
    expected.extend(["library_refused", "generated_in_child"]);
    assert_eq!(codes(&named), expected, "{named:#?}");
    assert_eq!(objects(&named, "generated_in_child"), ["public.gtest_normal_child.b", "public.gtest_normal_child2.b"]);
    for finding in named.iter().filter(|finding| finding["severity"] == "blocking") {
        let fix = finding["fix"].as_str().expect("a fix");
        let statements: Vec<&str> = fix.lines().filter(|line| line.ends_with(';')).collect();
        mover.source.execute(&statements.join("\n")).await;
    }
    let named = mover.check().await;
    assert_eq!(codes(&named), BTreeSet::from(ALWAYS_NAMED), "{named:#?}");
    mover.move_it(&named).await;
}

/// The database on a source of 15, and an empty one on a target.
struct Mover {
    source: Database,
    target: Database,
    program: Pgtandem,
    _servers: [Cluster; 2],
}

impl Mover {
    async fn new(version: u16) -> Self {
        let start = |version| Cluster::builder(version).set("max_locks_per_transaction", "256").start();
        let (from, to) = tokio::join!(start(15), start(version));
        let (source, target) = (from.create_database("regression").await, to.create_database("regression").await);
        load(&source).await;
        let program = Pgtandem::new(&source, &target, "regression").clients(&[18, 16]);
        Self { source, target, program, _servers: [from, to] }
    }

    /// All that `check` finds.
    async fn check(&self) -> Vec<Value> {
        let checked = self.program.spawn(&["check", "--json"]).wait(LONG).await;
        let report: Value = serde_json::from_str(&checked.stdout).unwrap_or_else(|error| panic!("{error}: {checked}"));
        report["findings"].as_array().expect("findings").clone()
    }

    /// The whole move, with changes while it follows; then both sides are the same but for what was named.
    async fn move_it(&self, named: &[Value]) {
        let mut daemon = self.program.spawn(&["run"]);
        daemon.wait_for_log("entering phase follow", LONG).await;
        let unkeyed: Vec<String> = objects(named, "insert_only").into_iter().map(quote_literal).collect();
        let changes = CHANGES.replace("UNKEYED", &unkeyed.join(", "));
        self.source.execute(&changes).await;
        self.ready(&mut daemon).await;
        self.source.execute(&changes).await;
        let done = self.program.spawn(&["cutover", "--timeout", "5m"]).wait(LONG).await;
        assert_eq!(done.code, Some(0), "{done}\n{}", daemon.stderr());
        let ended = daemon.wait(LONG).await;
        assert_eq!(ended.code, Some(0), "{ended}");
        self.same(named).await;
    }

    async fn ready(&self, daemon: &mut Running) {
        wait_until("the move is ready", LONG, async || {
            let status = self.program.spawn(&["status", "--json"]).wait(LONG).await.stdout;
            assert!(daemon.is_running() && !status.contains("unkeyed_changed"), "{status}\n{}", daemon.stderr());
            status.contains("\"ready\":true")
        })
        .await;
    }

    async fn same(&self, named: &[Value]) {
        let unlogged = objects(named, "unlogged_tables");
        let unexplained: Vec<String> = differences(&self.source, &self.target)
            .await
            .into_iter()
            .filter(|line| !unlogged.iter().any(|table| line.starts_with(&format!("table {table}:"))))
            .collect();
        assert!(unexplained.is_empty(), "source and target differ:\n{}", unexplained.join("\n"));
    }
}

fn codes(findings: &[Value]) -> BTreeSet<&str> {
    findings.iter().filter_map(|finding| finding["code"].as_str()).collect()
}

fn objects<'a>(findings: &'a [Value], code: &str) -> Vec<&'a str> {
    let of = findings.iter().filter(|finding| finding["code"] == code);
    of.flat_map(|finding| finding["objects"].as_array().expect("objects")).filter_map(Value::as_str).collect()
}

/// Restores the dump; nothing may fail but what the servers of the tests cannot have.
async fn load(database: &Database) {
    let dump = provided("regression.dump");
    let output = tokio::process::Command::new(client_program(16, "pg_restore"))
        .arg("--dbname")
        .arg(database.url())
        .arg(dump)
        .output()
        .await
        .expect("start pg_restore");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let unexplained: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("ERROR:") && !NEEDS_LZ4.iter().any(|name| line.contains(name)))
        .collect();
    assert!(unexplained.is_empty(), "the dump cannot be loaded: {unexplained:#?}");
    let tables = "select count(*) > 600 from pg_class where relkind in ('r', 'p')";
    assert_eq!(database.query_string(tables).await, "t", "{said}");
}

/// All lines that pg_dump writes for the schema, but for the publications, which `check` named, and the fence, which stays up
/// on the source after a cutover.
async fn definitions(database: &Database) -> BTreeSet<String> {
    let output = tokio::process::Command::new(client_program(16, "pg_dump"))
        .args(["--schema-only", "--no-publications", "--exclude-schema=pgtandem", "--dbname"])
        .arg(database.url())
        .output()
        .await
        .expect("start pg_dump");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let is_said = |line: &&str| {
        !line.is_empty() && !line.starts_with("--") && !line.starts_with('\\') && !line.contains("pgtandem_regression")
    };
    text.lines().filter(is_said).map(str::to_owned).collect()
}

fn provided(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".provision/regression").join(name);
    assert!(path.exists(), "{} is missing: run scripts/regression-database.sh", path.display());
    path
}
