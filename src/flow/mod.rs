//! The life of a delta, in order. [`worker`] wires three actors: [`taker`] takes batches from Valkey ([`session`], [`read`],
//! [`reclaim`], [`liveness`]), [`settler`] settles them in PostgreSQL ([`batch`], [`coalesce`], [`rows`], [`bisect`], [`judge`], [`ledger`],
//! [`statement`], [`turn`], [`flush`], [`bury`], [`causes`], `strangers`), [`acker`]
//! acknowledges ([`ack`]); [`pause`] keeps them from reading; [`handoff`] is what they pass on to each other. Where one process reads streams
//! alone, [`lease`] says which, [`holder`] reads all of them in [`rounds`], by what the [`news`] are, each once a [`member`] of its group has settled what was given out, and
//! [`tenure`] moves each group's [`position`] instead of acknowledging. [`redrive`] is for an operator: dead letters, again.

pub mod ack;
pub mod acker;
pub mod batch;
pub mod bisect;
pub mod bury;
pub mod causes;
pub mod coalesce;
pub mod flush;
pub mod handoff;
pub mod holder;
pub mod judge;
pub mod lease;
pub mod ledger;
pub mod liveness;
pub mod member;
pub mod news;
pub mod outcome;
pub mod pause;
pub mod position;
pub mod read;
pub mod reclaim;
pub mod redrive;
pub mod rounds;
pub mod rows;
pub mod session;
pub mod settler;
pub mod setup;
pub mod source;
pub mod statement;
pub(crate) mod strangers;
pub mod taker;
pub mod tenure;
pub mod turn;
pub mod worker;
