//! What a table needs once its rows are in: its indexes, its keys, its statistics. It begins as soon as the rows are there, while other
//! tables are still copied.
//!
//! Promises nothing but time: whatever is not done here, because it was refused or because of a death, is found missing
//! afterwards and done by [`Restorer::after_data`](crate::schema::Restorer::after_data) and [`super::analyze`]. A CREATE INDEX is there
//! whole or not at all.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::processors::{Busy, Processors};
use crate::error::{Doing, Error, Result};
use crate::postgres::wire::Wire;
use crate::postgres::{QualifiedName, Server, Session, leftovers};
use crate::schema::indexes::{Index, Missing};

/// What the sessions are called that build indexes.
const SESSIONS: &str = "index";

/// A table whose indexes are smaller together gets them all in one turn, in bytes.
const WORTH_A_TURN: u64 = 8 << 20;

/// `$1`: how many indexes are built at the same time. Never less than what the server has set: an index that is sorted in memory is
/// built fastest, and shared buffers tell how large the server is. They come back in bytes.
const ROOM: &str = "
    SELECT pg_catalog.set_config('maintenance_work_mem', GREATEST(
               (SELECT setting::int8 FROM pg_catalog.pg_settings WHERE name = 'maintenance_work_mem'),
               LEAST((SELECT setting::int8 * 8 FROM pg_catalog.pg_settings WHERE name = 'shared_buffers') / (2 * $1::int8), 1048576)
           )::text || 'kB', false),
           pg_catalog.set_config('max_parallel_maintenance_workers', GREATEST(
               pg_catalog.current_setting('max_parallel_maintenance_workers')::int8,
               LEAST(pg_catalog.current_setting('max_parallel_workers')::int8 / $1::int8, 4))::text, false),
           pg_catalog.set_config('synchronous_commit', 'off', false),
           (SELECT setting::int8 * 8192 FROM pg_catalog.pg_settings WHERE name = 'shared_buffers')";

/// Completes tables, some at a time. Dropped, it stops.
pub struct Finish {
    shared: Arc<Shared>,
    missing: Mutex<HashMap<QualifiedName, Missing>>,
    tasks: Mutex<JoinSet<()>>,
}

struct Shared {
    target: Server,
    workers: usize,
    /// One of these for each index in work.
    turns: Semaphore,
    processors: Processors,
    idle: Mutex<Vec<Session>>,
    analyzed: Mutex<HashSet<QualifiedName>>,
    put_off: AtomicBool,
}

impl Finish {
    /// `missing` is what each table needs.
    #[must_use]
    pub fn new(target: &Server, workers: NonZeroUsize, missing: HashMap<QualifiedName, Missing>) -> Self {
        let shared = Shared {
            target: target.clone(),
            workers: workers.get(),
            turns: Semaphore::new(workers.get()),
            processors: Processors::default(),
            idle: Mutex::default(),
            analyzed: Mutex::default(),
            put_off: AtomicBool::new(false),
        };
        Self { shared: Arc::new(shared), missing: Mutex::new(missing), tasks: Mutex::default() }
    }

    /// Ends what an earlier start left running: sessions of workers build indexes, too.
    ///
    /// # Errors
    /// It does not end; the connection's.
    pub async fn end_leftovers(target: &Server) -> Result<()> {
        let session = target.connect("control").await?;
        for sessions in [SESSIONS, super::SESSIONS] {
            leftovers::end(&session, &target.application_name(sessions)).await?;
        }
        Ok(())
    }

    /// Until what is returned is dropped, a worker fills tables of the target.
    pub(super) fn beside_a_copy(&self) -> Busy {
        self.shared.processors.one()
    }

    /// The rows of the table are in. Returns at once. A second call for the same table does nothing.
    pub(super) fn begin(&self, table: &QualifiedName) {
        if let Some(missing) = lock(&self.missing).remove(table) {
            self.spawn(table, missing);
        }
    }

    fn spawn(&self, table: &QualifiedName, missing: Missing) {
        let work = complete_in_turns(Arc::clone(&self.shared), table.clone(), missing);
        let mut tasks = lock(&self.tasks);
        // What is done is let go of.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(work);
    }

    /// The same of tables that a worker filled, which completes those that are small itself: thousands of them wait for the disk more than for
    /// a processor, and here as many wait at once as there are workers. All in one transaction: it is their number that counts.
    ///
    /// # Errors
    /// The connection's. What the server refuses is tried once more for each table alone.
    pub(super) async fn complete(&self, target: &mut Wire, tables: &[&QualifiedName]) -> Result<()> {
        let mut small = Vec::new();
        for &table in tables {
            let Some(missing) = lock(&self.missing).remove(table) else { continue };
            if missing.bytes < WORTH_A_TURN {
                small.push((table, missing));
            } else {
                self.spawn(table, missing);
            }
        }
        let statements = at_once(&small);
        if statements.is_empty() {
            return Ok(());
        }
        match target.query(&statements).await {
            Err(error) if error.sqlstate().is_none() => return Err(error),
            Err(error) => {
                tracing::debug!(%error, "small tables are completed one by one");
                small.into_iter().for_each(|(table, missing)| self.spawn(table, missing));
            }
            Ok(_) => {
                let analyzed = small.iter().filter(|(_, missing)| missing.analyze).map(|(table, _)| (*table).clone());
                lock(&self.shared.analyzed).extend(analyzed);
            }
        }
        Ok(())
    }

