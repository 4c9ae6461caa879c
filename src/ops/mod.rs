//! What an operator types, one file a verb, all of one shape: `Opts`, and `run(opts, context) -> Result<Exit, Failure>`.
//!
//! Data goes to stdout, as a table or as JSON ([`context`]); talk goes to stderr. [`cli`] has the command line.

pub mod adopt;
pub mod audit;
pub mod bench;
pub mod check;
pub mod cli;
pub mod columns;
pub mod complete;
pub mod config;
pub mod console;
pub mod context;
pub mod counter;
pub mod dead;
pub mod demo;
pub mod doctor;
pub mod explain;
pub mod failure;
pub mod group;
pub mod health;
pub mod invalidate;
pub mod memory;
pub mod migrate;
pub mod observe;
pub mod pages;
pub mod pause;
pub mod pending;
pub mod pipeline;
pub mod probe;
pub mod produce;
pub mod replay;
pub mod run;
pub mod runbook;
pub mod sandbox;
#[cfg(test)]
mod schemas;
pub mod size;
pub mod stage;
pub mod status;
pub mod tap;
pub mod top;
pub mod trim;
pub mod wait;
pub mod warm;

pub use self::context::Context;
pub use self::failure::Failure;
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
    /// It works, and not as it should: somebody is to look.
    Degraded = 4,
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

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        (exit as u8).into()
    }
}
