//! The lab: what the tests against real servers and the lab's own programs share. The daemon knows nothing of it.
//!
//! [`harness`] starts servers and the real program, and waits, with the [`rights`] that the documents give; [`cluster`] and [`sentinel`] are servers that watch over each other,
//! with [`tls`] where they are asked to, and [`writers`] find their way among them; [`proxy`] stands between them and harms connections, [`distance`] makes them far away; [`admin`] asks a
//! daemon's admin port, and [`sink`] takes what it exports; [`accounts`] are what producers of managed counters were told; [`edits`] are the promises that are broken on purpose, in a copied tree. `main.rs` lists the
//! programs.

pub mod accounts;
pub mod admin;
pub mod cluster;
pub mod distance;
pub mod edits;
pub mod harness;
pub mod proxy;
pub mod rights;
pub mod sentinel;
pub mod sink;
pub mod tls;
pub mod writers;
