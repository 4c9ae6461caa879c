//! What can be wrong with a configuration, as sentences with a place.
//!
//! Made by every step of reading; gives lines for people and a [`ProblemKind`] for the exit code. Never quotes a secret.

use std::fmt;

/// Everything that is wrong with a configuration: at least one problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub(super) Vec<Problem>);

/// One thing that is wrong, where it was written, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    kind: ProblemKind,
    /// `path:line`, `env NAME`, `flag`, or [`Problem::NOWHERE`].
    place: String,
    sentence: String,
}

/// Whether a configuration was understood at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProblemKind {
    /// A file cannot be read: it is missing, for example, or its permissions do not allow it.
    Unreadable,
    /// What was read is not a valid configuration.
    Invalid,
}

impl Problems {
    /// The problems, in the order of the layers.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter()
    }

    /// [`ProblemKind::Unreadable`] if any file could not be read: its content is unknown.
    pub fn kind(&self) -> ProblemKind {
        let unreadable = self.iter().any(|problem| problem.kind == ProblemKind::Unreadable);
        if unreadable { ProblemKind::Unreadable } else { ProblemKind::Invalid }
    }
}

impl Problem {
    /// The place of a value that is not written anywhere.
    pub(super) const NOWHERE: &str = "configuration";

    pub(super) fn new(kind: ProblemKind, place: impl Into<String>, sentence: impl Into<String>) -> Problem {
        Problem { kind, place: place.into(), sentence: sentence.into() }
    }

    /// About a value that was read, or is missing.
    pub(super) fn invalid(place: impl Into<String>, sentence: impl Into<String>) -> Problem {
        Problem::new(ProblemKind::Invalid, place, sentence)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{problem}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.sentence)
    }
}

impl std::error::Error for Problems {}
