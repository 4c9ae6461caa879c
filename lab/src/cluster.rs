//! A real Valkey Cluster: servers that this starts, joins, moves slots between, and kills. No tool of Valkey's is needed for it.

use std::collections::BTreeSet;

use tidegate::model::slot::{SLOTS, Slot};
use tidegate::ops::sandbox::Valkey;

use crate::harness::{Client, Resp, eventually, eventually_found, free_port};
use crate::rights;
use crate::tls::Certificate;

/// How long a primary is silent until the others take it for dead, ms. On a busy machine one that lives is silent for a while, too.
const NODE_TIMEOUT_MS: &str = "2000";
/// How many times a node is started, where another program takes one of its ports first.
const STARTS: usize = 5;

/// A cluster. Its nodes end with it.
pub struct Cluster {
    nodes: Vec<Node>,
    arguments: Vec<String>,
    certificate: Option<Certificate>,
}

/// A server, and the name that the cluster knows it by.
pub struct Node {
    pub valkey: Valkey,
    pub id: String,
    /// Where clients that speak TLS, and other nodes, find it.
    tls_port: Option<u16>,
}

impl Node {
    /// One that knows no other yet.
    async fn start(arguments: &[String], certificate: Option<&Certificate>) -> Node {
        for _ in 0..STARTS {
            let bus = free_port().to_string();
            let mut all = ["--cluster-enabled", "yes", "--cluster-port", &bus].map(str::to_owned).to_vec();
            let quick = ["--cluster-node-timeout", NODE_TIMEOUT_MS, "--repl-diskless-sync-delay", "0"];
            // A replica takes over, however long it has heard nothing.
            let always = ["--cluster-replica-validity-factor", "0"];
            all.extend(quick.into_iter().chain(always).map(str::to_owned));
            all.extend(arguments.iter().cloned());
            let tls_port = if certificate.is_some() { Some(free_port()) } else { None };
            if let (Some(certificate), Some(port)) = (certificate, tls_port) {
                let settings = certificate.settings(port).into_iter().chain([("tls-cluster", "yes".to_owned())]);
                all.extend(settings.flat_map(|(name, value)| [format!("--{name}"), value]));
            }
            if let Ok(valkey) = Valkey::start(&all.iter().map(String::as_str).collect::<Vec<_>>()).await {
                let id = Client::connect(valkey.port()).await.call(&["CLUSTER", "MYID"]).await.text();
                return Node { valkey, id, tls_port };
            }
        }
        panic!("no node starts");
    }

    /// Where other nodes, and clients that speak as they do, find it.
    fn port(&self) -> u16 {
        self.tls_port.unwrap_or(self.valkey.port())
    }

    pub async fn client(&self) -> Client {
        Client::connect(self.valkey.port()).await
    }

    /// Its answer to a command; none while it does not answer.
    pub async fn ask(&self, words: &[&str]) -> Option<Resp> {
        let mut client = Client::try_connect(self.valkey.port()).await.ok()?;
        Some(client.try_pipeline(&[words]).await.ok()?.remove(0))
    }

    async fn order(&self, words: &[&str]) {
        let answer = self.ask(words).await;
        assert_eq!(answer, Some(Resp::Text(b"OK".to_vec())), "{words:?}");
    }

    /// The value of one line that it answers to a command.
    async fn line(&self, words: &[&str], name: &str) -> Option<String> {
        let Some(Resp::Text(text)) = self.ask(words).await else { return None };
        let text = String::from_utf8_lossy(&text);
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(|value| value.trim().to_owned())
    }

    /// Whether it answers, and is a primary.
    pub async fn is_primary(&self) -> bool {
        self.line(&["INFO", "replication"], "role").await.as_deref() == Some("master")
    }

    /// Whether it answers, and is a replica that has what its primary has.
    pub async fn is_replica_in_step(&self) -> bool {
        self.line(&["INFO", "replication"], "master_link_status").await.as_deref() == Some("up")
    }

    async fn is_ready(&self) -> bool {
        self.line(&["CLUSTER", "INFO"], "cluster_state").await.as_deref() == Some("ok")
    }
}

impl Cluster {
    /// So many primaries, which share the slots evenly, each with so many replicas. `arguments` are added to each server's.
    pub async fn start(primaries: usize, replicas: usize, arguments: &[&str]) -> Cluster {
        Cluster::start_with(None, primaries, replicas, arguments).await
    }

