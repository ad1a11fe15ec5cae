//! The null reader's way into a walsender: start-up, SCRAM, START_REPLICATION.
//! See <https://www.postgresql.org/docs/current/protocol-message-formats.html>.

use anyhow::{Context, Result, bail};
use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::servers::SUPERUSER;

/// What the kernel may hold for us between two reads, in bytes. It cuts this down to what it allows.
const RECEIVE_BUFFER: u32 = 4 << 20;

/// Logs in as a walsender of the database.
pub(super) async fn connect(port: u16, database: &str, password: &str) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4().context("making a socket")?;
    socket.set_recv_buffer_size(RECEIVE_BUFFER).context("enlarging the receive buffer")?;
    let mut stream = socket.connect(([127, 0, 0, 1], port).into()).await.context("connecting to the source")?;
    let mut out = BytesMut::new();
    let parameters =
        [("user", SUPERUSER), ("database", database), ("replication", "database"), ("application_name", "null reader")];
    frontend::startup_message(parameters, &mut out)?;
    stream.write_all(&out).await?;

    let mut scram = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
    loop {
        let (tag, mut body) = message(&mut stream).await?;
        out.clear();
        match tag {
            b'R' => match body.try_get_u32()? {
                0 => {}
                10 => frontend::sasl_initial_response(SCRAM_SHA_256, scram.message(), &mut out)?,
                11 => {
                    scram.update(&body)?;
                    frontend::sasl_response(scram.message(), &mut out)?;
                }
                12 => scram.finish(&body)?,
                other => bail!("the source asks for the authentication {other}"),
            },
            b'Z' => return Ok(stream),
            _ => {}
        }
        stream.write_all(&out).await?;
    }
}

/// Begins to stream from the slot's own position, as pgtandem and a subscription without `streaming` do.
pub(super) async fn start(stream: &mut TcpStream, slot: &str, publication: &str) -> Result<()> {
    let mut out = BytesMut::new();
    let sql = format!(
        "START_REPLICATION SLOT \"{slot}\" LOGICAL 0/0 (proto_version '1', publication_names '\"{publication}\"')"
    );
    frontend::query(&sql, &mut out)?;
    stream.write_all(&out).await?;
    while message(stream).await?.0 != b'W' {}
    Ok(())
}

/// One message, read to its last byte and no further.
async fn message(stream: &mut TcpStream) -> Result<(u8, Bytes)> {
    let tag = stream.read_u8().await.context("reading from the source")?;
    let length = stream.read_u32().await?.checked_sub(4).context("a message that is shorter than its length")?;
    let mut body = vec![0; usize::try_from(length)?];
    stream.read_exact(&mut body).await?;
    if tag == b'E' {
        bail!("the source says: {}", String::from_utf8_lossy(&body).replace('\0', " "));
    }
    Ok((tag, body.into()))
}
