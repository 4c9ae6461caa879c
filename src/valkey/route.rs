//! Route: which server is the primary, of a cluster's slot or by the sentinels' word.
//!
//! Takes a slot, or a service's name, and the nodes to ask; gives a node. What a cluster said is remembered until a server or a broken
//! connection says otherwise; sentinels are asked each time. It fails where nobody answers, with what each one said.

use std::collections::BTreeSet;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::select_ok;
use rand::seq::SliceRandom;
use tokio::sync::Mutex;

use super::address::{Address, Node};
use super::command::{Command, Reply, unexpected};
use super::endpoint::{Endpoint, Home};
use super::place::Place;
use super::resp::Bounds;
use super::wire::Wire;
use crate::model::slot::{SLOTS, Slot};
use crate::retry::Fault;

/// How many nodes are asked at once: one that is out of reach keeps nobody waiting while another one answers.
const ASKED_AT_ONCE: usize = 3;
/// How many nodes of those that are known are asked, beside those of the url.
const ASKED_OF_KNOWN: usize = 6;
/// How long a map is used at the least, however many doubt it: cluster nodes are asked four times a second at the most.
const SHORTEST_LIFE: Duration = Duration::from_millis(250);
/// The name of the connections that ask.
const NAME: &str = "tidegate:route";
/// No stream is read on them.
const NO_ENTRIES: Bounds = Bounds { entry: 0, kept: 0 };

/// What is known of a cluster. One for all endpoints of one url.
#[derive(Debug, Default)]
pub(super) struct Routes(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// None until it is asked for, and again when it was found wrong.
    map: Option<SlotMap>,
    /// All nodes of the last map, replicas too: whom to ask next.
    nodes: BTreeSet<Node>,
    /// Counts the maps.
    version: u64,
    /// When the last one was asked for.
    asked_at: Option<Instant>,
}

impl Routes {
    /// The primary of a slot, and the version of the map that says so.
    pub(super) async fn primary_of(
        &self,
        slot: Slot,
        address: &Address,
        asker: &Endpoint,
    ) -> Result<(Node, u64), Fault> {
        let mut known = self.0.lock().await;
        if let Some(node) = known.map.as_ref().and_then(|map| map.primary_of(slot)) {
            return Ok((node.clone(), known.version));
        }
        let map = known.ask(address, asker).await?;
        let node = map.primary_of(slot).cloned().ok_or_else(|| Fault::Valkey {
            code: "CLUSTERDOWN".into(),
            message: format!("CLUSTERDOWN no node of the cluster serves slot {slot}"),
        })?;
        Ok((node, known.version))
    }

    /// A primary that has slots.
    pub(super) async fn any_primary(&self, address: &Address, asker: &Endpoint) -> Result<(Node, u64), Fault> {
        let mut known = self.0.lock().await;
        if let Some(node) = known.map.as_ref().and_then(|map| map.nodes.first()) {
            return Ok((node.clone(), known.version));
        }
        let node = known.ask(address, asker).await?.nodes.first().cloned().ok_or_else(|| Fault::Valkey {
            code: "CLUSTERDOWN".into(),
            message: "CLUSTERDOWN no node of the cluster serves a slot".into(),
        })?;
        Ok((node, known.version))
    }

    /// Which primary has which slots, by a map that is new.
    pub(super) async fn layout(&self, address: &Address, asker: &Endpoint) -> Result<Layout, Fault> {
        Ok(self.0.lock().await.ask(address, asker).await?.layout())
    }

    /// A server said that another one has this slot.
    pub(super) async fn moved(&self, slot: Slot, to: &Node) {
        let mut known = self.0.lock().await;
        known.nodes.insert(to.clone());
        if let Some(map) = &mut known.map {
            map.set(slot, slot, to);
        }
    }

