//! A target that takes rows more slowly than they come, over TLS: what is on its way at the end of a COPY still arrives.

use std::time::Duration;

use pgtandem::copy::Outcome;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::Move;
use crate::harness::{Cluster, assert_same, versions_under_test};

/// Passes connections on to `port`, with small buffers, and what clients send at some MiB a second. Returns its own port.
async fn slow_relay(port: u16) -> u16 {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 * 1024).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener: TcpListener = socket.listen(64).unwrap();
    let own = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let ((mut from, mut back), (mut answers, mut to)) = (client.into_split(), server.into_split());
            tokio::spawn(async move { tokio::io::copy(&mut answers, &mut back).await });
            tokio::spawn(async move {
                let mut piece = vec![0; 8 * 1024];
                while let Ok(count @ 1..) = from.read(&mut piece).await {
                    // The target is slow; nothing is waited for.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    if to.write_all(&piece[..count]).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
    own
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_copy_arrives_over_tls() {
    let (from, to) = versions_under_test();
    let clusters = tokio::join!(Cluster::start(from), Cluster::builder(to).tls().start());
    let relay = slow_relay(clusters.1.port()).await.to_string();
    let schema = "create table large (id bigint primary key, filler text);
                  create table other (id bigint primary key, filler text);";
    let moved = Move::configured(clusters, schema, &[("target_port", &relay)]).await;
    let rows = "insert into large select i, repeat(md5(i::text), 20) from generate_series(1, 20000) i;
                insert into other select i, repeat(md5(i::text), 20) from generate_series(1, 12500) i;";
    moved.source.execute(rows).await;
    assert_eq!(moved.copy().await, Outcome::Complete);
    assert_same(&moved.source, &moved.target).await;
}
