//! An accepted value, and how a struct's field is made of it.
//!
//! A further type of field implements [`Field`]; a further kind of value is a variant of [`Setting`]. Never shows a text: it
//! may be a secret.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;

use super::accept::Until;
use super::units::show_duration;
use crate::model::pipeline::{Identifier, Table};
use crate::model::target::{self, KeyColumn, ValueColumn};

/// A value that its kind has accepted.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Setting {
    Time(Duration),
    Number(u64),
    Text(String),
    /// An optional text that is empty.
    Nothing,
}

impl Setting {
    /// Its size, to compare it with another of the same unit.
    pub(super) fn size(&self) -> Option<u128> {
        match self {
            Setting::Time(time) => Some(time.as_millis()),
            Setting::Number(number) => Some(u128::from(*number)),
            Setting::Text(_) | Setting::Nothing => None,
        }
    }

    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Setting::Text(text) => Some(text),
            _ => None,
        }
    }

    fn number(&self) -> Option<u64> {
        match self {
            Setting::Number(number) => Some(*number),
            _ => None,
        }
    }
}

impl fmt::Debug for Setting {
    /// A text may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Setting::Time(time) => f.write_str(&show_duration(*time)),
            Setting::Number(number) => write!(f, "{number}"),
            Setting::Text(_) => f.write_str("text"),
            Setting::Nothing => f.write_str("none"),
        }
    }
}

/// The type of a struct's field. None: the setting is of another kind than the declaration says.
pub(super) trait Field: Sized {
    fn from_setting(setting: &Setting) -> Option<Self>;
}

impl Field for Duration {
    fn from_setting(setting: &Setting) -> Option<Duration> {
        match setting {
            Setting::Time(time) => Some(*time),
            _ => None,
        }
    }
}

impl Field for u64 {
    fn from_setting(setting: &Setting) -> Option<u64> {
        setting.number()
    }
}

impl Field for u16 {
    fn from_setting(setting: &Setting) -> Option<u16> {
        setting.number()?.try_into().ok()
    }
}

impl Field for bool {
    fn from_setting(setting: &Setting) -> Option<bool> {
        setting.text()?.parse().ok()
    }
}

impl Field for SocketAddr {
    fn from_setting(setting: &Setting) -> Option<SocketAddr> {
        setting.text()?.parse().ok()
    }
}

impl Field for usize {
    fn from_setting(setting: &Setting) -> Option<usize> {
        setting.number()?.try_into().ok()
    }
}

impl Field for String {
    fn from_setting(setting: &Setting) -> Option<String> {
        setting.text().map(str::to_owned)
    }
}

impl Field for SecretString {
    fn from_setting(setting: &Setting) -> Option<SecretString> {
        setting.text().map(SecretString::from)
    }
}

impl Field for PathBuf {
    fn from_setting(setting: &Setting) -> Option<PathBuf> {
        setting.text().map(PathBuf::from)
    }
}

impl Field for Until {
    fn from_setting(setting: &Setting) -> Option<Until> {
        Until::parse(setting.text()?)
    }
}

impl Field for Identifier {
    fn from_setting(setting: &Setting) -> Option<Identifier> {
        Identifier::parse(setting.text()?).ok()
    }
}

impl Field for Table {
    fn from_setting(setting: &Setting) -> Option<Table> {
        Table::parse(setting.text()?).ok()
    }
}

impl Field for Vec<KeyColumn> {
    fn from_setting(setting: &Setting) -> Option<Vec<KeyColumn>> {
        target::parse_keys(setting.text().unwrap_or_default()).ok().or(Some(Vec::new()))
    }
}

impl Field for Vec<ValueColumn> {
    fn from_setting(setting: &Setting) -> Option<Vec<ValueColumn>> {
        target::parse_values(setting.text().unwrap_or_default()).ok().or(Some(Vec::new()))
    }
}

impl<T: Field> Field for Option<T> {
    fn from_setting(setting: &Setting) -> Option<Option<T>> {
        match setting {
            Setting::Nothing => Some(None),
            setting => T::from_setting(setting).map(Some),
        }
    }
}

/// Declares the words of a choice, each with the value it stands for.
macro_rules! choice {
    ($type:ident: $($word:literal => $value:expr),+) => {
        impl $type {
            /// What may be written.
            const WORDS: &[&str] = &[$($word),+];
        }

        impl super::setting::Field for $type {
            fn from_setting(setting: &super::setting::Setting) -> Option<$type> {
                match setting.text()? {
                    $($word => Some($value),)+
                    _ => None,
                }
            }
        }
    };
}
pub(super) use choice;
