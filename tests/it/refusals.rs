//! Everything that a user can get wrong: a clear word, the exit code of the contract, nothing changed, no secret told.

use std::path::Path;

use crate::harness::{
    Cluster, Database, Finished, PASSWORD, PATIENCE, Pgtandem, TlsFiles, assert_same, client_program,
    versions_under_test, wait_until,
};

/// Exit codes of the contract.
const NO: i32 = 1;
const USAGE: i32 = 2;
const REFUSED: i32 = 3;

const CONTENT: &str = "create table account (id int generated always as identity primary key, owner text);
    create table entry (id int primary key, account int references account);
    create function nothing() returns trigger language plpgsql as 'begin return new; end';
    create trigger own before insert on account for each row execute function nothing();
    insert into account (owner) select 'somebody' from generate_series(1, 100);
    insert into entry select i, i from generate_series(1, 100) i;
    create publication theirs for table account";

#[tokio::test]
async fn a_server_that_cannot_be_reached_is_named_and_left_alone() {
    let sides = Sides::start().await;
    let (from, to) = (&sides.from, &sides.to);
    let url = from.url();
    let port = url.rsplit(':').next().unwrap().split('/').next().unwrap().to_owned();
    let strangers = tempfile::tempdir().unwrap();
    let stranger = TlsFiles::create(&strangers.path().join("tls")).ca.display().to_string();
    let secure = Cluster::builder(versions_under_test().0).tls().start().await;
    let secure_url = secure.url("postgres", "postgres");
    let unknown_authority =
        format!("{}?sslmode=verify-full&sslrootcert={stranger}", secure_url.split('?').next().unwrap());

    sides
        .refused("wrong password", &from.with_user("postgres", "wrong secret").url(), REFUSED, &["28P01", "password"])
        .await;
    sides.refused("unknown role", &from.with_user("nobody_at_all", PASSWORD).url(), REFUSED, &["28P01"]).await;
    sides
        .refused("wrong host", &url.replace("127.0.0.1", "no-such-host.invalid"), REFUSED, &["no-such-host.invalid"])
        .await;
    sides.refused("refused port", &url.replace(&port, "1"), REFUSED, &["127.0.0.1", "refused"]).await;
    sides.refused("unknown database", &url.replace("/app", "/no_such_db"), REFUSED, &["3D000", "no_such_db"]).await;
    sides.refused("no TLS there", &format!("{url}?sslmode=require"), REFUSED, &["TLS"]).await;
    sides.refused("unknown authority", &unknown_authority, REFUSED, &["certificate"]).await;
    // The other side, too.
    let wrong = to.with_user("postgres", "wrong secret");
    sides
        .refused_by(&Pgtandem::new(from, &wrong, "app"), "wrong password of the target", REFUSED, &["28P01", "target"])
        .await;
}

#[tokio::test]
async fn what_blocks_a_move_ends_it_before_it_begins() {
    let mut sides = Sides::start().await;
    for (slots, senders, level, code) in [
        ("10", "10", "replica", "wal_level"),
        ("1", "10", "logical", "no_slot_free"),
        ("10", "0", "logical", "no_walsender_free"),
    ] {
        for (name, value) in [("max_replication_slots", slots), ("max_wal_senders", senders), ("wal_level", level)] {
            sides.source.set(name, value);
        }
        sides.source.restart().await;
        if code == "no_slot_free" {
            sides.from.execute("select pg_create_physical_replication_slot('theirs')").await;
        }
        sides.refused(code, &sides.from.url(), NO, &[code]).await;
        if code == "no_slot_free" {
            sides.from.execute("select pg_drop_replication_slot('theirs')").await;
        }
    }
    sides.source.set("max_wal_senders", "10");
    sides.source.restart().await;
    let (from, to) = (sides.from.clone(), sides.to.clone());

    let weak = format!("create role weak login password '{PASSWORD}'");
    sides.source.execute(&weak).await;
    sides.target.execute(&weak).await;
    let weak_from = from.with_user("weak", PASSWORD);
    sides.refused("no REPLICATION", &weak_from.url(), NO, &["no_replication_right", "REPLICATION"]).await;
    let weak_to = Pgtandem::new(&from, &to.with_user("weak", PASSWORD), "app");
    sides.refused_by(&weak_to, "no CREATE", NO, &["target_no_create", "GRANT CREATE ON DATABASE"]).await;

    let itself = Pgtandem::new(&from, &from, "app");
    sides.refused_by(&itself, "target is source", NO, &["same_server"]).await;
    let alias = itself.env("PGTANDEM_TARGET_URL", from.url().replace("127.0.0.1", "localhost"));
    sides.refused_by(&alias, "target is source by another name", NO, &["same_server"]).await;

    to.execute("create table in_the_way (id int)").await;
    sides.refused("target full", &from.url(), NO, &["target_not_empty", "public.in_the_way"]).await;
}

