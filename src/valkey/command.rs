//! What is sent to Valkey and what comes back, raw.
//!
//! Takes a command's words; gives a [`Reply`] to be read by hand. A reply of another shape than its command has is a fault of
//! the protocol, never a guess.

use std::fmt::{Display, Write};

use bytes::{Bytes, BytesMut};
use fred::types::{ClusterHash, CustomCommand, Resp3Frame, Value};

use crate::retry::Fault;

/// A command under construction.
#[derive(Debug, Clone)]
pub struct Command {
    name: &'static str,
    /// Its arguments, one behind the other, and where each ends: ten thousand ids are not ten thousand allocations.
    text: BytesMut,
    ends: Vec<usize>,
}

impl Command {
    /// Starts a command; a subcommand is its first argument.
    pub fn new(name: &'static str) -> Command {
        Command { name, text: BytesMut::new(), ends: Vec::new() }
    }

    /// Adds an argument, as it is displayed.
    pub fn arg(mut self, argument: impl Display) -> Command {
        self.push(argument);
        self
    }

    /// Adds arguments.
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl Display>) -> Command {
        arguments.into_iter().for_each(|argument| self.push(argument));
        self
    }

    /// Adds an argument of any bytes.
    pub fn bytes(mut self, argument: &[u8]) -> Command {
        self.text.extend_from_slice(argument);
        self.ends.push(self.text.len());
        self
    }

    fn push(&mut self, argument: impl Display) {
        // Memory takes everything.
        let _ = write!(self.text, "{argument}");
        self.ends.push(self.text.len());
    }

    pub(super) fn into_parts(self) -> (CustomCommand, Vec<Value>) {
        let text = self.text.freeze();
        let mut start = 0;
        let arguments =
            self.ends.into_iter().map(|end| Value::Bytes(text.slice(std::mem::replace(&mut start, end)..end)));
        (CustomCommand::new_static(self.name, ClusterHash::Random, false), arguments.collect())
    }

    /// Writes it as a server takes it: an array of strings.
    pub(super) fn write_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("*{}\r\n", self.ends.len() + 1).as_bytes());
        let mut string = |bytes: &[u8]| {
            out.extend_from_slice(format!("${}\r\n", bytes.len()).as_bytes());
            out.extend_from_slice(bytes);
            out.extend_from_slice(b"\r\n");
        };
        let mut start = 0;
        string(self.name.as_bytes());
        for end in &self.ends {
            string(&self.text[std::mem::replace(&mut start, *end)..*end]);
        }
    }
}

/// A reply, as it came.
#[derive(Debug, Clone)]
pub struct Reply(Resp3Frame);

impl Reply {
    /// A frame that is no error.
    pub(super) fn of(frame: Resp3Frame) -> Result<Reply, Fault> {
        match frame {
            Resp3Frame::SimpleError { data, .. } => Err(server_error(&data)),
            Resp3Frame::BlobError { data, .. } => Err(server_error(&String::from_utf8_lossy(&data))),
            frame => Ok(Reply(frame)),
        }
    }

    /// An integer.
    pub fn as_int(&self) -> Option<i64> {
        match &self.0 {
            Resp3Frame::Number { data, .. } => Some(*data),
            _ => None,
        }
    }

    /// The bytes of any kind of string.
    pub fn as_bytes(&self) -> Option<&Bytes> {
        string(&self.0)
    }

    /// The text of any kind of string.
    pub fn as_text(&self) -> Option<&str> {
        self.as_bytes().and_then(|bytes| std::str::from_utf8(bytes).ok())
    }

    /// The error that a reply within a reply may be.
    pub fn into_refusal(self) -> Option<Fault> {
        Reply::of(self.0).err()
    }

    /// The elements of an array.
    pub fn into_array(self) -> Option<impl ExactSizeIterator<Item = Reply>> {
        match self.0 {
            Resp3Frame::Array { data, .. } => Some(data.into_iter().map(Reply)),
            _ => None,
        }
    }

    /// The strings of an array, where they lie; what is no string is passed over.
    pub fn strings(&self) -> impl Iterator<Item = &[u8]> {
        let elements = match &self.0 {
            Resp3Frame::Array { data, .. } => data.as_slice(),
            _ => &[],
        };
        elements.iter().filter_map(string).map(|bytes| &bytes[..])
    }

    /// The pairs of a map, in no order.
    pub fn into_map(self) -> Option<impl Iterator<Item = (Reply, Reply)>> {
        match self.0 {
            Resp3Frame::Map { data, .. } => Some(data.into_iter().map(|(k, v)| (Reply(k), Reply(v)))),
            _ => None,
        }
    }
}

/// The bytes of any kind of string.
fn string(frame: &Resp3Frame) -> Option<&Bytes> {
    match frame {
        Resp3Frame::BlobString { data, .. }
        | Resp3Frame::SimpleString { data, .. }
        | Resp3Frame::VerbatimString { data, .. } => Some(data),
        _ => None,
    }
}

/// A reply of another shape than the command has.
pub fn unexpected(command: &str) -> Fault {
    Fault::ValkeyProtocol(format!("Valkey's reply to {command} has an unknown shape"))
}

/// An error that the server answered with.
pub fn server_error(message: &str) -> Fault {
    let code = match message {
        // What a script may not do for its user is reported as an error of the script.
        _ if message.contains("ACL failure in script") => "NOPERM",
        "ERR max number of clients reached" => "MAXCLIENTS",
        _ => message.split(' ').next().unwrap_or_default(),
    };
    Fault::Valkey { code: code.to_owned(), message: message.to_owned() }
}
