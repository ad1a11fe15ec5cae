//! One random case against real servers: databases of its own, sessions that play, a daemon that may die.

use std::cell::Cell;
use std::fmt::Write;
use std::time::{Duration, Instant};

use tokio_postgres::Client;

use super::Plan;
use super::history::{Event, placed, statements};
use super::schema::{PRELUDE, Placed};
use crate::differential::case::copy_in;
use crate::harness::{Cluster, Database, PASSWORD, Pgtandem, Running, catalog_differences, differences};

/// How long a case may wait for the daemon to get on.
const PATIENCE: Duration = Duration::from_secs(90);

/// Two servers for many cases, one after the other.
pub struct Stage {
    runtime: tokio::runtime::Runtime,
    source: Cluster,
    target: Cluster,
    count: Cell<u32>,
}

impl Stage {
    pub fn start((from, to): (u16, u16)) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (source, target) = runtime.block_on(async {
            let server = |version| Cluster::builder(version).set("max_prepared_transactions", "20");
            // Every other pair has a source that sends transactions while they are in progress; which one is told by the versions, so
            // that a seed repeats it. What takes more than 64 kB is sent so, and from 16 on every single change can be.
            let source = match (from, to) {
                (16.., to) if (from + to) % 2 == 1 => {
                    server(from).set("debug_logical_replication_streaming", "immediate")
                }
                (_, to) if (from + to) % 2 == 1 => server(from).set("logical_decoding_work_mem", "64kB"),
                _ => server(from),
            };
            let (source, target) = tokio::join!(source.start(), server(to).start());
            for cluster in [&source, &target] {
                cluster.execute(&format!("create role app login replication password '{PASSWORD}'")).await;
            }
            (source, target)
        });
        Self { runtime, source, target, count: Cell::new(0) }
    }

    /// Plays and moves; what went wrong, with all that was played.
    pub fn moves(&self, plan: &Plan) -> Result<(), String> {
        self.count.set(self.count.get() + 1);
        self.runtime.block_on(async {
            let mut case = Case::prepare(self, plan).await;
            let outcome = case.play().await;
            let outcome = outcome.map_err(|reason| case.explain(&reason));
            case.clean_up(self).await;
            outcome
        })
    }
}

struct Session {
    client: Client,
    open: bool,
    savepoint: bool,
    /// Holds a lock that nobody else can pass.
    strong: bool,
}

struct Case<'a> {
    plan: &'a Plan,
    versions: (u16, u16),
    name: String,
    /// As the role that owns what moves, and moves it.
    from: Database,
    from_above: Database,
    to_above: Database,
    pgtandem: Pgtandem,
    _folder: tempfile::TempDir,
    daemon: Option<Running>,
    observer: Option<Client>,
    sessions: [Option<Session>; 3],
    prepared: Vec<String>,
    played: String,
    gone: String,
}

impl<'a> Case<'a> {
    async fn prepare(stage: &Stage, plan: &'a Plan) -> Self {
        let name = format!("random_{}", stage.count.get());
        let (from_above, to_above) =
            (stage.source.create_database(&name).await, stage.target.create_database(&name).await);
        if !plan.superuser {
            for database in [&from_above, &to_above] {
                let owner = format!("alter database {name} owner to app; grant all on schema public to app");
                database.execute(&owner).await;
            }
        }
        let role = if plan.superuser { "postgres" } else { "app" };
        let seen = |database: &Database| database.with_user(role, PASSWORD);
        let (from, to) = (seen(&from_above), seen(&to_above));
        let folder = tempfile::tempdir().expect("a temporary folder");
        let pgtandem = Pgtandem::new(&from, &to, &name)
            .env("PGTANDEM_COPY_METHOD", if plan.dump { "dump" } else { "copy" })
            .env("PGTANDEM_FOLLOW_BATCH_MAX_DELAY", if plan.small_batches { "1ms" } else { "200ms" })
            .env("PGTANDEM_FOLLOW_WORKERS", plan.workers.to_string())
            // What judges is the comparison of the test, which shows the rows.
            .env("PGTANDEM_CUTOVER_VERIFY", "off")
            .working_in(folder.path());
        Self {
            plan,
            versions: (stage.source.version(), stage.target.version()),
            name,
            from,
            from_above,
            to_above,
            pgtandem,
            _folder: folder,
            daemon: None,
            observer: None,
            sessions: [None, None, None],
            prepared: Vec::new(),
            played: String::new(),
            gone: String::new(),
        }
    }

