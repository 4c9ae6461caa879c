//! Cache: rows of any kind beside their table: read through, written through, and served while they are renewed.
//!
//! Takes an id and how to load the row; gives the row. Of all who want a row that is not there, in all processes, one loads it, by a lease; the others
//! wait for it. A cache that cannot be asked never breaks a read: the row is loaded. A read fails only where the row can neither be loaded nor be served
//! stale.
//!
//! A writer sets a *fence* before its COMMIT and lifts it behind: from the fence on the old row is gone and nobody puts one in place. So no read from the
//! cache that begins after a COMMIT is older than that, even if the writer dies in between: then the fence runs out, and the row is loaded. This holds
//! as long as the fence outlives the transaction; [`Cache::write`] renews it meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{join, join_all};

use super::codec::Stored;
use super::connector::Connector;
use super::counters::{look_again, token};
use super::flight::Flights;
use super::lease::Lease;
use super::stats::{CacheStats, Counts};
use super::ttl::{Age, LONGEST, Ttl, usable};
use crate::functions::{Answer, Call, Function, Status};
use crate::retry::Fault;
#[cfg(feature = "near")]
use crate::valkey::Connection;
use crate::valkey::{Command, Endpoint, Reply};

/// A fence is renewed this many times before it would run out.
const RENEWALS: u32 = 3;
/// How many keys one call invalidates or fences.
const PER_CALL: usize = 500;

/// How a cache behaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CacheOptions {
    /// How long rows live.
    pub ttl: Ttl,
    /// How long one reader may load before others try: longer than a load takes.
    pub lease: Duration,
    /// How long a fence stands when its writer is gone: longer than any transaction may last after that (`transaction_timeout`).
    pub fence: Duration,
    /// A row that is stored as more bytes than this is not cached.
    pub max_bytes: usize,
    /// What a writer does where no fence can be set.
    pub on_valkey_down: OnValkeyDown,
}

impl Default for CacheOptions {
    fn default() -> CacheOptions {
        CacheOptions {
            ttl: Ttl::of(Duration::from_secs(300)),
            lease: Duration::from_secs(5),
            fence: Duration::from_secs(30),
            max_bytes: 1 << 20,
            on_valkey_down: OnValkeyDown::Proceed,
        }
    }
}

/// What a writer does where no fence can be set, because Valkey is out of reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnValkeyDown {
    /// It writes all the same: what is cached may be old for up to its TTL.
    Proceed,
    /// It does not write.
    Refuse,
}

/// An error of the application: of its loader, or of its transaction.
pub type AppError = Box<dyn std::error::Error + Send + Sync>;

/// Why there is no row.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NotLoaded {
    /// The loader failed. It is shared by all who waited for it.
    #[error("{0}")]
    Loader(Arc<dyn std::error::Error + Send + Sync>),
}

/// Why a row was not written.
#[derive(Debug, thiserror::Error)]
pub enum NotWritten {
    /// No fence could be set, and the options say that nothing is written then.
    #[error("not written, for no fence can be set: {0}")]
    NoFence(Fault),
    /// The transaction failed.
    #[error("{0}")]
    Transaction(AppError),
}

/// Rows of one kind. Cheap to clone; all clones share one connection, in a cluster one to each primary.
#[derive(Debug)]
pub struct Cache<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Clone for Cache<T> {
    fn clone(&self) -> Cache<T> {
        Cache { shared: Arc::clone(&self.shared) }
    }
}

pub(super) type Row<T> = Option<Arc<T>>;

#[derive(Debug)]
struct Shared<T> {
    connector: Arc<Connector>,
    name: String,
    options: CacheOptions,
    flights: Flights<Result<Row<T>, NotLoaded>>,
    counts: Counts,
}

/// What Valkey has of a row.
#[derive(Debug)]
pub(super) enum Cached<T> {
    Row(
        Row<T>,
        Age,
        #[cfg_attr(not(feature = "near"), allow(dead_code, reason = "the near cache asks for it"))] Duration,
    ),
    Absent,
    /// Bytes that are no such row: another version's, say.
    Foreign,
    Unknown,
}

/// A value with any time to live may be loaded again.
const ANY: Duration = Duration::from_secs(10 * LONGEST.as_secs());

