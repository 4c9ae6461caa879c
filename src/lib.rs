//! Tidegate.
pub mod keys;
pub mod pipeline;
pub mod ops;