    async fn play(&mut self) -> Result<(), String> {
        self.make_schema().await?;
        self.stage("content", &self.plan.content).await?;
        self.end_all().await?;
        let [start, before_cut, after_cut, catching_up, following] = &self.plan.stages[..] else {
            return Err("five stages".to_owned());
        };
        self.daemon = Some(self.pgtandem.spawn(&["run"]));
        self.stage("the daemon starts", start).await?;
        self.end_strong().await?;
        self.wait_for("the copy", "phase not in ('preflight', 'schema')").await?;
        let gate = self.to_above.connect().await;
        gate.batch_execute("begin; lock table zz_gate").await.map_err(|error| format!("the gate: {error}"))?;
        self.stage("the copy, before its cut", before_cut).await?;
        self.end_all().await?;
        self.wait_for("the cut", "slot_lsn is not null").await?;
        self.stage("the copy, after its cut", after_cut).await?;
        self.end_strong().await?;
        gate.batch_execute("commit").await.map_err(|error| format!("the gate: {error}"))?;
        self.stage("catching up", catching_up).await?;
        // A table that was emptied meanwhile is copied under another cut, which waits for every transaction.
        self.end_all().await?;
        self.wait_for("following", "phase = 'follow'").await?;
        self.stage("following", following).await?;
        self.end_all().await?;
        // What an identity is changed to is no row, and is not carried without a capture; the schema's dump found it as it was then.
        for at in 0..self.plan.tables.len() {
            let table = Placed { at, all: &self.plan.tables };
            if table.changes_identity() {
                let sql = format!("alter table {} replica identity default", table.name());
                self.from.execute(&sql).await;
                self.to_above.execute(&sql).await;
            }
        }
        self.cut_over().await?;
        let mut found = differences(&self.from_above, &self.to_above).await;
        found.extend(catalog_differences(&self.from_above, &self.to_above).await);
        if found.is_empty() { Ok(()) } else { Err(format!("source and target differ:\n{}", found.join("\n"))) }
    }

    async fn make_schema(&mut self) -> Result<(), String> {
        let client = self.from.connect().await;
        let mut sql = PRELUDE.to_owned();
        for at in 0..self.plan.tables.len() {
            sql += &Placed { at, all: &self.plan.tables }.create(self.versions.0);
        }
        self.played += &sql;
        client.batch_execute(&sql).await.map_err(|error| format!("the schema: {}", why(&error)))
    }

    async fn stage(&mut self, name: &str, events: &[Event]) -> Result<(), String> {
        writeln!(self.played, "--- {name}").ok();
        for event in events {
            self.event(event).await?;
        }
        Ok(())
    }

    async fn event(&mut self, event: &Event) -> Result<(), String> {
        match event {
            Event::Change { session, table, change } => {
                let table = placed(&self.plan.tables, *table);
                for statement in statements(table, change) {
                    self.change(*session, &statement).await?;
                }
            }
            Event::Truncate { session, tables, cascade, restart } => {
                let names: Vec<String> = tables.iter().map(|&table| placed(&self.plan.tables, table).name()).collect();
                let restart = if *restart { " restart identity" } else { "" };
                let cascade = if *cascade { " cascade" } else { "" };
                self.change(*session, &format!("truncate {}{restart}{cascade}", names.join(", "))).await?;
                self.session(*session).await.strong = true;
            }
            Event::Savepoint { session } => {
                if self.session(*session).await.open {
                    self.must(*session, "savepoint mine").await?;
                    self.session(*session).await.savepoint = true;
                }
            }
            Event::RollbackToSavepoint { session } => {
                if std::mem::take(&mut self.session(*session).await.savepoint) {
                    self.must(*session, "rollback to savepoint mine").await?;
                }
            }
            Event::Commit { session } => self.end(*session, "commit").await?,
            Event::Rollback { session } => self.end(*session, "rollback").await?,
            Event::Prepare { session } => self.prepare_transaction(*session).await?,
            Event::Decide { commit } => {
                if let Some(gid) = self.prepared.pop() {
                    self.decide(&gid, *commit).await?;
                }
            }
            Event::Message { session, transactional } => {
                let sql = format!("select pg_logical_emit_message({transactional}, 'pgtandem', 'somebody''s')");
                // A replication role may not always say so.
                self.change(*session, &sql).await?;
            }
            Event::Identity { table, full } => {
                let table = placed(&self.plan.tables, *table);
                // One that has an identity either way, and no parts with identities of their own.
                if table.changes_identity() {
                    let identity = if *full { "full" } else { "default" };
                    let sql = format!("alter table {} replica identity {identity}", table.name());
                    self.change(0, &sql).await?;
                    self.end(0, "commit").await?;
                }
            }
            Event::Kill => {
                if let Some(daemon) = self.daemon.take() {
                    let killed = daemon.kill();
                    if killed.code.is_some() {
                        return Err(format!("the daemon had ended before it was killed: {killed}"));
                    }
                    writeln!(self.played, "-- SIGKILL").ok();
                    self.gone = killed.stderr;
                    self.daemon = Some(self.pgtandem.spawn(&["run"]));
                }
            }
        }
        Ok(())
    }

