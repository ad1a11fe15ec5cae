//! From a host of a connection string to a stream on which the server waits for the startup message: name
//! lookup, TCP or Unix socket, keepalives, SSLRequest, TLS handshake. Both kinds of connection begin here.
//! See <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-SSL>.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::error::{Class, Error, Result};
use crate::postgres::conninfo::{Address, ConnInfo, Host, Keepalive, SslMode, SslNegotiation};
use crate::postgres::tls::{self, Tls};

/// The way to a server, readable and writable.
pub enum Stream {
    /// Plain TCP.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
    /// TLS over TCP.
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

impl Stream {
    /// Whether what is sent is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        matches!(self, Self::Tls(_))
    }
}

/// Hands a call on to whichever stream it is.
macro_rules! delegate {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Stream::Tcp(inner) => {
                let $stream = Pin::new(inner);
                $call
            }
            Stream::Unix(inner) => {
                let $stream = Pin::new(inner);
                $call
            }
            Stream::Tls(inner) => {
                let $stream = Pin::new(inner.as_mut());
                $call
            }
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        delegate!(self, stream => stream.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, stream => stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Unix(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => stream.poll_shutdown(cx))
    }
}

/// A stream with the `tls-server-end-point` of its certificate, for SCRAM channel binding.
pub(crate) struct Dialed {
    pub(crate) stream: Stream,
    pub(crate) end_point: Option<Vec<u8>>,
}

/// Connects to `host`, with or without TLS. Has no deadline of its own.
pub(crate) async fn dial(host: &Host, conninfo: &ConnInfo, tls: Option<&Tls>) -> Result<Dialed> {
    let folder = match &host.address {
        Address::Unix(folder) => folder,
        Address::Tcp(name) => return dial_tcp(host, name, conninfo, tls).await,
    };
    let path = folder.join(format!(".s.PGSQL.{}", host.port));
    let stream = UnixStream::connect(&path).await.map_err(|e| {
        let (code, hint) = match e.kind() {
            io::ErrorKind::NotFound => {
                ("socket_not_found", "is the server running, and is this its unix_socket_directories?")
            }
            io::ErrorKind::PermissionDenied => ("socket_refused", "this user may not use the socket"),
            _ => ("connection_refused", "is the server running?"),
        };
        Error::new(Class::Retry, code, format!("socket {}: {e}", path.display())).hint(hint).because(e)
    })?;
    Ok(Dialed { stream: Stream::Unix(stream), end_point: None })
}

async fn dial_tcp(host: &Host, name: &str, conninfo: &ConnInfo, tls: Option<&Tls>) -> Result<Dialed> {
    let mut stream = connect_tcp(host, name).await?;
    stream.set_nodelay(true).map_err(socket_option)?;
    keep_alive(&stream, conninfo.keepalive())?;
    let Some(tls) = tls else {
        return Ok(Dialed { stream: Stream::Tcp(stream), end_point: None });
    };
    if conninfo.ssl().negotiation == SslNegotiation::Postgres && !server_speaks_tls(&mut stream).await? {
        if conninfo.ssl().mode == SslMode::Prefer {
            return Ok(Dialed { stream: Stream::Tcp(stream), end_point: None });
        }
        let mode = conninfo.ssl().mode.as_str();
        return Err(Error::new(
            Class::Wait,
            "tls_not_supported",
            format!("the server does not offer TLS, but sslmode is {mode}"),
        )
        .hint("turn ssl on in the server's postgresql.conf, or use sslmode=prefer if the network is trusted"));
    }
    let stream = TlsConnector::from(tls.config())
        .connect(tls::server_name(name)?, stream)
        .await
        .map_err(|e| tls::explain(e, name, Some(tls.authorities())))?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let end_point = certificate.and_then(|certificate| tls::tls_server_end_point(certificate));
    Ok(Dialed { stream: Stream::Tls(Box::new(stream)), end_point })
}

/// Looks the name up anew each time (addresses move) and takes the first address that answers.
async fn connect_tcp(host: &Host, name: &str) -> Result<TcpStream> {
    let addresses: Vec<SocketAddr> = match host.numeric {
        Some(numeric) => vec![SocketAddr::new(numeric, host.port)],
        None => tokio::net::lookup_host((name, host.port))
            .await
            .map_err(|e| {
                Error::new(Class::Retry, "host_not_found", format!("the name {name:?} cannot be resolved: {e}"))
                    .hint("check the spelling of the host in the connection string, and the DNS of this machine")
                    .because(e)
            })?
            .collect(),
    };
    let mut last = None;
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(e) => last = Some((address, e)),
        }
    }
    let Some((address, e)) = last else {
        return Err(Error::new(Class::Retry, "host_not_found", format!("the name {name:?} has no address")));
    };
    let (code, hint) = match e.kind() {
        io::ErrorKind::ConnectionRefused => (
            "connection_refused",
            "is the server running, does it listen on this address and port, does a firewall refuse?",
        ),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            ("host_unreachable", "check the network and the route from this machine to the server")
        }
        _ => ("connection", "check the network between this machine and the server"),
    };
    Err(Error::new(Class::Retry, code, format!("{address}: {e}")).hint(hint).because(e))
}

fn socket_option(e: io::Error) -> Error {
    Error::new(Class::Retry, "connection", format!("setting up the socket: {e}")).because(e)
}

fn keep_alive(stream: &TcpStream, keepalive: &Keepalive) -> Result<()> {
    let socket = socket2::SockRef::from(stream);
    if keepalive.enabled {
        let mut probes = socket2::TcpKeepalive::new();
        if let Some(idle) = keepalive.idle {
            probes = probes.with_time(idle);
        }
        if let Some(interval) = keepalive.interval {
            probes = probes.with_interval(interval);
        }
        if let Some(count) = keepalive.count {
            probes = probes.with_retries(count);
        }
        socket.set_tcp_keepalive(&probes).map_err(socket_option)?;
    }
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(keepalive.user_timeout).map_err(socket_option)?;
    Ok(())
}

/// SSLRequest; the server answers with one byte.
async fn server_speaks_tls(stream: &mut TcpStream) -> Result<bool> {
    const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
    let lost = |e: io::Error| {
        Error::new(Class::Retry, "connection_lost", format!("the server hung up when asked for TLS: {e}"))
            .hint("check that the port is PostgreSQL's; the server may be starting or stopping")
            .because(e)
    };
    stream.write_all(&SSL_REQUEST).await.map_err(lost)?;
    match stream.read_u8().await.map_err(lost)? {
        b'S' => Ok(true),
        b'N' => Ok(false),
        b'E' => {
            Err(Error::new(Class::Retry, "connection_refused", "the server answered the request for TLS with an error")
                .hint("the server cannot take a connection at this moment; its log says why"))
        }
        other => Err(Error::new(
            Class::Wait,
            "not_postgresql",
            format!("the answer to the request for TLS is the byte {other}, which is not PostgreSQL's"),
        )
        .hint("check the host and the port of the connection string")),
    }
}
