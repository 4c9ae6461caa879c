//! Names: what each argument of the command line that takes a name can be.
//!
//! Takes what is begun of the name; gives those that begin so. Codes, checks and runbooks are known to the program; pipelines and keys are
//! those of the configuration that the command would read; all else is asked of the servers ([`ask`](super::ask)). A configuration that is
//! wrong has no names: the command says what is wrong, and Tab does not.

use std::ffi::OsStr;
use std::path::PathBuf;

use clap_complete::engine::{ArgValueCompleter, CompletionCandidate, ValueCompleter};

use super::{ask, typed, words};
use crate::config::{Config, Loaded, Needs, Sources, load};
use crate::model::pipeline::{Delivery, Pipeline, Table};
use crate::ops::columns::printable;
use crate::ops::{explain, runbook};

/// What an argument is the name of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    /// Any pipeline.
    Pipeline,
    /// A pipeline of counters.
    CounterPipeline,
    /// A pipeline of counters whose truth is PostgreSQL.
    ManagedPipeline,
    /// `OLD=NEW`: a pipeline that the ledger knows and the configuration does not, and its new name.
    Rename,
    /// A stream of a pipeline.
    Stream,
    /// Any stream in Valkey.
    AnyStream,
    /// A consumer of a pipeline's group.
    Consumer,
    /// A consumer group of a configured stream that is no pipeline's.
    Group,
    /// A table in PostgreSQL.
    Table,
    /// A dead letter's entry.
    Letter,
    /// Why an entry became a dead letter.
    Reason,
    /// What `explain` explains.
    Code,
    /// An alert with a runbook.
    Runbook,
    /// A key of the configuration, or a section.
    Key,
    /// How a stream is read.
    Delivery,
}

/// For an argument that is a name of this kind.
pub fn by(name: Name) -> ArgValueCompleter {
    ArgValueCompleter::new(name)
}

/// A name, and what is said of it.
pub(super) struct Known {
    pub(super) name: String,
    pub(super) said: String,
}

impl Known {
    pub(super) fn new(name: impl Into<String>, said: impl Into<String>) -> Known {
        Known { name: name.into(), said: said.into() }
    }
}

impl ValueCompleter for Name {
    fn complete(&self, begun: &OsStr) -> Vec<CompletionCandidate> {
        let Some(begun) = begun.to_str() else { return Vec::new() };
        let mut known = self.known(begun).unwrap_or_default();
        known.retain(|known| known.name.starts_with(begun));
        let mut seen = std::collections::HashSet::new();
        known.retain(|known| seen.insert(known.name.clone()));
        let candidate = |Known { name, said }| {
            CompletionCandidate::new(name).help((!said.is_empty()).then(|| printable(&said).into()))
        };
        known.into_iter().map(candidate).collect()
    }
}

impl Name {
    /// All that may be meant; none where there is no valid configuration to tell.
    fn known(self, begun: &str) -> Option<Vec<Known>> {
        match self {
            Name::Code => Some(codes()),
            Name::Reason => {
                Some(explain::REASONS.iter().map(|(reason, meaning)| Known::new(*reason, *meaning)).collect())
            }
            Name::Runbook => Some(runbook::names().map(|name| Known::new(name, "")).collect()),
            Name::Delivery => Some([Delivery::Group, Delivery::Exclusive].map(|way| Known::new(way.word(), "")).into()),
            Name::Key => Some(keys(&loaded(Needs::NONE)?)),
            Name::Pipeline => pipelines(|_| true),
            Name::CounterPipeline => pipelines(Pipeline::is_counter),
            Name::ManagedPipeline => pipelines(Pipeline::is_managed),
            Name::Rename => rename(begun),
            Name::Stream => Some(streams(&loaded(Needs::NONE)?.config)),
            Name::AnyStream => Some(ask::streams(&loaded(Needs::VALKEY)?.config, begun)),
            Name::Consumer => {
                let config = loaded(Needs::VALKEY)?.config;
                Some(ask::consumers(&config, &meant(&config), begun))
            }
            Name::Group => Some(ask::groups(&loaded(Needs::VALKEY)?.config, begun)),
            Name::Table => {
                let mut tables = ask::tables(&loaded(Needs::POSTGRES)?.config, begun);
                tables.retain(|table| Table::parse(&table.name).is_ok());
                Some(tables)
            }
            Name::Letter => {
                let is_reopened = words().iter().any(|word| word == "reopen");
                Some(ask::letters(&loaded(Needs::POSTGRES)?.config, is_reopened))
            }
        }
    }
}

