//! Counters that may vanish: adding to them, and reading them exactly.
//!
//! Takes increments of a managed pipeline, each accepted once however often it had to be sent; gives values that equal PostgreSQL plus what has not been
//! flushed yet, or says why there is none. It fails as [`super::Producer`] does: nothing happened, or nobody knows. A value that Valkey lost is brought
//! from PostgreSQL by whoever first needs it; an increment never waits for that ([`Counters::add`]).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};

use super::connector::{Connector, Unanswered};
use super::flight::Flights;
use super::hydrate::{Breaker, Granted};
use super::lanes::{self, Lanes};
use super::produce::{NotAdded, is_text};
use super::truth::Truth;
use super::ttl::{LONGEST, usable};
use crate::functions::{Answer, Call, Function, Status, had_begun};
use crate::model::entry::EntryId;
use crate::model::pipeline::{Pipeline, ShardKeys};
use crate::model::shard::shard_of;
use crate::retry::{Fault, FaultKind, Verdict, judge, kind};
use crate::valkey::{Command, Endpoint, unexpected};

/// How many increments one call does: 0.3 ms of the server's time, and they are accepted or refused together.
const PER_CALL: usize = 100;
/// How many calls are on their way at once.
const CALLS_IN_FLIGHT: usize = 8;
/// How long is waited between two looks at what somebody else is doing, at the least and at the most.
const LOOK_AGAIN: (u64, u64) = (2, 5);

/// How a client of managed counters behaves. [`Default`] argues for itself below.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CounterOptions {
    /// How many increments are under way at once, and so how many lanes the shard's state remembers: 88 bytes each in Valkey.
    pub lanes: usize,
    /// How long somebody may take to bring a value before others try: longer than PostgreSQL takes for one read.
    pub lease: Duration,
    /// How long a call waits for a value: a flush takes a few tens of milliseconds.
    pub patience: Duration,
    /// How long PostgreSQL is left alone after it failed to answer.
    pub breaker: Duration,
    /// How long a value that nobody adds to stays in Valkey, and by which share that differs from value to value.
    pub ttl: Duration,
    /// See `ttl`.
    pub jitter: f64,
    /// For how long an increment is sent again while Valkey is out of reach or not ready. Sent twice it counts once.
    pub retry_for: Duration,
}

impl Default for CounterOptions {
    fn default() -> CounterOptions {
        CounterOptions {
            lanes: 256,
            lease: Duration::from_secs(5),
            patience: Duration::from_millis(200),
            breaker: Duration::from_secs(1),
            ttl: Duration::from_secs(6 * 3600),
            jitter: 0.1,
            retry_for: Duration::from_secs(5),
        }
    }
}

/// What is known of a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// All that was ever accepted.
    Exact(i64),
    /// What PostgreSQL has, while the flush catches up: some of what was accepted may be missing.
    Stored(i64),
    /// Nothing, for now.
    Unknown(Why),
}

impl Count {
    /// The exact value, if it is one.
    pub fn exact(self) -> Option<i64> {
        match self {
            Count::Exact(value) => Some(value),
            _ => None,
        }
    }
}

/// Why a counter's value is not known. Increments are accepted all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Why {
    /// PostgreSQL did not answer, or failed to a short while ago.
    #[error("PostgreSQL does not answer")]
    PostgresDown,
    /// PostgreSQL refuses the role, its password or what it was asked, or is not what the address says: [`Counters::fault`] has its words.
    #[error("PostgreSQL refuses to tell")]
    PostgresRefuses,
    /// The flush has to catch up first: a replay, a new group, values that are being dropped, or no daemon that manages the pipeline.
    #[error("the flush has to catch up first")]
    CatchingUp,
    /// Somebody else is bringing the value and took longer than `patience`.
    #[error("the value is being brought")]
    Busy,
    /// This is not the PostgreSQL that the counters were flushed into, or it lacks what was flushed: restored, or a standby that was promoted too early;
    /// `tidegate replay` puts that right. Or the daemon divides the counters by another number of shards than this client.
    #[error(
        "this is another PostgreSQL than the one that was flushed into, or it lacks what was flushed, or the number of shards differs"
    )]
    OtherPostgres,
    /// Valkey could not be asked, or is full.
    #[error("Valkey cannot be asked")]
    ValkeyDown,
    /// Valkey refuses the user, its password or the command, or is not what the address says: [`Counters::fault`] has its words.
    #[error("Valkey refuses the command")]
    ValkeyRefuses,
    /// No counter can have this id: it holds a NUL, which no text in PostgreSQL can.
    #[error("no counter can have an id with a NUL in it")]
    BadId,
}

