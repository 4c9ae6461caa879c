//! Connector: an application's connections to Valkey, one to each server that has any of its keys, each opened again by whoever needs it after it broke.
//!
//! Takes a key and a command; gives the reply of the server that has the key. A cluster's redirections are followed: a server that sends on has done
//! nothing. It fails in two ways that must not be confused: nothing was done ([`Unanswered::Unsent`]), or the server was asked and what it said, or did not
//! say, is the caller's to judge ([`Unanswered::Failed`]).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex as Lock, PoisonError};

use tokio::sync::Mutex;

use crate::functions::{Answer, Call, had_begun, is_unknown, load};
use crate::retry::Fault;
use crate::valkey::{Ahead, Command, Connection, Endpoint, Home, Reply};

/// How many times in a row servers of a cluster may send on: while slots move, two of them may each believe that the other one has them.
const MOST_REDIRECTIONS: usize = 5;

/// See the module. Its users share the connections; what they send together is pipelined.
#[derive(Debug)]
pub(super) struct Connector {
    address: Endpoint,
    /// What CLIENT LIST shows.
    name: &'static str,
    /// One for each server: where one of them is out of reach, nobody waits for it who needs another one.
    places: Lock<BTreeMap<Home, Arc<Place>>>,
}

/// The connections to one server.
#[derive(Debug, Default)]
struct Place {
    open: Mutex<Option<Arc<Connection>>>,
    /// For keys whose slot is on its way to this server.
    asking: Mutex<Option<Arc<Connection>>>,
}

/// Why there is no reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unanswered {
    /// Nothing was done: there is no connection, or every server that was asked said that the key is elsewhere, or on its way.
    Unsent(Fault),
    /// The server was asked: its refusal, or silence.
    Failed(Fault),
}

impl Unanswered {
    /// What went wrong.
    pub(super) fn fault(self) -> Fault {
        match self {
            Unanswered::Unsent(fault) | Unanswered::Failed(fault) => fault,
        }
    }
}

impl From<Unanswered> for Fault {
    fn from(unanswered: Unanswered) -> Fault {
        unanswered.fault()
    }
}

impl Connector {
    pub(super) fn new(address: &Endpoint, name: &'static str) -> Connector {
        Connector { address: address.clone(), name, places: Lock::default() }
    }

    /// The connection to the server that has this key, as far as is known. Whoever comes while it is opened waits for the same one.
    pub(super) async fn connection(&self, key: &str) -> Result<Arc<Connection>, Fault> {
        let mut home = self.address.home_of(key).await?;
        loop {
            let place = self.place(&home);
            let mut open = place.open.lock().await;
            if let Some(connection) = usable(&open) {
                return Ok(connection);
            }
            // While this one waited for its turn, whoever had it may have found that the key is elsewhere.
            let now = self.address.home_of(key).await?;
            if now != home {
                home = now;
                continue;
            }
            let connection = Connection::open_unnamed(&self.address.of_stream(key)).await?;
            let connection = self.named(connection).await;
            let reached = connection.home();
            if reached == home {
                *open = Some(Arc::clone(&connection));
                return Ok(connection);
            }
            drop(open);
            let place = self.place(&reached);
            let mut open = place.open.lock().await;
            return Ok(match usable(&open) {
                Some(other) => other,
                None => Arc::clone(open.insert(connection)),
            });
        }
    }

    /// Sends a command about this key, and about none in another slot, to the server that has it.
    pub(super) async fn call(&self, key: &str, command: Command) -> Result<Reply, Unanswered> {
        let connection = self.connection(key).await.map_err(Unanswered::Unsent)?;
        self.call_from(connection, key, command).await.1
    }

