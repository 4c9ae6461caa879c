//! Rooms: looks at intervals how much of Valkey's memory is left for each flow, and tells it in the metrics.
//!
//! Takes where Valkey is and the flows; gives the gauges about memory, and to the findings what each primary evicts. It cannot fail: what is not known, or what this user may not ask, is told as unknown.
//! What it asks is bounded: of many streams it looks at some, and of keys at a sample.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use super::accept::Findings;
use super::prepare::Flow;
use crate::care::room::{self, Extent, Filled, Growth, Kind, Mark, Memory};
use crate::model::pipeline::Pipeline;
use crate::retry::Fault;
use crate::telemetry::contract::RoomState;
use crate::valkey::{Connection, Endpoint, Home, Links};

/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How many streams of a flow are looked at: they stand for all of them.
const STREAMS: usize = 64;
/// The samples: a few hundred short commands every ten seconds.
const EXTENT: Extent = Extent { newest: 500, keys: 1_000, measured: 20 };

/// How far a stream had come when it was looked at.
type Marks = BTreeMap<String, (Instant, Mark)>;

/// Looks for as long as it is polled.
pub(super) async fn watch(valkey: &Endpoint, flows: &[Flow], findings: &Findings) -> Infallible {
    let mut watch = Watch {
        valkey: valkey.clone(),
        links: Links::to(valkey, "tidegate:room"),
        findings: findings.clone(),
        pipelines: flows.iter().map(|flow| Pipeline::clone(&flow.pipeline)).collect(),
        marks: Marks::new(),
        evicted: BTreeMap::new(),
        may_measure: true,
    };
    loop {
        // The workers meet the fault, too, and tell.
        let states = watch.look(flows).await.unwrap_or_else(|_| vec![RoomState::default(); flows.len()]);
        flows.iter().zip(states).for_each(|(flow, state)| flow.metrics.told_room(state));
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What is kept from one look to the next.
struct Watch {
    valkey: Endpoint,
    links: Links,
    /// Told of each primary's eviction policy.
    findings: Findings,
    pipelines: Vec<Pipeline>,
    marks: Marks,
    /// How many keys each primary had evicted.
    evicted: BTreeMap<Home, (Instant, u64)>,
    /// Whether this user may look at keys and measure them. It is asked once: what is refused stands in the server's ACL LOG.
    may_measure: bool,
}

/// What was seen of one primary.
struct Seen {
    memory: Memory,
    evictions_per_s: Option<u64>,
    kinds: BTreeMap<String, Kind>,
    filled: Vec<Filled>,
}

impl Watch {
    /// Looks once: gives the state of each flow.
    async fn look(&mut self, flows: &[Flow]) -> Result<Vec<RoomState>, Fault> {
        let (mut primaries, mut of_flow) = (BTreeMap::<Home, Seen>::new(), Vec::new());
        for flow in flows {
            // In a cluster a flow has one stream.
            let link = self.links.to_stream(&flow.lanes[0].pipeline().stream).await?;
            let (connection, home) = (link.commands(), link.commands().home());
            if !primaries.contains_key(&home) {
                let seen = self.primary(connection, &home).await?;
                primaries.insert(home.clone(), seen);
            }
            // Without a limit nothing fills up, and of plain counters none is blind.
            let matters = flow.pipeline.is_managed() || primaries[&home].memory.max > 0;
            let filled = match self.may_measure && matters {
                true => self.streams(connection, flow).await,
                false => Ok(Vec::new()),
            };
            let filled = refused_is_none(filled)?.unwrap_or_else(|| {
                self.may_measure = false;
                Vec::new()
            });
            let is_known = self.may_measure && flow.pipeline.is_managed();
            of_flow.push((home.clone(), is_known.then(|| filled.iter().map(|shard| shard.blind).sum())));
            primaries.entry(home).and_modify(|seen| seen.filled.extend(filled));
        }
        if let Ok(policies) = self.policies(&primaries).await {
            self.findings.saw_policies(policies.iter().map(String::as_str));
        }
        Ok(of_flow.into_iter().map(|(home, blind)| self.state(&primaries[&home], blind)).collect())
    }

    /// What each primary evicts: in a cluster also those that have none of the streams, for slots move.
    async fn policies(&mut self, primaries: &BTreeMap<Home, Seen>) -> Result<Vec<String>, Fault> {
        let mut policies: Vec<String> = primaries.values().map(|seen| seen.memory.policy.clone()).collect();
        if self.valkey.is_cluster() {
            for home in self.valkey.homes().await?.iter().filter(|home| !primaries.contains_key(home)) {
                let link = self.links.at(home).await?;
                policies.push(room::memory(link.commands()).await?.policy);
            }
        }
        Ok(policies)
    }

    async fn primary(&mut self, connection: &Connection, home: &Home) -> Result<Seen, Fault> {
        let memory = room::memory(connection).await?;
        let mut kinds = BTreeMap::new();
        if self.may_measure {
            let looked = refused_is_none(room::kinds(connection, &self.pipelines, EXTENT).await)?;
            self.may_measure = looked.as_ref().is_some_and(|kinds| {
                // Of keys that may not be measured nothing is known.
                kinds.is_empty() || kinds.values().any(|kind| kind.bytes > 0)
            });
            kinds = looked.unwrap_or_default();
        }
        let before = self.evicted.insert(home.clone(), (Instant::now(), memory.evicted));
        let evictions_per_s = before.map(|before| a_second(before, memory.evicted).round() as u64);
        Ok(Seen { evictions_per_s, memory, kinds, filled: Vec::new() })
    }

    /// Looks at the streams of a flow, at some of them where there are many.
    async fn streams(&mut self, connection: &Connection, flow: &Flow) -> Result<Vec<Filled>, Fault> {
        let step = flow.lanes.len().div_ceil(STREAMS).max(1);
        let looked: Vec<&Pipeline> = flow.lanes.iter().step_by(step).map(|lane| lane.pipeline()).collect();
        let share = flow.lanes.len() as f64 / looked.len().max(1) as f64;
        let mut all = Vec::new();
        for pipeline in looked {
            let keys = pipeline.keys_of(0);
            let now = room::mark(connection, pipeline, &keys).await?;
            let before = self.marks.insert(keys.stream.clone(), (Instant::now(), now));
            let growth = before.map_or(Growth { now, ..Growth::default() }, |(then, before)| {
                now.since(before, then.elapsed().as_secs_f64())
            });
            all.push(room::filled(connection, pipeline, &keys, growth, EXTENT).await?.times(share));
        }
        Ok(all)
    }

    fn state(&self, seen: &Seen, blind: Option<u64>) -> RoomState {
        let (memory, kinds) = (&seen.memory, &seen.kinds);
        let pinned = || memory.used.saturating_sub(room::evictable(memory, kinds) as u64);
        let limit = Some(memory.max).filter(|max| *max > 0);
        let runway =
            limit.filter(|_| self.may_measure).and_then(|_| room::runway(room::left(memory, kinds), &seen.filled));
        RoomState {
            blind,
            used: Some(memory.used),
            pinned: self.may_measure.then(pinned),
            limit,
            evictions_per_s: seen.evictions_per_s,
            runway_s: runway.map(|seconds| seconds as u64),
        }
    }
}

/// How much a number grew a second since then.
fn a_second((then, before): (Instant, u64), now: u64) -> f64 {
    now.saturating_sub(before) as f64 / then.elapsed().as_secs_f64().max(0.001)
}

/// None where this user may not ask.
fn refused_is_none<T>(looked: Result<T, Fault>) -> Result<Option<T>, Fault> {
    match looked {
        Err(fault) if fault.code() == "NOPERM" => Ok(None),
        looked => looked.map(Some),
    }
}
