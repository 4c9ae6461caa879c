//! Herd: one row expires again and again under four processes with twelve readers each; how often it is loaded.

use std::cell::Cell;
use std::error::Error;
use std::process::Stdio;
use std::rc::Rc;
use std::time::Duration;

use serde::Deserialize;
use tidegate::client::{Cache, CacheOptions, Ttl};
use tidegate::functions;
use tidegate::ops::sandbox::Valkey;
use tidegate::valkey::Connection;
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Table, connect, endpoint, words};

const PROCESSES: usize = 4;
const READERS: usize = 12;
const TTL: Duration = Duration::from_secs(1);
/// How long the row takes to load.
const LOAD: Duration = Duration::from_millis(50);
const PAUSE: Duration = Duration::from_millis(1);
/// A read that took this long waited for a load.
const WAITED: Duration = Duration::from_millis(25);

/// What the readers of one process saw.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
struct Seen {
    reads: u64,
    loads: u64,
    waited: u64,
}

impl Seen {
    fn and(self, other: Seen) -> Seen {
        Seen { reads: self.reads + other.reads, loads: self.loads + other.loads, waited: self.waited + other.waited }
    }
}

pub(super) async fn table(lasting: Duration) -> Result<Table, Box<dyn Error>> {
    let expiries = lasting.as_secs().max(1) / TTL.as_secs();
    let mut rows = Vec::new();
    let mut add = |name: &str, seen: Seen| {
        let a_expiry = seen.loads as f64 / expiries as f64;
        rows.push(vec![
            name.to_owned(),
            seen.loads.to_string(),
            format!("{a_expiry:.1}"),
            seen.waited.to_string(),
            seen.reads.to_string(),
        ]);
    };
    add("by hand, Rust: GET, load, SET PX", by_hand(lasting).await?);
    for (name, mode, peer) in [
        ("by hand, Python: GET, load, SET PX", "hand", Peer::Python),
        ("dogpile.cache, Python, with its lock in Valkey", "library", Peer::Python),
        ("by hand, Node: GET, load, SET PX", "hand", Peer::Node),
        ("bentocache, Node", "library", Peer::Node),
    ] {
        match peer.run(mode, lasting).await? {
            Some(seen) => add(name, seen),
            None => eprintln!("left out: {name} (`make peers`)"),
        }
    }
    add("tidegate, no early refresh", ours(lasting, Ttl::fixed(TTL)).await?);
    add("tidegate, as by default", ours(lasting, Ttl::of(TTL)).await?);
    Ok(Table {
        name: "herd",
        title: format!(
            "One row with a TTL of 1 s that takes 50 ms to load, {PROCESSES} processes with {READERS} readers each, {} s",
            lasting.as_secs()
        ),
        head: &["", "loads", "a second", "reads that waited", "reads"],
        rows,
        plotted: (2, "Loads a second"),
    })
}

/// Reads until the time is over; `read` loads where it must, and counts that.
async fn read_on(lasting: Duration, loads: Rc<Cell<u64>>, mut read: impl AsyncFnMut(&Cell<u64>)) -> Seen {
    let (until, mut seen) = (Instant::now() + lasting, Seen::default());
    while Instant::now() < until {
        let begin = Instant::now();
        read(&loads).await;
        seen.reads += 1;
        seen.waited += u64::from(begin.elapsed() >= WAITED);
        tokio::time::sleep(PAUSE).await;
    }
    seen
}

async fn load(loads: &Cell<u64>) -> String {
    loads.set(loads.get() + 1);
    tokio::time::sleep(LOAD).await;
    "Ada".to_owned()
}

async fn by_hand(lasting: Duration) -> Result<Seen, Box<dyn Error>> {
    let server = Valkey::start(&[]).await?;
    let (loads, mut readers) = (Rc::new(Cell::new(0)), JoinSet::new());
    for _ in 0..PROCESSES {
        let connection: Rc<Connection> = Rc::new(connect(&server.url()).await?);
        for _ in 0..READERS {
            let (connection, loads) = (connection.clone(), loads.clone());
            readers.spawn_local(read_on(lasting, loads, async move |loads| {
                let cached = connection.call(words("GET", ["row"])).await.ok();
                if cached.is_none_or(|reply| reply.as_text().is_none()) {
                    let row = load(loads).await;
                    let _ = connection.call(words("SET", ["row", &row, "PX", "1000"])).await;
                }
            }));
        }
    }
    let seen = readers.join_all().await.into_iter().fold(Seen::default(), Seen::and);
    Ok(Seen { loads: loads.get(), ..seen })
}

async fn ours(lasting: Duration, ttl: Ttl) -> Result<Seen, Box<dyn Error>> {
    let server = Valkey::start(&[]).await?;
    functions::load(&connect(&server.url()).await?).await?;
    let (loads, mut readers) = (Rc::new(Cell::new(0)), JoinSet::new());
    for _ in 0..PROCESSES {
        // A cache of its own is what a process has: what they share is in Valkey.
        let cache =
            Cache::<String>::new(&endpoint(&server.url()), "rows", CacheOptions { ttl, ..CacheOptions::default() });
        for _ in 0..READERS {
            let (cache, loads) = (cache.clone(), loads.clone());
            readers.spawn_local(read_on(lasting, loads, async move |loads| {
                let _ = cache.get("row", async || Ok(Some(load(loads).await))).await;
            }));
        }
    }
    let seen = readers.join_all().await.into_iter().fold(Seen::default(), Seen::and);
    Ok(Seen { loads: loads.get(), ..seen })
}

/// Contestants in another language, each of whose processes is one.
#[derive(Debug, Clone, Copy)]
enum Peer {
    Python,
    Node,
}

impl Peer {
    /// None: its libraries are not installed.
    async fn run(self, mode: &str, lasting: Duration) -> Result<Option<Seen>, Box<dyn Error>> {
        let server = Valkey::start(&[]).await?;
        let peers = concat!(env!("CARGO_MANIFEST_DIR"), "/peers");
        let mut processes = Vec::new();
        for _ in 0..PROCESSES {
            let mut command = match self {
                Peer::Python => {
                    let Some(python) = std::env::var_os("PYTHON").filter(|path| std::path::Path::new(path).exists())
                    else {
                        return Ok(None);
                    };
                    let mut command = Command::new(python);
                    command.arg(format!("{peers}/python/cache.py"));
                    command
                }
                Peer::Node => {
                    let Some(folder) = std::env::var_os("NODE_PEER")
                        .filter(|path| std::path::Path::new(path).join("node_modules").exists())
                    else {
                        return Ok(None);
                    };
                    let mut command = Command::new("node");
                    command.arg("cache.mjs").current_dir(folder);
                    command
                }
            };
            command.env("VALKEY_URL", server.url()).env("MODE", mode).env("SECONDS", lasting.as_secs().to_string());
            command.env("READERS", READERS.to_string()).stdout(Stdio::piped()).kill_on_drop(true);
            processes.push(command.spawn()?);
        }
        let mut all = Seen::default();
        for process in processes {
            let output = process.wait_with_output().await?;
            all = all.and(serde_json::from_slice(&output.stdout)?);
        }
        Ok(Some(all))
    }
}