#[tokio::test]
async fn a_wrong_configuration_is_refused_before_anything_is_connected() {
    let folder = tempfile::tempdir().unwrap();
    let garbage = folder.path().join("garbage.toml");
    std::fs::write(&garbage, [0xff, 0xfe, 0, 1, 2, b'=', 0x80]).unwrap();
    let missing = folder.path().join("missing.toml");
    let url = format!("postgresql://app:{}@127.0.0.1:1/app", PASSWORD.replace(' ', "%20"));
    let plain = Pgtandem::nowhere().env("PGTANDEM_SOURCE_URL", &url).env("PGTANDEM_TARGET_URL", &url);
    let file = |path: &Path| vec!["-c".to_owned(), path.display().to_string()];

    for (what, pgtandem, arguments, needles) in [
        ("unknown key", plain.clone().config("[cutover]\nmax_lagg = \"1s\""), vec![], vec!["max_lagg", "max_lag"]),
        ("unknown section", plain.clone().config("[copyy]\nworkers = 1"), vec![], vec!["copyy", "copy"]),
        ("out of range", plain.clone().config("[copy]\nworkers = 0"), vec![], vec!["copy.workers", "0"]),
        ("wrong type", plain.clone().config("[copy]\nworkers = \"many\""), vec![], vec!["copy.workers"]),
        ("not TOML", plain.clone().config(&format!("[source]\nurl = \"{url}")), vec![], vec!["pgtandem.toml"]),
        ("a folder", plain.clone(), file(folder.path()), vec!["directory"]),
        ("garbage", plain.clone(), file(&garbage), vec!["garbage.toml"]),
        ("missing", plain.clone(), file(&missing), vec!["missing.toml"]),
        ("unknown variable", plain.clone().env("PGTANDEM_COPY_WORKRES", "4"), vec![], vec!["PGTANDEM_COPY_WORKRES"]),
        ("wrong variable", plain.clone().env("PGTANDEM_COPY_WORKERS", "four"), vec![], vec!["copy.workers"]),
        ("wrong name", plain.clone().env("PGTANDEM_MOVE_NAME", "No Name"), vec![], vec!["move.name", "No Name"]),
        ("no URL", Pgtandem::nowhere(), vec![], vec!["source.url"]),
        (
            "another scheme",
            plain.clone().env("PGTANDEM_SOURCE_URL", url.replace("postgresql", "mysql")),
            vec![],
            vec!["source.url"],
        ),
        (
            "wrong port",
            plain.clone().env("PGTANDEM_TARGET_URL", url.replace(":1/", ":99999/")),
            vec![],
            vec!["target.url", "65535"],
        ),
        (
            "unknown parameter",
            plain.clone().env("PGTANDEM_TARGET_URL", format!("{url}?sslmod=require")),
            vec![],
            vec!["target.url", "sslmod"],
        ),
        (
            "broken escape",
            plain.clone().env("PGTANDEM_SOURCE_URL", url.replace("%20", "%2")),
            vec![],
            vec!["source.url"],
        ),
        (
            "open quote",
            plain.clone().env("PGTANDEM_SOURCE_URL", format!("host=a password='{PASSWORD}")),
            vec![],
            vec!["source.url"],
        ),
        (
            "no authority",
            plain.clone().env("PGTANDEM_SOURCE_URL", format!("{url}?sslmode=verify-full&sslrootcert=/no/such.pem")),
            vec![],
            vec!["/no/such.pem"],
        ),
        ("unknown flag", plain.clone(), vec!["--sourc".to_owned(), url.clone()], vec!["--sourc"]),
    ] {
        for command in ["check", "run"] {
            let mut given = vec![command];
            given.extend(arguments.iter().map(String::as_str));
            let done = pgtandem.run(&given).await;
            assert_eq!(done.code, Some(USAGE), "{what}: {done}");
            for needle in &needles {
                assert!(done.stderr.contains(needle), "{what}: {needle:?} is not said: {done}");
            }
            assert_secret_kept(what, &done);
        }
    }
}

