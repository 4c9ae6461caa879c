//! The layers a configuration is read from, and the strict pass over each of them.
//!
//! Takes the sources; gives one layer of texts for each, weakest first, and every fault found on the way. The `config`
//! crate merges the layers afterwards, but is given checked texts only: by itself it would take `"10"` and `true` for
//! numbers and round `10.7` to 11.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::{env, fmt};

use config::{ConfigError, Map, Source, Value, ValueKind};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Fault;
use super::keys::{self, KEYS, Key, Kind};

/// The longest configuration file, and the longest file with a url in it.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Names the configuration file.
const FILE_VARIABLE: &str = "TIDEGATE_CONFIG";
/// Begins every variable that sets a key.
const PREFIX: &str = "TIDEGATE__";
/// What other programs call our two urls.
const URL_VARIABLES: [(&str, &str); 2] = [("VALKEY_URL", "valkey.url"), ("DATABASE_URL", "postgres.url")];

/// Where a configuration comes from. Nothing else is looked at: what is not in here does not count.
#[derive(Clone, Default)]
pub struct Sources {
    /// The file named by `--config`; without it, the one that `TIDEGATE_CONFIG` names; without that, none.
    pub file: Option<PathBuf>,
    /// The environment.
    pub env: BTreeMap<String, String>,
    /// Keys and texts from the command line, the last of a key counting.
    pub flags: Vec<(String, String)>,
}

impl Sources {
    /// The environment of this process, as far as it concerns Tidegate, and what the command line says.
    pub fn from_process(config_flag: Option<PathBuf>, flags: Vec<(String, String)>) -> Sources {
        let concerns_us =
            |name: &str| name.starts_with("TIDEGATE_") || URL_VARIABLES.iter().any(|(variable, _)| *variable == name);
        // What is not UTF-8 keeps a mark that the strict pass refuses.
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

/// What one source says: full paths, and texts that their keys accept. A refused text is a nil, which still outranks
/// the layers below it, so that nothing is judged by a value that was not meant.
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

/// Everything that was said, and everything that was wrong with it.
pub(super) struct Given {
    /// Weakest first, without the defaults.
    pub(super) layers: Vec<Layer>,
    /// The pipelines somebody named, with the first place that did.
    pub(super) pipelines: BTreeMap<String, String>,
    pub(super) faults: Vec<Fault>,
    /// Whether every source could be read. If not, what is missing or does not fit may only be unread.
    pub(super) complete: bool,
}

impl Given {
    /// Reads every source to its end, whatever is found on the way.
    pub(super) fn read(sources: &Sources) -> Given {
        let mut reader = Reader { layer: Layer::default(), pipelines: BTreeMap::new(), faults: Vec::new() };
        let mut complete = true;
        if let Some(path) = sources.file() {
            complete = reader.file(&path);
        }
        let file = reader.finish_layer();
        for (variable, path) in URL_VARIABLES {
            // An empty variable is what a compose file makes of one that is not set.
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
        Given { layers: vec![file, urls, env, flags], pipelines: reader.pipelines, faults: reader.faults, complete }
    }
}

/// The defaults, for these pipelines.
pub(super) fn defaults(pipelines: &BTreeMap<String, String>) -> Layer {
    let mut layer = Layer::default();
    for key in KEYS {
        if !key.name.contains("<name>") {
            layer.set(key.name.into(), "default", key.preset_text(None));
            continue;
        }
        for name in pipelines.keys() {
            if let Some(text) = key.preset_text(Some(name)) {
                layer.set(key.name.replace("<name>", name), "default", Some(text));
            }
        }
    }
    layer
}

/// Reads a small text file whole.
pub(super) fn read_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let length = File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if length as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other(format!("it is larger than {MAX_FILE_BYTES} bytes")));
    }
    Ok(text)
}

/// Collects one layer at a time, and the faults of all.
struct Reader {
    layer: Layer,
    pipelines: BTreeMap<String, String>,
    faults: Vec<Fault>,
}

impl Reader {
    fn finish_layer(&mut self) -> Layer {
        std::mem::take(&mut self.layer)
    }

    fn name_pipeline(&mut self, name: &str, place: &str) {
        self.pipelines.entry(name.into()).or_insert_with(|| place.into());
    }

    fn fault(&mut self, place: &str, sentence: String) {
        self.faults.push(Fault { place: place.into(), sentence });
    }

