//! Tidegate.
pub mod keys;
pub mod pipeline;
pub mod ops;
pub mod entry;
pub mod retry;
pub mod valkey;
