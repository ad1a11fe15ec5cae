//! Statements in flight to the target: sent without waiting for each answer, and each answer read.
//!
//! Two chunks of statements are under way at most, so that neither side ever waits for the other to read: the answers
//! to two chunks fit into the sockets' buffers.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use postgres_protocol::message::{backend, frontend};

use super::change::{Change, Missing, Operation, Position};
use super::relation::Plan;
use crate::error::{Class, Error, Result};
use crate::postgres::wire::{self, TextRow, Wire};

/// Statements are sent once they make up this much, in bytes.
const CHUNK: usize = 64 * 1024;

/// So many statements are kept prepared; beyond, all are given up and made again as needed.
const PREPARED: usize = 2000;

/// What a statement does, for its answer and for errors.
#[derive(Clone, Debug)]
pub(super) enum Purpose {
    /// One row of a table.
    Row { operation: Operation, plan: Arc<Plan>, at: Position },
    /// So many rows of a table.
    Set { set: Set, plan: Arc<Plan>, rows: u64 },
    /// Our own: BEGIN, progress.
    Own(&'static str),
}

impl Purpose {
    pub(super) fn row(change: &Change) -> Self {
        Self::Row { operation: change.operation(), plan: Arc::clone(&change.plan), at: change.at }
    }
}

/// Which prepared statement.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum StatementKey {
    /// A change of a row: the shape of the relation, and which columns the statement leaves out or finds NULL.
    Row { generation: u64, operation: Operation, mask: Vec<bool> },
    /// Changes of many rows: the shape of the relation, and the columns that the statement sets.
    Set { generation: u64, set: Set, columns: Vec<usize> },
    /// By its text.
    Text(Arc<str>),
    /// Our own.
    Own(&'static str),
}

/// Which statement for many rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Set {
    Delete,
    Update,
    DeleteAlike,
    UpdateAlike,
    Copy,
}

impl Set {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Delete | Self::DeleteAlike => "deletes",
            Self::Update | Self::UpdateAlike => "updates",
            Self::Copy => "inserts",
        }
    }
}

/// See the module's first lines.
pub(super) struct Pipeline {
    wire: Wire,
    pending: VecDeque<Purpose>,
    /// How many of the pending statements were encoded since the last chunk was sent.
    encoded: usize,
    prepared: HashMap<StatementKey, u32>,
    next_statement: u32,
    missing: Vec<Missing>,
    /// The count of the last answer to one of our own statements.
    own_count: u64,
    /// A statement for a set that found another number of rows than it should.
    mismatch: Option<Mismatch>,
    /// The table whose statement the server refused last.
    refused: Option<Arc<Plan>>,
    /// Where the COPY data begins that is being written, in the outbound buffer.
    copying: usize,
    /// See [`Pipeline::guide`].
    guided: bool,
}

/// See [`Pipeline::take_mismatch`].
#[derive(Debug)]
pub(super) struct Mismatch {
    pub plan: Arc<Plan>,
    pub what: &'static str,
    pub expected: u64,
    pub found: u64,
}

impl Pipeline {
    pub(super) fn new(wire: Wire) -> Self {
        Self {
            wire,
            pending: VecDeque::new(),
            encoded: 0,
            prepared: HashMap::new(),
            next_statement: 0,
            missing: Vec::new(),
            own_count: 0,
            mismatch: None,
            refused: None,
            copying: 0,
            guided: false,
        }
    }

    /// Of the session on the target.
    pub(super) fn process_id(&self) -> i32 {
        self.wire.process_id()
    }

    /// Sets whether statements are guided; whether they were.
    pub(super) fn replace_guided(&mut self, guided: bool) -> bool {
        std::mem::replace(&mut self.guided, guided)
    }

    /// What was said in the transaction, or since the savepoint, was rolled back.
    pub(super) fn unguided(&mut self) {
        self.guided = false;
    }