    /// The same, whose nodes speak TLS to each other and to whoever uses [`Cluster::url`].
    pub async fn start_with(
        certificate: Option<Certificate>,
        primaries: usize,
        replicas: usize,
        arguments: &[&str],
    ) -> Cluster {
        let mut arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        // Nobody tells a node of another one's users.
        if rights::are_least() {
            arguments.extend(rights::of_new_server());
        }
        let mut cluster = Cluster { nodes: Vec::new(), arguments, certificate };
        for _ in 0..primaries * (1 + replicas) {
            cluster.nodes.push(Node::start(&cluster.arguments, cluster.certificate.as_ref()).await);
        }
        let share = usize::from(SLOTS).div_ceil(primaries);
        for (n, node) in cluster.nodes.iter().enumerate() {
            node.order(&["CLUSTER", "SET-CONFIG-EPOCH", &(n + 1).to_string()]).await;
            if n < primaries {
                let (first, last) = (n * share, ((n + 1) * share).min(usize::from(SLOTS)) - 1);
                node.order(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()]).await;
            }
        }
        cluster.introduce(0..cluster.nodes.len()).await;
        for (n, replica) in cluster.nodes.iter().enumerate().skip(primaries) {
            let primary = &cluster.nodes[n % primaries].id;
            replica.order(&["CLUSTER", "REPLICATE", primary]).await;
        }
        for (n, node) in cluster.nodes.iter().enumerate() {
            eventually("the node is ready", true, async || node.is_ready().await).await;
            if n >= primaries {
                eventually("the replica is in step", true, async || node.is_replica_in_step().await).await;
            }
        }
        cluster
    }

    /// These nodes meet all others, and everybody knows everybody.
    async fn introduce(&self, newcomers: std::ops::Range<usize>) {
        for newcomer in &self.nodes[newcomers] {
            let (port, mut config) = (newcomer.port().to_string(), newcomer.client().await);
            let bus = config.call(&["CONFIG", "GET", "cluster-port"]).await.array().remove(1).text();
            for other in self.nodes.iter().filter(|other| other.id != newcomer.id) {
                other.order(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus]).await;
            }
        }
        for node in &self.nodes {
            let known = async || {
                let nodes = node.ask(&["CLUSTER", "NODES"]).await.map(|nodes| nodes.text()).unwrap_or_default();
                self.nodes.iter().all(|other| nodes.contains(&other.id)) && !nodes.contains("handshake")
            };
            eventually("the nodes know each other", true, known).await;
        }
    }

    /// The file that its clients trust, where it speaks TLS.
    pub fn trusted(&self) -> Option<std::path::PathBuf> {
        self.certificate.as_ref().map(Certificate::trusted)
    }

    /// All its nodes, by their numbers.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A node, to be harmed.
    pub fn node(&mut self, number: usize) -> &mut Node {
        &mut self.nodes[number]
    }

    /// A url with these nodes as seeds.
    pub fn url_of(&self, seeds: &[usize]) -> String {
        let places: Vec<String> = seeds.iter().map(|seed| format!("127.0.0.1:{}", self.nodes[*seed].port())).collect();
        let scheme = if self.certificate.is_some() { "valkeys-cluster" } else { "valkey-cluster" };
        format!("{scheme}://{}", places.join(","))
    }

    /// A url with all nodes as seeds.
    pub fn url(&self) -> String {
        self.url_of(&(0..self.nodes.len()).collect::<Vec<_>>())
    }

    /// The number of the primary that has a key's slot, by its own word; none while there is none.
    pub async fn primary_of(&self, key: &str) -> Option<usize> {
        for (number, node) in self.nodes.iter().enumerate() {
            // A replica, or another primary, sends on.
            if matches!(node.ask(&["EXISTS", key]).await, Some(Resp::Int(_))) && node.is_primary().await {
                return Some(number);
            }
        }
        None
    }

    /// The same, once there is one.
    pub async fn await_primary_of(&self, key: &str) -> usize {
        eventually_found("the primary", async || self.primary_of(key).await.ok_or("nobody has the slot".into())).await
    }

    /// The ports for plain clients.
    pub fn ports(&self) -> Vec<u16> {
        self.nodes.iter().map(|node| node.valkey.port()).collect()
    }

    /// Whether so many of so many nodes are primaries, all serve, and each of the others has what its primary has.
    pub async fn is_whole(&self, primaries: usize, nodes: usize) -> bool {
        let mut found = 0;
        for node in &self.nodes {
            let is_primary = node.is_primary().await;
            found += usize::from(is_primary);
            if !node.is_ready().await || !is_primary && !node.is_replica_in_step().await {
                return false;
            }
        }
        (found, self.nodes.len()) == (primaries, nodes)
    }

    /// The keys of the entries that a stream holds: their first fields.
    pub async fn keys_in(&self, stream: &str) -> BTreeSet<String> {
        let entries = self.client_of(stream).await.call(&["XRANGE", stream, "-", "+"]).await.array();
        entries.into_iter().map(|entry| entry.array().remove(1).array()[1].text()).collect()
    }

    /// The numbers of the primaries other than that of a key.
    pub async fn other_primaries(&self, key: &str) -> Vec<usize> {
        let (home, mut others) = (self.await_primary_of(key).await, Vec::new());
        for (number, node) in self.nodes.iter().enumerate() {
            if number != home && node.is_primary().await {
                others.push(number);
            }
        }
        others
    }

    /// A plain client on the primary of a key.
    pub async fn client_of(&self, key: &str) -> Client {
        self.nodes[self.await_primary_of(key).await].client().await
    }

    /// A node more, which everybody knows and which has no slot.
    pub async fn join(&mut self) -> usize {
        let number = self.nodes.len();
        self.nodes.push(Node::start(&self.arguments, self.certificate.as_ref()).await);
        self.introduce(number..number + 1).await;
        eventually("the newcomer is ready", true, async || self.nodes[number].is_ready().await).await;
        number
    }

    /// A replica takes the place of its primary, in agreement with it.
    pub async fn promote(&self, number: usize) {
        let promoted = async || {
            // Refused while it is not in step, and given up when it takes too long.
            self.nodes[number].ask(&["CLUSTER", "FAILOVER"]).await;
            self.nodes[number].is_primary().await
        };
        eventually("promoted", true, promoted).await;
    }

    /// A node leaves, by the word of all others; then it is stopped. It must have no slots.
    pub async fn leave(&mut self, number: usize) {
        let id = self.nodes[number].id.clone();
        for other in self.nodes.iter().filter(|other| other.id != id) {
            // Whoever does not answer will have forgotten by itself.
            other.ask(&["CLUSTER", "FORGET", &id]).await;
        }
        self.nodes[number].valkey.stop();
    }

    /// From now on the slot of a key is on its way from its primary to another one: what is there stays there, what is not is looked for
    /// at the other one.
    pub async fn begin_to_move(&self, key: &str, to: usize) -> usize {
        let (from, slot) = (self.await_primary_of(key).await, Slot::of(key).to_string());
        let (source, target) = (&self.nodes[from], &self.nodes[to]);
        target.order(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &source.id]).await;
        source.order(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &target.id]).await;
        from
    }

    /// One key of that slot goes.
    pub async fn move_key(&self, key: &str, from: usize, to: usize) {
        let port = self.nodes[to].port().to_string();
        let moved = self.nodes[from].ask(&["MIGRATE", "127.0.0.1", &port, key, "0", "10000"]).await;
        assert!(matches!(&moved, Some(Resp::Text(words)) if words == b"OK" || words == b"NOKEY"), "{key}: {moved:?}");
    }

    /// All that is left of that slot goes, and everybody hears where it is.
    pub async fn move_the_rest(&self, key: &str, from: usize, to: usize) {
        let (slot, source) = (Slot::of(key).to_string(), &self.nodes[from]);
        loop {
            let keys = source.ask(&["CLUSTER", "GETKEYSINSLOT", &slot, "100"]).await.expect("answered").array();
            for key in &keys {
                self.move_key(&key.text(), from, to).await;
            }
            if keys.is_empty() {
                break;
            }
        }
        // The new primary first: else nobody would have the slot for a moment.
        self.nodes[to].order(&["CLUSTER", "SETSLOT", &slot, "NODE", &self.nodes[to].id]).await;
        source.order(&["CLUSTER", "SETSLOT", &slot, "NODE", &self.nodes[to].id]).await;
    }

    /// Moves the slot of a key, key by key.
    pub async fn move_slot(&self, key: &str, to: usize) {
        let from = self.begin_to_move(key, to).await;
        self.move_the_rest(key, from, to).await;
    }

    /// Moves the slot of a key in one step (`CLUSTER MIGRATESLOTS`); false where the server does not know how.
    pub async fn move_slot_in_one_step(&self, key: &str, to: usize) -> bool {
        let (from, slot) = (self.await_primary_of(key).await, Slot::of(key).to_string());
        let (source, target) = (&self.nodes[from], &self.nodes[to].id);
        let words = ["CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", &slot, &slot, "NODE", target];
        match source.ask(&words).await {
            Some(Resp::Error(_)) => return false,
            answer => assert_eq!(answer, Some(Resp::Text(b"OK".to_vec()))),
        }
        eventually("the slot has moved", Some(to), async || self.primary_of(key).await).await;
        true
    }

    /// From now on nothing is replicated from the primary of a key.
    pub async fn cut_off_replica_of(&self, key: &str) {
        let primary = &self.nodes[self.await_primary_of(key).await];
        for node in &self.nodes {
            if node.line(&["INFO", "replication"], "master_port").await == Some(primary.port().to_string()) {
                // Its primary asks for no password, so one that gives a password is refused.
                node.order(&["CONFIG", "SET", "masterauth", "refused"]).await;
                primary.ask(&["CLIENT", "KILL", "TYPE", "replica"]).await;
                let is_up = async || node.is_replica_in_step().await;
                eventually("it replicates", false, is_up).await;
            }
        }
    }

    /// Everything is replicated again.
    pub async fn heal(&self) {
        for node in &self.nodes {
            node.order(&["CONFIG", "SET", "masterauth", ""]).await;
        }
    }

    /// A primary dies, and a replica takes its place: gives the number of that one.
    pub async fn kill_primary_of(&mut self, key: &str) -> usize {
        let old = self.await_primary_of(key).await;
        self.nodes[old].valkey.kill();
        self.await_primary_of(key).await
    }

    /// A node that was killed comes back with what it knew of the cluster.
    pub async fn bring_back(&mut self, number: usize) {
        self.nodes[number].valkey.restart().await.expect("it starts");
    }
}
