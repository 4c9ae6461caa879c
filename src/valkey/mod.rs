//! Talking to Valkey: the only module that names `fred`, so that it can be patched or replaced.
//!
//! An [`Endpoint`] is where a connection is to lead: one primary, the primary that sentinels name, or in a cluster the primary of a stream. A
//! [`Connection`] is one TCP connection that never reconnects, never retries and bounds every wait; whoever loses one
//! opens another. A [`Link`] is such a connection to one server in one life of it: its [`Generation`](crate::model::entry::Generation). What was read by a
//! link is acknowledged on that link or not at all, so "an acknowledgement never crosses to another server" needs no care
//! at run time: there is nothing that could carry it there. Whoever reads a stream adds a [`Wire`] to his link, to the
//! same server: reads wait there, and are parsed by our own hand.
//!
//! Commands are sent raw and replies read raw, in RESP3: typed conversions of this client lose what we need (the order of
//! fields, entries deleted under a pending id) and take a nil for an error. In RESP3 a stream reply is a map and cannot be
//! mistaken for a pub/sub message, which in RESP2 is decided by the data in it. The library is told one server at a time: where the
//! primary is we find out ourselves (`route`).

pub(crate) mod address;
mod certificates;
mod command;
mod connection;
mod endpoint;
pub mod info;
mod link;
mod links;
mod listener;
mod place;
mod plain;
pub mod resp;
mod route;
mod server;
#[cfg(feature = "daemon")]
mod shown;
mod wire;

pub use command::{Command, Reply, server_error, unexpected};
pub use connection::{Ahead, Connection};
pub use endpoint::{Endpoint, Home};
pub use link::Link;
pub use links::Links;
pub use listener::{Listener, Pushed};
pub use route::Layout;
pub use wire::{Arrived, Delivered, Progress, Wire};