/// What asking for the leave to load comes to.
enum Leave {
    Granted(Granted),
    Busy,
    /// A writer is at work: the row is loaded and not put in place.
    Fenced,
    /// Valkey cannot be asked.
    None,
    Present,
}

impl Leave {
    fn granted(self) -> Option<Granted> {
        match self {
            Leave::Granted(granted) => Some(granted),
            _ => None,
        }
    }
}

/// The leave to load a row, given back where whoever has it is dropped.
struct Granted {
    token: u64,
    lease: Lease,
}

impl<T: Stored + Send + Sync + 'static> Cache<T> {
    /// A cache whose keys are `cache:NAME:{ID}`: the braces keep a row and its lease in one slot of a cluster.
    ///
    /// It does not connect yet: an application starts without its cache.
    pub fn new(address: &Endpoint, name: &str, options: CacheOptions) -> Cache<T> {
        Cache {
            shared: Arc::new(Shared {
                connector: Arc::new(Connector::new(address, "tidegate-cache")),
                name: name.to_owned(),
                options: CacheOptions {
                    ttl: options.ttl.usable(),
                    lease: usable(options.lease),
                    fence: usable(options.fence),
                    ..options
                },
                flights: Flights::default(),
                counts: Counts::default(),
            }),
        }
    }

    /// Uses this connection from now on, until it is lost.
    #[cfg(feature = "near")]
    pub(super) async fn use_connection(&self, connection: &Arc<Connection>) {
        self.shared.connector.replace(connection).await;
    }

    /// How long its rows live, and how large they may be.
    pub fn options(&self) -> CacheOptions {
        self.shared.options
    }

    /// What it, and all its clones, have done so far.
    pub fn stats(&self) -> CacheStats {
        self.shared.counts.stats()
    }

    /// What the keys of its rows begin with.
    pub fn prefix(&self) -> String {
        format!("cache:{}:", self.shared.name)
    }

    /// The key of a row.
    pub fn key(&self, id: &str) -> String {
        format!("{}{{{id}}}", self.prefix())
    }

    /// The row, from the cache or by `load`; none if there is no such row. Where it nears its end, one caller loads it again before it returns.
    ///
    /// # Errors
    /// [`NotLoaded`].
    pub async fn get(
        &self,
        id: &str,
        load: impl AsyncFnOnce() -> Result<Option<T>, AppError>,
    ) -> Result<Option<Arc<T>>, NotLoaded> {
        let cached = self.look(id).await;
        self.get_beyond(id, cached, load).await
    }

    /// Goes on from what Valkey has.
    pub(super) async fn get_beyond(
        &self,
        id: &str,
        cached: Cached<T>,
        load: impl AsyncFnOnce() -> Result<Option<T>, AppError>,
    ) -> Result<Row<T>, NotLoaded> {
        let counts = &self.shared.counts;
        let below = self.reload_below(&cached);
        match cached {
            Cached::Row(row, Age::Fresh, _) => {
                counts.hits.add(1);
                Ok(row)
            }
            Cached::Row(row, Age::Early, _) => {
                counts.hits.add(1);
                match self.ask(id, self.early()).await {
                    // The others are served meanwhile; and so is this one, where the row cannot be loaded.
                    Leave::Granted(granted) => {
                        counts.early.add(1);
                        Ok(self.load_with(id, granted, load).await.0.unwrap_or(row))
                    }
                    _ => Ok(row),
                }
            }
            Cached::Row(row, Age::Stale, _) => {
                if let Leave::Granted(granted) = self.ask(id, below).await
                    && let (Ok(loaded), _) = self.load_with(id, granted, load).await
                {
                    counts.misses.add(1);
                    return Ok(loaded);
                }
                counts.stale.add(1);
                Ok(row)
            }
            Cached::Absent | Cached::Foreign | Cached::Unknown => self.beyond(id, &cached, load).await,
        }
    }

    /// The row that Valkey does not have: of all in this process who want it, one asks.
    async fn beyond(
        &self,
        id: &str,
        cached: &Cached<T>,
        load: impl AsyncFnOnce() -> Result<Option<T>, AppError>,
    ) -> Result<Row<T>, NotLoaded> {
        let Shared { flights, counts, .. } = &*self.shared;
        let count = if matches!(cached, Cached::Unknown) { &counts.bypassed } else { &counts.misses };
        count.add(1);
        let (below, mut leads) = (self.reload_below(cached), false);
        let work = async || {
            leads = true;
            self.fetch(id, below, load).await
        };
        // Behind somebody who takes longer than a lease nobody waits: neither in this process nor in another one.
        let row = flights.join(id, self.patience(), work).await;
        if !leads {
            counts.joined.add(1);
        }
        row
    }

    /// How long is waited for somebody else's load: a loader that died keeps its lease until it runs out.
    fn patience(&self) -> Duration {
        self.shared.options.lease * 5 / 4
    }

    /// A value with less time to live than this may be loaded again by who found it so.
    fn reload_below(&self, cached: &Cached<T>) -> Duration {
        if matches!(cached, Cached::Foreign) { ANY } else { self.shared.options.ttl.stale_for }
    }

    /// As [`Cache::get`], and the caller is never the one who waits where a row nears its end: `load` then runs as a task of its own.
    ///
    /// # Errors
    /// [`NotLoaded`].
    pub async fn get_revalidating<F>(
        &self,
        id: &str,
        load: impl FnOnce() -> F + Send + 'static,
    ) -> Result<Option<Arc<T>>, NotLoaded>
    where
        F: Future<Output = Result<Option<T>, AppError>> + Send + 'static,
    {
        let counts = &self.shared.counts;
        let (row, age) = match self.look(id).await {
            Cached::Row(row, age, _) => (row, age),
            cached => return self.beyond(id, &cached, async || load().await).await,
        };
        let below = match age {
            Age::Fresh => Duration::ZERO,
            Age::Early => self.early(),
            Age::Stale => self.shared.options.ttl.stale_for,
        };
        let count = if age == Age::Stale { &counts.stale } else { &counts.hits };
        count.add(1);
        if age != Age::Fresh
            && let Leave::Granted(granted) = self.ask(id, below).await
        {
            counts.early.add(usize::from(age == Age::Early));
            let (cache, id) = (self.clone(), id.to_owned());
            // Whether it succeeds is seen by the next reader.
            tokio::spawn(async move { cache.load_with(&id, granted, async || load().await).await });
        }
        Ok(row)
    }

    /// The rows of many, in their order. Those that are not there are loaded in one go, by ids: `load` gives a row, or none, for each, in their order.
    /// Where it fails, rows past their end are served if there is one for each.
    ///
    /// # Errors
    /// [`NotLoaded`].
    pub async fn get_many(
        &self,
        ids: &[&str],
        load: impl AsyncFnOnce(&[&str]) -> Result<Vec<Option<T>>, AppError>,
    ) -> Result<Vec<Option<Arc<T>>>, NotLoaded> {
        let counts = &self.shared.counts;
        let looked = join_all(ids.iter().map(|id| self.look(id))).await;
        let (mut rows, mut stale): (Vec<Row<T>>, Vec<Option<Row<T>>>) = (Vec::new(), Vec::new());
        let (mut wanted, mut belows): (Vec<usize>, Vec<Duration>) = (Vec::new(), Vec::new());
        let mut unknown = 0;
        for (place, cached) in looked.into_iter().enumerate() {
            match cached {
                Cached::Row(row, Age::Fresh | Age::Early, _) => rows.push(row),
                cached => {
                    unknown += usize::from(matches!(cached, Cached::Unknown));
                    wanted.push(place);
                    belows.push(self.reload_below(&cached));
                    rows.push(None);
                    stale.push(match cached {
                        Cached::Row(row, ..) => Some(row),
                        _ => None,
                    });
                }
            }
        }
        counts.hits.add(ids.len() - wanted.len());
        if wanted.is_empty() {
            return Ok(rows);
        }
        let leaves = join_all(wanted.iter().zip(belows).map(|(&place, below)| self.ask(ids[place], below))).await;
        let names: Vec<&str> = wanted.iter().map(|&place| ids[place]).collect();
        counts.loads.add(names.len());
        let loaded = load(&names).await.and_then(|loaded| match loaded.len() == names.len() {
            true => Ok(loaded),
            false => Err(format!("the loader gave {} rows for {} ids", loaded.len(), names.len()).into()),
        });
        counts.bypassed.add(unknown);
        let loaded = match loaded {
            Ok(loaded) => loaded,
            Err(error) => {
                counts.failed.add(names.len());
                let granted = leaves.into_iter().filter_map(Leave::granted);
                join_all(granted.map(|granted| granted.lease.give_back())).await;
                let Some(stale) = stale.into_iter().collect::<Option<Vec<Row<T>>>>() else {
                    counts.misses.add(names.len() - unknown);
                    return Err(NotLoaded::Loader(error.into()));
                };
                counts.stale.add(names.len());
                wanted.into_iter().zip(stale).for_each(|(place, row)| rows[place] = row);
                return Ok(rows);
            }
        };
        counts.misses.add(names.len() - unknown);
        let loaded: Vec<Row<T>> = loaded.into_iter().map(|row| row.map(Arc::new)).collect();
        let stored = names.iter().zip(leaves).zip(&loaded).map(async |((id, leave), row)| match leave {
            Leave::Granted(granted) => drop(self.store(id, granted, row).await),
            _ => counts.unstored.add(1),
        });
        join_all(stored).await;
        wanted.into_iter().zip(loaded).for_each(|(place, row)| rows[place] = row);
        Ok(rows)
    }

    /// Writes a row: `write` does the whole transaction, COMMIT included, and gives its result and the new row, where it knows it (`None` inside: the
    /// row was deleted).
    ///
    /// # Errors
    /// [`NotWritten`].
    pub async fn write<R>(
        &self,
        id: &str,
        write: impl AsyncFnOnce() -> Result<(R, Option<Option<T>>), AppError>,
    ) -> Result<R, NotWritten> {
        let fence = self.fence(&[id]).await?;
        let outcome = {
            let mut writing = std::pin::pin!(write());
            let every = usable(self.shared.options.fence / RENEWALS);
            loop {
                tokio::select! {
                    outcome = &mut writing => break outcome,
                    () = tokio::time::sleep(every) => fence.renew().await,
                }
            }
        };
        match outcome {
            Ok((result, row)) => {
                fence.lift(row.map(|row| row.map(Arc::new))).await;
                Ok(result)
            }
            Err(error) => {
                fence.lift(None).await;
                Err(NotWritten::Transaction(error))
            }
        }
    }

    /// Sets a fence before the caller's own transaction. It runs out after `options.fence` unless it is renewed.
    ///
    /// # Errors
    /// [`NotWritten::NoFence`], where the options say so.
    pub async fn fence(&self, ids: &[&str]) -> Result<Fence<T>, NotWritten> {
        let fence = Fence {
            cache: self.clone(),
            ids: ids.iter().map(|id| (*id).to_owned()).collect(),
            token: format!("{:016x}", token()),
        };
        ids.iter().for_each(|id| self.shared.flights.forget(id));
        match (fence.set().await, self.shared.options.on_valkey_down) {
            (Err(fault), OnValkeyDown::Refuse) => Err(NotWritten::NoFence(fault)),
            _ => Ok(fence),
        }
    }

    /// Drops rows, and keeps readers that are loading them from putting theirs in place. Gives how many there were.
    ///
    /// # Errors
    /// What Valkey says.
    pub async fn invalidate(&self, ids: &[&str]) -> Result<u64, Fault> {
        let mut count = 0;
        for ids in ids.chunks(PER_CALL) {
            ids.iter().for_each(|id| self.shared.flights.forget(id));
            // In a cluster each row has a slot of its own, so each has a call of its own; they are pipelined.
            let calls = ids.iter().map(|id| self.call(Call::new(Function::Invalidate, [self.key(id), self.lease(id)])));
            for answer in join_all(calls).await {
                count += answer?.int(0).unwrap_or(0).unsigned_abs();
            }
        }
        Ok(count)
    }

    fn lease(&self, id: &str) -> String {
        format!("tidegate:load:{}:{{{id}}}", self.shared.name)
    }

    fn early(&self) -> Duration {
        self.shared.options.ttl.stale_for + self.shared.options.ttl.early
    }

    /// What Valkey has.
    async fn look(&self, id: &str) -> Cached<T> {
        let (key, connector) = (self.key(id), &self.shared.connector);
        let (get, left) = self.questions(&key);
        let (value, left) = join(connector.call(&key, get), connector.call(&key, left)).await;
        self.cached(value.map_err(Fault::from), left.map_err(Fault::from))
    }

    /// The same over this connection.
    #[cfg(feature = "near")]
    pub(super) async fn look_on(&self, connection: &Connection, id: &str) -> Cached<T> {
        let (get, left) = self.questions(&self.key(id));
        let (value, left) = join(connection.call(get), connection.call(left)).await;
        self.cached(value, left)
    }

    /// What tells a row's value, and how long it has to live.
    fn questions(&self, key: &str) -> (Command, Command) {
        let ttl = self.shared.options.ttl;
        let get = if ttl.sliding {
            Command::new("GETEX").arg(key).arg("PX").arg(ttl.fresh.as_millis().max(1))
        } else {
            Command::new("GET").arg(key)
        };
        (get, Command::new("PTTL").arg(key))
    }

    /// What GET and PTTL have answered.
    pub(super) fn cached(&self, value: Result<Reply, Fault>, left: Result<Reply, Fault>) -> Cached<T> {
        let ttl = self.shared.options.ttl;
        let (Ok(value), Ok(left)) = (value, left) else { return Cached::Unknown };
        let Some(bytes) = value.as_bytes() else { return Cached::Absent };
        // -1: somebody stored it without an end.
        let left = left.as_int().and_then(|ms| u64::try_from(ms).ok()).map_or(Duration::MAX, Duration::from_millis);
        let age = ttl.age(left, bytes.is_empty());
        match read::<T>(bytes) {
            Some(row) => Cached::Row(row, age, left),
            None => Cached::Foreign,
        }
    }

    /// Loads the row if this caller may, or waits for whoever does. With it, until when it was the row in the cache.
    async fn fetch(
        &self,
        id: &str,
        below: Duration,
        load: impl AsyncFnOnce() -> Result<Option<T>, AppError>,
    ) -> (Result<Row<T>, NotLoaded>, Option<Instant>) {
        let (until, mut waits) = (Instant::now() + self.patience(), false);
        loop {
            match self.ask(id, below).await {
                Leave::Granted(granted) => return self.load_with(id, granted, load).await,
                Leave::Fenced | Leave::None => return (self.load_apart(load).await, None),
                Leave::Busy => {
                    self.shared.counts.waited.add(usize::from(!waits));
                    waits = true;
                    look_again().await;
                }
                Leave::Present => {}
            }
            let asked = Instant::now();
            if let Cached::Row(row, Age::Fresh | Age::Early, _) = self.look(id).await {
                return (Ok(row), Some(asked));
            }
            if Instant::now() >= until {
                return (self.load_apart(load).await, None);
            }
        }
    }

    async fn ask(&self, id: &str, early: Duration) -> Leave {
        let token = token();
        let call = Call::new(Function::Load, [self.key(id), self.lease(id)]).arg(token);
        let call = call.arg(self.shared.options.lease.as_millis()).arg(early.as_millis());
        let end = Call::new(Function::Unload, [self.lease(id)]).arg(token);
        let lease = Lease::new(&self.shared.connector, end);
        let status = self.call(call).await.map(|answer| answer.status);
        match (lease.granted(matches!(status, Ok(Status::Miss))), status) {
            (Some(lease), _) => Leave::Granted(Granted { token, lease }),
            (None, Ok(Status::Busy)) => Leave::Busy,
            (None, Ok(Status::Done)) => Leave::Present,
            (None, Ok(_)) => Leave::Fenced,
            (None, Err(_)) => Leave::None,
        }
    }

    async fn load_with(
        &self,
        id: &str,
        granted: Granted,
        load: impl AsyncFnOnce() -> Result<Option<T>, AppError>,
    ) -> (Result<Row<T>, NotLoaded>, Option<Instant>) {
        match self.load(load).await {
            Ok(row) => {
                let asked = Instant::now();
                let is_stored = self.store(id, granted, &row).await;
                (Ok(row), is_stored.then_some(asked))
            }
            Err(error) => {
                granted.lease.give_back().await;
                (Err(error), None)
            }
        }
    }

    /// Loads a row that is not put in place.
    async fn load_apart(&self, load: impl AsyncFnOnce() -> Result<Option<T>, AppError>) -> Result<Row<T>, NotLoaded> {
        let row = self.load(load).await?;
        self.shared.counts.unstored.add(1);
        Ok(row)
    }

    async fn load(&self, load: impl AsyncFnOnce() -> Result<Option<T>, AppError>) -> Result<Row<T>, NotLoaded> {
        self.shared.counts.loads.add(1);
        load().await.map(|row| row.map(Arc::new)).map_err(|error| {
            self.shared.counts.failed.add(1);
            NotLoaded::Loader(error.into())
        })
    }

    /// Puts a row in place; whether it is there now, and nobody has written it meanwhile.
    async fn store(&self, id: &str, granted: Granted, row: &Row<T>) -> bool {
        let is_stored = match self.storable(row) {
            None => {
                granted.lease.give_back().await;
                false
            }
            Some((bytes, ttl)) => {
                let call = Call::new(Function::Store, [self.key(id), self.lease(id)]).arg(granted.token).bytes(&bytes);
                match self.call(call.arg(ttl.as_millis())).await {
                    Ok(answer) => {
                        granted.lease.over();
                        answer.status == Status::Done
                    }
                    // Valkey is full, or takes no row as large as this, or is away: the lease is given back, and this reader does not wait for that.
                    Err(_) => false,
                }
            }
        };
        self.shared.counts.unstored.add(usize::from(!is_stored));
        is_stored
    }

    /// A row's bytes and TTL; none if it is not to be cached.
    fn storable(&self, row: &Row<T>) -> Option<(Vec<u8>, Duration)> {
        let CacheOptions { ttl, max_bytes, .. } = self.shared.options;
        let bytes = match row {
            Some(row) => row.to_bytes().filter(|bytes| !bytes.is_empty() && bytes.len() <= max_bytes)?,
            None if ttl.missing.is_zero() => return None,
            None => Vec::new(),
        };
        Some((bytes, ttl.in_valkey(row.is_none(), rand::random())))
    }

    async fn call(&self, call: Call) -> Result<Answer, Fault> {
        Ok(self.shared.connector.send(call).await?)
    }
}

