//! What was disabled on the target until the cutover, with the statements that bring it back exactly as it was.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::{Store, fence_sql, only_the_leader, preparing_sql};
use crate::error::{Doing, Result};
use crate::postgres::quote_literal;

/// One trigger, rule or event trigger.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HeldBack {
    /// For people: `trigger touch on public.orders`.
    pub what: String,
    /// Brings back the state that it had on the source.
    pub enable: String,
    /// Takes it out of service again.
    pub disable: String,
}

/// Disables these, in order, and writes them down: a part of a transaction. One that is written down already gives way.
#[must_use]
pub fn hold_back_sql(move_name: &str, objects: &[HeldBack]) -> String {
    let each = objects
        .iter()
        .map(|object| format!("{}; {}", object.disable, noted_sql(move_name, std::slice::from_ref(object))));
    each.collect::<Vec<_>>().join(";\n")
}

/// Writes down what is disabled already.
fn noted_sql(move_name: &str, objects: &[HeldBack]) -> String {
    let name = quote_literal(move_name);
    let each = objects.iter().map(|HeldBack { what, enable, disable }| {
        let [what, enable, statement] = [what, enable, disable].map(|text| quote_literal(text));
        format!(
            "DELETE FROM pgtandem.held_back WHERE move = {name} AND what = {what};
             INSERT INTO pgtandem.held_back (move, ordinal, what, enable, disable)
             SELECT {name}, COALESCE(max(ordinal), 0) + 1, {what}, {enable}, {statement}
             FROM pgtandem.held_back WHERE move = {name}"
        )
    });
    each.collect::<Vec<_>>().join(";\n")
}

/// Narrows to those rows whose statements we made for event triggers.
const EVENT_TRIGGERS: &str = "AND disable LIKE 'ALTER EVENT TRIGGER %'";

impl Store {
    /// Disables these, in order, and writes them down, in one transaction.
    ///
    /// # Errors
    /// The connection's; the target's refusal.
    pub async fn hold_back(&self, objects: &[HeldBack]) -> Result<()> {
        if objects.is_empty() {
            return Ok(());
        }
        let sql = hold_back_sql(self.name.as_str(), objects);
        self.execute(&format!("BEGIN; {sql}; COMMIT")).await.doing(|| "disabling triggers and rules until the cutover")
    }

    /// Of the triggers and rules that are `known`, the cutover is to bring back these, and no others. They are disabled already,
    /// so that no lock of a table is asked for beside the applier. As [`Store::release_in_cutover`] it happens only while the cutover is
    /// `preparing`.
    ///
    /// # Errors
    /// The connection's; the target's refusal; class retry if the move is not of this epoch any more.
    pub async fn hold_back_instead(
        &self,
        cutover: i64,
        epoch: i64,
        objects: &[HeldBack],
        known: &HashSet<String>,
    ) -> Result<()> {
        let known = known.iter().map(|what| quote_literal(what)).collect::<Vec<_>>().join(", ");
        let fence = fence_sql(self.name.as_str(), epoch);
        let done = self
            .execute(&format!(
                "BEGIN; SET LOCAL lock_timeout = '5s';
             {};
             DELETE FROM pgtandem.held_back WHERE move = {}
                 AND what = ANY (ARRAY[{known}]::text[]);
             {}; {fence}; COMMIT",
                preparing_sql(cutover),
                quote_literal(self.name.as_str()),
                noted_sql(self.name.as_str(), objects)
            ))
            .await;
        done.map_err(only_the_leader).doing(|| "holding back the triggers and rules as they are on the source")
    }

    /// Brings back everything that was held back, in one transaction and one round trip, the last one first. Can be repeated.
    ///
    /// # Errors
    /// The connection's; the target's refusal, after which nothing is changed.
    pub async fn release_held_back(&self) -> Result<()> {
        self.execute(&self.release()).await.doing(|| "enabling triggers and rules")
    }

    /// The same inside the write pause of a cutover: gives up on a lock after `lock`, and on the whole at `deadline`.
    ///
    /// It happens only while the cutover is `preparing` and the move is this daemon's. A network may deliver it late, when
    /// the cutover was given up: it then finds [`Store::abort_cutover`]'s word, and changes nothing.
    ///
    /// # Errors
    /// As [`Store::release_held_back`]; class retry when a lock was not to be had, or the move is another daemon's.
    pub async fn release_in_cutover(&self, cutover: i64, epoch: i64, lock: Duration, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis().max(1);
        let released = self
            .execute(&format!(
                "BEGIN; SET LOCAL lock_timeout = {}; SET LOCAL statement_timeout = {left};
                 {}; {}; {}; COMMIT",
                lock.as_millis().max(1),
                preparing_sql(cutover),
                fence_sql(self.name.as_str(), epoch),
                self.release()
            ))
            .await;
        released.map_err(only_the_leader).doing(|| "enabling triggers and rules on the target")
    }