#[tokio::test]
async fn commands_answer_where_no_move_is() {
    let sides = Sides::start().await;
    let before = sides.fingerprint().await;
    let pgtandem = Pgtandem::new(&sides.from, &sides.to, "app");
    for (arguments, code, needle) in [
        (&["status"][..], 0, "knows nothing of this move"),
        (&["cutover"], NO, "pgtandem run"),
        (&["cutover", "--dry-run", "--json"], NO, "no_move"),
        (&["clean"], 0, "nothing of the move app is there"),
        (&["clean", "--yes"], 0, "nothing of the move app is there"),
        (&["verify"], USAGE, "not available"),
        (&["rollback"], USAGE, "not available"),
    ] {
        let done = pgtandem.run(arguments).await;
        assert_eq!(done.code, Some(code), "{done}");
        let said = format!("{}{}", done.stdout, done.stderr);
        assert!(said.contains(needle), "{needle:?} is not said: {done}");
        assert_secret_kept("no move", &done);
    }
    let status = pgtandem.run(&["status", "--json"]).await;
    let document: serde_json::Value = serde_json::from_str(&status.stdout).unwrap_or_else(|e| panic!("{e}: {status}"));
    assert_eq!(document["name"], "app");
    let nowhere = pgtandem.env("PGTANDEM_TARGET_URL", "postgresql://app@127.0.0.1:1/app");
    for arguments in [&["status"][..], &["cutover"], &["clean", "--yes"]] {
        let done = nowhere.run(arguments).await;
        assert_eq!(done.code, Some(REFUSED), "{done}");
    }
    assert_eq!(sides.fingerprint().await, before);
}

#[tokio::test]
async fn clean_removes_what_a_move_made_and_only_that() {
    let sides = Sides::start().await;
    let (from, to) = (&sides.from, &sides.to);
    let before = sides.fingerprint().await;
    let pgtandem = Pgtandem::new(from, to, "app");
    let mut daemon = pgtandem.spawn(&["run", "--log-level", "trace"]);
    daemon.wait_for_log("entering phase follow", PATIENCE).await;
    assert_eq!(pgtandem.run(&["clean", "--yes"]).await.code, Some(NO), "a daemon runs");
    // A cutover that cannot close its fence leaves the fence's triggers.
    let writer = from.connect().await;
    writer.batch_execute("begin; insert into account (owner) values ('still writing')").await.unwrap();
    let refused = pgtandem.run(&["cutover", "--timeout", "3s"]).await;
    assert_eq!(refused.code, Some(NO), "{refused}");
    writer.batch_execute("commit").await.unwrap();
    daemon.terminate();
    let stopped = daemon.wait(PATIENCE).await;
    assert_eq!(stopped.code, Some(0), "{stopped}");
    assert_secret_kept("the daemon", &stopped);
    assert_ne!(sides.fingerprint().await.source, before.source);
    let made = dump(to, sides.target.version(), &["--exclude-schema=pgtandem"]).await;

    let cleaned = pgtandem.run(&["clean", "--yes"]).await;

    assert_eq!(cleaned.code, Some(0), "{cleaned}");
    let after = sides.fingerprint().await;
    assert_eq!(after.source, before.source);
    assert_eq!(after.rest, before.rest);
    // What waited for the cutover is in force again; nothing else is touched.
    let released = made
        .replace("GENERATED BY DEFAULT", "GENERATED ALWAYS")
        .replace("ALTER TABLE public.account DISABLE TRIGGER own;", "");
    assert_ne!(released, made, "nothing was held back");
    let statements = |dump: &str| dump.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(statements(&after.target), statements(&released), "clean touched what is not its own");

    to.execute("drop schema public cascade; create schema public; drop publication if exists theirs").await;
    let moved = pgtandem.run(&["run", "--cutover-when-ready"]).await;
    assert_eq!(moved.code, Some(0), "{moved}");
    assert_same(from, to).await;
    let sealed = from.connect().await.batch_execute("insert into account (owner) values ('too late')").await;
    assert!(sealed.is_err(), "the source takes writes after the switch");
    assert_eq!(pgtandem.run(&["clean", "--yes"]).await.code, Some(0));
    assert_eq!(sides.fingerprint().await.source, before.source);
    from.execute("insert into account (owner) values ('again')").await;
}

