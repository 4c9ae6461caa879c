//! The layers that a configuration is read from, and the strict check of each value where it is written.
//!
//! Takes the sources; gives one layer of texts for each, weakest first, and every problem found on the way. The `config`
//! crate merges the layers afterwards and keeps the origin of each value. It is given checked texts only: by itself it
//! would convert `"10"` and `true` to numbers and round `10.7` to 11.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::{env, fmt};

use config::{ConfigError, Map, Source, Value, ValueKind};

use super::file;
use super::guess::did_you_mean;
use super::key::{Key, acceptance_in, find};
use super::kind::{Kind, is_name};
use super::pipelines::Named;
use super::problem::Problem;
use super::sections::KEYS;

/// Names the configuration file.
const FILE_VARIABLE: &str = "TIDEGATE_CONFIG";
/// The start of every variable that sets a key.
const PREFIX: &str = "TIDEGATE__";
/// The variables that other programs read the two urls from.
const URL_VARIABLES: [(&str, &str); 2] = [("VALKEY_URL", "valkey.url"), ("DATABASE_URL", "postgres.url")];

/// Where a configuration comes from. Nothing else is read.
#[derive(Clone, Default)]
pub struct Sources {
    /// The file named by `--config`; without it, the one that `TIDEGATE_CONFIG` names; without that, none.
    pub file: Option<PathBuf>,
    /// The environment.
    pub env: BTreeMap<String, String>,
    /// Keys and texts from the command line; of several for one key the last one wins.
    pub flags: Vec<(String, String)>,
}

impl Sources {
    /// The variables of this process that concern Tidegate, and the command line.
    pub fn from_process(config_flag: Option<PathBuf>, flags: Vec<(String, String)>) -> Sources {
        let concerns_us =
            |name: &str| name.starts_with("TIDEGATE_") || URL_VARIABLES.iter().any(|(variable, _)| *variable == name);
        // Where a value is not UTF-8 the replacement character stays, and the check refuses it.
        let env = env::vars_os()
            .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
            .filter(|(name, _)| concerns_us(name))
            .collect();
        Sources { file: config_flag, env, flags }
    }

    fn file(&self) -> Option<PathBuf> {
        let named = || self.env.get(FILE_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
        self.file.clone().or_else(named)
    }
}

impl fmt::Debug for Sources {
    /// Names only: the values may be secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources")
            .field("file", &self.file)
            .field("env", &self.env.keys())
            .field("flags", &self.flags.iter().map(|(key, _)| key).collect::<Vec<_>>())
            .finish()
    }
}

/// The values of one source: full paths, and texts that their keys accept. A refused text becomes a nil. It still overrides
/// the layers below, so that no relation is checked against a value that was not meant.
#[derive(Clone, Default)]
pub(super) struct Layer(BTreeMap<String, Value>);

impl Layer {
    fn set(&mut self, path: String, place: &str, text: Option<String>) {
        let kind = text.map_or(ValueKind::Nil, ValueKind::String);
        self.0.insert(path, Value::new(Some(&place.to_owned()), kind));
    }
}

impl fmt::Debug for Layer {
    /// Paths only: the values may be secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        Ok(self.0.clone().into_iter().collect())
    }
}

/// All that the sources contain, and all that is wrong with it.
pub(super) struct Given {
    /// Weakest first, without the defaults.
    pub(super) layers: Vec<Layer>,
    pub(super) pipelines: Named,
    pub(super) acceptances: Named,
    pub(super) problems: Vec<Problem>,
    /// Whether every source was read to its end. If not, a value that seems to be missing may only be unread.
    pub(super) complete: bool,
}

impl Given {
    /// Reads every source, whatever problems the ones before had.
    pub(super) fn read(sources: &Sources) -> Given {
        let mut reader = Reader::default();
        let mut complete = true;
        if let Some(path) = sources.file() {
            complete = file::read(&path, &mut reader);
        }
        let file = reader.finish_layer();
        for (variable, path) in URL_VARIABLES {
            // A compose file passes a variable that is not set as an empty one.
            if let Some(text) = sources.env.get(variable).filter(|text| !text.is_empty()) {
                reader.text(path, &format!("env {variable}"), text);
            }
        }
        let urls = reader.finish_layer();
        let pipelines: Vec<String> = reader.pipelines.keys().cloned().collect();
        for (variable, text) in &sources.env {
            reader.variable(variable, text, &pipelines);
        }
        let env = reader.finish_layer();
        for (path, text) in &sources.flags {
            reader.text(path, "flag", text);
        }
        let flags = reader.finish_layer();
        let Reader { pipelines, acceptances, problems, .. } = reader;
        Given { layers: vec![file, urls, env, flags], pipelines, acceptances, problems, complete }
    }
}

/// The defaults, for these pipelines. An acceptance has none.
pub(super) fn defaults(pipelines: &Named) -> Layer {
    let mut layer = Layer::default();
    let (of_pipelines, single): (Vec<&Key>, Vec<&Key>) =
        KEYS.iter().filter(|key| !key.is_of_acceptances()).partition(|key| key.is_of_pipelines());
    for (key, default) in single.into_iter().filter_map(|key| Some((key, key.default?))) {
        layer.set(key.name.into(), "default", Some(default.into()));
    }
    for name in pipelines.keys() {
        for key in &of_pipelines {
            if let Some(text) = key.default_text(name) {
                layer.set(key.path(name), "default", Some(text.into()));
            }
        }
    }
    layer
}

