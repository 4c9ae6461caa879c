//! A key, and the macro that declares it together with the struct field it fills.
//!
//! `sections!` takes the sections of the configuration, written like structs. It gives one struct a section, the mapping
//! from accepted settings to that struct, and [`KEYS`], the table from which all the rest is
//! derived: what is read, what is refused, what `check --print` shows, what "did you mean" may suggest, and what
//! `docs/configuration.md` says. A field's doc comment is the reason that the document gives for its key.

use super::kind::Kind;
use super::sections::KEYS;
use super::settings::Settings;

/// One key.
#[derive(Debug)]
pub(super) struct Key {
    /// Its path, as `section.key`; the name of a pipeline is written `<name>`.
    pub(super) name: &'static str,
    /// Which values it accepts.
    pub(super) kind: Kind,
    /// Its value when no source sets it, read like any other text. An empty text means none.
    pub(super) default: &'static str,
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

    /// Its full path, for this pipeline if it is a key of pipelines.
    pub(super) fn path(&self, pipeline: &str) -> String {
        self.name.replace("<name>", pipeline)
    }

    /// The default, for this pipeline if it is a key of pipelines. None: the key must be set.
    pub(super) fn default_text(&self, pipeline: &str) -> Option<&'static str> {
        let has_it = self.default_only_for.is_empty() || self.default_only_for.contains(&pipeline);
        has_it.then_some(self.default)
    }
}

/// The key of a full path, such as `batch.max_entries` or `pipelines.counters.stream`.
pub(super) fn find(path: &str) -> Option<&'static Key> {
    let general = match path.strip_prefix("pipelines.").and_then(|rest| rest.split_once('.')) {
        Some((_, leaf)) => format!("pipelines.<name>.{leaf}"),
        None => path.to_owned(),
    };
    // The pattern itself is not a path.
    KEYS.iter().find(|key| key.name == general && !path.contains('<'))
}

/// The top-level sections, in order.
pub(super) fn section_names() -> Vec<&'static str> {
    let mut sections: Vec<_> = KEYS.iter().filter_map(|key| key.name.split('.').next()).collect();
    sections.dedup();
    sections
}

/// A section's struct.
pub(super) trait Section: Sized {
    /// Its path in the file; the name of a pipeline is written `<name>`.
    const PATH: &'static str;

    /// Its values, found below `path`. None if one was refused or is missing.
    fn from_settings(settings: &Settings, path: &str) -> Option<Self>;
}

/// Declares sections: `Struct at "path" { /// Reason.  field: Type = "default", kind; }`.
macro_rules! sections {
    ($(
        $(#[doc = $about:literal])+
        $Section:ident at $path:literal {
            $(
                $(#[doc = $reason:literal])+
                $field:ident: $type:ty = $default:literal $(for $only:ident)?, $kind:expr;
            )+
        }
    )+) => {
        $(
            $(#[doc = $about])+
            #[derive(Debug, Clone)]
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
                default: $default,
                default_only_for: &[$(stringify!($only))?],
                reason: concat!($($reason),+).trim_ascii(),
            },
        )+)+];
    };
}
pub(super) use sections;