    /// Encodes one statement. `sql` is asked for the text the first time that `key` comes.
    pub(super) async fn execute<'v>(
        &mut self,
        key: StatementKey,
        sql: impl FnOnce() -> String,
        values: impl ExactSizeIterator<Item = Option<&'v [u8]>>,
        purpose: Purpose,
    ) -> Result<()> {
        let statement = match self.prepared.get(&key) {
            Some(&statement) => statement,
            None => self.prepare(key, &sql())?,
        };
        let out = self.wire.outbound();
        bind(statement, values, out)?;
        // Execute the unnamed portal, all rows.
        out.put_slice(b"E\0\0\0\x09\0\0\0\0\0");
        self.pending.push_back(purpose);
        self.encoded += 1;
        if self.wire.outbound().len() >= CHUNK { self.send().await } else { Ok(()) }
    }

    fn prepare(&mut self, key: StatementKey, sql: &str) -> Result<u32> {
        if self.prepared.len() >= PREPARED {
            for statement in self.prepared.values() {
                frontend::close(b'S', &format!("s{statement}"), self.wire.outbound())?;
            }
            self.prepared.clear();
        }
        let statement = self.next_statement;
        self.next_statement += 1;
        frontend::parse(&format!("s{statement}"), sql, [], self.wire.outbound())?;
        self.prepared.insert(key, statement);
        Ok(statement)
    }

    /// Begins a COPY into a table. Until [`Pipeline::end_copy`] nothing but [`Pipeline::copy_row`] may follow.
    ///
    /// The rows go out without waiting for the word that the server takes them: if it does not, it passes over them.
    pub(super) async fn begin_copy(
        &mut self,
        key: StatementKey,
        sql: impl FnOnce() -> String,
        purpose: Purpose,
    ) -> Result<()> {
        self.execute(key, sql, std::iter::empty(), purpose).await?;
        self.begin_copy_data();
        Ok(())
    }

    fn begin_copy_data(&mut self) {
        let out = self.wire.outbound();
        self.copying = out.len();
        out.put_slice(b"d\0\0\0\0");
    }

    /// The length of the COPY data that is being written is known now.
    fn end_copy_data(&mut self) {
        let start = self.copying;
        let out = self.wire.outbound();
        let length = u32::try_from(out.len() - start - 1).unwrap_or(u32::MAX);
        if let Some(field) = out.get_mut(start + 1..start + 5) {
            field.copy_from_slice(&length.to_be_bytes());
        }
    }

    /// Appends one row in the format of the COPY.
    pub(super) async fn copy_row(&mut self, write: impl FnOnce(&mut BytesMut) -> Result<()>) -> Result<()> {
        write(self.wire.outbound())?;
        if self.wire.outbound().len() >= CHUNK {
            self.end_copy_data();
            self.wire.flush().await?;
            self.begin_copy_data();
        }
        Ok(())
    }

    pub(super) fn end_copy(&mut self) {
        self.end_copy_data();
        self.wire.outbound().put_slice(b"c\0\0\0\x04");
    }

    /// Takes up the connection again after the server refused a statement: what followed it was passed over. The transaction
    /// can only be rolled back, as a whole or to a savepoint.
    pub(super) async fn recover(&mut self) -> Result<()> {
        // Whole messages only, and the server would pass over them.
        self.wire.outbound().clear();
        frontend::sync(self.wire.outbound());
        // Which of these it still knows is not known: whatever came after the refusal was not prepared.
        for statement in self.prepared.values() {
            frontend::close(b'S', &format!("s{statement}"), self.wire.outbound())?;
        }
        self.prepared.clear();
        self.wire.flush().await?;
        while self.wire.frame().await?.tag != backend::READY_FOR_QUERY_TAG {}
        self.pending.clear();
        self.encoded = 0;
        self.guided = false;
        Ok(())
    }

    /// The first statement for a set, since the last call, that found another number of rows than it should.
    pub(super) fn take_mismatch(&mut self) -> Option<Mismatch> {
        self.mismatch.take()
    }

    /// The table whose statement was refused, if it was one of a table.
    pub(super) fn take_refused(&mut self) -> Option<Arc<Plan>> {
        self.refused.take()
    }

    /// Sends what is encoded, and reads the answers to the chunk before it.
    pub(super) async fn send(&mut self) -> Result<()> {
        // The rows of a COPY are no statement: its statement may be out already, and its end not.
        if self.encoded == 0 && self.wire.outbound().is_empty() {
            return Ok(());
        }
        frontend::flush(self.wire.outbound());
        self.wire.flush().await?;
        let before = self.pending.len() - self.encoded;
        self.encoded = 0;
        self.answers(before).await
    }

    /// Sends what is encoded and reads every answer. Then the server waits for us.
    pub(super) async fn settle(&mut self) -> Result<()> {
        self.send().await?;
        self.answers(self.pending.len()).await
    }

    /// Reads every answer, then runs statements by the simple protocol, inside the transaction if one is open; the rows of
    /// the last one that has any.
    pub(super) async fn query(&mut self, sql: &str) -> Result<Vec<TextRow>> {
        self.settle().await?;
        self.wire.query(sql).await
    }

    /// Reads every answer, then runs one statement. A text that holds another one behind it is refused by the server.
    pub(super) async fn one(&mut self, sql: &str) -> Result<()> {
        self.settle().await?;
        let out = self.wire.outbound();
        frontend::parse("", sql, [], out)?;
        // Bind the unnamed statement to the unnamed portal, without values; execute it.
        out.put_slice(b"B\0\0\0\x0c\0\0\0\0\0\0\0\0E\0\0\0\x09\0\0\0\0\0");
        frontend::sync(out);
        self.wire.flush().await?;
        let mut outcome = Ok(());
        loop {
            let frame = self.wire.frame().await?;
            match frame.tag {
                backend::ERROR_RESPONSE_TAG => outcome = Err(wire::error_of(&frame.body)),
                backend::READY_FOR_QUERY_TAG => return outcome,
                _ => {}
            }
        }
    }

    /// Ends the transaction: COMMIT, and the word that it is durable.
    pub(super) async fn commit(&mut self) -> Result<()> {
        self.execute(StatementKey::Own("COMMIT"), || "COMMIT".to_owned(), std::iter::empty(), Purpose::Own("COMMIT"))
            .await?;
        frontend::sync(self.wire.outbound());
        self.encoded = 0;
        self.wire.flush().await?;
        self.answers(self.pending.len()).await?;
        self.wire.finish().await.map(drop)
    }

    /// Rows that were not found since the last call.
    pub(super) fn take_missing(&mut self) -> Vec<Missing> {
        std::mem::take(&mut self.missing)
    }

    /// How many rows were not found.
    pub(super) fn missing(&self) -> usize {
        self.missing.len()
    }

    /// What was not found beyond so many was undone.
    pub(super) fn forget_missing(&mut self, beyond: usize) {
        self.missing.truncate(beyond);
        self.mismatch = None;
    }

    /// How many rows the last of our own statements touched.
    pub(super) fn own_count(&self) -> u64 {
        self.own_count
    }

    async fn answers(&mut self, mut count: usize) -> Result<()> {
        while count > 0 {
            let frame = self.wire.frame().await?;
            match frame.tag {
                backend::COMMAND_COMPLETE_TAG => {
                    let purpose = self.pending.pop_front().ok_or_else(|| Error::bug("an answer to no statement"))?;
                    self.answered(purpose, wire::affected(&frame.body))?;
                    count -= 1;
                }
                backend::ERROR_RESPONSE_TAG => return Err(self.failed(wire::error_of(&frame.body))),
                backend::PARSE_COMPLETE_TAG
                | backend::BIND_COMPLETE_TAG
                | backend::CLOSE_COMPLETE_TAG
                | backend::COPY_IN_RESPONSE_TAG
                | backend::DATA_ROW_TAG
                | backend::NO_DATA_TAG => {}
                tag => return Err(wire::unexpected(tag, "applying")),
            }
        }
        Ok(())
    }

    fn answered(&mut self, purpose: Purpose, count: u64) -> Result<()> {
        match purpose {
            Purpose::Row { operation: operation @ (Operation::Update | Operation::Delete), plan, at } if count > 1 => {
                return Err(Error::new(
                    Class::Operator,
                    "row_ambiguous",
                    format!(
                        "{} of transaction {} (committed at {}) found {count} rows in table {} on the target instead of one",
                        operation.as_str(),
                        at.xid,
                        at.commit_lsn,
                        plan.name.plain()
                    ),
                )
                .hint("the target has lost the unique index that the source identifies rows by; nothing of the batch was applied"));
            }
            Purpose::Row { operation: operation @ (Operation::Update | Operation::Delete), plan, at } if count == 0 => {
                self.missing.push(Missing { table: plan.name.clone(), operation, at });
            }
            Purpose::Row { .. } => {}
            Purpose::Set { set, plan, rows } => {
                if count != rows && self.mismatch.is_none() {
                    self.mismatch = Some(Mismatch { plan, what: set.as_str(), expected: rows, found: count });
                }
            }
            Purpose::Own(_) => self.own_count = count,
        }
        Ok(())
    }

    fn failed(&mut self, error: Error) -> Error {
        match self.pending.front() {
            Some(Purpose::Row { operation, plan, at }) => error.doing(format!(
                "applying {} on table {} (transaction {} committed at {})",
                operation.as_str(),
                plan.name.plain(),
                at.xid,
                at.commit_lsn
            )),
            Some(Purpose::Set { set, plan, rows }) => {
                self.refused = Some(Arc::clone(plan));
                error.doing(format!("applying {rows} {} together on table {}", set.as_str(), plan.name.plain()))
            }
            Some(Purpose::Own(what)) => error.doing(format!("running {what} on the target")),
            None => error,
        }
    }
}

