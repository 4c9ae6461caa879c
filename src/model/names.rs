//! Every name in Valkey, built in one place.
//!
//! A stream's and a counter's names are the producer's contract; a group's and a consumer's are Tidegate's own.

use super::slot::{hash_tag, tag_beside};

/// The stream that feeds the default pipeline.
pub const DEFAULT_STREAM: &str = "flush:counters";

/// What the names of a pipeline's counters begin with, unless it is configured otherwise.
pub const DEFAULT_COUNTERS: &str = "counter";

/// The key that holds the live value of one counter of the default pipeline, the one producers `INCRBY`.
pub fn counter(id: &str) -> String {
    counter_below(DEFAULT_COUNTERS, id)
}

/// The same where the names of the counters begin otherwise.
pub fn counter_below(counters: &str, id: &str) -> String {
    format!("{counters}:{id}")
}

/// The stream of one of several shards, in a slot of its own in a cluster.
pub fn sharded(stream: &str, shard: u16) -> String {
    format!("{stream}:{{{shard}}}")
}

/// Which shard of a stream this is; none if it is no shard of it.
pub fn shard_number(stream: &str, name: &str) -> Option<u16> {
    let number = name.strip_prefix(stream)?.strip_prefix(":{")?.strip_suffix('}')?.parse().ok()?;
    (sharded(stream, number) == name).then_some(number)
}

/// What the names of counters begin with beside a stream: where that has a hash tag, as that of each of several shards has, the counters bear it
/// too, and all lie in one slot of a cluster.
pub fn counters_beside(counters: &str, stream: &str) -> String {
    hash_tag(stream).map_or_else(|| counters.to_owned(), |tag| format!("{counters}:{{{tag}}}"))
}

/// The key that says who brings a counter's value from PostgreSQL, in the slot of the counter.
pub fn counter_lease(counters: &str, id: &str) -> String {
    format!("{HYDRATIONS}{counters}:{id}")
}

/// What the names of all leases on counters begin with.
pub const HYDRATIONS: &str = "tidegate:hydrate:";

/// The key that names the dirty counters of a managed shard, each with its last entry.
pub fn dirty_index(stream: &str, pipeline: &str) -> String {
    format!("tidegate:dirty:{{{}}}:{stream}:{pipeline}", tag_beside(stream))
}

/// The key of what is known of a managed shard: how far it was settled, which PostgreSQL it belongs to, the lanes of its producers.
pub fn shard_state(stream: &str, pipeline: &str) -> String {
    format!("tidegate:state:{{{}}}:{stream}:{pipeline}", tag_beside(stream))
}

/// The consumer group of a pipeline. Two pipelines that read one stream have two groups, so each sees every entry.
pub fn group(pipeline: &str) -> String {
    format!("tidegate:{pipeline}")
}

/// The key that says who reads a pipeline's stream alone, in the stream's slot of a cluster.
pub fn lease(stream: &str, pipeline: &str) -> String {
    format!("tidegate:lease:{{{}}}:{stream}:{pipeline}", tag_beside(stream))
}

/// The key in which each process says how it is, for one stream of a pipeline. It hashes to the stream's slot in a cluster.
pub fn presence(stream: &str, pipeline: &str) -> String {
    format!("tidegate:presence:{{{}}}:{stream}:{pipeline}", tag_beside(stream))
}

/// This machine's name.
#[cfg(feature = "daemon")]
pub fn host() -> String {
    printable(&rustix::system::uname().nodename().to_string_lossy())
}

/// What the names of all consumers of one process begin with.
pub fn consumers_of(host: &str, process: u32) -> String {
    format!("{host}-{process}-")
}

/// What the names of the connections of one pipeline's workers begin with: a replay ends them all by it.
pub fn connections_of(source: &str, pipeline: &str) -> String {
    format!("tidegate:{source}:{pipeline}:")
}

/// The source and the consumer that a connection's name tells of, if it is one of this pipeline's workers.
pub fn source_of<'a>(connection: &'a str, pipeline: &str) -> Option<(&'a str, &'a str)> {
    let (source, rest) = connection.strip_prefix("tidegate:")?.split_once(':')?;
    Some((source, rest.strip_prefix(pipeline)?.strip_prefix(':')?))
}

/// The name of a worker's connections in versions before 0.2: without source and pipeline.
pub fn former_connection(consumer: &str) -> String {
    format!("tidegate:{consumer}")
}

/// The name of one worker within one process, for its log lines.
pub fn worker(host: &str, process: u32, slot: usize) -> String {
    format!("{}{slot}", consumers_of(host, process))
}

