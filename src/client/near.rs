//! Near cache: rows in this process's memory, before the ones in Valkey, dropped when the server says that they changed.
//!
//! Takes a [`Cache`]; gives rows. It holds only what it has read from Valkey, and only while it listens there: what the server pushes about changed keys
//! arrives on a connection of its own. Between the question and the answer about a row a placeholder stands in its place, so that a change in between is
//! not overtaken by the answer. When that connection is lost or silent, everything is dropped, and reads go to Valkey until there is another one. So a
//! row is older than in Valkey by no more than the way of one message; by no more than two heartbeats where the network swallows it; and by no more than
//! `ttl_cap` whatever happens.
//!
//! In a cluster it listens to every primary, and asks once a heartbeat who they are. When slots have moved, everything is dropped: what has changed on the
//! way nobody may have said.
//!
//! A row whose key is written often costs a push for each write: counters are better read from Valkey.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join;
use tokio::task::{AbortHandle, JoinSet};

use super::cache::{AppError, Cache, Cached, NotLoaded, NotWritten, Row};
use super::codec::Stored;
use super::ttl::{Age, usable};
use crate::retry::{Fault, backoff};
use crate::valkey::{Command, Connection, Endpoint, Home, Layout, Listener, Pushed};

/// What CLIENT LIST shows of its connections.
const NAME: &str = "tidegate-near";
/// A cluster is asked who has which rows no more often than this.
const SHORTEST_HEARTBEAT: Duration = Duration::from_millis(50);
/// How many locks keep answers and changes apart.
const LOCKS: usize = 64;

/// How the server is asked to say what changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracking {
    /// Every change of a row of this kind, whoever reads it: the server remembers nothing for each row, and sends 15 bytes a write to each listener.
    Broadcast,
    /// A change of a row that this process has read: the server remembers who read what, in a table of bounded size; when it is full it says that rows
    /// have changed which have not.
    Default,
    /// As [`Tracking::Default`], for rows that go into the near cache only, and not for other reads of the same connection.
    OptIn,
}

/// How a near cache behaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NearOptions {
    /// How many rows it holds.
    pub entries: u64,
    /// How long a row is held at the most, whatever is heard.
    pub ttl_cap: Duration,
    /// How often a silent connection is asked for a sign of life.
    pub heartbeat: Duration,
    /// Which share of hits is compared with Valkey, 0 to 1.
    pub verify: f64,
    /// How the server is asked.
    pub tracking: Tracking,
    /// Nothing is pushed about what this process itself writes; its writes then go over the connection that is tracked.
    pub no_loop: bool,
}

impl Default for NearOptions {
    fn default() -> NearOptions {
        NearOptions {
            entries: 10_000,
            ttl_cap: Duration::from_secs(60),
            heartbeat: Duration::from_secs(1),
            verify: 0.01,
            tracking: Tracking::Broadcast,
            no_loop: false,
        }
    }
}

/// What a near cache has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NearStats {
    /// Reads that were served from memory.
    pub hits: u64,
    /// Reads that were not.
    pub misses: u64,
    /// Rows that were dropped because they had changed.
    pub invalidated: u64,
    /// How often everything was dropped: a lost connection, FLUSHALL.
    pub flushes: u64,
    /// Hits that were compared with Valkey.
    pub verified: u64,
    /// Those that differed: the message was on its way, or is lost.
    pub differed: u64,
}

/// Rows of one kind, in memory. Cheap to clone; dropped with its last clone.
#[derive(Debug)]
pub struct NearCache<T>(Arc<Inner<T>>);

