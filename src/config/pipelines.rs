//! Pipelines: the one section that may exist many times, and the rules between its keys.
//!
//! Takes the settings and the pipelines that were named; gives a [`Pipeline`] each. Fails with a problem for each key that
//! must be set and is not, and for each rule that is broken.

use std::collections::BTreeMap;

use super::guess::nearest;
use super::key::Section;
use super::problem::Problem;
use super::sections::PipelineSection;
use super::setting::Setting;
use super::settings::{Effective, Settings};
use crate::client::{MARK_FIELD, OP_FIELD, TRACEPARENT_FIELD};
use crate::merge::Merge;
use crate::model::datum::Calendar;
use crate::model::pipeline::{Pipeline, Table};
use crate::model::slot::hash_tag;
use crate::model::target::{Field, KeyColumn, Kind, Part, Target, ValueColumn};

/// The pipelines, each with the place that first named it.
pub(super) type Named = BTreeMap<String, String>;

/// All pipelines. None if one of their values was refused or is missing.
pub(super) fn build_all(settings: &Settings, named: &Named) -> Option<Vec<Pipeline>> {
    let sections: Vec<(&str, PipelineSection)> =
        named.keys().map(|name| Some((name.as_str(), section(settings, name)?))).collect::<Option<_>>()?;
    let leads = sections.iter().filter(|(_, section)| section.with.is_none());
    Some(leads.map(|(name, section)| build(name, section, &sections)).collect())
}

/// A section that goes with a pipeline: what that one reads is written into its table, too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rider {
    /// The section's name.
    pub name: String,
    /// The pipeline that it goes with.
    pub lead: String,
    /// Its table.
    pub table: Table,
}

/// Every section that goes with a pipeline. None if a value was refused or is missing.
pub(super) fn riders(settings: &Settings, named: &Named) -> Option<Vec<Rider>> {
    let rider = |name: &String| {
        let section = section(settings, name)?;
        Some(section.with.map(|lead| Rider { name: name.clone(), lead, table: section.table }))
    };
    Some(named.keys().map(rider).collect::<Option<Vec<_>>>()?.into_iter().flatten().collect())
}

fn section(settings: &Settings, name: &str) -> Option<PipelineSection> {
    PipelineSection::from_settings(settings, &PipelineSection::PATH.replace("<name>", name))
}

/// What is about a stream.
const OF_STREAMS: [&str; 5] = ["stream", "shards", "delivery", "mode", "counter_prefix"];

/// Whoever goes with another pipeline has its stream, and all that is about one.
pub(super) fn settle(settings: &mut Settings, named: &Named) {
    for name in named.keys() {
        let lead = settings.get(&format!("pipelines.{name}.with")).and_then(|with| with.setting.as_ref()?.text());
        if let Some(lead) = lead.map(str::to_owned) {
            for key in OF_STREAMS {
                // Where there is no such pipeline, that is the problem, and no missing stream.
                let otherwise = (key == "stream").then(|| Setting::Text(lead.clone()));
                settings.inherit(&format!("pipelines.{name}.{key}"), &format!("pipelines.{lead}.{key}"), otherwise);
            }
        }
    }
}

/// A pipeline, and the tables of those that go with it.
fn build(name: &str, section: &PipelineSection, all: &[(&str, PipelineSection)]) -> Pipeline {
    let mut pipeline = Pipeline {
        name: name.into(),
        stream: section.stream.clone(),
        shards: section.shards,
        table: section.table.clone(),
        key: section.key_column.clone(),
        value: section.value_column.clone(),
        updated_at: section.updated_at_column.clone(),
        key_field: section.key_field.clone(),
        value_field: section.value_field.clone(),
        tables: Vec::new(),
        counters: section.counter_prefix.clone(),
        mode: section.mode,
        delivery: section.delivery,
    };
    let of_counter = pipeline.targets().swap_remove(0);
    let own = target(section);
    let others = all.iter().filter(|(_, other)| other.with.as_deref() == Some(name)).map(|(_, other)| target(other));
    let tables: Vec<Target> = std::iter::once(own).chain(others).collect();
    if tables != [of_counter] {
        pipeline.tables = tables;
    }
    pipeline
}

