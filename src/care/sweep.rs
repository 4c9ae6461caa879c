//! Sweep: counters whose deltas are all settled become clean: from then on Valkey may evict them.
//!
//! One sweeper a managed shard in each process; several of them do each other no harm. It loads the function library, says which PostgreSQL the shard is
//! flushed into, and then, whenever something was acknowledged, offers the dirty counters to Valkey, which looks at the group's frontier itself. It needs
//! nothing from the worker that flushed them, so one that died in between leaves nothing behind. Where all values are in doubt it drops them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::idle;
use crate::client::postgres;
use crate::flow::flush::Lane;
use crate::functions::gate::{self, Opened, Standing, Word};
use crate::functions::{self, Call, Function, Status};
use crate::model::entry::EntryId;
use crate::model::pipeline::ShardKeys;
use crate::postgres::Database;
use crate::retry::{Fault, Incident, Verdict};
use crate::shutdown::Stop;
use crate::telemetry::contract::{ManagedState, Metrics};
use crate::valkey::{self, Command, Link, unexpected};

/// The name of its connections.
const NAME: &str = "tidegate:sweep";
/// Without a word of the workers it looks this often: another process may have flushed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What waits for an operator is looked at this often, and told again this often.
const WAIT_FOR_OPERATOR: Duration = Duration::from_secs(2);
const REMIND_AFTER: Duration = Duration::from_secs(30);
/// By which share the TTLs of counters that become clean together differ.
const JITTER: f64 = 0.1;
/// How often lanes of producers are looked at.
const FORGET_LANES_EVERY: Duration = Duration::from_secs(3600);

/// What a sweeper is made of.
#[derive(Debug, Clone)]
pub struct SweeperSetup {
    /// Where Valkey is.
    pub valkey: valkey::Endpoint,
    /// PostgreSQL.
    pub database: Database,
    /// The shard.
    pub lane: Lane,
    /// How many shards its pipeline has.
    pub shards: u16,
    /// How long a clean counter stays.
    pub ttl: Duration,
    /// How often it sweeps at the most.
    pub every: Duration,
    /// How many counters one call settles.
    pub batch: usize,
    /// Where it tells how its shard stands.
    pub standings: Arc<Standings>,
    /// Which one of them its shard's is.
    pub slot: usize,
    /// Where it counts.
    pub metrics: Arc<Metrics>,
}

/// How the managed shards of one flow stand, told together: they share their metrics.
#[derive(Debug)]
pub struct Standings {
    all: Mutex<Vec<ManagedState>>,
    metrics: Arc<Metrics>,
}

impl Standings {
    /// Of so many shards, of none of which anything is known.
    pub fn of(shards: usize, metrics: Arc<Metrics>) -> Standings {
        Standings { all: Mutex::new(vec![ManagedState::default(); shards]), metrics }
    }

    /// One shard stands like this now.
    fn tell(&self, slot: usize, state: ManagedState) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all[slot] = state;
        self.metrics.managed(together(&all));
    }
}

/// Shards of which nothing is known count for nothing; they are open together if each one is.
fn together(all: &[ManagedState]) -> ManagedState {
    ManagedState {
        is_open: all.iter().filter_map(|state| state.is_open).min(),
        dirty: all.iter().filter_map(|state| state.dirty).reduce(u64::saturating_add),
    }
}

/// See the module.
#[derive(Debug)]
pub struct Sweeper {
    setup: SweeperSetup,
    keys: ShardKeys,
    incident: Incident,
    /// When it was told last that an operator is waited for.
    told: Option<Instant>,
    /// Up to where everything was swept.
    swept: Option<EntryId>,
    lanes_looked_at: Option<Instant>,
}

/// Whether the shard could be opened.
enum Ready {
    Yes,
    /// An operator must act first.
    No,
}

impl Sweeper {
    /// For one shard.
    pub fn new(setup: SweeperSetup) -> Sweeper {
        let keys = setup.lane.pipeline().keys_of(0);
        Sweeper { setup, keys, incident: Incident::default(), told: None, swept: None, lanes_looked_at: None }
    }