impl<T> Clone for NearCache<T> {
    fn clone(&self) -> NearCache<T> {
        NearCache(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct Inner<T> {
    address: Endpoint,
    cache: Cache<T>,
    near: Arc<Near<T>>,
    listening: AbortHandle,
}

impl<T> Drop for Inner<T> {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

struct Near<T> {
    options: NearOptions,
    rows: moka::sync::Cache<String, Slot<T>>,
    /// The connection that is tracked, while somebody listens.
    armed: Mutex<Armed>,
    /// Held by whoever puts an answer in a placeholder's place, and by whoever drops a row.
    locks: [Mutex<()>; LOCKS],
    hasher: RandomState,
    /// Keeps CLIENT CACHING and the read that it is about together.
    opting_in: tokio::sync::Mutex<()>,
    fills: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    invalidated: AtomicU64,
    flushes: AtomicU64,
    verified: AtomicU64,
    differed: AtomicU64,
}

/// Which servers have rows, and which of them are heard.
#[derive(Debug, Default)]
struct Armed {
    expected: Option<BTreeSet<Home>>,
    by_home: BTreeMap<Home, Arc<Tracked>>,
}

impl Armed {
    fn is_whole(&self) -> bool {
        let is_heard = |home| self.by_home.get(home).is_some_and(|tracked| tracked.is_good());
        self.expected.as_ref().is_some_and(|expected| expected.iter().all(is_heard))
    }
}

impl<T> fmt::Debug for Near<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Near").field("options", &self.options).finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum Slot<T> {
    /// Somebody has asked Valkey.
    Filling(u64),
    /// The row, until when, and the connection whose server says when it changes.
    Row(Row<T>, Instant, Arc<Tracked>),
}

/// A connection to one server, whose reads it remembers, while what it says is heard.
#[derive(Debug)]
struct Tracked {
    connection: Arc<Connection>,
    is_heard: AtomicBool,
}

impl Tracked {
    fn is_good(&self) -> bool {
        self.is_heard.load(Ordering::Acquire) && !self.connection.is_lost()
    }
}

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Slot<T> {
        match self {
            Slot::Filling(number) => Slot::Filling(*number),
            Slot::Row(row, until, tracked) => Slot::Row(row.clone(), *until, Arc::clone(tracked)),
        }
    }
}

impl<T: Stored + PartialEq + Send + Sync + 'static> NearCache<T> {
    /// Rows of this cache, in memory. It listens from a task of its own, on the runtime it is made on; until it does, and whenever it cannot, it holds
    /// nothing.
    pub fn new(address: &Endpoint, cache: Cache<T>, options: NearOptions) -> NearCache<T> {
        let options = NearOptions { ttl_cap: usable(options.ttl_cap), heartbeat: usable(options.heartbeat), ..options };
        let near = Arc::new(Near {
            options,
            rows: moka::sync::Cache::builder().max_capacity(options.entries).time_to_live(options.ttl_cap).build(),
            armed: Mutex::default(),
            locks: std::array::from_fn(|_| Mutex::new(())),
            hasher: RandomState::new(),
            opting_in: tokio::sync::Mutex::new(()),
            fills: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            invalidated: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            verified: AtomicU64::new(0),
            differed: AtomicU64::new(0),
        });
        let listening = listen(address.clone(), cache.clone(), Arc::clone(&near));
        let listening = tokio::spawn(listening).abort_handle();
        NearCache(Arc::new(Inner { address: address.clone(), cache, near, listening }))
    }

    /// The cache behind it.
    pub fn cache(&self) -> &Cache<T> {
        &self.0.cache
    }

    /// What it has done so far.
    pub fn stats(&self) -> NearStats {
        let (near, of) = (&self.0.near, |count: &AtomicU64| count.load(Ordering::Relaxed));
        NearStats {
            hits: of(&near.hits),
            misses: of(&near.misses),
            invalidated: of(&near.invalidated),
            flushes: of(&near.flushes),
            verified: of(&near.verified),
            differed: of(&near.differed),
        }
    }

    /// Whether it listens, in a cluster to every primary: it holds only rows of servers that it listens to.
    pub fn is_listening(&self) -> bool {
        self.0.near.armed().is_whole()
    }

    /// The row that is held, if one is, without asking anybody.
    pub fn held(&self, id: &str) -> Option<Option<Arc<T>>> {
        match self.0.near.rows.get(id)? {
            Slot::Row(row, until, tracked) if tracked.is_good() && Instant::now() < until => Some(row),
            _ => None,
        }
    }

    /// The row: from memory, from Valkey, or by `load`.
    ///
    /// # Errors
    /// As [`Cache::get`].
    pub async fn get(
        &self,
        id: &str,
        load: impl AsyncFnOnce() -> Result<Option<T>, AppError>,
    ) -> Result<Option<Arc<T>>, NotLoaded> {
        let near = &self.0.near;
        if let Some(row) = self.held(id) {
            near.hits.fetch_add(1, Ordering::Relaxed);
            if near.options.verify > 0.0 && rand::random::<f64>() < near.options.verify {
                return Ok(self.verify(id, row).await);
            }
            return Ok(row);
        }
        near.misses.fetch_add(1, Ordering::Relaxed);
        let Some(tracked) = self.tracked(id).await else { return self.0.cache.get(id, load).await };
        let cached = self.fill(&tracked, id).await;
        self.0.cache.get_beyond(id, cached, load).await
    }

    /// As [`Cache::write`]; this process sees the new row at once.
    ///
    /// # Errors
    /// [`NotWritten`].
    pub async fn write<R>(
        &self,
        id: &str,
        write: impl AsyncFnOnce() -> Result<(R, Option<Option<T>>), AppError>,
    ) -> Result<R, NotWritten> {
        let near = &self.0.near;
        // From the fence on nothing that is asked can be the old row.
        let written = self.0.cache.write(id, async || {
            near.forget(id);
            write().await
        });
        let written = written.await;
        near.forget(id);
        written
    }

    /// As [`Cache::invalidate`].
    ///
    /// # Errors
    /// What Valkey says.
    pub async fn invalidate(&self, ids: &[&str]) -> Result<u64, Fault> {
        let invalidated = self.0.cache.invalidate(ids).await;
        ids.iter().for_each(|id| self.0.near.forget(id));
        invalidated
    }

    /// The connection to the server that has this row, while that is heard.
    async fn tracked(&self, id: &str) -> Option<Arc<Tracked>> {
        let home = self.0.address.home_of(&self.0.cache.key(id)).await.ok()?;
        self.0.near.armed().by_home.get(&home).filter(|tracked| tracked.is_good()).map(Arc::clone)
    }

    /// Reads a row from Valkey, and holds it if it did not change meanwhile.
    async fn fill(&self, tracked: &Arc<Tracked>, id: &str) -> Cached<T> {
        let near = &self.0.near;
        let number = near.fills.fetch_add(1, Ordering::Relaxed);
        near.rows.insert(id.to_owned(), Slot::Filling(number));
        let cached = self.read(&tracked.connection, id).await;
        let _lock = near.lock(id);
        let is_ours = matches!(near.rows.get(id), Some(Slot::Filling(ours)) if ours == number);
        match &cached {
            // The rest of its life in Valkey, and the way of the answer does not make it longer.
            Cached::Row(row, Age::Fresh, left) if is_ours => {
                let until = Instant::now() + (*left).min(near.options.ttl_cap);
                near.rows.insert(id.to_owned(), Slot::Row(row.clone(), until, Arc::clone(tracked)));
            }
            _ if is_ours => near.rows.invalidate(id),
            _ => {}
        }
        cached
    }

    async fn read(&self, connection: &Connection, id: &str) -> Cached<T> {
        let (near, cache) = (&self.0.near, &self.0.cache);
        if near.options.tracking != Tracking::OptIn {
            return cache.look_on(connection, id).await;
        }
        let key = cache.key(id);
        let (caching, value) = {
            let _together = near.opting_in.lock().await;
            let caching = connection.call(Command::new("CLIENT").arg("CACHING").arg("YES"));
            join(caching, connection.call(Command::new("GET").arg(&key))).await
        };
        let left = connection.call(Command::new("PTTL").arg(&key)).await;
        // Without it nothing would be heard of the row.
        if caching.is_err() { Cached::Unknown } else { cache.cached(value, left) }
    }

    async fn verify(&self, id: &str, held: Row<T>) -> Row<T> {
        let near = &self.0.near;
        let Some(tracked) = self.tracked(id).await else { return held };
        let Cached::Row(now, ..) = self.0.cache.look_on(&tracked.connection, id).await else { return held };
        near.verified.fetch_add(1, Ordering::Relaxed);
        if now == held {
            return held;
        }
        near.differed.fetch_add(1, Ordering::Relaxed);
        near.forget(id);
        now
    }
}

impl<T: Send + Sync + 'static> Near<T> {
    fn armed(&self) -> MutexGuard<'_, Armed> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This server is heard from now on.
    fn arm(&self, home: &Home, tracked: &Arc<Tracked>) {
        self.armed().by_home.insert(home.clone(), Arc::clone(tracked));
    }

