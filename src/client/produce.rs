//! The writing side: a counter goes up and an entry says by how much, both or neither.
//!
//! Takes an id and an amount; gives the counter's new value and the entry's id. It fails in two ways that must not be
//! confused: nothing happened, and why ([`NotAdded::happened_not`]), or nobody can say whether it happened
//! ([`NotAdded::Unknown`]). What is unknown is never sent again from here, for a second time would count twice.
//!
//! # Why a script
//!
//! `MULTI` runs its commands one after the other whatever they answer: an `INCRBY` that fails on a list, or past the end
//! of 64 bits, does not keep the `XADD` behind it from running, and then the table counts what the counter never did.
//! Looking at the types beforehand only narrows the gap. A script looks and acts in one step. It is sent whole each
//! time, so there is nothing to load and nothing that a failover forgets: `EVALSHA` was not measurably faster.
//!
//! The Valkey user needs `+eval +get +incrby +xadd +set +del` on `counter:*` and the stream (`SET` and `DEL` only put a
//! counter back whose entry was refused); docs/permissions.md has the line to paste. Where scripts are forbidden every increment is
//! [`NotAdded::Unavailable`] and nothing happens.
//!
//! # In a Valkey Cluster
//!
//! One script can write a counter and its stream only if both lie in one slot: where the stream has a hash tag, as each of several shards'
//! streams has, its counters bear it, too. Each shard is written on its primary. Where that says that the slot has gone to another server it
//! has done nothing, so the increment follows, for as long as one command may take; so it does where the slot is on its way or nobody serves
//! it for the moment.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};

use super::connector::{Connector, Unanswered};
use super::counters::in_different_slots;
use crate::functions::had_begun;
use crate::model::entry::EntryId;
use crate::model::names;
use crate::model::pipeline::Pipeline;
use crate::model::shard::shard_of;
use crate::retry::{Fault, FaultKind, Verdict, backoff, judge, kind};
use crate::valkey::{Command, Connection, Endpoint, Reply, server_error, unexpected};

/// The field that makes an increment unlike every other one: two equal ones under one entry id differ by it.
pub const OP_FIELD: &str = "op";

/// The field that carries a W3C trace context to whoever flushes the entry.
pub const TRACEPARENT_FIELD: &str = "traceparent";

/// How many increments one call of the script does. It is what a server does in one go, and what is unknown together.
///
/// Measured on two cores shared with the server (Valkey 9.1), increments/s: 1 a call 44,000; 8: 146,000; 32: 218,000;
/// 64: 305,000; 256 and 1,024: no more. A call of 64 takes the server 0.2 ms, during which it serves nobody else.
const PAIRS_PER_CALL: usize = 64;

/// How many calls are on their way at once: with 4 the server waited at times, with 16 it did no more than with 8.
const CALLS_IN_FLIGHT: usize = 8;

/// Does any number of increments, each one wholly or not at all; answers a line for each.
///
/// A line is `before id` (the counter's value before, the entry's id), or a letter and an error: `c` the counter refused,
/// `s` the stream refused and the counter was put back, `u` it could not be put back. Numbers stay text: a number of
/// this language is exact to 53 bits only, which is why it asks for the value before (12 % of its time). The reply is
/// one string, whose content no client takes for a pub/sub message.
const SCRIPT: &str = "\
local stream, key_field, value_field, traceparent = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local lines = {}
for i = 2, #KEYS do
  local counter = KEYS[i]
  local id, amount, op = ARGV[3 * i - 2], ARGV[3 * i - 1], ARGV[3 * i]
  local before = redis.pcall('GET', counter)
  local sum = type(before) == 'table' and before or redis.pcall('INCRBY', counter, amount)
  local line
  if type(sum) == 'table' then
    line = 'c' .. sum.err
  else
    local entry
    if traceparent == '' then
      entry = redis.pcall('XADD', stream, '*', key_field, id, value_field, amount, 'op', op)
    else
      entry = redis.pcall('XADD', stream, '*', key_field, id, value_field, amount, 'op', op, 'traceparent', traceparent)
    end
    if type(entry) ~= 'table' then
      line = (before or '0') .. ' ' .. entry
    else
      local back
      if before then
        back = redis.pcall('SET', counter, before, 'KEEPTTL')
      else
        back = redis.pcall('DEL', counter)
      end
      line = (type(back) == 'table' and back.err and 'u' or 's') .. entry.err
    end
  end
  lines[#lines + 1] = string.gsub(line, '[\\r\\n]', ' ')
end
return table.concat(lines, '\\n')";

/// Adds to counters. Cheap to clone; every clone shares one connection (in a cluster, one to each primary that has a shard), and what they
/// send together is pipelined.
///
/// A connection that breaks is opened again by the next increment, once; nothing that may have happened is sent again from here, and there is
/// no queue.
#[derive(Debug, Clone)]
pub struct Producer {
    shared: Arc<Shared>,
    traceparent: Option<Arc<str>>,
}

#[derive(Debug)]
struct Shared {
    connector: Connector,
    command_timeout: Duration,
    pipeline: Pipeline,
    /// Unlike that of every other producer, with [`Shared::sequence`] behind it unlike every other increment.
    origin: String,
    sequence: AtomicU64,
}

/// An increment that happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Added {
    /// The counter's value right after it.
    pub value: i64,
    /// The entry that carries it to PostgreSQL.
    pub entry: EntryId,
}

