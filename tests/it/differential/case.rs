//! One case: a schema with content, and a script of changes that flows while the real binary moves it.
//!
//! A [`Case`] says what is there and what happens; [`Case::moves`] has it happen under each [`Combination`] and compares
//! both sides exactly: every row, every sequence, every fact of the catalog. The script is played three times, with its
//! word ROUND as 1, 2 and 3: while the rows are copied, while following, and right before the cutover.
//!
//! A script is SQL. A line that begins with `@name ` goes on in the session of that name, so that transactions overlap;
//! what stands before the first one goes to a session of its own. Every step is waited for.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::SinkExt;
use tempfile::TempDir;
use tokio_postgres::Client;

use crate::harness::{
    Cluster, Database, PASSWORD, PATIENCE, Pgtandem, Running, assert_same, assert_same_catalog, wait_until,
};

/// A table of every case. While the rows are copied the target's is locked until the script was played, so that the script
/// runs during the copy.
const GATE: &str = "create table zz_gate (id int primary key); insert into zz_gate values (1)";

/// How the rows of the first copy travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Copy,
    Dump,
}

/// What brings the changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Stream,
    /// Of the target's own worker, which needs a superuser.
    Subscription,
}

/// Who moves the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Superuser,
    /// LOGIN REPLICATION, and the owner of the database and of what is in it.
    Owner,
}

/// The circumstances of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Combination {
    pub versions: (u16, u16),
    pub method: Method,
    pub engine: Engine,
    pub role: Role,
}

/// Every version as source and as target, both methods and both roles with each other. A case takes one or some of them.
const COVERING: [((u16, u16), Method, Role); 8] = [
    ((16, 17), Method::Copy, Role::Superuser),
    ((13, 18), Method::Copy, Role::Owner),
    ((15, 16), Method::Dump, Role::Superuser),
    ((18, 18), Method::Copy, Role::Owner),
    ((14, 15), Method::Dump, Role::Owner),
    ((13, 14), Method::Copy, Role::Superuser),
    ((17, 18), Method::Copy, Role::Superuser),
    ((13, 13), Method::Dump, Role::Owner),
];

/// Every pair of versions, method and role, and these engines.
fn product(engines: &[Engine]) -> Vec<Combination> {
    let versions = crate::harness::VERSIONS;
    let pairs =
        versions.iter().flat_map(|&from| versions.iter().filter(move |&&to| to >= from).map(move |&to| (from, to)));
    let mut all = Vec::new();
    for versions in pairs {
        for &engine in engines {
            for method in [Method::Copy, Method::Dump] {
                for role in [Role::Superuser, Role::Owner] {
                    all.push(Combination { versions, method, engine, role });
                }
            }
        }
    }
    all
}

/// What moves, and what happens to it meanwhile.
#[derive(Clone)]
pub struct Case {
    name: &'static str,
    /// Which of [`COVERING`] the ordinary run takes.
    takes: Vec<usize>,
    prepare: String,
    schema: String,
    script: String,
    before: String,
    meanwhile: String,
    settings: Vec<(&'static str, &'static str)>,
    role_settings: Vec<(&'static str, &'static str)>,
    role_attributes: &'static str,
    oldest: u16,
    only: Option<Role>,
    patience: Duration,
    deaths: bool,
    also_by_subscription: bool,
}

impl Case {
    /// A case; the name becomes that of the move. It runs under one combination, which the name picks, unless told
    /// otherwise.
    pub fn new(name: &'static str) -> Self {
        let sum: usize = name.bytes().map(usize::from).sum();
        Self {
            name,
            takes: vec![sum % COVERING.len()],
            prepare: String::new(),
            schema: String::new(),
            script: String::new(),
            before: String::new(),
            meanwhile: String::new(),
            settings: Vec::new(),
            role_settings: Vec::new(),
            role_attributes: "",
            oldest: 13,
            only: None,
            patience: PATIENCE,
            deaths: false,
            also_by_subscription: false,
        }
    }

    /// What is there before the move, made by the role that owns it.
    pub fn schema(mut self, sql: &str) -> Self {
        self.schema = sql.to_owned();
        self
    }

    /// What happens meanwhile.
    pub fn script(mut self, script: &str) -> Self {
        self.script = script.to_owned();
        self
    }

    /// What began before the move, and how it goes on in the same sessions while the cut waits for it.
    pub fn around_the_cut(mut self, before: &str, meanwhile: &str) -> Self {
        self.before = before.to_owned();
        self.meanwhile = meanwhile.to_owned();
        self
    }

    /// Statements for a superuser on both sides, in the database, before anything else: roles and extensions.
    pub fn prepared_by(mut self, sql: &str) -> Self {
        self.prepare = sql.to_owned();
        self
    }

