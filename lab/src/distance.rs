//! Distance: a server that is some milliseconds away. What it answers is passed on so much later, and nothing else is changed: many answers may be on
//! their way at once.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};

/// Pieces of answers on their way, of one connection.
const ON_THE_WAY: usize = 4_096;

/// See the module. Dropped, it ends.
#[derive(Debug)]
pub struct Distance {
    port: u16,
    task: AbortHandle,
}

impl Distance {
    /// To the server on this port of this machine.
    pub async fn to(server: u16, away: Duration) -> Distance {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    // Whoever is cut off has been told enough.
                    let _ = carry(client, server, away).await;
                });
            }
        });
        Distance { port, task: task.abort_handle() }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Distance {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn carry(client: TcpStream, server: u16, away: Duration) -> std::io::Result<()> {
    let server = TcpStream::connect(("127.0.0.1", server)).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let asking = tokio::spawn(async move {
        let _ = copy(&mut from_client, &mut to_server).await;
        let _ = to_server.shutdown().await;
    });
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(ON_THE_WAY);
    let answering = tokio::spawn(async move {
        let mut piece = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from_server.read(&mut piece).await {
            if sender.send((Instant::now() + away, piece[..length].to_vec())).await.is_err() {
                break;
            }
        }
    });
    while let Some((due, piece)) = receiver.recv().await {
        sleep_until(due).await;
        if to_client.write_all(&piece).await.is_err() {
            break;
        }
    }
    let _ = to_client.shutdown().await;
    asking.abort();
    answering.abort();
    Ok(())
}
