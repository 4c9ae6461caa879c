//! What an application links: counters and cached rows, beside the daemon.
//!
//! Two producers: [`Producer`] for plain pipelines, whose counters live in Valkey as long as Valkey keeps them; [`Counters`] for managed ones, whose
//! counters may vanish at any time and are brought back exactly, by lease, from PostgreSQL, which a [`Truth`] reads. [`Cache`] keeps rows: it loads
//! each once however many ask ([`flight`]), stays fresh when a writer commits ([`Cache::write`]), and answers from PostgreSQL when Valkey cannot. With
//! the feature `near`, a `NearCache` before it answers from this process's memory.
//!
//! Nothing here reads SQL: with the feature `postgres` there is a [`Truth`] by sqlx; otherwise the application implements it.

pub mod cache;
pub mod codec;
mod connector;
pub mod counters;
pub mod flight;
mod hydrate;
pub mod invalidate;
mod lanes;
mod lease;
#[cfg(feature = "near")]
pub mod near;
#[cfg(feature = "postgres")]
pub mod postgres;
pub mod produce;
pub mod stats;
pub mod truth;
pub mod ttl;

pub use self::cache::{Cache, CacheOptions, Fence, NotLoaded, NotWritten, OnValkeyDown};
pub use self::codec::Stored;
pub use self::counters::{Count, CounterOptions, Counters, NotSettled, Taken, Why};
#[cfg(feature = "daemon")]
pub(crate) use self::lanes::hour_of as lane_hour;
#[cfg(feature = "near")]
pub use self::near::{NearCache, NearOptions, Tracking};
pub use self::produce::{Added, NotAdded, OP_FIELD, Producer, TRACEPARENT_FIELD};
pub use self::stats::CacheStats;
pub use self::truth::{Standing, Truth, TruthError, View};
pub use self::ttl::Ttl;

/// What hydrated values belong to: a PostgreSQL, and the number of shards by which its counters are divided.
pub(crate) fn lineage_of(postgres: &str, shards: u16) -> String {
    format!("{postgres}/{}", shards.max(1))
}

/// The field that a managed entry carries, with the value `1`: the index of dirty counters knows it.
pub const MARK_FIELD: &str = "t";
