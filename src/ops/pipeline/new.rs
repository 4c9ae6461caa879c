//! `tidegate pipeline new`: a pipeline's section and its migration, to begin with.
//!
//! Takes a table that is there, or a stream; prints what can be used as it is, with remarks where somebody must choose. Changes nothing.

use std::ops::ControlFlow;
use std::time::Duration;

use super::draft::{Draft, Proposal};
use super::sample::Sample;
use super::{stream, table};
use crate::config::{Config, Needs, is_pipeline_name};
use crate::model::entry::{Canonical, write_canonical};
use crate::model::pipeline::{Pipeline, Table};
use crate::ops::complete::{Name, by};
use crate::ops::context::Format;
use crate::ops::{Context, Exit, Failure};
use crate::postgres::Database;
use crate::target::{self, Weight};
use crate::valkey::resp::Bounds;
use crate::valkey::{Command, Delivered, Link};

/// What is held of one entry, and kept of a larger one.
const BOUNDS: Bounds = Bounds { entry: 256 << 10, kept: 4 << 10 };

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// Make it from this table, as schema.name: keys from its primary key or a unique index, values by type
    #[arg(long, value_name = "TABLE", required_unless_present = "stream", conflicts_with_all = ["stream", "count"], add = by(Name::Table))]
    pub table: Option<String>,
    /// Make it from the newest entries of this stream: types from all their values
    #[arg(long, value_name = "KEY", add = by(Name::AnyStream))]
    pub stream: Option<String>,
    /// With --stream: how many entries are looked at
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub count: u32,
    /// The pipeline's name; default: the table's, or one like the stream's
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Print only the migration, for psql
    #[arg(long)]
    pub sql: bool,
}

/// Runs the verb.
pub(super) async fn run(opts: &Opts, context: &Context) -> Result<Exit, Failure> {
    if let Some(name) = opts.name.as_ref().filter(|name| !is_pipeline_name(name)) {
        return Err(Failure::usage(format!(
            "{name:?} is no name of a pipeline: use a letter or _, then letters, digits, _ or -, 63 at most"
        )));
    }
    let draft = match (&opts.table, &opts.stream) {
        (Some(table), _) => of_table(opts, context, table).await?,
        (None, Some(stream)) => of_stream(opts, context, stream).await?,
        (None, None) => return Err(Failure::usage("say what to make it from: --table schema.name or --stream key")),
    };
    if let Some(said) = draft.target().contradiction() {
        return Err(Failure::new(Exit::Error, format!("what would be proposed {said}: write the section by hand")));
    }
    let proposal: Proposal = draft.proposal();
    if opts.sql && context.format == Format::Table {
        context.write(&proposal.migration)?;
    } else {
        context.print(&proposal)?;
    }
    Ok(Exit::Ok)
}

async fn of_table(opts: &Opts, context: &Context, name: &str) -> Result<Draft, Failure> {
    let config: Config = context.configured(Vec::new(), Needs::POSTGRES)?;
    let table = Table::parse(name).map_err(|bad| Failure::usage(format!("--table: {bad}")))?;
    let database = Database::new(config.postgres.address()?, 1);
    let outline = database.run(async |c| target::outline(c, &table).await).await?;
    let Some(outline) = outline else {
        return Err(Failure::new(
            Exit::BadInput,
            format!("there is no table {table}: name one as schema.name, or make a pipeline from a --stream"),
        ));
    };
    let pipeline = opts.name.clone().unwrap_or_else(|| table.name.to_string());
    let stream = format!("flush:{pipeline}");
    let mut draft =
        table::draft(&pipeline, &stream, &table, &outline).map_err(|why| Failure::new(Exit::BadInput, why))?;
    // What still stands against it becomes its migration.
    let proposed = Pipeline { table: table.clone(), tables: vec![draft.target()], ..Pipeline::counters() };
    let examined = database.run(async |c| target::examine(c, &proposed).await).await?;
    database.close().await;
    for finding in examined.into_iter().flat_map(|examined| examined.findings) {
        match (finding.weight, finding.fix) {
            (Weight::Refusal, Some(fix)) => {
                draft.notes.push(format!("Needs its migration: {}.", finding.what));
                draft.migration.push(fix);
            }
            (Weight::Refusal | Weight::Warning, _) => draft.notes.push(format!("To be known: {}.", finding.what)),
            (Weight::Advice, Some(fix)) => draft.migration.push(fix),
            (Weight::Advice, None) => {}
        }
    }
    Ok(draft)
}

async fn of_stream(opts: &Opts, context: &Context, stream: &str) -> Result<Draft, Failure> {
    let config: Config = context.configured(Vec::new(), Needs::VALKEY)?;
    let link = Link::open(&config.valkey.address()?.of_stream(stream), "tidegate:new").await?;
    let (mut wire, _) = link.open_wire("tidegate:new", BOUNDS).await?;
    let mut sample = Sample::default();
    wire.send(&Command::new("XREVRANGE").arg(stream).arg("+").arg("-").arg("COUNT").arg(opts.count));
    let mut bytes = Vec::new();
    let read = wire.run(Duration::ZERO, |delivered| {
        // One that is too large to be held tells too little of its fields.
        if let Delivered::Whole(id, strings) = delivered {
            bytes.clear();
            write_canonical(&mut bytes, id, strings);
            sample.add(Canonical(&bytes).fields());
        }
        ControlFlow::Continue(())
    });
    read.await?;
    if sample.entries == 0 {
        return Err(Failure::new(
            Exit::BadInput,
            format!(
                "there are no entries in the stream {stream:?}: name one that producers add to, or make a pipeline from a --table"
            ),
        ));
    }
    let last = stream.rsplit([':', '/', '.']).find(|part| !part.is_empty() && !part.starts_with('{')).unwrap_or(stream);
    let plain: String =
        last.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).collect();
    let plain: String = plain.trim_matches('_').chars().take(60).collect();
    let usual = if plain.starts_with(|c: char| c.is_ascii_alphabetic()) { plain } else { format!("p_{plain}") };
    let pipeline = opts.name.clone().unwrap_or(usual);
    // A pipeline's name may have a hyphen, a table's may not.
    let table = Table::parse(&pipeline.replace('-', "_")).map_err(|bad| Failure::usage(format!("--name: {bad}")))?;
    stream::draft(&pipeline, stream, &table, &sample).map_err(|why| Failure::new(Exit::BadInput, why))
}