impl Why {
    fn of(fault: &Fault) -> Why {
        let is_refusal = matches!(kind(fault), FaultKind::NoPermission | FaultKind::Config);
        match (fault, is_refusal) {
            (Fault::Valkey { .. } | Fault::ValkeyLost(_) | Fault::ValkeyProtocol(_), false) => Why::ValkeyDown,
            (Fault::Valkey { .. } | Fault::ValkeyLost(_) | Fault::ValkeyProtocol(_), true) => Why::ValkeyRefuses,
            (_, false) => Why::PostgresDown,
            (_, true) => Why::PostgresRefuses,
        }
    }
}

/// How a take ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// Taken; with what is left, where that is known: an answer that was lost on its way is known to have been yes.
    Yes(Option<i64>),
    /// Not taken: the counter would have fallen below the floor. With what there is.
    No(i64),
    /// Not taken: nobody knows how much there is.
    Unknown(Why),
}

/// Why a counter is not known to be settled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotSettled {
    /// Not within the time given.
    #[error("not within the time given")]
    NotYet,
    /// Valkey could not be asked.
    #[error("{0}")]
    Unavailable(Fault),
}

/// The counters of one managed pipeline. Cheap to clone; all clones share one connection, in a cluster one to each primary that has a shard.
#[derive(Debug)]
pub struct Counters<T> {
    pub(super) shared: Arc<Shared<T>>,
}

impl<T> Clone for Counters<T> {
    fn clone(&self) -> Counters<T> {
        Counters { shared: Arc::clone(&self.shared) }
    }
}

#[derive(Debug)]
pub(super) struct Shared<T> {
    pub(super) connector: Arc<Connector>,
    pub(super) pipeline: Pipeline,
    pub(super) truth: T,
    pub(super) options: CounterOptions,
    pub(super) breaker: Breaker,
    fault: Mutex<Option<Fault>>,
    keys: Vec<ShardKeys>,
    lanes: Lanes,
    flights: Flights<Result<i64, Why>>,
}

/// What came of one try to add.
enum Tried {
    Value(i64),
    Blind,
    Miss(Granted),
    Busy,
    Closed,
    Refused(i64),
}

impl<T: Truth> Counters<T> {
    /// Connects, so that a wrong address or password is known now and not at the first increment. Of the pipeline it uses the name, the stream, the
    /// number of shards, the fields and the counters' names; they must be those of the daemon's configuration.
    ///
    /// # Errors
    /// [`Fault::Valkey`] with the server's words, or with CROSSSLOT where in a cluster a shard's keys do not share a slot; [`Fault::ValkeyLost`] when it
    /// cannot be reached in time.
    pub async fn connect(
        address: &Endpoint,
        pipeline: &Pipeline,
        truth: T,
        options: CounterOptions,
    ) -> Result<Counters<T>, Fault> {
        let shared = Shared {
            connector: Arc::new(Connector::new(address, "tidegate-counters")),
            keys: (0..pipeline.shards.max(1)).map(|shard| pipeline.keys_of(shard)).collect(),
            pipeline: pipeline.clone(),
            truth,
            options: CounterOptions {
                lease: usable(options.lease),
                patience: options.patience.min(LONGEST),
                breaker: options.breaker.min(LONGEST),
                ttl: usable(options.ttl),
                retry_for: options.retry_for.min(LONGEST),
                ..options
            },
            breaker: Breaker::default(),
            fault: Mutex::default(),
            lanes: Lanes::new(options.lanes),
            flights: Flights::default(),
        };
        if address.is_cluster() && !pipeline.is_in_one_slot() {
            return Err(in_different_slots(pipeline));
        }
        // One that is out of reach among many is met when it is needed.
        shared.connector.connection(&pipeline.stream_of(0)).await?;
        Ok(Counters { shared: Arc::new(shared) })
    }

