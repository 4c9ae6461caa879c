//! Hydrate: brings an absent counter's value from PostgreSQL, exactly, while others go on adding to it.
//!
//! Takes a lease that Valkey granted; gives the value, in place. In this order: wait until the flush has passed the last entry of the counter; take one
//! snapshot of PostgreSQL; ask Valkey which increments were noted since the lease; ask the ledger, in the same snapshot, which of those the snapshot
//! holds; put the value in place with those that it does not. Any failure gives the lease back, and leaves PostgreSQL alone for a while where that is
//! what failed.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::{join, join_all};

use super::counters::{Count, Shared, Why, look_again, token};
use super::lease::Lease;
use super::lineage_of;
use super::truth::{Truth, TruthError, View};
use super::ttl::share;
use crate::functions::{Answer, Call, Function, Status};
use crate::model::entry::EntryId;
use crate::model::pipeline::ShardKeys;
use crate::retry::Fault;

/// Leave to bring one counter's value, given back where whoever has it is dropped.
#[derive(Debug)]
pub(super) struct Granted {
    token: u64,
    lease: Lease,
    /// Whether everything of the counter is settled.
    is_ready: bool,
    lineage: String,
    witness: Option<EntryId>,
}

impl Granted {
    /// As `MISS` tells it of the lease that was asked for with this token.
    pub(super) fn told(answer: &Answer, token: u64, lease: Lease) -> Option<Granted> {
        let (is_ready, lineage) = (answer.int(0)? == 1, answer.text(1)?.to_owned());
        Some(Granted { token, lease, is_ready, lineage, witness: answer.text(2)?.parse().ok() })
    }
}

/// Open for a while after PostgreSQL failed to answer.
#[derive(Debug, Default)]
pub(super) struct Breaker(Mutex<Option<(Instant, Why)>>);

impl Breaker {
    /// Why PostgreSQL is left alone; none where it is not.
    pub(super) fn open(&self) -> Option<Why> {
        let until = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        until.and_then(|(until, why)| (Instant::now() < until).then_some(why))
    }

    fn trip(&self, rest: Duration, why: Why) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now() + rest, why));
    }
}

/// What asking for a lease comes to.
enum Asked {
    Present(i64),
    Granted(Granted),
    Busy,
    Failed(Why),
}

impl<T: Truth> Shared<T> {
    /// Brings a value with a lease that was granted. The lease is given back where it fails, and where nobody waits for the value any more.
    pub(super) async fn bring(&self, id: &str, granted: Granted, until: Instant) -> Result<i64, Why> {
        let brought = match self.wait_until_ready(id, &granted, until).await {
            Ok(()) => self.hydrate(self.keys_of(id), &[(id, &granted)]).await.pop().unwrap_or(Err(Why::Busy)),
            Err(why) => Err(why),
        };
        ended(granted.lease, &brought).await;
        brought
    }

    /// Asks for the lease and brings the value, or waits for whoever does.
    pub(super) async fn fetch(&self, id: &str) -> Result<i64, Why> {
        let until = Instant::now() + self.options.patience;
        loop {
            match self.ask(id).await {
                Asked::Present(value) => return Ok(value),
                Asked::Granted(granted) => return self.bring(id, granted, until).await,
                Asked::Busy if Instant::now() < until => look_again().await,
                Asked::Busy => return Err(Why::Busy),
                Asked::Failed(why) => return Err(why),
            }
        }
    }

    /// The same for many: those that are ready share a snapshot of PostgreSQL, shard by shard. The others are waited for at the same time.
    pub(super) async fn fetch_many(&self, ids: &[&str]) -> Vec<Result<i64, Why>> {
        let asked = join_all(ids.iter().map(|id| self.ask(id))).await;
        let mut outcomes: Vec<Result<i64, Why>> = vec![Err(Why::Busy); ids.len()];
        let (mut ready, mut waiting) = (Vec::new(), Vec::new());
        for (place, asked) in asked.into_iter().enumerate() {
            match asked {
                Asked::Present(value) => outcomes[place] = Ok(value),
                Asked::Failed(why) => outcomes[place] = Err(why),
                Asked::Granted(granted) if granted.is_ready => ready.push((place, granted)),
                Asked::Granted(granted) => waiting.push((place, Some(granted))),
                Asked::Busy => waiting.push((place, None)),
            }
        }
        let until = Instant::now() + self.options.patience;
        let waited = join_all(waiting.into_iter().map(async |(place, granted)| {
            let brought = match granted {
                Some(granted) => self.bring(ids[place], granted, until).await,
                None => self.fetch(ids[place]).await,
            };
            (place, brought)
        }));
        let (together, waited) = join(self.bring_together(ids, ready), waited).await;
        for (place, brought) in together.into_iter().chain(waited) {
            outcomes[place] = brought;
        }
        outcomes
    }