    /// It is no longer heard on this connection.
    fn disarm(&self, home: &Home, tracked: &Arc<Tracked>) {
        tracked.is_heard.store(false, Ordering::Release);
        let mut armed = self.armed();
        if armed.by_home.get(home).is_some_and(|other| Arc::ptr_eq(other, tracked)) {
            armed.by_home.remove(home);
        }
    }

    /// These servers have rows from now on; none if that is not known.
    fn expect(&self, homes: Option<BTreeSet<Home>>) {
        self.armed().expected = homes;
        self.forget_all();
    }

    fn lock(&self, id: &str) -> MutexGuard<'_, ()> {
        let place = self.hasher.hash_one(id) as usize % LOCKS;
        self.locks[place].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The row has changed: it, and the answer that somebody is waiting for, are not to be held.
    fn forget(&self, id: &str) {
        let _lock = self.lock(id);
        self.rows.invalidate(id);
    }

    /// Anything may have changed.
    fn forget_all(&self) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        let _locks: Vec<_> =
            self.locks.iter().map(|lock| lock.lock().unwrap_or_else(PoisonError::into_inner)).collect();
        self.rows.invalidate_all();
        // What is invalidated as a whole may be found for a moment longer: each one is taken out, too.
        let ids: Vec<Arc<String>> = self.rows.iter().map(|(id, _)| id).collect();
        ids.iter().for_each(|id| self.rows.invalidate(id.as_str()));
    }
}

