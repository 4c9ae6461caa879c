//! The program: answer a shell that completes, or parse the command line, start telemetry, run the verb, say what failed, exit.

use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

use clap::Parser;
use futures_util::FutureExt;
use tidegate::ops::cli::Cli;
use tidegate::ops::{Exit, Failure, complete};

/// What a panic is.
const A_BUG: &str = "it panicked, which is a bug: please report it, with what stands above";

fn main() -> ExitCode {
    if complete::answered() {
        return ExitCode::SUCCESS;
    }
    let cli = Cli::parse();
    let (verb, context) = (cli.verb(), cli.context());
    // The one provider of cryptography; it is not set yet.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(verb, &error.into()),
    };
    let telemetry = match cli.telemetry(&context) {
        Ok(telemetry) => telemetry,
        Err(failure) => return failed(verb, &failure),
    };
    // A task that panics ends by itself; what the verb itself runs would end the program without its last words.
    let running = AssertUnwindSafe(cli.run(&context, telemetry.as_ref())).catch_unwind();
    let outcome = runtime.block_on(running).unwrap_or_else(|_| Err(Failure::new(Exit::Error, A_BUG)));
    // What is still running was told to stop and is not waited for: it may be stuck in a server's silence.
    runtime.shutdown_background();
    let code = outcome.map_or_else(|failure| failed(verb, &failure), Exit::into);
    // Last of all: it sends what was told up to now, after a failure too.
    drop(telemetry);
    code
}

fn failed(verb: &str, failure: &Failure) -> ExitCode {
    if let Some(words) = failure.told_by(verb) {
        // If stderr is closed there is nobody to tell.
        let _ = writeln!(std::io::stderr(), "{words}");
    }
    failure.exit().into()
}