    /// Brings those that are ready, each group from one snapshot.
    async fn bring_together(&self, ids: &[&str], mut ready: Vec<(usize, Granted)>) -> Vec<(usize, Result<i64, Why>)> {
        let mut outcomes = Vec::new();
        while let Some((place, first)) = ready.first() {
            let (keys, lineage, witness) = (self.keys_of(ids[*place]), first.lineage.clone(), first.witness);
            // Leases granted a moment apart may know different witnesses: each is asked about its own.
            let (now, later): (Vec<_>, Vec<_>) = ready.into_iter().partition(|(place, granted)| {
                self.keys_of(ids[*place]).stream == keys.stream
                    && granted.lineage == lineage
                    && granted.witness == witness
            });
            ready = later;
            let leases: Vec<(&str, &Granted)> = now.iter().map(|(place, granted)| (ids[*place], granted)).collect();
            let brought = self.hydrate(keys, &leases).await;
            let ends = now.into_iter().zip(brought).map(async |((place, granted), brought)| {
                ended(granted.lease, &brought).await;
                (place, brought)
            });
            outcomes.extend(join_all(ends).await);
        }
        outcomes
    }

    /// The lease of a counter that is about to be asked for with this token.
    pub(super) fn lease(&self, id: &str, token: u64) -> Lease {
        let end = Call::new(Function::Release, [self.keys_of(id).lease(id)]).arg(token);
        Lease::new(&self.connector, end)
    }

    /// What PostgreSQL has of these counters, where that is better than nothing: while the flush catches up.
    pub(super) async fn stored(&self, ids: &[&str], why: Why) -> Vec<Count> {
        let unknown = || vec![Count::Unknown(why); ids.len()];
        let may_help = matches!(why, Why::CatchingUp | Why::ValkeyDown | Why::ValkeyRefuses);
        if !may_help || self.breaker.open().is_some() {
            return unknown();
        }
        // The stream says only whose ledger is asked about the witness, and there is none.
        let stream = &self.keys_of(ids.first().copied().unwrap_or_default()).stream;
        let read = async {
            let mut view = self.truth.view().await?;
            let standing = view.read(stream, ids, None).await?;
            view.end().await;
            Ok::<_, TruthError>(standing.values)
        };
        match tokio::time::timeout(self.options.lease, read).await {
            Ok(Ok(values)) => values.into_iter().map(Count::Stored).collect(),
            Ok(Err(error)) => {
                self.rest(error);
                unknown()
            }
            Err(_) => {
                self.rest(self.too_late());
                unknown()
            }
        }
    }

    /// Leaves PostgreSQL alone for a while.
    fn rest(&self, error: TruthError) -> Why {
        let why = self.failed(error.0);
        self.breaker.trip(self.options.breaker, why);
        why
    }

    fn too_late(&self) -> TruthError {
        TruthError::lost(format!("PostgreSQL did not answer within {:?}", self.options.lease))
    }

    async fn ask(&self, id: &str) -> Asked {
        if let Some(why) = self.breaker.open() {
            return Asked::Failed(why);
        }
        let (keys, token) = (self.keys_of(id), token());
        let of_counter = [&keys.counter(id), &keys.lease(id), &keys.stream, &keys.index, &keys.state];
        let call = Call::new(Function::Lease, of_counter).arg(id).arg(&keys.group);
        let lease = self.lease(id, token);
        let answer = self.send(call.arg(self.options.lease.as_millis()).arg(token)).await;
        let lease = lease.granted(answer.as_ref().is_ok_and(|answer| answer.status == Status::Miss));
        let answer = match answer {
            Ok(answer) => answer,
            // The slot is being moved: a moment later its keys are together again.
            Err(fault) if fault.code() == "TRYAGAIN" => return Asked::Busy,
            Err(fault) => return Asked::Failed(self.failed(fault)),
        };
        match (answer.status, lease) {
            (_, Some(lease)) => Granted::told(&answer, token, lease).map_or(Asked::Busy, Asked::Granted),
            (Status::Done, None) => answer.number(0).map_or(Asked::Failed(Why::ValkeyDown), Asked::Present),
            (Status::Busy, None) => Asked::Busy,
            (_, None) => Asked::Failed(Why::CatchingUp),
        }
    }

    async fn send(&self, call: Call) -> Result<Answer, Fault> {
        Ok(self.connector.send(call).await?)
    }

    async fn wait_until_ready(&self, id: &str, granted: &Granted, until: Instant) -> Result<(), Why> {
        let keys = self.keys_of(id);
        let mut is_ready = granted.is_ready;
        while !is_ready {
            let call = Call::new(Function::Ready, [&keys.lease(id), &keys.stream, &keys.state]);
            let call = call.arg(granted.token).arg(&keys.group).arg(self.options.lease.as_millis());
            let status = match self.send(call).await {
                Ok(answer) => answer.status,
                Err(fault) if fault.code() == "TRYAGAIN" => Status::Busy,
                Err(fault) => return Err(self.failed(fault)),
            };
            match status {
                Status::Done => is_ready = true,
                Status::Busy if Instant::now() < until => look_again().await,
                Status::Closed | Status::Busy => return Err(Why::CatchingUp),
                _ => return Err(Why::Busy),
            }
        }
        Ok(())
    }

