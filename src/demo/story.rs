//! The order of things: servers, database, load, move, cutover, proofs.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::compare::{self, TableComparison};
use super::daemon::{Commands, Daemon, Status};
use super::figures::figures;
use super::load::{AddressFile, Load};
use super::schema::{self, APPLICATION, DATABASE, Scale, TableSize};
use super::servers::{Cluster, Folder, SUPERUSER, ServerUser};
use super::summary::{Stretches, Summary, read_receipts};
use super::switch::{Moment, Switchboard};
use super::{Narrator, grouped, human_bytes, installation};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::Side;

/// The clients run alone for this long, as a measure for what comes after.
const BASELINE: Duration = Duration::from_secs(4);
/// The move follows under load for this long before the cutover.
const FOLLOW: Duration = Duration::from_secs(10);
/// The clients go on at the target for this long after the cutover.
const AFTERWARDS: Duration = Duration::from_secs(5);
/// How often the status is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// The move must be ready for a cutover within this.
const READY_DEADLINE: Duration = Duration::from_secs(3600);
/// The daemon ends by itself this soon after the cutover.
const END_DEADLINE: Duration = Duration::from_secs(20);

/// What the demo was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Rows of the largest table; the others follow.
    pub rows: u64,
    /// Leave both servers up.
    pub keep: bool,
}

/// Tells the whole story. `stop` ends it early; then, as after an error, everything is stopped and removed too.
///
/// # Errors
/// Class usage without PostgreSQL; class no if a proof fails or the story is cut short; else what went wrong.
pub async fn tell(options: Options, narrator: &dyn Narrator, stop: &CancellationToken) -> Result<()> {
    let stage = tokio::select! {
        () = stop.cancelled() => return Err(interrupted()),
        stage = Stage::set(narrator) => stage?,
    };
    let result = tokio::select! {
        () = stop.cancelled() => Err(interrupted()),
        result = act(&stage, Scale::from_rows(options.rows), narrator) => result,
    };
    if options.keep {
        stage.keep(narrator);
    }
    result
}

fn interrupted() -> Error {
    Error::new(Class::No, "interrupted", "the demo was interrupted")
}

/// Both servers and their folder. Dropping it stops and removes them; the order of the fields is the order of that.
struct Stage {
    source: Cluster,
    target: Cluster,
    folder: Folder,
}

impl Stage {
    async fn set(narrator: &dyn Narrator) -> Result<Self> {
        narrator.chapter("Two servers");
        let found = installation::find(&installation::starting_points());
        let (lowest, highest) = installation::choose(&found)?;
        let user = ServerUser::choose()?;
        let folder = Folder::create(user)?;
        // One after the other: the password file is written by both.
        let source = Cluster::start(Side::Source, &lowest, user, &folder).await?;
        let target = Cluster::start(Side::Target, &highest, user, &folder).await?;
        if lowest.major == highest.major {
            narrator.line("only one PostgreSQL version is on this machine; it plays both sides");
        }
        for cluster in [&source, &target] {
            schema::create_database(cluster).await?;
            narrator.line(&format!("{cluster} is up"));
        }
        Ok(Self { source, target, folder })
    }

    fn keep(self, narrator: &dyn Narrator) {
        narrator.chapter("Both servers stay up");
        for cluster in [&self.source, &self.target] {
            narrator.line(&format!("{}: psql '{}'", cluster.side().as_str(), cluster.url(DATABASE)));
        }
        let ids: Vec<String> =
            [self.source.keep(), self.target.keep()].into_iter().flatten().map(|id| id.to_string()).collect();
        let folder: PathBuf = self.folder.keep();
        narrator.line(&format!(
            "stop and remove them: kill -INT {} && sleep 2 && rm -rf {}",
            ids.join(" "),
            folder.display()
        ));
    }
}

