//! Producers and workers under a random schedule of faults, in rounds: three quarters of the time faults, then calm, then the
//! producers stop until nothing is pending, and everything is compared. The books are looked at all the time.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};
use tidegate::model::pipeline::Identifier;
use tidegate::ops::sandbox::{Postgres, Valkey};
use tokio::task::JoinSet;

use crate::books::{Books, Verdicts};
use crate::faults::{Dice, Fault, Reading, Stage};
use crate::journal::{Journal, WRITERS, Writer};
use crate::operators_table;
use tidegate_lab::harness::{Client, GROUP, Resp, STREAM, migrate};

/// Worker processes.
const WORKERS: usize = 4;
/// A round's faults last so long.
const STORM: Duration = Duration::from_secs(15);
/// Then nobody harms anything for so long, and producers go on.
const CALM: Duration = Duration::from_secs(5);
/// Then they stop, and everything must be settled, without any help, within this.
const SETTLED_WITHIN: Duration = Duration::from_secs(30);
/// Between two faults.
const LULL_MS: (u64, u64) = (10, 180);
/// Between two looks at the books.
const LOOK_EVERY: Duration = Duration::from_millis(400);
/// Entries a writer adds at once.
const CHUNK: u32 = 50;

#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// How long, about
    #[arg(long, default_value_t = 300)]
    seconds: u64,
    /// Of the schedule; by default another one each time
    #[arg(long)]
    seed: Option<u64>,
    /// Entries a second, all writers together
    #[arg(long, default_value_t = 40_000)]
    rate: u32,
    /// How the stream is read
    #[arg(long, value_enum, default_value_t = Reading::Both)]
    delivery: Reading,
    /// Beside the counters a table with every operator is written, from the same read
    #[arg(long)]
    tables: bool,
    /// A file that gets a line about this run
    #[arg(long)]
    results: Option<PathBuf>,
}

/// What came out of all rounds.
#[derive(Debug, Default)]
struct Total {
    verdicts: Verdicts,
    looks: u64,
    rounds: u32,
    slowest: Duration,
    wrong: Vec<String>,
}

pub async fn run(args: Args) -> bool {
    let seed = args.seed.unwrap_or_else(rand::random);
    let durable = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""];
    let valkey = Valkey::start(&durable).await.expect("Valkey starts");
    let postgres = Postgres::start(&[]).await.expect("PostgreSQL starts");
    postgres.create_database(&Identifier::parse("soak").expect("a name"), None).await.expect("created");
    migrate(&postgres.url("soak")).await;
    if args.tables {
        let mut sql = PgConnection::connect(&postgres.url("soak")).await.expect("PostgreSQL answers");
        operators_table::create(&mut sql).await;
    }
    let versions = versions(&valkey, &postgres.url("soak")).await;
    println!(
        "seed {seed}, {versions}, {WORKERS} workers, delivery {}, {WRITERS} writers, {} entries/s, {} s",
        args.delivery, args.rate, args.seconds
    );
    let mut stage = Stage::set(valkey, postgres, "soak".into(), WORKERS, args.delivery, args.tables).await;
    let (mut dice, mut total) = (Dice::of(seed), Total::default());
    let started = Instant::now();
    while started.elapsed().as_secs() < args.seconds && total.wrong.is_empty() {
        total.rounds += 1;
        if let Err(error) = round(&mut stage, &mut dice, &args, &mut total).await {
            total.wrong.push(error);
        }
        let v = &total.verdicts;
        println!(
            "round {:>3}  {:>5} s  entries {:>9}  applied {:>9}  recovered {:>6}  buried {:>6}  never {:>6}  lost {:?}  doubled {}  kills {}",
            total.rounds,
            started.elapsed().as_secs(),
            v.attempted,
            v.ok + v.recovered,
            v.recovered,
            v.buried,
            v.never,
            v.lost,
            v.doubled,
            stage.counts.get(&Fault::Kill).copied().unwrap_or(0)
        );
        total.wrong.iter().for_each(|wrong| println!("   {wrong}"));
    }
    report(&args, seed, &versions, &stage, &total, started.elapsed())
}

