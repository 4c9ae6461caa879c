//! Every name in Valkey, built in one place.
//!
//! A stream's and a counter's names are the producer's contract; a group's and a consumer's are Tidegate's own.

/// The stream that feeds the default pipeline.
pub const DEFAULT_STREAM: &str = "flush:counters";

/// The key that holds the live value of one counter, the one producers `INCRBY`.
pub fn counter(id: &str) -> String {
    format!("counter:{id}")
}

/// The consumer group of a pipeline. Two pipelines that read one stream have two groups, so each sees every entry.
pub fn group(pipeline: &str) -> String {
    format!("tidegate:{pipeline}")
}

/// This machine's name.
#[cfg(feature = "daemon")]
pub fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// What the names of all consumers of one process begin with.
pub fn consumers_of(host: &str, process: u32) -> String {
    format!("{host}-{process}-")
}

/// The name of one reader of one incarnation of one process.
///
/// Never used twice: a name that comes back would inherit what its predecessor left pending, as if it still held it.
pub fn consumer(host: &str, process: u32, worker: usize, incarnation: u64) -> String {
    format!("{}{worker}-{incarnation:012x}", consumers_of(host, process))
}
