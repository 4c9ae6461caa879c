//! The faults of the soak, drawn from a seed, and the stage they are played on.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::process::{Pid, Signal, kill_process};
use tidegate::model::names;
use tidegate::ops::sandbox::{Postgres, Valkey};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::operators_table;
use tidegate_lab::harness::{Client, GROUP, Resp, STREAM, program};
use tidegate_lab::proxy::{Proxy, Then, Way};

/// What can go wrong, and how often against the others.
const FAULTS: &[(Fault, u32)] = &[
    (Fault::Kill, 50),
    (Fault::Freeze, 3),
    (Fault::Cut(Side::Valkey), 2),
    (Fault::Cut(Side::Postgres), 2),
    (Fault::Silence(Side::Valkey), 2),
    (Fault::Silence(Side::Postgres), 2),
    (Fault::Reset(Side::Valkey), 3),
    (Fault::Reset(Side::Postgres), 3),
    (Fault::LoseAck, 3),
    (Fault::LoseCommit, 3),
    (Fault::ClientKill, 3),
    (Fault::GroupDestroyed, 2),
    (Fault::LeaseLost, 3),
    (Fault::PostgresRestart, 1),
    (Fault::PostgresCrash, 1),
    (Fault::ValkeyRestart, 2),
    (Fault::ValkeyCrash, 2),
    (Fault::RollingDeploy, 1),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    Valkey,
    Postgres,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// SIGKILL; another one is started.
    Kill,
    /// SIGSTOP for up to three `dead_after`, then SIGCONT: a zombie.
    Freeze,
    /// Connections are reset and refused for a while.
    Cut(Side),
    /// Nothing goes through for a while, and nothing is reset.
    Silence(Side),
    /// Connections are reset once.
    Reset(Side),
    /// The answer to an XACK, or to a move of the group's position, is thrown away.
    LoseAck,
    /// The answer to a flush is thrown away.
    LoseCommit,
    /// Valkey closes one connection of a worker.
    ClientKill,
    /// XGROUP DESTROY.
    GroupDestroyed,
    /// The lease of whoever reads alone is deleted, or somebody else's for a while.
    LeaseLost,
    /// In order, and back.
    PostgresRestart,
    /// SIGKILL of its main process, and back.
    PostgresCrash,
    /// In order, and back with its data.
    ValkeyRestart,
    /// SIGKILL, and back with its data.
    ValkeyCrash,
    /// SIGTERM for one after the other, each replaced once it has ended.
    RollingDeploy,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Fault::Kill => "worker killed (SIGKILL)",
            Fault::Freeze => "worker stopped and continued (SIGSTOP, SIGCONT)",
            Fault::Cut(Side::Valkey) => "network to Valkey cut",
            Fault::Cut(Side::Postgres) => "network to PostgreSQL cut",
            Fault::Silence(Side::Valkey) => "network to Valkey silent",
            Fault::Silence(Side::Postgres) => "network to PostgreSQL silent",
            Fault::Reset(Side::Valkey) => "connections to Valkey reset",
            Fault::Reset(Side::Postgres) => "connections to PostgreSQL reset",
            Fault::LoseAck => "answer to an XACK, or a move, lost",
            Fault::LoseCommit => "answer to a COMMIT lost",
            Fault::ClientKill => "CLIENT KILL",
            Fault::GroupDestroyed => "group destroyed",
            Fault::LeaseLost => "lease lost",
            Fault::PostgresRestart => "PostgreSQL restarted",
            Fault::PostgresCrash => "PostgreSQL killed (SIGKILL)",
            Fault::ValkeyRestart => "Valkey restarted",
            Fault::ValkeyCrash => "Valkey killed (SIGKILL)",
            Fault::RollingDeploy => "rolling deploy",
        })
    }
}

/// How the workers read the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Reading {
    /// As members of its group
    Group,
    /// One at a time
    Exclusive,
    /// Some the one way and some the other; each anew when it is started
    Both,
}

impl std::fmt::Display for Reading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reading::Group => "group",
            Reading::Exclusive => "exclusive",
            Reading::Both => "both",
        })
    }
}

