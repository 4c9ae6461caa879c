//! `tidegate group`: the consumer groups of the configured streams; and what a rename has left behind, put away.
//!
//! Takes the configuration; lists every group with whose it is, or destroys groups that nobody reads with any more, after it was agreed to.
//! Destroying such a group loses nothing: the pipeline that reads the stream has a group of its own, and a ledger.

use serde::Serialize;

use super::columns::{Page, Tone, count, lasting_ms, plural, printable};
use super::complete::{Name, by};
use super::context::{Report, chosen};
use super::observe::valkey::{Named, Stream};
use super::observe::{Look, Servers};
use super::{Context, Exit, Failure};
use crate::config::{Config, Needs};
use crate::model::names;
use crate::model::pipeline::Pipeline;
use crate::valkey::Command;

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Action {
    /// List the groups of the configured streams
    List(ListOpts),
    /// Destroy groups that a renamed pipeline has left behind: they hold back trimming
    Repair(RepairOpts),
}

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct ListOpts {
    /// Only of these pipelines' streams; default: all
    #[arg(long = "pipeline", value_name = "NAME", add = by(Name::Pipeline))]
    pipelines: Vec<String>,
}

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct RepairOpts {
    /// This group, although no pipeline was renamed: another program's that is not used any more
    #[arg(long, value_name = "NAME", add = by(Name::Group))]
    group: Option<String>,
    /// Only say what would be destroyed
    #[arg(long)]
    dry_run: bool,
    /// Do it without asking
    #[arg(long)]
    yes: bool,
}

/// Groups.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Groups {
    /// Each group of each stream.
    pub groups: Vec<GroupLine>,
}

/// A group.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct GroupLine {
    /// The stream.
    pub stream: String,
    /// The group's name.
    pub group: String,
    /// Whose it is: `configured`, `left_behind` (a pipeline's that was renamed), `other_pipeline` (one that the ledger knows and this
    /// configuration does not), or `foreign`.
    pub whose: &'static str,
    /// How many members it has.
    pub consumers: u64,
    /// Entries given out and not settled.
    pub pending: u64,
    /// How long ago the last entry that it was given was added, in milliseconds; null where it was given none.
    pub read_ms_ago: Option<u64>,
}

/// Groups that were destroyed, or would be.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Repaired {
    /// Whether they were only looked for.
    pub dry_run: bool,
    /// The groups.
    pub groups: Vec<GroupLine>,
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::BOTH)?;
    let mut servers = Servers::of(&config, "tidegate:group")?;
    match opts.action {
        Action::List(opts) => {
            let pipelines = chosen(&config, &opts.pipelines)?;
            let groups = groups(&config, &pipelines, &mut servers).await?;
            context.print(&Groups { groups })?;
            Ok(Exit::Ok)
        }
        Action::Repair(opts) => repair(&opts, context, &config, &mut servers).await,
    }
}

async fn groups(config: &Config, pipelines: &[&Pipeline], servers: &mut Servers) -> Result<Vec<GroupLine>, Failure> {
    let look = Look::take(servers, pipelines, config.reclaim.dead_after).await;
    if let Some(fault) = look.valkey_fault() {
        return Err(fault.clone().into());
    }
    let books = look.books.as_ref().map_err(|fault| Failure::from(fault.clone()))?;
    let mut lines: Vec<GroupLine> = Vec::new();
    for ((_, name), stream) in look.streams() {
        for group in &stream.groups {
            let known = |pipeline: &str| names::group(pipeline) == group.name;
            let whose = if config.pipelines.iter().any(|pipeline| known(&pipeline.name)) {
                "configured"
            } else if books.lanes.iter().any(|lane| lane.stream == name && known(&lane.pipeline)) {
                "other_pipeline"
            } else if group.name.starts_with(&names::group("")) {
                "left_behind"
            } else {
                "foreign"
            };
            let line = line(name, stream, group, whose);
            // Several pipelines may read one stream.
            if !lines.iter().any(|other| (&other.stream, &other.group) == (&line.stream, &line.group)) {
                lines.push(line);
            }
        }
    }
    Ok(lines)
}