    /// What a server said, or that it did not answer, when a value last could not be brought; none where none failed so.
    pub fn fault(&self) -> Option<Fault> {
        self.shared.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds `by`. It never waits for PostgreSQL: where the value is absent it stays so.
    ///
    /// # Errors
    /// See [`NotAdded`]. It was sent again, for `retry_for`, before it failed.
    pub async fn add(&self, id: &str, by: i64) -> Result<(), NotAdded> {
        self.shared.try_incr(id, by, false, None, &mut None).await.map(drop)
    }

    /// Adds `by`, and gives the value if it can be known within `patience`. The increment is accepted either way.
    ///
    /// # Errors
    /// As [`Counters::add`].
    pub async fn incr(&self, id: &str, by: i64) -> Result<Count, NotAdded> {
        let shared = &self.shared;
        let until = Instant::now() + shared.options.patience;
        let resting = shared.breaker.open();
        let (mut want, mut why, mut doubted) = (resting.is_none(), resting.unwrap_or(Why::PostgresDown), None);
        loop {
            match shared.try_incr(id, by, want, None, &mut doubted).await? {
                Tried::Value(value) => return Ok(Count::Exact(value)),
                Tried::Blind | Tried::Refused(_) => return Ok(Count::Unknown(why)),
                Tried::Miss(granted) => {
                    // The value may be gone again before it is added to: once is enough.
                    want = false;
                    why = shared.bring(id, granted, until).await.err().unwrap_or(Why::Busy);
                }
                Tried::Busy => {
                    (want, why) = (Instant::now() < until, Why::Busy);
                    if want {
                        look_again().await;
                    }
                }
                Tried::Closed => (want, why) = (false, Why::CatchingUp),
            }
        }
    }

    /// Takes `count` if at least `floor` is left behind: stock, quotas, balances. Takes nothing where the value cannot be known.
    ///
    /// # Errors
    /// As [`Counters::add`].
    pub async fn take(&self, id: &str, count: u32, floor: i64) -> Result<Taken, NotAdded> {
        let mut doubted = None;
        let taken = self.try_take(id, count, floor, &mut doubted).await?;
        match &doubted {
            // A try of which nothing was heard may arrive after this: then it must find that it comes too late.
            Some(lane) if !matches!(taken, Taken::Yes(_)) && self.shared.was_done_after_all(id, lane).await? => {
                Ok(Taken::Yes(self.get(id).await.exact()))
            }
            _ => Ok(taken),
        }
    }

    async fn try_take<'a>(
        &'a self,
        id: &str,
        count: u32,
        floor: i64,
        doubted: &mut Option<lanes::Taken<'a>>,
    ) -> Result<Taken, NotAdded> {
        let shared = &self.shared;
        let until = Instant::now() + shared.options.patience;
        loop {
            if let Some(why) = shared.breaker.open()
                && self.shared.peek(id).await.is_none()
            {
                return Ok(Taken::Unknown(why));
            }
            match shared.try_incr(id, -i64::from(count), true, Some(floor), doubted).await? {
                Tried::Value(left) => return Ok(Taken::Yes(Some(left))),
                Tried::Refused(left) => return Ok(Taken::No(left)),
                // A repetition of what was done before, whose value has vanished since.
                Tried::Blind => return Ok(Taken::Yes(self.get(id).await.exact())),
                Tried::Miss(granted) => {
                    if let Err(why) = shared.bring(id, granted, until).await {
                        return Ok(Taken::Unknown(why));
                    }
                }
                Tried::Closed => return Ok(Taken::Unknown(Why::CatchingUp)),
                Tried::Busy if Instant::now() < until => look_again().await,
                Tried::Busy => return Ok(Taken::Unknown(Why::Busy)),
            }
        }
    }

