//! Connections to Valkey: one, and one to a server in one life of it.
//!
//! Takes an [`Endpoint`]; gives a [`Connection`] that answers commands, or a [`Link`] that also knows which server that is. It
//! fails with what the server said, or with where it could not be reached and why. Lost once, lost for good.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::RespVersion;
use fred::types::config::{
    Blocking, Config as FredConfig, ConnectionConfig, Options, PerformanceConfig, Server as FredServer, ServerConfig,
    TcpConfig, TlsConnector, UnresponsiveConfig,
};
use secrecy::{ExposeSecret, SecretString};
use socket2::TcpKeepalive;
use tokio::task::AbortHandle;

use super::command::{Command, Reply, server_error};
use super::listener::Listener;
use super::place::{KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_TRIES, Place, UNCONFIRMED_LIMIT};
use super::plain;
use super::resp::Bounds;
use super::server::Server;
use super::wire::Wire;
use crate::model::entry::Generation;
use crate::retry::Fault;

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

/// Who a connection introduces itself as: the URL's user and password, decoded once.
#[derive(Debug, Clone)]
struct Credentials {
    username: Option<String>,
    password: Option<SecretString>,
}

/// Where a server is, as the library's configuration and the URL tell.
fn place_of(config: &FredConfig, server: &FredServer, credentials: &Credentials) -> Place {
    let tls = config.tls.as_ref().map(|tls| {
        let TlsConnector::Rustls(connector) = &tls.connector;
        (connector.clone(), server.tls_server_name.as_ref().unwrap_or(&server.host).to_string())
    });
    Place {
        host: server.host.to_string(),
        port: server.port,
        tls,
        username: credentials.username.clone(),
        password: credentials.password.clone(),
        database: config.database.unwrap_or(0),
    }
}

/// A string as a server reads it in a line of text: the library sends its greeting as one, unquoted, so that a blank in a
/// password would begin the next word.
fn quoted(text: &str) -> String {
    let bytes: String = text.bytes().map(|byte| format!("\\x{byte:02x}")).collect();
    format!("\"{bytes}\"")
}

