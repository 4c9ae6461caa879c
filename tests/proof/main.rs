//! The proof of "exactly once, whatever crashes", as programs that anybody can run again:
//!
//! - `crash` kills a worker at each crash point, again and again, and looks at the books after each death;
//! - `soak` lets producers and workers run under a random schedule of faults, looks at the books all the time, and writes
//!   down what came out;
//! - `caretaking` shows what trimming and compaction cost a flush, and how large ledger and stream stay.
//!
//! All on real servers of their own; the checker of the first two knows nothing but what producers were told, what the stream
//! holds, and what PostgreSQL shows. docs/guarantees.md tells the story.

#![allow(unreachable_pub, clippy::print_stdout, reason = "a program of several files, whose purpose is to print")]

mod books;
mod caretaking;
mod crash;
mod faults;
#[path = "../it/harness.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod harness;
mod journal;
#[path = "../it/proxy.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod proxy;
mod soak;

use std::process::ExitCode;

use clap::Parser;

#[derive(Debug, Parser)]
enum Cli {
    /// Kill a worker at each crash point
    Crash(crash::Args),
    /// Run for long under random faults
    Soak(soak::Args),
    /// Measure what trimming and compaction cost a flush
    Caretaking(caretaking::Args),
}

#[tokio::main]
async fn main() -> ExitCode {
    let holds = match Cli::parse() {
        Cli::Crash(args) => crash::run(args).await,
        Cli::Soak(args) => soak::run(args).await,
        Cli::Caretaking(args) => caretaking::run(args).await,
    };
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
