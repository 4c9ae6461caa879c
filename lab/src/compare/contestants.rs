//! Contestants: programs that drain the same stream into the same table.
//!
//! Takes the stage and a contestant; starts it as a process of its own, waits for its end, and gives what it took. Fails
//! with the contestant's last words.

use std::error::Error;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use tidegate::model::pipeline::Delivery;
use tidegate_lab::harness::BROKEN;

use super::Stage;

/// How often a contestant's memory is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Tidegate trims nothing during a run: every contestant reads the same stream.
pub const RETENTION: &str = "24h";
/// A worker with an upsert for each entry gets so many at the most: it would take minutes.
const NAIVE_ENTRIES: usize = 20_000;

/// Somebody who drains the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contestant {
    /// Valkey alone: entries given out by a group and acknowledged, or read by their ids.
    LimitValkey(Delivery),
    /// PostgreSQL alone, over so many connections.
    LimitPostgres(usize),
    /// A hand-written worker in Node, of this kind.
    Node(&'static str),
    /// A hand-written worker in Python.
    Python,
    /// This project with so many workers; or with so many flushes at once, where one reads alone.
    Tidegate(Delivery, usize),
    /// This project without its ledger, to price it.
    LedgerOff,
}

/// All there are: the name, what it promises, and who it is.
pub const ALL: [(&str, &str, Contestant); 14] = [
    ("limit: Valkey alone, XREADGROUP and XACK", "–", Contestant::LimitValkey(Delivery::Group)),
    ("limit: Valkey alone, XREAD", "–", Contestant::LimitValkey(Delivery::Exclusive)),
    ("limit: PostgreSQL alone", "–", Contestant::LimitPostgres(1)),
    ("limit: PostgreSQL alone, 2 connections", "–", Contestant::LimitPostgres(2)),
    ("tidegate, exclusive, 1 flush at a time", "exactly once", Contestant::Tidegate(Delivery::Exclusive, 1)),
    ("tidegate, exclusive, 2 flushes at a time", "exactly once", Contestant::Tidegate(Delivery::Exclusive, 2)),
    ("tidegate, group, 1 worker", "exactly once", Contestant::Tidegate(Delivery::Group, 1)),
    ("tidegate, group, 2 workers", "exactly once", Contestant::Tidegate(Delivery::Group, 2)),
    ("tidegate, group, 1 worker, ledger off", "at least once", Contestant::LedgerOff),
    ("Node, batches", "at least once", Contestant::Node("batch")),
    ("Node, batches, a row for each entry", "exactly once", Contestant::Node("dedup")),
    ("Node, an upsert for each entry", "at least once", Contestant::Node("naive")),
    ("Python, batches", "at least once", Contestant::Python),
    ("tidegate, group, 4 workers", "exactly once", Contestant::Tidegate(Delivery::Group, 4)),
];

/// What a run took.
#[derive(Debug, Clone, Copy)]
pub struct Took {
    /// Seconds at work.
    pub seconds: f64,
    /// Entries done.
    pub entries: usize,
    /// Seconds of its own CPU time.
    pub cpu: f64,
    /// Seconds of Valkey's CPU time meanwhile, by its own account.
    pub valkey: f64,
    /// The most memory it held, in bytes.
    pub memory: u64,
}

/// What a contestant says of itself.
#[derive(Debug, Deserialize)]
struct Told {
    seconds: f64,
}

impl Contestant {
    /// How many of the stream's entries it gets.
    pub fn entries(self, all: usize) -> usize {
        if self == Contestant::Node("naive") { all.min(NAIVE_ENTRIES) } else { all }
    }