    /// A line of `postgresql.conf` of both servers.
    pub fn server_setting(mut self, name: &'static str, value: &'static str) -> Self {
        self.settings.push((name, value));
        self
    }

    /// Settings of the role that moves, on both sides.
    pub fn role_settings(mut self, settings: &[(&'static str, &'static str)]) -> Self {
        self.role_settings = settings.to_vec();
        self
    }

    /// More attributes for the roles that are no superusers, such as `bypassrls`.
    pub fn owner_may(mut self, attributes: &'static str) -> Self {
        self.role_attributes = attributes;
        self
    }

    /// Needs a source of this version or newer.
    pub fn since_version(mut self, oldest: u16) -> Self {
        self.oldest = oldest;
        self
    }

    /// Is about one of the roles.
    pub fn only(mut self, role: Role) -> Self {
        self.only = Some(role);
        self
    }

    /// The daemon is killed while it copies and while it follows.
    pub fn with_deaths(mut self) -> Self {
        self.deaths = true;
        self
    }

    /// The ordinary run takes these of [`COVERING`].
    pub fn covering(mut self, takes: &[usize]) -> Self {
        self.takes = takes.to_vec();
        self
    }

    /// The target's own worker can apply all of it, too.
    pub fn also_by_subscription(mut self) -> Self {
        self.also_by_subscription = true;
        self
    }

    /// Moves it under each combination of this run.
    pub async fn moves(self) {
        self.moves_and(async |_| {}).await;
    }

    /// Moves it, compares, and then asks more of the moved.
    pub async fn moves_and(self, check: impl AsyncFn(&Moved)) {
        let wanted = self.combinations();
        let mut pairs: Vec<(u16, u16)> = wanted.iter().map(|c| c.versions).collect();
        pairs.dedup();
        for versions in pairs {
            let (source, target) = tokio::join!(self.server(versions.0), self.server(versions.1));
            for (number, combination) in wanted.iter().filter(|c| c.versions == versions).enumerate() {
                println!("{}: {combination:?}", self.name);
                let moved = Moved::prepare(&self, *combination, &source, &target, number).await;
                moved.play_and_move().await;
                check(&moved).await;
            }
        }
    }

    /// `PGTANDEM_TEST_ALL=1` takes all, `TEST_POSTGRES` those versions, or else the few that the case names.
    fn combinations(&self) -> Vec<Combination> {
        let fits = |c: &Combination| {
            let superuser = c.engine == Engine::Stream || c.role == Role::Superuser;
            c.versions.0 >= self.oldest && superuser && self.only.is_none_or(|role| c.role == role)
        };
        let engines: &[Engine] =
            if self.also_by_subscription { &[Engine::Stream, Engine::Subscription] } else { &[Engine::Stream] };
        let all = product(engines);
        if std::env::var_os("PGTANDEM_TEST_ALL").is_some() {
            return all.into_iter().filter(fits).collect();
        }
        if std::env::var_os("TEST_POSTGRES").is_some() {
            let versions = crate::harness::versions_under_test();
            return all.into_iter().filter(|c| c.versions == versions && fits(c)).collect();
        }
        let mut few: Vec<Combination> = Vec::new();
        for &engine in engines {
            for &at in &self.takes {
                // One that does not fit hands over to the next that does.
                let from_there = COVERING.iter().cycle().skip(at).take(COVERING.len());
                let combinations =
                    from_there.map(|&(versions, method, role)| Combination { versions, method, engine, role });
                few.extend(combinations.into_iter().find(fits).filter(|found| !few.contains(found)));
            }
        }
        assert!(!few.is_empty(), "no combination fits");
        few
    }

    async fn server(&self, version: u16) -> Cluster {
        let mut builder = Cluster::builder(version).set("max_prepared_transactions", "20");
        for (name, value) in &self.settings {
            builder = builder.set(name, value);
        }
        builder.start().await
    }
}

/// One move of a case.
pub struct Moved {
    case: Case,
    /// As the role that owns what moves.
    pub from: Database,
    pub to: Database,
    /// As a superuser.
    pub from_above: Database,
    pub to_above: Database,
    pub pgtandem: Pgtandem,
    peak_memory: AtomicU64,
    _folder: TempDir,
}

