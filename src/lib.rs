//! Tidegate.
pub mod keys;
pub mod pipeline;
pub mod ops;
pub mod entry;
pub mod retry;
pub mod valkey;
pub mod flow;
pub mod metrics;
pub mod postgres;
pub mod shutdown;
pub mod config;
pub mod service;
pub mod telemetry;
