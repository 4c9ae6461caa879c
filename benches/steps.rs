//! What a million entries cost in each step between the two servers: `cargo bench --bench steps`.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use tidegate::flow::batch::{Batch, Filling, Origin};
use tidegate::flow::ledger::NewRows;
use tidegate::flow::rows::Plan;
use tidegate::model::entry::{EntryId, Generation, digest};
use tidegate::model::pipeline::Pipeline;
use tidegate::model::row;
use tidegate::ops::bench::load::Load;
use tidegate::telemetry::trace::Trace;
use tidegate::valkey::Command;
use tidegate::valkey::resp::{Piece, Scan};

/// Entries in a batch, and in a run.
const BATCH: usize = 40_000;
const RUN: usize = 1_000;

/// Replies to stream reads, as a server sends them.
fn replies(keys: u64) -> Vec<Vec<u8>> {
    let load = Load { keys, skew: None, amounts: 1..=9, id_bytes: 6..=40, seed: 1 };
    let deltas: Vec<(String, i64)> = load.deltas().take(BATCH).collect();
    let reply = |(n, run): (usize, &[(String, i64)])| {
        let mut out = format!("%1\r\n$14\r\nflush:counters\r\n*{}\r\n", run.len()).into_bytes();
        for (seq, (key, amount)) in run.iter().enumerate() {
            let id = format!("{}-{seq}", 1_700_000_000_000 + n);
            out.extend(format!("*2\r\n${}\r\n{id}\r\n*4\r\n$2\r\nid\r\n${}\r\n{key}\r\n", id.len(), key.len()).bytes());
            out.extend(format!("$6\r\namount\r\n$1\r\n{amount}\r\n").bytes());
        }
        out
    };
    deltas.chunks(RUN).enumerate().map(reply).collect()
}

fn scan(reply: &[u8], mut take: impl FnMut(EntryId, tidegate::valkey::resp::Strings<'_>)) {
    let (mut scan, mut at) = (Scan::default(), 0);
    while let Ok(Some((piece, taken))) = scan.next(&reply[at..]) {
        at += taken;
        match piece {
            Piece::Entry(id, strings) => take(id, strings),
            Piece::Part | Piece::Stream(_) => {}
            _ => return,
        }
    }
}

fn fill(replies: &[Vec<u8>]) -> Batch {
    let generation = Generation { run_id: "r".into(), replication_id: "p".into(), epoch: 1 };
    let mut filling = Filling::new(
        Origin { generation: Arc::new(generation), consumer: "c".into(), trace: Trace::default() },
        1 << 20,
    );
    for reply in replies {
        scan(reply, |id, strings| filling.push(id, strings));
        filling.close_run();
    }
    filling.seal(false)
}

fn steps(criterion: &mut Criterion) {
    for (name, keys) in [("1,000 keys", 1_000), ("100,000 keys", 100_000)] {
        let (pipeline, replies) = (Pipeline::counters(), replies(keys));
        let batch = fill(&replies);
        let plan = Plan::of(&pipeline).expect("a plan");
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(BATCH as u64));
        group.bench_function("scan the replies", |b| {
            b.iter(|| {
                replies.iter().for_each(|reply| {
                    scan(reply, |id, strings| {
                        black_box((id, strings.count()));
                    })
                })
            });
        });
        group.bench_function("scan, copy and digest into a batch", |b| b.iter(|| fill(black_box(&replies))));
        group.bench_function("digest", |b| {
            b.iter(|| batch.entries().iter().map(|entry| digest(batch.canonical(entry).0)).fold(0, u64::wrapping_add));
        });
        group.bench_function("decode", |b| {
            b.iter(|| {
                batch.entries().iter().filter_map(|entry| row::decode(batch.canonical(entry), &pipeline).ok()).count()
            });
        });
        group.bench_function("coalesce", |b| b.iter(|| batch.coalesce(&plan, 0..batch.len())));
        group.bench_function("ledger rows to bind", |b| b.iter(|| NewRows::of(&batch, batch.runs(), |_| 1)));
        group.bench_function("split in halves", |b| {
            b.iter_batched(|| batch.clone(), |batch| drop(black_box(batch.halve())), BatchSize::LargeInput);
        });
        group.bench_function("write the XACK", |b| {
            b.iter(|| Command::new("XACK").args(batch.entries().iter().map(|entry| entry.id)));
        });
        group.finish();
    }
}

criterion_group!(benches, steps);
criterion_main!(benches);