    /// Adds to many, in calls of a hundred, each accepted whole or not at all; gives each one's outcome, in their order: its value, where that is present.
    pub async fn add_many<I: AsRef<str>>(&self, increments: &[(I, i64)]) -> Vec<Result<Option<i64>, NotAdded>> {
        let shared = &*self.shared;
        let mut by_shard = BTreeMap::<u16, Vec<usize>>::new();
        let mut outcomes: Vec<_> = increments.iter().map(|_| Err(NotAdded::BadId)).collect();
        for (place, (id, _)) in increments.iter().enumerate().filter(|(_, (id, _))| is_text(id.as_ref())) {
            by_shard.entry(shard_of(id.as_ref(), shared.pipeline.shards)).or_default().push(place);
        }
        let mut calls = Vec::new();
        for (shard, places) in &by_shard {
            let keys = &shared.keys[usize::from(*shard)];
            for places in places.chunks(PER_CALL) {
                let pairs: Vec<_> =
                    places.iter().map(|&place| (increments[place].0.as_ref(), increments[place].1)).collect();
                calls.push(async move { (places, shared.incr_many(keys, &pairs).await) });
            }
        }
        let mut calls = stream::iter(calls).buffered(CALLS_IN_FLIGHT);
        while let Some((places, answer)) = calls.next().await {
            for (n, place) in places.iter().enumerate() {
                outcomes[*place] = answer.as_ref().map(|values| values.get(n).copied().flatten()).map_err(Clone::clone);
            }
        }
        outcomes
    }

    /// The value. Where it is absent it is brought, and whoever asks meanwhile gets the same answer.
    pub async fn get(&self, id: &str) -> Count {
        let shared = &self.shared;
        if !is_text(id) {
            return Count::Unknown(Why::BadId);
        }
        let brought = match shared.peek(id).await {
            Some(Ok(value)) => return Count::Exact(value),
            Some(Err(fault)) => Err(shared.failed(fault)),
            None => shared.flights.join(id, shared.longest(), async || (shared.fetch(id).await, None)).await,
        };
        match brought {
            Ok(value) => Count::Exact(value),
            Err(why) => shared.stored(&[id], why).await.pop().unwrap_or(Count::Unknown(why)),
        }
    }

    /// The values of many, in their order: one pipelined read, and one snapshot of PostgreSQL for those that are absent.
    pub async fn get_many(&self, ids: &[&str]) -> Vec<Count> {
        let shared = &self.shared;
        let seen = join_all(ids.iter().map(|id| shared.peek(id))).await;
        let mut counts: Vec<Option<Count>> =
            seen.into_iter().map(|seen| seen.and_then(Result::ok).map(Count::Exact)).collect();
        // An id that is asked for twice is brought once.
        let mut absent: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (place, id) in ids.iter().enumerate() {
            if !is_text(id) {
                // PostgreSQL would refuse to be asked about it, and about all others with it.
                counts[place] = Some(Count::Unknown(Why::BadId));
            } else if counts[place].is_none() {
                absent.entry(*id).or_default().push(place);
            }
        }
        let wanted: Vec<&str> = absent.keys().copied().collect();
        let brought = shared.fetch_many(&wanted).await;
        let mut failed: BTreeMap<Why, Vec<&str>> = BTreeMap::new();
        for (id, outcome) in wanted.iter().zip(brought) {
            match outcome {
                Ok(value) => absent[id].iter().for_each(|place| counts[*place] = Some(Count::Exact(value))),
                Err(why) => failed.entry(why).or_default().push(id),
            }
        }
        for (why, ids) in failed {
            for (id, count) in ids.iter().zip(shared.stored(&ids, why).await) {
                absent[id].iter().for_each(|place| counts[*place] = Some(count));
            }
        }
        counts.into_iter().map(|count| count.unwrap_or(Count::Unknown(Why::Busy))).collect()
    }

    /// Resolves when all that was accepted of this counter before the call is in PostgreSQL (or a dead letter).
    ///
    /// # Errors
    /// [`NotSettled`].
    pub async fn settled(&self, id: &str, within: Duration) -> Result<(), NotSettled> {
        let (shared, until) = (&self.shared, Instant::now() + within);
        let keys = shared.keys_of(id);
        let mut last: Option<EntryId> = None;
        loop {
            let unavailable = |unanswered: Unanswered| NotSettled::Unavailable(unanswered.fault());
            if last.is_none() {
                let told = shared.connector.call(&keys.index, Command::new("HGET").arg(&keys.index).arg(id)).await;
                match told.map_err(unavailable)?.as_text().and_then(|text| text.parse().ok()) {
                    Some(entry) => last = Some(entry),
                    None => return Ok(()),
                }
            }
            let status = Call::new(Function::Status, [&keys.stream, &keys.index, &keys.state]).arg(&keys.group);
            let status = shared.connector.send(status).await.map_err(unavailable)?;
            let frontier = status.text(0).and_then(|text| text.parse::<EntryId>().ok());
            if status.status == Status::Done && frontier > last {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(NotSettled::NotYet);
            }
            look_again().await;
        }
    }
}

