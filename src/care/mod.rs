//! Care: what happens around the flow and is never needed for a delta to land. One [`caretaker`] a stream trims it
//! ([`trim`]), keeps its ledger small ([`merge`], [`compact`]), and looks for what Valkey lost ([`upstream`]), each in its time ([`schedule`]; of many streams those that need it, `attention`) and over one
//! [`session`]. [`kept`] counts what PostgreSQL keeps, [`room`] what of Valkey's memory is left, and for how long, by how entries are [`spread`] over counters. Where counters are managed, one [`sweep`] a shard lets settled ones be evicted, and forgets producers' lanes that are `idle`; [`touched`]
//! invalidates cached rows that a trigger has noted; in a cluster the [`library`] of functions is loaded on every primary.

mod attention;
pub mod caretaker;
pub mod compact;
mod idle;
pub mod kept;
pub mod library;
pub mod merge;
pub mod room;
pub mod schedule;
pub mod session;
pub mod setup;
pub mod spread;
pub mod sweep;
pub mod touched;
pub mod trim;
pub mod upstream;
