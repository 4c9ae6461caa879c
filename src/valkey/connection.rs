//! A connection to Valkey.
//!
//! Takes an [`Endpoint`]; gives a [`Connection`] that answers commands. It fails with what the server said, or with where it could not be
//! reached and why. Lost once, lost for good.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::RespVersion;
use fred::types::config::{
    Blocking, Config as FredConfig, ConnectionConfig, Options, PerformanceConfig, Server as FredServer, ServerConfig,
    TcpConfig, TlsConnector as LibraryConnector, UnresponsiveConfig,
};
use secrecy::ExposeSecret;
use socket2::TcpKeepalive;
use tokio::task::AbortHandle;

use super::command::{Command, Reply, server_error};
use super::endpoint::{Endpoint, Home, Route};
use super::listener::Listener;
use super::place::{KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_TRIES, Place, UNCONFIRMED_LIMIT};
use super::plain;
use super::resp::Bounds;
use super::wire::Wire;
use crate::retry::Fault;

/// A string as a server reads it in a line of text: the library sends its greeting as one, unquoted, so that a blank in a
/// password would begin the next word.
fn quoted(text: &str) -> String {
    let bytes: String = text.bytes().map(|byte| format!("\\x{byte:02x}")).collect();
    format!("\"{bytes}\"")
}

/// One connection. Lost once, lost for good.
#[derive(Debug)]
pub struct Connection {
    sender: Sender,
    /// Where it leads to.
    route: Route,
    command_timeout: Duration,
    /// Whether it is a link's: of no more use when the server is no longer the primary, or no longer that of the stream.
    is_of_link: bool,
    lost: AtomicBool,
}

/// By whom commands are sent.
enum Sender {
    Library {
        client: Client,
        task: AbortHandle,
    },
    /// By our own hand, one after the other, each behind an ASKING: only while a slot is on its way.
    Asking(Box<tokio::sync::Mutex<Wire>>),
}

/// Where the slot of a key is on its way to.
#[derive(Debug)]
pub struct Ahead(Route);

impl Ahead {
    /// Which of a cluster's servers that is.
    pub fn home(&self) -> Home {
        self.0.home()
    }

    /// Connects to it: good for keys whose slots are on their way there, and no other ones.
    ///
    /// # Errors
    /// That it cannot be reached.
    pub async fn open(&self, endpoint: &Endpoint) -> Result<Connection, Fault> {
        Connection::by(&self.0, endpoint).await
    }
}

impl Connection {
    /// Connects, in RESP3, and gives the connection a name that `CLIENT LIST` shows.
    pub async fn open(endpoint: &Endpoint, name: &str) -> Result<Connection, Fault> {
        let connection = Connection::open_unnamed(endpoint).await?;
        connection.call(Command::new("CLIENT").arg("SETNAME").arg(name)).await?;
        Ok(connection)
    }

    /// Connects, in RESP3, as a user who may not have the right to name a connection. Nobody looks whether the server still has the
    /// endpoint's stream, nor whether it is the primary: what is sent will tell.
    pub async fn open_unnamed(endpoint: &Endpoint) -> Result<Connection, Fault> {
        let route = endpoint.route().await?;
        match Connection::by(&route, endpoint).await {
            Err(fault) => match endpoint.rerouted(&route, &fault).await {
                Some(other) => Connection::by(&other, endpoint).await,
                None => Err(fault),
            },
            connected => connected,
        }
    }

    /// Connects by this way.
    pub(super) async fn by(route: &Route, endpoint: &Endpoint) -> Result<Connection, Fault> {
        let Endpoint { connect_timeout, command_timeout, .. } = *endpoint;
        let sender = if route.asking {
            let bounds = Bounds { entry: 0, kept: 0 };
            let wire = Wire::open(&route.place, "tidegate:asking", bounds, connect_timeout, command_timeout).await?;
            Sender::Asking(Box::new(tokio::sync::Mutex::new(wire.asking())))
        } else {
            let (client, task) = connect(&route.place, endpoint).await?;
            Sender::Library { client, task }
        };
        Ok(Connection {
            sender,
            route: route.clone(),
            command_timeout,
            is_of_link: false,
            lost: AtomicBool::new(false),
        })
    }

    /// The same for a link.
    pub(super) fn of_link(mut self) -> Connection {
        self.is_of_link = true;
        self
    }

