//! Failure: why a command ended without having done what it was asked for.
//!
//! Takes what a server, the configuration or the command itself says; gives the exit code, and words that end with the next step to
//! take. It cannot fail.

use std::fmt;

use super::Exit;
use super::stage::Trouble;
use crate::config::Problems;
use crate::retry::{Fault, advised};

/// Why a command failed, for people, and how its process ends, for programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    exit: Exit,
    words: String,
    /// Whether the words stand alone: a list of problems, each with its own place.
    is_list: bool,
}

impl Failure {
    /// Of this kind, in these words.
    pub fn new(exit: Exit, words: impl Into<String>) -> Failure {
        Failure { exit, words: words.into(), is_list: false }
    }

    /// The command line asks for something that makes no sense together.
    pub fn usage(words: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, words)
    }

    /// How the process ends.
    pub fn exit(&self) -> Exit {
        self.exit
    }

    /// What is written on stderr: with the command's name in front, unless the words are a list of problems.
    pub fn told_by(&self, verb: &str) -> Option<String> {
        match (self.exit, self.is_list) {
            // Whoever closed the pipe has read enough.
            (Exit::Ok, _) => None,
            (_, true) => Some(self.words.clone()),
            (_, false) => Some(format!("tidegate {verb}: {}", self.words)),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words)
    }
}

impl std::error::Error for Failure {}

impl From<Trouble> for Failure {
    /// What a server or the configuration says keeps its exit code and its next step, however far it came.
    fn from(trouble: Trouble) -> Failure {
        let trouble = match trouble.downcast::<Fault>() {
            Ok(fault) => return Failure::from(*fault),
            Err(trouble) => trouble,
        };
        let trouble = match trouble.downcast::<Problems>() {
            Ok(problems) => return Failure::from(*problems),
            Err(trouble) => trouble,
        };
        Failure::new(Exit::Error, trouble.to_string())
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Failure {
        Failure::new(Exit::from(&fault), advised(&fault))
    }
}

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Failure {
        Failure { exit: Exit::from(&problems), words: problems.to_string(), is_list: true }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        // Nobody reads the rest: no failure of the command.
        let exit = if error.kind() == std::io::ErrorKind::BrokenPipe { Exit::Ok } else { Exit::Error };
        Failure::new(exit, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_its_command_and_a_closed_pipe_is_none() {
        assert_eq!(Failure::usage("no such id").told_by("dead").as_deref(), Some("tidegate dead: no such id"));
        let closed = Failure::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
        assert_eq!((closed.exit(), closed.told_by("status")), (Exit::Ok, None));
        let lost = Failure::from(Fault::ValkeyLost("cannot reach Valkey at h:1".into()));
        assert_eq!(lost.exit(), Exit::Unavailable);
        assert!(lost.to_string().contains("is it running"), "{lost}");
        let carried: Trouble = Fault::ValkeyLost("cannot reach Valkey at h:1".into()).into();
        assert_eq!(Failure::from(carried), lost);
        assert_eq!(Failure::from(Trouble::from("odd")), Failure::new(Exit::Error, "odd"));
    }
}