    /// The same, beginning on a connection that is known; with the connection that was asked last.
    pub(super) async fn call_from(
        &self,
        mut connection: Arc<Connection>,
        key: &str,
        command: Command,
    ) -> (Arc<Connection>, Result<Reply, Unanswered>) {
        let mut redirections = 0;
        loop {
            let fault = match connection.call(command.clone()).await {
                Ok(reply) => return (connection, Ok(reply)),
                Err(fault) if self.address.is_cluster() && is_elsewhere(&fault) => fault,
                Err(fault) => {
                    // A primary that has become a replica keeps its connections: the next call looks for the new one.
                    if fault.is_of_another_server() {
                        self.forget(&connection).await;
                    }
                    return (connection, Err(Unanswered::Failed(fault)));
                }
            };
            redirections += 1;
            let next = match connection.follow(&self.address.of_stream(key), &fault).await {
                _ if redirections > MOST_REDIRECTIONS => Err(fault),
                Some(ahead) => self.asking(&ahead).await,
                None if fault.is_redirection() => self.connection(key).await,
                None => Err(fault),
            };
            connection = match next {
                Ok(next) => next,
                Err(fault) => return (connection, Err(Unanswered::Unsent(fault))),
            };
        }
    }

    /// Calls a function on the server that has its keys. Where that does not know the functions (a new one of a cluster, say) whoever may load them
    /// does so.
    pub(super) async fn send(&self, call: Call) -> Result<Answer, Unanswered> {
        let key = call.key().to_owned();
        let connection = self.connection(&key).await.map_err(Unanswered::Unsent)?;
        let (asked, reply) = self.call_from(connection, &key, call.command()).await;
        let reply = match reply {
            // Without the right to do it, the daemon's turn to do it is waited for.
            Err(Unanswered::Failed(fault)) if is_unknown(&fault) && load(&asked).await.is_ok() => {
                self.call_from(asked, &key, call.command()).await.1
            }
            reply => reply,
        };
        Answer::told(reply?).map_err(Unanswered::Failed)
    }

    /// From now on another connection is used.
    pub(super) async fn forget(&self, connection: &Arc<Connection>) {
        let place = self.place(&connection.home());
        for kept in [&place.open, &place.asking] {
            let mut kept = kept.lock().await;
            if kept.as_ref().is_some_and(|kept| Arc::ptr_eq(kept, connection)) {
                *kept = None;
            }
        }
    }

    /// Uses this connection from now on, until it is lost.
    #[cfg(feature = "near")]
    pub(super) async fn replace(&self, connection: &Arc<Connection>) {
        *self.place(&connection.home()).open.lock().await = Some(Arc::clone(connection));
    }

    /// The connection for what is on its way to this server.
    async fn asking(&self, ahead: &Ahead) -> Result<Arc<Connection>, Fault> {
        let place = self.place(&ahead.home());
        let mut asking = place.asking.lock().await;
        if let Some(connection) = usable(&asking) {
            return Ok(connection);
        }
        let connection = self.named(ahead.open(&self.address).await?).await;
        *asking = Some(Arc::clone(&connection));
        Ok(connection)
    }

    /// The name helps whoever reads CLIENT LIST; a user without the right to set one works all the same.
    async fn named(&self, connection: Connection) -> Arc<Connection> {
        let _ = connection.call(Command::new("CLIENT").arg("SETNAME").arg(self.name)).await;
        Arc::new(connection)
    }

    fn place(&self, home: &Home) -> Arc<Place> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        match places.get(home) {
            Some(place) => Arc::clone(place),
            None => Arc::clone(places.entry(home.clone()).or_default()),
        }
    }
}

fn usable(kept: &Option<Arc<Connection>>) -> Option<Arc<Connection>> {
    kept.as_ref().filter(|connection| !connection.is_lost()).map(Arc::clone)
}

/// Whether a server of a cluster refused a call before it began, because of where its slot is.
fn is_elsewhere(fault: &Fault) -> bool {
    const REFUSALS: [&str; 4] = ["MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"];
    matches!(fault, Fault::Valkey { code, .. } if REFUSALS.contains(&&**code)) && !had_begun(fault)
}