    /// What this version of the map says led nowhere. Where there is a newer one by now, that is used.
    pub(super) async fn doubt(&self, version: u64) {
        let mut known = self.0.lock().await;
        // Where a primary has died, all who read its streams doubt the map, and again until it has a successor.
        let is_new = known.asked_at.is_some_and(|at| at.elapsed() < SHORTEST_LIFE);
        if known.version <= version && !is_new {
            known.map = None;
        }
    }
}

impl Known {
    /// Asks for a new map: nodes of the old one first, for those of the url may have left; in no order, for one that knows little must
    /// not be the first each time.
    async fn ask(&mut self, address: &Address, asker: &Endpoint) -> Result<&SlotMap, Fault> {
        let mut nodes: Vec<Node> = self.nodes.iter().cloned().collect();
        nodes.shuffle(&mut rand::rng());
        nodes.truncate(ASKED_OF_KNOWN);
        let mut seeds: Vec<Node> = address.nodes.iter().filter(|seed| !nodes.contains(seed)).cloned().collect();
        seeds.shuffle(&mut rand::rng());
        nodes.extend(seeds);
        let map = first_answer("node of the cluster", &nodes, |node| async move {
            let reply = ask(&address.server(node)?, asker, Command::new("CLUSTER").arg("SLOTS")).await;
            let reply = reply.map_err(|fault| no_cluster(node, fault))?;
            SlotMap::told_by(reply, node).ok_or_else(|| unexpected("CLUSTER SLOTS"))
        });
        let map = map.await?;
        self.nodes = map.nodes.iter().chain(&map.replicas).cloned().collect();
        (self.version, self.asked_at) = (self.version + 1, Some(Instant::now()));
        Ok(self.map.insert(map))
    }
}

/// A server that is no node of any cluster is not what the url says.
fn no_cluster(node: &Node, fault: Fault) -> Fault {
    match fault {
        Fault::Valkey { message, .. } if message.contains("cluster support disabled") => {
            Fault::ValkeyProtocol(format!("Valkey at {node} is no node of a cluster: write valkey:// in valkey.url"))
        }
        fault => fault,
    }
}