async fn act(stage: &Stage, scale: Scale, narrator: &dyn Narrator) -> Result<()> {
    let Stage { source, target, folder } = stage;
    narrator.chapter("A shop on the source");
    let began = Instant::now();
    let sizes = schema::create(source, scale).await.doing(|| format!("filling {source}"))?;
    show_sizes(&sizes, began.elapsed(), narrator);

    narrator.chapter("Clients");
    let address = AddressFile::new(folder.path().join("address"));
    address.write(&address_of(source))?;
    let load = Load::start(address.clone(), scale);
    let load_began = Instant::now();
    narrator.line(&format!("{} clients write to the source all the time", super::load::CLIENTS));
    keep_watch(BASELINE, &load, narrator).await;

    narrator.chapter("pgtandem run");
    let switchboard = Switchboard::open(folder.path())?;
    let commands =
        Commands::prepare(folder.path(), &source.url(DATABASE), &target.url(DATABASE), switchboard.socket())?;
    let move_began = Instant::now();
    let mut daemon = commands.run()?;
    narrator.line(&format!("progress: {}", commands.page()));
    let mut watch = Watch::default();
    watch.until_ready(&commands, &mut daemon, narrator).await?;
    watch.show_copy(narrator);
    watch.follow(FOLLOW, &commands, &mut daemon, narrator).await?;

    narrator.chapter("pgtandem cutover");
    let before_cutover = load.acknowledged();
    let cutover_began = Instant::now();
    let moment = cut_over(stage, &commands, switchboard, &address, narrator).await?;
    let cutover_ended = Instant::now();
    keep_watch(AFTERWARDS, &load, narrator).await;
    let at_the_end = load.acknowledged();
    let load_ended = Instant::now();
    let record = load.stop().await?;
    narrator.line(&format!(
        "{} transactions were acknowledged since the cutover began",
        grouped(at_the_end - before_cutover)
    ));

    let ended = daemon.finish(END_DEADLINE).await?;
    if !ended.success() {
        return Err(lost_daemon(&commands, &format!("pgtandem run ended with {ended}")));
    }
    let write_pause = commands.status().await?.write_pause_seconds;

    narrator.chapter("Both sides, as of the switch");
    let comparison = compare::compare(&moment.source, &moment.target, |table| show_comparison(table, narrator)).await?;
    for line in comparison.different_sequences.iter().chain(&comparison.different_definitions) {
        narrator.line(line);
    }

    let now = target.connect(SUPERUSER, DATABASE).await?;
    let receipts = read_receipts(&now, &record, scale).await?;
    let samples = record.samples();
    let summary = Summary {
        versions: (source.major(), target.major()),
        data_bytes: sizes.iter().map(|table| table.bytes).sum(),
        copy: watch.copy(),
        stretches: Stretches {
            alone: figures(&samples, load_began, move_began),
            moving: figures(&samples, move_began, cutover_began),
            // The longest silence may reach beyond the command's own end.
            switching: figures(&samples, cutover_began, load_ended),
            after: figures(&samples, moment.switched.max(cutover_ended), load_ended),
        },
        longest_client_gap: longest_client_gap(&record, cutover_began, load_ended),
        max_lag: (watch.max_lag_seconds, watch.max_lag_bytes),
        write_pause_seconds: write_pause,
        look_took: moment.took,
        errors: record.errors.clone(),
        receipts,
        comparison,
    };
    narrator.chapter("Summary");
    for line in summary.lines() {
        narrator.line(&line);
    }
    summary.verdict()
}

fn longest_client_gap(record: &super::load::Record, from: Instant, to: Instant) -> Duration {
    record.clients.iter().map(|client| figures(&client.samples, from, to).longest_gap).max().unwrap_or_default()
}

fn address_of(cluster: &Cluster) -> String {
    format!(
        "host=127.0.0.1 port={} dbname={DATABASE} user={APPLICATION} password={} application_name=shop connect_timeout=5",
        cluster.port(),
        cluster.password()
    )
}

