//! Putting the schema into the target, step by step. Each step can be repeated after a death at any moment.

use std::collections::HashSet;
use std::num::NonZeroUsize;

use futures_util::{StreamExt, TryStreamExt};

use super::allowed::{
    event_triggers_allowed, give_schema, of_event_trigger, refused_default_privileges, without_refused_grants,
};
use super::child::{Child, list_file};
use super::dump::schema_differs;
use super::existing::{Existing, invalid_indexes, is_proof};
use super::toc::{Entry, Step, plain_tables};
use super::{Archive, Programs, hold_back};
use crate::error::{Doing, Error, Result};
use crate::postgres::{Server, Session, leftovers};
use crate::state::Store;
use crate::telemetry::Telemetry;

/// What every pg_restore of ours is called on the target; see [`end_leftovers`].
pub(super) const RESTORE: &str = "restore";

/// A pg_restore that leaves nothing behind when it fails.
const ALL_OR_NOTHING: [&str; 1] = ["--single-transaction"];

/// So many tables are made in several sessions.
const WORTH_SHARING: usize = 200;

/// So many are made in one transaction, which keeps some four locks of each.
const LARGEST_SHARE: usize = 250;

/// Restores one archive into one target.
#[derive(Clone, Copy)]
pub struct Restorer<'a> {
    /// Where to.
    pub target: &'a Server,
    /// The state of the move, on the same server.
    pub store: &'a Store,
    /// The programs that wrote the archive.
    pub programs: &'a Programs,
    /// What is restored.
    pub archive: &'a Archive,
    /// Told what is being built.
    pub telemetry: &'a Telemetry,
}

