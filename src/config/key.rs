//! A key, and the macro that declares it together with the struct field it fills.
//!
//! `sections!` takes the sections of the configuration, written like structs. It gives one struct a section, the mapping
//! from accepted settings to that struct, and [`KEYS`], the table from which all the rest is
//! derived: what is read, what is refused, what `check --print` shows, what "did you mean" may suggest, and what
//! `docs/configuration.md` says. A field's doc comment is the reason that the document gives for its key.

use super::kind::Kind;
use super::sections::KEYS;
use super::settings::Settings;

/// The highest number of an acceptance: there are not so many findings that could be accepted.
const MOST_ACCEPTED: u8 = 99;

/// One key.
#[derive(Debug)]
pub(super) struct Key {
    /// Its path, as `section.key`; the name of a pipeline is written `<name>`, the number of an acceptance `<n>`.
    pub(super) name: &'static str,
    /// Which values it accepts.
    pub(super) kind: Kind,
    /// Its value when no source sets it, read like any other text. An empty text means none. None: it must be set.
    pub(super) default: Option<&'static str>,
    /// The only pipelines that have this default; every other one must set the key. Empty: there is no such rule.
    pub(super) default_only_for: &'static [&'static str],
    /// Why the key exists.
    pub(super) reason: &'static str,
}

impl Key {
    /// Whether each pipeline has this key.
    pub(super) fn is_of_pipelines(&self) -> bool {
        self.name.contains("<name>")
    }

    /// Whether each acceptance has this key.
    pub(super) fn is_of_acceptances(&self) -> bool {
        self.name.contains("<n>")
    }

    /// Its full path, for this pipeline or acceptance if each of these has the key.
    pub(super) fn path(&self, of: &str) -> String {
        self.name.replace("<name>", of).replace("<n>", of)
    }

    /// The default, for this pipeline if it is a key of pipelines. None: the key must be set.
    pub(super) fn default_text(&self, pipeline: &str) -> Option<&'static str> {
        let has_it = self.default_only_for.is_empty() || self.default_only_for.contains(&pipeline);
        self.default.filter(|_| has_it)
    }
}

/// The key of a full path, such as `batch.max_entries` or `pipelines.counters.stream`.
pub(super) fn find(path: &str) -> Option<&'static Key> {
    let pipelines = path.strip_prefix("pipelines.").and_then(|rest| rest.split_once('.'));
    let general = match (pipelines, acceptance_in(path)) {
        (Some((_, leaf)), _) => format!("pipelines.<name>.{leaf}"),
        (None, Some((_, leaf))) => format!("doctor.accept.<n>.{leaf}"),
        (None, None) => path.to_owned(),
    };
    // The pattern itself is not a path.
    KEYS.iter().find(|key| key.name == general && !path.contains('<'))
}

/// The number of the acceptance that a path is about, and what follows it. None if it is about no acceptance.
pub(super) fn acceptance_in(path: &str) -> Option<(&str, &str)> {
    let (number, leaf) = path.strip_prefix("doctor.accept.")?.split_once('.')?;
    let is_one = number.parse().is_ok_and(|n: u8| (1..=MOST_ACCEPTED).contains(&n) && n.to_string() == number);
    is_one.then_some((number, leaf))
}

/// The top-level sections, in order.
pub(super) fn section_names() -> Vec<&'static str> {
    let mut sections: Vec<_> = KEYS.iter().filter_map(|key| key.name.split('.').next()).collect();
    sections.dedup();
    sections
}

/// A section's struct.
pub(super) trait Section: Sized {
    /// Its path; the name of a pipeline is written `<name>`, the number of an acceptance `<n>`.
    const PATH: &'static str;

    /// Its values, found below `path`. None if one was refused or is missing.
    fn from_settings(settings: &Settings, path: &str) -> Option<Self>;
}

/// Declares sections: `Struct at "path" { /// Reason.  field: Type = "default", kind; }`. A key without a default is `= required`.
macro_rules! sections {
    ($(
        $(#[doc = $about:literal])+
        $(#[derive($trait:ident)])?
        $Section:ident at $path:literal {
            $(
                $(#[doc = $reason:literal])+
                $field:ident: $type:ty = $default:tt $(for $only:ident)?, $kind:expr;
            )+
        }
    )+) => {
        $(
            $(#[doc = $about])+
            #[derive(Debug, Clone $(, $trait)?)]
            pub struct $Section {
                $( $(#[doc = $reason])+ pub $field: $type, )+
            }

            impl Section for $Section {
                const PATH: &'static str = $path;

                fn from_settings(settings: &Settings, path: &str) -> Option<Self> {
                    Some($Section { $( $field: settings.value(&format!("{path}.{}", stringify!($field)))?, )+ })
                }
            }
        )+

        /// Every key, in the order in which people read them.
        pub(super) const KEYS: &[Key] = &[$($(
            Key {
                name: concat!($path, ".", stringify!($field)),
                kind: $kind,
                default: super::key::default_text!($default),
                default_only_for: &[$(stringify!($only))?],
                reason: concat!($($reason),+).trim_ascii(),
            },
        )+)+];
    };
}
pub(super) use sections;

/// The default in a declaration, or that there is none.
macro_rules! default_text {
    (required) => {
        None
    };
    ($text:literal) => {
        Some($text)
    };
}
pub(super) use default_text;
