//! The lab's programs, each on real servers of its own. Each is a `make` target:
//!
//! - `controls` breaks promises on purpose, in a copied tree: the tests must notice each of them;
//! - `crash` kills a worker at each crash point, again and again, and compares all totals after each death;
//! - `soak` lets producers and workers run under a random schedule of faults, compares totals all the time, and writes down
//!   what came out;
//! - `managed` does the same with counters that may be evicted, beside a pattern that people write by hand;
//! - `upheaval` lets a cluster's primaries die, its slots move and its workers end, in random order, and compares in the end;
//! - `caretaking` shows what trimming and compaction cost a flush, and how large ledger and stream stay;
//! - `ledger` shows how large the ledger becomes under a steady load, and what a daemon that starts with it needs;
//! - `operators` measures what each operator of a value column costs, against the default pipeline;
//! - `compare` measures Tidegate, hand-written workers and the limits of the two servers side by side;
//! - `curves` measures how throughput changes with processes, shards and distance, and what idle streams cost;
//! - `caching` measures the reading side beside what people write by hand.
//!
//! The checker of `crash` and `soak` knows nothing but what producers were told, what the stream holds, and what PostgreSQL
//! shows. docs/guarantees.md describes it.

mod books;
mod caching;
mod caretaking;
mod compare;
mod controls;
mod crash;
mod curves;
mod faults;
mod figures;
mod journal;
mod ledger;
mod load;
mod managed;
mod operators;
mod operators_table;
mod soak;
mod upheaval;

use std::process::ExitCode;

use clap::Parser;

#[derive(Debug, Parser)]
enum Cli {
    /// Break each promise on purpose: the tests must notice
    Controls(controls::Args),
    /// Kill a worker at each crash point
    Crash(crash::Args),
    /// Run for long under random faults
    Soak(soak::Args),
    /// Run managed counters in little memory under random faults, beside a pattern that is written by hand
    Managed(managed::Args),
    /// Run on a cluster whose nodes die and whose slots move
    Upheaval(upheaval::Args),
    /// Measure what trimming and compaction cost a flush
    Caretaking(caretaking::Args),
    /// Measure the ledger's size under a steady load
    Ledger(ledger::Args),
    /// Measure what each operator of a value costs
    Operators(operators::Args),
    /// Measure side by side: Tidegate, hand-written workers, the servers' limits
    Compare(compare::Args),
    /// Measure how throughput changes with processes, shards and distance; and what idle streams cost
    Curves(curves::Args),
    /// Measure the reading side beside what people write by hand
    Caching(caching::Args),
}

#[tokio::main]
async fn main() -> ExitCode {
    let holds = match Cli::parse() {
        Cli::Controls(args) => controls::run(args).await,
        Cli::Crash(args) => crash::run(args).await,
        Cli::Soak(args) => soak::run(args).await,
        Cli::Managed(args) => managed::run(args).await,
        Cli::Upheaval(args) => upheaval::run(args).await,
        Cli::Caretaking(args) => caretaking::run(args).await,
        Cli::Ledger(args) => ledger::run(args).await,
        Cli::Operators(args) => operators::run(args).await,
        Cli::Compare(args) => compare::run(args).await,
        Cli::Curves(args) => curves::run(args).await,
        Cli::Caching(args) => caching::run(args).await,
    };
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
