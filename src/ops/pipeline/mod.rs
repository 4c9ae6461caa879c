//! `tidegate pipeline`: make a pipeline, and test it without servers.

mod cases;
mod compare;
pub mod draft;
pub mod new;
mod sample;
mod stream;
mod table;
pub mod test;

use super::{Context, Exit, Failure};

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Action {
    /// Print a pipeline's section and its migration, from a table that is there or from entries of a stream
    New(new::Opts),
    /// Compare what sample entries make of empty tables with the rows that are expected, without a server
    Test(test::Opts),
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    match opts.action {
        Action::New(opts) => new::run(&opts, context).await,
        Action::Test(opts) => test::run(&opts, context),
    }
}