/// Runs the command, and meanwhile answers its hook.
async fn cut_over(
    stage: &Stage,
    commands: &Commands,
    switchboard: Switchboard,
    address: &AddressFile,
    narrator: &dyn Narrator,
) -> Result<Moment> {
    let new = address_of(&stage.target);
    let serve = switchboard.serve(&stage.source, &stage.target, address, &new);
    let mut serve = std::pin::pin!(serve);
    let command = commands.cutover(|line| narrator.line(line));
    let mut command = std::pin::pin!(command);
    let (moment, status) = tokio::select! {
        moment = &mut serve => (Some(moment?), command.await?),
        status = &mut command => (None, status?),
    };
    match moment {
        Some(moment) if status.success() => Ok(moment),
        Some(_) => Err(lost_daemon(commands, &format!("pgtandem cutover ended with {status} after the switch"))),
        None => Err(lost_daemon(commands, &format!("pgtandem cutover ended with {status} and did not call its hook"))),
    }
}

/// An error of the move, with what the daemon said last.
fn lost_daemon(commands: &Commands, what: &str) -> Error {
    Error::new(Class::No, "move_failed", format!("{what}; the daemon's last lines: {}", commands.last_words()))
        .hint(format!("start the demo with --keep and look into {}", commands.log().display()))
}

/// Lets the clients run, and shows that they do.
async fn keep_watch(length: Duration, load: &Load, narrator: &dyn Narrator) {
    let end = Instant::now() + length;
    while Instant::now() < end {
        tokio::time::sleep(LOOK).await;
        narrator.live(&format!("{} transactions acknowledged", grouped(load.acknowledged())));
    }
}

/// What was seen of the move while it ran.
#[derive(Default)]
struct Watch {
    last: Status,
    copy_began: Option<Instant>,
    copy_ended: Option<Instant>,
    max_lag_seconds: f64,
    max_lag_bytes: u64,
}

impl Watch {
    async fn until_ready(&mut self, commands: &Commands, daemon: &mut Daemon, narrator: &dyn Narrator) -> Result<()> {
        let deadline = Instant::now() + READY_DEADLINE;
        while !(self.last.phase == "follow" && self.last.ready) {
            self.look(commands, daemon, narrator).await?;
            if Instant::now() > deadline {
                return Err(lost_daemon(commands, &format!("the move was not ready within {READY_DEADLINE:?}")));
            }
        }
        Ok(())
    }

    async fn follow(
        &mut self,
        length: Duration,
        commands: &Commands,
        daemon: &mut Daemon,
        narrator: &dyn Narrator,
    ) -> Result<()> {
        let end = Instant::now() + length;
        while Instant::now() < end {
            self.look(commands, daemon, narrator).await?;
            self.max_lag_seconds = self.max_lag_seconds.max(self.last.lag_seconds.unwrap_or(0.0));
            self.max_lag_bytes = self.max_lag_bytes.max(self.last.lag_bytes.unwrap_or(0));
        }
        Ok(())
    }

    async fn look(&mut self, commands: &Commands, daemon: &mut Daemon, narrator: &dyn Narrator) -> Result<()> {
        tokio::time::sleep(LOOK).await;
        if let Some(status) = daemon.ended()? {
            return Err(lost_daemon(commands, &format!("pgtandem run ended with {status}")));
        }
        let Some(status) = commands.poll().await else { return Ok(()) };
        if status.phase == "failed" {
            let why = status.error.as_deref().unwrap_or("without saying why");
            return Err(lost_daemon(commands, &format!("the move failed: {why}")));
        }
        self.note_copy(&status.phase);
        narrator.live(&describe(&status));
        self.last = status;
        Ok(())
    }

    fn note_copy(&mut self, phase: &str) {
        match (phase, self.copy_began) {
            ("copy", None) => self.copy_began = Some(Instant::now()),
            ("copy", Some(_)) => {}
            (_, Some(_)) if self.copy_ended.is_none() => self.copy_ended = Some(Instant::now()),
            _ => {}
        }
    }

