//! What flows: entries ([`entry`]), the rows they ask for ([`row`]), where they go ([`pipeline`], [`target`]), and the names that both
//! servers know ([`names`]), and which of several streams a key goes to ([`shard`]), and where in a cluster a key lies ([`slot`]). Of an entry that is too large only a [`shortened`] one is held. Pure.

#[cfg(feature = "daemon")]
pub mod datum;
pub mod entry;
#[cfg(feature = "daemon")]
pub(crate) mod json;
pub mod names;
pub mod pipeline;
pub mod row;
pub mod shard;
pub mod shortened;
pub mod slot;
pub mod target;