/// The primary of a service, by the word of the first sentinel that answers.
pub(super) async fn primary_by_sentinel(address: &Address, service: &str, asker: &Endpoint) -> Result<Node, Fault> {
    let mut sentinels = address.nodes.clone();
    sentinels.shuffle(&mut rand::rng());
    let answer = first_answer("sentinel", &sentinels, |sentinel| async move {
        let question = Command::new("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(service);
        let reply = ask(&address.sentinel(sentinel)?, asker, question).await?;
        let mut parts = reply.strings();
        match (parts.next(), parts.next()) {
            (Some(host), Some(port)) => {
                let text = |bytes| std::str::from_utf8(bytes).map_err(|_| unexpected("SENTINEL"));
                let port = text(port)?.parse().map_err(|_| unexpected("SENTINEL"))?;
                Ok(Node { host: text(host)?.to_owned(), port })
            }
            _ => Err(Fault::ValkeyProtocol(format!(
                "the sentinel at {sentinel} knows no primary named {service}: correct sentinelServiceName in valkey.url"
            ))),
        }
    });
    answer.await
}

/// One question, on a connection of its own.
async fn ask(place: &Place, asker: &Endpoint, question: Command) -> Result<Reply, Fault> {
    let mut wire = Wire::open(place, NAME, NO_ENTRIES, asker.connect_timeout, asker.command_timeout).await?;
    wire.call(&question).await
}

/// What the first of these nodes says that says anything; some are asked at once. Where none does: what it was that a server said, for
/// that is more than that others are out of reach; else what became of each.
async fn first_answer<'a, T, F: Future<Output = Result<T, Fault>> + Send + 'a>(
    what: &str,
    nodes: &'a [Node],
    ask: impl Fn(&'a Node) -> F,
) -> Result<T, Fault> {
    let mut lost = Vec::new();
    let said = std::sync::Mutex::new(Vec::new());
    for some in nodes.chunks(ASKED_AT_ONCE) {
        let asked = some.iter().map(|node| {
            let (answer, said) = (ask(node), &said);
            async move {
                answer
                    .await
                    .inspect_err(|fault| said.lock().unwrap_or_else(PoisonError::into_inner).push(fault.clone()))
            }
            .boxed()
        });
        if let Ok((answer, _)) = select_ok(asked).await {
            return Ok(answer);
        }
    }
    for fault in said.into_inner().unwrap_or_else(PoisonError::into_inner) {
        match fault {
            Fault::ValkeyLost(why) => lost.push(why),
            said => return Err(said),
        }
    }
    match &lost[..] {
        [only] => Err(Fault::ValkeyLost(only.clone())),
        _ => Err(Fault::ValkeyLost(format!("no {what} answers: {}", lost.join("; ")))),
    }
}

/// Where a server says that a key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Redirect {
    /// Its slot is another server's.
    Moved(Node),
    /// Its slot is on its way to another server, and it has gone ahead.
    Ask(Node),
}

impl Redirect {
    /// What a fault says; none if it is no redirection. `from`: who said it, for it may leave its own host out.
    pub(super) fn told_by(fault: &Fault, from: &Node) -> Option<Redirect> {
        let Fault::Valkey { code, message } = fault else { return None };
        let place = message.split(' ').nth(2)?;
        let own = place.strip_prefix(':').and_then(|port| port.parse().ok());
        let node = match own {
            Some(port) => Node { host: from.host.clone(), port },
            None => Node::parse(place)?,
        };
        match code.as_str() {
            "MOVED" => Some(Redirect::Moved(node)),
            "ASK" => Some(Redirect::Ask(node)),
            _ => None,
        }
    }
}

/// Which primary has which slot.
#[derive(Debug, Default)]
struct SlotMap {
    /// The primaries, and those that were.
    nodes: Vec<Node>,
    /// For each slot one of them.
    owners: Vec<Option<u16>>,
    replicas: BTreeSet<Node>,
}

impl SlotMap {
    /// Reads the reply to CLUSTER SLOTS: ranges with their primary, then its replicas. `from`: who answered, for it may leave its own
    /// host out.
    fn told_by(reply: Reply, from: &Node) -> Option<SlotMap> {
        let mut map = SlotMap { owners: vec![None; usize::from(SLOTS)], ..SlotMap::default() };
        for range in reply.into_array()? {
            let mut parts = range.into_array()?;
            let mut slot = || Slot::numbered(parts.next()?.as_int()?.try_into().ok()?);
            let (first, last) = (slot()?, slot()?);
            if let Some(primary) = node_told_by(parts.next()?, from)? {
                map.set(first, last, &primary);
            }
            map.replicas.extend(parts.filter_map(|replica| node_told_by(replica, from)?));
        }
        Some(map)
    }

    fn set(&mut self, first: Slot, last: Slot, node: &Node) {
        let number = self.nodes.iter().position(|known| known == node).unwrap_or_else(|| {
            self.nodes.push(node.clone());
            self.nodes.len() - 1
        });
        let range = usize::from(first.number())..=usize::from(last.number());
        if let Some(owners) = self.owners.get_mut(range) {
            owners.fill(number.try_into().ok());
        }
    }

    fn primary_of(&self, slot: Slot) -> Option<&Node> {
        self.nodes.get(usize::from((*self.owners.get(usize::from(slot.number()))?)?))
    }

    fn layout(&self) -> Layout {
        let node = |number: u16| self.nodes.get(usize::from(number)).cloned();
        let mut first = 0;
        let range = |alike: &[Option<u16>]| {
            let range = (first, alike.first().copied().flatten().and_then(node));
            first += alike.len();
            range
        };
        Layout(self.owners.chunk_by(|a, b| a == b).map(range).collect())
    }
}

/// Which primary has which slots of a cluster. Two of them are equal if none has moved in between; one that moved and came back is not seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout(
    /// The first slot of each range, and who has it.
    Vec<(usize, Option<Node>)>,
);