    /// Whether something could not be done: an index may be there without its key, which pg_restore would make with its index. To be
    /// asked after [`Finish::rest`]; then what is missing is to be found out and tried once more.
    #[must_use]
    pub fn has_put_off(&self) -> bool {
        self.shared.put_off.load(Ordering::Relaxed)
    }

    /// Completes all tables that were not begun yet, and waits for everything. Returns those whose statistics are gathered.
    pub async fn rest(&self) -> HashSet<QualifiedName> {
        let mut tables: Vec<QualifiedName> = lock(&self.missing).keys().cloned().collect();
        tables.sort();
        tables.iter().for_each(|table| self.begin(table));
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        while let Some(done) = tasks.join_next().await {
            if let Err(error) = done {
                tracing::warn!(%error, "a step of completing a table ended early; it is done later");
            }
        }
        lock(&self.shared.idle).clear();
        std::mem::take(&mut *lock(&self.shared.analyzed))
    }
}

/// Builds the indexes, each when it is its turn, then declares the keys and gathers statistics.
async fn complete_in_turns(shared: Arc<Shared>, table: QualifiedName, missing: Missing) {
    if missing.bytes < WORTH_A_TURN {
        return complete_at_once(&shared, table, missing).await;
    }
    let mut building = JoinSet::new();
    for index in missing.indexes {
        building.spawn(build(Arc::clone(&shared), index));
    }
    let mut then = Vec::new();
    while let Some(built) = building.join_next().await {
        then.extend(built.ok().flatten().and_then(|index| index.key));
    }
    if then.is_empty() && !missing.analyze {
        return;
    }
    let done = shared
        .in_turn(async |session| {
            for statement in &then {
                session.batch_execute(statement).await.doing(|| "declaring its keys")?;
            }
            if missing.analyze {
                session.batch_execute(&format!("ANALYZE {table}")).await.doing(|| "gathering its statistics")?;
            }
            Ok(())
        })
        .await;
    shared.completed(done, table, missing.analyze);
}

/// All of a small table in one transaction.
async fn complete_at_once(shared: &Shared, table: QualifiedName, missing: Missing) {
    let (analyze, small) = (missing.analyze, [(&table, missing)]);
    let statements = at_once(&small);
    if statements.is_empty() {
        return;
    }
    let done = shared.in_turn(async |session| Ok(session.batch_execute(&statements).await?)).await;
    shared.completed(done, table, analyze);
}

/// Everything that small tables need, in as few statements as there can be. The first index of each comes first, then the second: right
/// after a statement that changed it, the server would have to read the table's definition again.
fn at_once(tables: &[(&QualifiedName, Missing)]) -> String {
    let most = tables.iter().map(|(_, missing)| missing.indexes.len()).max().unwrap_or(0);
    let mut statements = Vec::new();
    for at in 0..most {
        for index in tables.iter().filter_map(|(_, missing)| missing.indexes.get(at)) {
            match &index.at_once {
                Some(at_once) => statements.push(at_once.as_str()),
                None => statements.extend(index.create.iter().chain(&index.key).map(String::as_str)),
            }
        }
    }
    let analyzed = tables.iter().filter(|(_, missing)| missing.analyze).map(|(table, _)| table.to_string());
    let analyzed = analyzed.collect::<Vec<_>>().join(", ");
    let analyze = format!("ANALYZE {analyzed}");
    if !analyzed.is_empty() {
        statements.push(&analyze);
    }
    statements.join(";\n")
}

/// Returns the index if it is there.
async fn build(shared: Arc<Shared>, index: Index) -> Option<Index> {
    let Some(create) = &index.create else { return Some(index) };
    let began = Instant::now();
    let built = shared
        .in_turn(async |session| {
            let (_busy, workers) = shared.processors.one_with_workers();
            if let Some(workers) = workers {
                session.batch_execute(&format!("SET max_parallel_maintenance_workers = {workers}")).await?;
            }
            Ok(session.batch_execute(create).await?)
        })
        .await;
    match built {
        Ok(()) => {
            let seconds = (began.elapsed().as_secs_f64() * 10.0).round() / 10.0;
            tracing::info!(index = %index.name.plain(), seconds, "built");
            Some(index)
        }
        Err(error) => {
            shared.put_off(&error, &index.name);
            None
        }
    }
}

impl Shared {
    /// What came of the last step of a table, with which its statistics were gathered or not.
    fn completed(&self, outcome: Result<()>, table: QualifiedName, analyzed: bool) {
        match outcome {
            Ok(()) if analyzed => drop(lock(&self.analyzed).insert(table)),
            Ok(()) => {}
            Err(error) => self.put_off(&error, &table),
        }
    }

    /// Something was not done. It is found missing later.
    fn put_off(&self, error: &Error, what: &QualifiedName) {
        self.put_off.store(true, Ordering::Relaxed);
        tracing::info!(%error, "{} is completed later", what.plain());
    }

    /// Does something on a session of the target, when it is its turn.
    async fn in_turn(&self, work: impl AsyncFnOnce(&Session) -> Result<()>) -> Result<()> {
        let _turn = self.turns.acquire().await.map_err(|_| Error::bug("no turn to build an index"))?;
        let idle = lock(&self.idle).pop();
        let session = match idle {
            Some(session) => session,
            None => {
                let session = self.target.connect(SESSIONS).await?;
                let workers = i64::try_from(self.workers).unwrap_or(1);
                let room = session.query_one(ROOM, &[&workers]).await.doing(|| "preparing to build indexes")?;
                self.processors.guess(u64::try_from(room.try_get::<_, i64>(3)?).unwrap_or(0));
                session
            }
        };
        work(&session).await?;
        lock(&self.idle).push(session);
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