/// The table of a section. What it says nothing of is as it is for counters.
fn target(section: &PipelineSection) -> Target {
    let PipelineSection { key_column, key_field, value_column, value_field, .. } = section;
    let mut target = Target {
        table: section.table.clone(),
        keys: section.keys.clone(),
        values: section.values.clone(),
        updated_at: section.updated_at_column.clone(),
        write: section.write,
    };
    if target.keys.is_empty() {
        target.keys.push(KeyColumn { column: key_column.clone(), part: Part::Field(key_field.clone(), Kind::Text) });
    }
    if target.values.is_empty() {
        let field = Field { name: value_field.clone(), kind: Kind::Bigint, is_optional: false };
        target.values.push(ValueColumn {
            column: value_column.clone(),
            merge: Merge::Sum,
            field: Some(field),
            by: None,
        });
    }
    target
}

/// Every problem between the keys of a pipeline, and between pipelines.
pub(super) fn check(settings: &Settings, named: &Named) -> Vec<Problem> {
    let sections: Vec<(&str, PipelineSection)> =
        named.keys().filter_map(|name| Some((name.as_str(), section(settings, name)?))).collect();
    let riders: Vec<&str> =
        sections.iter().filter(|(_, section)| section.with.is_some()).map(|(name, _)| *name).collect();
    let mut problems: Vec<Problem> = settings
        .missing()
        .filter(|effective| effective.key.is_of_pipelines())
        .map(|effective| missing(effective, named))
        .collect();
    for (name, section) in &sections {
        let sentences = [
            goes_with(settings, name, section, &riders, named),
            columns_twice(settings, name, section),
            zone(name, section),
        ];
        let contradiction = target(section).contradiction().map(|said| format!("pipeline {name} {said}"));
        let place = named.get(*name).cloned().unwrap_or_default();
        let all = sentences.into_iter().flatten().chain(contradiction);
        problems.extend(all.map(|sentence| Problem::invalid(&place, sentence)));
    }
    let leads = sections.iter().filter(|(_, section)| section.with.is_none());
    let pipelines: Vec<Pipeline> = leads.map(|(name, section)| build(name, section, &sections)).collect();
    for (index, pipeline) in pipelines.iter().enumerate() {
        let others: Vec<&Pipeline> =
            pipelines.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, other)| other).collect();
        let sentences = [
            twins(&pipelines[..index], pipeline),
            tag(pipeline),
            fields(pipeline),
            managed(pipeline),
            prefix(pipeline),
            shared_counters(&others, pipeline),
        ];
        let place = named.get(&pipeline.name).cloned().unwrap_or_default();
        problems.extend(sentences.into_iter().flatten().map(|sentence| Problem::invalid(&place, sentence)));
    }
    problems
}

/// Whoever goes with another pipeline has no stream of its own, nor anything that is about one.
fn goes_with(
    settings: &Settings,
    name: &str,
    section: &PipelineSection,
    riders: &[&str],
    named: &Named,
) -> Option<String> {
    let lead = section.with.as_deref()?;
    if let Some(key) = OF_STREAMS.into_iter().find(|key| settings.is_set(&format!("pipelines.{name}.{key}"))) {
        return Some(format!("pipeline {name} goes with {lead}, which says {key} for both; leave {key} out"));
    }
    if !named.contains_key(lead) {
        let hint = nearest(lead, named.keys().filter(|other| *other != name).cloned());
        let hint = hint.map(|meant| format!("did you mean {meant}? ")).unwrap_or_default();
        return Some(format!(
            "pipeline {name} goes with {lead:?}, which is no pipeline; {hint}name one that reads a stream"
        ));
    }
    if lead == name || riders.contains(&lead) {
        return Some(format!("pipeline {name} goes with {lead}, which reads no stream itself; name one that does"));
    }
    None
}

/// Keys and values are written in one way.
fn columns_twice(settings: &Settings, name: &str, section: &PipelineSection) -> Option<String> {
    let long = |is_empty: bool, long: &'static str, short: [&'static str; 2]| {
        let short = short.into_iter().find(|short| settings.is_set(&format!("pipelines.{name}.{short}")));
        short.filter(|_| !is_empty).map(|short| format!("pipeline {name} has {long} and {short}; write one of them"))
    };
    long(section.keys.is_empty(), "keys", ["key_column", "key_field"])
        .or_else(|| long(section.values.is_empty(), "values", ["value_column", "value_field"]))
}

fn zone(name: &str, section: &PipelineSection) -> Option<String> {
    section.keys.iter().find_map(|key| match &key.part {
        Part::Bucket { unit, zone, .. } if Calendar::of(*unit, zone).is_none() => {
            Some(format!("pipeline {name} names the time zone {zone:?}, which is not known; write an IANA name such as Europe/Berlin, or UTC"))
        }
        _ => None,
    })
}

