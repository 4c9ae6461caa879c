//! The life of a delta, in order: [`read`] or [`reclaim`], [`batch`], [`ledger`], [`flush`], [`bury`], [`ack`],
//! [`trim`], [`compact`]; [`worker`] is the parent that can be read aloud.

pub mod ack;
pub mod batch;
pub mod bury;
pub mod caretaker;
pub mod compact;
pub mod flush;
pub mod ledger;
pub mod read;
pub mod reclaim;
pub mod trim;
pub mod worker;
