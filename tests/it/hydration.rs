//! The function library under random interleavings of atomic steps: on a real Valkey, beside a PostgreSQL that is a few maps in memory.
//!
//! Producers add and repeat, workers read, steal, crash and acknowledge, hydrators bring values, counters are evicted and deleted, leases are lost,
//! PostgreSQL goes back in time. After every step each value that is present equals what the table has plus what is not flushed, nothing with unflushed
//! deltas can be evicted, and nothing that was accepted is missing.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tidegate::functions::{self, Answer, Call, Function, Status};
use tidegate::model::entry::EntryId;
use tidegate::model::pipeline::{Pipeline, ShardKeys};
use tidegate::ops::sandbox::Valkey;
use tidegate::valkey::{Command, Connection, Endpoint, Reply};

use crate::harness::BROKEN;

const COUNTERS: [&str; 4] = ["a", "b", "c", "d"];
/// Nothing expires while the simulation runs.
const LONG_MS: u64 = 100_000_000;

/// How many seeds a test runs; more with TIDEGATE_SEEDS.
fn seeds(default: u64) -> std::ops::Range<u64> {
    let set = std::env::var("TIDEGATE_SEEDS").ok().and_then(|seeds| seeds.parse().ok());
    1..1 + set.unwrap_or(default)
}

struct Hydrator {
    id: &'static str,
    token: u64,
    lineage: String,
    witness: Option<EntryId>,
    stage: Stage,
}

enum Stage {
    Wait,
    Read,
    Install { value: i64, held: BTreeSet<EntryId> },
    Judged { value: i64, held: BTreeSet<EntryId>, notes: Vec<(EntryId, i64)> },
}

#[derive(Default)]
struct Worker {
    ids: Vec<EntryId>,
    committed: bool,
}

#[derive(Clone, Default)]
struct Table {
    values: BTreeMap<&'static str, i64>,
    ledger: BTreeSet<EntryId>,
}