impl Layout {
    /// Each primary that has slots, once.
    pub fn homes(&self) -> Vec<Home> {
        let homes: BTreeSet<Home> = self.0.iter().filter_map(|(_, node)| node.clone().map(Home::at)).collect();
        homes.into_iter().collect()
    }
}

/// A node within CLUSTER SLOTS; none within if the one that was asked does not know its place.
fn node_told_by(node: Reply, from: &Node) -> Option<Option<Node>> {
    let mut parts = node.into_array()?;
    let (host, port) = (parts.next()?, parts.next()?.as_int()?.try_into().ok()?);
    let host = match host.as_text() {
        Some("?") => return Some(None),
        None | Some("") => &from.host,
        Some(host) => host,
    };
    Some(Some(Node { host: host.to_owned(), port }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use redis_protocol::resp3::decode::complete::decode_bytes;

    fn node(text: &str) -> Node {
        Node::parse(text).expect("host:port")
    }

    fn reply(text: &'static str) -> Reply {
        let (frame, _) = decode_bytes(&text.as_bytes().into()).expect("a reply").expect("a whole one");
        Reply::of(frame).expect("no error")
    }

    #[test]
    fn a_map_names_the_primary_of_each_slot() {
        let text = "*3\r\n*4\r\n:0\r\n:5\r\n*3\r\n$1\r\na\r\n:1\r\n$1\r\nx\r\n*3\r\n$1\r\nr\r\n:9\r\n$1\r\ny\r\n\
                    *3\r\n:7\r\n:7\r\n*3\r\n_\r\n:2\r\n$1\r\nx\r\n*3\r\n:9\r\n:9\r\n*3\r\n$1\r\n?\r\n:3\r\n$1\r\nx\r\n";
        let mut map = SlotMap::told_by(reply(text), &node("self:7000")).expect("a map");
        let at = |map: &SlotMap, slot| map.primary_of(Slot::numbered(slot).expect("a slot")).map(Node::to_string);
        assert_eq!(
            [0, 5, 6, 7, 9].map(|slot| at(&map, slot)),
            [Some("a:1"), Some("a:1"), None, Some("self:2"), None].map(|node| node.map(str::to_owned))
        );
        let slot = Slot::numbered(7).expect("a slot");
        map.set(slot, slot, &node("b:4"));
        assert_eq!(at(&map, 7).as_deref(), Some("b:4"));
        assert_eq!(map.layout().homes().iter().map(Home::to_string).collect::<Vec<_>>(), ["a:1", "b:4"]);
        assert!(map.replicas.contains(&node("r:9")));
        for strange in
            ["*1\r\n*1\r\n:0\r\n", "*1\r\n:7\r\n", ":1\r\n", "*1\r\n*3\r\n:0\r\n:99999\r\n*2\r\n$1\r\na\r\n:1\r\n"]
        {
            assert!(SlotMap::told_by(reply(strange), &node("self:1")).is_none(), "{strange:?}");
        }
    }

    #[test]
    fn a_redirection_names_a_node() {
        let told = |message: &str| {
            let code = message.split(' ').next().unwrap_or_default().to_owned();
            Redirect::told_by(&Fault::Valkey { code, message: message.into() }, &node("self:1"))
        };
        assert_eq!(told("MOVED 7 10.0.0.1:6380"), Some(Redirect::Moved(node("10.0.0.1:6380"))));
        assert_eq!(told("ASK 7 [::1]:6380"), Some(Redirect::Ask(node("[::1]:6380"))));
        assert_eq!(told("ASK 7 ::1:6380"), Some(Redirect::Ask(node("[::1]:6380"))));
        assert_eq!(told("MOVED 7 :6380"), Some(Redirect::Moved(node("self:6380"))));
        for none in ["MOVED", "MOVED 7", "MOVED 7 ?", "MOVED 7 a:b", "TRYAGAIN 7 a:1", "ERR a b:1"] {
            assert_eq!(told(none), None, "{none}");
        }
    }
}