    /// Sweeps until it is told to stop.
    pub async fn run(mut self, stop: Stop) {
        while !stop.is_asked() {
            let Err(fault) = self.session(&stop).await else { return };
            self.tell(ManagedState { is_open: None, dirty: None });
            let response = self.incident.met(&fault, Instant::now());
            if self.incident.is_news(response.judgement.verdict, Instant::now()) {
                let (pipeline, stream) = (&self.setup.lane.pipeline().name, &self.keys.stream);
                let advice = response.judgement.advice;
                match response.judgement.verdict {
                    Verdict::Halt => {
                        error!(%pipeline, %stream, %fault, advice, "counters are not made clean until this is corrected")
                    }
                    _ => info!(%pipeline, %stream, %fault, advice, "counters are not made clean for now"),
                }
            }
            tokio::select! {
                () = tokio::time::sleep(response.wait) => {}
                () = stop.asked() => {}
            }
        }
    }

    /// One link's life. Another link may lead to another server: the library, and the shard's state, are looked at first.
    async fn session(&mut self, stop: &Stop) -> Result<(), Fault> {
        let link = Link::open(&self.setup.valkey, NAME).await?;
        functions::load(link.commands()).await?;
        self.swept = None;
        while let Ready::No = self.open(&link).await? {
            self.tell(ManagedState { is_open: Some(false), dirty: None });
            self.incident.over(Instant::now());
            tokio::select! {
                () = tokio::time::sleep(WAIT_FOR_OPERATOR) => {}
                () = stop.asked() => return Ok(()),
            }
        }
        self.told = None;
        let lane = self.setup.lane.clone();
        loop {
            let standing = gate::standing(link.commands(), &self.keys).await?;
            if standing.lineage.is_none() {
                return Err(Fault::ValkeyLost("the shard's state is gone (FLUSHALL, DEL?): it is opened again".into()));
            }
            self.incident.over(Instant::now());
            self.sweep(&link, &standing).await?;
            self.forget_lanes(&link).await?;
            tokio::select! {
                () = lane.acknowledged().notified() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = stop.asked() => return Ok(()),
            }
            // Many acknowledgements are swept up at once.
            tokio::select! {
                () = tokio::time::sleep(self.setup.every) => {}
                () = stop.asked() => return Ok(()),
            }
        }
    }

    /// Says which PostgreSQL the shard is flushed into.
    async fn open(&mut self, link: &Link) -> Result<Ready, Fault> {
        let shards = self.setup.shards;
        let lineage = self.setup.database.run(async |c| postgres::lineage(c, shards).await).await?;
        let pipeline = self.setup.lane.pipeline().name.clone();
        match gate::open(link.commands(), &self.keys, &lineage, Word::Nobodys).await? {
            Opened::Managed => Ok(Ready::Yes),
            // After FLUSHALL, or with a new library on counters that were never used: nothing of anybody's is dropped.
            Opened::Unadopted if !gate::has_plain_values(link.commands(), &self.keys).await? => {
                gate::open(link.commands(), &self.keys, &lineage, Word::Adopt).await?;
                Ok(Ready::Yes)
            }
            Opened::Unadopted => {
                self.tell_operator(|stream| {
                    error!(%pipeline, %stream, "the counters of this stream were not managed until now: nothing is brought back from PostgreSQL until you run `tidegate adopt`, which drops the values that Valkey has of them");
                });
                Ok(Ready::No)
            }
            Opened::Other(before) if of_shards(&before) != of_shards(&lineage) => {
                self.tell_operator(|stream| {
                    error!(%pipeline, %stream, %before, now = %lineage, "the number of shards was changed: nothing is brought back from PostgreSQL until the streams are settled and you run `tidegate adopt`");
                });
                Ok(Ready::No)
            }
            Opened::Other(before) => {
                self.tell_operator(|stream| {
                    error!(%pipeline, %stream, %before, now = %lineage, "this is another PostgreSQL than before (restored, or a standby that was promoted): nothing is brought back from it until you run `tidegate replay`, or, if it lost nothing, `tidegate adopt --accept-postgres`");
                });
                Ok(Ready::No)
            }
        }
    }

    fn tell(&self, state: ManagedState) {
        self.setup.standings.tell(self.setup.slot, state);
    }

    fn tell_operator(&mut self, tell: impl FnOnce(&str)) {
        if self.told.is_none_or(|told| told.elapsed() >= REMIND_AFTER) {
            self.told = Some(Instant::now());
            tell(&self.keys.stream);
        }
    }

