//! `tidegate dead`: the dead letters: see them, apply them again, or let them be.
//!
//! Takes what to look for; gives lists, accounts, and changes after the count was shown and agreed to. A letter is never deleted: resolved
//! ones stay as tombstones, so that the same entry is neither buried nor counted twice.

pub mod discard;
pub mod list;
pub mod redrive;
pub mod select;
pub mod show;

use std::collections::{BTreeMap, BTreeSet};

use self::select::{Filter, Search, State};
use super::explain::REASONS;
use super::{Context, Exit, Failure};
use crate::config::{Config, Needs};
use crate::flow::redrive::LetterId;
use crate::lanes;
use crate::model::pipeline::Pipeline;
use crate::model::target::Part;
use crate::postgres::Database;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Action {
    /// Count and list letters, the open ones unless said otherwise
    List(list::Opts),
    /// Show every byte of letters, and why they are here
    Show(show::Opts),
    /// Apply letters again, after the table or the mapping was corrected; each counts once
    Redrive(redrive::Opts),
    /// Give letters up: they stay as they are, and count no more
    Discard(discard::Opts),
    /// Open letters again that were discarded
    Reopen(discard::ReopenOpts),
}

impl Action {
    fn filter(&self) -> &Filter {
        match self {
            Action::List(list::Opts { filter, .. })
            | Action::Show(show::Opts { filter, .. })
            | Action::Redrive(redrive::Opts { filter, .. })
            | Action::Discard(discard::Opts { filter, .. })
            | Action::Reopen(discard::ReopenOpts { filter, .. }) => filter,
        }
    }
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::POSTGRES)?;
    let database = Database::new(config.postgres.address()?, 1);
    let unknown = unknown_names(opts.action.filter(), &config, &database).await?;
    unknown.iter().for_each(|words| context.say(words));
    let outcome = match opts.action {
        Action::List(opts) => list::run(&opts, context, &config, &database).await,
        Action::Show(opts) => show::run(&opts, context, &config, &database).await,
        Action::Redrive(opts) => redrive::run(&opts, context, &config, &database).await,
        Action::Discard(opts) => discard::run(&opts, context, &config, &database).await,
        Action::Reopen(opts) => discard::reopen(&opts, context, &config, &database).await,
    };
    database.close().await;
    outcome
}

/// Letters that something is to be done with: the opening of every change.
struct Chosen {
    /// Lane, letter, reason.
    letters: Vec<(i32, LetterId, String)>,
}

impl Chosen {
    /// Those that match and are in this state. Fails unless it was said which are meant, and where those that were named are not.
    async fn of(
        config: &Config,
        database: &Database,
        (filter, all): (&Filter, bool),
        state: State,
        none: &str,
    ) -> Result<Chosen, Failure> {
        if filter.is_everything() && !all {
            return Err(Failure::usage("say which letters: ids, a filter such as --reason, or --all"));
        }
        let key_fields = key_fields(config);
        let search = Search { source: &config.valkey.source, filter, state, key_fields: &key_fields };
        let letters = database.run(async |c| search.names(c).await).await?;
        if letters.is_empty() && !filter.ids.is_empty() {
            return Err(Failure::new(Exit::BadInput, format!("{none}: see `tidegate dead show`")));
        }
        Ok(Chosen { letters })
    }

    /// How many there are, by reason, in one line.
    fn summary(&self) -> String {
        let mut by_reason: BTreeMap<String, u64> = BTreeMap::new();
        self.letters.iter().for_each(|(_, _, reason)| *by_reason.entry(reason.clone()).or_default() += 1);
        list::summary(self.letters.len() as u64, &by_reason)
    }
}

/// A sentence about each name in a filter that nobody knows: else a slip of the pen looks as if there were no letters. Letters may be of pipelines and
/// streams that are no longer configured; the ledger knows those.
async fn unknown_names(filter: &Filter, config: &Config, database: &Database) -> Result<Vec<String>, Failure> {
    let mut unknown: Vec<String> = Vec::new();
    for reason in filter.reasons.iter().filter(|reason| REASONS.iter().all(|(known, _)| known != reason)) {
        let known: Vec<&str> = REASONS.iter().map(|(known, _)| *known).collect();
        unknown.push(format!("{reason:?} is no reason of dead letters: they are {}", known.join(", ")));
    }
    if filter.pipelines.is_empty() && filter.streams.is_empty() {
        return Ok(unknown);
    }
    let lanes = database.run(async |c| lanes::names(c, &config.valkey.source).await).await?;
    let configured = config.pipelines.iter().map(|pipeline| pipeline.name.as_str());
    let pipelines: BTreeSet<&str> = configured.chain(lanes.iter().map(|(pipeline, _)| pipeline.as_str())).collect();
    for name in filter.pipelines.iter().filter(|name| !pipelines.contains(name.as_str())) {
        let known: Vec<&str> = pipelines.iter().copied().collect();
        unknown.push(format!(
            "neither the configuration nor the ledger knows a pipeline {name:?}: they know {}",
            known.join(", ")
        ));
    }
    for stream in filter.streams.iter().filter(|name| lanes.iter().all(|(_, stream)| stream != *name)) {
        unknown.push(format!(
            "nothing was ever flushed from a stream {stream:?}: `tidegate group list` shows the streams"
        ));
    }
    Ok(unknown)
}

/// Who does it, for the letter's tombstone.
fn operator() -> String {
    let named =
        ["TIDEGATE_OPERATOR", "SUDO_USER", "USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok());
    super::columns::cut(&super::columns::printable(&named.unwrap_or_else(|| "somebody".into())), 60)
}

/// The fields that hold keys, of every pipeline: what `--key` is looked for in.
fn key_fields(config: &Config) -> Vec<Vec<u8>> {
    let mut fields: Vec<Vec<u8>> = config.pipelines.iter().flat_map(fields_of_keys).map(String::into_bytes).collect();
    fields.sort_unstable();
    fields.dedup();
    fields
}

/// The fields that the rows of a pipeline's tables are known by, each once.
fn fields_of_keys(pipeline: &Pipeline) -> Vec<String> {
    let mut fields: Vec<String> = Vec::new();
    for key in pipeline.targets().into_iter().flat_map(|target| target.keys) {
        let field = match key.part {
            Part::Field(name, _) => Some(name),
            Part::Bucket { field, .. } => field,
        };
        fields.extend(field.filter(|field| !fields.contains(field)));
    }
    fields
}

/// What a letter's row is known by: its fields that hold keys, in the order of the configuration; none where its pipeline is not configured, or it lacks them.
fn key_of(config: &Config, letter: &select::Letter) -> Vec<show::Field> {
    let pipeline = config.pipelines.iter().find(|pipeline| pipeline.name == letter.pipeline);
    let mut key = Vec::new();
    for field in pipeline.map(fields_of_keys).unwrap_or_default() {
        let found = letter.fields.chunks(2).find(|pair| pair[0] == field.as_bytes());
        let value = found.and_then(|pair| pair.get(1));
        key.extend(
            value.map(|value| show::Field { name: show::Bytes::of(field.as_bytes()), value: show::Bytes::of(value) }),
        );
    }
    key
}