struct Simulation<'a> {
    connection: &'a Connection,
    keys: ShardKeys,
    random: StdRng,
    table: Table,
    base: BTreeMap<&'static str, i64>,
    accepted: BTreeMap<&'static str, i64>,
    lineage: u32,
    entries: BTreeMap<EntryId, (&'static str, i64)>,
    last: EntryId,
    workers: [Worker; 3],
    hydrators: [Option<Hydrator>; 3],
    lanes: [(u64, Option<(&'static str, i64)>); 3],
    backup: Option<(Table, EntryId)>,
    /// Steps before the operator replays, and from where.
    to_replay: Option<(u32, EntryId)>,
    heat: f64,
    toil: f64,
}

/// What does not hold.
type Check = Result<(), String>;

impl Simulation<'_> {
    async fn new(connection: &Connection, seed: u64) -> Simulation<'_> {
        connection.call(Command::new("FLUSHALL")).await.expect("empty");
        let keys = Pipeline::counters().keys_of(0);
        let group = Command::new("XGROUP").arg("CREATE").arg(&keys.stream).arg(&keys.group).arg("0").arg("MKSTREAM");
        connection.call(group).await.expect("a group");
        let mut random = StdRng::seed_from_u64(seed);
        let base: BTreeMap<_, _> = COUNTERS.map(|id| (id, random.random_range(0..1000))).into();
        let simulation = Simulation {
            connection,
            keys,
            random,
            table: Table { values: base.clone(), ledger: BTreeSet::new() },
            base,
            accepted: BTreeMap::new(),
            lineage: 1,
            entries: BTreeMap::new(),
            last: EntryId::MIN,
            workers: Default::default(),
            hydrators: [const { None }; 3],
            lanes: Default::default(),
            backup: None,
            to_replay: None,
            heat: 0.3,
            toil: 0.2,
        };
        simulation.open("open").await;
        simulation
    }

    async fn call(&self, call: Call) -> Answer {
        call.send(self.connection).await.expect("an answer")
    }

    async fn command(&self, command: Command) -> Reply {
        self.connection.call(command).await.expect("an answer")
    }

    fn of(&self, function: Function, id: &str) -> Call {
        let keys = &self.keys;
        Call::new(function, [&keys.counter(id), &keys.lease(id), &keys.stream, &keys.index, &keys.state])
    }

    async fn open(&self, word: &str) {
        let call = Call::new(Function::Open, [&self.keys.stream, &self.keys.state]).arg(self.lineage).arg(word);
        assert_eq!(self.call(call).await.status, Status::Done);
    }

    fn one(&mut self) -> &'static str {
        COUNTERS[self.random.random_range(0..COUNTERS.len())]
    }

    fn chance(&mut self, share: f64) -> bool {
        self.random.random_bool(share)
    }

    async fn produce(&mut self) -> Check {
        let lane = self.random.random_range(0..self.lanes.len());
        let token: u64 = self.random.random();
        let want = u8::from(self.chance(0.7));
        let add = |this: &Self, id: &str, amount: i64, seq: u64| {
            let call = this.of(Function::Incr, id).arg(id).arg(amount).arg(format!("l{lane}")).arg(seq);
            call.arg(want).arg(&this.keys.group).arg(LONG_MS).arg(token)
        };
        if let (seq, Some((id, amount))) = self.lanes[lane]
            && self.chance(0.15)
        {
            // The producer has not heard of it, and sends it again.
            let status = self.call(add(self, id, amount, seq)).await.status;
            return if status == Status::Seen { Ok(()) } else { Err(format!("a repetition was {status:?}")) };
        }
        let (id, amount) = (self.one(), [1, 2, 3, -1, 7, 1000][self.random.random_range(0..6)]);
        let seq = self.lanes[lane].0 + 1;
        let answer = self.call(add(self, id, amount, seq)).await;
        match answer.status {
            Status::Done | Status::Blind => {
                self.lanes[lane] = (seq, Some((id, amount)));
                *self.accepted.entry(id).or_default() += amount;
            }
            Status::Miss => self.begin(id, token, &answer),
            _ => {}
        }
        Ok(())
    }

    /// A lease was granted; without a free hydrator its holder has died.
    fn begin(&mut self, id: &'static str, token: u64, answer: &Answer) {
        if let Some(free) = self.hydrators.iter_mut().find(|hydrator| hydrator.is_none()) {
            let lineage = answer.text(1).unwrap_or_default().to_owned();
            let witness = answer.text(2).and_then(|text| text.parse().ok());
            let stage = if answer.int(0) == Some(1) { Stage::Read } else { Stage::Wait };
            *free = Some(Hydrator { id, token, lineage, witness, stage });
        }
    }

    async fn hydrate(&mut self) -> Check {
        let slot = self.random.random_range(0..self.hydrators.len());
        let Some(mut hydrator) = self.hydrators[slot].take() else {
            let (id, token) = (self.one(), self.random.random());
            let call = self.of(Function::Lease, id).arg(id).arg(&self.keys.group).arg(LONG_MS).arg(token);
            let answer = self.call(call).await;
            if answer.status == Status::Miss {
                self.begin(id, token, &answer);
            }
            return Ok(());
        };
        if self.chance(0.02) {
            return Ok(());
        }
        let (id, token) = (hydrator.id, hydrator.token);
        let install = |this: &Self, base: i64, judged: i64| {
            let call = this.of(Function::Install, id).arg(id).arg(token).arg(base).arg(judged);
            call.arg(LONG_MS).arg(&this.keys.group)
        };
        hydrator.stage = match hydrator.stage {
            Stage::Wait => {
                let keys = [&self.keys.lease(id), &self.keys.stream, &self.keys.state];
                let call = Call::new(Function::Ready, keys).arg(token).arg(&self.keys.group).arg(LONG_MS);
                match self.call(call).await.status {
                    Status::Done => Stage::Read,
                    Status::Busy => Stage::Wait,
                    _ => return Ok(()),
                }
            }
            Stage::Read => {
                let is_other = hydrator.lineage != self.lineage.to_string();
                let lacks = hydrator.witness.is_some_and(|witness| !self.table.ledger.contains(&witness));
                if is_other || lacks {
                    self.call(Call::new(Function::Release, [self.keys.lease(id)]).arg(token)).await;
                    return Ok(());
                }
                Stage::Install { value: self.table.values[id], held: self.table.ledger.clone() }
            }
            Stage::Install { value, held } => {
                let answer = self.call(install(self, value, -1)).await;
                if answer.status != Status::Judge {
                    return Ok(());
                }
                let words: Vec<&str> = answer.text(0).unwrap_or_default().split(' ').collect();
                let notes =
                    words.chunks(2).map(|pair| (pair[0].parse().expect("an id"), pair[1].parse().expect("an amount")));
                Stage::Judged { value, held, notes: notes.collect() }
            }
            Stage::Judged { value, held, notes } => {
                let lacking = notes.iter().filter(|(entry, _)| !held.contains(entry)).map(|(_, amount)| amount);
                let base = value + lacking.sum::<i64>();
                self.call(install(self, base, notes.len() as i64)).await;
                return Ok(());
            }
        };
        self.hydrators[slot] = Some(hydrator);
        Ok(())
    }

    async fn work(&mut self) {
        let n = self.random.random_range(0..self.workers.len());
        if self.workers[n].ids.is_empty() {
            let name = format!("w{n}");
            let (count, is_theft) = (self.random.random_range(1..12), self.chance(0.25));
            let ShardKeys { stream, group, .. } = &self.keys;
            let command = if is_theft {
                let command = Command::new("XAUTOCLAIM").arg(stream).arg(group).arg(name).arg(0).arg("0-0");
                command.arg("COUNT").arg(count)
            } else {
                let command = Command::new("XREADGROUP").arg("GROUP").arg(group).arg(name);
                command.arg("COUNT").arg(count).arg("STREAMS").arg(stream).arg(">")
            };
            self.workers[n].ids = ids(self.command(command).await);
            return;
        }
        if self.chance(0.03) {
            self.workers[n] = Worker::default();
            return;
        }
        let worker = std::mem::take(&mut self.workers[n]);
        if worker.committed {
            let ack = Command::new("XACK").arg(&self.keys.stream).arg(&self.keys.group).args(&worker.ids);
            self.command(ack).await;
        } else {
            self.commit(&worker.ids);
            self.workers[n] = Worker { committed: true, ..worker };
        }
    }

    /// One transaction: what the ledger lacks is applied.
    fn commit(&mut self, ids: &[EntryId]) {
        for id in ids {
            if let Some((counter, amount)) = self.entries.get(id)
                && self.table.ledger.insert(*id)
            {
                *self.table.values.entry(counter).or_default() += amount;
            }
        }
    }

    async fn sweep(&mut self) {
        let mut dirty: Vec<&str> = COUNTERS.to_vec();
        dirty.truncate(self.random.random_range(0..=COUNTERS.len()));
        self.settle(&dirty).await;
    }

    async fn settle(&self, ids: &[&str]) {
        let mut keys = vec![self.keys.stream.clone(), self.keys.index.clone(), self.keys.state.clone()];
        keys.extend(ids.iter().map(|id| self.keys.counter(id)));
        let call = Call::new(Function::Settle, keys).arg(&self.keys.group);
        self.call(ids.iter().fold(call, |call, id| call.arg(id).arg(LONG_MS))).await;
    }

    /// Valkey evicts what has a TTL; somebody deletes what has none.
    async fn evict(&mut self) {
        let id = self.one();
        let key = self.keys.counter(id);
        let left = self.command(Command::new("PTTL").arg(&key)).await.as_int();
        if left >= Some(0) || (left == Some(-1) && self.chance(0.1)) {
            self.command(Command::new("DEL").arg(&key)).await;
        }
    }

    async fn lose_a_lease(&mut self) {
        let id = self.one();
        let key = self.keys.lease(id);
        self.command(Command::new("DEL").arg(&key)).await;
    }

    /// PostgreSQL is backed up, or goes back to its backup: it is another one from then on.
    fn travel(&mut self) {
        let first_unflushed = self.entries.keys().find(|id| !self.table.ledger.contains(id)).copied();
        let from = first_unflushed.map_or(self.last, |id| EntryId::from_number(id.number() - 1));
        if self.backup.is_none() || self.chance(0.3) {
            self.backup = Some((self.table.clone(), from));
        } else if let (Some((table, from)), true) = (self.backup.clone(), self.chance(0.15)) {
            self.table = table;
            self.lineage += 1;
            self.workers = Default::default();
            self.to_replay = Some((self.random.random_range(0..30), from));
        }
    }

    async fn replay(&mut self, from: EntryId) {
        let set = Command::new("XGROUP").arg("SETID").arg(&self.keys.stream).arg(&self.keys.group).arg(from);
        self.command(set).await;
        self.open("accept").await;
        self.drop_all().await;
    }

    /// As the sweeper does it.
    async fn drop_all(&self) {
        for id in COUNTERS {
            self.command(Command::new("UNLINK").arg(self.keys.counter(id))).await;
        }
        let closed = self.command(Command::new("HGET").arg(&self.keys.state).arg("closed")).await;
        if let Some(why) = closed.as_text() {
            self.call(Call::new(Function::Reopen, [&self.keys.state]).arg(why)).await;
        }
    }

    async fn step(&mut self) -> Check {
        if let Some((steps, from)) = self.to_replay {
            self.to_replay = steps.checked_sub(1).map(|steps| (steps, from));
            if self.to_replay.is_none() {
                self.replay(from).await;
                return Ok(());
            }
        }
        if self.chance(0.02) {
            self.heat = [0.03, 0.1, 0.3, 0.5][self.random.random_range(0..4)];
            self.toil = [0.05, 0.2, 0.5][self.random.random_range(0..3)];
        }
        if self.chance(self.heat) {
            return self.produce().await;
        }
        if self.to_replay.is_none() && self.chance(self.toil) {
            self.work().await;
            return Ok(());
        }
        match self.random.random_range(0..100) {
            0..55 => self.hydrate().await?,
            55..77 if self.to_replay.is_none() => self.sweep().await,
            77..96 => self.evict().await,
            96..99 => self.lose_a_lease().await,
            99 if self.to_replay.is_none() => self.travel(),
            _ => {}
        }
        Ok(())
    }

    async fn check(&mut self) -> Check {
        let range = Command::new("XRANGE").arg(&self.keys.stream).arg(format!("({}", self.last)).arg("+");
        for entry in self.command(range).await.into_array().expect("entries") {
            let mut parts = entry.into_array().expect("an entry");
            let id: EntryId = parts.next().and_then(|id| id.as_text()?.parse().ok()).expect("an id");
            let fields: Vec<String> =
                parts.next().expect("fields").strings().map(|s| String::from_utf8_lossy(s).into()).collect();
            let counter = COUNTERS.into_iter().find(|counter| *counter == fields[1]).expect("a counter");
            self.entries.insert(id, (counter, fields[3].parse().expect("an amount")));
            self.last = id;
        }
        let mut unflushed: BTreeMap<&str, (i64, u32)> = BTreeMap::new();
        for (_, (counter, amount)) in self.entries.iter().filter(|(id, _)| !self.table.ledger.contains(id)) {
            let (sum, count) = unflushed.entry(counter).or_default();
            *sum += amount;
            *count += 1;
        }
        let status = Call::new(Function::Status, [&self.keys.stream, &self.keys.index, &self.keys.state]);
        let is_open = self.call(status.arg(&self.keys.group)).await.status == Status::Done;
        for id in COUNTERS {
            let truth = self.base[id] + self.accepted.get(id).copied().unwrap_or(0);
            let (sum, count) = unflushed.get(id).copied().unwrap_or_default();
            if self.table.values[id] + sum != truth {
                return Err(format!("{id}: {truth} accepted, {} flushed and {sum} on the way", self.table.values[id]));
            }
            let key = self.keys.counter(id);
            let Some(value) = self.command(Command::new("GET").arg(&key)).await.as_text().map(str::to_owned) else {
                continue;
            };
            if value != truth.to_string() {
                return Err(format!("{id} shows {value}, and is {truth}"));
            }
            let left = self.command(Command::new("PTTL").arg(&key)).await.as_int();
            let is_dirty =
                self.command(Command::new("HEXISTS").arg(&self.keys.index).arg(id)).await.as_int() == Some(1);
            if left == Some(-1) && !is_dirty {
                return Err(format!("{id} is neither clean nor dirty"));
            }
            if left >= Some(0) && count > 0 && is_open && self.to_replay.is_none() {
                return Err(format!("{id} may be evicted with {count} deltas that are not flushed"));
            }
        }
        Ok(())
    }

    /// Faults stop, everything is flushed: everything is clean, and every counter can be brought back.
    async fn drain(&mut self) -> Check {
        if let Some((_, from)) = self.to_replay.take() {
            self.replay(from).await;
        }
        self.workers = Default::default();
        loop {
            let read = Command::new("XREADGROUP").arg("GROUP").arg(&self.keys.group).arg("z").arg("COUNT").arg(500);
            let mut found = ids(self.command(read.arg("STREAMS").arg(&self.keys.stream).arg(">")).await);
            if found.is_empty() {
                let claim = Command::new("XAUTOCLAIM").arg(&self.keys.stream).arg(&self.keys.group).arg("z").arg(0);
                found = ids(self.command(claim.arg("0-0").arg("COUNT").arg(500)).await);
            }
            if found.is_empty() {
                break;
            }
            self.commit(&found);
            let ack = Command::new("XACK").arg(&self.keys.stream).arg(&self.keys.group).args(&found);
            self.command(ack).await;
        }
        self.settle(&COUNTERS).await;
        self.check().await?;
        if self.command(Command::new("HLEN").arg(&self.keys.index).clone()).await.as_int() != Some(0) {
            return Err("something is dirty when everything is flushed".into());
        }
        for id in COUNTERS {
            self.command(Command::new("DEL").arg(self.keys.lease(id))).await;
            let mut answer =
                self.call(self.of(Function::Lease, id).arg(id).arg(&self.keys.group).arg(LONG_MS).arg(7)).await;
            if answer.status == Status::Miss {
                let call = self.of(Function::Install, id).arg(id).arg(7).arg(self.table.values[id]).arg(-1);
                answer = self.call(call.arg(LONG_MS).arg(&self.keys.group)).await;
            }
            let truth = self.base[id] + self.accepted.get(id).copied().unwrap_or(0);
            if answer.status != Status::Done || answer.number(0) != Some(truth) {
                return Err(format!("{id} is {truth} and cannot be brought back: {answer:?}"));
            }
        }
        Ok(())
    }

    async fn run(&mut self, steps: u32) -> Check {
        for step in 0..steps {
            self.step().await.map_err(|why| format!("step {step}: {why}"))?;
            self.check().await.map_err(|why| format!("step {step}: {why}"))?;
        }
        self.drain().await
    }
}

