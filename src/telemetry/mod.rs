//! What a process says of itself: metrics ([`contract`]) and log lines ([`log`]).

pub mod contract;
pub mod log;
