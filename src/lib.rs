//! Tidegate: write-behind for Valkey and PostgreSQL. Every delta lands exactly once, whatever crashes.
//!
//! Producers `INCRBY` a counter in Valkey, because it is fast, and `XADD` the delta to a stream. This is the daemon in
//! between: a pool of workers in one consumer group that read the stream, coalesce the deltas of each counter, and add them
//! to a PostgreSQL table. Any number of processes share the work, with nothing between them but the two servers.
//!
//! ```text
//!             INCRBY ┌────────┐                        ┌────────────┐
//!  producers ───────▶│ Valkey │  XREADGROUP   one      │ PostgreSQL │
//!             XADD   │        │───────▶ batch ────────▶│  counters  │
//!                    │ stream │         transaction    │  ledger    │
//!                    │        │◀─────── XACK ──────────│  dead      │
//!                    └────────┘      after COMMIT      └────────────┘
//! ```
//!
//! # How a delta is counted once
//!
//! A consumer group delivers *at least* once, and `value + delta` is not idempotent: a worker killed between COMMIT and XACK
//! would double a count. So each transaction also writes a row to a *ledger*: the range of stream ids it handled, and 8 bytes
//! of digest for each entry. A fresh read is a contiguous run, so one row stands for thousands of entries; and PostgreSQL
//! itself refuses a row whose range overlaps another's, through an exclusion constraint. A redelivery is therefore always
//! found, at the price of one index probe a run; then the digests decide, entry by entry, what was flushed and what was not.
//!
//! # Invariants
//!
//! - **I1.** An entry's effect (its delta, or its dead letter) is in PostgreSQL if and only if the ledger holds it: one
//!   transaction.
//! - **I2.** Ranges of one (source, pipeline, stream) never overlap. The database enforces it.
//! - **I3.** XACK only after COMMIT, and only on the very generation (server, history, connection) the entry was read on.
//! - **I4.** A ledger range covers only entries that its own batch handled, and only stretches proven contiguous.
//! - **I5.** An entry leaves the stream only when every configured group has settled it and it is older than the retention.
//! - **I6.** Nothing is skipped silently: an entry is flushed, recognised by its digest, buried with a reason, or counted as
//!   what a zombie left.
//! - **I7.** Memory is disposable: `kill -9` at any instant loses and doubles nothing.
//!
//! Where one process reads a stream alone (`delivery = "exclusive"`) there are no acknowledgements, and these stand in for I3:
//!
//! - **E1.** Every entry up to the group's position is settled (its effect is committed), or pending in the group.
//! - **E2.** Who begins to read alone begins at the group's position; what it meets again the ledger recognises.
//! - **E3.** The position is moved only by who holds the lease, on the server it read from, from where it left it, and only
//!   forward. Only a replay sets it back.
//!
//! # What happens on each failure
//!
//! | failure | what happens |
//! | --- | --- |
//! | who reads alone dies, stalls or is cut off | another one takes over when the lease runs out, at the group's position; two that believe to hold the lease meet in the ledger |
//! | a worker dies, stalls or is cut off | its entries stay pending; a peer takes them over when it counts as dead; the ledger recognises those that were committed |
//! | the outcome of a COMMIT is unknown | nothing is acknowledged; the same batch is tried again and the ledger tells |
//! | PostgreSQL is down | reading stops, two batches a worker are held, the rest waits in Valkey |
//! | Valkey is down, restarted, failed over | a new connection is a new generation: acknowledgements of the old one are dropped, entries come again, the ledger recognises them |
//! | the group is gone | it is created at the stream's start; what was flushed is recognised |
//! | an entry cannot be applied | its neighbours are flushed first, then it is found and buried alone |
//! | the table refuses many different entries, or the schema or a right is wrong | flushing halts and says so, nothing more is buried, and it resumes when the cause is corrected |
//!
//! # Where to read
//!
//! In this order: `model` says what flows, `flow` is its life step by step, with `flow::worker` as the parent of the three
//! actors; `care` trims and compacts; `retry` decides about every error; `service` starts, watches and stops it all;
//! `telemetry` says what programs may rely on; `client` is what applications link, and `functions` what Valkey does for them in one step; `ops` has one file for each
//! command. `valkey` and `postgres` open the connections; beside them only the steps of `flow` and `care` that send commands
//! or SQL, `target`, `lanes` and `ops` use the client libraries.
//!
//! # Features
//!
//! `daemon`, on by default, is the program. Without it the crate is [`client`] and what that needs: a producer links neither
//! sqlx nor clap. `postgres` brings managed counters back by sqlx, `json` caches rows as JSON, `near` holds them in memory.

pub mod merge;
pub mod model;

#[cfg(feature = "daemon")]
pub mod flow;
#[cfg(feature = "daemon")]
pub mod lanes;
#[cfg(feature = "daemon")]
pub mod pauses;
#[cfg(feature = "daemon")]
pub mod presence;
pub mod retry;
#[cfg(feature = "daemon")]
pub mod target;

#[cfg(feature = "daemon")]
pub mod care;
pub mod client;
pub mod functions;
#[cfg(feature = "daemon")]
pub mod service;
#[cfg(feature = "daemon")]
pub mod shutdown;

#[cfg(feature = "daemon")]
pub mod config;
#[cfg(feature = "daemon")]
pub mod telemetry;

#[cfg(feature = "postgres")]
pub mod postgres;
pub mod valkey;

#[cfg(feature = "daemon")]
pub mod ops;

#[cfg(feature = "daemon")]
mod certificate;
#[cfg_attr(not(feature = "daemon"), allow(dead_code, reason = "the producing side has fewer crash points"))]
mod failpoint;
