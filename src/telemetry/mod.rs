//! What a process says of itself: instruments and events ([`contract`]), and log lines ([`log`]).

pub mod contract;
pub mod log;
