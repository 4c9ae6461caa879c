//! The life of a delta, in order. [`worker`] wires three actors: [`taker`] takes batches from Valkey ([`session`], [`read`],
//! [`reclaim`], [`liveness`]), [`settler`] settles them in PostgreSQL ([`batch`], [`coalesce`], [`bisect`], [`judge`], [`ledger`],
//! [`statement`], [`flush`], [`bury`]), [`acker`]
//! acknowledges ([`ack`]); [`handoff`] is what they pass on to each other.

pub mod ack;
pub mod acker;
pub mod batch;
pub mod bisect;
pub mod bury;
pub mod coalesce;
pub mod flush;
pub mod handoff;
pub mod judge;
pub mod ledger;
pub mod liveness;
pub mod read;
pub mod reclaim;
pub mod session;
pub mod settler;
pub mod setup;
pub mod statement;
pub mod taker;
pub mod worker;