    async fn session(&mut self, number: u8) -> &mut Session {
        let slot = &mut self.sessions[usize::from(number)];
        if slot.is_none() {
            let client = self.from.connect().await;
            client.batch_execute("set lock_timeout = '25ms'; set statement_timeout = '10s'").await.expect("set");
            *slot = Some(Session { client, open: false, savepoint: false, strong: false });
        }
        slot.as_mut().expect("a session")
    }

    /// A statement inside the session's transaction; what the source refuses is taken back.
    async fn change(&mut self, session: u8, sql: &str) -> Result<(), String> {
        let begin = !std::mem::replace(&mut self.session(session).await.open, true);
        if begin {
            self.must(session, "begin").await?;
        }
        let client = &self.session(session).await.client;
        let done = match sql.split_once("from stdin\n") {
            None => client.batch_execute(&format!("savepoint s; {sql}; release savepoint s")).await,
            Some((copy, lines)) => {
                client.batch_execute("savepoint s").await.map_err(|error| why(&error))?;
                copy_in(client, &format!("{copy}from stdin"), lines).await
            }
        };
        match done {
            Ok(()) => {
                writeln!(self.played, "@{session} {sql};").ok();
            }
            Err(error) if error.as_db_error().is_some() => {
                writeln!(self.played, "-- @{session} {sql}: {}", why(&error)).ok();
                if sql.contains("from stdin\n") {
                    // The client does not find its way back after a COPY that was refused: its transaction goes with it.
                    self.sessions[usize::from(session)] = None;
                } else {
                    self.must(session, "rollback to savepoint s").await?;
                }
            }
            Err(error) => return Err(format!("{sql}: {}", why(&error))),
        }
        Ok(())
    }

    async fn must(&mut self, session: u8, sql: &str) -> Result<(), String> {
        writeln!(self.played, "@{session} {sql};").ok();
        let done = self.session(session).await.client.batch_execute(sql).await;
        done.map_err(|error| format!("{sql}: {}", why(&error)))
    }

    /// Ends a transaction; a deferred constraint may refuse it, and then it is rolled back.
    async fn end(&mut self, number: u8, how: &str) -> Result<(), String> {
        let session = self.session(number).await;
        if !session.open {
            return Ok(());
        }
        (session.open, session.savepoint, session.strong) = (false, false, false);
        if let Err(refused) = self.must(number, how).await {
            writeln!(self.played, "-- refused: {refused}").ok();
        }
        Ok(())
    }

    async fn prepare_transaction(&mut self, number: u8) -> Result<(), String> {
        // Strong locks of a transaction that nobody decides would stop everything.
        let session = self.session(number).await;
        if !session.open || session.strong {
            return Ok(());
        }
        (session.open, session.savepoint) = (false, false);
        let gid = format!("{} {}", self.name, self.played.len());
        match self.must(number, &format!("prepare transaction '{gid}'")).await {
            Ok(()) => self.prepared.push(gid),
            Err(refused) => {
                writeln!(self.played, "-- refused: {refused}").ok();
            }
        }
        Ok(())
    }

    async fn decide(&mut self, gid: &str, commit: bool) -> Result<(), String> {
        let how = if commit { "commit" } else { "rollback" };
        let sql = format!("{how} prepared '{gid}'");
        writeln!(self.played, "{sql};").ok();
        let client = self.from.connect().await;
        client.batch_execute(&sql).await.map_err(|error| format!("{sql}: {}", why(&error)))
    }