    /// A text from a variable or a flag, which its key reads.
    fn text(&mut self, path: &str, place: &str, text: &str) {
        let name = path.strip_prefix("pipelines.").and_then(|rest| rest.split('.').next());
        let Some(key) = keys::find(path) else {
            return self.fault(place, unknown_key(path, keys::did_you_mean(path)));
        };
        match name {
            Some(name) if !keys::is_name(name) => return self.fault(place, bad_pipeline(name)),
            Some(name) => self.name_pipeline(name, place),
            None => {}
        }
        self.key(key, path, place, Ok(text.to_owned()));
    }

    /// A value of a known key, or why it has the wrong type.
    fn key(&mut self, key: &Key, path: &str, place: &str, given: Result<String, String>) {
        let accepted = given.and_then(|text| {
            if text.contains('\u{fffd}') {
                return Err("is not UTF-8; write it anew".into());
            }
            key.read(&text).map(|_| text)
        });
        match accepted {
            Ok(text) => self.layer.set(path.into(), place, Some(text)),
            Err(sentence) => {
                self.layer.set(path.into(), place, None);
                self.fault(place, format!("{path} {sentence}"));
            }
        }
    }

    /// One variable of the environment, if it concerns us.
    fn variable(&mut self, variable: &str, text: &str, pipelines: &[String]) {
        let place = format!("env {variable}");
        let Some(rest) = variable.strip_prefix(PREFIX) else {
            // Kubernetes adds TIDEGATE_SERVICE_HOST and the like for a service of our name: only a key's very name,
            // with one underscore too few, is a slip.
            if let Some(key) = KEYS.iter().find(|key| variable_of(key.name).replace("__", "_") == variable) {
                let meant = variable_of(key.name);
                self.fault(&place, format!("sets nothing; did you mean {meant}, with two underscores?"));
            }
            return;
        };
        let path = match rest.strip_prefix("PIPELINES__").and_then(|rest| rest.rsplit_once("__")) {
            Some((name, leaf)) => {
                let is_named = |known: &str| known.to_ascii_uppercase().replace('-', "_") == name;
                let known: Vec<&str> = pipelines.iter().map(String::as_str).filter(|known| is_named(known)).collect();
                if let [one, other, ..] = known[..] {
                    let sentence = format!("may mean the pipeline {one} or {other}; set it in the file instead");
                    return self.fault(&place, sentence);
                }
                let name = known.first().map_or_else(|| name.to_ascii_lowercase(), |known| (*known).to_owned());
                format!("pipelines.{name}.{}", leaf.to_ascii_lowercase())
            }
            None => rest.to_ascii_lowercase().replace("__", "."),
        };
        if keys::find(&path).is_some() && variable == variable.to_ascii_uppercase() {
            return self.text(&path, &place, text);
        }
        let meant = if keys::find(&path).is_some() { Some(path) } else { keys::did_you_mean(&path) };
        self.fault(
            &place,
            match meant {
                Some(path) => format!("sets no key; did you mean {}?", variable_of(&path)),
                None => {
                    "sets no key; remove it, or write TIDEGATE__SECTION__KEY with a key of docs/configuration.md".into()
                }
            },
        );
    }

    /// The whole file. False if it could not be read to its end.
    fn file(&mut self, path: &Path) -> bool {
        let place = path.display().to_string();
        let text = match read_file(path) {
            Ok(text) => text,
            Err(error) => {
                self.fault(&place, format!("cannot be read ({error}); name a readable TOML file or none"));
                return false;
            }
        };
        let lines = Lines { path: place, text: &text };
        let (table, mut errors) = DeTable::parse_recoverable(&text);
        errors.sort_by_key(|error| error.span().map_or(0, |span| span.start));
        if !errors.is_empty() {
            // One slip may be told of several times: once a line is enough.
            let mut told = BTreeSet::new();
            for error in errors {
                let place = lines.place(error.span().map_or(0, |span| span.start));
                if told.insert(place.clone()) {
                    // Not its `Display`: that quotes the line, which may hold a secret.
                    let reason = error.message().trim().replace('\n', ", ");
                    self.fault(&place, format!("is not TOML ({reason}); correct it to see what else there is"));
                }
            }
            return false;
        }
        for (section, value) in in_order(table.get_ref()) {
            self.section(&lines, section, value);
        }
        true
    }

