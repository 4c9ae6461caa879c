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
use redis_protocol::resp3::types::BytesFrame as Resp3Frame;
use secrecy::ExposeSecret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::command::{Command, Reply, server_error};
use super::place::{Place, Socket, dial};
use super::plain;
use super::resp::{Bounds, Piece, Scan, Strings};
use crate::failpoint;
use crate::model::entry::EntryId;
use crate::model::shortened::Shortened;
use crate::retry::Fault;

/// What one read of the socket takes at the least, and at the most once bytes come in plenty.
const CHUNK: (usize, usize) = (4 << 10, 256 << 10);
/// The longest reply that is no stream read: the slots of a large cluster that lie scattered, or its many clients, take megabytes.
const LONGEST_REPLY: usize = 64 << 20;

/// An entry, as it is delivered.
#[derive(Debug, Clone, Copy)]
pub enum Delivered<'a> {
    /// All of it.
    Whole(EntryId, Strings<'a>),
    /// Its beginning: it is too large to be held.
    Shortened(&'a Shortened),
}

/// What arrives in the reply to a read of many streams.
#[derive(Debug, Clone, Copy)]
pub enum Arrived<'a> {
    /// What follows is of this stream.
    Stream(&'a [u8]),
    /// An entry.
    Entry(Delivered<'a>),
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
    /// Whether each command is sent behind an ASKING: the slot is on its way to this server.
    is_asking: bool,
    /// Whether the answer to the ASKING before the oldest read has passed.
    is_let_in: bool,
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
        let mut wire = Wire {
            socket,
            place: name_of_place,
            inbox: BytesMut::new(),
            outbox: Vec::new(),
            scan: Scan::new(bounds),
            chunk: CHUNK.0,
            limit,
            is_asking: false,
            is_let_in: false,
            lost: false,
        };
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

    /// The same, for a stream whose slot is on its way to this server, which answers only who says that it knows.
    pub(super) fn asking(self) -> Wire {
        Wire { is_asking: true, ..self }
    }

    /// Sends one command and waits for its reply, while no read is under way.
    pub(super) async fn call(&mut self, command: &Command) -> Result<Reply, Fault> {
        self.send(command);
        self.flush().await?;
        // Dropped before its reply has come it is of no more use: that would answer the next question.
        self.lost = true;
        if self.is_asking {
            self.reply().await?;
        }
        let reply = self.reply().await?;
        self.lost = false;
        Reply::of(reply)
    }

    async fn reply(&mut self) -> Result<Resp3Frame, Fault> {
        loop {
            let seen = Bytes::copy_from_slice(&self.inbox);
            match decode_bytes(&seen) {
                Ok(Some((frame, taken))) => {
                    self.inbox.advance(taken);
                    return Ok(frame);
                }
                Ok(None) if seen.len() < LONGEST_REPLY => self.receive(self.limit).await?,
                Ok(None) => return Err(self.broken("a reply without an end".into())),
                Err(error) => return Err(self.broken(error.to_string())),
            }
        }
    }

    /// Puts a stream read on its way: with the next [`Wire::run`], which answers the oldest.
    pub fn send(&mut self, command: &Command) {
        if self.is_asking {
            Command::new("ASKING").write_to(&mut self.outbox);
        }
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
        let of_one = |arrived: Arrived<'_>| match arrived {
            Arrived::Stream(_) => ControlFlow::Continue(()),
            Arrived::Entry(delivered) => take(delivered),
        };
        self.run_of_many(block, of_one).await
    }

    /// The same for a read of many streams: a run of each that has entries, in the order in which they were named.
    pub async fn run_of_many(
        &mut self,
        block: Duration,
        mut take: impl FnMut(Arrived<'_>) -> ControlFlow<()>,
    ) -> Result<Progress, Fault> {
        self.flush().await?;
        failpoint::reached("read.sent");
        if self.is_asking && !self.is_let_in {
            // A refusal is followed by that of the read.
            self.reply().await?;
            self.is_let_in = true;
        }
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
                let flow = match piece {
                    Piece::Entry(id, strings) => take(Arrived::Entry(Delivered::Whole(id, strings))),
                    Piece::Shortened => match self.scan.take_shortened() {
                        Some(entry) => take(Arrived::Entry(Delivered::Shortened(&entry))),
                        None => continue,
                    },
                    Piece::Stream(name) => take(Arrived::Stream(name)),
                    Piece::Part => continue,
                    Piece::End => break Some(Ok(Progress::Whole)),
                    Piece::Refused(words) => break Some(Err(server_error(words))),
                };
                got_some = true;
                if flow.is_break() {
                    break Some(Ok(Progress::Paused));
                }
            };
            self.inbox.advance(at);
            match outcome {
                Some(outcome) => {
                    self.is_let_in = matches!(outcome, Ok(Progress::Paused));
                    return outcome;
                }
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
