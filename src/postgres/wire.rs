//! A connection that speaks the frontend/backend protocol itself, for the data paths: replication, COPY, apply.
//!
//! tokio-postgres serves control SQL well, but the data paths need what it does not offer: the replication
//! sub-protocol, rows forwarded without being looked at, and thousands of statements in flight whose every answer is
//! read. The codec and SCRAM are `postgres-protocol`'s, the crate below tokio-postgres. pgwire-replication's client
//! was the other choice; its SCRAM knows no channel binding, which we offer on every connection.
//!
//! A `Wire` has one owner and no task of its own: it reads when it is told to, so its owner decides the rhythm.
//! After an error it is good for nothing but being dropped, except where a method says otherwise.
//! See <https://www.postgresql.org/docs/current/protocol-message-formats.html>.

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::{backend, frontend};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::{Class, Doing, Error, Result};
use crate::postgres::failure::{ServerError, from_server};
use crate::postgres::server::PINNED_SETTINGS;
use crate::postgres::{Server, Stream, conninfo};

/// What kind of backend answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// An ordinary session with [`PINNED_SETTINGS`].
    Sql,
    /// A walsender of the database, with the same settings, which also takes replication commands.
    Replication,
}

/// How long a login may take where the connection string sets no limit.
const LOGIN_PATIENCE: Duration = Duration::from_secs(30);

/// How much room reads are given at a time, in bytes.
const READ_ROOM: usize = 256 * 1024;

/// Less room than this is not worth a read, in bytes. New room is a new block, and what was read into the old one keeps all of
/// it: a block for each read would multiply the memory of small messages.
const LEAST_ROOM: usize = 16 * 1024;

/// A buffer that grew beyond this is given back once messages are small again, in bytes.
const KEPT_ROOM: usize = 1024 * 1024;

/// No message of ours or theirs is longer, in bytes: a value has at most 1 GiB, a row a little more.
const LONGEST_MESSAGE: usize = 0x7fff_ffff;

/// See the module's first lines.
pub struct Wire {
    stream: Stream,
    inbound: BytesMut,
    outbound: BytesMut,
    process_id: i32,
}

/// One message of the backend, as it came.
#[derive(Debug)]
pub struct Frame {
    /// The kind of message.
    pub tag: u8,
    /// Its content, without kind and length.
    pub body: Bytes,
}

/// One row of a simple query, as text.
pub type TextRow = Vec<Option<String>>;

impl Wire {
    /// Connects, authenticates and pins the settings.
    ///
    /// `options` are settings for this session alone (name and value), on top of those of the connection string.
    ///
    /// # Errors
    /// As [`Server::connect`].
    pub async fn connect(server: &Server, role: &str, mode: Mode, options: &[(&str, &str)]) -> Result<Self> {
        let (stream, end_point, host) = server.open_stream().await?;
        let mut wire = Self {
            stream,
            inbound: BytesMut::with_capacity(READ_ROOM),
            outbound: BytesMut::with_capacity(READ_ROOM),
            process_id: 0,
        };
        let password = server.password(&host);
        let login = wire.log_in(server, role, mode, options, password.as_ref(), end_point);
        let limit = server.conninfo().connect_timeout().unwrap_or(LOGIN_PATIENCE);
        tokio::time::timeout(limit, login)
            .await
            .unwrap_or_else(|_| Err(Error::new(Class::Retry, "connect_timeout", "the server did not answer in time")))
            .doing(|| server.context(&host))?;
        // A walsender of a database takes SQL too, and prints values by the same settings.
        wire.query(PINNED_SETTINGS).await.doing(|| "pinning the settings").doing(|| server.context(&host))?;
        Ok(wire)
    }

