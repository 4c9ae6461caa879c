//! Checks: every check of the doctor, with what it means and what follows if it is ignored. A table.

/// A check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// Its number, for scripts and `tidegate explain`.
    pub id: &'static str,
    /// What is looked at, in a few words.
    pub title: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// What happens if nobody acts.
    pub consequence: &'static str,
}

const fn check(id: &'static str, title: &'static str, meaning: &'static str, consequence: &'static str) -> Check {
    Check { id, title, meaning, consequence }
}

/// Every check, in the order in which they are made.
pub const CHECKS: [Check; 27] = [
    check(
        "D1",
        "eviction",
        "with a maxmemory-policy of allkeys-* Valkey may evict the stream itself when its memory is full: set noeviction or a volatile-* policy",
        "undelivered entries are lost with the stream; `tidegate run` refuses to start, unless [[doctor.accept]] of the configuration accepts it for a while",
    ),
    check(
        "D2",
        "persistence",
        "without an append-only file a restart of Valkey loses what was added since the last snapshot: CONFIG SET appendonly yes",
        "increments since the last snapshot are lost when Valkey restarts",
    ),
    check(
        "D3",
        "replication",
        "a primary with replicas takes writes that no replica has: set min-replicas-to-write to 1, so that a primary cut off stops taking them",
        "a failover loses the tail of the stream, or two primaries take writes at once",
    ),
    check(
        "D4",
        "user",
        "Tidegate runs as Valkey's default user, who may do everything: give it a user of its own (docs/permissions.md)",
        "whoever reads the password may do anything to this Valkey",
    ),
    check(
        "D5",
        "encryption",
        "the connection to another machine is not encrypted: use valkeys:// and sslmode=verify-full",
        "passwords and data can be read on the network",
    ),
    check(
        "D6",
        "versions",
        "a server is older than what Tidegate is tested with (Valkey 8.0, PostgreSQL 15): upgrade it",
        "commands or statements may be refused",
    ),
    check(
        "D7",
        "group",
        "the pipeline's group is missing, or it was moved past entries that the ledger does not have: run `tidegate replay` from the first of them",
        "entries that the group was moved past are never flushed, and the stream is not trimmed",
    ),
    check(
        "D8",
        "dead consumers",
        "consumers whose connection has gone hold entries: a running daemon takes them over after reclaim.gone_after or reclaim.dead_after",
        "these entries wait, and hold back trimming, until a daemon runs",
    ),
    check(
        "D9",
        "age",
        "an entry has waited for long: see `tidegate status` and `tidegate pending`",
        "the table is behind; what waits is in Valkey alone",
    ),
    check(
        "D10",
        "lag",
        "Valkey cannot tell how many entries the group has not read (after XDEL or XSETID): nothing to do, Tidegate counts them itself",
        "other tools that read `lag` show nothing",
    ),
    check(
        "D11",
        "time-outs",
        "an idle time-out of a server is shorter than what Tidegate keeps its connections busy with: raise it above 10 s, or switch it off",
        "connections are opened again and again",
    ),
    check(
        "D12",
        "cluster",
        "counter and stream of a shard must share a slot: shards have names with a hash tag for that (docs/sharding.md)",
        "producers cannot add both in one step",
    ),
    check(
        "D13",
        "producers",
        "entries lack what makes them safe: the field `op`, unique for each increment; they come from plain producers although the pipeline is managed; or they cannot be applied at all",
        "equal increments under one id cannot be told apart if two primaries were alive; a value that a plain producer adds to may be wrong while it does; entries that cannot be applied become dead letters",
    ),
    check(
        "D14",
        "ledger",
        "the ledger's constraint is what makes every delta count once: restore it from migrations/0001_ledger.sql",
        "flushing halts, because every flush names the constraint",
    ),
    check(
        "D15",
        "ledger's age",
        "the ledger keeps digests for as long as the stream keeps entries: keep compact.margin above the longest pause of a worker, and let autovacuum run on tidegate.ledger",
        "a redelivery of older entries becomes a dead letter, or the ledger grows",
    ),
    check(
        "D16",
        "clocks",
        "the clocks of Valkey, PostgreSQL and this machine differ: run a time service on all of them",
        "ages are shown wrong; retention is measured by Valkey's clock",
    ),
    check(
        "D17",
        "one configuration",
        "the pipeline is registered with other columns, fields or another table than this configuration has: give all daemons the same one",
        "`tidegate run` refuses to start beside a daemon that has the other configuration; where it takes over, the other one halts",
    ),
    check(
        "D18",
        "pooler",
        "a connection pooler stands between: transaction mode works, `tidegate migrate` needs PostgreSQL itself",
        "each exchange costs a few round trips more",
    ),
    check(
        "D19",
        "table",
        "the pipeline's table does not fit what is written into it: each finding has the statement that corrects it",
        "`tidegate run` refuses to start",
    ),
    check(
        "D20",
        "refused rows",
        "a constraint, an index or a trigger of the table may refuse rows or change them: a CHECK on a value, for example, meets the sums in the order in which batches land, which is not that of the stream (docs/guarantees.md)",
        "what is refused becomes a dead letter; a trigger that drops a row halts the pipeline",
    ),
    check(
        "D21",
        "other groups",
        "a group that no pipeline reads with has read nothing for long: if nobody uses it any more, run `tidegate group repair`, or XGROUP DESTROY it",
        "the stream is not trimmed, and Valkey's memory grows",
    ),
    check(
        "D22",
        "standby",
        "PostgreSQL has standbys and waits for none of them: set synchronous_standby_names, or be ready to run `tidegate replay` after a failover",
        "a failover loses the last transactions; a replay brings them back as far as the stream reaches",
    ),
    check(
        "D23",
        "dead letters",
        "entries could not be applied: see `tidegate dead list`, correct the cause, and redrive them",
        "their deltas are not in the table",
    ),
    check("D24", "pauses", "an operator has paused a pipeline: `tidegate resume` ends it", "entries wait in Valkey"),
    check(
        "D25",
        "memory",
        "Valkey's memory is nearly full: raise maxmemory, or lower trim.retention",
        "Valkey refuses writes, and producers fail",
    ),
    check(
        "D26",
        "schema",
        "the database lacks migrations of this version: run `tidegate migrate`",
        "`tidegate run` refuses to start",
    ),
    check(
        "D27",
        "updates",
        "rows of the table could be updated at less cost: leave room in its pages, let autovacuum run, and drop indexes on values that no query needs",
        "the table and its indexes grow, and flushes take longer",
    ),
];
