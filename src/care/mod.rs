//! Care: what happens around the flow and is never needed for a delta to land. One [`caretaker`] a stream trims it
//! ([`trim`]), keeps its ledger small ([`merge`], [`compact`]), and looks for what Valkey lost ([`upstream`]), over one [`session`] at a
//! time. [`kept`] counts what PostgreSQL keeps.

pub mod caretaker;
pub mod compact;
pub mod kept;
pub mod merge;
pub mod session;
pub mod setup;
pub mod trim;
pub mod upstream;
