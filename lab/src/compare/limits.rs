//! The limits: what each of the two servers can do when the other has nothing to do.
//!
//! Takes a server and a workload; gives the seconds it took. Fails with what the server says.

use std::collections::VecDeque;
use std::error::Error;
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::TcpStream;
use std::time::Instant;

use sqlx::{Connection, PgConnection};
use tidegate::valkey::resp::{Piece, Scan};

use super::workload::{Workload, encode};

/// Entries in a read.
const READ: &str = "1000";
/// Entries in a read by ids.
const READ_ALONE: &str = "8000";
/// Reads under way at once.
const UNDER_WAY: usize = 4;
/// Ids in an XACK.
const ACK: usize = 10_000;
/// Entries in a batch: what Tidegate flushes by default.
const BATCH: usize = 40_000;

/// Reads and acknowledges everything over one raw socket, and does nothing with it.
pub fn valkey(port: u16, stream: &str, group: &str) -> Result<f64, Box<dyn Error>> {
    let mut wire = Wire { socket: TcpStream::connect(("127.0.0.1", port))?, inbox: Vec::new(), start: 0 };
    wire.send(&["HELLO", "3"])?;
    wire.skip_greeting()?;
    wire.send(&["XGROUP", "CREATE", stream, group, "0"])?;
    wire.line()?;
    let read = ["XREADGROUP", "GROUP", group, "limit", "COUNT", READ, "STREAMS", stream, ">"];
    let started = Instant::now();
    // What the server owes: true for a run, false for the reply to an XACK.
    let mut owed = VecDeque::new();
    let (mut ids, mut drained): (Vec<String>, bool) = (Vec::new(), false);
    loop {
        while !drained && owed.iter().filter(|run| **run).count() < UNDER_WAY {
            wire.send(&read)?;
            owed.push_back(true);
        }
        match owed.pop_front() {
            Some(true) => drained |= wire.run(&mut ids)? == 0,
            Some(false) => wire.line()?,
            None => return Ok(started.elapsed().as_secs_f64()),
        }
        if ids.len() >= ACK || drained && !ids.is_empty() {
            let mut command = vec!["XACK", stream, group];
            command.extend(ids.iter().map(String::as_str));
            wire.send(&command)?;
            owed.push_back(false);
            ids.clear();
        }
    }
}

/// Reads everything over one raw socket by its ids, and does nothing with it.
pub fn valkey_alone(port: u16, stream: &str) -> Result<f64, Box<dyn Error>> {
    let mut wire = Wire { socket: TcpStream::connect(("127.0.0.1", port))?, inbox: Vec::new(), start: 0 };
    wire.send(&["HELLO", "3"])?;
    wire.skip_greeting()?;
    let (started, mut after, mut ids) = (Instant::now(), "0".to_owned(), Vec::new());
    loop {
        wire.send(&["XREAD", "COUNT", READ_ALONE, "STREAMS", stream, &after])?;
        if wire.run(&mut ids)? == 0 {
            return Ok(started.elapsed().as_secs_f64());
        }
        after = ids.pop().unwrap_or_default();
        ids.clear();
    }
}

struct Wire {
    socket: TcpStream,
    inbox: Vec<u8>,
    start: usize,
}

impl Wire {
    fn send(&mut self, parts: &[&str]) -> std::io::Result<()> {
        let mut command = Vec::new();
        encode(&mut command, parts);
        self.socket.write_all(&command)
    }

    fn receive(&mut self) -> std::io::Result<()> {
        self.inbox.drain(..std::mem::take(&mut self.start));
        let had = self.inbox.len();
        self.inbox.resize(had + (256 << 10), 0);
        let length = self.socket.read(&mut self.inbox[had..])?;
        self.inbox.truncate(had + length);
        if length == 0 { Err(std::io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    fn skip_greeting(&mut self) -> std::io::Result<()> {
        // A map that ends with an empty list of modules.
        while !self.inbox.ends_with(b"*0\r\n") {
            self.receive()?;
        }
        self.start = self.inbox.len();
        Ok(())
    }

    fn line(&mut self) -> std::io::Result<()> {
        loop {
            if let Some(end) = self.inbox[self.start..].iter().position(|byte| *byte == b'\n') {
                self.start += end + 1;
                return Ok(());
            }
            self.receive()?;
        }
    }

    fn run(&mut self, ids: &mut Vec<String>) -> Result<usize, Box<dyn Error>> {
        let (mut scan, had) = (Scan::default(), ids.len());
        loop {
            match scan.next(&self.inbox[self.start..])? {
                Some((piece, taken)) => {
                    self.start += taken;
                    match piece {
                        Piece::Entry(id, _) => {
                            let mut text = String::with_capacity(24);
                            write!(text, "{}-{}", id.ms, id.seq)?;
                            ids.push(text);
                        }
                        Piece::Shortened => return Err("an entry was shortened".into()),
                        Piece::Part | Piece::Stream(_) => {}
                        Piece::End => return Ok(ids.len() - had),
                        Piece::Refused(words) => return Err(words.into()),
                    }
                }
                None => self.receive()?,
            }
        }
    }
}

/// Upserts everything in batches coalesced beforehand, over so many connections, and reads it from nowhere.
pub async fn postgres(
    url: &str,
    workload: Workload,
    entries: usize,
    connections: usize,
) -> Result<f64, Box<dyn Error>> {
    let mut batches = coalesced(workload, entries);
    batches.reverse();
    let batches = std::sync::Arc::new(std::sync::Mutex::new(batches));
    let mut opened = Vec::new();
    for _ in 0..connections {
        opened.push(PgConnection::connect(url).await?);
    }
    let started = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for mut connection in opened {
        let batches = batches.clone();
        tasks.spawn(async move {
            loop {
                let Some((keys, amounts)) = batches.lock().expect("no panic under it").pop() else { return Ok(()) };
                sqlx::query(
                    "insert into counters as t (id, value, updated_at)
                     select id, delta, now() from unnest($1::text[], $2::int8[]) as d (id, delta)
                     on conflict (id) do update set value = t.value + excluded.value, updated_at = excluded.updated_at",
                )
                .bind(keys)
                .bind(amounts)
                .execute(&mut connection)
                .await?;
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        let ended: Result<(), sqlx::Error> = ended?;
        ended?;
    }
    Ok(started.elapsed().as_secs_f64())
}

fn coalesced(workload: Workload, entries: usize) -> Vec<(Vec<String>, Vec<i64>)> {
    let mut all = workload.entries(entries);
    let mut batches = Vec::new();
    loop {
        let mut sums = std::collections::BTreeMap::new();
        all.by_ref().take(BATCH).for_each(|(id, amount)| *sums.entry(id).or_insert(0) += amount);
        if sums.is_empty() {
            return batches;
        }
        batches.push(sums.into_iter().unzip());
    }
}
