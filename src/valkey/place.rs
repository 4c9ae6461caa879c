//! Place: where a server is, and the socket that leads there.
//!
//! Takes host, port, TLS and who asks; gives a connected socket, or says why there is none: a [`Fault`] in plain words.

use std::fmt;
use std::io;
use std::time::Duration;

use rustls::pki_types::ServerName;
use secrecy::SecretString;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::address::Node;
use super::plain;
use crate::retry::Fault;

/// How long a silent connection is trusted before the kernel asks whether the peer is there.
pub(super) const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
/// How often it then asks.
pub(super) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How often it asks in vain before the connection is given up.
pub(super) const KEEPALIVE_TRIES: u32 = 3;
/// How long sent bytes may stay unconfirmed before the kernel gives the connection up.
pub(super) const UNCONFIRMED_LIMIT: Duration = Duration::from_secs(30);

/// Where a server is, and how to introduce oneself.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) node: Node,
    /// The connector, and the name that the certificate must bear.
    pub(super) tls: Option<(TlsConnector, String)>,
    pub(super) username: Option<String>,
    pub(super) password: Option<SecretString>,
    pub(super) database: u8,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.node)
    }
}

impl Place {
    /// For people.
    pub(super) fn name(&self) -> String {
        format!("Valkey at {}", self.node)
    }

    /// Why a connection does not come about, as far as a socket and one greeting tell.
    pub(super) async fn diagnose(&self, limit: Duration) -> Option<Fault> {
        let name = self.name();
        // A server without TLS takes the beginning of TLS for half a command and waits for the rest: it is greeted first.
        if self.tls.is_some() {
            let plain = Place { tls: None, node: self.node.clone(), username: None, password: None, ..*self };
            match tokio::time::timeout(limit, plain.greet()).await {
                Ok(Ok(answer)) if plain::greeted_with(&name, &answer).is_none() => {
                    return Some(plain::speaks_no_tls(&name));
                }
                _ => {}
            }
        }
        match tokio::time::timeout(limit, self.greet()).await {
            Ok(Ok(answer)) => plain::greeted_with(&name, &answer),
            Ok(Err(error)) => Some(plain::cannot_reach(&name, &error)),
            Err(_) => Some(plain::no_answer(&name, limit)),
        }
    }

    /// Connects and says one word; gives how the answer begins, empty if the connection was closed.
    async fn greet(&self) -> io::Result<Vec<u8>> {
        let mut socket = dial(self).await?;
        let mut answer = [0; 8];
        // A server that expects TLS may close the connection at once.
        let length = match socket.write_all(b"*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n").await {
            Ok(()) => match socket.read(&mut answer).await {
                // Who asks for a certificate says so only now.
                Err(error) if plain::is_of_tls(&error) => return Err(error),
                read => read.unwrap_or(0),
            },
            Err(_) => 0,
        };
        Ok(answer[..length].to_vec())
    }
}

/// A socket, with or without TLS.
pub(super) trait Socket: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Socket for T {}

/// Connects.
pub(super) async fn dial(place: &Place) -> io::Result<Box<dyn Socket>> {
    let stream = TcpStream::connect((place.node.host.as_str(), place.node.port)).await?;
    stream.set_nodelay(true)?;
    let socket = SockRef::from(&stream);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL);
    socket.set_tcp_keepalive(&keepalive.with_retries(KEEPALIVE_TRIES))?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(UNCONFIRMED_LIMIT))?;
    let Some((connector, name)) = &place.tls else { return Ok(Box::new(stream)) };
    let name =
        ServerName::try_from(name.clone()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    Ok(Box::new(connector.connect(name, stream).await?))
}
