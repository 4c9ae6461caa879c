//! Counting: counters that are added to and read where Valkey evicts; how many are wrong at rest, and how many increments were refused.

use std::error::Error;
use std::time::Duration;

use rand::RngExt;
use sqlx::{Connection as _, PgConnection};
use tidegate::client::postgres::Database;
use tidegate::client::{CounterOptions, Counters};
use tidegate::config::{Needs, Sources};
use tidegate::model::pipeline::{Mode, Pipeline};
use tidegate::ops::sandbox::Valkey;
use tidegate::valkey::Connection;
use tidegate_lab::harness::{Daemon, Lab, STREAM, eventually};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Table, connect, endpoint, percent, words};

const COUNTERS: usize = 20_000;
const PRODUCERS: usize = 3;
/// What Valkey may have above what it needs for itself: not all counters fit.
const ROOM: u64 = 1_000_000;
/// In every so long, ...
const ROUND: Duration = Duration::from_secs(2);
/// ... somebody holds the table's lock for so long: flushes wait, reads do not.
const HELD: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    WithTtl,
    WithoutTtl,
    Ours,
}

pub(super) async fn table(lasting: Duration) -> Result<Table, Box<dyn Error>> {
    let mut rows = Vec::new();
    for (name, way) in [
        ("by hand: SET NX EX on a miss, INCRBY, XADD", Way::WithTtl),
        ("by hand, without a TTL", Way::WithoutTtl),
        ("tidegate: `add` and `get`", Way::Ours),
    ] {
        rows.push([vec![name.to_owned()], measure(way, lasting).await?].concat());
    }
    Ok(Table {
        name: "counting",
        title: format!(
            "{COUNTERS} counters, {PRODUCERS} producers, volatile-lru with 1 MB of room, the table locked for {} of every {} ms, {} s",
            HELD.as_millis(),
            ROUND.as_millis(),
            lasting.as_secs()
        ),
        head: &["", "increments accepted", "refused", "values at rest", "of them wrong", "evicted"],
        rows,
        plotted: (4, "Values at rest that are wrong"),
    })
}

async fn measure(way: Way, lasting: Duration) -> Result<Vec<String>, Box<dyn Error>> {
    let lab = Lab { valkey: Valkey::start(&["--maxmemory-policy", "volatile-lru"]).await?, ..Lab::new().await };
    let insert = "insert into public.counters select 'c' || n, n % 100, now() from generate_series";
    lab.execute(&format!("{insert}(0, {}) n", COUNTERS - 1)).await;
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__TRIM__RETENTION", "0s").env("TIDEGATE__LOG__LEVEL", "warn");
    if way == Way::Ours {
        command.env("TIDEGATE__PIPELINES__COUNTERS__MODE", "managed");
    }
    let _daemon = Daemon::start(command);
    eventually("a group", Some(1), async || lab.client().await.call(&["EXISTS", STREAM]).await.int()).await;
    let info = lab.client().await.call(&["INFO", "memory"]).await.text();
    let used =
        info.lines().find_map(|line| line.strip_prefix("used_memory:")?.parse::<u64>().ok()).ok_or("no used_memory")?;
    lab.client().await.call(&["CONFIG", "SET", "maxmemory", &(used + ROOM).to_string()]).await;
    let until = Instant::now() + lasting;
    let mut producers = JoinSet::new();
    for _ in 0..PRODUCERS {
        let producer = Producer::new(way, &lab).await?;
        producers.spawn_local(producer.run(until));
    }
    let holding = tokio::task::spawn_local(hold_up(PgConnection::connect(&lab.database).await?, until));
    let (accepted, refused) =
        producers.join_all().await.into_iter().fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
    holding.await??;
    eventually("pending", 0, async || lab.pending().await).await;
    eventually("the lag", Some(0), async || lab.group("lag").await.int()).await;
    let mut database = PgConnection::connect(&lab.database).await?;
    let rows: Vec<(String, i64)> =
        sqlx::query_as("select id, value from public.counters").fetch_all(&mut database).await?;
    let (mut shown, mut wrong, mut client) = (0, 0, lab.client().await);
    for rows in rows.chunks(500) {
        let gets: Vec<[String; 2]> = rows.iter().map(|(id, _)| ["GET".to_owned(), format!("counter:{id}")]).collect();
        for ((_, value), reply) in rows.iter().zip(client.pipeline(&gets).await) {
            if let tidegate_lab::harness::Resp::Text(text) = reply {
                shown += 1;
                wrong += u64::from(String::from_utf8_lossy(&text) != value.to_string());
            }
        }
    }
    let stats = client.call(&["INFO", "stats"]).await.text();
    let evicted = stats.lines().find_map(|line| line.strip_prefix("evicted_keys:")).unwrap_or_default().to_owned();
    Ok(vec![
        accepted.to_string(),
        refused.to_string(),
        shown.to_string(),
        format!("{wrong} ({})", percent(wrong, shown)),
        evicted,
    ])
}

