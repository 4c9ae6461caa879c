//! What an operator types, one file a verb.

pub mod adopt;
pub mod bench;
pub mod check;
pub mod counter;
pub mod demo;
pub mod health;
pub mod invalidate;
pub mod memory;
pub mod migrate;
pub mod produce;
pub mod replay;
pub mod run;
pub mod sandbox;
pub mod stage;
pub mod warm;

use crate::config::{ProblemKind, Problems};
use crate::retry::{Fault, FaultKind, kind};

/// How a process ends, for scripts and supervisors. The numbers are those of `sysexits.h` where it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// Something failed.
    Error = 1,
    /// The command line cannot be understood.
    Usage = 2,
    /// What must be equal is not.
    Drift = 3,
    /// Some of the input was bad; the rest was done.
    BadInput = 65,
    /// A file cannot be read.
    NoInput = 66,
    /// A server is out of reach.
    Unavailable = 69,
    /// Not finished, nothing lost: run it again.
    Retry = 75,
    /// A server refuses the user.
    NoPermission = 77,
    /// The configuration, or the database's schema, does not fit.
    Config = 78,
    /// Ended by Ctrl-C.
    Interrupted = 130,
}

impl From<&Problems> for Exit {
    /// A file that cannot be read is not the same as one that is not valid: the next step is another.
    fn from(problems: &Problems) -> Exit {
        match problems.kind() {
            ProblemKind::Unreadable => Exit::NoInput,
            ProblemKind::Invalid => Exit::Config,
        }
    }
}

impl From<&Fault> for Exit {
    /// The same fault ends each verb in the same way: [`kind`] decides.
    fn from(fault: &Fault) -> Exit {
        match kind(fault) {
            FaultKind::Unavailable => Exit::Unavailable,
            FaultKind::Passing => Exit::Retry,
            FaultKind::NoPermission => Exit::NoPermission,
            FaultKind::Config => Exit::Config,
            FaultKind::Other => Exit::Error,
        }
    }
}

/// Says why a verb does not do what it was asked for.
fn refused(verb: &str, exit: Exit, words: &str) -> std::io::Result<Exit> {
    use std::io::Write;
    writeln!(std::io::stderr(), "tidegate {verb}: {words}")?;
    Ok(exit)
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        (exit as u8).into()
    }
}
