//! Managed counters in little memory under a random schedule of faults, run after run, and beside each run the pattern that people write by hand.
//!
//! Each run has servers of its own: a Valkey with 3 or 4 MB in all and one of the volatile policies, a PostgreSQL, two worker processes and three producers. While
//! producers add and read, workers are killed, connections of Tidegate are cut, values are deleted (those with unflushed deltas, too), and PostgreSQL is
//! stopped at once and started again. Every exact value that is read is judged when it is read. In the end faults stop, everything is flushed, and each row
//! and each value that Valkey shows is compared with what producers were told. The hand-written pattern has the same load and the same faults from the same seed.

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sqlx::{Connection as _, PgConnection};
use tidegate::client::postgres::Database;
use tidegate::client::{CounterOptions, Counters};
use tidegate::config::{Needs, Sources};
use tidegate::model::pipeline::{Identifier, Mode, Pipeline};
use tidegate::ops::sandbox::{Postgres, Valkey};
use tidegate::valkey::{Command, Connection, Endpoint};
use tidegate_lab::accounts::Accounts;
use tidegate_lab::harness::{Client, Daemon, Lab, Resp, STREAM, eventually, migrate};
use tokio::time::Instant;

/// More than fit into the memory.
const COUNTERS: usize = 60_000;
const PRODUCERS: u64 = 3;
const REST: Duration = Duration::from_millis(10);
const POLICIES: [&str; 4] = ["volatile-lru", "volatile-lfu", "volatile-ttl", "volatile-random"];
const STATE: &str = "tidegate:state:{flush:counters}:flush:counters:counters";
const INDEX: &str = "tidegate:dirty:{flush:counters}:flush:counters:counters";

#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// How many runs
    #[arg(long, default_value_t = 10)]
    runs: u32,
    /// How long each goes on under faults
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Of the schedules; by default others each time
    #[arg(long)]
    seed: Option<u64>,
}

/// Who keeps the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Tidegate.
    Managed,
    /// GET, and where there is nothing SELECT and SET NX EX; INCRBY; XADD; a plain pipeline flushes.
    ByHand,
}

/// What came of one run.
#[derive(Debug, Default)]
struct Outcome {
    accepted: u64,
    refused: u64,
    kills: u32,
    cuts: u32,
    deleted: i64,
    stops: u32,
    evicted: u64,
    wrong_rows: usize,
    shown: usize,
    wrong_shown: usize,
    /// Values that were brought back in the end; Tidegate's alone.
    brought: usize,
    wrong_brought: usize,
    /// Everything was flushed so long after the last fault.
    drained: Duration,
}

pub async fn run(args: Args) -> bool {
    let seed = args.seed.unwrap_or_else(rand::random);
    println!("seed {seed}, {} runs of {} s, {COUNTERS} counters, {PRODUCERS} producers", args.runs, args.seconds);
    let (mut rows, mut values, mut by_hand) = (0, 0, (0, 0));
    for n in 0..args.runs {
        let (policy, megabytes) = (POLICIES[n as usize % POLICIES.len()], 3 + u64::from(n % 2));
        for way in [Way::Managed, Way::ByHand] {
            let outcome =
                soak(way, seed.wrapping_add(n.into()), policy, megabytes, Duration::from_secs(args.seconds)).await;
            println!("{:>3}  {megabytes} MB {policy:<15} {way:?}: {outcome}", n + 1);
            match way {
                Way::Managed => {
                    (rows, values) = (rows + outcome.wrong_rows, values + outcome.wrong_shown + outcome.wrong_brought)
                }
                Way::ByHand => by_hand = (by_hand.0 + outcome.wrong_shown, by_hand.1 + outcome.shown),
            }
        }
    }
    let share = by_hand.0 as f64 * 100.0 / by_hand.1.max(1) as f64;
    println!("managed: {rows} rows and {values} shown values wrong; by hand: {share:.1} % of the shown values wrong");
    let holds = rows == 0 && values == 0;
    println!("seed {seed}: {}", if holds { "exact" } else { "BROKEN" });
    holds
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} accepted, {} refused; {} kills, {} cuts, {} deleted, {} stops of PostgreSQL, {} evicted; drained in {:.1} s; wrong: {} rows, {} of {} values that were there, {} of {} that were brought",
            self.accepted,
            self.refused,
            self.kills,
            self.cuts,
            self.deleted,
            self.stops,
            self.evicted,
            self.drained.as_secs_f64(),
            self.wrong_rows,
            self.wrong_shown,
            self.shown,
            self.wrong_brought,
            self.brought
        )
    }
}