/// A migration, a vacuum, a slow disk: flushes wait every now and then.
async fn hold_up(mut database: PgConnection, until: Instant) -> Result<(), sqlx::Error> {
    while Instant::now() + ROUND < until {
        tokio::time::sleep(ROUND - HELD).await;
        let lock = format!(
            "begin; lock table public.counters in exclusive mode; select pg_sleep({}); commit",
            HELD.as_secs_f64()
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(lock)).execute(&mut database).await?;
    }
    Ok(())
}

enum Producer {
    ByHand { valkey: Connection, database: PgConnection, has_ttl: bool },
    Ours(Box<Counters<Database>>),
}

impl Producer {
    async fn new(way: Way, lab: &Lab) -> Result<Producer, Box<dyn Error>> {
        if way != Way::Ours {
            let (valkey, database) = (connect(&lab.valkey.url()).await?, PgConnection::connect(&lab.database).await?);
            return Ok(Producer::ByHand { valkey, database, has_ttl: way == Way::WithTtl });
        }
        let pipeline = Pipeline { mode: Mode::Managed, ..Pipeline::counters() };
        let env = [("DATABASE_URL".into(), lab.database.clone())].into();
        let loaded = tidegate::config::load(&Sources { env, ..Sources::default() }, Needs::POSTGRES)
            .map_err(|_| "the database's url is refused")?;
        let address = loaded.config.postgres.address().map_err(|_| "no database")?;
        let database = Database::new(address, "main", &pipeline, 4);
        let valkey = endpoint(&lab.valkey.url());
        let counters = Counters::connect(&valkey, &pipeline, database, CounterOptions::default()).await?;
        Ok(Producer::Ours(Box::new(counters)))
    }

    /// Adds twice and reads once, and so on; gives how many increments were accepted, and how many refused.
    async fn run(mut self, until: Instant) -> (u64, u64) {
        let (mut accepted, mut refused) = (0, 0);
        while Instant::now() < until {
            let of = (rand::rng().random_range(0.0..1.0f64).powi(4) * COUNTERS as f64) as usize;
            let id = format!("c{of}");
            if rand::rng().random_ratio(1, 3) {
                self.get(&id).await;
                continue;
            }
            match self.add(&id).await {
                true => accepted += 1,
                false => refused += 1,
            }
        }
        (accepted, refused)
    }

    async fn get(&mut self, id: &str) {
        match self {
            Producer::Ours(counters) => drop(counters.get(id).await.exact()),
            Producer::ByHand { valkey, database, has_ttl } => bring(valkey, database, id, *has_ttl).await,
        }
    }

    async fn add(&mut self, id: &str) -> bool {
        match self {
            Producer::Ours(counters) => counters.add(id, 1).await.is_ok(),
            Producer::ByHand { valkey, database, has_ttl } => {
                bring(valkey, database, id, *has_ttl).await;
                let sum = valkey.call(words("INCRBY", [&format!("counter:{id}"), "1"])).await;
                sum.is_ok() && valkey.call(words("XADD", [STREAM, "*", "id", id, "amount", "1"])).await.is_ok()
            }
        }
    }
}

/// Cache-aside by hand: what is not there is read from PostgreSQL and put in place, unless somebody was quicker.
async fn bring(valkey: &Connection, database: &mut PgConnection, id: &str, has_ttl: bool) {
    let key = format!("counter:{id}");
    if valkey.call(words("GET", [&key])).await.is_ok_and(|reply| reply.as_text().is_some()) {
        return;
    }
    let row = sqlx::query_scalar::<_, i64>("select value from public.counters where id = $1").bind(id);
    let value = row.fetch_optional(database).await.ok().flatten().unwrap_or(0).to_string();
    let _ = match has_ttl {
        true => valkey.call(words("SET", [&key, &value, "NX", "EX", "60"])).await,
        false => valkey.call(words("SET", [&key, &value, "NX"])).await,
    };
}
