//! The connection that entries are read on: our own, for this is where the time goes.
//!
//! The client library parses a reply from its beginning again whenever a part of it arrives, and makes an object of every
//! string; here a reply is scanned once, where it lies, and several reads are under way at once. Everything that is not a
//! stream read, and not the greeting, stays with the library.
//!
//! As every connection of this project it never reconnects: lost once, lost for good, and what was delivered into a lost
//! reply is pending and found again in the consumer's own list.

use std::io;
use std::ops::ControlFlow;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use redis_protocol::resp3::decode::complete::decode_bytes;
use rustls::pki_types::ServerName;
use secrecy::{ExposeSecret, SecretString};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::command::{Command, Reply, server_error};
use super::connection::{KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_TRIES, UNCONFIRMED_LIMIT};
use super::plain;
use super::resp::{Bounds, Piece, Scan, Strings};
use crate::failpoint;
use crate::model::entry::EntryId;
use crate::model::shortened::Shortened;
use crate::retry::Fault;

/// What one read of the socket takes at the least, and at the most once bytes come in plenty.
const CHUNK: (usize, usize) = (4 << 10, 256 << 10);
/// The longest greeting: the reply to INFO is a few kilobytes.
const LONGEST_GREETING: usize = 1 << 20;

/// Where a server is, and how to introduce oneself.
pub(super) struct Place {
    pub(super) host: String,
    pub(super) port: u16,
    /// The connector, and the name that the certificate must bear.
    pub(super) tls: Option<(TlsConnector, String)>,
    pub(super) username: Option<String>,
    pub(super) password: Option<SecretString>,
    pub(super) database: u8,
}

impl Place {
    /// For people.
    pub(super) fn name(&self) -> String {
        if self.host.contains(':') {
            format!("Valkey at [{}]:{}", self.host, self.port)
        } else {
            format!("Valkey at {}:{}", self.host, self.port)
        }
    }

    /// Why a connection does not come about, as far as a socket and one greeting tell.
    pub(super) async fn diagnose(&self, limit: Duration) -> Option<Fault> {
        let name = self.name();
        // A server without TLS takes the beginning of TLS for half a command and waits for the rest: it is greeted first.
        if self.tls.is_some() {
            let plain = Place { tls: None, host: self.host.clone(), username: None, password: None, ..*self };
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
            Ok(()) => socket.read(&mut answer).await.unwrap_or(0),
            Err(_) => 0,
        };
        Ok(answer[..length].to_vec())
    }
}

trait Socket: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Socket for T {}

/// An entry, as it is delivered.
#[derive(Debug)]
pub enum Delivered<'a> {
    /// All of it.
    Whole(EntryId, Strings<'a>),
    /// Its beginning: it is too large to be held.
    Shortened(Shortened),
}

impl Delivered<'_> {
    /// Its id.
    pub fn id(&self) -> EntryId {
        match self {
            Delivered::Whole(id, _) => *id,
            Delivered::Shortened(entry) => entry.id,
        }
    }
}

/// How far a run was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// To its end.
    Whole,
    /// As far as was wanted: the next call goes on with the same run.
    Paused,
}

/// A connection for stream reads.
pub struct Wire {
    socket: Box<dyn Socket>,
    /// The place's name, for people.
    place: String,
    inbox: BytesMut,
    outbox: Vec<u8>,
    scan: Scan,
    chunk: usize,
    limit: Duration,
    lost: bool,
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wire").field("lost", &self.lost).finish_non_exhaustive()
    }
}

impl Wire {
    /// Connects, in RESP3. `limit` bounds every wait for the server, `bounds` what is held of one entry.
    pub(super) async fn open(
        place: &Place,
        name: &str,
        bounds: Bounds,
        connect: Duration,
        limit: Duration,
    ) -> Result<Wire, Fault> {
        let name_of_place = place.name();
        let socket = tokio::time::timeout(connect, dial(place))
            .await
            .map_err(|_| plain::no_answer(&name_of_place, connect))?
            .map_err(|error| plain::cannot_reach(&name_of_place, &error))?;
        let (inbox, outbox, scan) = (BytesMut::new(), Vec::new(), Scan::new(bounds));
        let mut wire = Wire { socket, place: name_of_place, inbox, outbox, scan, chunk: CHUNK.0, limit, lost: false };
        let mut hello = Command::new("HELLO").arg(3);
        if let Some(password) = &place.password {
            hello = hello.arg("AUTH").arg(place.username.as_deref().unwrap_or("default")).arg(password.expose_secret());
        }
        wire.call(&hello.arg("SETNAME").arg(name)).await?;
        if place.database > 0 {
            wire.call(&Command::new("SELECT").arg(i64::from(place.database))).await?;
        }
        Ok(wire)
    }