    async fn end_all(&mut self) -> Result<(), String> {
        for session in 0..3 {
            self.end(session, "commit").await?;
        }
        while let Some(gid) = self.prepared.pop() {
            self.decide(&gid, gid.len() % 2 == 0).await?;
        }
        Ok(())
    }

    async fn end_strong(&mut self) -> Result<(), String> {
        for session in 0..3 {
            if self.session(session).await.strong {
                self.end(session, "commit").await?;
            }
        }
        Ok(())
    }

    /// Waits until the row of the move says so.
    async fn wait_for(&mut self, what: &str, condition: &str) -> Result<(), String> {
        let began = Instant::now();
        let question = format!("select 1 from pgtandem.move where {condition}");
        loop {
            if self.observer.as_ref().is_none_or(Client::is_closed) {
                self.observer = self.to_above.try_connect().await.ok();
            }
            if let Some(observer) = &self.observer
                && let Ok(rows) = observer.simple_query(&question).await
                && rows.iter().any(|row| matches!(row, tokio_postgres::SimpleQueryMessage::Row(_)))
            {
                return Ok(());
            }
            self.lives()?;
            if began.elapsed() > PATIENCE {
                return Err(format!("waited in vain for {what}"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn lives(&mut self) -> Result<(), String> {
        let lives = self.daemon.as_mut().is_some_and(Running::is_running);
        if lives { Ok(()) } else { Err("the daemon ended".to_owned()) }
    }

    async fn cut_over(&mut self) -> Result<(), String> {
        let began = Instant::now();
        // A daemon that was just started does not take requests yet.
        loop {
            let mut asking = self.pgtandem.spawn(&["cutover", "--timeout", "60s"]);
            while asking.is_running() && began.elapsed() < PATIENCE {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let told = if asking.is_running() { asking.kill() } else { asking.wait(PATIENCE).await };
            match told.code {
                Some(0) => break,
                _ if told.stderr.contains("[no_daemon]") && began.elapsed() < PATIENCE => self.lives()?,
                // The last schema change had tables copied again: the answer says to ask again.
                _ if told.stderr.contains("following ended") && began.elapsed() < PATIENCE => self.lives()?,
                _ => return Err(format!("no cutover: {told}")),
            }
        }
        let Some(mut daemon) = self.daemon.take() else { return Err("no daemon".to_owned()) };
        while daemon.is_running() && began.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let ended = if daemon.is_running() { daemon.kill() } else { daemon.wait(PATIENCE).await };
        self.gone = ended.stderr.clone();
        if ended.code == Some(0) { Ok(()) } else { Err(format!("the daemon did not end well: {:?}", ended.status)) }
    }

    fn explain(&self, reason: &str) -> String {
        let log = self.daemon.as_ref().map_or_else(|| self.gone.clone(), Running::stderr);
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(25)..].join("\n");
        let Plan { dump, superuser, small_batches, workers, .. } = self.plan;
        format!(
            "{reason}\n--- dump {dump}, superuser {superuser}, small batches {small_batches}, workers {workers}, played:\n{}\n--- the daemon:\n{tail}",
            self.played
        )
    }

    /// Leaves nothing that the next case would meet.
    async fn clean_up(mut self, stage: &Stage) {
        drop(self.daemon.take());
        self.sessions = [None, None, None];
        for gid in std::mem::take(&mut self.prepared) {
            self.from_above.execute(&format!("rollback prepared '{gid}'")).await;
        }
        // The slot of a move that failed stays in use for a moment.
        let slots = format!("pg_replication_slots where database = '{}'", self.name);
        let client = stage.source.connect().await;
        let began = Instant::now();
        while !stage.source.query_strings(&format!("select slot_name from {slots}")).await.is_empty() {
            assert!(began.elapsed() < PATIENCE, "a slot stays in use");
            let end = format!("select pg_terminate_backend(active_pid) from {slots} and active");
            let drop_free = format!("select pg_drop_replication_slot(slot_name) from {slots} and not active");
            drop((client.simple_query(&end).await, client.simple_query(&drop_free).await));
        }
        for cluster in [&stage.source, &stage.target] {
            cluster.execute(&format!("drop database {} with (force)", self.name)).await;
        }
    }
}

fn why(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), |db| format!("{} {}", db.code().code(), db.message()))
}
