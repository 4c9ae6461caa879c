//! Endpoint: where a connection is to lead.
//!
//! Takes the url, and perhaps a stream or one node of a cluster; gives the way there, for each connection anew: a primary may have been
//! replaced since the last one. It fails with what those said who were asked for the way.

use std::sync::Arc;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};

use super::address::{Address, Form, Node};
use super::place::Place;
use super::route::{Layout, Redirect, Routes, primary_by_sentinel};
use crate::model::slot::Slot;
use crate::retry::Fault;

/// Where Valkey is and how long to wait for it.
///
/// In a cluster each stream has a primary of its own: [`Endpoint::of_stream`] leads there, wherever the stream's slot goes. All
/// endpoints that were made of one another share what is known of the cluster.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// The limit for opening a connection.
    pub connect_timeout: Duration,
    /// The limit for one command; for a blocking one, on top of what it blocks.
    pub command_timeout: Duration,
    url: SecretString,
    /// What the url says; a sentence where it cannot be read.
    address: Arc<Result<Address, String>>,
    goal: Goal,
    routes: Arc<Routes>,
}

/// Which server of a cluster; of no meaning where there is one primary.
#[derive(Debug, Clone)]
enum Goal {
    /// Any primary.
    Any,
    /// The primary of this stream.
    Stream(Arc<str>),
    /// This node.
    Node(Node),
}

/// The server that has a stream, as far as is known: streams of one home can share a connection ([`Endpoint::at`]). A command that names
/// several streams is another matter: in a cluster they must be in one [`Slot`].
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Home(Option<Node>);

impl Home {
    /// A server of a cluster.
    pub(super) fn at(node: Node) -> Home {
        Home(Some(node))
    }

    /// The server of a cluster; none where it is the one that there is.
    #[cfg(feature = "daemon")]
    pub(super) fn node(&self) -> Option<&Node> {
        self.0.as_ref()
    }

    /// Whether it is a server of a cluster, one of many.
    pub fn is_of_cluster(&self) -> bool {
        self.0.is_some()
    }
}

/// For people: `host:port` of a cluster's server; of the one that there is without a cluster, nothing.
impl std::fmt::Display for Home {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.as_ref().map_or(Ok(()), |node| node.fmt(f))
    }
}

/// The way to one server.
#[derive(Debug, Clone)]
pub(super) struct Route {
    pub(super) place: Place,
    pub(super) is_cluster: bool,
    /// The stream that must be there, if one must.
    pub(super) stream: Option<Arc<str>>,
    /// Whether the stream's slot is on its way to this node: each command must say that it knows.
    pub(super) asking: bool,
    /// Which state of the knowledge of the cluster it came from.
    seen: u64,
}

impl Route {
    pub(super) fn home(&self) -> Home {
        Home(self.is_cluster.then(|| self.place.node.clone()))
    }
}

impl Endpoint {
    /// By this url: `valkey://`, `valkeys://`, `redis://`, `rediss://`, or a `-sentinel` or `-cluster` form of these.
    pub fn new(url: SecretString, connect_timeout: Duration, command_timeout: Duration) -> Endpoint {
        let address = Arc::new(Address::parse(url.expose_secret()));
        Endpoint { connect_timeout, command_timeout, url, address, goal: Goal::Any, routes: Arc::default() }
    }

    /// The url, with its secrets.
    pub fn url(&self) -> &SecretString {
        &self.url
    }

    /// The same for one stream: leads to the primary that has it, each time a connection is opened.
    pub fn of_stream(&self, stream: &str) -> Endpoint {
        Endpoint { goal: Goal::Stream(stream.into()), ..self.clone() }
    }

    /// The same for one home.
    pub fn at(&self, home: &Home) -> Endpoint {
        Endpoint { goal: home.0.clone().map_or(Goal::Any, Goal::Node), ..self.clone() }
    }

    /// The hosts that the url names, where it does not ask for TLS; none where it does.
    pub fn hosts_in_the_open(&self) -> Vec<String> {
        let address = self.address().ok().filter(|address| address.tls.is_none());
        address.map(|address| address.nodes.iter().map(|node| node.host.clone()).collect()).unwrap_or_default()
    }

    /// Whether the url names a cluster. A url that cannot be read names none.
    pub fn is_cluster(&self) -> bool {
        self.address().is_ok_and(|address| address.is_cluster())
    }