    async fn log_in(
        &mut self,
        server: &Server,
        role: &str,
        mode: Mode,
        options: &[(&str, &str)],
        password: Option<&conninfo::Password>,
        end_point: Option<Vec<u8>>,
    ) -> Result<()> {
        let info = server.conninfo();
        let application_name = server.application_name(role);
        let options = startup_options(info.options(), options);
        let mut parameters = vec![
            ("user", info.user()),
            ("database", info.database()),
            ("application_name", &application_name),
            ("client_encoding", "UTF8"),
        ];
        if !options.is_empty() {
            parameters.push(("options", &options));
        }
        if mode == Mode::Replication {
            parameters.push(("replication", "database"));
        }
        frontend::startup_message(parameters, &mut self.outbound)?;
        self.flush().await?;
        self.authenticate(info, password, end_point).await?;
        loop {
            let frame = self.frame().await?;
            match frame.tag {
                backend::BACKEND_KEY_DATA_TAG => self.process_id = (&*frame.body).try_get_i32().unwrap_or(0),
                backend::READY_FOR_QUERY_TAG => return Ok(()),
                // A newer minor version of the protocol was offered; 3.0 is what we speak.
                b'v' => {}
                backend::ERROR_RESPONSE_TAG => return Err(error_of(&frame.body)),
                tag => return Err(unexpected(tag, "the beginning of a session")),
            }
        }
    }

    async fn authenticate(
        &mut self,
        info: &conninfo::ConnInfo,
        password: Option<&conninfo::Password>,
        channel_binding: Option<Vec<u8>>,
    ) -> Result<()> {
        let secret = || {
            password.map(|p| p.expose().as_bytes()).ok_or_else(|| {
                Error::new(Class::Wait, "no_password", "the server asks for a password and none is given")
                    .hint("put it into the connection string, or into the file of PGPASSFILE or ~/.pgpass")
            })
        };
        let must_bind = info.channel_binding() == conninfo::ChannelBinding::Require;
        let unbound = |how: &str| {
            Error::new(
                Class::Wait,
                "channel_binding_impossible",
                format!("channel_binding=require, but the server asks for {how}"),
            )
            .hint("use TLS and scram-sha-256 on the server, or channel_binding=prefer")
        };
        let mut bound = false;
        loop {
            let frame = self.frame().await?;
            if frame.tag == backend::ERROR_RESPONSE_TAG {
                return Err(error_of(&frame.body));
            }
            if frame.tag != backend::AUTHENTICATION_TAG {
                return Err(unexpected(frame.tag, "authentication"));
            }
            let mut body = &*frame.body;
            match body.try_get_i32().unwrap_or(-1) {
                0 if must_bind && !bound => return Err(unbound("no SCRAM authentication")),
                0 => return Ok(()),
                3 if must_bind => return Err(unbound("a plain password")),
                3 => frontend::password_message(secret()?, &mut self.outbound)?,
                5 if must_bind => return Err(unbound("an MD5 password")),
                5 => {
                    let salt = body.try_into().map_err(|_| unexpected(frame.tag, "authentication"))?;
                    let hash = md5_hash(info.user().as_bytes(), secret()?, salt);
                    frontend::password_message(hash.as_bytes(), &mut self.outbound)?;
                }
                10 => {
                    self.scram(body, secret()?, info.channel_binding(), channel_binding.clone()).await?;
                    bound = true;
                    continue;
                }
                other => {
                    return Err(Error::new(
                        Class::Wait,
                        "authentication_unsupported",
                        format!(
                            "the server asks for an authentication method that pgtandem does not speak (code {other})"
                        ),
                    )
                    .hint("let pg_hba.conf ask for scram-sha-256, md5, password or a client certificate"));
                }
            }
            self.flush().await?;
        }
    }

    /// SCRAM-SHA-256, with the channel bound to the server's certificate wherever both sides can.
    async fn scram(
        &mut self,
        mechanisms: &[u8],
        password: &[u8],
        policy: conninfo::ChannelBinding,
        certificate: Option<Vec<u8>>,
    ) -> Result<()> {
        let offered = |name: &str| mechanisms.split(|&b| b == 0).any(|m| m == name.as_bytes());
        let plus = offered(sasl::SCRAM_SHA_256_PLUS);
        let (binding, mechanism) = match (policy, certificate) {
            (conninfo::ChannelBinding::Disable, _) => (sasl::ChannelBinding::unsupported(), sasl::SCRAM_SHA_256),
            (_, Some(certificate)) if plus => {
                (sasl::ChannelBinding::tls_server_end_point(certificate), sasl::SCRAM_SHA_256_PLUS)
            }
            (conninfo::ChannelBinding::Require, _) => {
                return Err(Error::new(
                    Class::Wait,
                    "channel_binding_impossible",
                    "channel_binding=require, but the connection offers none",
                )
                .hint("use sslmode=require or stronger against a server with scram-sha-256"));
            }
            (_, Some(_)) => (sasl::ChannelBinding::unrequested(), sasl::SCRAM_SHA_256),
            (_, None) => (sasl::ChannelBinding::unsupported(), sasl::SCRAM_SHA_256),
        };
        if mechanism == sasl::SCRAM_SHA_256 && !offered(sasl::SCRAM_SHA_256) {
            return Err(Error::new(Class::Wait, "authentication_unsupported", "the server offers no SCRAM-SHA-256"));
        }
        let mut scram = sasl::ScramSha256::new(password, binding);
        frontend::sasl_initial_response(mechanism, scram.message(), &mut self.outbound)?;
        self.flush().await?;
        let refused = |e: std::io::Error| Error::new(Class::Wait, "scram_failed", format!("SCRAM failed: {e}"));
        scram.update(&self.sasl_step(11).await?).map_err(refused)?;
        frontend::sasl_response(scram.message(), &mut self.outbound)?;
        self.flush().await?;
        scram.finish(&self.sasl_step(12).await?).map_err(refused)
    }