/// Collects one layer at a time, and the problems of all.
#[derive(Default)]
pub(super) struct Reader {
    layer: Layer,
    pipelines: Named,
    acceptances: Named,
    problems: Vec<Problem>,
}

impl Reader {
    fn finish_layer(&mut self) -> Layer {
        std::mem::take(&mut self.layer)
    }

    pub(super) fn name_pipeline(&mut self, name: &str, place: &str) {
        self.pipelines.entry(name.into()).or_insert_with(|| place.into());
    }

    pub(super) fn number_acceptance(&mut self, number: &str, place: &str) {
        self.acceptances.entry(number.into()).or_insert_with(|| place.into());
    }

    pub(super) fn report(&mut self, problem: Problem) {
        self.problems.push(problem);
    }

    fn invalid(&mut self, place: &str, sentence: String) {
        self.report(Problem::invalid(place, sentence));
    }

    /// A text from a variable or a flag.
    fn text(&mut self, path: &str, place: &str, text: &str) {
        let name = path.strip_prefix("pipelines.").and_then(|rest| rest.split('.').next());
        let Some(key) = find(path) else {
            return self.invalid(place, unknown_key(path, did_you_mean(path)));
        };
        match name {
            Some(name) if !is_name(name) => return self.invalid(place, bad_pipeline(name)),
            Some(name) => self.name_pipeline(name, place),
            None => {}
        }
        if let Some((number, _)) = acceptance_in(path) {
            self.number_acceptance(number, place);
        }
        self.value(key, path, place, Ok(text.to_owned()));
    }

    /// A value of a known key, or the end of a sentence that says why it has the wrong type.
    pub(super) fn value(&mut self, key: &Key, path: &str, place: &str, given: Result<String, String>) {
        let accepted = given.and_then(|text| {
            if text.contains('\u{fffd}') {
                return Err("is not UTF-8; write it again".into());
            }
            key.kind.read(&text).map(|_| text)
        });
        match accepted {
            Ok(text) => self.layer.set(path.into(), place, Some(text)),
            Err(sentence) => {
                self.layer.set(path.into(), place, None);
                self.invalid(place, format!("{path} {sentence}"));
            }
        }
    }

    /// One variable of the environment, if it concerns us.
    fn variable(&mut self, variable: &str, text: &str, pipelines: &[String]) {
        let place = format!("env {variable}");
        let Some(rest) = variable.strip_prefix(PREFIX) else {
            // Kubernetes sets TIDEGATE_SERVICE_HOST and others for a service of this name. Only the exact name of a key
            // with a single underscore is a mistake.
            if let Some(key) = KEYS.iter().find(|key| variable_of(key.name).replace("__", "_") == variable) {
                let meant = variable_of(key.name);
                self.invalid(&place, format!("sets nothing; did you mean {meant}, with two underscores?"));
            }
            return;
        };
        let path = match rest.strip_prefix("PIPELINES__").and_then(|rest| rest.rsplit_once("__")) {
            Some((name, leaf)) => {
                let is_named = |known: &str| known.to_ascii_uppercase().replace('-', "_") == name;
                let known: Vec<&str> = pipelines.iter().map(String::as_str).filter(|known| is_named(known)).collect();
                if let [one, other, ..] = known[..] {
                    let sentence = format!("may mean the pipeline {one} or {other}; set it in the file instead");
                    return self.invalid(&place, sentence);
                }
                let name = known.first().map_or_else(|| name.to_ascii_lowercase(), |known| (*known).to_owned());
                format!("pipelines.{name}.{}", leaf.to_ascii_lowercase())
            }
            None => rest.to_ascii_lowercase().replace("__", "."),
        };
        if find(&path).is_some() && variable == variable.to_ascii_uppercase() {
            return self.text(&path, &place, text);
        }
        let meant = if find(&path).is_some() { Some(path) } else { did_you_mean(&path) };
        self.invalid(
            &place,
            match meant {
                Some(path) => format!("sets no key; did you mean {}?", variable_of(&path)),
                None => {
                    "sets no key; remove it, or write TIDEGATE__SECTION__KEY with a key of docs/configuration.md".into()
                }
            },
        );
    }
}

pub(super) fn unknown_key(path: &str, meant: Option<String>) -> String {
    match meant {
        Some(meant) => format!("unknown key {path}; did you mean {meant}?"),
        None => format!("unknown key {path}; remove it, or see docs/configuration.md for all keys"),
    }
}

pub(super) fn bad_pipeline(name: &str) -> String {
    format!("{name:?} cannot name a pipeline; write {}", Kind::Name.limits())
}

/// The variable that sets a key.
fn variable_of(path: &str) -> String {
    format!("{PREFIX}{}", path.to_ascii_uppercase().replace('.', "__").replace('-', "_"))
}