    /// Undoes [`Store::release_held_back`] and closes the cutover as given up, both or neither. Can be repeated.
    ///
    /// # Errors
    /// As there; class retry if the move is another daemon's, or readers of the target keep a table locked.
    pub async fn abort_cutover(&self, cutover: i64, epoch: i64, cause: &serde_json::Value) -> Result<()> {
        let aborted = self
            .execute(&format!(
                "BEGIN; SET LOCAL lock_timeout = '2s';
                 {};
                 UPDATE pgtandem.cutover SET state = 'aborted', error = {} WHERE id = {cutover};
                 {}; COMMIT",
                fence_sql(self.name.as_str(), epoch),
                quote_literal(&cause.to_string()),
                self.each_held_back("disable", "", "ASC")
            ))
            .await;
        aborted.map_err(only_the_leader).doing(|| "disabling triggers and rules again")
    }

    /// What is held back, in words.
    ///
    /// # Errors
    /// The connection's.
    pub async fn held_back(&self) -> Result<Vec<String>> {
        Ok(self.held_back_objects().await?.into_iter().map(|object| object.what).collect())
    }

    /// What is held back, in the order of disabling.
    ///
    /// # Errors
    /// The connection's.
    pub async fn held_back_objects(&self) -> Result<Vec<HeldBack>> {
        let session = self.session().await?;
        let rows = session
            .get()?
            .query(
                "SELECT what, enable, disable FROM pgtandem.held_back WHERE move = $1 ORDER BY ordinal",
                &[&self.name.as_str()],
            )
            .await
            .doing(|| "reading what is held back")?;
        rows.iter()
            .map(|row| Ok(HeldBack { what: row.try_get(0)?, enable: row.try_get(1)?, disable: row.try_get(2)? }))
            .collect()
    }

    /// The schema of the target is being restored in steps that a death would leave half done, or is whole again.
    ///
    /// # Errors
    /// The connection's.
    pub async fn set_schema_unfinished(&self, unfinished: bool) -> Result<()> {
        self.update(&format!("schema_unfinished = {unfinished}")).await
    }

    /// Remembers that the schema is being restored in shares, each of which is there whole or not at all.
    ///
    /// # Errors
    /// The connection's.
    pub async fn set_schema_in_shares(&self, in_shares: bool) -> Result<()> {
        self.update(&format!("schema_in_shares = {in_shares}")).await
    }

    /// Whether a restore of the schema was begun and not finished: without a transaction, and in shares.
    ///
    /// # Errors
    /// The connection's.
    pub async fn schema_begun(&self) -> Result<(bool, bool)> {
        let session = self.session().await?;
        let sql = "SELECT schema_unfinished, schema_in_shares FROM pgtandem.move WHERE name = $1";
        let row =
            session.get()?.query_opt(sql, &[&self.name.as_str()]).await.doing(|| "reading the state of the schema")?;
        row.map_or(Ok((false, false)), |row| Ok((row.try_get(0)?, row.try_get(1)?)))
    }

    /// The statements that disable and enable the event triggers among what is held back, which would react to a DDL
    /// statement of ours. Both belong around it, in one transaction: nobody else then ever sees them disabled.
    #[must_use]
    pub fn around_event_triggers(&self) -> [String; 2] {
        ["disable", "enable"].map(|column| self.each_held_back(column, EVENT_TRIGGERS, "ASC"))
    }

    /// One transaction. The event triggers come back last, and are first taken out of service by a repetition.
    fn release(&self) -> String {
        let [disable, _] = self.around_event_triggers();
        format!("{disable}; {}", self.each_held_back("enable", "", "DESC"))
    }

    /// Runs one column of every row. What was dropped since then has nothing to enable: a schema change took it along.
    fn each_held_back(&self, column: &str, which: &str, direction: &str) -> String {
        format!(
            "DO $held_back$
             DECLARE
                 statement text;
             BEGIN
                 FOR statement IN
                     SELECT {column} FROM pgtandem.held_back WHERE move = {name} {which} ORDER BY ordinal {direction}
                 LOOP
                     BEGIN
                         EXECUTE statement;
                     EXCEPTION WHEN undefined_table OR undefined_column OR undefined_object OR invalid_schema_name THEN
                         RAISE WARNING 'not there any more: %', statement;
                     END;
                 END LOOP;
             END $held_back$",
            name = quote_literal(self.name.as_str())
        )
    }
}