    /// What it needs and is not there.
    pub fn missing(self, stage: &Stage) -> Option<&'static str> {
        let needs = |path: &Path, what| (!path.exists()).then_some(what);
        match self {
            Contestant::Node(_) => needs(&stage.node.join("node_modules"), "node and npm: see `make bench-compare`"),
            Contestant::Python => needs(&stage.python, "python3 with venv: see `make bench-compare`"),
            Contestant::LedgerOff => {
                needs(&stage.without_ledger, "a build with the controls: see `make bench-compare`")
            }
            _ => None,
        }
    }

    fn command(self, stage: &Stage) -> Result<Command, Box<dyn Error>> {
        let limit = |name: &str| -> Result<Command, Box<dyn Error>> {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["compare", "--limit", name, "--workloads", stage.workload.name, "--entries"]);
            command.arg(stage.entries.to_string()).env("VALKEY_PORT", stage.valkey.port().to_string());
            Ok(command)
        };
        let tidegate = |program: &Path, delivery: Delivery, workers: usize| {
            let mut command = Command::new(program);
            command.args(["run", "--until-empty", "--workers", &workers.to_string()]);
            command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", delivery.word());
            command.env("TIDEGATE__TRIM__RETENTION", RETENTION).env("TIDEGATE__LOG__FORMAT", "json");
            command
        };
        let mut command = match self {
            Contestant::LimitValkey(Delivery::Group) => limit("valkey")?,
            Contestant::LimitValkey(Delivery::Exclusive) => limit("valkey-xread")?,
            Contestant::LimitPostgres(1) => limit("postgres")?,
            Contestant::LimitPostgres(_) => limit("postgres-2")?,
            Contestant::Node(mode) => {
                let mut command = Command::new("node");
                command.arg("worker.mjs").current_dir(&stage.node).env("MODE", mode);
                command
            }
            Contestant::Python => {
                let mut command = Command::new(&stage.python);
                command.arg(super::PEERS.to_owned() + "/python/worker.py");
                command
            }
            Contestant::Tidegate(delivery, workers) => tidegate(&stage.tidegate, delivery, workers),
            Contestant::LedgerOff => {
                let mut command = tidegate(&stage.without_ledger, Delivery::Group, 1);
                command.env(BROKEN, "ledger_off");
                command
            }
        };
        command.env("VALKEY_URL", stage.valkey.url()).env("DATABASE_URL", stage.database());
        command.env("STREAM", &stage.stream).env("GROUP", &stage.group);
        command.env("LIMIT", self.entries(stage.entries).to_string());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        Ok(command)
    }

    /// Runs it once. What counts is the time from connected to settled, by what the contestant says of itself.
    pub async fn run(self, stage: &Stage) -> Result<Took, Box<dyn Error>> {
        let (cpu_before, valkey_before) = (cpu_of_children()?, stage.valkey_cpu().await?);
        let mut child = self.command(stage)?.spawn()?;
        let status = format!("/proc/{}/status", child.id().unwrap_or(0));
        let (mut stdout, mut stderr) =
            (child.stdout.take().ok_or("no stdout")?, child.stderr.take().ok_or("no stderr")?);
        let (mut out, mut err) = (String::new(), String::new());
        let mut memory = 0;
        let ended = {
            let talking = async { tokio::join!(stdout.read_to_string(&mut out), stderr.read_to_string(&mut err)) };
            let mut talking = std::pin::pin!(talking);
            loop {
                tokio::select! {
                    _ = &mut talking => break child.wait().await?,
                    () = tokio::time::sleep(LOOK_EVERY) => memory = peak_memory(&status).unwrap_or(memory),
                }
            }
        };
        if !ended.success() {
            return Err(format!("{self:?} ended with {ended}: {out} {err}").into());
        }
        let seconds = match self {
            Contestant::Tidegate(..) | Contestant::LedgerOff => {
                logged_seconds(&err).ok_or("the log lacks its first or last line")?
            }
            _ => serde_json::from_str::<Told>(out.trim())?.seconds,
        };
        let (cpu, valkey) = (cpu_of_children()? - cpu_before, stage.valkey_cpu().await? - valkey_before);
        Ok(Took { seconds, entries: self.entries(stage.entries), cpu, valkey, memory })
    }
}

/// How long a daemon was at work, by its log.
fn logged_seconds(log: &str) -> Option<f64> {
    let at = |message: &str| {
        let line = log.lines().find(|line| line.contains(message))?;
        let event: serde_json::Value = serde_json::from_str(line).ok()?;
        humantime::parse_rfc3339(event["timestamp"].as_str()?).ok()
    };
    let taken = at("everything is settled")?.duration_since(at("\"running\"")?).ok()?;
    Some(taken.as_secs_f64())
}

/// CPU seconds of all children that have ended.
fn cpu_of_children() -> Result<f64, Box<dyn Error>> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // Behind the name: cutime and cstime are the 14th and 15th, in hundredths of a second.
    Ok((fields[13].parse::<f64>()? + fields[14].parse::<f64>()?) / 100.0)
}

fn peak_memory(status: &str) -> Option<u64> {
    let text = std::fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}
