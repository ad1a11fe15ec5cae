//! Hands a stream that is through with TLS to tokio-postgres.
//!
//! The library is told that TLS comes without asking (`sslnegotiation=direct`), so that it calls our connector at once,
//! which has nothing left to do but to pass on the channel binding.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::config::{Config, SslMode, SslNegotiation};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

use crate::postgres::dial::Stream;

/// The connection behind a control session.
pub(super) type Connection = tokio_postgres::Connection<Stream, PreparedStream>;

/// A configuration that takes the stream as it is.
pub(super) fn config(encrypted: bool) -> Config {
    let mut config = Config::new();
    config.ssl_negotiation(SslNegotiation::Direct);
    config.ssl_mode(if encrypted { SslMode::Require } else { SslMode::Disable });
    config
}

/// The connector that has nothing left to do.
pub(super) struct PreparedTls(Option<Vec<u8>>);

impl PreparedTls {
    pub(super) fn new(end_point: Option<Vec<u8>>) -> Self {
        Self(end_point)
    }
}

impl TlsConnect<Stream> for PreparedTls {
    type Stream = PreparedStream;
    type Error = Infallible;
    type Future = Ready<Result<PreparedStream, Infallible>>;

    fn connect(self, stream: Stream) -> Self::Future {
        ready(Ok(PreparedStream { stream, end_point: self.0 }))
    }
}

/// An encrypted stream that knows its channel binding.
pub(super) struct PreparedStream {
    stream: Stream,
    end_point: Option<Vec<u8>>,
}

impl TlsStream for PreparedStream {
    fn channel_binding(&self) -> ChannelBinding {
        self.end_point.clone().map_or_else(ChannelBinding::none, ChannelBinding::tls_server_end_point)
    }
}

impl AsyncRead for PreparedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for PreparedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
