//! Stats: what a cache has done since it was made, counted.
//!
//! Each read is a hit, a miss, stale or bypassed; the other numbers tell what that cost. Adding to them costs a nanosecond; an application that wants them
//! in its metrics asks for [`CacheStats`] when those are collected.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a cache has done since it was made. The clones of a cache count together; `hits + misses + stale + bypassed` is the number of rows that were read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Reads that were given a fresh row from Valkey, or the knowledge that there is none.
    pub hits: u64,
    /// Reads for which Valkey had no row that may be served.
    pub misses: u64,
    /// Reads that were given a row past its end (`stale_for`), because it could not be loaded, or because somebody else was loading it.
    pub stale: u64,
    /// Reads that went past Valkey, because it could not be asked.
    pub bypassed: u64,
    /// Rows that a loader was asked for, for whatever reason.
    pub loads: u64,
    /// Those of them that failed.
    pub failed: u64,
    /// Rows that were loaded again before their end, while others were served. They are among `loads`.
    pub early: u64,
    /// Misses that were given what another read of this process has loaded.
    pub joined: u64,
    /// Misses that waited for a lease: another process, or another read, was loading the row.
    pub waited: u64,
    /// Rows that were loaded and not put in place: too large, invalidated or written meanwhile, or Valkey was full or away.
    pub unstored: u64,
}

/// The numbers of [`CacheStats`], as they are counted.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) hits: Number,
    pub(super) misses: Number,
    pub(super) stale: Number,
    pub(super) bypassed: Number,
    pub(super) loads: Number,
    pub(super) failed: Number,
    pub(super) early: Number,
    pub(super) joined: Number,
    pub(super) waited: Number,
    pub(super) unstored: Number,
}

/// A number that only rises.
#[derive(Debug, Default)]
pub(super) struct Number(AtomicU64);

impl Number {
    pub(super) fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counts {
    /// What was counted until now.
    pub(super) fn stats(&self) -> CacheStats {
        CacheStats {
            hits: self.hits.now(),
            misses: self.misses.now(),
            stale: self.stale.now(),
            bypassed: self.bypassed.now(),
            loads: self.loads.now(),
            failed: self.failed.now(),
            early: self.early.now(),
            joined: self.joined.now(),
            waited: self.waited.now(),
            unstored: self.unstored.now(),
        }
    }
}
