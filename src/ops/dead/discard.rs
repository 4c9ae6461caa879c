//! `tidegate dead discard` and `reopen`: letters that are given up, and taken back.
//!
//! A discarded letter stays with all its bytes; only its state changes. Valkey has counted it all the same: an audit knows.

use std::collections::BTreeMap;

use serde::Serialize;

use super::list::summary;
use super::select::{DISCARDED, Filter, Search, State};
use super::{key_fields, operator};
use crate::config::Config;
use crate::ops::columns::{Page, plural, printable};
use crate::ops::context::Report;
use crate::ops::{Context, Exit, Failure};
use crate::postgres::Database;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    #[command(flatten)]
    filter: Filter,
    /// Every open letter
    #[arg(long)]
    all: bool,
    /// Why, for whoever looks later
    #[arg(long, value_name = "TEXT", default_value = "")]
    because: String,
    /// Only count them
    #[arg(long)]
    dry_run: bool,
    /// Do it without asking
    #[arg(long)]
    yes: bool,
}

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct ReopenOpts {
    #[command(flatten)]
    filter: Filter,
    /// Every discarded letter
    #[arg(long)]
    all: bool,
    /// Only count them
    #[arg(long)]
    dry_run: bool,
    /// Do it without asking
    #[arg(long)]
    yes: bool,
}

/// How many letters were marked.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Marked {
    /// Whether they were only counted.
    pub dry_run: bool,
    /// What was done: `discarded` or `reopened`.
    pub done: &'static str,
    /// How many.
    pub letters: u64,
    /// What undoes it.
    pub undo: String,
}

impl Report for Marked {
    fn show(&self, page: &mut Page) {
        let letters = plural(self.letters, "dead letter", "dead letters");
        if self.dry_run {
            page.line(format!("{letters} would be {}; nothing was changed", self.done));
        } else {
            page.line(format!("{letters} {}", self.done));
            if self.letters > 0 {
                page.line(format!("undo: {}", self.undo));
            }
        }
    }
}

pub(super) async fn run(opts: &Opts, context: &Context, config: &Config, database: &Database) -> Result<Exit, Failure> {
    let because = if opts.because.is_empty() { String::new() } else { format!(": {}", printable(&opts.because)) };
    let resolution = format!("{DISCARDED} by {}{because}", operator());
    let change = Change {
        filter: &opts.filter,
        all: opts.all,
        dry_run: opts.dry_run,
        yes: opts.yes,
        resolution: Some(resolution),
    };
    change.make(context, config, database).await
}

pub(super) async fn reopen(
    opts: &ReopenOpts,
    context: &Context,
    config: &Config,
    database: &Database,
) -> Result<Exit, Failure> {
    let change = Change { filter: &opts.filter, all: opts.all, dry_run: opts.dry_run, yes: opts.yes, resolution: None };
    change.make(context, config, database).await
}

struct Change<'a> {
    filter: &'a Filter,
    all: bool,
    dry_run: bool,
    yes: bool,
    /// None: they are opened again.
    resolution: Option<String>,
}

impl Change<'_> {
    async fn make(self, context: &Context, config: &Config, database: &Database) -> Result<Exit, Failure> {
        if self.filter.is_everything() && !self.all {
            return Err(Failure::usage("say which letters: ids, a filter such as --reason, or --all"));
        }
        let (state, done, undo) = match self.resolution {
            Some(_) => (State::Open, "discarded", "reopen"),
            None => (State::Discarded, "reopened", "discard"),
        };
        let key_fields = key_fields(config);
        let search = Search { source: &config.valkey.source, filter: self.filter, state, key_fields: &key_fields };
        let found = database.run(async |c| search.names(c).await).await?;
        let mut by_reason: BTreeMap<String, u64> = BTreeMap::new();
        found.iter().for_each(|(_, _, reason)| *by_reason.entry(reason.clone()).or_default() += 1);
        let total = found.len() as u64;
        let undo = match &found[..] {
            [(_, (id, digest), _)] => format!("tidegate dead {undo} {id}/{digest:016x} --yes"),
            _ => format!("tidegate dead {undo} with the same filter"),
        };
        if total == 0 && !self.filter.ids.is_empty() {
            return Err(Failure::new(
                Exit::BadInput,
                format!("none of these letters can be {done}: see `tidegate dead show`"),
            ));
        }
        if self.dry_run || total == 0 {
            context.print(&Marked { dry_run: self.dry_run, done, letters: total, undo })?;
            return Ok(Exit::Ok);
        }
        context.say(&summary(total, &by_reason));
        let question = match self.resolution {
            Some(_) => "Give these letters up? Their deltas stay out of the tables.",
            None => "Open these letters again?",
        };
        context.confirm(question, self.yes)?;
        let letters = database.run(async |c| search.mark(c, self.resolution.as_deref()).await).await?;
        context.print(&Marked { dry_run: false, done, letters, undo })?;
        Ok(Exit::Ok)
    }
}
