//! A cluster in upheaval: primaries die and come back, replicas are promoted, nodes hang, slots move, workers are killed, one after the other
//! in random order, while producers add to shards on all primaries, for both ways of delivery. In the end everything that survives in the streams must
//! have landed, and nothing twice.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use tidegate::model::pipeline::Pipeline;
use tidegate_lab::cluster::Cluster;
use tidegate_lab::harness::{Daemon, Lab, Resp, eventually};
use tidegate_lab::writers::{Writer, lab, program, rows};

/// Streams of each pipeline.
const SHARDS: u16 = 4;
/// Worker processes.
const WORKERS: usize = 3;
const PRIMARIES: usize = 3;
/// Between two events.
const LULL_MS: std::ops::Range<u64> = 100..1_500;
/// How long a process that hangs does so.
const HANGS_MS: std::ops::Range<u64> = 300..4_000;

#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// How long, about
    #[arg(long, default_value_t = 300)]
    seconds: u64,
    /// Of the order of events; by default another one each time
    #[arg(long)]
    seed: Option<u64>,
}

/// What may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    SlotMovesByKeys,
    SlotMovesInOneStep,
    PrimaryDies,
    ReplicaIsPromoted,
    NodeHangs,
    WorkerDies,
    WorkerHangs,
}

const EVENTS: [Event; 7] = [
    Event::SlotMovesByKeys,
    Event::SlotMovesInOneStep,
    Event::PrimaryDies,
    Event::ReplicaIsPromoted,
    Event::NodeHangs,
    Event::WorkerDies,
    Event::WorkerHangs,
];

/// The servers, the workers, and what has happened.
struct Scene {
    cluster: Cluster,
    lab: Lab,
    workers: Vec<Daemon>,
    streams: Vec<String>,
    dice: StdRng,
    counts: BTreeMap<Event, u64>,
}

pub async fn run(args: Args) -> bool {
    let seed = args.seed.unwrap_or_else(rand::random);
    println!("seed {seed}, {WORKERS} workers, {PRIMARIES} primaries with a replica each, {} s", args.seconds);
    let pipeline = |stream: &str| Pipeline { stream: stream.into(), shards: SHARDS, ..Pipeline::counters() };
    let streams_of = |stream: &str| (0..SHARDS).map(|shard| pipeline(stream).stream_of(shard)).collect::<Vec<_>>();
    let streams = [streams_of("flush:counters"), streams_of("flush:alone")].concat();
    let mut scene = Scene {
        cluster: Cluster::start(PRIMARIES, 1, &[]).await,
        lab: lab().await,
        workers: Vec::new(),
        streams,
        dice: StdRng::seed_from_u64(seed),
        counts: BTreeMap::new(),
    };
    for _ in 0..WORKERS {
        scene.workers.push(scene.worker());
    }
    let writers: Vec<_> = scene.streams.iter().map(|stream| Writer::to(&scene.cluster.ports(), stream)).collect();
    let started = Instant::now();
    while started.elapsed().as_secs() < args.seconds {
        let lull = scene.dice.random_range(LULL_MS);
        tokio::time::sleep(Duration::from_millis(lull)).await;
        let event = *EVENTS.choose(&mut scene.dice).expect("there are some");
        println!("{:>5} s  {event:?}", started.elapsed().as_secs());
        if scene.plays(event).await {
            *scene.counts.entry(event).or_default() += 1;
        }
    }
    let (mut taken, mut lost, mut wrong) = (0, 0, Vec::new());
    let mut held = BTreeSet::new();
    for (stream, writer) in scene.streams.iter().zip(writers) {
        let added = writer.stop().await;
        let survived = scene.cluster.keys_in(stream).await;
        (taken, lost) = (taken + added.len(), lost + added.difference(&survived).count());
        held.extend(survived);
        // What was flushed and lost by a failover has a row, too.
        let backlog = async || scene.backlog(stream).await;
        eventually(stream, 0, backlog).await;
    }
    let mut landed = rows(&scene.lab, "public.counters").await;
    landed.extend(rows(&scene.lab, "public.alone").await);
    wrong.extend(landed.iter().filter(|(_, value)| **value != 1).map(|(key, value)| format!("{key} has {value}")));
    wrong.extend(held.iter().filter(|key| !landed.contains_key(*key)).map(|key| format!("{key} has not landed")));
    let counts: Vec<String> = scene.counts.iter().map(|(event, count)| format!("{event:?} {count}")).collect();
    println!(
        "{taken} entries taken, {lost} of them lost by failovers, {} survived, {} landed, {} wrong; {}",
        held.len(),
        landed.len(),
        wrong.len(),
        counts.join(", ")
    );
    wrong.iter().take(10).for_each(|line| println!("  {line}"));
    wrong.is_empty()
}