/// Why an increment did not happen, or is not known to have happened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAdded {
    /// The id contains NUL, which no PostgreSQL text can hold. Nothing was sent.
    #[error("the id contains NUL")]
    BadId,
    /// The counter cannot take it: it holds another type, or no whole number, or would leave 64 bits. Nothing happened.
    #[error("the counter refuses it: {0}")]
    CounterRefused(Fault),
    /// The stream cannot take any entry: its key holds another type, say. Nothing happened: the counter is as it was.
    #[error("the stream refuses it: {0}")]
    StreamRefused(Fault),
    /// No increment can be taken now: no connection, no permission, no memory, a replica. Nothing happened.
    #[error("not taken: {0}")]
    Unavailable(Fault),
    /// It was sent and no answer came: it happened or it did not. To send it again may count it twice.
    #[error("it may or may not have happened: {0}")]
    Unknown(Fault),
}

impl NotAdded {
    /// Whether it certainly did not happen, so that sending it again cannot count it twice.
    pub fn happened_not(&self) -> bool {
        !matches!(self, NotAdded::Unknown(_))
    }

    /// What Valkey said, or that it did not answer; none where nothing was sent.
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            NotAdded::BadId => None,
            NotAdded::CounterRefused(fault)
            | NotAdded::StreamRefused(fault)
            | NotAdded::Unavailable(fault)
            | NotAdded::Unknown(fault) => Some(fault),
        }
    }
}

impl Producer {
    /// Connects, so that a wrong address or password is known now and not at the first increment.
    ///
    /// Of the pipeline it uses the stream, the number of shards, and the names of the two fields, which may be neither [`OP_FIELD`] nor
    /// [`TRACEPARENT_FIELD`]: an entry with a field twice becomes a dead letter.
    ///
    /// # Errors
    /// [`Fault::Valkey`] with the server's words, or with CROSSSLOT where in a cluster counters and stream do not share a slot;
    /// [`Fault::ValkeyLost`] when it cannot be reached in time.
    pub async fn connect(address: &Endpoint, pipeline: &Pipeline) -> Result<Producer, Fault> {
        let shared = Shared {
            connector: Connector::new(address, "tidegate-produce"),
            command_timeout: address.command_timeout,
            pipeline: pipeline.clone(),
            origin: format!("{:016x}", rand::random::<u64>()),
            sequence: AtomicU64::new(0),
        };
        if address.is_cluster() && !pipeline.is_in_one_slot() {
            return Err(in_different_slots(pipeline));
        }
        shared.connector.connection(&pipeline.stream_of(0)).await?;
        Ok(Producer { shared: Arc::new(shared), traceparent: None })
    }

    /// The same producer for one request: what it adds carries this W3C `traceparent`. An empty one is none.
    pub fn traced(&self, traceparent: &str) -> Producer {
        Producer { shared: Arc::clone(&self.shared), traceparent: Some(traceparent.into()) }
    }

    /// Adds `amount`, which may be negative or zero, to the counter `id`: any text without NUL, even the empty one.
    ///
    /// # Errors
    /// See [`NotAdded`]. A future that is dropped before it is done is [`NotAdded::Unknown`] that nobody was told of.
    pub async fn add(&self, id: &str, amount: i64) -> Result<Added, NotAdded> {
        let mut outcomes = self.add_many(&[(id, amount)]).await;
        outcomes.pop().unwrap_or_else(|| Err(NotAdded::Unknown(unexpected("EVAL"))))
    }