impl Restorer<'_> {
    /// Whether the step before the data is complete: asked at a start in phase `schema`.
    ///
    /// # Errors
    /// The connection's.
    pub async fn is_restored(&self) -> Result<bool> {
        if self.store.schema_begun().await? != (false, false) {
            return Ok(false);
        }
        let session = self.session().await?;
        let existing = Existing::read(&session).await?;
        let mut proofs = self.archive.contents.of(Step::BeforeData).iter().filter(|entry| is_proof(entry)).peekable();
        Ok(proofs.peek().is_some() && proofs.all(|entry| existing.has(entry)))
    }

    /// Restores what rows need, in one transaction.
    ///
    /// A schema of many tables goes in in shares, `workers` of them at the same time; the state says so, and the next start adds what a
    /// death left out. One too large for the target's lock table goes in without a transaction; then the next start
    /// drops what a death left half done and begins again. That is safe because the target was empty.
    ///
    /// # Errors
    /// As [`super::failure`] reads them.
    pub async fn before_data(&self, workers: NonZeroUsize) -> Result<()> {
        self.telemetry.activity("restoring the schema");
        self.restore_before_data(workers.get()).await.doing(|| "restoring the schema before the data")
    }

    async fn restore_before_data(&self, workers: usize) -> Result<()> {
        let session = self.session().await?;
        end_leftovers(&session, self.target).await?;
        let existing = Existing::read(&session).await?;
        let (unfinished, in_shares) = self.store.schema_begun().await?;
        let (there, entries): (Vec<&Entry>, Vec<&Entry>) =
            self.archive.contents.of(Step::BeforeData).iter().partition(|entry| {
                entry.kind == "SCHEMA" && existing.has(entry) && (!unfinished || entry.tag == "public")
            });
        // First of all: once the rest is restored, nothing would tell that this is missing.
        let mut strangers = HashSet::new();
        for schema in there {
            if !give_schema(&session, &schema.tag, &schema.owner).await? {
                strangers.insert(format!("SCHEMA {}", schema.tag));
            }
        }
        let entries = entries.into_iter().filter(|entry| !takes_ownership(entry, &strangers)).collect();
        let entries = without_refused_grants(&session, entries).await?;
        if !unfinished {
            let (mut plain, others) = plain_tables(&entries);
            let restored = if in_shares || plain.len() >= WORTH_SHARING && workers > 1 {
                if in_shares {
                    plain.retain(|entry| !existing.has(entry));
                }
                self.restore_in_shares(&session, plain, &others, workers).await
            } else {
                self.restore(&session, &entries, &ALL_OR_NOTHING).await
            };
            match restored {
                Err(error) if error.code() == "out_of_locks" => self.store.set_schema_unfinished(true).await?,
                other => return other,
            }
        }
        self.restore(&session, &entries, &["--clean", "--if-exists"]).await?;
        self.store.set_schema_in_shares(false).await?;
        self.store.set_schema_unfinished(false).await
    }

    /// Schemas, then plain tables in several sessions, then the rest. Each share is there whole or not at all, so after a death or an
    /// error what is missing is added to what is there.
    async fn restore_in_shares(
        &self,
        session: &Session,
        mut plain: Vec<&Entry>,
        others: &[&Entry],
        workers: usize,
    ) -> Result<()> {
        self.store.set_schema_in_shares(true).await?;
        let (schemas, others): (Vec<&Entry>, Vec<&Entry>) = others.iter().partition(|entry| entry.kind == "SCHEMA");
        self.restore(session, &schemas, &ALL_OR_NOTHING).await?;
        let role: String = session.query_one("SELECT current_user::text", &[]).await?.try_get(0)?;
        // Whoever makes a table owns it, and one statement less for each is a tenth of the time.
        let ours = plain.iter().all(|entry| entry.owner == role);
        let options = ALL_OR_NOTHING.into_iter().chain(ours.then_some("--no-owner")).collect::<Vec<_>>();
        let shares = plain.chunks(plain.len().div_ceil(workers).clamp(1, LARGEST_SHARE));
        let restored = futures_util::stream::iter(shares)
            .map(|share| self.restore(session, share, &options))
            .buffer_unordered(workers)
            .try_collect::<()>()
            .await;
        if let Err(error) = restored {
            // Two at once may be in each other's way. If it is something else, it is told now.
            tracing::info!(%error, "the tables that are missing are made in one session");
            end_leftovers(session, self.target).await?;
            let existing = Existing::read(session).await?;
            plain.retain(|entry| !existing.has(entry));
            self.restore(session, &plain, &ALL_OR_NOTHING).await?;
        }
        self.restore(session, &others, &ALL_OR_NOTHING).await?;
        self.store.set_schema_in_shares(false).await
    }

    /// Builds keys, indexes, statistics objects and policies, `workers` at a time; what is there already is left alone.
    ///
    /// # Errors
    /// As [`super::failure`] reads them: duplicate keys, for one.
    pub async fn after_data(&self, workers: NonZeroUsize) -> Result<()> {
        self.telemetry.activity("building keys and indexes");
        let session = self.session().await?;
        end_leftovers(&session, self.target).await?;
        let entries = self.archive.contents.of(Step::AfterData);
        for index in invalid_indexes(&session, entries).await? {
            session
                .batch_execute(&format!("DROP INDEX {index}"))
                .await
                .doing(|| format!("dropping the unfinished index {}", index.plain()))?;
        }
        // Late, as in the archive: earlier they would add their grants to everything that is restored.
        let refused = refused_default_privileges(&session, &self.archive.default_privileges).await?;
        let wanted = |entry: &Entry| entry.kind != "DEFAULT ACL" || !refused.contains(&entry.object.1);
        self.restore_those_missing(&session, Step::AfterData, &[&format!("--jobs={workers}")], wanted)
            .await
            .doing(|| "building keys and indexes")
    }

    /// Fills the materialized views that are filled on the source and empty here, each after those that it reads.
    ///
    /// # Errors
    /// The target's refusal.
    pub async fn refresh_materialized_views(&self) -> Result<()> {
        let session = self.session().await?;
        let mut waiting = Vec::new();
        for view in &self.archive.materialized_views {
            let empty = session
                .query_opt(
                    "SELECT FROM pg_catalog.pg_class WHERE oid = pg_catalog.to_regclass($1) AND NOT relispopulated",
                    &[&view.to_string()],
                )
                .await
                .doing(|| "looking at the materialized views")?;
            if empty.is_some() {
                waiting.push(view);
            }
        }
        while !waiting.is_empty() {
            let before = waiting.len();
            let mut refused = None;
            let mut still = Vec::new();
            for view in waiting {
                self.telemetry.activity(&format!("filling {}", view.plain()));
                match session.batch_execute(&format!("REFRESH MATERIALIZED VIEW {view}")).await {
                    Ok(()) => {}
                    // It reads another one that has not been filled yet.
                    Err(e) if e.code().is_some_and(|code| code.code() == "55000") => {
                        refused = Some(Error::from(e).doing(format!("filling {}", view.plain())));
                        still.push(view);
                    }
                    Err(e) => return Err(Error::from(e).doing(format!("filling {}", view.plain()))),
                }
            }
            if let Some(error) = refused.filter(|_| still.len() == before) {
                return Err(error);
            }
            waiting = still;
        }
        Ok(())
    }

    /// Adds the foreign keys that are missing, each checked. The target must be a state that the source once had,
    /// and its role must be able to keep them from firing: [`can_set_replica_role`].
    ///
    /// # Errors
    /// As [`super::failure`] reads them.
    pub async fn foreign_keys(&self, workers: NonZeroUsize) -> Result<()> {
        self.telemetry.activity("adding foreign keys");
        let session = self.session().await?;
        end_leftovers(&session, self.target).await?;
        self.restore_missing(&session, Step::ForeignKeys, &[&format!("--jobs={workers}")])
            .await
            .doing(|| "adding the foreign keys")
    }

    /// Restores triggers, rules and event triggers, and disables every one of them until the cutover;
    /// [`Store::release_held_back`] brings them back. Nothing may be applied before this returned.
    ///
    /// # Errors
    /// As [`super::failure`] reads them; class operator where the role may not disable them.
    pub async fn hold_back(&self) -> Result<()> {
        self.telemetry.activity("holding back triggers and rules");
        let session = self.session().await?;
        end_leftovers(&session, self.target).await?;
        let event_triggers = event_triggers_allowed(&session).await?;
        let allowed = |entry: &Entry| event_triggers || !of_event_trigger(entry);
        for entry in self.archive.contents.of(Step::HeldBack).iter().filter(|entry| !allowed(entry)) {
            tracing::warn!("left out: {} {}: the target refuses event triggers to its role", entry.kind, entry.tag);
        }
        self.restore_those_missing(&session, Step::HeldBack, &ALL_OR_NOTHING, allowed)
            .await
            .doing(|| "restoring triggers and rules")?;
        let event_triggers: Vec<String> = self
            .archive
            .contents
            .of(Step::HeldBack)
            .iter()
            .filter(|entry| entry.kind == "EVENT TRIGGER")
            .map(|entry| entry.tag.clone())
            .collect();
        self.store.hold_back(&hold_back::find(&session, &event_triggers).await?).await
    }

    async fn restore_missing(&self, session: &Session, step: Step, options: &[&str]) -> Result<()> {
        self.restore_those_missing(session, step, options, |_| true).await
    }

    async fn restore_those_missing(
        &self,
        session: &Session,
        step: Step,
        options: &[&str],
        wanted: impl Fn(&Entry) -> bool,
    ) -> Result<()> {
        let existing = Existing::read(session).await?;
        let step = self.archive.contents.of(step);
        let entries: Vec<&Entry> = step.iter().filter(|entry| !existing.has(entry) && wanted(entry)).collect();
        self.restore(session, &entries, options).await
    }

    /// One run of pg_restore over these entries, in their order.
    async fn restore(&self, session: &Session, entries: &[&Entry], options: &[&str]) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let list = list_file(self.archive.folder(), entries.iter().map(|entry| entry.line.as_str()))?;
        let tablespaces = lacks_tablespaces(session, &self.archive.tablespaces).await?;
        Child::new(self.programs.pg_restore())
            .server(self.target, RESTORE)
            .args(["--no-password", "--exit-on-error", "--verbose"])
            .args(tablespaces.then_some("--no-tablespaces"))
            .args(options)
            .arg("--use-list")
            .arg(list.path())
            .database_argument()
            .arg(self.archive.file())
            .run_watched(|line| {
                if let Some(what) = being_built(line) {
                    self.telemetry.activity(what);
                }
            })
            .await
            .map(drop)
    }

    async fn session(&self) -> Result<Session> {
        self.target.connect("schema").await
    }
}

