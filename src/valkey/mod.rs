//! Talking to Valkey: the only module that names `fred`, so that it can be patched or replaced.
//!
//! A [`Connection`] is one TCP connection that never reconnects, never retries and bounds every wait; whoever loses one
//! opens another. A [`Link`] is such a connection to one server in one life of it: its [`Generation`]. What was read by a
//! link is acknowledged on that link or not at all, so "an acknowledgement never crosses to another server" needs no care
//! at run time: there is nothing that could carry it there. Whoever reads a stream adds a [`Wire`] to his link, to the
//! same server: reads wait there, and are parsed by our own hand.
//!
//! Commands are sent raw and replies read raw, in RESP3: typed conversions of this client lose what we need (the order of
//! fields, entries deleted under a pending id) and take a nil for an error. In RESP3 a stream reply is a map and cannot be
//! mistaken for a pub/sub message, which in RESP2 is decided by the data in it.

pub mod resp;
mod wire;

use std::fmt::{Display, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::config::{
    Blocking, Config as FredConfig, ConnectionConfig, Options, PerformanceConfig, ServerConfig, TcpConfig,
    TlsConnector, UnresponsiveConfig,
};
use fred::types::{ClusterHash, CustomCommand, Resp3Frame, RespVersion, Value};
use secrecy::{ExposeSecret, SecretString};
use socket2::TcpKeepalive;
use tokio::task::AbortHandle;

use crate::model::entry::Generation;
use crate::retry::Fault;

use wire::Place;
pub use wire::Wire;

/// How long a silent connection is trusted before the kernel asks whether the peer is there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
/// How often it then asks.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How often it asks in vain before the connection is given up.
const KEEPALIVE_TRIES: u32 = 3;
/// How long sent bytes may stay unconfirmed before the kernel gives the connection up.
const UNCONFIRMED_LIMIT: Duration = Duration::from_secs(30);

/// Where Valkey is and how long to wait for it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// `valkey://`, `valkeys://`, `redis://`, `rediss://`, or a `-sentinel` form of these.
    pub url: SecretString,
    /// The limit for opening a connection.
    pub connect_timeout: Duration,
    /// The limit for one command; for a blocking one, on top of what it blocks.
    pub command_timeout: Duration,
}

/// One connection. Lost once, lost for good.
#[derive(Debug)]
pub struct Connection {
    client: Client,
    task: AbortHandle,
    command_timeout: Duration,
    lost: AtomicBool,
}

impl Connection {
    /// Connects, in RESP3, and gives the connection a name that `CLIENT LIST` shows.
    pub async fn open(address: &Endpoint, name: &str) -> Result<Connection, Fault> {
        let connection = Connection::open_unnamed(address).await?;
        connection.call(Command::new("CLIENT").arg("SETNAME").arg(name)).await?;
        Ok(connection)
    }

    /// Connects, in RESP3, as a user who may not have the right to name a connection.
    pub async fn open_unnamed(address: &Endpoint) -> Result<Connection, Fault> {
        let mut config = FredConfig::from_url(address.url.expose_secret()).map_err(lost)?;
        config.version = RespVersion::RESP3;
        config.fail_fast = true;
        config.blocking = Blocking::Block;
        let connection = ConnectionConfig {
            connection_timeout: address.connect_timeout,
            internal_command_timeout: address.command_timeout,
            max_command_attempts: 1,
            max_redirections: 1,
            unresponsive: UnresponsiveConfig { max_timeout: None, ..Default::default() },
            reconnect_on_auth_error: false,
            auto_client_setname: false,
            tcp: TcpConfig {
                nodelay: Some(true),
                keepalive: Some(
                    TcpKeepalive::new()
                        .with_time(KEEPALIVE_IDLE)
                        .with_interval(KEEPALIVE_INTERVAL)
                        .with_retries(KEEPALIVE_TRIES),
                ),
                user_timeout: Some(UNCONFIRMED_LIMIT),
                ..Default::default()
            },
            ..Default::default()
        };
        let performance = PerformanceConfig { default_command_timeout: address.command_timeout, ..Default::default() };
        let client = Client::new(config, Some(performance), Some(connection), None);
        let task = client.init().await.map_err(lost)?.abort_handle();
        Ok(Connection { client, task, command_timeout: address.command_timeout, lost: AtomicBool::new(false) })
    }

    /// Sends one command and waits for its reply, within the address's limit.
    pub async fn call(&self, command: Command) -> Result<Reply, Fault> {
        self.refuse_if_lost()?;
        let limit = Some(self.command_timeout);
        let options = Options { max_attempts: Some(1), fail_fast: true, timeout: limit, ..Default::default() };
        let (custom, arguments) = command.into_parts();
        match self.client.with_options(&options).custom_raw(custom, arguments).await {
            Ok(frame) => Reply::of(frame),
            Err(e) if is_reply(&e) => Err(server_error(e.details())),
            Err(e) => Err(self.broken(e)),
        }
    }

    /// Where the server is that it reached: for a name that stands for several, the one that was primary.
    fn place(&self) -> Result<Place, Fault> {
        let config = self.client.client_config();
        let reached = self.client.active_connections().into_iter().next();
        let server = match config.server {
            ServerConfig::Centralized { server } => server,
            _ => reached.ok_or_else(|| Fault::ValkeyLost("the connection was lost before".into()))?,
        };
        let tls = config.tls.map(|tls| {
            let TlsConnector::Rustls(connector) = tls.connector;
            (connector, server.tls_server_name.as_ref().unwrap_or(&server.host).to_string())
        });
        Ok(Place {
            host: server.host.to_string(),
            port: server.port,
            tls,
            username: config.username,
            password: config.password,
            database: config.database.unwrap_or(0),
        })
    }