impl<T: Truth> Shared<T> {
    /// How long bringing a value takes at the most.
    fn longest(&self) -> Duration {
        self.options.patience + self.options.lease * 2
    }

    /// Why a value could not be brought, by what a server said; that is kept.
    pub(super) fn failed(&self, fault: Fault) -> Why {
        let why = Why::of(&fault);
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
        why
    }

    /// The keys of a counter's shard.
    pub(super) fn keys_of(&self, id: &str) -> &ShardKeys {
        &self.keys[usize::from(shard_of(id, self.pipeline.shards))]
    }

    /// The value, if it is present.
    pub(super) async fn peek(&self, id: &str) -> Option<Result<i64, Fault>> {
        let counter = self.keys_of(id).counter(id);
        match self.connector.call(&counter, Command::new("GET").arg(&counter)).await {
            Ok(reply) => reply.as_text().map(|text| text.parse().map_err(|_| unexpected("GET"))),
            Err(unanswered) => Some(Err(unanswered.fault())),
        }
    }

    /// One try to add, sent again for as long as nobody knows whether it arrived. `doubted` is what [`Self::operate`] makes of it.
    async fn try_incr<'a>(
        &'a self,
        id: &str,
        by: i64,
        want: bool,
        floor: Option<i64>,
        doubted: &mut Option<lanes::Taken<'a>>,
    ) -> Result<Tried, NotAdded> {
        if !is_text(id) {
            return Err(NotAdded::BadId);
        }
        let (keys, pipeline, token) = (self.keys_of(id), &self.pipeline, token());
        let lease = want.then(|| self.lease(id, token));
        let answer = self
            .operate(keys, doubted, |lane, seq| {
                let of_counter = [&keys.counter(id), &keys.lease(id), &keys.stream, &keys.index, &keys.state];
                let call = Call::new(Function::Incr, of_counter).arg(id).arg(by).arg(lane).arg(seq);
                let call = call.arg(u8::from(want)).arg(&keys.group).arg(self.options.lease.as_millis()).arg(token);
                let floor = floor.map_or_else(String::new, |floor| floor.to_string());
                call.arg(floor).arg(&pipeline.key_field).arg(&pipeline.value_field)
            })
            .await;
        let is_granted = answer.as_ref().is_ok_and(|answer| answer.status == Status::Miss);
        let lease = lease.and_then(|lease| lease.granted(is_granted));
        let (answer, broken) = (answer?, || NotAdded::Unknown(unexpected("FCALL")));
        let told = |lease| Granted::told(&answer, token, lease);
        Ok(match answer.status {
            Status::Done => Tried::Value(answer.number(0).ok_or_else(broken)?),
            Status::Seen => answer.number(0).map_or(Tried::Blind, Tried::Value),
            Status::Blind => Tried::Blind,
            Status::Miss => Tried::Miss(lease.and_then(told).ok_or_else(broken)?),
            Status::Busy => Tried::Busy,
            Status::Closed => Tried::Closed,
            Status::Refused => Tried::Refused(answer.number(0).ok_or_else(broken)?),
            Status::Lost | Status::Judge => return Err(broken()),
        })
    }

    async fn incr_many(&self, keys: &ShardKeys, pairs: &[(&str, i64)]) -> Result<Vec<Option<i64>>, NotAdded> {
        let answer = self
            .operate(keys, &mut None, |lane, seq| {
                let mut all = vec![keys.stream.clone(), keys.index.clone(), keys.state.clone()];
                all.extend(pairs.iter().flat_map(|(id, _)| [keys.counter(id), keys.lease(id)]));
                let call = Call::new(Function::IncrMany, all).arg(lane).arg(seq);
                let call = call.arg(&self.pipeline.key_field).arg(&self.pipeline.value_field);
                pairs.iter().fold(call, |call, (id, by)| call.arg(id).arg(by))
            })
            .await?;
        Ok((0..pairs.len()).map(|n| answer.number(n)).collect())
    }

    /// Sends one operation of a lane until it is known what became of it, for `retry_for`. Where it was not done, and a try of which nothing was heard
    /// may still arrive, the lane stays taken, in `doubted`: the next try is the same operation, so that whichever arrives first is the only one.
    async fn operate<'a>(
        &'a self,
        keys: &ShardKeys,
        doubted: &mut Option<lanes::Taken<'a>>,
        call: impl Fn(&str, u64) -> Call,
    ) -> Result<Answer, NotAdded> {
        let mut in_doubt = doubted.is_some();
        let lane = match doubted.take() {
            Some(lane) => lane,
            None => self.lanes.take().await,
        };
        let until = Instant::now() + self.options.retry_for;
        loop {
            let fault = match self.connector.send(call(lane.name(), lane.seq())).await {
                Ok(answer) => {
                    if in_doubt && !matches!(answer.status, Status::Done | Status::Blind | Status::Seen) {
                        *doubted = Some(lane);
                    }
                    return Ok(answer);
                }
                // The lane's number is noted last: sent again, it might count twice.
                Err(Unanswered::Failed(fault)) if had_begun(&fault) => return Err(NotAdded::Unknown(fault)),
                Err(Unanswered::Failed(fault)) => {
                    in_doubt |= !matches!(fault, Fault::Valkey { .. });
                    fault
                }
                Err(Unanswered::Unsent(fault)) => fault,
            };
            let passes = match &fault {
                // A full server says so at once: whoever adds must know, and decide. Unless an earlier try may have been done: a full server runs no
                // function that would say so, and is asked for the lane's number.
                Fault::Valkey { code, .. } if code == "OOM" => {
                    if in_doubt && self.was_done(keys, lane.name(), lane.seq()).await {
                        return Ok(Answer::seen());
                    }
                    in_doubt
                }
                fault => judge(fault, u32::MAX).verdict == Verdict::Retry,
            };
            if !passes || Instant::now() >= until {
                return Err(match fault {
                    fault if in_doubt => NotAdded::Unknown(fault),
                    Fault::Valkey { ref code, .. } if !passes && matches!(code.as_str(), "ERR" | "WRONGTYPE") => {
                        NotAdded::CounterRefused(fault)
                    }
                    fault => NotAdded::Unavailable(fault),
                });
            }
            look_again().await;
        }
    }

    /// Uses an operation's number up, so that no try of it is done from now on; whether one was done before.
    async fn was_done_after_all(&self, id: &str, lane: &lanes::Taken<'_>) -> Result<bool, NotAdded> {
        let keys = self.keys_of(id);
        // Many increments that are none: the lane's number is noted. It is sent once, for a repetition could not be told from the operation.
        let call = Call::new(Function::IncrMany, [&keys.stream, &keys.index, &keys.state]).arg(lane.name());
        match self.connector.send(call.arg(lane.seq())).await {
            Ok(answer) => Ok(answer.status == Status::Seen),
            Err(Unanswered::Failed(fault) | Unanswered::Unsent(fault)) => Err(NotAdded::Unknown(fault)),
        }
    }

    /// Whether the shard has noted this operation of a lane.
    async fn was_done(&self, keys: &ShardKeys, lane: &str, seq: u64) -> bool {
        let noted = Command::new("HGET").arg(&keys.state).arg(format!("lane:{lane}"));
        let noted = self.connector.call(&keys.state, noted).await;
        noted.ok().and_then(|noted| noted.as_text()?.parse::<u64>().ok()).is_some_and(|noted| noted >= seq)
    }
}

/// What is said of a pipeline whose counters a cluster cannot change together with their stream.
pub(super) fn in_different_slots(pipeline: &Pipeline) -> Fault {
    let (stream, counter) = (pipeline.stream_of(0), pipeline.counter_of("…"));
    let message =
        format!("CROSSSLOT the stream {stream} and its counters {counter} lie in different slots of the cluster");
    Fault::Valkey { code: "CROSSSLOT".into(), message }
}

/// A lease's token: nobody else's.
pub(super) fn token() -> u64 {
    rand::random::<u64>()
}

/// Waits for a moment, not the same one for everybody.
pub(super) async fn look_again() {
    let (least, most) = LOOK_AGAIN;
    tokio::time::sleep(Duration::from_millis(rand::random_range(least..=most))).await;
}