    async fn sasl_step(&mut self, expected: i32) -> Result<Bytes> {
        let mut frame = self.frame().await?;
        match frame.tag {
            backend::ERROR_RESPONSE_TAG => Err(error_of(&frame.body)),
            backend::AUTHENTICATION_TAG if frame.body.try_get_i32() == Ok(expected) => Ok(frame.body),
            tag => Err(unexpected(tag, "SCRAM")),
        }
    }

    /// The backend's process id, to find it in `pg_stat_activity`.
    #[must_use]
    pub fn process_id(&self) -> i32 {
        self.process_id
    }

    /// Where messages are encoded before [`Wire::flush`].
    pub fn outbound(&mut self) -> &mut BytesMut {
        &mut self.outbound
    }

    /// Sends what was encoded. Not cancellation safe: half a message may be out.
    ///
    /// # Errors
    /// Class retry: the connection ended.
    pub async fn flush(&mut self) -> Result<()> {
        let sent = async {
            self.stream.write_all(&self.outbound).await?;
            self.stream.flush().await
        };
        let outcome = sent.await.map_err(|e| lost(&e));
        empty(&mut self.outbound);
        outcome
    }

    /// Sends bytes that are whole messages or parts of them, past the outbound buffer, which must be empty. Under TLS the last of them may
    /// stay here until [`Wire::flush`].
    ///
    /// # Errors
    /// Class retry: the connection ended.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await.map_err(|e| lost(&e))
    }

    /// Reads once, whatever is there, and waits if nothing is. Cancellation safe.
    ///
    /// # Errors
    /// Class retry: the connection ended.
    pub async fn fill(&mut self) -> Result<usize> {
        if self.inbound.capacity() - self.inbound.len() < LEAST_ROOM {
            self.inbound.reserve(READ_ROOM);
        }
        match self.stream.read_buf(&mut self.inbound).await {
            Ok(0) => Err(Error::new(Class::Retry, "connection_lost", "the server closed the connection")),
            Ok(count) => Ok(count),
            Err(e) => Err(lost(&e)),
        }
    }

    /// What was read and not yet taken.
    pub fn inbound(&mut self) -> &mut BytesMut {
        &mut self.inbound
    }

    /// The next message, whatever it is, if all of it was read already.
    ///
    /// # Errors
    /// Class bug: the bytes are no messages.
    pub fn buffered_message(&mut self) -> Result<Option<Frame>> {
        let Some((tag, length)) = header(&self.inbound)? else { return Ok(None) };
        if self.inbound.len() < length {
            return Ok(None);
        }
        let mut body = self.inbound.split_to(length).freeze();
        body.advance(5);
        Ok(Some(Frame { tag, body }))
    }

    /// The next message, if all of it was read already. Notices and parameter changes are passed over.
    ///
    /// # Errors
    /// Class bug: the bytes are no messages.
    pub fn buffered_frame(&mut self) -> Result<Option<Frame>> {
        while let Some(frame) = self.buffered_message()? {
            match frame.tag {
                backend::NOTICE_RESPONSE_TAG => {
                    tracing::debug!(notice = %error_of(&frame.body), "notice");
                }
                backend::PARAMETER_STATUS_TAG | backend::NOTIFICATION_RESPONSE_TAG => {}
                _ => return Ok(Some(frame)),
            }
        }
        Ok(None)
    }

    /// The next message. Cancellation safe.
    ///
    /// # Errors
    /// The connection ended, or what came is no message.
    pub async fn frame(&mut self) -> Result<Frame> {
        loop {
            if let Some(frame) = self.buffered_frame()? {
                return Ok(frame);
            }
            self.fill().await?;
        }
    }

    /// Runs statements with the simple protocol; the rows of the last one that returned any. The connection stays
    /// usable after an error of the server.
    ///
    /// # Errors
    /// The server's, or the connection's.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<TextRow>> {
        frontend::query(sql, &mut self.outbound)?;
        self.flush().await?;
        let mut rows = Vec::new();
        let mut failure = None;
        loop {
            let frame = self.frame().await?;
            match frame.tag {
                backend::ROW_DESCRIPTION_TAG => rows.clear(),
                backend::DATA_ROW_TAG => rows.push(text_row(frame)?),
                backend::ERROR_RESPONSE_TAG => failure = Some(error_of(&frame.body)),
                backend::READY_FOR_QUERY_TAG => return failure.map_or(Ok(rows), Err),
                backend::COMMAND_COMPLETE_TAG | backend::EMPTY_QUERY_RESPONSE_TAG => {}
                tag => return Err(unexpected(tag, "the answer to a statement")),
            }
        }
    }

    /// Sends a statement that enters one of the COPY modes, and waits for it to be entered.
    ///
    /// # Errors
    /// The server's, or the connection's. The connection stays usable after an error of the server.
    pub async fn enter_copy(&mut self, sql: &str) -> Result<()> {
        frontend::query(sql, &mut self.outbound)?;
        self.flush().await?;
        let mut failure = None;
        loop {
            let frame = self.frame().await?;
            match frame.tag {
                // CopyInResponse, CopyOutResponse, CopyBothResponse.
                backend::COPY_IN_RESPONSE_TAG | backend::COPY_OUT_RESPONSE_TAG | b'W' => return Ok(()),
                backend::ERROR_RESPONSE_TAG => failure = Some(error_of(&frame.body)),
                backend::READY_FOR_QUERY_TAG => {
                    return Err(failure.unwrap_or_else(|| unexpected(frame.tag, "the beginning of a COPY")));
                }
                tag => return Err(unexpected(tag, "the beginning of a COPY")),
            }
        }
    }

    /// Reads to the end of the current statement: `CommandComplete` and `ReadyForQuery`.
    ///
    /// Returns the command tag's count, such as the rows of a COPY.
    ///
    /// # Errors
    /// The server's, or the connection's. The connection stays usable after an error of the server.
    pub async fn finish(&mut self) -> Result<u64> {
        let mut outcome = Ok(0);
        loop {
            let frame = self.frame().await?;
            match frame.tag {
                backend::COMMAND_COMPLETE_TAG => {
                    let count = affected(&frame.body);
                    outcome = outcome.map(|_| count);
                }
                backend::ERROR_RESPONSE_TAG => outcome = Err(error_of(&frame.body)),
                backend::READY_FOR_QUERY_TAG => return outcome,
                backend::COPY_DATA_TAG | backend::COPY_DONE_TAG => {}
                tag => return Err(unexpected(tag, "the end of a statement")),
            }
        }
    }

    /// Says goodbye, so that the server does not log a lost connection.
    pub async fn close(mut self) {
        frontend::terminate(&mut self.outbound);
        // The server may be gone already, which is just as well.
        drop(self.flush().await);
    }
}