/// Binds text values to the unnamed portal.
fn bind<'v>(statement: u32, values: impl ExactSizeIterator<Item = Option<&'v [u8]>>, out: &mut BytesMut) -> Result<()> {
    let too_large = || Error::bug("a row is too large for one message");
    let start = out.len();
    out.put_u8(b'B');
    out.put_u32(0);
    out.put_u8(0);
    out.put_slice(format!("s{statement}").as_bytes());
    out.put_u8(0);
    // No format codes: all text.
    out.put_u16(0);
    out.put_u16(u16::try_from(values.len()).map_err(|_| too_large())?);
    for value in values {
        match value {
            None => out.put_i32(-1),
            Some(bytes) => {
                out.put_i32(i32::try_from(bytes.len()).map_err(|_| too_large())?);
                out.put_slice(bytes);
            }
        }
    }
    out.put_u16(0);
    let length = u32::try_from(out.len() - start - 1).ok().filter(|&l| l <= i32::MAX as u32).ok_or_else(too_large)?;
    if let Some(field) = out.get_mut(start + 1..start + 5) {
        field.copy_from_slice(&length.to_be_bytes());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bind_message_is_laid_out_as_the_protocol_says() {
        let mut out = BytesMut::new();
        bind(7, [Some(&b"ab"[..]), None].into_iter(), &mut out).unwrap();
        assert_eq!(&out[..], b"B\0\0\0\x18\0s7\0\0\0\0\x02\0\0\0\x02ab\xff\xff\xff\xff\0\0");
        assert_eq!(u32::from_be_bytes([out[1], out[2], out[3], out[4]]) as usize, out.len() - 1);
    }
}