/// The configuration that the command would read.
fn loaded(needs: Needs) -> Option<Loaded> {
    let file = typed("--config").pop().map(|path| match (path.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(path),
    });
    load(&Sources::from_process(file, Vec::new()), needs).ok()
}

fn pipelines(is_meant: impl Fn(&Pipeline) -> bool) -> Option<Vec<Known>> {
    let config = loaded(Needs::NONE)?.config;
    let known = |pipeline: &Pipeline| Known::new(&pipeline.name, format!("{} -> {}", pipeline.stream, pipeline.table));
    Some(config.pipelines.iter().filter(|pipeline| is_meant(pipeline)).map(known).collect())
}

/// The pipelines that the line names; without any, all.
fn meant(config: &Config) -> Vec<&Pipeline> {
    let named = typed("--pipeline");
    config.pipelines.iter().filter(|pipeline| named.is_empty() || named.contains(&pipeline.name)).collect()
}

fn streams(config: &Config) -> Vec<Known> {
    let of_pipeline = |pipeline: &&Pipeline| {
        pipeline.shards().into_iter().map(|shard| Known::new(shard.stream, format!("of {}", shard.pipeline.name)))
    };
    meant(config).iter().flat_map(of_pipeline).collect()
}

fn rename(begun: &str) -> Option<Vec<Known>> {
    let config = loaded(Needs::NONE)?.config;
    if let Some((old, _)) = begun.split_once('=') {
        let renamed = |pipeline: &Pipeline| Known::new(format!("{old}={}", pipeline.name), "");
        return Some(config.pipelines.iter().map(renamed).collect());
    }
    let mut left = ask::pipelines_of_ledger(&loaded(Needs::POSTGRES)?.config);
    left.retain(|known| config.pipelines.iter().all(|pipeline| pipeline.name != known.name));
    left.iter_mut().for_each(|known| known.name.push('='));
    Some(left)
}

/// Each key, behind the sections that it is in.
fn keys(loaded: &Loaded) -> Vec<Known> {
    let mut keys = Vec::new();
    for row in loaded.describe() {
        for (end, _) in row.key.match_indices('.') {
            let section = &row.key[..end];
            if !keys.iter().any(|known: &Known| known.name == section) {
                keys.push(Known::new(section, ""));
            }
        }
        keys.push(Known::new(&row.key, row.reason));
    }
    keys
}

fn codes() -> Vec<Known> {
    let known = |code: String| {
        let meaning = explain::advice(&code).unwrap_or_default();
        Known::new(code, meaning)
    };
    explain::codes().map(known).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_that_is_offered_is_explained() {
        let codes = codes();
        for code in ["D1", "42P01", "NOGROUP", "bad_amount", "78"] {
            assert!(codes.iter().any(|known| known.name == code), "{code} is offered");
        }
        assert!(codes.iter().all(|known| !known.said.is_empty()));
    }

    #[test]
    fn only_what_begins_as_typed_is_offered_and_once() {
        let offered = Name::Runbook.complete(OsStr::new("TidegateHal"));
        assert_eq!(offered.len(), 1, "{offered:?}");
        assert!(Name::Runbook.complete(OsStr::new("")).len() > 5);
        assert!(Name::Reason.complete(OsStr::new("x")).is_empty());
    }
}