/// Kind and whole length (kind and length field included) of the message at the front, once its header is there.
///
/// # Errors
/// Class bug: a length that no message has.
pub fn header(bytes: &[u8]) -> Result<Option<(u8, usize)>> {
    let Some((&[tag, a, b, c, d], _)) = bytes.split_first_chunk::<5>() else { return Ok(None) };
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if !(4..=LONGEST_MESSAGE).contains(&length) {
        return Err(Error::new(Class::Bug, "protocol", format!("the server sent a message of length {length}")));
    }
    Ok(Some((tag, length + 1)))
}

/// The count at the end of a command tag: `UPDATE 3`, `INSERT 0 1`, `COPY 12`; 0 where there is none.
#[must_use]
pub fn affected(command_complete: &[u8]) -> u64 {
    let tag = command_complete.strip_suffix(&[0]).unwrap_or(command_complete);
    tag.rsplit(|&b| b == b' ')
        .next()
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .and_then(|digits| digits.parse().ok())
        .unwrap_or(0)
}

/// The error of an ErrorResponse or the text of a NoticeResponse.
#[must_use]
pub fn error_of(body: &[u8]) -> Error {
    let mut server = ServerError::default();
    for field in body.split(|&b| b == 0) {
        let Some((&kind, value)) = field.split_first() else { continue };
        let value = String::from_utf8_lossy(value).into_owned();
        match kind {
            b'V' => server.severity = value,
            b'C' => server.sqlstate = value,
            b'M' => server.message = value,
            b'D' => server.detail = Some(value),
            b'H' => server.hint = Some(value),
            b'W' => server.context = Some(value),
            b't' => server.table = Some(value),
            b'n' => server.constraint = Some(value),
            _ => {}
        }
    }
    from_server(server)
}