impl Moved {
    async fn prepare(case: &Case, combination: Combination, source: &Cluster, target: &Cluster, number: usize) -> Self {
        let name = format!("{}_{number}", case.name);
        let (from_above, to_above) = (source.create_database(&name).await, target.create_database(&name).await);
        for (cluster, database) in [(source, &from_above), (target, &to_above)] {
            case.prepare_side(combination.role, cluster, database).await;
        }
        let owner = if combination.role == Role::Superuser { "postgres" } else { "app" };
        let (from, to) = (from_above.with_user(owner, PASSWORD), to_above.with_user(owner, PASSWORD));
        let seen = |database: &Database| database.with_user("mover", PASSWORD);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut pgtandem = Pgtandem::new(&seen(&from_above), &seen(&to_above), &name)
            .env("PGTANDEM_COPY_METHOD", if combination.method == Method::Copy { "copy" } else { "dump" })
            // What judges is the comparison of the test, which shows the rows.
            .env("PGTANDEM_CUTOVER_VERIFY", "off")
            .working_in(folder.path());
        if combination.engine == Engine::Subscription {
            pgtandem = pgtandem.env("PGTANDEM_FOLLOW_ENGINE", "subscription");
        }
        Self {
            case: case.clone(),
            from,
            to,
            from_above,
            to_above,
            pgtandem,
            peak_memory: AtomicU64::new(0),
            _folder: folder,
        }
    }

    async fn play_and_move(&self) {
        self.from.execute(GATE).await;
        Sessions::of(&self.from).run(&self.case.schema).await;
        let mut around = Sessions::of(&self.from);
        around.run(&self.case.before).await;
        let mut daemon = self.pgtandem.spawn(&["run"]);
        daemon.wait_for_log("entering phase copy", PATIENCE).await;
        let gate = self.to_above.connect().await;
        gate.batch_execute("begin; lock table zz_gate").await.expect("lock the gate");
        if !self.case.before.is_empty() {
            let waiting =
                "select exists (select from pg_replication_slots where slot_name = 'pgtandem_NAME' and active)";
            let waiting = waiting.replace("NAME", self.from.name());
            wait_until("the slot is being made", PATIENCE, async || {
                self.from_above.query_string(&waiting).await == "t"
            })
            .await;
            around.run(&self.case.meanwhile).await;
        }
        daemon.wait_for_log("took the first cut", PATIENCE).await;
        if self.case.deaths {
            daemon = self.kill(daemon);
        }
        self.play(1).await;
        gate.batch_execute("commit").await.expect("open the gate");
        following(&mut daemon, self.case.patience).await;
        self.play(2).await;
        self.applied().await;
        self.measure(&daemon);
        if self.case.deaths {
            daemon = self.kill(daemon);
            following(&mut daemon, self.case.patience).await;
        }
        self.play(3).await;
        self.measure(&daemon);
        cut_over(&self.pgtandem, daemon).await;
        assert_same(&self.from_above, &self.to_above).await;
        assert_same_catalog(&self.from_above, &self.to_above).await;
    }

    /// One round of the script.
    async fn play(&self, round: u32) {
        Sessions::of(&self.from).run(&self.case.script.replace("ROUND", &round.to_string())).await;
    }

    /// Waits until the target has what is committed on the source now.
    pub async fn applied(&self) {
        let head = self.from_above.query_string("select pg_current_wal_lsn()").await;
        let reached = format!("select lsn >= '{head}' from pgtandem.progress");
        wait_until("it is applied", 4 * PATIENCE, async || self.to_above.query_string(&reached).await == "t").await;
    }

    /// The most memory that the daemon ever held, in bytes, as the kernel counts it.
    pub fn peak_memory(&self) -> u64 {
        self.peak_memory.load(Ordering::Relaxed)
    }

    fn measure(&self, daemon: &Running) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().unwrap_or(0);
        self.peak_memory.fetch_max(kilobytes << 10, Ordering::Relaxed);
    }

    /// SIGKILL, and the next daemon.
    fn kill(&self, daemon: Running) -> Running {
        daemon.kill();
        self.pgtandem.spawn(&["run"])
    }
}

impl Case {
    /// The role that moves is never the one that plays: its settings may be hostile.
    async fn prepare_side(&self, role: Role, cluster: &Cluster, database: &Database) {
        let name = database.name();
        let attributes = match role {
            Role::Superuser => "superuser",
            Role::Owner => "nosuperuser replication",
        };
        let more = self.role_attributes;
        let mut sql = format!(
            "do $$ begin
                 create role app; create role mover;
             exception when duplicate_object then null; end $$;
             alter role app login nosuperuser {more} password '{PASSWORD}';
             alter role mover reset all;
             alter role mover login {attributes} {more} password '{PASSWORD}';"
        );
        if role == Role::Owner {
            sql += &format!("grant app to mover; alter database \"{name}\" owner to app;");
        }
        for (setting, value) in &self.role_settings {
            let quoted = if *setting == "search_path" { (*value).to_owned() } else { format!("'{value}'") };
            sql += &format!("alter role mover set {setting} = {quoted};");
        }
        if !self.role_settings.is_empty() && cluster.version() >= 17 {
            sql += "alter role mover set transaction_timeout = '100ms';";
        }
        cluster.execute(&sql).await;
        if role == Role::Owner {
            database.execute("grant all on schema public to app").await;
        }
        database.execute(&self.prepare).await;
    }
}

