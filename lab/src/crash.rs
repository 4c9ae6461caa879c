//! Kills a worker at each crash point, as often as asked, and looks at the books after every death.
//!
//! Each point has servers of its own. The next worker finds what the one before left; now and then one is left in peace until
//! nothing is pending, and everything is compared.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sqlx::PgConnection;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::sync::Semaphore;

use crate::books::Books;
use crate::journal::{Journal, Writer};
use crate::operators_table;
use tidegate_lab::harness::{Client, GROUP, Lab, STREAM, within_limit};

/// A worker that has not come to its point by then is killed from outside, and not counted.
const PATIENCE: Duration = Duration::from_secs(3);
/// So many attempts for each death asked for, then it is a failure: the point is not reached any more.
const ATTEMPTS: u32 = 20;

#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Deaths at each point
    #[arg(long, default_value_t = 10)]
    kills: u32,
    /// Only points whose names begin so
    #[arg(long, default_value = "")]
    point: String,
    /// Beside the counters a table with every operator is written, from the same read
    #[arg(long)]
    tables: bool,
    /// Points at a time
    #[arg(long, default_value_t = 4)]
    jobs: usize,
}

/// How the worker is brought to its point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    /// Fresh entries are enough.
    Feeding,
    /// The group is rewound: all that the stream holds comes again.
    Rewinding,
    /// The same, where the ledger cannot tell any more.
    Forgetting,
    /// What somebody silent holds is reclaimed.
    Waiting,
    /// Nothing that need not be kept is kept.
    Trimming,
    /// Rows in the ledger that are old enough to be merged.
    Compacting,
    /// Many small rows in the ledger, all of them settled and acknowledged.
    Merging,
    /// A signal, once it runs.
    Telling(Signal),
    /// An empty database is migrated.
    Migrating,
    /// One reads alone; fresh entries are enough.
    Alone,
    /// One reads alone, and is told to stop once it runs.
    AloneTelling(Signal),
}