    /// Bytes, rows and duration of the copy, as seen in the status.
    fn copy(&self) -> super::summary::Copy {
        let length = match (self.copy_began, self.copy_ended) {
            (Some(began), Some(ended)) => ended - began,
            _ => Duration::ZERO,
        };
        super::summary::Copy { bytes: self.last.bytes_done, rows: self.last.rows_done, length }
    }

    fn show_copy(&self, narrator: &dyn Narrator) {
        narrator.line(&self.copy().to_string());
        narrator.line("the target follows; the clients go on");
    }
}

/// One line on where the move stands.
fn describe(status: &Status) -> String {
    let lag = || {
        format!(
            "lag {} and {:.1} s, {} transactions applied",
            human_bytes(status.lag_bytes.unwrap_or(0)),
            status.lag_seconds.unwrap_or(0.0),
            grouped(status.transactions)
        )
    };
    let more = match status.phase.as_str() {
        "copy" => format!(
            "{} of {}, {} of {} tables, {} rows",
            human_bytes(status.bytes_done),
            human_bytes(status.bytes_total),
            status.tables_done,
            status.tables_total,
            grouped(status.rows_done)
        ),
        "catchup" | "follow" | "cutover" => lag(),
        _ => String::new(),
    };
    let error = status.error.as_deref().map(|error| format!("; {error}")).unwrap_or_default();
    format!("{:<9} {more}{error}", status.phase).trim_end().to_owned()
}

fn show_sizes(sizes: &[TableSize], took: Duration, narrator: &dyn Narrator) {
    narrator.line(&format!("{:<22} {:>12} {:>12}", "table", "rows", "size"));
    for table in sizes {
        narrator.line(&format!(
            "{:<22} {:>12} {:>12}",
            table.name.plain(),
            grouped(table.rows),
            human_bytes(table.bytes)
        ));
    }
    let (rows, bytes) = sizes.iter().fold((0, 0), |sum, table| (sum.0 + table.rows, sum.1 + table.bytes));
    narrator.line(&format!("{:<22} {:>12} {:>12}", "all, with indexes", grouped(rows), human_bytes(bytes)));
    narrator.line(&format!("filled in {:.1} s", took.as_secs_f64()));
}

fn show_comparison(table: &TableComparison, narrator: &dyn Narrator) {
    let rows = |rows: Option<u64>| rows.map_or("missing".to_owned(), grouped);
    let (source, target) = (rows(table.source_rows), rows(table.target_rows));
    let verdict = if table.equal { "equal" } else { "DIFFERENT" };
    narrator.line(&format!("{:<22} {source:>12} {target:>12}  {verdict}", table.name.plain()));
    for difference in &table.differences {
        narrator.line(&format!("    {difference}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_on_a_phase_shows_what_matters_in_it() {
        let copying = Status { phase: "copy".into(), bytes_done: 1024, bytes_total: 2048, ..Status::default() };
        assert_eq!(describe(&copying), "copy      1.0 KiB of 2.0 KiB, 0 of 0 tables, 0 rows");
        let following = Status { phase: "follow".into(), lag_bytes: Some(5), transactions: 1200, ..Status::default() };
        assert_eq!(describe(&following), "follow    lag 5 B and 0.0 s, 1,200 transactions applied");
        let failed = Status { phase: "paused".into(), error: Some("disk full".into()), ..Status::default() };
        assert_eq!(describe(&failed), "paused    ; disk full");
    }

    #[test]
    fn the_copy_lasts_from_its_first_sight_to_the_next_phase() {
        let mut watch = Watch::default();
        for phase in ["schema", "copy", "copy", "catchup"] {
            watch.note_copy(phase);
        }
        let (began, ended) = (watch.copy_began.unwrap(), watch.copy_ended.unwrap());
        watch.note_copy("follow");
        assert_eq!((watch.copy_began, watch.copy_ended), (Some(began), Some(ended)));
    }
}