async fn soak(way: Way, seed: u64, policy: &str, megabytes: u64, lasting: Duration) -> Outcome {
    let mut postgres = Postgres::start(&[]).await.expect("PostgreSQL starts");
    postgres.create_database(&Identifier::parse("soak").expect("a name"), None).await.expect("created");
    migrate(&postgres.url("soak")).await;
    let valkey = Valkey::start(&["--maxmemory-policy", policy, "--save", ""]).await.expect("Valkey starts");
    let lab = Lab { valkey, database: postgres.url("soak") };
    let insert = "insert into public.counters select 'c' || n, n % 100, now() from generate_series";
    lab.execute(&format!("{insert}(0, {}) n", COUNTERS - 1)).await;
    let mut workers = [worker(&lab, way), worker(&lab, way)];
    is_ready(&lab, way).await;
    let mut client = lab.client().await;
    client.call(&["CONFIG", "SET", "maxmemory", &(megabytes * 1_000_000).to_string()]).await;

    let accounts = Arc::new(Accounts::new((0..COUNTERS).map(|n| n as i64 % 100).collect()));
    let until = Instant::now() + lasting;
    let producers: Vec<_> = (0..PRODUCERS)
        .map(|n| tokio::spawn(produce(way, lab.valkey.url(), lab.database.clone(), accounts.clone(), seed ^ n, until)))
        .collect();
    let (mut outcome, mut random, mut back) = (Outcome::default(), StdRng::seed_from_u64(seed), None);
    while Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(50)).await;
        if back.is_some_and(|back| Instant::now() >= back) {
            postgres.restart().await.expect("PostgreSQL comes back");
            back = None;
        }
        match random.random_range(0..200) {
            0..6 => {
                let n = random.random_range(0..workers.len());
                workers[n].kill().await;
                workers[n] = worker(&lab, way);
                outcome.kills += 1;
            }
            6..20 => outcome.cuts += cut(&mut client, &mut random).await,
            20..110 => {
                // Among the hottest: they are seldom without deltas that are not flushed.
                let id = format!("counter:c{}", random.random_range(0..200));
                outcome.deleted += client.call(&["DEL", &id]).await.int().unwrap_or(0);
            }
            110 if back.is_none() => {
                postgres.stop();
                outcome.stops += 1;
                back = Some(Instant::now() + Duration::from_millis(random.random_range(1_000..5_000)));
            }
            _ => {}
        }
    }
    for producer in producers {
        let (accepted, refused) = producer.await.expect("a value that was read is right");
        (outcome.accepted, outcome.refused) = (outcome.accepted + accepted, outcome.refused + refused);
    }
    if back.is_some() {
        postgres.restart().await.expect("PostgreSQL comes back");
    }
    let calm = Instant::now();
    eventually("pending", 0, async || lab.pending().await).await;
    eventually("undelivered", Some(0), async || lab.group("lag").await.int()).await;
    eventually("dirty counters", Some(0), async || lab.client().await.call(&["HLEN", INDEX]).await.int()).await;
    outcome.drained = calm.elapsed();
    judge(&lab, &accounts, &mut outcome).await;
    if way == Way::Managed {
        bring_back(&lab, &accounts, &mut outcome).await;
    }
    outcome
}