    /// Adds many, pipelined; gives each one's outcome, in their order. Each happens wholly or not at all, by itself.
    ///
    /// They are sent, and happen, in order (those of one shard, where there are several), unless clones add at the same time or a cluster
    /// moves their slot meanwhile. Once a connection breaks, what was on its way is [`NotAdded::Unknown`] and what was not yet sent stays
    /// so, as [`NotAdded::Unavailable`].
    pub async fn add_many<I: AsRef<str>>(&self, increments: &[(I, i64)]) -> Vec<Result<Added, NotAdded>> {
        // Made here and not lazily by the stream: so this future can be spawned.
        let by_shard = by_shard(increments, self.shared.pipeline.shards);
        let mut outcomes: Vec<_> = increments.iter().map(|_| Err(NotAdded::Unknown(unexpected("EVAL")))).collect();
        let mut calls = Vec::new();
        for (shard, places) in &by_shard {
            let stream = self.shared.pipeline.stream_of(*shard);
            match self.shared.connector.connection(&stream).await {
                Ok(connection) => calls.extend(places.chunks(PAIRS_PER_CALL).map(|places| {
                    let pairs = places.iter().map(|place| &increments[*place]);
                    let pairs = pairs.map(|(id, amount)| (id.as_ref(), *amount)).collect();
                    let (stream, connection) = (stream.clone(), connection.clone());
                    async move { (places, self.call(stream, connection, pairs).await) }
                })),
                Err(fault) => {
                    places.iter().for_each(|place| outcomes[*place] = Err(NotAdded::Unavailable(fault.clone())));
                }
            }
        }
        let mut calls = stream::iter(calls).buffered(CALLS_IN_FLIGHT);
        while let Some((places, answers)) = calls.next().await {
            answers.into_iter().zip(places).for_each(|(answer, place)| outcomes[*place] = answer);
        }
        outcomes
    }

    /// One call of the script, for increments of one stream: sends, and reads each pair's line.
    async fn call(
        &self,
        stream: String,
        connection: Arc<Connection>,
        pairs: Vec<(&str, i64)>,
    ) -> Vec<Result<Added, NotAdded>> {
        let pipeline = &self.shared.pipeline;
        let mut arguments = vec![pipeline.key_field.clone(), pipeline.value_field.clone()];
        arguments.push(self.traceparent.as_deref().unwrap_or_default().to_owned());
        let sequence = self.shared.sequence.fetch_add(pairs.len() as u64, Ordering::Relaxed);
        let sound = pairs.iter().filter(|(id, _)| is_text(id));
        let prefix = names::counters_beside(&pipeline.counters, &stream);
        let mut counters = Vec::with_capacity(pairs.len());
        for (sequence, (id, amount)) in (sequence..).zip(sound) {
            counters.push(names::counter_below(&prefix, id));
            arguments.extend([(*id).to_owned(), amount.to_string(), format!("{}-{sequence}", self.shared.origin)]);
        }
        let eval = Command::new("EVAL").arg(SCRIPT).arg(counters.len() + 1).arg(&stream).args(counters).args(arguments);
        let answer = if connection.is_lost() {
            Err(NotAdded::Unavailable(Fault::ValkeyLost("the connection broke before this was sent".into())))
        } else {
            self.shared.send(&stream, connection.clone(), eval).await
        };
        let mut lines = answer.as_ref().ok().and_then(|reply| reply.as_text()).unwrap_or_default().split('\n');
        let outcomes: Vec<_> = pairs
            .iter()
            .map(|(id, amount)| match &answer {
                _ if !is_text(id) => Err(NotAdded::BadId),
                Ok(_) => outcome(lines.next().unwrap_or_default(), *amount),
                Err(why) => Err(why.clone()),
            })
            .collect();
        // A primary that has become a replica keeps its connections: the next increment looks for the new one.
        if outcomes
            .iter()
            .any(|outcome| matches!(outcome, Err(NotAdded::Unavailable(fault)) if fault.is_of_another_server()))
        {
            self.shared.connector.forget(&connection).await;
        }
        outcomes
    }
}

impl Shared {
    /// Sends one call, and again for a while where a cluster says that it has done nothing because of where the slot is.
    async fn send(&self, stream: &str, mut connection: Arc<Connection>, eval: Command) -> Result<Reply, NotAdded> {
        let (began, mut waits) = (Instant::now(), backoff());
        loop {
            let fault = match self.connector.call_from(connection, stream, eval.clone()).await.1 {
                Ok(reply) => return Ok(reply),
                Err(Unanswered::Failed(fault)) => return Err(uncertain(fault)),
                Err(Unanswered::Unsent(fault)) => fault,
            };
            // A server that was not reached may be replaced; nothing says that it will be soon.
            let is_refused = matches!(fault, Fault::Valkey { .. });
            match waits.next().filter(|wait| is_refused && began.elapsed() + *wait < self.command_timeout) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => return Err(NotAdded::Unavailable(fault)),
            }
            connection = self.connector.connection(stream).await.map_err(NotAdded::Unavailable)?;
        }
    }
}