/// Listens for as long as it is polled: to one server, or to every primary of a cluster.
async fn listen<T: Stored + Send + Sync + 'static>(address: Endpoint, cache: Cache<T>, near: Arc<Near<T>>) {
    let mut listening = BTreeMap::<Home, AbortHandle>::new();
    // Dropped with this task, and with it all that it listens to.
    let mut tasks = JoinSet::new();
    let mut waits = backoff();
    let mut before = None;
    loop {
        let layout = match address.layout().await {
            Ok(layout) => layout,
            // A url that cannot be read, or a cluster of which nobody answers: who has which rows is not known.
            Err(_) => {
                before = None;
                near.expect(None);
                tokio::time::sleep(waits.next().unwrap_or_default()).await;
                continue;
            }
        };
        waits = backoff();
        let homes = layout.as_ref().map_or_else(|| vec![Home::default()], Layout::homes);
        while tasks.try_join_next().is_some() {}
        listening.retain(|home, task| {
            let is_left = homes.contains(home);
            if !is_left {
                task.abort();
            }
            is_left
        });
        for home in &homes {
            if !listening.contains_key(home) {
                let listener = listen_to(address.at(home), home.clone(), cache.clone(), Arc::clone(&near));
                listening.insert(home.clone(), tasks.spawn(listener));
            }
        }
        // Only the new server says anything of rows that have moved: those that are held may have changed in between.
        if before.as_ref() != Some(&layout) {
            near.expect(Some(homes.into_iter().collect()));
            before = Some(layout);
        }
        match before {
            Some(Some(_)) => tokio::time::sleep(near.options.heartbeat.max(SHORTEST_HEARTBEAT)).await,
            _ => std::future::pending().await,
        }
    }
}