/// Where a worker is killed: its number in the list of docs/guarantees.md, its name, how it is reached, entries each time,
/// deaths between two reckonings.
struct Point(u8, &'static str, By, u32, u32);

const POINTS: &[Point] = &[
    Point(1, "read.sent", By::Feeding, 20, 50),
    Point(2, "read.half", By::Feeding, 400, 25),
    Point(3, "flush.parsed", By::Feeding, 20, 50),
    Point(4, "careful.begin", By::Rewinding, 20, 50),
    Point(4, "careful.begun", By::Rewinding, 20, 50),
    Point(5, "careful.ledger", By::Rewinding, 20, 50),
    Point(6, "careful.judged", By::Rewinding, 20, 50),
    Point(7, "careful.upsert", By::Rewinding, 20, 50),
    Point(7, "careful.upserted", By::Rewinding, 20, 50),
    Point(8, "careful.commit", By::Rewinding, 20, 50),
    // One statement with all of it: BEGIN, ledger, upsert, COMMIT.
    Point(8, "flush.sent", By::Feeding, 200, 50),
    Point(9, "flush.committed", By::Feeding, 20, 50),
    Point(10, "ack.sent", By::Feeding, 2_000, 10),
    Point(11, "ack.chunk", By::Feeding, 10_500, 4),
    Point(12, "reclaim.listed", By::Waiting, 20, 50),
    Point(12, "reclaim.claim", By::Waiting, 20, 50),
    Point(12, "reclaim.claimed", By::Waiting, 20, 50),
    Point(13, "bury.sent", By::Feeding, 1_000, 10),
    Point(13, "bury.covered", By::Forgetting, 20, 50),
    Point(14, "trim.raised", By::Trimming, 20, 50),
    Point(14, "trim.cut", By::Trimming, 20, 50),
    Point(15, "compact.removed", By::Compacting, 20, 50),
    Point(15, "compact.commit", By::Compacting, 20, 50),
    Point(15, "merge.sent", By::Merging, 20, 50),
    Point(15, "merge.commit", By::Merging, 20, 50),
    Point(16, "migrate.sent", By::Migrating, 0, 1_000_000),
    Point(17, "stop.asked", By::Telling(Signal::TERM), 200, 50),
    Point(17, "stop.settled", By::Telling(Signal::TERM), 200, 50),
    Point(19, "lease.taken", By::Alone, 20, 50),
    Point(19, "alone.begins", By::Alone, 20, 50),
    Point(19, "alone.read", By::Alone, 20, 50),
    Point(20, "flush.sent", By::Alone, 200, 50),
    Point(20, "flush.committed", By::Alone, 20, 50),
    Point(21, "position.sent", By::Alone, 200, 50),
    Point(21, "position.moved", By::Alone, 200, 50),
    Point(22, "lease.left", By::AloneTelling(Signal::TERM), 200, 50),
    Point(18, "reload.read", By::Telling(Signal::HUP), 200, 50),
    Point(18, "reload.started", By::Telling(Signal::HUP), 200, 50),
];

/// What came out at one point.
#[derive(Debug, Default)]
struct Tally {
    deaths: u32,
    missed: u32,
    reckonings: u32,
    entries: usize,
    wrong: Vec<String>,
}

pub async fn run(args: Args) -> bool {
    let (started, turns) = (Instant::now(), Arc::new(Semaphore::new(args.jobs)));
    let points = POINTS.iter().filter(|point| point.1.starts_with(&args.point));
    let tasks: Vec<_> = points
        .map(|point| {
            let (turns, kills, tables) = (turns.clone(), args.kills, args.tables);
            tokio::spawn(async move {
                let _turn = turns.acquire().await;
                let tally = Victim::of(point, tables).await.die(kills).await;
                println!("{}", line(point, &tally));
                tally.wrong.iter().for_each(|wrong| println!("   {wrong}"));
                (point, tally)
            })
        })
        .collect();
    println!("crash point               killed  missed  reckonings   entries  verdict");
    let points = tasks.len();
    let (mut deaths, mut holds, mut by_number) = (0, true, BTreeMap::<u8, u32>::new());
    for task in tasks {
        let Ok((point, tally)) = task.await else { return false };
        deaths += tally.deaths;
        holds &= tally.wrong.is_empty() && tally.deaths >= args.kills;
        *by_number.entry(point.0).or_default() += tally.deaths;
    }
    let least = by_number.values().min().copied().unwrap_or(0);
    let verdict = if holds { "exactly once" } else { "BROKEN" };
    println!(
        "{deaths} deaths at {} points of {} kinds, {least} at the least of each kind, in {} s: {verdict}",
        points,
        by_number.len(),
        started.elapsed().as_secs()
    );
    holds
}

fn line(point: &Point, tally: &Tally) -> String {
    let Tally { deaths, missed, reckonings, entries, wrong } = tally;
    let verdict = if wrong.is_empty() { "exact" } else { "WRONG" };
    format!("{:>2} {:<20} {deaths:>8} {missed:>7} {reckonings:>11} {entries:>9}  {verdict}", point.0, point.1)
}

/// What dies again and again at one point, and what it works on.
struct Victim {
    point: &'static Point,
    tables: bool,
    lab: Lab,
    client: Client,
    sql: PgConnection,
    tally: Tally,
}

impl Victim {
    async fn of(point: &'static Point, tables: bool) -> Victim {
        let lab = Lab::new().await;
        if point.2 == By::Migrating {
            lab.execute("drop schema tidegate cascade; drop table public.counters").await;
        }
        let (client, mut sql) = (lab.client().await, lab.sql().await);
        if tables {
            operators_table::create(&mut sql).await;
        }
        Victim { point, tables, lab, client, sql, tally: Tally::default() }
    }

    async fn die(mut self, kills: u32) -> Tally {
        let mut attempts = 0;
        for round in 0.. {
            if self.tally.deaths >= kills || !self.tally.wrong.is_empty() {
                break;
            }
            let mut books = Books::open(round, self.tables, &mut self.client).await.expect("readable");
            let (mut writer, goal) = (Writer::new(round, 0), kills.min(self.tally.deaths + self.point.4));
            while self.tally.deaths < goal && self.tally.wrong.is_empty() {
                attempts += 1;
                if attempts > kills.saturating_mul(ATTEMPTS) {
                    self.tally.wrong.push("the point is not reached".into());
                    break;
                }
                self.prepare(&mut writer, &mut books).await;
                self.run_once(attempts % 3 + 1).await;
                if self.point.2 != By::Migrating {
                    self.look(&mut books).await;
                }
            }
            self.reckon(books, writer).await;
        }
        self.tally
    }

    /// Brings about what leads to the point.
    async fn prepare(&mut self, writer: &mut Writer, books: &mut Books) {
        let mut left = self.point.3;
        while left > 0 {
            let some = left.min(500);
            writer.write(&mut self.client, some).await.expect("Valkey lives");
            left -= some;
        }
        books.read_stream(&mut self.client).await.expect("Valkey lives");
        match self.point.2 {
            By::Rewinding => self.rewind().await,
            By::Forgetting => {
                self.execute("update tidegate.ledger set digests = null, digest_version = null").await;
                self.rewind().await;
            }
            // Rows of long ago, of a stream that has gone on; with digests of another version, so that they are not merged with others.
            By::Compacting => {
                let left = "select coalesce(sum(entries), 150)::bigint from tidegate.ledger where upper(ids) <= 150";
                let left: i64 = sqlx::query_scalar(left).fetch_one(&mut self.sql).await.expect("readable");
                if left != 150 {
                    self.tally.wrong.push(format!("of 150 entries the ledger has {left}"));
                }
                self.execute(
                    "lock table tidegate.ledger in access exclusive mode; -- what the dead one sent may be under way
                     delete from tidegate.ledger where upper(ids) <= 150;
                     insert into tidegate.ledger (lane, ids, digests, digest_version, entries, consumer, flushed_at)
                     select lane, numrange(n, n, '[]'), '\\x0102030405060708', 99, 1, 'old', now() - interval '1 day'
                     from tidegate.lanes, generate_series(1, 150) n",
                )
                .await;
            }
            By::Migrating => {
                self.execute("drop schema if exists tidegate cascade; drop table if exists public.counters").await
            }
            // Somebody else takes them, and is not heard of again.
            By::Waiting => {
                self.client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
                self.client.call(&["XREADGROUP", "GROUP", GROUP, "silent", "STREAMS", STREAM, ">"]).await;
            }
            By::Feeding | By::Trimming | By::Merging | By::Telling(_) | By::Alone | By::AloneTelling(_) => {}
        }
    }

    async fn rewind(&mut self) {
        // Refused where the first worker has not come to create it.
        self.client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    }

    async fn execute(&mut self, statement: &'static str) {
        sqlx::raw_sql(statement).execute(&mut self.sql).await.expect(statement);
    }

    fn program(&self, arguments: &[&str]) -> Command {
        let mut command = self.lab.program(arguments);
        for (key, value) in [
            ("LOG__LEVEL", "info"),
            ("RECLAIM__DEAD_AFTER", "300ms"),
            ("RECLAIM__GONE_AFTER", "200ms"),
            ("RECLAIM__SWEEP_EVERY", "100ms"),
            ("POSTGRES__STATEMENT_TIMEOUT", "250ms"),
            ("POSTGRES__LOCK_TIMEOUT", "200ms"),
            ("POSTGRES__IDLE_IN_TRANSACTION_TIMEOUT", "200ms"),
            // A name alone never kills.
            ("RECLAIM__MAX_DELIVERIES", "1000"),
            ("COMPACT__MARGIN", "1h"),
            ("EXCLUSIVE__LEASE", "200ms"),
        ] {
            command.env(format!("TIDEGATE__{key}"), value);
        }
        if matches!(self.point.2, By::Alone | By::AloneTelling(_)) {
            command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", "exclusive");
        }
        if self.tables {
            operators_table::configure(&mut command);
        }
        if self.point.2 == By::Trimming {
            command.env("TIDEGATE__TRIM__RETENTION", "0s");
        }
        if self.point.2 == By::Merging {
            command.env("TIDEGATE__BATCH__MAX_ENTRIES", "2").env("TIDEGATE__BATCH__READ_COUNT", "2");
        }
        command
    }

    /// One worker, until it dies.
    async fn run_once(&mut self, nth: u32) {
        let migrating = self.point.2 == By::Migrating;
        let mut command = self.program(if migrating { &["migrate"] } else { &["run"] });
        // Not always the first time it passes, where it passes more than once.
        let nth = match self.point.1 {
            "read.sent" | "alone.read" | "lease.taken" | "position.sent" | "position.moved" => nth,
            _ => 1,
        };
        command.env("TIDEGATE_FAILPOINT", format!("{}:{nth}", self.point.1));
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("the program starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let pid = child.id().and_then(|pid| Pid::from_raw(pid as i32)).expect("it runs");
        let listen = async {
            while let Ok(Some(line)) = lines.next_line().await {
                let event: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
                let is_up = match self.point.2 {
                    By::AloneTelling(_) => event["event"] == "reads_alone",
                    _ => event["event"] == "running",
                };
                if is_up && let By::Telling(signal) | By::AloneTelling(signal) = self.point.2 {
                    // Gone already, perhaps.
                    let _ = kill_process(pid, signal);
                }
            }
            child.wait().await.expect("waited for")
        };
        let ended: Option<ExitStatus> = tokio::time::timeout(PATIENCE, listen).await.ok();
        match ended {
            Some(status) if status.signal() == Some(Signal::KILL.as_raw()) => self.tally.deaths += 1,
            Some(_) => self.tally.missed += 1,
            None => {
                self.tally.missed += 1;
                child.kill().await.expect("killed");
            }
        }
    }

    async fn look(&mut self, books: &mut Books) {
        match books.look(&mut self.sql, &mut self.client).await {
            Ok(findings) => self.tally.wrong.extend(findings.wrong),
            Err(error) => self.tally.wrong.push(error),
        }
    }

    /// One worker in peace, then everything is compared and taken away.
    async fn reckon(&mut self, mut books: Books, writer: Writer) {
        self.tally.reckonings += 1;
        let arguments: &[&str] = if self.point.2 == By::Migrating { &["migrate"] } else { &["run", "--until-empty"] };
        let mut command = self.program(arguments);
        command.stderr(Stdio::null()).stdout(Stdio::null());
        let status = within_limit("the end of the backlog", command.status()).await.expect("it runs");
        // Bad entries are a part of some scenarios: then it says 65.
        if !matches!(status.code(), Some(0 | 65)) {
            self.tally.wrong.push(format!("the one in peace ended with {status}"));
        }
        if self.point.2 == By::Migrating {
            let applied: i64 = sqlx::query_scalar("select count(*) from tidegate.migrations where success")
                .fetch_one(&mut self.sql)
                .await
                .expect("migrated");
            if applied == 0 {
                self.tally.wrong.push("not migrated".into());
            }
            return;
        }
        match books.close(&mut self.sql, &mut self.client, &Journal::of([writer])).await {
            Ok((verdicts, findings)) => {
                self.tally.entries += verdicts.attempted;
                self.tally.wrong.extend(findings.wrong);
                if !verdicts.hold() {
                    self.tally.wrong.push(format!("{verdicts:?}"));
                }
            }
            Err(error) => self.tally.wrong.push(error),
        }
        self.client.call(&["FLUSHALL"]).await;
        if self.tables {
            self.execute("truncate public.operators").await;
        }
        self.execute("truncate tidegate.ledger, tidegate.dead_letters, public.counters; update tidegate.lanes set trimmed_below = 0")
            .await;
    }
}