/// The sessions of scripts that belong together.
pub struct Sessions {
    database: Database,
    open: HashMap<String, Client>,
}

impl Sessions {
    /// None yet.
    pub fn of(database: &Database) -> Self {
        Self { database: database.clone(), open: HashMap::new() }
    }

    /// Runs a script, one step after the other.
    pub async fn run(&mut self, script: &str) {
        for (session, sql) in steps(script) {
            if !self.open.contains_key(session) {
                self.open.insert(session.to_owned(), self.database.connect().await);
            }
            let client = &self.open[session];
            let done = match sql.split_once("from stdin\n") {
                Some((copy, lines)) => copy_in(client, &format!("{copy}from stdin"), lines).await,
                None => client.batch_execute(sql).await,
            };
            done.unwrap_or_else(|error| panic!("session {session:?}: {:?}\nin: {sql}", error.as_db_error()));
        }
    }
}

/// COPY FROM STDIN with these lines.
pub async fn copy_in(client: &Client, copy: &str, lines: &str) -> Result<(), tokio_postgres::Error> {
    let sink = client.copy_in::<_, bytes::Bytes>(copy).await?;
    let mut sink = std::pin::pin!(sink);
    sink.send(bytes::Bytes::from(format!("{}\n", lines.trim_end_matches('\n')))).await?;
    sink.finish().await.map(drop)
}

/// The steps of a script: a session's name, and its SQL.
fn steps(script: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    let mut rest = script;
    let mut session = "";
    loop {
        let next = if rest.starts_with('@') { Some(0) } else { rest.find("\n@").map(|at| at + 1) };
        let (sql, after) = next.map_or((rest, None), |at| (&rest[..at], Some(&rest[at + 1..])));
        if !sql.trim().is_empty() {
            found.push((session, sql.trim()));
        }
        let Some(after) = after else { return found };
        let (name, after) = after.split_once(char::is_whitespace).expect("a session and what it does");
        session = name;
        rest = after;
    }
}

/// A number that the person who runs the tests may give.
pub fn number(name: &str) -> Option<u64> {
    let text = std::env::var_os(name)?;
    Some(text.to_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("{name} is a number, not {text:?}")))
}

/// Waits until the move follows.
pub async fn following(daemon: &mut Running, patience: Duration) {
    wait_until("the move follows", patience, async || {
        let log = daemon.stderr();
        let follows = log.contains("entering phase follow")
            || log.contains("going on with the move") && log.contains("phase=follow");
        assert!(follows || daemon.is_running(), "the daemon ended:\n{log}");
        follows
    })
    .await;
}

/// Waits until the move is ready, cuts over, and sees the daemon end well.
pub async fn cut_over(pgtandem: &Pgtandem, mut daemon: Running) {
    wait_until("the cutover happens", 4 * PATIENCE, async || {
        // It waits for what is still to be applied; on a busy machine that takes a while.
        let done = pgtandem.spawn(&["cutover", "--timeout", "3m"]).wait(4 * PATIENCE).await;
        // A table that is copied again after a change of its identity puts it off.
        let put_off = ["following ended", "not_following", "no_daemon", "not_noticed"]
            .iter()
            .any(|why| done.stderr.contains(why));
        assert!(done.code == Some(0) || put_off && daemon.is_running(), "{done}\n{}", daemon.stderr());
        done.code == Some(0)
    })
    .await;
    let ended = daemon.wait(PATIENCE).await;
    assert_eq!(ended.code, Some(0), "{ended}");
}

#[test]
fn a_script_is_split_into_the_steps_of_its_sessions() {
    let script = "select 1;\nselect 'x\n@ is no session';\n@a begin;\n@b insert\n  into t;\n@a commit";
    // A line that begins with `@` is a session's, also inside a literal: scripts keep it from there.
    let script = script.replace("\n@ is", " @ is");
    let found = steps(&script);
    assert_eq!(
        found,
        [("", "select 1;\nselect 'x @ is no session';"), ("a", "begin;"), ("b", "insert\n  into t;"), ("a", "commit")]
    );
}

#[test]
fn the_covering_combinations_hold_every_value_of_every_parameter() {
    for version in crate::harness::VERSIONS {
        assert!(COVERING.iter().any(|((from, _), ..)| *from == version), "{version} is no source");
        assert!(COVERING.iter().any(|((_, to), ..)| *to == version), "{version} is no target");
    }
    for method in [Method::Copy, Method::Dump] {
        for role in [Role::Superuser, Role::Owner] {
            assert!(COVERING.iter().any(|(_, m, r)| *m == method && *r == role), "{method:?} {role:?}");
        }
    }
}