    /// What a fault met on this connection says of where the endpoint's stream is: where it is on its way to, if it is. Else the endpoint leads, from
    /// now on, to where it is.
    pub async fn follow(&self, endpoint: &Endpoint, fault: &Fault) -> Option<Ahead> {
        endpoint.rerouted(&self.route, fault).await.filter(|route| route.asking).map(Ahead)
    }

    /// Which of a cluster's servers it leads to.
    pub fn home(&self) -> Home {
        self.route.home()
    }

    /// Sends one command and waits for its reply, within the endpoint's limit.
    pub async fn call(&self, command: Command) -> Result<Reply, Fault> {
        self.refuse_if_lost()?;
        let reply = match &self.sender {
            Sender::Library { client, .. } => self.call_by(client, command).await,
            Sender::Asking(wire) => wire.lock().await.call(&command).await,
        };
        reply.inspect_err(|fault| {
            // One that leads to a node, and not to a stream, is good for the streams that are left.
            let is_over = !fault.is_redirection() || self.route.stream.is_some();
            if self.is_of_link && fault.is_of_another_server() && is_over {
                self.give_up();
            }
        })
    }

    async fn call_by(&self, client: &Client, command: Command) -> Result<Reply, Fault> {
        let limit = Some(self.command_timeout);
        let options = Options { max_attempts: Some(1), fail_fast: true, timeout: limit, ..Default::default() };
        let (custom, arguments) = command.into_parts();
        match client.with_options(&options).custom_raw(custom, arguments).await {
            Ok(frame) => Reply::of(frame),
            Err(e) if plain::is_reply(&e) => Err(server_error(e.details())),
            Err(e) => Err(self.broken(e)),
        }
    }

    /// Where it leads to.
    pub(super) fn place(&self) -> &Place {
        &self.route.place
    }

    /// Opens a connection of its own to the same server, for what the server says unasked.
    pub async fn open_listener(&self, name: &str, limit: Duration) -> Result<Listener, Fault> {
        Listener::open(self.place(), name, limit, self.command_timeout).await
    }

    /// Whether the connection was found broken: by a command, or by itself while there was none.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
            || match &self.sender {
                Sender::Library { task, .. } => task.is_finished(),
                // One that is in use is not known to be lost.
                Sender::Asking(wire) => wire.try_lock().is_ok_and(|wire| wire.is_lost()),
            }
    }

    /// Gives it up.
    pub(super) fn give_up(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// A command given to a client whose connection has ended waits for nothing until its time is up.
    fn refuse_if_lost(&self) -> Result<(), Fault> {
        if self.is_lost() { Err(Fault::ValkeyLost("the connection to Valkey was lost before".into())) } else { Ok(()) }
    }

    /// A connection whose reply is missing cannot be used again: the reply may still come, to the wrong question.
    fn broken(&self, error: fred::error::Error) -> Fault {
        self.give_up();
        plain::of_library(&self.route.place.name(), &error)
    }
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Sender::Asking(_)) { "Asking" } else { "Library" })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Sender::Library { task, .. } = &self.sender {
            task.abort();
        }
    }
}

/// Connects the client library to one place.
async fn connect(place: &Place, endpoint: &Endpoint) -> Result<(Client, AbortHandle), Fault> {
    let mut server = FredServer::new(place.node.host.as_str(), place.node.port);
    server.tls_server_name = place.tls.as_ref().map(|(_, name)| name.as_str().into());
    let config = FredConfig {
        server: ServerConfig::Centralized { server },
        tls: place.tls.clone().map(|(connector, _)| LibraryConnector::Rustls(connector).into()),
        username: place.username.as_deref().map(quoted),
        password: place.password.as_ref().map(|password| quoted(password.expose_secret())),
        database: Some(place.database).filter(|database| *database > 0),
        version: RespVersion::RESP3,
        fail_fast: true,
        blocking: Blocking::Block,
    };
    let connection = ConnectionConfig {
        connection_timeout: endpoint.connect_timeout,
        internal_command_timeout: endpoint.command_timeout,
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
    let performance = PerformanceConfig { default_command_timeout: endpoint.command_timeout, ..Default::default() };
    let client = Client::new(config, Some(performance), Some(connection), None);
    match client.init().await {
        Ok(task) => Ok((client, task.abort_handle())),
        Err(error) if plain::is_reply(&error) => Err(plain::of_library(&place.name(), &error)),
        Err(error) => {
            // The library tells little of why; asked once more, by hand, the place tells more.
            let told = place.diagnose(endpoint.connect_timeout).await;
            Err(told.unwrap_or_else(|| plain::of_library(&place.name(), &error)))
        }
    }
}
