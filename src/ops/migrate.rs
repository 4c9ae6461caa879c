//! `tidegate migrate`: brings the database to the schema this program was built with.
//!
//! Takes the configuration; prints what was done, or with `--dry-run` what would be.

use super::complete::{Name, by};
use super::{Context, Exit, Failure};
use crate::config::{Config, Needs};
use crate::lanes;
use crate::model::names;
use crate::model::pipeline::Pipeline;
use crate::postgres::schema::{self, Error};
use crate::postgres::{Database, Endpoint};

/// What can be said on the command line.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Opts {
    /// Print the SQL that would run, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Carry the ledger of a renamed pipeline over to its new name, before the daemon starts under it
    #[arg(long, value_name = "OLD=NEW", value_parser = parse_rename, add = by(Name::Rename))]
    pub rename_pipeline: Option<(String, String)>,
    /// Carry the ledger of a pipeline over to the table that the configuration names, after the table was renamed
    #[arg(long, value_name = "PIPELINE", conflicts_with = "rename_pipeline", add = by(Name::Pipeline))]
    pub retarget: Option<String>,
}

fn parse_rename(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((old, new)) if !old.is_empty() && !new.is_empty() => Ok((old.to_owned(), new.to_owned())),
        _ => Err("write OLD=NEW, two names of pipelines".into()),
    }
}

/// Runs the verb.
pub async fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let config = context.configured(Vec::new(), Needs::POSTGRES)?;
    let address = config.postgres.address()?;
    let text = if let Some((old, new)) = &opts.rename_pipeline {
        rename(&address, &config, old, new).await?
    } else if let Some(name) = &opts.retarget {
        let Some(pipeline) = config.pipelines.iter().find(|pipeline| pipeline.name == *name) else {
            return Err(Failure::new(Exit::Config, format!("there is no pipeline {name:?} in the configuration")));
        };
        retarget(&address, &config, pipeline).await?
    } else if opts.dry_run {
        let migrations = schema::missing(&address).await?;
        let sql: String =
            migrations.iter().map(|m| format!("-- {:04} {}\n{}\n", m.version, m.description, m.sql.as_str())).collect();
        if sql.is_empty() { "-- nothing to do\n".into() } else { sql }
    } else {
        match schema::apply(&address).await? {
            0 => "the database is up to date\n".into(),
            1 => "1 migration applied\n".into(),
            n => format!("{n} migrations applied\n"),
        }
    };
    context.write(&text)?;
    Ok(Exit::Ok)
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::Fault(fault) => fault.into(),
            Error::Migration(_) => Failure::new(Exit::Error, error.to_string()),
            Error::Pooler => Failure::new(Exit::Config, error.to_string()),
        }
    }
}

/// Gives a pipeline's lanes its new name.
async fn rename(address: &Endpoint, config: &Config, old: &str, new: &str) -> Result<String, Failure> {
    let source = &config.valkey.source;
    let database = Database::new(address.clone(), 1);
    let names = database.run(async |c| lanes::names(c, source).await).await?;
    let knows = |name: &str| names.iter().any(|(pipeline, _)| pipeline == name);
    // Done before, it is no mistake; a slip of the pen is.
    if !knows(old) && !knows(new) {
        let mut known: Vec<&str> = names.iter().map(|(pipeline, _)| pipeline.as_str()).collect();
        known.dedup();
        let known = if known.is_empty() { "none yet".into() } else { known.join(", ") };
        return Err(Failure::new(Exit::Config, format!("the ledger knows no pipeline {old:?}: it knows {known}")));
    }
    let streams = database.run(async |c| lanes::rename(c, source, old, new).await).await?;
    let mut text = format!("{} ledgers carried over from {old} to {new}\n", streams.len());
    for stream in streams {
        // Until then the old group, which nobody reads with any more, holds back trimming.
        text += &format!(
            "when the daemon runs under its new name: `tidegate group repair`, which removes group {} from {stream}\n",
            names::group(old)
        );
    }
    Ok(text)
}

/// Gives a pipeline's lanes the table that the configuration names.
async fn retarget(address: &Endpoint, config: &Config, pipeline: &Pipeline) -> Result<String, Error> {
    let (source, target) = (&config.valkey.source, pipeline.table.to_string());
    let database = Database::new(address.clone(), 1);
    let streams = database.run(async |c| lanes::retarget(c, source, &pipeline.name, &target).await).await?;
    Ok(format!("{} ledgers of {name} carried over to {target}\n", streams.len(), name = pipeline.name))
}
