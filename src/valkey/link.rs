//! Link: a connection to one server in one life of it.
//!
//! Takes an [`Endpoint`]; gives a connection to a primary, which has the endpoint's stream where it names one, and knows which life of which
//! server that is. A cluster's redirections are followed while it is opened and never after: when the stream's slot goes, its link is of
//! no more use, and the next one leads to where it went. It fails with what the last server said.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::try_join;

use super::command::Command;
use super::connection::Connection;
use super::endpoint::{Endpoint, Route};
use super::resp::Bounds;
use super::server::Server;
use super::wire::Wire;
use crate::model::entry::Generation;
use crate::retry::Fault;

/// How many times in a row a cluster may send on: while slots move, two servers may each believe that the other one has them.
const MOST_REDIRECTIONS: usize = 5;

/// A connection to one server in one life of it.
#[derive(Debug)]
pub struct Link {
    commands: Connection,
    endpoint: Endpoint,
    server: Server,
    is_cluster: bool,
    is_asking: bool,
    /// The connection's number on the server; 0 where that does not tell it.
    number: u64,
    generation: Arc<Generation>,
}

/// Counts the links of this process: no two of them have the same generation.
static EPOCH: AtomicU64 = AtomicU64::new(1);

impl Link {
    /// Connects to the primary. A user without the right to name a connection is refused.
    pub async fn open(endpoint: &Endpoint, name: &str) -> Result<Link, Fault> {
        Link::open_as(endpoint, |_, _| name.to_owned()).await
    }

    /// Connects to the primary, by a name made of the server's run id and the connection's number there. The number is 0 where
    /// the server does not tell it.
    pub async fn open_as(endpoint: &Endpoint, name: impl FnOnce(&str, u64) -> String) -> Result<Link, Fault> {
        let (mut route, mut redirections) = (endpoint.route().await?, 0);
        let (commands, server) = loop {
            let fault = match reach(endpoint, &route).await {
                Ok(reached) => break reached,
                Err(fault) => fault,
            };
            redirections += 1;
            route = match endpoint.rerouted(&route, &fault).await {
                Some(other) if redirections <= MOST_REDIRECTIONS => other,
                _ => return Err(fault),
            };
        };
        let number = match commands.call(Command::new("CLIENT").arg("ID")).await {
            Ok(id) => id.as_int().and_then(|id| id.try_into().ok()).unwrap_or(0),
            Err(Fault::Valkey { .. }) => 0,
            Err(fault) => return Err(fault),
        };
        let name = name(&server.run_id, number);
        commands.call(Command::new("CLIENT").arg("SETNAME").arg(name)).await?;
        let generation = Arc::new(Generation {
            run_id: server.run_id.clone(),
            replication_id: server.replication_id.clone(),
            epoch: EPOCH.fetch_add(1, Ordering::Relaxed),
        });
        let Route { is_cluster, asking: is_asking, .. } = route;
        Ok(Link { commands, endpoint: endpoint.clone(), server, is_cluster, is_asking, number, generation })
    }

    /// Opens a second connection to the very same server, to read streams on; gives its id, too, which ends its waits.
    pub async fn open_wire(&self, name: &str, bounds: Bounds) -> Result<(Wire, Option<i64>), Fault> {
        let Endpoint { connect_timeout, command_timeout, .. } = self.endpoint;
        let mut wire = Wire::open(self.commands.place(), name, bounds, connect_timeout, command_timeout).await?;
        let server = Server::told_by(&wire.call(&Server::question()).await?, None)?;
        if !server.has_the_same_past(&self.server) {
            return Err(Fault::ValkeyLost(
                "two connections to Valkey reached two different servers (a failover?)".into(),
            ));
        }
        // Without this privilege a stop waits for the current blocking read to end, a second or two.
        let id = wire.call(&Command::new("CLIENT").arg("ID")).await.ok().and_then(|id| id.as_int());
        Ok((if self.is_asking { wire.asking() } else { wire }, id))
    }

    /// The connection that never waits for entries.
    pub fn commands(&self) -> &Connection {
        &self.commands
    }

    /// The connection's number on the server, by which others can ask whether it still exists; 0 where the server does not tell it.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Which life of which server this is.
    pub fn generation(&self) -> &Arc<Generation> {
        &self.generation
    }

    /// The node's configuration epoch when the link was opened: another one after it has taken over slots. None where it is no cluster.
    pub fn config_epoch(&self) -> Option<u64> {
        self.server.config_epoch
    }

    /// Whether the connection was found broken, or to lead to another server than it did: then it is of no more use.
    pub fn is_lost(&self) -> bool {
        self.commands.is_lost()
    }

    /// Whether it leads to where the stream's slot is on its way to, and is good for that stream alone.
    pub fn is_asking(&self) -> bool {
        self.is_asking
    }

    /// Whether the server at the other end is still the primary it was, with the same history of writes, and in a cluster has taken over no
    /// slot since. If not, the link is lost.
    ///
    /// A server that became a replica and a primary again keeps its connections and changes its replication id.
    pub async fn is_same_server(&self) -> Result<bool, Fault> {
        let is_same = told(&self.commands, self.is_cluster).await? == self.server;
        if !is_same {
            self.commands.give_up();
        }
        Ok(is_same)
    }

    /// Whether the server at the other end has this stream, now. Where it is no cluster it has them all.
    ///
    /// # Errors
    /// What the server said, other than where the stream is instead.
    pub async fn has(&self, stream: &str) -> Result<bool, Fault> {
        if !self.is_cluster {
            return Ok(true);
        }
        match self.commands.call(Command::new("EXISTS").arg(stream)).await {
            Ok(_) => Ok(true),
            Err(fault) => match self.endpoint.learn(stream, &self.commands.place().node, &fault).await {
                Some(_) => Ok(false),
                None => Err(fault),
            },
        }
    }

    /// Ends a read that waits on the wire of this id, as if its time were up.
    pub async fn unblock(&self, wire: i64) {
        // If this fails the read ends by itself a little later.
        let _ = self.commands.call(Command::new("CLIENT").arg("UNBLOCK").arg(wire)).await;
    }
}

/// Goes this way, and looks whether it leads to a primary that has the stream.
async fn reach(endpoint: &Endpoint, route: &Route) -> Result<(Connection, Server), Fault> {
    let commands = Connection::by(route, endpoint).await?.of_link();
    // Before everything else: a replica's answer to this names the primary.
    if let Some(stream) = &route.stream {
        commands.call(Command::new("EXISTS").arg(stream)).await?;
    }
    let server = told(&commands, route.is_cluster).await?;
    if server.is_in_cluster && !route.is_cluster {
        let place = route.place.name();
        return Err(Fault::ValkeyProtocol(format!(
            "{place} is a node of a cluster: write valkey-cluster:// in valkey.url"
        )));
    }
    Ok((commands, server))
}

/// Which server it is, by its own account.
async fn told(commands: &Connection, is_cluster: bool) -> Result<Server, Fault> {
    let info = commands.call(Server::question());
    if is_cluster {
        let (info, cluster) = try_join(info, commands.call(Server::question_of_cluster())).await?;
        Server::told_by(&info, Some(&cluster))
    } else {
        Server::told_by(&info.await?, None)
    }
}