impl Scene {
    fn worker(&self) -> Daemon {
        let mut command = program(&self.lab, &self.cluster.url(), &["run"], "flush:counters", Some("flush:alone"));
        for pipeline in ["COUNTERS", "ALONE"] {
            command.env(format!("TIDEGATE__PIPELINES__{pipeline}__SHARDS"), SHARDS.to_string());
        }
        Daemon::start(command)
    }

    /// Whether a stream's group has entries to read or to settle: 0 if not.
    async fn backlog(&self, stream: &str) -> i64 {
        let group = if stream.starts_with("flush:alone") { "tidegate:alone" } else { "tidegate:counters" };
        let mut client = self.cluster.client_of(stream).await;
        let groups = client.call(&["XINFO", "GROUPS", stream]).await.array();
        let numbers = groups.into_iter().map(Resp::array).find(|fields| fields[1] == Resp::Text(group.into()));
        let fields = numbers.unwrap_or_default();
        let field = |name: &str| {
            let at = fields.iter().position(|field| *field == Resp::Text(name.into()))?;
            fields.get(at + 1)
        };
        let (Some(pending), Some(position)) = (field("pending").and_then(Resp::int), field("last-delivered-id")) else {
            return 1;
        };
        // The lag is not known any more where entries were lost.
        let behind = format!("({}", position.text());
        let first = client.call(&["XRANGE", stream, &behind, "+", "COUNT", "1"]).await.array();
        pending + first.len() as i64
    }

    /// Lets it happen, and waits until the cluster is whole again. False where the servers do not know how.
    async fn plays(&mut self, event: Event) -> bool {
        let stream = self.streams.choose(&mut self.dice).expect("there are some").clone();
        let hangs = Duration::from_millis(self.dice.random_range(HANGS_MS));
        let worker = self.dice.random_range(0..WORKERS);
        match event {
            Event::SlotMovesByKeys => {
                let others = self.cluster.other_primaries(&stream).await;
                self.cluster.move_slot(&stream, *others.choose(&mut self.dice).expect("others")).await;
            }
            Event::SlotMovesInOneStep => {
                let others = self.cluster.other_primaries(&stream).await;
                let to = *others.choose(&mut self.dice).expect("others");
                if !self.cluster.move_slot_in_one_step(&stream, to).await {
                    return false;
                }
            }
            Event::PrimaryDies => {
                let old = self.cluster.await_primary_of(&stream).await;
                self.cluster.kill_primary_of(&stream).await;
                self.cluster.bring_back(old).await;
            }
            Event::ReplicaIsPromoted => {
                for number in 0..self.cluster.nodes().len() {
                    if !self.cluster.nodes()[number].is_primary().await {
                        self.cluster.promote(number).await;
                        break;
                    }
                }
            }
            Event::NodeHangs => {
                let node = self.dice.random_range(0..self.cluster.nodes().len());
                self.cluster.nodes()[node].valkey.pause();
                tokio::time::sleep(hangs).await;
                self.cluster.nodes()[node].valkey.resume();
            }
            Event::WorkerDies => {
                self.workers[worker].kill().await;
                self.workers[worker] = self.worker();
            }
            Event::WorkerHangs => {
                self.workers[worker].signal(Signal::STOP);
                tokio::time::sleep(hangs).await;
                self.workers[worker].signal(Signal::CONT);
            }
        }
        let (primaries, nodes) = (PRIMARIES, self.cluster.nodes().len());
        eventually("the cluster is whole", true, async || self.cluster.is_whole(primaries, nodes).await).await;
        true
    }
}
