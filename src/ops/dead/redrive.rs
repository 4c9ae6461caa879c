//! `tidegate dead redrive`: letters, again, after the table or the mapping was corrected.
//!
//! Each letter's delta and its tombstone are one transaction, so each counts once, whatever crashes and whoever else does the same. What
//! cannot be applied still stays as it was, and is told with the reason.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::discard::agreed;
use super::select::{DOUBTFUL, Filter, State};
use super::{Chosen, operator};
use crate::config::Config;
use crate::flow::redrive::{LetterId, Mode, Outcome, Redrive};
use crate::lanes::Identity;
use crate::model::pipeline::Pipeline;
use crate::ops::columns::{Page, Tone, count, plural, printable};
use crate::ops::context::Report;
use crate::ops::{Context, Exit, Failure};
use crate::postgres::Database;
use crate::retry::{Fault, FaultKind, backoff, kind};
use crate::target;

/// How many letters one transaction redrives.
const TOGETHER: usize = 1_000;
/// How often a transaction that met others is tried again.
const TRIES: usize = 8;
/// How many refusals a page shows.
const SHOWN: usize = 20;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    #[command(flatten)]
    pub(super) filter: Filter,
    /// Every open letter
    #[arg(long)]
    all: bool,
    /// Do everything, then roll it back: a true account of what would land
    #[arg(long)]
    dry_run: bool,
    /// Do it without asking
    #[arg(long)]
    yes: bool,
    /// Letters that are named and that the ledger could not judge: apply them although they may have been applied before
    #[arg(long, requires = "ids")]
    accept_doubt: bool,
}

/// What became of the letters.
#[derive(Debug, Default, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Redriven {
    /// Whether it was only tried, and rolled back.
    pub dry_run: bool,
    /// Letters whose delta is in the table now.
    pub redriven: u64,
    /// Letters that somebody else had resolved before.
    pub already_resolved: u64,
    /// Letters of which nobody can know whether they were applied before: left alone.
    pub doubtful: u64,
    /// Letters that cannot be applied still, with the reasons.
    pub refused: Vec<Refused>,
}

/// A letter that cannot be applied still.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Refused {
    /// The entry's id, a slash, and its digest.
    pub letter: String,
    /// Why, now.
    pub why: String,
}

pub(super) async fn run(opts: &Opts, context: &Context, config: &Config, database: &Database) -> Result<Exit, Failure> {
    let Opts { filter, all, dry_run, yes, accept_doubt } = opts;
    let by = &operator();
    let again = Again { filter, all: *all, dry_run: *dry_run, accept_doubt: *accept_doubt, by };
    let question = "Apply these letters to their tables?";
    let account = again.redrive(config, database, |counted| agreed(context, counted, question, *yes)).await?;
    context.print(&account)?;
    Ok(if account.refused.is_empty() { Exit::Ok } else { Exit::BadInput })
}

/// Letters that are to be applied again.
#[derive(Debug, Clone, Copy)]
pub struct Again<'a> {
    /// Which letters.
    pub filter: &'a Filter,
    /// Whether a filter that names none means all.
    pub all: bool,
    /// Whether everything is rolled back.
    pub dry_run: bool,
    /// Whether those are applied, too, that may have been applied before.
    pub accept_doubt: bool,
    /// Who does it.
    pub by: &'a str,
}

impl Again<'_> {
    /// Redrives them, once `agreed` has not refused the count.
    pub async fn redrive(
        &self,
        config: &Config,
        database: &Database,
        agreed: impl FnOnce(&str) -> Result<(), Failure>,
    ) -> Result<Redriven, Failure> {
        let none = "none of these letters is open";
        let mut chosen = Chosen::of(config, database, (self.filter, self.all), State::Open, none).await?;
        let before = chosen.letters.len();
        if !self.accept_doubt {
            chosen.letters.retain(|(_, _, reason)| reason != DOUBTFUL);
        }
        let doubtful = (before - chosen.letters.len()) as u64;
        let mut account = Redriven { dry_run: self.dry_run, doubtful, ..Redriven::default() };
        if !self.dry_run && !chosen.letters.is_empty() {
            agreed(&chosen.summary())?;
        }
        let mut by_lane: BTreeMap<i32, Vec<LetterId>> = BTreeMap::new();
        chosen.letters.into_iter().for_each(|(lane, letter, _)| by_lane.entry(lane).or_default().push(letter));
        for (lane, letters) in by_lane {
            self.redrive_lane(config, database, lane, &letters, &mut account).await?;
        }
        Ok(account)
    }

    async fn redrive_lane(
        &self,
        config: &Config,
        database: &Database,
        lane: i32,
        letters: &[LetterId],
        account: &mut Redriven,
    ) -> Result<(), Failure> {
        let (pipeline, identity) = pipeline_of(config, database, lane).await?;
        let checked = database.run(async |c| target::check_tables(c, &pipeline).await).await?;
        let fits = checked.map_err(|unfit| Failure::new(Exit::Config, unfit.to_string()))?;
        let redrive = Redrive::new(&pipeline, &fits, lane, identity, format!("redriven by {}", self.by));
        let redrive = redrive.map_err(|no_zone| Failure::new(Exit::Config, no_zone.to_string()))?;
        let mode = if self.dry_run { Mode::Rehearse } else { Mode::Commit };
        for letters in letters.chunks(TOGETHER) {
            for ((id, digest), outcome) in persistently(&redrive, database, letters, mode).await? {
                match outcome {
                    Outcome::Redriven => account.redriven += 1,
                    Outcome::NotOpen => account.already_resolved += 1,
                    Outcome::Refused(why) => {
                        account.refused.push(Refused { letter: format!("{id}/{digest:016x}"), why });
                    }
                }
            }
        }
        Ok(())
    }
}