    async fn sweep(&mut self, link: &Link, standing: &Standing) -> Result<(), Fault> {
        self.tell(ManagedState { is_open: Some(standing.is_open), dirty: Some(standing.dirty) });
        if let Some(why) = &standing.closed {
            let dropped = gate::drop_all(link, &self.keys, why).await?;
            let (pipeline, stream) = (&self.setup.lane.pipeline().name, &self.keys.stream);
            warn!(event = "values_dropped", %pipeline, %stream, %why, values = dropped, "all values of the shard's counters were dropped; they are brought back from PostgreSQL when they are needed");
            self.setup.metrics.values_dropped(dropped);
            self.swept = None;
            self.setup.lane.acknowledged().notify_one();
            return Ok(());
        }
        if !standing.is_open || standing.frontier.is_none() || standing.frontier == self.swept {
            return Ok(());
        }
        let mut cursor = "0".to_owned();
        let mut is_complete = true;
        loop {
            let (next, ids) = self.dirty(link, &cursor).await?;
            for ids in ids.chunks(self.setup.batch) {
                is_complete &= self.settle(link, ids).await?;
            }
            if ids.is_empty() && next == "0" && cursor == "0" {
                // How far the shard is settled is noted even where nothing is dirty.
                is_complete &= self.settle(link, &[]).await?;
            }
            cursor = next;
            if cursor == "0" {
                break;
            }
        }
        if is_complete {
            self.swept = standing.frontier;
        }
        Ok(())
    }

    /// A page of the dirty counters.
    async fn dirty(&self, link: &Link, cursor: &str) -> Result<(String, Vec<String>), Fault> {
        let command = Command::new("HSCAN").arg(&self.keys.index).arg(cursor).arg("COUNT").arg(self.setup.batch);
        let mut parts = link.commands().call(command).await?.into_array().ok_or_else(|| unexpected("HSCAN"))?;
        let (next, pairs) = parts.next().zip(parts.next()).ok_or_else(|| unexpected("HSCAN"))?;
        let next = next.as_text().ok_or_else(|| unexpected("HSCAN"))?.to_owned();
        let text = |id: &[u8]| String::from_utf8(id.to_vec()).ok();
        Ok((next, pairs.strings().step_by(2).filter_map(text).collect()))
    }

    /// Offers counters to be made clean; whether the gate was open for it.
    async fn settle(&self, link: &Link, ids: &[String]) -> Result<bool, Fault> {
        let mut keys = vec![self.keys.stream.clone(), self.keys.index.clone(), self.keys.state.clone()];
        keys.extend(ids.iter().map(|id| self.keys.counter(id)));
        let call = Call::new(Function::Settle, keys).arg(&self.keys.group);
        let call = ids.iter().fold(call, |call, id| {
            let ttl = self.setup.ttl.mul_f64(1.0 + JITTER * rand::random_range(-1.0..=1.0));
            call.arg(id).arg(ttl.as_millis().max(1))
        });
        let answer = call.send(link.commands()).await?;
        self.setup.metrics.cleaned(answer.int(0).unwrap_or(0).unsigned_abs());
        Ok(answer.status == Status::Done)
    }

    /// Forgets the lanes of producers that are long gone.
    async fn forget_lanes(&mut self, link: &Link) -> Result<(), Fault> {
        if self.lanes_looked_at.is_some_and(|looked| looked.elapsed() < FORGET_LANES_EVERY) {
            return Ok(());
        }
        self.lanes_looked_at = Some(Instant::now());
        idle::look(link, &self.keys.state).await
    }
}

/// The number of shards that a lineage names.
fn of_shards(lineage: &str) -> Option<&str> {
    lineage.rsplit_once('/').map(|(_, shards)| shards)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_that_share_their_metrics_are_told_together() {
        let state = |is_open, dirty| ManagedState { is_open, dirty };
        let unknown = state(None, None);
        assert_eq!(together(&[unknown, unknown]), unknown);
        assert_eq!(
            together(&[state(Some(true), Some(3)), unknown, state(Some(true), Some(4))]),
            state(Some(true), Some(7))
        );
        assert_eq!(together(&[state(Some(true), Some(3)), state(Some(false), None)]), state(Some(false), Some(3)));
    }
}