/// How many digits of the server's run id are part of a consumer's name.
const RUN_ID_DIGITS: usize = 8;
/// How many random digits end it.
const RANDOM_DIGITS: usize = 8;

/// The name of one reader on one connection: worker, run id of the server, number of the connection, random digits.
///
/// Never used twice: a name that comes back would inherit what its predecessor left pending, as if it still held it. The
/// connection's number, 0 where the server does not tell it, lets anybody ask whether the reader is still connected.
pub fn consumer(worker: &str, run_id: &str, connection: u64, random: u32) -> String {
    let run_id = run_id.get(..RUN_ID_DIGITS).unwrap_or(run_id);
    format!("{worker}-{run_id}-{connection}-{random:08x}")
}

/// The number of a consumer's connection, as its name tells it; none if that is a connection to another life of the server,
/// or the name is none of ours.
pub fn connection_of(consumer: &str, run_id: &str) -> Option<u64> {
    let (life, number) = reader_of(consumer)?;
    Some(number).filter(|number| run_id.starts_with(life) && *number > 0)
}

/// Whether a consumer was connected to another server than this one, or to another life of it.
pub fn is_of_another_life(consumer: &str, run_id: &str) -> bool {
    reader_of(consumer).is_some_and(|(life, _)| !run_id.starts_with(life))
}

/// The server's life and the number of the connection that a consumer's name tells; none if the name is none of ours.
fn reader_of(consumer: &str) -> Option<(&str, u64)> {
    let mut parts = consumer.rsplit('-');
    let (random, connection, life) = (parts.next()?, parts.next()?, parts.next()?);
    let is_ours = random.len() == RANDOM_DIGITS && life.len() == RUN_ID_DIGITS;
    Some((life, connection.parse().ok()?)).filter(|_| is_ours)
}

/// What Valkey takes for a connection's name: no blanks, nothing that is not printed. Everything else becomes a hyphen.
pub fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_graphic() { c } else { '-' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::slot::Slot;

    #[test]
    fn a_presence_lies_in_the_slot_of_its_stream() {
        assert_eq!(
            presence("flush:counters", "counters"),
            "tidegate:presence:{flush:counters}:flush:counters:counters"
        );
    }

    #[test]
    fn no_two_keys_of_a_shard_have_the_same_name() {
        let of = [
            dirty_index("s", "p"),
            shard_state("s", "p"),
            lease("s", "p"),
            format!("{}:readers", lease("s", "p")),
            presence("s", "p"),
            counter_lease("s", "p"),
            group("p"),
        ];
        let distinct: std::collections::BTreeSet<&String> = of.iter().collect();
        assert_eq!(distinct.len(), of.len(), "{of:?}");
    }

    #[test]
    fn a_lease_lies_in_the_slot_of_its_stream() {
        assert_eq!(lease("flush:counters", "counters"), "tidegate:lease:{flush:counters}:flush:counters:counters");
        assert_eq!(lease("flush:counters:{3}", "counters"), "tidegate:lease:{3}:flush:counters:{3}:counters");
        for stream in ["a", "a{b}c{d}", "a{}b", "a{b", "a}b", "{}a", "}", "{"] {
            let lease = lease(stream, "counters");
            let slots = [&lease, &format!("{lease}:readers")].map(|key| Slot::of(key));
            assert_eq!(slots, [Slot::of(stream); 2], "{lease}");
        }
    }

    #[test]
    fn a_consumers_name_tells_its_connection_in_the_same_life_of_the_server() {
        let name = consumer(&worker("my-host", 17, 2), "0123456789abcdef", 42, 7);
        assert_eq!(name, "my-host-17-2-01234567-42-00000007");
        assert!(name.starts_with(&consumers_of("my-host", 17)));
        assert_eq!(connection_of(&name, "0123456789abcdef"), Some(42));
        assert_eq!(connection_of(&name, "fedcba9876543210"), None, "another life");
        assert_eq!(connection_of("my-host-17-2-0123456789ab", "0123456789abcdef"), None, "an older version's name");
        assert_eq!(connection_of(&consumer("h-1-0", "0123456789", 0, 7), "0123456789"), None, "a number not told");
        assert_eq!(connection_of("dead", "0123456789"), None);
        assert!(is_of_another_life(&name, "fedcba9876543210") && !is_of_another_life(&name, "0123456789abcdef"));
        assert!(
            !is_of_another_life("dead", "0123456789")
                && !is_of_another_life("my-host-17-2-0123456789ab", "0123456789abcdef")
        );
    }
}