/// Whether only the owner of one of these schemas may restore the entry: its comment or its label.
fn takes_ownership(entry: &Entry, schemas: &HashSet<String>) -> bool {
    matches!(entry.kind.as_str(), "COMMENT" | "SECURITY LABEL") && schemas.contains(&entry.tag)
}

/// `INDEX orders_at` in `pg_restore: launching item 3158 INDEX orders_at`.
fn being_built(line: &str) -> Option<&str> {
    let (_, item) = line.strip_prefix("pg_restore: launching item ")?.split_once(' ')?;
    Some(item)
}

/// Tablespaces travel only if the target has each of them; else everything goes to the default one.
async fn lacks_tablespaces(target: &Session, used: &[String]) -> Result<bool> {
    let row = target
        .query_one(
            "SELECT EXISTS (SELECT unnest($1::text[]) EXCEPT SELECT spcname::text FROM pg_catalog.pg_tablespace)",
            &[&used],
        )
        .await
        .doing(|| "listing the target's tablespaces")?;
    Ok(row.try_get(0)?)
}

/// Ends what a killed pg_restore of this move left running.
pub(super) async fn end_leftovers(target: &Session, server: &Server) -> Result<()> {
    leftovers::end(target, &server.application_name(RESTORE)).await
}

/// Whether this role may keep foreign keys and ordinary triggers from firing for its own session: tried, not read.
///
/// # Errors
/// The connection's; a refusal is the answer `false`.
pub async fn can_set_replica_role(session: &Session) -> Result<bool> {
    let outcome = session.batch_execute("BEGIN; SET LOCAL session_replication_role = replica").await;
    session.batch_execute("ROLLBACK").await.doing(|| "probing session_replication_role")?;
    match outcome {
        Ok(()) => Ok(true),
        Err(e) if e.as_db_error().is_some() => Ok(false),
        Err(e) => Err(Error::from(e).doing("probing session_replication_role")),
    }
}

/// Entries of a step that the target lacks, for those who restored by hand.
impl Restorer<'_> {
    /// # Errors
    /// Class operator, naming the first missing objects.
    pub async fn require(&self, step: Step) -> Result<()> {
        let existing = Existing::read(&self.session().await?).await?;
        let missing: Vec<String> = self
            .archive
            .contents
            .of(step)
            .iter()
            .filter(|entry| is_proof(entry) && !existing.has(entry))
            .map(|entry| format!("{} {}", entry.kind, entry.plain()))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let first = missing.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
        Err(schema_differs(format!("the target lacks {} objects of the source: {first}", missing.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_being_built_is_read_from_the_programs_words() {
        assert_eq!(being_built("pg_restore: launching item 3158 INDEX orders_at"), Some("INDEX orders_at"));
        assert_eq!(being_built("pg_restore: finished item 3158 INDEX orders_at"), None);
    }
}