/// The next fault, its victim, and how long it lasts: the same for the same seed.
#[derive(Debug)]
pub struct Dice(StdRng);

impl Dice {
    pub fn of(seed: u64) -> Dice {
        Dice(StdRng::seed_from_u64(seed))
    }

    pub fn fault(&mut self) -> Fault {
        let mut left = self.0.random_range(0..FAULTS.iter().map(|(_, weight)| weight).sum::<u32>());
        let drawn = FAULTS.iter().find(|(_, weight)| {
            let here = left < *weight;
            left = left.saturating_sub(*weight);
            here
        });
        drawn.map_or(Fault::Kill, |(fault, _)| *fault)
    }

    pub fn ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.0.random_range(from..to))
    }

    pub fn one_of(&mut self, count: usize) -> usize {
        self.0.random_range(0..count)
    }
}

/// One worker process behind proxies of its own.
#[derive(Debug)]
struct Worker {
    child: Child,
    valkey: Proxy,
    postgres: Proxy,
}

/// What the workers said of themselves, summed up.
#[derive(Debug, Default)]
pub struct Heard {
    pub recognised: AtomicU64,
    pub reclaimed: AtomicU64,
    pub lost_upstream: AtomicU64,
}

/// Servers and workers.
#[derive(Debug)]
pub struct Stage {
    pub valkey: Valkey,
    pub postgres: Postgres,
    database: String,
    workers: Vec<Worker>,
    delivery: Reading,
    /// Whether the table with every operator is written, too.
    tables: bool,
    /// How many were started so far.
    started: AtomicU64,
    pub heard: Arc<Heard>,
    pub counts: BTreeMap<Fault, u64>,
    /// Workers that ended although nobody made them.
    pub died: u64,
    /// Faults that last: until when, whose, and what ends them.
    lasting: Vec<(Instant, usize, End)>,
}

/// What ends a fault that lasts.
#[derive(Debug, Clone, Copy)]
enum End {
    Heal(Side),
    Continue,
}

impl Stage {
    pub async fn set(
        valkey: Valkey,
        postgres: Postgres,
        database: String,
        workers: usize,
        delivery: Reading,
        tables: bool,
    ) -> Stage {
        let mut stage = Stage {
            valkey,
            postgres,
            database,
            workers: Vec::new(),
            delivery,
            tables,
            started: AtomicU64::new(0),
            heard: Arc::default(),
            counts: BTreeMap::new(),
            died: 0,
            lasting: Vec::new(),
        };
        for _ in 0..workers {
            let proxies = (Proxy::start(stage.valkey.port()).await, Proxy::start(stage.postgres.port()).await);
            let child = stage.start(&proxies.0, &proxies.1);
            stage.workers.push(Worker { child, valkey: proxies.0, postgres: proxies.1 });
        }
        stage
    }

    /// Where the database is.
    pub fn url(&self) -> String {
        self.postgres.url(&self.database)
    }

