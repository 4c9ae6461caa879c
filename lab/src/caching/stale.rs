//! Stale: rows are written and read all the time; how often a reader sees an older row than the one that was committed before it asked.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::rc::Rc;
use std::time::Duration;

use rand::RngExt;
use sqlx::{Connection as _, PgConnection};
use tidegate::client::{Cache, CacheOptions};
use tidegate::functions;
use tidegate::valkey::Connection;
use tidegate_lab::harness::Lab;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Table, endpoint, percent, words};

const ROWS: usize = 50;
const WRITERS: usize = 4;
const READERS: usize = 12;
/// One write in so many is its writer's last: it dies between COMMIT and what it would tell the cache.
const DEATHS: u32 = 100;
/// How long the fence of a writer that died stands.
const FENCE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Set,
    Del,
    Ours,
}

type AppError = Box<dyn Error + Send + Sync>;

/// What a run shares: the version of each row that is known to be committed, and what was seen.
struct Run {
    way: Way,
    committed: RefCell<Vec<i64>>,
    writes: Cell<u64>,
    reads: Cell<u64>,
    stale: Cell<u64>,
    until: Instant,
    by_hand: Connection,
    cache: Cache<String>,
}

pub(super) async fn table(lasting: Duration) -> Result<Table, Box<dyn Error>> {
    let mut rows = Vec::new();
    for (name, way) in [
        ("by hand: COMMIT, then SET", Way::Set),
        ("by hand: COMMIT, then DEL", Way::Del),
        ("tidegate: fence, COMMIT, lift", Way::Ours),
    ] {
        let (run, wrong) = measure(way, lasting).await.map_err(|error| error.to_string())?;
        rows.push(vec![
            name.to_owned(),
            run.writes.get().to_string(),
            run.reads.get().to_string(),
            percent(run.stale.get(), run.reads.get()),
            format!("{wrong} of {ROWS}"),
        ]);
    }
    Ok(Table {
        name: "stale",
        title: format!(
            "{ROWS} rows, {WRITERS} writers of whom one in {DEATHS} dies behind its COMMIT, {READERS} readers, {} s",
            lasting.as_secs()
        ),
        head: &["", "writes", "reads", "older than what was committed before the question", "wrong at rest"],
        rows,
        plotted: (3, "Reads of a row older than what was committed before"),
    })
}

async fn measure(way: Way, lasting: Duration) -> Result<(Rc<Run>, usize), AppError> {
    let lab = Lab::new().await;
    lab.execute("create table public.rows (id int primary key, version bigint not null)").await;
    lab.execute(&format!("insert into public.rows select n, 0 from generate_series(0, {}) n", ROWS - 1)).await;
    let valkey = endpoint(&lab.valkey.url());
    let connection = || Connection::open_unnamed(&valkey);
    functions::load(&connection().await?).await?;
    let options = CacheOptions { fence: FENCE, ..CacheOptions::default() };
    let run = Rc::new(Run {
        way,
        committed: RefCell::new(vec![0; ROWS]),
        writes: Cell::new(0),
        reads: Cell::new(0),
        stale: Cell::new(0),
        until: Instant::now() + lasting,
        by_hand: connection().await?,
        cache: Cache::new(&valkey, "rows", options),
    });
    let mut tasks = JoinSet::new();
    for n in 0..WRITERS + READERS {
        let (run, database) = (run.clone(), Mutex::new(PgConnection::connect(&lab.database).await?));
        tasks.spawn_local(async move {
            while Instant::now() < run.until {
                let id = rand::random_range(0..ROWS);
                let done = if n < WRITERS { run.write(id, &database).await } else { run.look(id, &database).await };
                if let Err(error) = done {
                    eprintln!("stale: {error}");
                }
                tokio::time::sleep(Duration::from_millis(if n < WRITERS { 5 } else { 1 })).await;
            }
        });
    }
    tasks.join_all().await;
    // The fences of those who died have run out by then.
    tokio::time::sleep(FENCE * 2).await;
    let (mut wrong, database) = (0, Mutex::new(PgConnection::connect(&lab.database).await?));
    for id in 0..ROWS {
        wrong += usize::from(run.read(id, &database).await? != version(id, &database).await?);
    }
    Ok((run, wrong))
}

async fn version(id: usize, database: &Mutex<PgConnection>) -> Result<i64, AppError> {
    let query = sqlx::query_scalar("select version from public.rows where id = $1").bind(id as i32);
    Ok(query.fetch_one(&mut *database.lock().await).await?)
}

impl Run {
    async fn look(&self, id: usize, database: &Mutex<PgConnection>) -> Result<(), AppError> {
        let least = self.committed.borrow()[id];
        let seen = self.read(id, database).await?;
        self.reads.set(self.reads.get() + 1);
        self.stale.set(self.stale.get() + u64::from(seen < least));
        Ok(())
    }

    async fn read(&self, id: usize, database: &Mutex<PgConnection>) -> Result<i64, AppError> {
        let text = if self.way == Way::Ours {
            let load = async || Ok(Some(version(id, database).await?.to_string()));
            self.cache.get(&id.to_string(), load).await?.map(|row| row.to_string()).unwrap_or_default()
        } else {
            let key = format!("row:{id}");
            match self.by_hand.call(words("GET", [&key])).await?.as_text() {
                Some(text) => text.to_owned(),
                None => {
                    let row = version(id, database).await?.to_string();
                    self.by_hand.call(words("SET", [&key, &row, "EX", "300"])).await?;
                    row
                }
            }
        };
        Ok(text.parse()?)
    }

    async fn write(&self, id: usize, database: &Mutex<PgConnection>) -> Result<(), AppError> {
        let dies = rand::rng().random_ratio(1, DEATHS);
        self.writes.set(self.writes.get() + 1);
        if self.way == Way::Ours {
            let name = id.to_string();
            if dies {
                let _fence = self.cache.fence(&[&name]).await?;
                self.commit(id, database).await?;
                return Ok(());
            }
            self.cache
                .write(&name, async || Ok(((), Some(Some(self.commit(id, database).await?.to_string())))))
                .await?;
            return Ok(());
        }
        let (new, key) = (self.commit(id, database).await?.to_string(), format!("row:{id}"));
        let tell = match self.way {
            Way::Set => words("SET", [&key, &new, "EX", "300"]),
            _ => words("DEL", [&key]),
        };
        if !dies {
            self.by_hand.call(tell).await?;
        }
        Ok(())
    }

    async fn commit(&self, id: usize, database: &Mutex<PgConnection>) -> Result<i64, AppError> {
        let query = sqlx::query_scalar("update public.rows set version = version + 1 where id = $1 returning version")
            .bind(id as i32);
        let new: i64 = query.fetch_one(&mut *database.lock().await).await?;
        let mut committed = self.committed.borrow_mut();
        committed[id] = committed[id].max(new);
        Ok(new)
    }
}