    fn section(&mut self, lines: &Lines<'_>, section: &Spanned<Cow<'_, str>>, value: &Spanned<DeValue<'_>>) {
        let place = lines.place(section.span().start);
        let name = section.get_ref().as_ref();
        let known = keys::sections();
        match value.get_ref() {
            DeValue::Table(table) if name == "pipelines" => {
                for (pipeline, value) in in_order(table) {
                    self.pipeline(lines, pipeline, value);
                }
            }
            DeValue::Table(table) if known.contains(&name) => self.keys(lines, name, table),
            _ if known.contains(&name) => {
                self.fault(&place, format!("{name} is a section; write [{name}] and its keys below it"));
            }
            DeValue::Table(_) => {
                let hint = keys::nearest(name, known.iter().map(|known| (*known).to_owned()));
                let next = match hint {
                    Some(meant) => format!("did you mean [{meant}]?"),
                    None => format!("the sections are {}", known.join(", ")),
                };
                self.fault(&place, format!("unknown section [{name}]; {next}"));
            }
            _ => self.fault(&place, unknown_key(name, keys::did_you_mean(name))),
        }
    }

    fn pipeline(&mut self, lines: &Lines<'_>, name: &Spanned<Cow<'_, str>>, value: &Spanned<DeValue<'_>>) {
        let place = lines.place(name.span().start);
        let name = name.get_ref().as_ref();
        match value.get_ref() {
            _ if !keys::is_name(name) => self.fault(&place, bad_pipeline(name)),
            DeValue::Table(table) => {
                self.name_pipeline(name, &place);
                self.keys(lines, &format!("pipelines.{name}"), table);
            }
            _ => self.fault(
                &place,
                format!("pipelines.{name} is a section; write [pipelines.{name}] and its keys below it"),
            ),
        }
    }

    fn keys(&mut self, lines: &Lines<'_>, section: &str, table: &DeTable<'_>) {
        for (leaf, value) in in_order(table) {
            let place = lines.place(leaf.span().start);
            let path = format!("{section}.{}", leaf.get_ref());
            match keys::find(&path) {
                Some(key) => self.key(key, &path, &place, text_of(key, value.get_ref())),
                None => self.fault(&place, unknown_key(&path, keys::did_you_mean(&path))),
            }
        }
    }
}

/// Turns byte offsets into `path:line`.
struct Lines<'a> {
    path: String,
    text: &'a str,
}

impl Lines<'_> {
    fn place(&self, offset: usize) -> String {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        format!("{}:{}", self.path, 1 + before.iter().filter(|byte| **byte == b'\n').count())
    }
}

type Entry<'a, 'i> = (&'a Spanned<Cow<'i, str>>, &'a Spanned<DeValue<'i>>);

/// The entries of a table in the order in which they were written.
fn in_order<'a, 'i>(table: &'a DeTable<'i>) -> Vec<Entry<'a, 'i>> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

/// The text of a TOML value, if it has the type that the key wants. No type is ever converted to another.
fn text_of(key: &Key, value: &DeValue<'_>) -> Result<String, String> {
    let advice = key.advice();
    match (value, &key.kind) {
        (DeValue::String(_), Kind::Count { .. }) => Err(format!("is text; {advice}, without quotes")),
        (DeValue::String(text), Kind::Bytes { .. }) if text.parse::<f64>().is_ok() => {
            Err(format!("is text without a unit; {advice}, a plain number without quotes"))
        }
        (DeValue::String(text), _) => Ok(text.clone().into_owned()),
        (DeValue::Integer(integer), Kind::Count { .. } | Kind::Bytes { .. } | Kind::Duration { .. }) => {
            let whole = i128::from_str_radix(integer.as_str(), integer.radix());
            Ok(whole.map_or_else(|_| integer.to_string(), |whole| whole.to_string()))
        }
        (DeValue::Float(float), Kind::Duration { .. }) => Ok(float.as_str().into()),
        (DeValue::Float(_), Kind::Count { .. } | Kind::Bytes { .. }) => Err(format!("is a fraction; {advice}")),
        (DeValue::Integer(_) | DeValue::Float(_), _) => Err(format!("is a number; {advice}, in quotes")),
        (DeValue::Boolean(_), _) => Err(format!("is true or false; {advice}")),
        (DeValue::Datetime(_), _) => Err(format!("is a date; {advice}")),
        (DeValue::Array(_), _) => Err(format!("is a list; {advice}")),
        (DeValue::Table(_), _) => Err(format!("is a section; {advice}")),
    }
}

fn unknown_key(path: &str, meant: Option<String>) -> String {
    match meant {
        Some(meant) => format!("unknown key {path}; did you mean {meant}?"),
        None => format!("unknown key {path}; remove it, or see docs/configuration.md for the keys there are"),
    }
}

fn bad_pipeline(name: &str) -> String {
    format!("{name:?} cannot name a pipeline; write a letter or _, then letters, digits, _ or -, 63 at most")
}

/// The variable that sets a key.
fn variable_of(path: &str) -> String {
    format!("{PREFIX}{}", path.to_ascii_uppercase().replace('.', "__").replace('-', "_"))
}