fn line(name: &str, stream: &Stream, group: &Named, whose: &'static str) -> GroupLine {
    let read = (group.last_delivered.ms > 0).then(|| stream.now_ms.saturating_sub(group.last_delivered.ms));
    GroupLine {
        stream: name.to_owned(),
        group: group.name.clone(),
        whose,
        consumers: group.consumers,
        pending: group.pending,
        read_ms_ago: read,
    }
}

async fn repair(opts: &RepairOpts, context: &Context, config: &Config, servers: &mut Servers) -> Result<Exit, Failure> {
    let all: Vec<&Pipeline> = config.pipelines.iter().collect();
    let found = groups(config, &all, servers).await?;
    let meant: Vec<GroupLine> = match &opts.group {
        None => found.iter().filter(|line| line.whose == "left_behind").cloned().collect(),
        Some(name) => found.iter().filter(|line| line.group == *name).cloned().collect(),
    };
    if let Some(name) = &opts.group {
        if meant.is_empty() {
            return Err(Failure::new(
                Exit::BadInput,
                format!("no configured stream has a group {name:?}: see `tidegate group list`"),
            ));
        }
        if let Some(line) = meant.iter().find(|line| ["configured", "other_pipeline"].contains(&line.whose)) {
            let words = format!(
                "{} is the group of a pipeline that is in use ({}): what it has not settled would have to be read again from the stream's start",
                line.group,
                line.whose.replace('_', " ")
            );
            return Err(Failure::new(Exit::BadInput, words));
        }
    }
    // A stream without its pipeline's own group has nobody yet who would read what the old one has pending.
    let is_read =
        |line: &GroupLine| found.iter().any(|other| other.stream == line.stream && other.whose == "configured");
    if let Some(line) = meant.iter().find(|line| !is_read(line)) {
        let words =
            format!("{} has no group of a configured pipeline yet: start the daemon first, then repair", line.stream);
        return Err(Failure::new(Exit::Retry, words));
    }
    if let Some(line) = meant.iter().find(|line| line.consumers > 0 && line.whose == "left_behind") {
        context.say(&format!(
            "{} has {}: is a daemon still running under the old name?",
            line.group,
            plural(line.consumers, "member", "members")
        ));
    }
    if !opts.dry_run && !meant.is_empty() {
        let names: Vec<String> =
            meant.iter().map(|line| format!("{} of {}", printable(&line.group), printable(&line.stream))).collect();
        context.say(&names.join("\n"));
        context.confirm(&format!("Destroy {}?", plural(meant.len() as u64, "group", "groups")), opts.yes)?;
        for line in &meant {
            let link = servers.link(&line.stream).await?;
            link.commands().call(Command::new("XGROUP").arg("DESTROY").arg(&line.stream).arg(&line.group)).await?;
        }
    }
    context.print(&Repaired { dry_run: opts.dry_run, groups: meant })?;
    Ok(Exit::Ok)
}

fn table(page: &mut Page, groups: &[GroupLine]) {
    let rows: Vec<Vec<String>> = groups
        .iter()
        .map(|line| {
            vec![
                printable(&line.stream),
                printable(&line.group),
                line.whose.replace('_', " "),
                count(line.consumers),
                count(line.pending),
                line.read_ms_ago.map_or_else(|| "never".into(), |ms| format!("{} ago", lasting_ms(ms))),
            ]
        })
        .collect();
    page.table(&["stream", "group", "whose", ">members", ">pending", ">read up to"], &rows);
}

impl Report for Groups {
    fn show(&self, page: &mut Page) {
        table(page, &self.groups);
    }
}

impl Report for Repaired {
    fn show(&self, page: &mut Page) {
        let groups = plural(self.groups.len() as u64, "group", "groups");
        let done = if self.dry_run { "would be destroyed; nothing was changed" } else { "destroyed" };
        page.toned(Tone::Good, format!("{groups} {done}"));
        if !self.groups.is_empty() {
            table(page, &self.groups);
        }
    }
}
