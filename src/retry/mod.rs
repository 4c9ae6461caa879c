//! What to do about a failure: one table, in one place, with a sentence for the operator.
//!
//! Takes a [`Fault`] and how often it was met in a row; gives a [`Judgement`] ([`table`]), and by [`incident`] when to try again and
//! when to speak of it. It knows no client library, so the whole table can be read, and tested, at a glance.

pub mod fault;
pub mod incident;
pub mod table;

pub use self::fault::{Fault, socket_words};
pub use self::incident::{BACKOFF_MAX, Backoff, Incident, Incidents, Lasting, Response, backoff};
pub use self::table::{A_FEW, FaultKind, Judgement, Verdict, advised, judge, kind};