/// Listens to one server; begins again when the connection is lost.
async fn listen_to<T: Stored + Send + Sync + 'static>(
    address: Endpoint,
    home: Home,
    cache: Cache<T>,
    near: Arc<Near<T>>,
) {
    let mut waits = backoff();
    loop {
        if let Ok((connection, mut listener)) = arm(&address, &cache, near.options).await {
            waits = backoff();
            if near.options.no_loop {
                cache.use_connection(&connection).await;
            }
            let tracked = Arc::new(Tracked { connection, is_heard: AtomicBool::new(true) });
            let _end = Heard { near: &near, home: &home, tracked: &tracked };
            near.arm(&home, &tracked);
            hear(&tracked.connection, &mut listener, &cache, &near).await;
        }
        tokio::time::sleep(waits.next().unwrap_or_default()).await;
    }
}

/// While it lasts, a server is heard. Dropped, also where its task is ended, nothing is held that was read from there.
struct Heard<'a, T: Send + Sync + 'static> {
    near: &'a Near<T>,
    home: &'a Home,
    tracked: &'a Arc<Tracked>,
}

impl<T: Send + Sync + 'static> Drop for Heard<'_, T> {
    fn drop(&mut self) {
        self.near.disarm(self.home, self.tracked);
        // Behind this nobody puts an answer of the lost connection in place.
        self.near.forget_all();
    }
}

/// Opens the connections and asks the server to track.
async fn arm<T: Stored + Send + Sync + 'static>(
    address: &Endpoint,
    cache: &Cache<T>,
    options: NearOptions,
) -> Result<(Arc<Connection>, Listener), Fault> {
    let connection = Arc::new(Connection::open_unnamed(address).await?);
    // A name is a courtesy.
    let _ = connection.call(Command::new("CLIENT").arg("SETNAME").arg(NAME)).await;
    let mut listener = connection.open_listener(NAME, address.connect_timeout).await?;
    let tracking = Command::new("CLIENT").arg("TRACKING").arg("ON");
    let prefixed = |command: Command| command.arg("BCAST").arg("PREFIX").arg(cache.prefix());
    let no_loop = options.no_loop.then_some("NOLOOP");
    match options.tracking {
        Tracking::Broadcast if !options.no_loop => listener.call(&prefixed(tracking)).await?,
        Tracking::Broadcast => {
            let command = prefixed(tracking.arg("REDIRECT").arg(listener.id())).args(no_loop);
            connection.call(command).await?
        }
        Tracking::Default => connection.call(tracking.arg("REDIRECT").arg(listener.id()).args(no_loop)).await?,
        Tracking::OptIn => {
            let command = tracking.arg("REDIRECT").arg(listener.id()).arg("OPTIN").args(no_loop);
            connection.call(command).await?
        }
    };
    Ok((connection, listener))
}

/// Drops what has changed, until the connection is lost or does not answer.
async fn hear<T: Stored + Send + Sync + 'static>(
    connection: &Connection,
    listener: &mut Listener,
    cache: &Cache<T>,
    near: &Near<T>,
) {
    let (prefix, heartbeat) = (format!("{}{{", cache.prefix()), near.options.heartbeat);
    let mut is_asked = false;
    loop {
        match tokio::time::timeout(heartbeat, listener.next()).await {
            Ok(Ok(Pushed::Keys(keys))) => {
                for key in keys {
                    let id =
                        std::str::from_utf8(&key).ok().and_then(|key| key.strip_prefix(&prefix)?.strip_suffix('}'));
                    if let Some(id) = id {
                        near.invalidated.fetch_add(1, Ordering::Relaxed);
                        near.forget(id);
                    }
                }
            }
            Ok(Ok(Pushed::All)) => near.forget_all(),
            Ok(Ok(Pushed::Pong)) => is_asked = false,
            Ok(Err(_)) => return,
            Err(_) if is_asked || listener.ping().await.is_err() => return,
            Err(_) => is_asked = true,
        }
        if connection.is_lost() {
            return;
        }
        if is_asked {
            // The tracked connection must be alive as well: with it the server would forget what it tracks.
            let ping = tokio::time::timeout(heartbeat, connection.call(Command::new("PING"))).await;
            if !matches!(ping, Ok(Ok(_))) {
                return;
            }
        }
    }
}
