//! Reading: batches are filled from the streams that are read alone.
//!
//! Takes rounds, each of which names streams; gives batches within their limits. An answer that does not fit into a batch goes on in the next one.

use std::ops::{ControlFlow, RangeInclusive};
use std::time::{Duration, Instant};

use tokio::time::sleep_until;

use super::{Holder, SHORT_WAIT, Standing};
use crate::flow::batch::{Batch, Filling, Origin};
use crate::flow::read::{self, put};
use crate::flow::rounds::{Room, Round};
use crate::flow::session::Session;
use crate::retry::Fault;
use crate::shutdown::Stop;
use crate::telemetry::trace::Trace;
use crate::valkey::{Arrived, Command, Progress};

/// How many entries of one stream one read asks for, in reads of the usual size: the next read can be sent only when the last id of this one is known.
/// The further away the server is, the more: but it answers nobody else meanwhile.
const READS_AT_ONCE: RangeInclusive<usize> = 8..=32;
/// What an entry takes the server to read, about.
const ENTRY_TAKES: Duration = Duration::from_nanos(250);
/// How many entries one read may bring in all, in batches.
const BATCHES_IN_A_READ: usize = 4;
/// How long a read waits for entries, for each stream that it names, at the least: what it costs a server to begin to wait and to end it grows with
/// them. It ends at once where a lease changes.
const WAIT_FOR_EACH: Duration = Duration::from_micros(200);

/// A read whose answer has not come whole.
#[derive(Debug)]
pub(super) struct Asked {
    round: Round,
    /// Which of the round's streams the entries are of that come now.
    at: usize,
    has_begun: bool,
    /// What has come of each stream, by its lane.
    got: Vec<(usize, usize)>,
}

impl Holder {
    /// Waits for entries, then takes what there is, up to the limits of a batch.
    pub(super) async fn fill(
        &mut self,
        session: &mut Session,
        asked: &mut Option<Asked>,
        stop: &Stop,
    ) -> Result<Option<Batch>, Fault> {
        let (generation, trace) = (session.link.generation().clone(), Trace::of_batch("read"));
        let origin = Origin { generation, consumer: session.consumer.clone(), trace: trace.clone() };
        let mut filling = Filling::new(origin, self.setup.limits.max_entry_bytes);
        filling.make_room(self.last.0, self.last.1);
        let filled = loop {
            if asked.is_none() {
                let now = Instant::now();
                self.rounds.hear(self.news.take());
                if let (true, Some(at)) = (filling.is_empty(), self.rounds.idle_until(now)) {
                    self.wait_for_news(at, stop).await;
                    break Ok(());
                }
                let Some(room) = self.room(&filling) else { break Ok(()) };
                let Some(round) = self.rounds.next(room, !filling.is_empty(), now) else { break Ok(()) };
                if round.waits && !self.may_wait(stop).await {
                    break Ok(());
                }
                session.wire.send(&self.read(&round));
                *asked = Some(Asked { round, at: 0, has_begun: false, got: Vec::new() });
            }
            let received = self.receive(session, asked, &mut filling, stop).await;
            // The wait for the first entries is none of its work.
            trace.begins();
            match received {
                // It has waited, and nothing came.
                Ok(Progress::Whole) if filling.is_empty() => break Ok(()),
                Ok(Progress::Whole) => {}
                Ok(Progress::Paused) => break Ok(()),
                Err(fault) => break Err(fault),
            }
        };
        // What was read before a fault is good, and the next call meets the fault again.
        if let Err(fault) = filled {
            *asked = None;
            self.rounds.over(Vec::new());
            self.look_at = Instant::now();
            if filling.is_empty() {
                return Err(fault);
            }
        }
        self.last = (filling.len(), filling.bytes());
        Ok((!filling.is_empty()).then(|| filling.seal(false)))
    }

    /// How much more a batch has room for; none if it is full.
    fn room(&self, filling: &Filling) -> Option<Room> {
        let limits = &self.setup.limits;
        let by_bytes = limits.max_bytes.saturating_sub(filling.bytes()) / self.bytes_per_entry.max(1);
        let entries = limits.max_entries.saturating_sub(filling.len()).min(by_bytes);
        let of_one = worth_asking(self.away.unwrap_or_default(), limits.read_count).min(limits.max_entries);
        let of_all = (BATCHES_IN_A_READ * limits.max_bytes / self.bytes_per_entry.max(1))
            .min(BATCHES_IN_A_READ * limits.max_entries);
        // A batch ends with a piece that is worth its way; its first entry always finds room.
        let is_worth_it = filling.is_empty() || entries > of_one / 4;
        is_worth_it.then_some(Room { entries: entries.max(1), worth: limits.read_count, of_one, of_all })
    }

