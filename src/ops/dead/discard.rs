//! `tidegate dead discard` and `reopen`: letters that are given up, and taken back.
//!
//! A discarded letter stays with all its bytes; only its state changes. Valkey has counted it all the same: an audit knows.

use serde::Serialize;

use super::select::{DISCARDED, Filter, Search, State};
use super::{Chosen, key_fields, operator};
use crate::config::Config;
use crate::ops::columns::{Page, plural, printable};
use crate::ops::context::Report;
use crate::ops::{Context, Exit, Failure};
use crate::postgres::Database;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    #[command(flatten)]
    pub(super) filter: Filter,
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
    pub(super) filter: Filter,
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
    let Opts { filter, all, because, dry_run, yes } = opts;
    let change = Change { filter, all: *all, dry_run: *dry_run, to: To::Discarded { by: &operator(), because } };
    let question = "Give these letters up? Their deltas stay out of the tables.";
    let marked = change.make(config, database, |counted| agreed(context, counted, question, *yes)).await?;
    context.print(&marked)?;
    Ok(Exit::Ok)
}

pub(super) async fn reopen(
    opts: &ReopenOpts,
    context: &Context,
    config: &Config,
    database: &Database,
) -> Result<Exit, Failure> {
    let ReopenOpts { filter, all, dry_run, yes } = opts;
    let change = Change { filter, all: *all, dry_run: *dry_run, to: To::Open };
    let question = "Open these letters again?";
    let marked = change.make(config, database, |counted| agreed(context, counted, question, *yes)).await?;
    context.print(&marked)?;
    Ok(Exit::Ok)
}

/// Tells how many there are, and asks.
pub(super) fn agreed(context: &Context, counted: &str, question: &str, yes: bool) -> Result<(), Failure> {
    context.say(counted);
    context.confirm(question, yes)
}

/// What letters become.
#[derive(Debug, Clone, Copy)]
pub enum To<'a> {
    /// Given up.
    Discarded {
        /// Who does it.
        by: &'a str,
        /// Why; empty where that was not said.
        because: &'a str,
    },
    /// Open again.
    Open,
}

/// Letters that are given up, or opened again.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    /// Which letters.
    pub filter: &'a Filter,
    /// Whether a filter that names none means all.
    pub all: bool,
    /// Whether they are only counted.
    pub dry_run: bool,
    /// What they become.
    pub to: To<'a>,
}

impl Change<'_> {
    /// Makes it, once `agreed` has not refused the count.
    pub async fn make(
        self,
        config: &Config,
        database: &Database,
        agreed: impl FnOnce(&str) -> Result<(), Failure>,
    ) -> Result<Marked, Failure> {
        let (state, done, undo) = match self.to {
            To::Discarded { .. } => (State::Open, "discarded", "reopen"),
            To::Open => (State::Discarded, "reopened", "discard"),
        };
        let none = format!("none of these letters can be {done}");
        let chosen = Chosen::of(config, database, (self.filter, self.all), state, &none).await?;
        let undo = match &chosen.letters[..] {
            [(_, (id, digest), _)] => format!("tidegate dead {undo} {id}/{digest:016x} --yes"),
            _ => format!("tidegate dead {undo} with the same filter"),
        };
        if self.dry_run || chosen.letters.is_empty() {
            return Ok(Marked { dry_run: self.dry_run, done, letters: chosen.letters.len() as u64, undo });
        }
        agreed(&chosen.summary())?;
        let resolution = match self.to {
            To::Discarded { by, because: "" } => Some(format!("{DISCARDED} by {by}")),
            To::Discarded { by, because } => Some(format!("{DISCARDED} by {by}: {}", printable(because))),
            To::Open => None,
        };
        let key_fields = key_fields(config);
        let search = Search { source: &config.valkey.source, filter: self.filter, state, key_fields: &key_fields };
        let letters = database.run(async |c| search.mark(c, resolution.as_deref()).await).await?;
        Ok(Marked { dry_run: false, done, letters, undo })
    }
}
