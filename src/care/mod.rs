//! Care: what happens around the flow and is never needed for a delta to land. One [`caretaker`] a stream trims it
//! ([`trim`]), keeps its ledger small ([`merge`], [`compact`]), and looks for what Valkey
//! lost ([`upstream`]).

pub mod caretaker;
pub mod compact;
pub mod merge;
pub mod trim;
pub mod upstream;