/// The server sent something that the protocol does not allow here.
#[must_use]
pub fn unexpected(tag: u8, during: &str) -> Error {
    Error::new(
        Class::Retry,
        "protocol",
        format!("the server sent a message of kind {:?} during {during}", char::from(tag)),
    )
}

/// Makes room for the next messages. Memory that one huge row took is given back, but not between two huge rows.
fn empty(outbound: &mut BytesMut) {
    if outbound.capacity() > KEPT_ROOM && outbound.len() < READ_ROOM {
        *outbound = BytesMut::with_capacity(READ_ROOM);
    } else {
        outbound.clear();
    }
}

fn lost(error: &std::io::Error) -> Error {
    Error::new(Class::Retry, "connection_lost", format!("the connection was lost: {error}"))
}

fn text_row(frame: Frame) -> Result<TextRow> {
    let body = frame.body;
    let malformed = || unexpected(backend::DATA_ROW_TAG, "reading a row");
    let mut rest = &*body;
    let count = rest.try_get_u16().map_err(|_| malformed())?;
    let mut row = Vec::with_capacity(usize::from(count).min(body.len()));
    for _ in 0..count {
        let length = rest.try_get_i32().map_err(|_| malformed())?;
        let Ok(length) = usize::try_from(length) else {
            row.push(None);
            continue;
        };
        let (value, more) = rest.split_at_checked(length).ok_or_else(malformed)?;
        row.push(Some(String::from_utf8_lossy(value).into_owned()));
        rest = more;
    }
    Ok(row)
}

/// Settings as the startup packet's `options` wants them: `-c name=value`, blanks and backslashes escaped.
fn startup_options(of_conninfo: Option<&str>, ours: &[(&str, &str)]) -> String {
    let escape = |text: &str| text.replace('\\', "\\\\").replace(' ', "\\ ");
    let mut options = of_conninfo.unwrap_or_default().to_owned();
    for (name, value) in ours {
        if !options.is_empty() {
            options.push(' ');
        }
        options.push_str(&format!("-c {}={}", escape(name), escape(value)));
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn command_tags_end_in_their_count() {
        for (tag, count) in [("UPDATE 3\0", 3), ("INSERT 0 1\0", 1), ("COPY 12\0", 12), ("BEGIN\0", 0), ("", 0)] {
            assert_eq!(affected(tag.as_bytes()), count, "{tag:?}");
        }
    }

    #[test]
    fn memory_of_a_huge_row_is_given_back_after_the_next_small_message() {
        let mut outbound = BytesMut::zeroed(8 * KEPT_ROOM);
        empty(&mut outbound);
        assert!(outbound.is_empty() && outbound.capacity() >= 8 * KEPT_ROOM, "another huge row may follow");
        outbound.extend_from_slice(b"small");
        empty(&mut outbound);
        assert!(outbound.is_empty() && outbound.capacity() <= KEPT_ROOM);
    }

    #[test]
    fn options_are_escaped() {
        assert_eq!(startup_options(Some("-c a=b"), &[("work mem", "1 GB\\")]), "-c a=b -c work\\ mem=1\\ GB\\\\");
    }

    proptest! {
        #[test]
        fn no_header_brings_us_down(bytes: Vec<u8>) {
            if let Ok(Some((_, length))) = header(&bytes) {
                prop_assert!(length >= 5);
            }
        }

        #[test]
        fn no_error_response_brings_us_down(bytes: Vec<u8>) {
            prop_assert!(!error_of(&bytes).code().is_empty());
        }
    }
}