fn worker(lab: &Lab, way: Way) -> Daemon {
    let mut command = lab.program(&["run"]);
    command
        .env("TIDEGATE__TRIM__RETENTION", "0s")
        .env("TIDEGATE__COMPACT__MARGIN", "1s")
        .env("TIDEGATE__LOG__LEVEL", "error");
    if way == Way::Managed {
        command.env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed");
    }
    Daemon::start(command)
}

async fn is_ready(lab: &Lab, way: Way) {
    let key: &[&str] = if way == Way::Managed { &["HEXISTS", STATE, "lineage"] } else { &["EXISTS", STREAM] };
    eventually("a worker", Some(1), async || lab.client().await.call(key).await.int()).await;
}

/// Cuts one connection of Tidegate's, a worker's or a producer's.
async fn cut(client: &mut Client, random: &mut StdRng) -> u32 {
    let list = client.call(&["CLIENT", "LIST"]).await.text();
    let of_tidegate = list.lines().filter(|line| line.contains("name=tidegate"));
    let ids: Vec<&str> = of_tidegate.filter_map(|line| line.split(' ').next()?.strip_prefix("id=")).collect();
    if ids.is_empty() {
        return 0;
    }
    let id = ids[random.random_range(0..ids.len())];
    client.call(&["CLIENT", "KILL", "ID", id]).await;
    1
}

/// Adds and reads until the time is over; gives how many increments were accepted, and how many refused.
async fn produce(
    way: Way,
    valkey: String,
    database: String,
    accounts: Arc<Accounts>,
    seed: u64,
    until: Instant,
) -> (u64, u64) {
    let limit = Duration::from_secs(5);
    let endpoint = Endpoint::new(valkey.into(), limit, limit);
    let (mut random, mut accepted, mut refused) = (StdRng::seed_from_u64(seed), 0, 0);
    // Who is refused rests for a moment, as a program would.
    let mut count = async |is_accepted: bool| match is_accepted {
        true => accepted += 1,
        false => {
            refused += 1;
            tokio::time::sleep(REST).await;
        }
    };
    // A few are hot.
    let pick = |random: &mut StdRng| (random.random_range(0.0..1.0f64).powi(4) * COUNTERS as f64) as usize;
    if way == Way::ByHand {
        let mut by_hand =
            ByHand { valkey: Connection::open_unnamed(&endpoint).await.expect("connected"), database, open: None };
        while Instant::now() < until {
            let of = pick(&mut random);
            match random.random_range(0..3) {
                0 => by_hand.bring(of).await,
                _ => count(by_hand.add(&accounts, of).await).await,
            }
        }
        return (accepted, refused);
    }
    let counters = counters(&endpoint, &database).await;
    while Instant::now() < until {
        let picks = [pick(&mut random), pick(&mut random), pick(&mut random)];
        match random.random_range(0..6) {
            0..2 => drop(accounts.get(&counters, picks[0]).await),
            2 => count(accounts.add(&counters, &mut random, &picks).await).await,
            _ => count(accounts.add(&counters, &mut random, &picks[..1]).await).await,
        }
    }
    (accepted, refused)
}

async fn counters(valkey: &Endpoint, database: &str) -> Counters<Database> {
    let pipeline = Pipeline { mode: Mode::Managed, ..Pipeline::counters() };
    let mut env = vec![("DATABASE_URL".to_owned(), database.to_owned())];
    for key in ["STATEMENT_TIMEOUT", "LOCK_TIMEOUT", "CONNECT_TIMEOUT"] {
        env.push((format!("TIDEGATE__POSTGRES__{key}"), "1s".into()));
    }
    let sources = Sources { env: env.into_iter().collect(), ..Sources::default() };
    let loaded = tidegate::config::load(&sources, Needs::POSTGRES).expect("valid");
    let truth = Database::new(loaded.config.postgres.address().expect("set"), "main", &pipeline, 4);
    let options = CounterOptions {
        lease: Duration::from_secs(2),
        breaker: Duration::from_millis(50),
        retry_for: Duration::from_secs(20),
        ..CounterOptions::default()
    };
    Counters::connect(valkey, &pipeline, truth, options).await.expect("connected")
}

