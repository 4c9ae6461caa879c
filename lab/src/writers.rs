//! A load for servers that change places: entries of keys of their own, for both ways of delivery, and what became of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::harness::{Client, Lab, Resp, eventually};
use crate::rights;

/// The program on this Valkey. Its pipeline `counters` reads this stream as a member of the group, and `alone`, where it is named, that one alone.
pub fn program(lab: &Lab, url: &str, arguments: &[&str], stream: &str, alone: Option<&str>) -> tokio::process::Command {
    let mut command = lab.program(arguments);
    command.env("VALKEY_URL", rights::least(url, arguments)).env("TIDEGATE__PIPELINES__COUNTERS__STREAM", stream);
    command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", "group");
    if let Some(alone) = alone {
        for (key, value) in [("STREAM", alone), ("TABLE", "public.alone"), ("DELIVERY", "exclusive")] {
            command.env(format!("TIDEGATE__PIPELINES__ALONE__{key}"), value);
        }
    }
    command
}

/// A database with a second table.
pub async fn lab() -> Lab {
    let lab = Lab::new().await;
    lab.execute("create table public.alone (like public.counters including all)").await;
    lab
}

/// A foreign producer: adds entries, each of a key that no other entry of any stream has, and finds the primary by itself.
pub struct Writer {
    stop: Arc<AtomicBool>,
    task: JoinHandle<BTreeSet<String>>,
}

impl Writer {
    /// To this stream, on whichever of the servers on these ports takes it.
    pub fn to(ports: &[u16], stream: &str) -> Writer {
        let mut ports = ports.to_vec();
        let (stop, stream) = (Arc::new(AtomicBool::new(false)), stream.to_owned());
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let (mut taken, mut n, mut at) = (BTreeSet::new(), 0u64, 0);
            let mut client = None;
            while !stopped.load(Ordering::Relaxed) {
                if client.is_none() {
                    // Whoever has it not says so, and the next one is asked.
                    at += 1;
                    client = Client::try_connect(ports[at % ports.len()]).await.ok();
                }
                let Some(connected) = &mut client else {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    continue;
                };
                let ids: Vec<String> = (n..n + 20).map(|n| format!("{stream} {n}")).collect();
                n += 20;
                let commands: Vec<Vec<&str>> =
                    ids.iter().map(|id| vec!["XADD", &stream, "*", "id", id, "amount", "1"]).collect();
                let answers = tokio::time::timeout(Duration::from_millis(500), connected.try_pipeline(&commands)).await;
                let Ok(Ok(answers)) = answers else {
                    client = None;
                    continue;
                };
                let added = ids.into_iter().zip(&answers).filter(|(_, answer)| matches!(answer, Resp::Text(_)));
                taken.extend(added.map(|(id, _)| id));
                let refused = answers.iter().find_map(|answer| match answer {
                    Resp::Error(words) => Some(words),
                    _ => None,
                });
                if let Some(words) = refused {
                    client = None;
                    // It may be sent on to a node that has joined meanwhile.
                    let port = words.strip_prefix("MOVED ").and_then(|rest| rest.rsplit(':').next()?.parse().ok());
                    ports.extend(port.filter(|port| !ports.contains(port)));
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            taken
        });
        Writer { stop, task }
    }

    /// The keys of all entries that a server took.
    pub async fn stop(self) -> BTreeSet<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("it ends")
    }
}

/// The rows of a table.
pub async fn rows(lab: &Lab, table: &str) -> BTreeMap<String, i64> {
    let query = format!("select id, value from {table}");
    let rows: Vec<(String, i64)> =
        sqlx::query_as(sqlx::AssertSqlSafe(query)).fetch_all(&mut lab.sql().await).await.expect("readable");
    rows.into_iter().collect()
}

/// Waits until rows of both ways of delivery have landed that had not when it was called.
pub async fn both_go_on(lab: &Lab) {
    for table in ["public.counters", "public.alone"] {
        let before = rows(lab, table).await.len();
        eventually(table, true, async || rows(lab, table).await.len() > before).await;
    }
}
