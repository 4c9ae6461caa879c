//! Pipelines: the one section that may exist many times, and the rules between its keys.
//!
//! Takes the settings and the pipelines that were named; gives a [`Pipeline`] each. Fails with a problem for each key that
//! must be set and is not, and for each rule that is broken.

use std::collections::BTreeMap;

use super::guess::nearest;
use super::key::Section;
use super::problem::Problem;
use super::sections::PipelineSection;
use super::settings::{Effective, Settings};
use crate::client::{MARK_FIELD, OP_FIELD, TRACEPARENT_FIELD};
use crate::model::pipeline::Pipeline;
use crate::model::slot::hash_tag;

/// The pipelines, each with the place that first named it.
pub(super) type Named = BTreeMap<String, String>;

/// The pipeline of this name. None if one of its values was refused or is missing.
pub(super) fn build(settings: &Settings, name: &str) -> Option<Pipeline> {
    let path = PipelineSection::PATH.replace("<name>", name);
    let section = PipelineSection::from_settings(settings, &path)?;
    Some(Pipeline {
        name: name.into(),
        stream: section.stream,
        shards: section.shards,
        table: section.table,
        key: section.key_column,
        value: section.value_column,
        updated_at: section.updated_at_column,
        key_field: section.key_field,
        value_field: section.value_field,
        merge: section.merge,
        counters: section.counter_prefix,
        mode: section.mode,
        delivery: section.delivery,
    })
}

/// Every problem between the keys of a pipeline, and between pipelines.
pub(super) fn check(settings: &Settings, named: &Named) -> Vec<Problem> {
    let mut problems: Vec<Problem> = settings.missing().map(|effective| missing(effective, named)).collect();
    let pipelines: Vec<Pipeline> = named.keys().filter_map(|name| build(settings, name)).collect();
    for (index, pipeline) in pipelines.iter().enumerate() {
        let others: Vec<&Pipeline> =
            pipelines.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, other)| other).collect();
        let sentences = [
            twins(&pipelines[..index], pipeline),
            tag(pipeline),
            fields(pipeline),
            columns(pipeline),
            prefix(pipeline),
            shared_counters(&others, pipeline),
        ];
        let place = named.get(&pipeline.name).cloned().unwrap_or_default();
        problems.extend(sentences.into_iter().flatten().map(|sentence| Problem::invalid(&place, sentence)));
    }
    problems
}

/// Only a pipeline has keys that must be set.
fn missing(effective: &Effective, named: &Named) -> Problem {
    let name = effective.path.split('.').nth(1).unwrap_or_default();
    let others = named.keys().map(String::as_str).chain(["counters"]).filter(|other| *other != name);
    let hint = nearest(name, others.map(str::to_owned));
    let hint = hint.map(|meant| format!("; or did you mean the pipeline {meant}?")).unwrap_or_default();
    let sentence = format!("{} is missing; {}{hint}", effective.path, effective.key.kind.advice());
    Problem::invalid(named.get(name).cloned().unwrap_or_default(), sentence)
}

fn twins(before: &[Pipeline], pipeline: &Pipeline) -> Option<String> {
    let Pipeline { name, stream, table, .. } = pipeline;
    let twin = before.iter().find(|other| (&other.stream, &other.table) == (stream, table))?;
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
    let Pipeline { name, key_field, value_field, .. } = pipeline;
    let of_producers =
        [key_field, value_field].into_iter().find(|f| [OP_FIELD, TRACEPARENT_FIELD].contains(&f.as_str()));
    let mark = [key_field, value_field].into_iter().find(|f| pipeline.is_managed() && *f == MARK_FIELD);
    match of_producers.or(mark) {
        Some(field) => Some(format!(
            "pipeline {name} uses the field {field}, which producers fill; write other fields as key_field and value_field"
        )),
        None => (key_field == value_field).then(|| {
            format!("pipeline {name} uses one field twice; write two different ones as key_field and value_field")
        }),
    }
}

fn columns(pipeline: &Pipeline) -> Option<String> {
    let Pipeline { name, key, value, updated_at, .. } = pipeline;
    let twice = key == value || updated_at.as_ref().is_some_and(|column| column == key || column == value);
    twice.then(|| {
        format!(
            "pipeline {name} uses one column twice; write three different ones as key_column, value_column and \
             updated_at_column"
        )
    })
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
    if let Some(other) = others.iter().find(|other| other.table == *table) {
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