/// The pattern that people write.
struct ByHand {
    valkey: Connection,
    database: String,
    open: Option<PgConnection>,
}

impl ByHand {
    async fn add(&mut self, accounts: &Accounts, of: usize) -> bool {
        self.bring(of).await;
        let (id, key) = (format!("c{of}"), format!("counter:c{of}"));
        if self.valkey.call(Command::new("INCRBY").arg(key).arg(1)).await.is_err() {
            return false;
        }
        accounts.sent(of, 1);
        let entry = Command::new("XADD").arg(STREAM).arg("*").arg("id").arg(id).arg("amount").arg(1);
        let is_added = self.valkey.call(entry).await.is_ok();
        if is_added {
            accounts.accepted(of, 1);
        }
        is_added
    }

    /// What is not there is read from PostgreSQL and put in place, unless somebody was quicker. Without PostgreSQL it goes on without.
    async fn bring(&mut self, of: usize) {
        let key = format!("counter:c{of}");
        if self.valkey.call(Command::new("GET").arg(&key)).await.is_ok_and(|reply| reply.as_text().is_some()) {
            return;
        }
        if self.open.is_none() {
            self.open = PgConnection::connect(&self.database).await.ok();
        }
        let Some(open) = &mut self.open else { return };
        let row =
            sqlx::query_scalar::<_, i64>("select value from public.counters where id = $1").bind(format!("c{of}"));
        let Ok(value) = row.fetch_one(open).await else {
            self.open = None;
            return;
        };
        let _ = self.valkey.call(Command::new("SET").arg(&key).arg(value).arg("NX").arg("EX").arg(60)).await;
    }
}

/// Reads what was touched from a client that knows nothing: what is absent comes from PostgreSQL.
async fn bring_back(lab: &Lab, accounts: &Accounts, outcome: &mut Outcome) {
    let limit = Duration::from_secs(5);
    let counters = counters(&Endpoint::new(lab.valkey.url().into(), limit, limit), &lab.database).await;
    let touched: Vec<usize> = (0..COUNTERS).filter(|of| accounts.most(*of) != accounts.initial(*of)).collect();
    for some in touched.chunks(500) {
        let ids: Vec<String> = some.iter().map(|of| format!("c{of}")).collect();
        let names: Vec<&str> = ids.iter().map(String::as_str).collect();
        for (of, count) in some.iter().zip(counters.get_many(&names).await) {
            let Some(value) = count.exact() else { continue };
            outcome.brought += 1;
            outcome.wrong_brought += usize::from(!(accounts.least(*of)..=accounts.most(*of)).contains(&value));
        }
    }
}

/// Compares every row, and every value that Valkey shows, with what producers were told.
async fn judge(lab: &Lab, accounts: &Accounts, outcome: &mut Outcome) {
    let (mut database, mut client) = (lab.sql().await, lab.client().await);
    let query = "select substr(id, 2)::bigint, value from public.counters";
    let rows: Vec<(i64, i64)> = sqlx::query_as(query).fetch_all(&mut database).await.expect("rows");
    for rows in rows.chunks(500) {
        let gets: Vec<[String; 2]> = rows.iter().map(|(of, _)| ["GET".to_owned(), format!("counter:c{of}")]).collect();
        for ((of, value), reply) in rows.iter().zip(client.pipeline(&gets).await) {
            let of = *of as usize;
            outcome.wrong_rows += usize::from(!(accounts.least(of)..=accounts.most(of)).contains(value));
            if let Resp::Text(text) = reply {
                outcome.shown += 1;
                outcome.wrong_shown += usize::from(String::from_utf8_lossy(&text) != value.to_string());
            }
        }
    }
    let stats = client.call(&["INFO", "stats"]).await.text();
    let evicted = stats.lines().find_map(|line| line.strip_prefix("evicted_keys:")?.trim().parse().ok());
    outcome.evicted = evicted.unwrap_or(0);
}