    /// The home of a stream: from memory, where that knows. Whether it is right the server there will say.
    ///
    /// # Errors
    /// What the nodes said that were asked: [`Fault::ValkeyLost`] where none answers.
    pub async fn home_of(&self, stream: &str) -> Result<Home, Fault> {
        let address = self.address()?;
        match address.is_cluster() {
            true => Ok(Home(Some(self.routes.primary_of(Slot::of(stream), address, self).await?.0))),
            false => Ok(Home(None)),
        }
    }

    /// The homes of all streams: each primary that has slots, asked for anew; where it is no cluster, the one there is.
    ///
    /// # Errors
    /// As [`Endpoint::home_of`].
    pub async fn homes(&self) -> Result<Vec<Home>, Fault> {
        Ok(self.layout().await?.map_or_else(|| vec![Home::default()], |layout| layout.homes()))
    }

    /// Which primary has which slots, asked for anew; none where it is no cluster.
    ///
    /// # Errors
    /// As [`Endpoint::home_of`].
    pub async fn layout(&self) -> Result<Option<Layout>, Fault> {
        let address = self.address()?;
        match address.is_cluster() {
            true => self.routes.layout(address, self).await.map(Some),
            false => Ok(None),
        }
    }

    /// What a fault, met on a stream's connection, says of where that stream is.
    pub(super) async fn learn(&self, stream: &str, from: &Node, fault: &Fault) -> Option<Redirect> {
        let redirect = Redirect::told_by(fault, from)?;
        if let Redirect::Moved(node) = &redirect {
            self.routes.moved(Slot::of(stream), node).await;
        }
        Some(redirect)
    }

    /// The way, as far as is known.
    pub(super) async fn route(&self) -> Result<Route, Fault> {
        let address = self.address()?;
        let (node, seen) = match (&address.form, &self.goal) {
            (Form::Primary, _) => (address.nodes[0].clone(), 0),
            (Form::Sentinel { service, .. }, _) => (primary_by_sentinel(address, service, self).await?, 0),
            (Form::Cluster, Goal::Any) => self.routes.any_primary(address, self).await?,
            (Form::Cluster, Goal::Stream(stream)) => self.routes.primary_of(Slot::of(stream), address, self).await?,
            (Form::Cluster, Goal::Node(node)) => (node.clone(), 0),
        };
        self.route_to(address, &node, seen)
    }

    fn route_to(&self, address: &Address, node: &Node, seen: u64) -> Result<Route, Fault> {
        let (place, is_cluster) = (address.server(node)?, address.is_cluster());
        let stream = match &self.goal {
            Goal::Stream(stream) if is_cluster => Some(stream.clone()),
            _ => None,
        };
        Ok(Route { place, is_cluster, stream, asking: false, seen })
    }

    /// Another way, where a fault that was met on this one says or suggests that there is one.
    pub(super) async fn rerouted(&self, route: &Route, fault: &Fault) -> Option<Route> {
        if !route.is_cluster {
            return None;
        }
        let address = self.address().ok()?;
        let redirect = match &self.goal {
            Goal::Stream(stream) => self.learn(stream, &route.place.node, fault).await,
            Goal::Any | Goal::Node(_) => None,
        };
        match redirect {
            Some(Redirect::Moved(node)) => self.route_to(address, &node, route.seen).ok(),
            Some(Redirect::Ask(node)) => {
                self.route_to(address, &node, route.seen).ok().map(|route| Route { asking: true, ..route })
            }
            None if is_about_the_server(fault) => {
                self.routes.doubt(route.seen).await;
                let other = self.route().await.ok()?;
                Some(other).filter(|other| other.place.node != route.place.node)
            }
            None => None,
        }
    }

    pub(super) fn address(&self) -> Result<&Address, Fault> {
        self.address.as_ref().as_ref().map_err(|sentence| Fault::ValkeyProtocol(format!("valkey.url {sentence}")))
    }
}

/// Whether a fault is a reason to ask the cluster again who has which slots.
fn is_about_the_server(fault: &Fault) -> bool {
    match fault {
        Fault::ValkeyLost(_) => true,
        Fault::Valkey { code, .. } => ["READONLY", "CLUSTERDOWN", "MASTERDOWN", "LOADING", "MOVED"].contains(&&**code),
        _ => false,
    }
}
