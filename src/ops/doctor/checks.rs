//! Checks: every check of the doctor, with what it means and what follows if it is ignored. A table, which docs/doctor.md repeats.

use super::Severity::{self, Error, Info, Warning};

/// A check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// Its number, for scripts and `tidegate explain`.
    pub id: &'static str,
    /// How bad its findings are at the worst.
    pub worst: Severity,
    /// What is looked at, in a few words.
    pub title: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// What happens if nobody acts.
    pub consequence: &'static str,
}

const fn check(
    id: &'static str,
    worst: Severity,
    title: &'static str,
    meaning: &'static str,
    consequence: &'static str,
) -> Check {
    Check { id, worst, title, meaning, consequence }
}

/// Every check, in the order in which they are made.
pub const CHECKS: [Check; 29] = [
    check(
        "D1",
        Error,
        "eviction",
        "with a maxmemory-policy of allkeys-* Valkey may evict the stream itself when its memory is full: set noeviction or a volatile-* policy",
        "undelivered entries are lost with the stream; `tidegate run` refuses to start, unless [[doctor.accept]] of the configuration accepts it for a while",
    ),
    check(
        "D2",
        Warning,
        "persistence",
        "without an append-only file a restart of Valkey loses what was added since the last snapshot: CONFIG SET appendonly yes",
        "increments since the last snapshot are lost when Valkey restarts",
    ),
    check(
        "D3",
        Error,
        "replication",
        "a primary with replicas takes writes that no replica has: set min-replicas-to-write to 1, so that a primary cut off stops taking them; or it is set, and no replica is near enough",
        "a failover loses the tail of the stream, or two primaries take writes at once; without a replica that is near enough every write is refused (NOREPLICAS)",
    ),
    check(
        "D4",
        Warning,
        "user",
        "Tidegate runs as Valkey's default user, who may do everything: give it a user of its own (docs/permissions.md)",
        "whoever reads the password may do anything to this Valkey",
    ),
    check(
        "D5",
        Warning,
        "encryption",
        "the connection to another address than the loopback need not be encrypted: use valkeys:// and sslmode=verify-full",
        "passwords and data can be read on the network",
    ),
    check(
        "D6",
        Warning,
        "versions",
        "a server is older than what Tidegate is tested with (Valkey 8.0, Redis 7.0, PostgreSQL 15): upgrade it; or it is a Redis, with which not everything is tested (docs/redis.md)",
        "commands or statements may be refused",
    ),
    check(
        "D7",
        Error,
        "group",
        "the pipeline's group is missing, or it was moved past entries that the ledger does not have: run `tidegate replay` from the first of them",
        "entries that the group was moved past are never flushed, and the stream is not trimmed",
    ),
    check(
        "D8",
        Warning,
        "dead consumers",
        "consumers whose connection has gone hold entries, and no daemon runs that would take them over, or one runs and has not done so after reclaim.gone_after or reclaim.dead_after, the next sweep and one statement",
        "these entries wait, and hold back trimming, until a daemon takes them over",
    ),
    check(
        "D9",
        Warning,
        "age",
        "an entry has waited for longer than the death of its worker explains (reclaim.dead_after or exclusive.lease, the next sweep, one statement): see `tidegate status` and `tidegate pending`",
        "the table is behind; what waits is in Valkey alone",
    ),
    check(
        "D10",
        Warning,
        "lag",
        "entries were cut from the stream before the group had read them (MAXLEN or MINID of a producer, XTRIM): let nobody but Tidegate trim it; or Valkey cannot tell how many entries the group has not read (after XDEL or XSETID): nothing to do, Tidegate counts them itself",
        "what was cut unread is in the counters and never gets into the table; other tools that read `lag` show nothing",
    ),
    check(
        "D11",
        Warning,
        "time-outs",
        "an idle time-out of a server is shorter than what Tidegate keeps its connections busy with: raise it above 10 s, or switch it off",
        "connections are opened again and again",
    ),
    check(
        "D12",
        Warning,
        "cluster",
        "in a cluster a counter and its stream must share a slot: give the stream a hash tag, as each of several shards has (docs/cluster.md)",
        "producers cannot add both in one step: a MULTI, a script and `tidegate produce` are refused with CROSSSLOT",
    ),
    check(
        "D13",
        Warning,
        "producers",
        "entries lack what makes them safe: the field `op`, unique for each increment; they come from plain producers although the pipeline is managed; or they cannot be applied at all",
        "equal increments under one id cannot be told apart if two primaries were alive; a value that a plain producer adds to may be wrong while it does; entries that cannot be applied become dead letters",
    ),
    check(
        "D14",
        Error,
        "ledger",
        "the ledger's constraint is what makes every delta count once: restore it from migrations/0001_ledger.sql",
        "flushing halts, because every flush names the constraint",
    ),
    check(
        "D15",
        Warning,
        "ledger's age",
        "the ledger keeps digests for as long as the stream keeps entries, autovacuum keeps it small, and sums have room in their type: a Valkey from an old copy, an autovacuum that is off or held up, or a value near the end of its type is none of that",
        "a redelivery of older entries becomes a dead letter, the ledger grows, or sums no longer fit and become dead letters",
    ),
    check(
        "D16",
        Warning,
        "clocks",
        "the clocks of Valkey, PostgreSQL and this machine differ: run a time service on all of them",
        "ages are shown wrong; retention is measured by Valkey's clock",
    ),
    check(
        "D17",
        Error,
        "one configuration",
        "the pipeline is registered with other columns, fields or another table than this configuration has: give all daemons the same one",
        "`tidegate run` refuses to start beside a daemon that has the other configuration; where it takes over, the other one halts",
    ),
    check(
        "D18",
        Info,
        "pooler",
        "a connection pooler stands between: transaction mode works, `tidegate migrate` needs PostgreSQL itself",
        "each exchange costs a few round trips more",
    ),
    check(
        "D19",
        Error,
        "table",
        "the pipeline's table does not fit what is written into it, or a worker's role lacks a right to it: each finding has the statement that corrects it",
        "`tidegate run` refuses to start",
    ),
    check(
        "D20",
        Warning,
        "refused rows",
        "a constraint, an index or a trigger of the table may refuse rows or change them: a CHECK on a value, for example, meets the sums in the order in which batches land, which is not that of the stream (docs/guarantees.md)",
        "what is refused becomes a dead letter; a trigger that drops a row halts the pipeline",
    ),
    check(
        "D21",
        Warning,
        "other groups",
        "a group that no pipeline reads with has read nothing for long: if nobody uses it any more, run `tidegate group repair`, or XGROUP DESTROY it",
        "the stream is not trimmed, and Valkey's memory grows",
    ),
    check(
        "D22",
        Error,
        "standby",
        "PostgreSQL has standbys and waits for none of them: set synchronous_standby_names, or be ready to run `tidegate replay` after a failover; or it waits for one and none is connected; or it takes no writes at all",
        "a failover loses the last transactions, and a replay brings them back as far as the stream reaches; or no flush ends",
    ),
    check(
        "D23",
        Warning,
        "dead letters",
        "entries could not be applied: see `tidegate dead list`, correct the cause, and redrive them",
        "their deltas are not in the table",
    ),
    check(
        "D24",
        Warning,
        "pauses",
        "an operator has paused a pipeline: `tidegate resume` ends it",
        "entries wait in Valkey",
    ),
    check(
        "D25",
        Warning,
        "memory",
        "Valkey's memory is nearly full and nothing may be evicted: raise maxmemory, or lower trim.retention; with a volatile-* policy being full is usual, and `tidegate memory` tells how much may be evicted",
        "Valkey refuses writes, and producers fail",
    ),
    check(
        "D26",
        Error,
        "schema",
        "the database lacks migrations of this version: run `tidegate migrate`",
        "`tidegate run` refuses to start",
    ),
    check(
        "D27",
        Info,
        "updates",
        "rows of the table could be updated at less cost: leave room in its pages, let autovacuum run, and drop indexes on values that no query needs",
        "the table and its indexes grow, and flushes take longer",
    ),
    check(
        "D28",
        Warning,
        "connections",
        "nearly as many connections are open as a server allows (maxclients, max_connections): raise that, or find out who opens so many",
        "producers, workers and operators are turned away; Tidegate waits until it is let in",
    ),
    check(
        "D29",
        Error,
        "certificates",
        "a certificate that a server shows, or one that vouches for it, or the one that sslcert names for Tidegate itself, has ended, is not good yet, or ends within 14 days (one that lasts for less than 8 weeks: within the last quarter of its time): renew it",
        "no connection is opened where the certificate is verified, or is asked for; connections that are open go on",
    ),
];