/// The password of a server in the arguments of a child would be there for everyone to read.
#[tokio::test]
async fn no_child_is_told_a_password_by_its_arguments() {
    let sides = Sides::start().await;
    // So many tables that pg_dump lives long enough to be looked at.
    let tables =
        (0..400).map(|n| format!("create table t{n} (id int primary key, v text unique);")).collect::<String>();
    sides.from.execute(&tables).await;
    let mut daemon = Pgtandem::new(&sides.from, &sides.to, "app").spawn(&["run", "--until", "copy"]);
    let mut seen = Vec::new();
    wait_until("the copy is complete", PATIENCE, async || {
        seen.extend(arguments_of_children(daemon.id()));
        !daemon.is_running()
    })
    .await;
    let done = daemon.wait(PATIENCE).await;
    assert_eq!(done.code, Some(0), "{done}");
    assert!(seen.iter().any(|line| line.contains("pg_dump")), "pg_dump was never seen");
    assert!(!seen.iter().any(|line| line.contains("secret")), "{seen:?}");
}

fn arguments_of_children(parent: u32) -> Vec<String> {
    let children = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
    let lists = children.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let ids: Vec<String> =
        lists.flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).collect();
    let read = |id: &String| std::fs::read(format!("/proc/{id}/cmdline")).ok();
    ids.iter().filter_map(read).map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).collect()
}

/// A source with content and an empty target.
struct Sides {
    source: Cluster,
    target: Cluster,
    from: Database,
    to: Database,
}

/// What must not change: both schemas, and slots and roles of both servers.
#[derive(Debug, PartialEq, Eq)]
struct Fingerprint {
    source: String,
    target: String,
    rest: Vec<String>,
}

impl Sides {
    async fn start() -> Self {
        let (source, target) = Cluster::pair().await;
        let (from, to) = (source.create_database("app").await, target.create_database("app").await);
        from.execute(CONTENT).await;
        Self { source, target, from, to }
    }

    async fn fingerprint(&self) -> Fingerprint {
        let mut rest = Vec::new();
        for database in [&self.from, &self.to] {
            rest.extend(database.query_strings("select slot_name from pg_replication_slots order by 1").await);
            rest.extend(database.query_strings("select a::text from pg_authid a order by rolname").await);
            rest.extend(database.query_strings("select s::text from pg_db_role_setting s order by 1").await);
        }
        Fingerprint {
            source: dump(&self.from, self.source.version(), &[]).await,
            target: dump(&self.to, self.target.version(), &[]).await,
            rest,
        }
    }

    /// `source_url` is refused, by `check` and by `run`.
    async fn refused(&self, what: &str, source_url: &str, code: i32, needles: &[&str]) {
        let pgtandem = Pgtandem::new(&self.from, &self.to, "app").env("PGTANDEM_SOURCE_URL", source_url);
        self.refused_by(&pgtandem, what, code, needles).await;
    }

    async fn refused_by(&self, pgtandem: &Pgtandem, what: &str, code: i32, needles: &[&str]) {
        let before = self.fingerprint().await;
        for arguments in
            [&["check", "--json"][..], &["check"], &["run", "--log-level", "trace", "--log-format", "json"]]
        {
            let done = pgtandem.run(arguments).await;
            assert_eq!(done.code, Some(code), "{what}: {done}");
            let said = format!("{}{}", done.stdout, done.stderr);
            for needle in needles {
                assert!(said.contains(needle), "{what}: {needle:?} is not said: {done}");
            }
            assert_secret_kept(what, &done);
            if arguments.contains(&"--json") {
                serde_json::from_str::<serde_json::Value>(&done.stdout)
                    .unwrap_or_else(|e| panic!("{what}: {e}: {done}"));
            }
        }
        assert_eq!(self.fingerprint().await, before, "{what}: something was changed");
    }
}

fn assert_secret_kept(what: &str, done: &Finished) {
    for secret in [PASSWORD, &PASSWORD.replace(' ', "%20"), "wrong secret", "wrong%20secret"] {
        assert!(!done.stdout.contains(secret) && !done.stderr.contains(secret), "{what}: a password is told: {done}");
    }
}

/// `pg_dump --schema-only`, without the lines that differ each time.
async fn dump(database: &Database, version: u16, options: &[&str]) -> String {
    let program = client_program(if version > 16 { 18 } else { 16 }, "pg_dump");
    let output = tokio::process::Command::new(program)
        .args(["--schema-only", "--dbname"])
        .arg(database.url())
        .args(options)
        .output()
        .await
        .expect("start pg_dump");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict"))
        .fold(String::new(), |all, line| all + line + "\n")
}
