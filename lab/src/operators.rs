//! What each operator costs: the same entries into tables of different shapes, by turns, each against the default pipeline of the same round.
//!
//! Every turn reads the whole stream with a new consumer group's worth of work: a Valkey (append-only file, flushed every second) and a PostgreSQL of its own
//! for each shape, filled with the same entries.

use std::time::Instant;

use tidegate_lab::harness::{Daemon, Lab};

/// A shape of rows: its table's columns beside the keys, and how the pipeline says so.
struct Shape {
    name: &'static str,
    columns: &'static str,
    keys: &'static str,
    values: &'static str,
}

/// Entries have an id, a tenant and a day that are the same key, an amount, a duration and a path.
const SHAPES: [Shape; 12] = [
    Shape {
        name: "counter (text key, one sum)",
        columns: "id text primary key, v bigint",
        keys: "id",
        values: "v = sum(amount)",
    },
    Shape {
        name: "uuid and day, sum, max, last",
        columns: "tenant uuid, day date, v bigint, m bigint, p text, pv numeric, primary key (tenant, day)",
        keys: "tenant: uuid, day: date",
        values: "v = sum(amount), m = max(ms), p = last(path) by pv",
    },
    Shape {
        name: "uuid and day, sum",
        columns: "tenant uuid, day date, v bigint, primary key (tenant, day)",
        keys: "tenant: uuid, day: date",
        values: "v = sum(amount)",
    },
    Shape { name: "text, count", columns: "id text primary key, v bigint", keys: "id", values: "v = count()" },
    Shape {
        name: "text, sum of numeric",
        columns: "id text primary key, v numeric",
        keys: "id",
        values: "v = sum(amount: numeric)",
    },
    Shape { name: "text, max", columns: "id text primary key, v bigint", keys: "id", values: "v = max(ms)" },
    Shape {
        name: "text, last",
        columns: "id text primary key, v text, w numeric",
        keys: "id",
        values: "v = last(path) by w",
    },
    Shape {
        name: "text, set_if_null",
        columns: "id text primary key, v text",
        keys: "id",
        values: "v = set_if_null(path)",
    },
    Shape { name: "text, or", columns: "id text primary key, v boolean", keys: "id", values: "v = or(flag)" },
    Shape {
        name: "text, jsonb_merge",
        columns: "id text primary key, v jsonb, w jsonb",
        keys: "id",
        values: "v = jsonb_merge(doc) by w",
    },
    Shape { name: "text, distinct", columns: "id text primary key, v bytea", keys: "id", values: "v = distinct(path)" },
    Shape { name: "citext, sum", columns: "id citext primary key, v bigint", keys: "id", values: "v = sum(amount)" },
];

#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Entries in the stream
    #[arg(long, default_value_t = 500_000)]
    entries: u64,
    /// Different keys
    #[arg(long, default_value_t = 1_000)]
    keys: u64,
    /// Rounds
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Only shapes whose names have one of these in them
    #[arg(long, value_delimiter = ',')]
    shapes: Vec<String>,
}

pub async fn run(args: Args) -> bool {
    let chosen =
        |shape: &&Shape| args.shapes.is_empty() || args.shapes.iter().any(|part| shape.name.contains(part.as_str()));
    let mut seconds: Vec<Vec<f64>> = SHAPES.iter().map(|_| Vec::new()).collect();
    for run in 0..args.runs {
        for (n, shape) in SHAPES.iter().enumerate() {
            if n == 0 || chosen(&shape) {
                seconds[n].push(drain(&args, shape).await);
            }
        }
        println!("round {} of {}", run + 1, args.runs);
    }
    let median = |times: &[f64]| {
        let mut sorted = times.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    };
    let of_counter = median(&seconds[0]);
    println!(
        "{} entries, {} keys, medians of {} runs, the program's start included",
        args.entries, args.keys, args.runs
    );
    println!("{:<32} {:>12} {:>10}", "shape", "entries/s", "ratio");
    for (shape, times) in SHAPES.iter().zip(&seconds).filter(|(_, times)| !times.is_empty()) {
        let took = median(times);
        println!("{:<32} {:>12.0} {:>10.2}", shape.name, args.entries as f64 / took, of_counter / took);
    }
    true
}

/// Seconds from the program's start to its end, with everything flushed.
async fn drain(args: &Args, shape: &Shape) -> f64 {
    let lab = Lab::new().await;
    lab.execute(&format!("create extension if not exists citext; create table public.shape ({})", shape.columns)).await;
    let mut client = lab.client().await;
    client.call(&["CONFIG", "SET", "appendonly", "yes"]).await;
    for first in (0..args.entries).step_by(5_000) {
        let commands: Vec<Vec<String>> =
            (first..args.entries.min(first + 5_000)).map(|n| entry(n, args.keys)).collect();
        client.pipeline(&commands).await;
    }
    let mut command = lab.program_by_default(&["run", "--until-empty"]);
    for (key, value) in [
        ("STREAM", "flush:shape"),
        ("TABLE", "shape"),
        ("KEYS", shape.keys),
        ("VALUES", shape.values),
        ("UPDATED_AT_COLUMN", ""),
        ("DELIVERY", "exclusive"),
    ] {
        command.env(format!("TIDEGATE__PIPELINES__SHAPE__{key}"), value);
    }
    let began = Instant::now();
    let status = Daemon::start(command).exit().await;
    assert!(status.success(), "{}: {status}", shape.name);
    began.elapsed().as_secs_f64()
}

/// The entry of this number; which key it has looks random and is the same each time.
fn entry(n: u64, keys: u64) -> Vec<String> {
    let key = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let key = key % keys;
    let (tenant, day) = (format!("6f9619ff-8b86-d011-b42d-{:012x}", key / 10), format!("2026-11-{:02}", 1 + key % 10));
    let pairs = [
        ("id", format!("{tenant}/{day}")),
        ("tenant", tenant),
        ("day", day),
        ("amount", (1 + n % 9).to_string()),
        ("ms", (n % 997).to_string()),
        ("path", format!("/page/{}", n % 89)),
        ("flag", if n.is_multiple_of(3) { "true" } else { "false" }.to_owned()),
        ("doc", format!("{{\"k{}\": {n}}}", n % 5)),
    ];
    let fields = pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]);
    ["XADD", "flush:shape", "*"].into_iter().map(str::to_owned).chain(fields).collect()
}