/// A host without the brackets that an IPv6 address bears in a URL.
fn bare_host(host: &str) -> &str {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

/// One connection. Lost once, lost for good.
#[derive(Debug)]
pub struct Connection {
    client: Client,
    /// Where it leads to, for people.
    name: String,
    credentials: Credentials,
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
        let unreadable = |error| plain::of_library("Valkey", &error);
        let mut config = FredConfig::from_url(address.url.expose_secret()).map_err(unreadable)?;
        if let ServerConfig::Centralized { server } = &mut config.server {
            server.host = bare_host(&server.host).into();
        }
        let credentials = Credentials {
            username: config.username.as_deref().map(str::to_owned),
            password: config.password.as_deref().map(SecretString::from),
        };
        config.username = config.username.as_deref().map(quoted);
        config.password = config.password.as_deref().map(quoted);
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
        let place = match &config.server {
            ServerConfig::Centralized { server } => Some(place_of(&config, server, &credentials)),
            _ => None,
        };
        let name = place.as_ref().map_or_else(|| "Valkey, by its sentinels".into(), Place::name);
        let client = Client::new(config, Some(performance), Some(connection), None);
        let task = match (client.init().await, place) {
            (Ok(task), _) => task.abort_handle(),
            (Err(error), Some(place)) if !plain::is_reply(&error) => {
                // The library tells little of why; asked once more, by hand, the place tells more.
                let told = place.diagnose(address.connect_timeout).await;
                return Err(told.unwrap_or_else(|| plain::of_library(&name, &error)));
            }
            (Err(error), _) => return Err(plain::of_library(&name, &error)),
        };
        Ok(Connection {
            client,
            name,
            credentials,
            task,
            command_timeout: address.command_timeout,
            lost: AtomicBool::new(false),
        })
    }

    /// Sends one command and waits for its reply, within the address's limit.
    pub async fn call(&self, command: Command) -> Result<Reply, Fault> {
        self.refuse_if_lost()?;
        let limit = Some(self.command_timeout);
        let options = Options { max_attempts: Some(1), fail_fast: true, timeout: limit, ..Default::default() };
        let (custom, arguments) = command.into_parts();
        match self.client.with_options(&options).custom_raw(custom, arguments).await {
            Ok(frame) => Reply::of(frame),
            Err(e) if plain::is_reply(&e) => Err(server_error(e.details())),
            Err(e) => Err(self.broken(e)),
        }
    }

    /// Where the server is that it reached: for a name that stands for several, the one that was primary.
    fn place(&self) -> Result<Place, Fault> {
        let reached = self.client.active_connections().into_iter().next();
        let server = match self.client.client_config().server {
            ServerConfig::Centralized { server } => server.clone(),
            _ => reached.ok_or_else(|| Fault::ValkeyLost("the connection to Valkey was lost before".into()))?,
        };
        Ok(place_of(&self.client.client_config(), &server, &self.credentials))
    }

    /// Opens a connection of its own to the same server, for what the server says unasked.
    pub async fn open_listener(&self, name: &str, limit: Duration) -> Result<Listener, Fault> {
        Listener::open(&self.place()?, name, limit, self.command_timeout).await
    }

    /// Whether the connection was found broken: by a command, or by itself while there was none.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed) || self.task.is_finished()
    }

    /// A command given to a client whose connection has ended waits for nothing until its time is up.
    fn refuse_if_lost(&self) -> Result<(), Fault> {
        if self.is_lost() { Err(Fault::ValkeyLost("the connection to Valkey was lost before".into())) } else { Ok(()) }
    }

    /// A connection whose reply is missing cannot be used again: the reply may still come, to the wrong question.
    fn broken(&self, error: fred::error::Error) -> Fault {
        self.lost.store(true, Ordering::Relaxed);
        plain::of_library(&self.name, &error)
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
    /// Connects to the primary. A user without the right to name a connection is refused.
    pub async fn open(address: &Endpoint, name: &str) -> Result<Link, Fault> {
        Link::open_as(address, |_, _| name.to_owned()).await
    }

    /// Connects to the primary, by a name made of the server's run id and the connection's number there. The number is 0 where
    /// the server does not tell it.
    pub async fn open_as(address: &Endpoint, name: impl FnOnce(&str, u64) -> String) -> Result<Link, Fault> {
        let commands = Connection::open_unnamed(address).await?;
        let server = Server::told_by(&commands.call(Server::question()).await?)?;
        let number = match commands.call(Command::new("CLIENT").arg("ID")).await {
            Ok(id) => id.as_int().and_then(|id| id.try_into().ok()).unwrap_or(0),
            Err(Fault::Valkey { .. }) => 0,
            Err(fault) => return Err(fault),
        };
        let name = name(&server.run_id, number);
        commands.call(Command::new("CLIENT").arg("SETNAME").arg(name)).await?;
        let generation = Arc::new(Generation {
            run_id: server.run_id,
            replication_id: server.replication_id,
            epoch: EPOCH.fetch_add(1, Ordering::Relaxed),
        });
        Ok(Link { commands, address: address.clone(), generation })
    }

    /// Opens a second connection to the very same server, to read streams on; gives its id, too, which ends its waits.
    pub async fn open_wire(&self, name: &str, bounds: Bounds) -> Result<(Wire, Option<i64>), Fault> {
        let place = self.commands.place()?;
        let Endpoint { connect_timeout, command_timeout, .. } = self.address;
        let mut wire = Wire::open(&place, name, bounds, connect_timeout, command_timeout).await?;
        if !self.is(&Server::told_by(&wire.call(&Server::question()).await?)?) {
            return Err(Fault::ValkeyLost(
                "two connections to Valkey reached two different servers (a failover?)".into(),
            ));
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