/// The places of the increments of each shard, in their order.
fn by_shard<I: AsRef<str>>(increments: &[(I, i64)], shards: u16) -> BTreeMap<u16, Vec<usize>> {
    let mut places = BTreeMap::<u16, Vec<usize>>::new();
    for (place, (id, _)) in increments.iter().enumerate() {
        places.entry(shard_of(id.as_ref(), shards)).or_default().push(place);
    }
    places
}

/// What [`crate::model::entry`] takes for a row's key.
pub(super) fn is_text(id: &str) -> bool {
    !id.contains('\0')
}

/// What a call that failed as a whole says of its increments.
fn uncertain(fault: Fault) -> NotAdded {
    match &fault {
        // An error raised by the script itself: it had begun. Every other one is said before a script starts.
        began if had_begun(began) => NotAdded::Unknown(fault),
        Fault::Valkey { .. } => NotAdded::Unavailable(fault),
        _ => NotAdded::Unknown(fault),
    }
}

/// Reads one line of the script's reply.
fn outcome(line: &str, amount: i64) -> Result<Added, NotAdded> {
    let added = || {
        let (before, entry) = line.split_once(' ')?;
        let value = before.parse::<i64>().ok()?.checked_add(amount)?;
        Some(Added { value, entry: entry.parse().ok()? })
    };
    if let Some(added) = added() {
        return Ok(added);
    }
    // What would be refused whatever the increment: no memory, a replica, a disk that is full, a user without the right.
    let is_of_all =
        |fault: &Fault| judge(fault, u32::MAX).verdict == Verdict::Retry || kind(fault) == FaultKind::NoPermission;
    Err(match (line.get(..1), line.get(1..).map(server_error)) {
        (Some("c" | "s"), Some(fault)) if is_of_all(&fault) => NotAdded::Unavailable(fault),
        (Some("c"), Some(fault)) => NotAdded::CounterRefused(fault),
        (Some("s"), Some(fault)) => NotAdded::StreamRefused(fault),
        (Some("u"), Some(fault)) => NotAdded::Unknown(fault),
        _ => NotAdded::Unknown(unexpected("EVAL")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(message: &str) -> Fault {
        Fault::Valkey { code: message.split(' ').next().unwrap_or_default().into(), message: message.into() }
    }

    #[test]
    fn an_answer_gives_the_new_value_beyond_what_a_double_can_hold() {
        let entry = EntryId { ms: 1700000000000, seq: 3 };
        assert_eq!(outcome("9007199254740992 1700000000000-3", 1), Ok(Added { value: 9007199254740993, entry }));
        assert_eq!(outcome("-1 1700000000000-3", i64::MIN + 1), Ok(Added { value: i64::MIN, entry }));
    }

    #[test]
    fn a_refusal_says_who_refused_and_whether_it_is_about_this_increment() {
        let wrong = "WRONGTYPE Operation against a key holding the wrong kind of value";
        assert_eq!(outcome(&format!("c{wrong}"), 1), Err(NotAdded::CounterRefused(fault(wrong))));
        assert_eq!(outcome(&format!("s{wrong}"), 1), Err(NotAdded::StreamRefused(fault(wrong))));
        let overflow = "ERR increment or decrement would overflow";
        assert_eq!(outcome(&format!("c{overflow}"), 1), Err(NotAdded::CounterRefused(fault(overflow))));
        let memory = "OOM command not allowed when used memory > 'maxmemory'.";
        assert_eq!(outcome(&format!("c{memory}"), 1), Err(NotAdded::Unavailable(fault(memory))));
        let right = "ERR ACL failure in script: User a has no permissions to run the 'incrby' command";
        assert!(
            matches!(outcome(&format!("c{right}"), 1), Err(NotAdded::Unavailable(fault)) if fault.code() == "NOPERM")
        );
    }

    #[test]
    fn what_cannot_be_understood_is_unknown_and_never_taken_for_a_refusal() {
        for line in ["", "u", "uERR no", "1", "x 1-1", "1 x", "9223372036854775807 1-1", "é"] {
            assert!(matches!(outcome(line, 1), Err(NotAdded::Unknown(_))), "{line:?}");
        }
    }

    #[test]
    fn a_call_that_had_begun_is_unknown_and_one_that_had_not_is_not() {
        assert!(!uncertain(Fault::ValkeyLost("no answer".into())).happened_not());
        assert!(!uncertain(fault("ERR user_script:3: out of memory script: 5f, on @user_script:3.")).happened_not());
        assert!(uncertain(fault("NOPERM User a has no permissions to run the 'eval' command")).happened_not());
        assert!(uncertain(fault("BUSY Valkey is busy running a script.")).happened_not());
    }
}