/// Again, where it met another transaction. After a lost answer the letters that had landed are not open any more.
async fn persistently(
    redrive: &Redrive,
    database: &Database,
    letters: &[LetterId],
    mode: Mode,
) -> Result<Vec<(LetterId, Outcome)>, Failure> {
    let mut waits = backoff().take(TRIES);
    loop {
        let fault = match redrive.redrive(database, letters, mode).await {
            Ok(outcomes) => return Ok(outcomes),
            Err(fault) => fault,
        };
        match waits.next() {
            Some(wait) if kind(&fault) == FaultKind::Passing => {
                tokio::time::sleep(wait.min(Duration::from_secs(1))).await
            }
            _ => return Err(of_lane(fault)),
        }
    }
}

fn of_lane(fault: Fault) -> Failure {
    match &fault {
        Fault::Postgres { sqlstate, message, .. } if sqlstate == "TG002" => Failure::new(
            Exit::Config,
            format!(
                "{message}: the letters are applied by the columns and the table that the daemon is registered with. Start the daemon with \
                 this configuration first, or use the daemon's"
            ),
        ),
        _ => fault.into(),
    }
}

/// The pipeline that a lane belongs to, as it is configured now.
async fn pipeline_of(config: &Config, database: &Database, lane: i32) -> Result<(Pipeline, Identity), Failure> {
    let query = "select pipeline, stream, target from tidegate.lanes where lane = $1";
    let (name, stream, target): (String, String, String) =
        database.run(async |c| sqlx::query_as(query).bind(lane).fetch_one(c).await).await?;
    let Some(pipeline) = config.pipelines.iter().find(|pipeline| pipeline.name == name) else {
        let words = format!(
            "letters of pipeline {name} cannot be redriven: it is not in this configuration; add --pipeline with another one"
        );
        return Err(Failure::new(Exit::Config, words));
    };
    if pipeline.table.to_string() != target {
        let words = format!(
            "pipeline {name} has flushed into {target} until now, and is configured for {}: if the table was renamed, run `tidegate \
             migrate --retarget {name}` first",
            pipeline.table
        );
        return Err(Failure::new(Exit::Config, words));
    }
    let shard = pipeline.shard(stream);
    let identity = Identity::of(&config.valkey.source, &shard);
    Ok((Pipeline::clone(&shard.pipeline), identity))
}

impl Report for Redriven {
    fn show(&self, page: &mut Page) {
        let done = match (self.dry_run, self.redriven) {
            (true, number) => {
                format!("{} would be redriven; nothing was changed", plural(number, "dead letter", "dead letters"))
            }
            (false, number) => format!("{} redriven", plural(number, "dead letter", "dead letters")),
        };
        page.toned(if self.refused.is_empty() { Tone::Good } else { Tone::Warn }, done);
        if self.already_resolved > 0 {
            page.line(format!("{} resolved by somebody else before", count(self.already_resolved)));
        }
        if self.doubtful > 0 {
            page.line(format!(
                "{} left alone: whether they were applied before cannot be known ({DOUBTFUL}); compare with `tidegate audit`, then name \
                 each with --accept-doubt, or discard it",
                count(self.doubtful)
            ));
        }
        if !self.refused.is_empty() {
            page.line(format!("{} cannot be applied still, and are as they were:", count(self.refused.len() as u64)));
        }
        for refused in self.refused.iter().take(SHOWN) {
            page.line(format!("  {}  {}", refused.letter, printable(&refused.why)));
        }
        if self.refused.len() > SHOWN {
            page.line(format!("  and {} more", self.refused.len() - SHOWN));
        }
    }
}