    /// Waits until a read that waits may be sent. False: something else is to be done first.
    async fn may_wait(&self, stop: &Stop) -> bool {
        let at = self.rounds.may_wait_at(Instant::now());
        tokio::select! {
            biased;
            () = stop.asked() => false,
            () = sleep_until(at.into()) => true,
        }
    }

    /// Waits until something is heard of, or until what was heard of may be read; no longer than a read would wait.
    async fn wait_for_news(&mut self, at: Instant, stop: &Stop) {
        let until = at.min(Instant::now() + self.wait());
        let has_news = self.rounds.has_news();
        tokio::select! {
            () = stop.asked() => {}
            () = sleep_until(until.into()) => {}
            () = self.leases.changed.notified() => self.look_at = Instant::now(),
            () = self.news.rung(), if !has_news => {}
        }
    }

    /// The read of a round.
    fn read(&self, round: &Round) -> Command {
        let streams = round.streams.iter().filter_map(|lane| match &self.streams[*lane] {
            Standing::Alone(_, after) => Some((&*self.leases.all[*lane].claim.stream, *after)),
            // A round names only what is read alone.
            _ => None,
        });
        read::behind(&streams.collect::<Vec<_>>(), round.count, round.waits.then(|| self.wait()))
    }

    pub(super) fn wait(&self) -> Duration {
        let until = self.look_at.saturating_duration_since(Instant::now());
        self.block().min(until.max(SHORT_WAIT))
    }

    /// How long a read waits at the most.
    pub(super) fn block(&self) -> Duration {
        self.setup.block().max(WAIT_FOR_EACH * self.streams.len() as u32)
    }

    /// Receives what answers the read under way, as far as the batch has room for it.
    async fn receive(
        &mut self,
        session: &mut Session,
        asked: &mut Option<Asked>,
        filling: &mut Filling,
        stop: &Stop,
    ) -> Result<Progress, Fault> {
        let Some(read) = asked else { return Ok(Progress::Whole) };
        let block = if read.round.waits { self.block() } else { Duration::ZERO };
        let (had, weighed, limits) = (filling.len(), filling.bytes(), self.setup.limits);
        if read.has_begun {
            filling.begin_lane(read.round.streams[read.at]);
        }
        let (link, wire_id) = (session.link.clone(), session.wire_id);
        let (leases, streams) = (&self.leases, &mut self.streams);
        let received = {
            let mut receiving = std::pin::pin!(session.wire.run_of_many(block, |arrived| {
                match arrived {
                    Arrived::Stream(name) => {
                        let names = |lane: &usize| leases.all[*lane].claim.stream.as_bytes() == name;
                        let from = if read.has_begun { read.at + 1 } else { 0 };
                        let Some(further) = read.round.streams[from..].iter().position(names) else {
                            return ControlFlow::Break(());
                        };
                        (read.at, read.has_begun) = (from + further, true);
                        let lane = read.round.streams[read.at];
                        read.got.push((lane, 0));
                        filling.begin_lane(lane);
                    }
                    Arrived::Entry(delivered) => {
                        let id = delivered.id();
                        put(delivered, filling);
                        if let Some((lane, got)) = read.got.last_mut() {
                            *got += 1;
                            if let Standing::Alone(_, after) = &mut streams[*lane] {
                                *after = id;
                            }
                        }
                    }
                }
                let is_full = filling.bytes() >= limits.max_bytes || filling.len() >= limits.max_entries;
                if is_full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            }));
            let is_interrupted = async {
                tokio::select! {
                    () = stop.asked() => {}
                    () = leases.changed.notified() => {}
                }
            };
            tokio::select! {
                biased;
                received = &mut receiving => received,
                () = is_interrupted, if !block.is_zero() => {
                    // A wait is ended by unblocking it, never by dropping it.
                    if let Some(id) = wire_id {
                        link.unblock(id).await;
                    }
                    self.look_at = Instant::now();
                    receiving.await
                }
            }
        };
        filling.close_run();
        if let Some(average) = (filling.bytes() - weighed).checked_div(filling.len() - had) {
            self.bytes_per_entry = average.max(1);
        }
        if matches!(received, Ok(Progress::Whole)) {
            self.rounds.answered(&read.round, &read.got, Instant::now());
            *asked = None;
        }
        received
    }
}

/// So many entries take the server as long as its answer is under way; reads have this size as a rule.
fn worth_asking(away: Duration, usual: usize) -> usize {
    let entries = usize::try_from(away.as_nanos() / ENTRY_TAKES.as_nanos()).unwrap_or(usize::MAX);
    entries.clamp(READS_AT_ONCE.start() * usual, READS_AT_ONCE.end() * usual)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_further_away_the_server_is_the_more_one_read_asks_for() {
        let entries = [0, 1, 2, 5, 20, 3_600_000].map(|ms| worth_asking(Duration::from_millis(ms), 1_000));
        assert_eq!(entries, [8_000, 8_000, 8_000, 20_000, 32_000, 32_000]);
    }
}
