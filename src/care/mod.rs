//! Care: what happens around the flow and is never needed for a delta to land. One [`caretaker`] a stream trims it
//! ([`trim`]), keeps its ledger small ([`compact`]), and looks for what Valkey lost.

pub mod caretaker;
pub mod compact;
pub mod trim;
