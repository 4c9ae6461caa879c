//! What a process says of itself: instruments and events ([`contract`]), log lines ([`log`]), each fault once ([`incident`]).

pub mod contract;
pub mod incident;
pub mod log;