    /// Whether the connection was found broken: by a command, or by itself while there was none.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed) || self.task.is_finished()
    }

    /// A command given to a client whose connection has ended waits for nothing until its time is up.
    fn refuse_if_lost(&self) -> Result<(), Fault> {
        if self.is_lost() { Err(Fault::ValkeyLost("the connection was lost before".into())) } else { Ok(()) }
    }

    /// A connection whose reply is missing cannot be used again: the reply may still come, to the wrong question.
    fn broken(&self, error: fred::error::Error) -> Fault {
        self.lost.store(true, Ordering::Relaxed);
        lost(error)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A connection to one server in one life of it.
#[derive(Debug)]
pub struct Link {
    commands: Connection,
    address: Endpoint,
    generation: Arc<Generation>,
}

/// Counts the links of this process: no two of them have the same generation.
static EPOCH: AtomicU64 = AtomicU64::new(1);

impl Link {
    /// Connects to the primary.
    pub async fn open(address: &Endpoint, name: &str) -> Result<Link, Fault> {
        let commands = Connection::open(address, name).await?;
        let server = Server::told_by(&commands.call(Server::question()).await?)?;
        let generation = Arc::new(Generation {
            run_id: server.run_id,
            replication_id: server.replication_id,
            epoch: EPOCH.fetch_add(1, Ordering::Relaxed),
        });
        Ok(Link { commands, address: address.clone(), generation })
    }

    /// Opens a second connection to the very same server, to read streams on; gives its id, too, which ends its waits.
    pub async fn open_wire(&self, name: &str) -> Result<(Wire, Option<i64>), Fault> {
        let place = self.commands.place()?;
        let mut wire = Wire::open(&place, name, self.address.connect_timeout, self.address.command_timeout).await?;
        if !self.is(&Server::told_by(&wire.call(&Server::question()).await?)?) {
            return Err(Fault::ValkeyLost("two connections reached two different servers (a failover?)".into()));
        }
        // Without this privilege a stop waits for the current blocking read to end, a second or two.
        let id = wire.call(&Command::new("CLIENT").arg("ID")).await.ok().and_then(|id| id.as_int());
        Ok((wire, id))
    }

    /// The connection that never waits for entries.
    pub fn commands(&self) -> &Connection {
        &self.commands
    }

    /// Which life of which server this is.
    pub fn generation(&self) -> &Arc<Generation> {
        &self.generation
    }

    /// Whether the connection was found broken: then it is of no more use.
    pub fn is_lost(&self) -> bool {
        self.commands.is_lost()
    }

    /// Whether the server at the other end is still the primary it was, with the same history of writes.
    ///
    /// A server that became a replica and a primary again keeps its connections and changes its replication id.
    pub async fn is_same_server(&self) -> Result<bool, Fault> {
        Ok(self.is(&Server::told_by(&self.commands.call(Server::question()).await?)?))
    }

    fn is(&self, server: &Server) -> bool {
        server.run_id == self.generation.run_id && server.replication_id == self.generation.replication_id
    }

    /// Ends a read that waits on the wire of this id, as if its time were up.
    pub async fn unblock(&self, wire: i64) {
        // If this fails the read ends by itself a little later.
        let _ = self.commands.call(Command::new("CLIENT").arg("UNBLOCK").arg(wire)).await;
    }
}

/// Who a server is, as `INFO` tells.
#[derive(Debug, PartialEq, Eq)]
struct Server {
    run_id: String,
    replication_id: String,
}

impl Server {
    fn question() -> Command {
        Command::new("INFO").arg("server").arg("replication")
    }

    fn told_by(info: &Reply) -> Result<Server, Fault> {
        let text = info.as_text().unwrap_or_default();
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(|value| value.trim().to_owned()))
                .ok_or_else(|| Fault::ValkeyLost(format!("INFO lacks {name}")))
        };
        if field("role")? != "master" {
            return Err(server_error("READONLY this server is a replica"));
        }
        Ok(Server { run_id: field("run_id")?, replication_id: field("master_replid")? })
    }
}

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

    fn push(&mut self, argument: impl Display) {
        // Memory takes everything.
        let _ = write!(self.text, "{argument}");
        self.ends.push(self.text.len());
    }

    fn into_parts(self) -> (CustomCommand, Vec<Value>) {
        let text = self.text.freeze();
        let mut start = 0;
        let arguments =
            self.ends.into_iter().map(|end| Value::Bytes(text.slice(std::mem::replace(&mut start, end)..end)));
        (CustomCommand::new_static(self.name, ClusterHash::Random, false), arguments.collect())
    }

    /// Writes it as a server takes it: an array of strings.
    fn write_to(&self, out: &mut Vec<u8>) {
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
    fn of(frame: Resp3Frame) -> Result<Reply, Fault> {
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
    Fault::ValkeyLost(format!("the reply to {command} has an unknown shape"))
}

fn lost(error: fred::error::Error) -> Fault {
    if is_reply(&error) { server_error(error.details()) } else { Fault::ValkeyLost(error.details().to_owned()) }
}

/// Whether the server said it; everything else this client makes up itself.
fn is_reply(error: &fred::error::Error) -> bool {
    let code = error.details().split(' ').next().unwrap_or_default();
    code.len() >= 3 && code.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
}

fn server_error(message: &str) -> Fault {
    let code = message.split(' ').next().unwrap_or_default();
    Fault::Valkey { code: code.to_owned(), message: message.to_owned() }
}