    fn start(&self, valkey: &Proxy, postgres: &Proxy) -> Child {
        let mut command = Command::new(program());
        command.arg("run").env_clear().kill_on_drop(true).stdin(Stdio::null()).stderr(Stdio::piped());
        let database = self.url().replace(&self.postgres.port().to_string(), &postgres.port().to_string());
        command.env("VALKEY_URL", valkey.url()).env("DATABASE_URL", database);
        for (key, value) in [
            ("LOG__FORMAT", "json"),
            ("LOG__LEVEL", "info"),
            ("VALKEY__COMMAND_TIMEOUT", "2s"),
            ("POSTGRES__STATEMENT_TIMEOUT", "900ms"),
            ("POSTGRES__LOCK_TIMEOUT", "600ms"),
            ("POSTGRES__IDLE_IN_TRANSACTION_TIMEOUT", "600ms"),
            ("RECLAIM__DEAD_AFTER", "1s"),
            ("RECLAIM__GONE_AFTER", "500ms"),
            ("RECLAIM__SWEEP_EVERY", "200ms"),
            // A name alone never kills here, and many share it.
            ("RECLAIM__MAX_DELIVERIES", "1000"),
            ("TRIM__EVERY", "300ms"),
            ("TRIM__RETENTION", "3s"),
            ("COMPACT__EVERY", "500ms"),
            ("COMPACT__MARGIN", "10s"),
            ("STOP__GRACE", "2s"),
            ("EXCLUSIVE__LEASE", "500ms"),
            ("PIPELINES__COUNTERS__DELIVERY", self.delivery_of_the_next()),
        ] {
            command.env(format!("TIDEGATE__{key}"), value);
        }
        if self.tables {
            operators_table::configure(&mut command);
        }
        let mut child = command.spawn().expect("the program starts");
        let (stderr, heard) = (child.stderr.take().expect("piped"), self.heard.clone());
        tokio::spawn(async move {
            let mut lines = BufReader::new(stderr).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let event: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
                let entries = event["entries"].as_u64().unwrap_or(0);
                let sum = match event["event"].as_str().unwrap_or_default() {
                    "recognised" => &heard.recognised,
                    "reclaimed" => &heard.reclaimed,
                    "lost_upstream" => {
                        println!("   {line}");
                        &heard.lost_upstream
                    }
                    _ => continue,
                };
                sum.fetch_add(entries, Ordering::Relaxed);
            }
        });
        child
    }

    /// For long enough all read in one way, too: the ways change after some starts.
    fn delivery_of_the_next(&self) -> &'static str {
        let started = self.started.fetch_add(1, Ordering::Relaxed);
        match self.delivery {
            Reading::Group => "group",
            Reading::Exclusive => "exclusive",
            Reading::Both if started / 10 % 3 == 1 => "exclusive",
            Reading::Both if started / 10 % 3 == 2 => "group",
            Reading::Both if started.is_multiple_of(2) => "exclusive",
            Reading::Both => "group",
        }
    }

    fn replace(&mut self, at: usize) {
        let child = self.start(&self.workers[at].valkey, &self.workers[at].postgres);
        self.workers[at].child = child;
    }

    fn signal(&self, at: usize, signal: Signal) {
        if let Some(pid) = self.workers[at].child.id().and_then(|pid| Pid::from_raw(pid as i32)) {
            // Gone already, perhaps.
            let _ = kill_process(pid, signal);
        }
    }

    /// Ends those faults that have lasted long enough.
    pub fn end_some(&mut self, now: Instant) {
        for (_, at, end) in self.lasting.extract_if(.., |(until, ..)| *until <= now).collect::<Vec<_>>() {
            match end {
                End::Heal(Side::Valkey) => self.workers[at].valkey.heal(),
                End::Heal(Side::Postgres) => self.workers[at].postgres.heal(),
                End::Continue => self.signal(at, Signal::CONT),
            }
        }
    }

    /// Plays one fault; one that lasts for a while is ended by [`Stage::end_some`], and others come meanwhile.
    pub async fn play(&mut self, fault: Fault, dice: &mut Dice) {
        *self.counts.entry(fault).or_default() += 1;
        let at = dice.one_of(self.workers.len());
        let proxy = |side| match side {
            Side::Valkey => &self.workers[at].valkey,
            Side::Postgres => &self.workers[at].postgres,
        };
        match fault {
            Fault::Kill => {
                self.signal(at, Signal::KILL);
                let _ = self.workers[at].child.wait().await;
                self.replace(at);
            }
            Fault::Freeze => {
                self.signal(at, Signal::STOP);
                self.lasting.push((Instant::now() + dice.ms(200, 3_000), at, End::Continue));
            }
            Fault::Cut(side) => {
                proxy(side).cut();
                self.lasting.push((Instant::now() + dice.ms(50, 1_500), at, End::Heal(side)));
            }
            Fault::Silence(side) => {
                let both = [Way::ToServer, Way::ToClient];
                let ways = &both[dice.one_of(2)..];
                ways.iter().for_each(|way| proxy(side).hold(*way));
                self.lasting.push((Instant::now() + dice.ms(100, 3_000), at, End::Heal(side)));
            }
            Fault::Reset(side) => proxy(side).reset(),
            Fault::LoseAck => {
                // Whoever reads alone moves the position instead, by a script.
                let words: [&[u8]; 2] = [b"XACK", b"ENTRIESREAD"];
                drop(proxy(Side::Valkey).trap(Way::ToServer, words[dice.one_of(2)], Then::LoseReply));
            }
            // The bind message of a flush holds the counters' keys.
            Fault::LoseCommit => drop(proxy(Side::Postgres).trap(Way::ToServer, b":1", Then::LoseReply)),
            Fault::ClientKill => {
                if let Ok(mut client) = Client::try_connect(self.valkey.port()).await
                    && let Ok(list) = client.try_pipeline(&[["CLIENT", "LIST"]]).await
                {
                    let list = list.first().map(Resp::text).unwrap_or_default();
                    let ours = list.lines().filter(|line| line.contains(" name=tidegate:"));
                    let ids: Vec<&str> = ours.filter_map(|line| line.strip_prefix("id=")?.split(' ').next()).collect();
                    if !ids.is_empty() {
                        let _ = client.try_pipeline(&[["CLIENT", "KILL", "ID", ids[dice.one_of(ids.len())]]]).await;
                    }
                }
            }
            Fault::GroupDestroyed => {
                if let Ok(mut client) = Client::try_connect(self.valkey.port()).await {
                    let _ = client.try_pipeline(&[["XGROUP", "DESTROY", STREAM, GROUP]]).await;
                }
            }
            Fault::LeaseLost => {
                let name = names::lease(STREAM, "counters");
                let for_a_while = dice.ms(50, 1_500).as_millis().to_string();
                let commands = [vec!["DEL", &name], vec!["SET", &name, "somebody else", "PX", &for_a_while]];
                if let Ok(mut client) = Client::try_connect(self.valkey.port()).await {
                    let _ = client.try_pipeline(&commands[dice.one_of(2)..][..1]).await;
                }
            }
            Fault::PostgresRestart | Fault::PostgresCrash => {
                if fault == Fault::PostgresCrash {
                    self.postgres.kill();
                } else if let Some(pid) = self.postgres.pid().and_then(Pid::from_raw) {
                    // The fast shutdown: sessions are ended, a checkpoint is written.
                    let _ = kill_process(pid, Signal::INT);
                    while tokio::net::TcpStream::connect(("127.0.0.1", self.postgres.port())).await.is_ok() {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    self.postgres.stop();
                }
                tokio::time::sleep(dice.ms(500, 2_000)).await;
                self.postgres.restart().await.expect("PostgreSQL comes back");
            }
            Fault::ValkeyRestart | Fault::ValkeyCrash => {
                if fault == Fault::ValkeyCrash {
                    self.valkey.kill()
                } else {
                    self.valkey.stop()
                }
                tokio::time::sleep(dice.ms(50, 1_000)).await;
                self.valkey.restart().await.expect("Valkey comes back");
                while !self.is_loaded().await {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            Fault::RollingDeploy => {
                for at in 0..self.workers.len() {
                    self.signal(at, Signal::TERM);
                    self.signal(at, Signal::CONT);
                    let ended = tokio::time::timeout(Duration::from_secs(30), self.workers[at].child.wait()).await;
                    if ended.is_err() {
                        self.signal(at, Signal::KILL);
                        self.died += 1;
                    }
                    self.replace(at);
                }
            }
        }
    }

    /// Whether Valkey has read its data, and answers.
    async fn is_loaded(&self) -> bool {
        let Ok(mut client) = Client::try_connect(self.valkey.port()).await else { return false };
        client.try_pipeline(&[["PING"]]).await.is_ok_and(|replies| replies == [Resp::Text("PONG".into())])
    }

    /// Everything goes through again, and whoever should run does.
    pub fn calm(&mut self) {
        self.lasting.clear();
        for at in 0..self.workers.len() {
            self.workers[at].valkey.heal();
            self.workers[at].postgres.heal();
            self.signal(at, Signal::CONT);
            if let Ok(Some(status)) = self.workers[at].child.try_wait() {
                println!("   a worker had ended by itself: {status}");
                self.died += 1;
                self.replace(at);
            }
        }
    }
}