/// The ids in a reply of XREADGROUP or XAUTOCLAIM.
fn ids(reply: Reply) -> Vec<EntryId> {
    let of_entries = |entries: Reply| {
        let id = |entry: Reply| entry.into_array()?.next()?.as_text()?.parse().ok();
        entries.into_array().map(|entries| entries.filter_map(id).collect()).unwrap_or_default()
    };
    match reply.clone().into_map() {
        Some(mut streams) => streams.next().map(|(_, entries)| of_entries(entries)).unwrap_or_default(),
        None => reply.into_array().and_then(|mut parts| parts.nth(1)).map(of_entries).unwrap_or_default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_frontier_is_the_lower_one_of_the_oldest_pending_entry_and_the_last_delivered() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let limit = std::time::Duration::from_secs(10);
    let address = Endpoint::new(server.url().into(), limit, limit);
    let connection = Connection::open(&address, "frontier").await.expect("connected");
    functions::load(&connection).await.expect("loaded");
    let simulation = Simulation::new(&connection, 1).await;
    let ShardKeys { stream, index, state, group, .. } = &simulation.keys;
    for n in 1..=4 {
        simulation.command(Command::new("XADD").arg(stream).arg(format!("{n}-0")).arg("id").arg("a")).await;
    }
    let frontier = async || {
        let answer = simulation.call(Call::new(Function::Status, [stream, index, state]).arg(group)).await;
        (answer.status, answer.text(0).map(str::to_owned))
    };
    let read = Command::new("XREADGROUP").arg("GROUP").arg(group).arg("w").arg("STREAMS").arg(stream).arg(">");
    assert_eq!(ids(simulation.command(read).await).len(), 4);
    assert_eq!(frontier().await, (Status::Done, Some("1-0".into())));
    simulation.command(Command::new("XACK").arg(stream).arg(group).arg("1-0").arg("3-0")).await;
    assert_eq!(frontier().await, (Status::Done, Some("2-0".into())));
    simulation.settle(&[]).await;
    // Set back: what is pending lies above what was delivered last.
    simulation.command(Command::new("XGROUP").arg("SETID").arg(stream).arg(group).arg("0")).await;
    assert_eq!(frontier().await, (Status::Closed, Some("0-1".into())));
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_order_a_value_is_exact_and_nothing_unflushed_is_evictable() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let limit = std::time::Duration::from_secs(10);
    let address = Endpoint::new(server.url().into(), limit, limit);
    let connection = Connection::open(&address, "simulation").await.expect("connected");
    functions::load(&connection).await.expect("loaded");
    for seed in seeds(if std::env::var_os(BROKEN).is_some() { 250 } else { 12 }) {
        let mut simulation = Simulation::new(&connection, seed).await;
        if let Err(why) = simulation.run(1_000).await {
            panic!("seed {seed}: {why}");
        }
    }
}