    /// Brings counters of one shard, whose leases know the same PostgreSQL and the same witness, from one snapshot.
    async fn hydrate(&self, keys: &ShardKeys, leases: &[(&str, &Granted)]) -> Vec<Result<i64, Why>> {
        let all = |why: Why| vec![Err(why); leases.len()];
        if let Some(why) = self.breaker.open() {
            return all(why);
        }
        let Some((_, first)) = leases.first() else { return Vec::new() };
        let ids: Vec<&str> = leases.iter().map(|(id, _)| *id).collect();
        let work = async {
            let mut view = self.truth.view().await?;
            let standing = view.read(&keys.stream, &ids, first.witness).await?;
            if lineage_of(&standing.lineage, self.pipeline.shards) != first.lineage || !standing.has_witness {
                view.end().await;
                return Ok(all(Why::OtherPostgres));
            }
            let firsts = leases
                .iter()
                .zip(&standing.values)
                .map(|((id, granted), value)| self.send(self.install(keys, id, granted, *value, -1)));
            let mut outcomes = Vec::new();
            for (((id, granted), value), answer) in leases.iter().zip(&standing.values).zip(join_all(firsts).await) {
                outcomes.push(match answer {
                    Ok(answer) if answer.status == Status::Judge => {
                        self.judge(keys, &mut view, (id, granted), *value, &answer).await?
                    }
                    answer => self.installed(answer),
                });
            }
            view.end().await;
            Ok::<_, TruthError>(outcomes)
        };
        // Beyond that the lease has run out.
        match tokio::time::timeout(self.options.lease, work).await {
            Ok(Ok(outcomes)) => outcomes,
            Ok(Err(error)) => all(self.rest(error)),
            Err(_) => all(self.rest(self.too_late())),
        }
    }

    /// Puts a value in place with the noted increments that its snapshot does not hold.
    async fn judge<V: View>(
        &self,
        keys: &ShardKeys,
        view: &mut V,
        (id, granted): (&str, &Granted),
        value: i64,
        answer: &Answer,
    ) -> Result<Result<i64, Why>, TruthError> {
        let Some(notes) = answer.text(0).and_then(notes) else { return Ok(Err(Why::ValkeyDown)) };
        let entries: Vec<EntryId> = notes.iter().map(|(entry, _)| *entry).collect();
        let held = view.holds(&keys.stream, &entries).await?;
        let lacking = notes.iter().zip(&held).filter(|(_, held)| !**held);
        let base = lacking.map(|((_, amount), _)| *amount).try_fold(value, i64::checked_add);
        // No counter of 64 bits holds it.
        let Some(base) = base else { return Ok(Err(Why::Busy)) };
        Ok(self.installed(self.send(self.install(keys, id, granted, base, notes.len() as i64)).await))
    }

    fn installed(&self, answer: Result<Answer, Fault>) -> Result<i64, Why> {
        let answer = answer.map_err(|fault| self.failed(fault))?;
        match answer.status {
            Status::Done => answer.number(0).ok_or(Why::ValkeyDown),
            Status::Closed => Err(Why::CatchingUp),
            _ => Err(Why::Busy),
        }
    }

    fn install(&self, keys: &ShardKeys, id: &str, granted: &Granted, base: i64, judged: i64) -> Call {
        let of_counter = [&keys.counter(id), &keys.lease(id), &keys.stream, &keys.index, &keys.state];
        let jitter = 1.0 + share(self.options.jitter) * rand::random_range(-1.0..=1.0);
        let ttl_ms = self.options.ttl.mul_f64(jitter).as_millis().max(1);
        let call = Call::new(Function::Install, of_counter).arg(id).arg(granted.token).arg(base);
        call.arg(judged).arg(ttl_ms).arg(&keys.group)
    }
}

/// A lease on a counter whose value is in place is gone; any other one is given back.
async fn ended(lease: Lease, brought: &Result<i64, Why>) {
    match brought {
        Ok(_) => lease.over(),
        Err(_) => lease.give_back().await,
    }
}

/// The notes of a lease: `entry amount entry amount …`.
fn notes(text: &str) -> Option<Vec<(EntryId, i64)>> {
    let words: Vec<&str> = text.split(' ').collect();
    words.as_chunks::<2>().0.iter().map(|[entry, amount]| Some((entry.parse().ok()?, amount.parse().ok()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_entries_with_their_amounts() {
        let entry = |ms| EntryId { ms, seq: 0 };
        assert_eq!(notes("1-0 5 2-0 -7"), Some(vec![(entry(1), 5), (entry(2), -7)]));
        assert_eq!(notes("1-0 x"), None);
    }

    #[test]
    fn a_breaker_is_open_for_a_while() {
        let breaker = Breaker::default();
        assert_eq!(breaker.open(), None);
        breaker.trip(Duration::from_secs(60), Why::PostgresRefuses);
        assert_eq!(breaker.open(), Some(Why::PostgresRefuses));
        breaker.trip(Duration::ZERO, Why::PostgresDown);
        assert_eq!(breaker.open(), None);
    }
}