/// Only a counter a row can be answered for.
fn managed(pipeline: &Pipeline) -> Option<String> {
    (pipeline.is_managed() && !pipeline.is_counter()).then(|| {
        format!(
            "pipeline {} is managed, and its rows are more than a counter each; leave out keys, values and write, or write mode = \"plain\"",
            pipeline.name
        )
    })
}

/// A key of a pipeline that must be set.
fn missing(effective: &Effective, named: &Named) -> Problem {
    let name = effective.path.split('.').nth(1).unwrap_or_default();
    let others = named.keys().map(String::as_str).chain(["counters"]).filter(|other| *other != name);
    let hint = nearest(name, others.map(str::to_owned));
    let hint = hint.map(|meant| format!("; or did you mean the pipeline {meant}?")).unwrap_or_default();
    let sentence = format!("{} is missing; {}{hint}", effective.path, effective.key.kind.advice());
    Problem::invalid(named.get(name).cloned().unwrap_or_default(), sentence)
}

fn twins(before: &[Pipeline], pipeline: &Pipeline) -> Option<String> {
    let Pipeline { name, stream, .. } = pipeline;
    let tables: Vec<Table> = pipeline.targets().into_iter().map(|target| target.table).collect();
    if let Some((_, table)) = tables.iter().enumerate().find(|(n, table)| tables[..*n].contains(table)) {
        return Some(format!(
            "pipeline {name} and one that goes with it both feed {table}: every delta would count twice; give one of them another table"
        ));
    }
    let feeds = |other: &&Pipeline, table: &Table| other.targets().iter().any(|target| target.table == *table);
    let twin = |table: &Table| before.iter().find(|other| other.stream == *stream && feeds(other, table));
    let (table, twin) = tables.iter().find_map(|table| Some((table, twin(table)?)))?;
    Some(format!(
        "pipelines {} and {name} both feed {table} from {stream}: every delta would count twice; remove one or change its \
         stream or table",
        twin.name
    ))
}

fn tag(pipeline: &Pipeline) -> Option<String> {
    let Pipeline { name, stream, shards, .. } = pipeline;
    let tag = hash_tag(stream).filter(|_| *shards > 1)?;
    Some(format!(
        "pipeline {name} has {shards} shards, and {{{tag}}} in its stream would keep them all in one slot of a cluster; write a stream \
         without braces, for each shard gets a hash tag of its own"
    ))
}

fn fields(pipeline: &Pipeline) -> Option<String> {
    let Pipeline { name, .. } = pipeline;
    let targets = pipeline.targets();
    let used = || targets.iter().flat_map(Target::fields);
    let of_producers = used().find(|field| [OP_FIELD, TRACEPARENT_FIELD].contains(field));
    let mark = used().find(|field| pipeline.is_managed() && *field == MARK_FIELD);
    match of_producers.or(mark) {
        Some(field) => Some(format!("pipeline {name} uses the field {field}, which producers fill; use another one")),
        None => (pipeline.is_counter() && pipeline.key_field == pipeline.value_field).then(|| {
            format!("pipeline {name} uses one field twice; write two different ones as key_field and value_field")
        }),
    }
}

/// What decides the slot of a key in a cluster, and Tidegate's own names, stay clear of the counters.
fn prefix(pipeline: &Pipeline) -> Option<String> {
    let Pipeline { name, counters, .. } = pipeline;
    let is_sound = !counters.contains(['{', '}']) && !counters.starts_with("tidegate:");
    (!is_sound).then(|| {
        format!(
            "pipeline {name} has the counter_prefix {counters:?}; write one without braces that does not begin with tidegate:"
        )
    })
}

/// A managed counter stands for one row, which nobody else writes.
fn shared_counters(others: &[&Pipeline], pipeline: &Pipeline) -> Option<String> {
    let Pipeline { name, counters, table, .. } = pipeline;
    if !pipeline.is_managed() {
        return None;
    }
    if let Some(other) = others.iter().find(|other| other.targets().iter().any(|target| target.table == *table)) {
        return Some(format!(
            "pipeline {name} is managed, and pipeline {} writes the same table {table}: a counter would lack the other one's \
             deltas; give one of them another table, or write mode = \"plain\"",
            other.name
        ));
    }
    let within = |a: &str, b: &str| format!("{a}:").starts_with(&format!("{b}:"));
    let other = others.iter().find(|other| within(&other.counters, counters) || within(counters, &other.counters))?;
    Some(format!(
        "pipeline {name} is managed, and the counters of pipeline {} have the same names ({:?} and {counters:?}); write another \
         counter_prefix for one of them",
        other.name, other.counters
    ))
}
