//! The settings that took effect: each key with its value and where that was written.
//!
//! Takes the merged layers; gives the values of the section structs, the rows that `check --print` shows, and a problem for
//! each relation between keys that does not hold.

use config::{ConfigError, Source, Value, ValueKind};

use super::Row;
use super::key::{Key, Section};
use super::pipelines::Named;
use super::problem::Problem;
use super::sections::{KEYS, Order, RELATIONS, Relation};
use super::setting::{Field, Setting};

/// Every key's setting, in the order of the declaration, pipelines last.
pub(super) struct Settings(Vec<Effective>);

/// A key as it took effect.
pub(super) struct Effective {
    pub(super) path: String,
    pub(super) key: &'static Key,
    /// None if the value was refused, which has been reported, or is missing.
    pub(super) setting: Option<Setting>,
    /// None if no source sets the key and it has no default.
    pub(super) origin: Option<String>,
}

impl Effective {
    fn with_origin(&self, setting: &Setting) -> String {
        let origin = self.origin.as_deref().unwrap_or("default");
        format!("{} ({}, {origin})", self.path, self.key.kind.show(setting))
    }
}

impl Settings {
    /// The settings of these merged layers.
    pub(super) fn of(merged: &config::Config, pipelines: &Named, acceptances: &Named) -> Result<Settings, ConfigError> {
        let root = Value::new(None, ValueKind::Table(merged.collect()?));
        let effective = |path: String, key: &'static Key| {
            let value = find(&root, &path);
            let text = value.and_then(|value| match &value.kind {
                ValueKind::String(text) => Some(text),
                _ => None,
            });
            Effective {
                setting: text.and_then(|text| key.kind.read(text).ok()),
                origin: value.and_then(|value| value.origin().map(str::to_owned)),
                path,
                key,
            }
        };
        let (of_acceptances, others): (Vec<&'static Key>, Vec<_>) =
            KEYS.iter().partition(|key| key.is_of_acceptances());
        let (of_pipelines, single): (Vec<_>, Vec<_>) = others.into_iter().partition(|key| key.is_of_pipelines());
        let mut all: Vec<_> = single.into_iter().map(|key| effective(key.name.into(), key)).collect();
        for number in acceptances.keys() {
            all.extend(of_acceptances.iter().map(|key| effective(key.path(number), key)));
        }
        for name in pipelines.keys() {
            all.extend(of_pipelines.iter().map(|key| effective(key.path(name), key)));
        }
        Ok(Settings(all))
    }

    /// The struct of a section that exists once.
    pub(super) fn section<T: Section>(&self) -> Option<T> {
        T::from_settings(self, T::PATH)
    }

    /// The value of one field. None if it was refused or is missing.
    pub(super) fn value<T: Field>(&self, path: &str) -> Option<T> {
        T::from_setting(self.get(path)?.setting.as_ref()?)
    }

    /// Whether a source sets this key.
    pub(super) fn is_set(&self, path: &str) -> bool {
        let origin = self.get(path).and_then(|effective| effective.origin.as_deref());
        origin.is_some_and(|origin| origin != "default" && !origin.starts_with("pipelines."))
    }

    /// A key that no source sets has the value of another one; of none, where that one has none.
    pub(super) fn inherit(&mut self, path: &str, from: &str, otherwise: Option<Setting>) {
        let inherited = self.get(from).and_then(|effective| effective.setting.clone()).or(otherwise);
        if let (false, Some(setting), Some(effective)) = (self.is_set(path), inherited, self.get_mut(path)) {
            (effective.setting, effective.origin) = (Some(setting), Some(from.to_owned()));
        }
    }

    pub(super) fn get(&self, path: &str) -> Option<&Effective> {
        self.0.iter().find(|effective| effective.path == path)
    }

    pub(super) fn get_mut(&mut self, path: &str) -> Option<&mut Effective> {
        self.0.iter_mut().find(|effective| effective.path == path)
    }

    /// The keys that no source sets and that have no default.
    pub(super) fn missing(&self) -> impl Iterator<Item = &Effective> {
        self.0.iter().filter(|effective| effective.origin.is_none())
    }

    /// The first of these paths that is written somewhere: its place.
    pub(super) fn place_of(&self, paths: &[&str]) -> String {
        let mut origins = paths.iter().filter_map(|path| self.get(path)?.origin.clone());
        origins.find(|origin| origin != "default").unwrap_or_else(|| Problem::NOWHERE.into())
    }

    /// Every key as `check --print` shows it.
    pub(super) fn rows(&self) -> Vec<Row> {
        let row = |effective: &Effective| {
            Some(Row {
                key: effective.path.clone(),
                value: effective.key.kind.show(effective.setting.as_ref()?),
                origin: effective.origin.clone()?,
                unit: effective.key.kind.unit(),
                reason: effective.key.reason,
            })
        };
        self.0.iter().filter_map(row).collect()
    }

    /// A problem for each relation that does not hold. A refused value is not compared: what was meant is unknown.
    pub(super) fn check_relations(&self) -> impl Iterator<Item = Problem> {
        RELATIONS.iter().filter_map(|relation| self.check_relation(relation))
    }

    fn check_relation(&self, relation: &Relation) -> Option<Problem> {
        let (lesser, greater) = (self.get(relation.lesser)?, self.get(relation.greater)?);
        let (small, large) = (lesser.setting.as_ref()?, greater.setting.as_ref()?);
        let (holds, must) = match relation.order {
            Order::Below => (small.size()? < large.size()?, "less than"),
            Order::AtMost => (small.size()? <= large.size()?, "at most"),
        };
        let sentence = format!(
            "{} must be {must} {}, otherwise {}; lower the first or raise the second",
            lesser.with_origin(small),
            greater.with_origin(large),
            relation.reason,
        );
        (!holds).then(|| Problem::invalid(self.place_of(&[relation.lesser, relation.greater]), sentence))
    }
}

fn find<'a>(root: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(root, |value, part| match &value.kind {
        ValueKind::Table(table) => table.get(part),
        _ => None,
    })
}