/// One storm, the calm behind it, and the reckoning.
async fn round(stage: &mut Stage, dice: &mut Dice, args: &Args, total: &mut Total) -> Result<(), String> {
    let (number, port) = (total.rounds, stage.valkey.port());
    let mut client = Client::try_connect(port).await.map_err(|e| e.to_string())?;
    let mut books = Books::open(number, args.tables, &mut client).await.map_err(|e| e.to_string())?;
    let over = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        writers.spawn(produce(Writer::new(number, writer), port, args.rate / WRITERS, over.clone()));
    }
    let (watched, url) = (over.clone(), stage.url());
    let watch = tokio::spawn(async move {
        let (mut looks, mut wrong) = (0, Vec::new());
        while !watched.load(Ordering::Relaxed) && wrong.is_empty() {
            tokio::time::sleep(LOOK_EVERY).await;
            // Either server may be away: then there is nothing to be seen.
            let Ok(Ok(mut sql)) = tokio::time::timeout(LOOK_EVERY, PgConnection::connect(&url)).await else { continue };
            let Ok(mut client) = Client::try_connect(port).await else { continue };
            if let Ok(findings) = books.look(&mut sql, &mut client).await {
                looks += 1;
                wrong = findings.wrong;
            }
        }
        (books, looks, wrong)
    });
    let storm = Instant::now();
    while storm.elapsed() < STORM {
        let fault = dice.fault();
        stage.play(fault, dice).await;
        stage.end_some(Instant::now());
        tokio::time::sleep(dice.ms(LULL_MS.0, LULL_MS.1)).await;
    }
    stage.calm();
    tokio::time::sleep(CALM).await;
    over.store(true, Ordering::Relaxed);
    let calm = Instant::now();
    let journal = Journal::of(writers.join_all().await);
    let (mut books, looks, wrong) = watch.await.map_err(|e| e.to_string())?;
    total.looks += looks;
    total.wrong.extend(wrong);
    let mut client = Client::try_connect(port).await.map_err(|e| e.to_string())?;
    while !is_settled(&mut client).await.map_err(|e| e.to_string())? {
        books.read_stream(&mut client).await.map_err(|e| e.to_string())?;
        if calm.elapsed() > SETTLED_WITHIN {
            total.wrong.push(format!("not settled within {} s", SETTLED_WITHIN.as_secs()));
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    total.slowest = total.slowest.max(calm.elapsed());
    let mut sql = PgConnection::connect(&stage.url()).await.map_err(|e| e.to_string())?;
    let (verdicts, findings) = books.close(&mut sql, &mut client, &journal).await?;
    total.verdicts.add(&verdicts);
    total.wrong.extend(findings.wrong);
    Ok(())
}

/// Adds entries at a steady rate until the round is over; what is refused or unanswered is never tried again.
async fn produce(mut writer: Writer, port: u16, rate: u32, over: Arc<AtomicBool>) -> Writer {
    let mut tick = tokio::time::interval(Duration::from_secs(1) * CHUNK / rate);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut client = None;
    while !over.load(Ordering::Relaxed) {
        tick.tick().await;
        client = match client {
            None => Client::try_connect(port).await.ok(),
            Some(mut open) => writer.write(&mut open, CHUNK).await.is_ok().then_some(open),
        };
    }
    writer
}

/// Whether the group has read everything and holds nothing.
async fn is_settled(client: &mut Client) -> std::io::Result<bool> {
    let replies = client.try_pipeline(&[vec!["XINFO", "GROUPS", STREAM], vec!["XINFO", "STREAM", STREAM]]).await?;
    let field = |reply: &Resp, name: &str| {
        let Resp::Array(fields) = reply else { return None };
        let at = fields.iter().position(|field| *field == Resp::Text(name.as_bytes().to_vec()))?;
        fields.get(at + 1).cloned()
    };
    let Resp::Array(groups) = &replies[0] else { return Ok(false) };
    let ours = groups.iter().find(|group| field(group, "name") == Some(Resp::Text(GROUP.as_bytes().to_vec())));
    let Some(ours) = ours else { return Ok(false) };
    let read_all = field(ours, "last-delivered-id") == field(&replies[1], "last-generated-id");
    Ok(read_all && field(ours, "pending") == Some(Resp::Int(0)))
}

async fn versions(valkey: &Valkey, url: &str) -> String {
    let mut sql = PgConnection::connect(url).await.expect("connected");
    let postgres: String = sqlx::query_scalar("show server_version").fetch_one(&mut sql).await.expect("readable");
    let postgres = postgres.split(' ').next().unwrap_or_default().to_owned();
    format!(
        "tidegate {}, Valkey {}, PostgreSQL {postgres}",
        env!("CARGO_PKG_VERSION"),
        valkey.version().unwrap_or_default()
    )
}

fn report(args: &Args, seed: u64, versions: &str, stage: &Stage, total: &Total, lasted: Duration) -> bool {
    let (v, heard) = (&total.verdicts, &stage.heard);
    let told = |sum: &std::sync::atomic::AtomicU64| sum.load(Ordering::Relaxed);
    let lost: usize = v.lost.iter().sum();
    let enough_died = stage.died == 0;
    let holds = total.wrong.is_empty() && v.hold() && enough_died && told(&heard.lost_upstream) == 0;
    let verdict = if holds { "exactly once" } else { "BROKEN" };
    println!("\nfaults");
    stage.counts.iter().for_each(|(fault, count)| println!("  {count:>6}  {fault}"));
    println!(
        "entries   attempted {}  acknowledged {}  applied {}  of them unanswered {}  dead letters {}  never happened {}",
        v.attempted,
        v.acked,
        v.ok + v.recovered,
        v.recovered,
        v.buried,
        v.never
    );
    println!(
        "verdicts  lost {lost} (beginning, middle, end: {:?})  doubled {}  unexpected {}  collisions {}",
        v.lost, v.doubled, v.unexpected, v.collisions
    );
    println!(
        "workers   recognised {} redelivered entries, reclaimed {}, reported lost upstream {}, ended by themselves {}",
        told(&heard.recognised),
        told(&heard.reclaimed),
        told(&heard.lost_upstream),
        stage.died
    );
    println!(
        "books     looked at {} times under fire; settled within {:.1} s of the last entry, at the slowest of {} rounds",
        total.looks,
        total.slowest.as_secs_f64(),
        total.rounds
    );
    println!("seed {seed}, {} s: {verdict}", lasted.as_secs());
    if let Some(path) = &args.results {
        let faults: u64 = stage.counts.values().sum();
        let least = stage.counts.values().min().copied().unwrap_or(0);
        let line = format!(
            "| {seed} | {versions} | {} | {} | {} | {} | {faults} | {} | {least} | {} | {:.1} | {lost} | {} | {verdict} |\n",
            args.delivery,
            lasted.as_secs(),
            v.attempted,
            v.buried,
            stage.counts.get(&Fault::Kill).copied().unwrap_or(0),
            told(&heard.recognised),
            total.slowest.as_secs_f64(),
            v.doubled
        );
        let file = std::fs::OpenOptions::new().append(true).open(path);
        if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
            println!("{}: {error}", path.display());
        }
    }
    holds
}