/// The row of these bytes, none inside if it is known to be missing.
fn read<T: Stored>(bytes: &Bytes) -> Option<Row<T>> {
    if bytes.is_empty() { Some(None) } else { T::from_bytes(bytes).map(|row| Some(Arc::new(row))) }
}

/// A writer's fence: the rows are not in the cache, and nobody puts them there, until it is lifted or runs out. Dropped, it runs out.
#[derive(Debug)]
#[must_use = "a fence that is not lifted keeps its rows out of the cache until it runs out"]
pub struct Fence<T> {
    cache: Cache<T>,
    ids: Vec<String>,
    token: String,
}

impl<T: Stored + Send + Sync + 'static> Fence<T> {
    /// Makes it last for `options.fence` from now.
    pub async fn renew(&self) {
        // If this fails it runs out later, or the next one succeeds.
        let _ = self.set().await;
    }

    async fn set(&self) -> Result<(), Fault> {
        let calls = self.ids.iter().map(|id| {
            let call = Call::new(Function::Fence, [self.cache.key(id), self.cache.lease(id)]).arg(&self.token);
            self.cache.call(call.arg(self.cache.shared.options.fence.as_millis()))
        });
        // Where one of them cannot be set, the others are all the same.
        join_all(calls).await.into_iter().try_for_each(|answer| answer.map(drop))
    }

    /// Ends it, after COMMIT or ROLLBACK. For a fence about one row, that row may be given and is put in place if no other writer was met (`None` inside:
    /// it is known to be missing now).
    pub async fn lift(self, row: Option<Option<Arc<T>>>) {
        let row = row.filter(|_| self.ids.len() == 1).and_then(|row| self.cache.storable(&row));
        let calls = self.ids.iter().map(|id| {
            let call = Call::new(Function::Lift, [self.cache.key(id), self.cache.lease(id)]).arg(&self.token);
            let call = match &row {
                Some((bytes, ttl)) => call.bytes(bytes).arg(ttl.as_millis()),
                None => call,
            };
            self.cache.shared.flights.forget(id);
            self.cache.call(call)
        });
        // If this fails the fence runs out.
        join_all(calls).await;
    }
}