    /// Sends one command of the greeting and waits for its reply.
    pub(super) async fn call(&mut self, command: &Command) -> Result<Reply, Fault> {
        self.send(command);
        self.flush().await?;
        loop {
            let seen = Bytes::copy_from_slice(&self.inbox);
            match decode_bytes(&seen) {
                Ok(Some((frame, taken))) => {
                    self.inbox.advance(taken);
                    return Reply::of(frame);
                }
                Ok(None) if seen.len() < LONGEST_GREETING => self.receive(self.limit).await?,
                Ok(None) => return Err(self.broken("a reply without an end".into())),
                Err(error) => return Err(self.broken(error.to_string())),
            }
        }
    }

    /// Puts a stream read on its way: with the next [`Wire::run`], which answers the oldest.
    pub fn send(&mut self, command: &Command) {
        command.write_to(&mut self.outbox);
    }

    /// Receives the run that answers the oldest read, entry by entry as they come, until it ends or no more of it is wanted for
    /// now. `block` is how long that read waits on the server.
    ///
    /// When the connection is lost in the middle, the entries given are the beginning of the run, without a gap.
    pub async fn run(
        &mut self,
        block: Duration,
        mut take: impl FnMut(Delivered<'_>) -> ControlFlow<()>,
    ) -> Result<Progress, Fault> {
        self.flush().await?;
        failpoint::reached("read.sent");
        let mut got_some = false;
        loop {
            let mut at = 0;
            let outcome = loop {
                let (piece, taken) = match self.scan.next(&self.inbox[at..]) {
                    Ok(Some(piece)) => piece,
                    Ok(None) => break None,
                    Err(broken) => return Err(self.broken(broken.to_string())),
                };
                at += taken;
                let delivered = match piece {
                    Piece::Entry(id, strings) => Delivered::Whole(id, strings),
                    Piece::Shortened(entry) => Delivered::Shortened(entry),
                    Piece::Part => continue,
                    Piece::End => break Some(Ok(Progress::Whole)),
                    Piece::Refused(words) => break Some(Err(server_error(words))),
                };
                got_some = true;
                if take(delivered).is_break() {
                    break Some(Ok(Progress::Paused));
                }
            };
            self.inbox.advance(at);
            match outcome {
                Some(outcome) => return outcome,
                None => {
                    if got_some {
                        failpoint::reached("read.half");
                    }
                    self.receive(block + self.limit).await?;
                }
            }
        }
    }

    /// Whether it was found broken.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    async fn flush(&mut self) -> Result<(), Fault> {
        if self.lost {
            return Err(Fault::ValkeyLost("the connection to Valkey was lost before".into()));
        }
        if self.outbox.is_empty() {
            return Ok(());
        }
        let sending = async {
            self.socket.write_all(&self.outbox).await?;
            self.socket.flush().await
        };
        let sent = tokio::time::timeout(self.limit, sending).await;
        self.outbox.clear();
        self.note(sent, self.limit)
    }

    /// Waits for more bytes.
    async fn receive(&mut self, limit: Duration) -> Result<(), Fault> {
        // A buffer that held one giant entry is not kept for the small ones.
        if self.inbox.is_empty() && self.inbox.capacity() > 2 * CHUNK.1 {
            self.inbox = BytesMut::new();
        }
        self.inbox.reserve(self.chunk);
        let receiving = async {
            match self.socket.read_buf(&mut self.inbox).await? {
                0 => Err(io::ErrorKind::UnexpectedEof.into()),
                count => Ok(count),
            }
        };
        let received = tokio::time::timeout(limit, receiving).await;
        // An idle connection needs little, a busy one saves calls.
        if let Ok(Ok(count)) = &received {
            self.chunk = (count * 2).clamp(CHUNK.0, CHUNK.1);
        }
        self.note(received.map(|received| received.map(drop)), limit)
    }

    fn note(
        &mut self,
        outcome: Result<io::Result<()>, tokio::time::error::Elapsed>,
        limit: Duration,
    ) -> Result<(), Fault> {
        let fault = match outcome {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => plain::broke(&self.place, &error),
            Err(_) => plain::no_answer(&self.place, limit),
        };
        self.lost = true;
        Err(fault)
    }

    /// What comes next on this connection cannot be told apart any more.
    fn broken(&mut self, what: String) -> Fault {
        self.lost = true;
        plain::not_understood(&self.place, &what)
    }
}

async fn dial(place: &Place) -> io::Result<Box<dyn Socket>> {
    let stream = TcpStream::connect((place.host.as_str(), place.port)).await?;
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
