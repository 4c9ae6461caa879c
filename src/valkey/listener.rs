//! Listener: the connection on which the server says unasked which keys have changed.
//!
//! Takes a place; gives what is pushed, in order. Fails as every connection of this project does: lost once, lost for good. It is our own and not the
//! client library's because what is pushed must not be lost, and whoever keeps copies must know at once that the connection is gone.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use redis_protocol::resp3::decode::complete::decode_bytes;
use redis_protocol::resp3::types::BytesFrame;
use secrecy::ExposeSecret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::command::{Command, Reply};
use super::place::{Place, Socket, dial};
use super::plain;
use crate::retry::Fault;

/// What one read of the socket takes at the least.
const CHUNK: usize = 64 << 10;
/// A push of the keys of one write, or a reply, is no longer than this.
const LONGEST: usize = 512 << 20;

/// What the server said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pushed {
    /// These keys have changed, or are gone.
    Keys(Vec<Bytes>),
    /// Every key may have changed: FLUSHALL, or the server has given up tracking.
    All,
    /// It answers a [`Listener::ping`].
    Pong,
}

/// See the module.
pub struct Listener {
    socket: Box<dyn Socket>,
    place: String,
    inbox: BytesMut,
    frames: VecDeque<BytesFrame>,
    limit: Duration,
    /// The connection's number at the server.
    id: i64,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("place", &self.place).field("id", &self.id).finish_non_exhaustive()
    }
}

impl Listener {
    pub(super) async fn open(place: &Place, name: &str, connect: Duration, limit: Duration) -> Result<Listener, Fault> {
        let socket = tokio::time::timeout(connect, dial(place))
            .await
            .map_err(|_| plain::no_answer(&place.name(), connect))?
            .map_err(|error| plain::cannot_reach(&place.name(), &error))?;
        let (inbox, frames) = (BytesMut::new(), VecDeque::new());
        let mut listener = Listener { socket, place: place.name(), inbox, frames, limit, id: 0 };
        let mut hello = Command::new("HELLO").arg(3);
        if let Some(password) = &place.password {
            hello = hello.arg("AUTH").arg(place.username.as_deref().unwrap_or("default")).arg(password.expose_secret());
        }
        listener.call(&hello.arg("SETNAME").arg(name)).await?;
        if place.database > 0 {
            listener.call(&Command::new("SELECT").arg(i64::from(place.database))).await?;
        }
        let id = listener.call(&Command::new("CLIENT").arg("ID")).await?;
        listener.id = id.as_int().unwrap_or(0);
        Ok(listener)
    }

    /// The connection's number, to which other connections redirect what they would be told.
    pub fn id(&self) -> i64 {
        self.id
    }

    /// Sends a command and waits for its reply. What is pushed meanwhile is kept for [`Listener::next`].
    pub async fn call(&mut self, command: &Command) -> Result<Reply, Fault> {
        self.send(command).await?;
        let (limit, mut pushed) = (self.limit, VecDeque::new());
        let answer = async {
            loop {
                match self.frame().await? {
                    frame @ BytesFrame::Push { .. } => pushed.push_back(frame),
                    frame => return Reply::of(frame),
                }
            }
        };
        let answer = tokio::time::timeout(limit, answer).await;
        pushed.append(&mut self.frames);
        self.frames = pushed;
        answer.map_err(|_| plain::no_answer(&self.place, limit))?
    }

    /// Asks for a sign of life, which comes as [`Pushed::Pong`].
    pub async fn ping(&mut self) -> Result<(), Fault> {
        self.send(&Command::new("PING")).await
    }

    /// What is pushed next. It may be dropped and asked again.
    pub async fn next(&mut self) -> Result<Pushed, Fault> {
        loop {
            if let Some(pushed) = read(self.frame().await?) {
                return Ok(pushed);
            }
        }
    }

    async fn send(&mut self, command: &Command) -> Result<(), Fault> {
        let mut bytes = Vec::new();
        command.write_to(&mut bytes);
        let sending = async {
            self.socket.write_all(&bytes).await?;
            self.socket.flush().await
        };
        match tokio::time::timeout(self.limit, sending).await {
            Ok(sent) => sent.map_err(|error| plain::broke(&self.place, &error)),
            Err(_) => Err(plain::no_answer(&self.place, self.limit)),
        }
    }

    async fn frame(&mut self) -> Result<BytesFrame, Fault> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Ok(frame);
            }
            self.inbox.reserve(CHUNK);
            let read = self
                .socket
                .read_buf(&mut self.inbox)
                .await
                .and_then(|count| if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) });
            read.map_err(|error| plain::broke(&self.place, &error))?;
            self.decode()?;
        }
    }

    /// Takes all whole frames out of what was received.
    fn decode(&mut self) -> Result<(), Fault> {
        let mut rest = self.inbox.split().freeze();
        loop {
            match decode_bytes(&rest) {
                Ok(Some((frame, taken))) => {
                    self.frames.push_back(frame);
                    rest = rest.slice(taken..);
                }
                Ok(None) if rest.len() < LONGEST => break,
                Ok(None) => return Err(plain::not_understood(&self.place, "a reply without an end")),
                Err(error) => return Err(plain::not_understood(&self.place, &error.to_string())),
            }
        }
        self.inbox.extend_from_slice(&rest);
        Ok(())
    }
}

/// What a frame says; none if it is about something else.
fn read(frame: BytesFrame) -> Option<Pushed> {
    match frame {
        BytesFrame::Push { data, .. } => {
            let mut parts = data.into_iter();
            match text(&parts.next()?)?.as_ref() {
                b"invalidate" => match parts.next()? {
                    BytesFrame::Array { data, .. } => Some(Pushed::Keys(data.iter().filter_map(text).collect())),
                    _ => Some(Pushed::All),
                },
                b"tracking-redir-broken" => Some(Pushed::All),
                _ => None,
            }
        }
        frame => text(&frame).filter(|text| text.as_ref() == b"PONG").map(|_| Pushed::Pong),
    }
}

fn text(frame: &BytesFrame) -> Option<Bytes> {
    match frame {
        BytesFrame::BlobString { data, .. } | BytesFrame::SimpleString { data, .. } => Some(data.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(bytes: &'static [u8]) -> Option<Pushed> {
        let (frame, taken) = decode_bytes(&Bytes::from_static(bytes)).expect("sound").expect("whole");
        assert_eq!(taken, bytes.len());
        read(frame)
    }

    #[test]
    fn keys_a_flush_and_a_sign_of_life_are_told_apart() {
        let keys = told(b">2\r\n$10\r\ninvalidate\r\n*2\r\n$1\r\na\r\n$1\r\nb\r\n");
        assert_eq!(keys, Some(Pushed::Keys(vec![Bytes::from_static(b"a"), Bytes::from_static(b"b")])));
        assert_eq!(told(b">2\r\n$10\r\ninvalidate\r\n_\r\n"), Some(Pushed::All));
        assert_eq!(told(b"+PONG\r\n"), Some(Pushed::Pong));
        assert_eq!(told(b">2\r\n$7\r\nmessage\r\n$1\r\na\r\n"), None);
    }
}
