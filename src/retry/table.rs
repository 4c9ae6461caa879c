//! Table: what to do about a fault, with a sentence for the operator; and what it means for a command that ends because of it.
//!
//! Takes a [`Fault`] and how often it was met in a row; gives a [`Judgement`]. PostgreSQL's codes are those of its manual's
//! appendix A; Valkey's are the first word of its error replies. The advice says what is wrong and what to do, and is true
//! whether the process goes on or ends. It cannot fail: what is not in the table has a stated default.

use super::fault::Fault;

/// How often a fault that is unknown, or a statement that ran out of time, is simply tried again.
pub const A_FEW: u32 = 5;

/// What to do, and what to tell the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judgement {
    /// What to do.
    pub verdict: Verdict,
    /// What it means and what, if anything, to do about it.
    pub advice: &'static str,
}

/// What to do about a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The same again after a pause, on a new connection where the old one is in doubt.
    Retry,
    /// Some entry of the batch is the cause: halve it until it stands alone, then bury that one.
    Split,
    /// The batch is too much at once, and no entry is to blame: halve it, bury nothing.
    Shrink,
    /// Nobody's entry is the cause: bury nothing, say so loudly, hold everything, and probe until the cause is gone.
    Halt,
    /// The consumer group is gone: create it again at the stream's start; the ledger knows what was flushed.
    Regroup,
}

const fn retry(advice: &'static str) -> Judgement {
    Judgement { verdict: Verdict::Retry, advice }
}
const fn split(advice: &'static str) -> Judgement {
    Judgement { verdict: Verdict::Split, advice }
}
const fn shrink(advice: &'static str) -> Judgement {
    Judgement { verdict: Verdict::Shrink, advice }
}
const fn halt(advice: &'static str) -> Judgement {
    Judgement { verdict: Verdict::Halt, advice }
}

/// What in PostgreSQL gives each transaction its number, and refuses to where they would begin again: by the code of a row that is too large.
const GIVES_NUMBERS: [&str; 2] = ["GetNewTransactionId", "GetNewMultiXactId"];

/// Judges a fault that has now been met `attempt` times in a row (1 for the first).
pub fn judge(fault: &Fault, attempt: u32) -> Judgement {
    match fault {
        Fault::Postgres { sqlstate, routine: Some(routine), .. }
            if sqlstate == "54000" && GIVES_NUMBERS.contains(&&**routine) =>
        {
            halt(
                "PostgreSQL takes no writes until old transactions are vacuumed (wraparound): end what holds them back (transactions that are open or \
                 prepared, replication slots), and let VACUUM finish",
            )
        }
        Fault::Postgres { sqlstate, schema, constraint, .. } => {
            judge_postgres(sqlstate, schema.as_deref() == Some("tidegate"), constraint.as_deref(), attempt)
        }
        Fault::PostgresLost(_) => {
            retry("PostgreSQL is out of reach: is it running, and is the address in postgres.url right?")
        }
        Fault::PostgresProtocol(_) if attempt <= A_FEW => {
            retry("PostgreSQL's answer cannot be understood; it is tried a few times")
        }
        Fault::PostgresProtocol(_) => halt(
            "what answers is not PostgreSQL as postgres.url describes it: correct the address, sslmode or the certificate \
             (SSL_CERT_FILE names further authorities)",
        ),
        Fault::Valkey { code, .. } => judge_valkey(code, attempt),
        Fault::ValkeyLost(_) => retry("Valkey is out of reach: is it running, and is the address in valkey.url right?"),
        Fault::ValkeyProtocol(_) => halt(
            "what answers is not Valkey as valkey.url describes it: correct the address, the scheme (valkey or valkeys) or the \
             certificate (SSL_CERT_FILE names further authorities)",
        ),
        Fault::SumOverflow => split("the deltas of one key add up to more than a bigint holds"),
        Fault::StillRefused => halt(
            "other flushes keep changing the same rows of tidegate.ledger: are there sessions that hold them locked?",
        ),
    }
}

/// A fault with what to do about it, for a command that ends because of it.
pub fn advised(fault: &Fault) -> String {
    // Some sentences of Valkey's end with a stop.
    format!("{}: {}", fault.to_string().trim_end_matches('.'), judge(fault, u32::MAX).advice)
}

/// The table for PostgreSQL. `ours`: the error names a table of the schema `tidegate`, so no entry can be the cause.
fn judge_postgres(code: &str, ours: bool, constraint: Option<&str>, attempt: u32) -> Judgement {
    match (code, code.get(..2).unwrap_or_default()) {
        // Passing: contention, restarts, limits of the moment.
        ("40001" | "40P01", _) => retry("a conflict with another transaction; it is repeated"),
        ("55P03", _) => retry("a lock was not to be had in time (a long transaction or a DDL statement?)"),
        ("0A000", _) if attempt <= A_FEW => retry("the table changed under a prepared statement; it is prepared again"),
        ("0A000", _) => halt(
            "PostgreSQL does not support the statement on this table: remove the table's rules; after a change of its columns, \
                 restart what pools connections to PostgreSQL",
        ),
        ("53200", _) => shrink("PostgreSQL is out of memory: smaller batches may help"),
        ("26000" | "42P05", _) => retry("a connection pooler swapped the session; statements are prepared again"),
        ("25006", _) => retry("this PostgreSQL is read-only (a failover?); waiting for the primary"),
        ("25P03", _) => retry("the transaction stood idle too long and was ended by the server; it is repeated"),
        ("53100", _) => halt("PostgreSQL's disk is full: free some space"),
        (_, "53") => {
            retry("PostgreSQL has no connection or other resource left: raise its limit, or lower postgres.connections")
        }
        ("57014", _) if attempt <= A_FEW => retry("the statement ran out of time (postgres.statement_timeout)"),
        ("57014", _) => shrink(
            "the statement ran out of time (postgres.statement_timeout): is something else slow, or locked? smaller batches may help",
        ),
        ("25P04", _) if attempt <= A_FEW => retry("the transaction ran out of time (PostgreSQL's transaction_timeout)"),
        ("25P04", _) => shrink(
            "the transaction ran out of time (PostgreSQL's transaction_timeout): raise it for this role above postgres.statement_timeout; smaller batches may help",
        ),
        (_, "57") => retry("PostgreSQL is starting, stopping or was told to end the session"),
        (_, "08") => retry("the connection to PostgreSQL broke"),
        ("TG002", _) => halt(
            "the ledger's lane is not this pipeline's any more: PostgreSQL was restored to an earlier time, or another daemon runs \
             with another configuration. Restart this daemon, which registers anew; after a restore run `tidegate replay`",
        ),
        ("TG003", _) => halt(
            "the table drops rows: a trigger returns null, a rule or a policy hides them? Remove it; nothing was acknowledged",
        ),
        // Tidegate's own tables: never an entry's fault.
        (_, "21" | "22" | "23" | "54" | "P0") if ours => halt(
            "one of Tidegate's own tables refused a row: has its schema been changed? compare with `tidegate migrate --dry-run`",
        ),
        // Poison: an entry's content.
        ("23514", _) if constraint.is_none() => halt("the table has no partition for a row: create it"),
        (_, "21") => split("two rows of one statement meet the same row of the table"),
        (_, "22") => split("the table cannot hold a value"),
        (_, "23") => split("a constraint of the table refuses a row"),
        (_, "54") => split("a row is too large for the table or its index"),
        (_, "P0") => split("a trigger of the table refuses a row"),
        // Somebody must act.
        ("42501", _) => halt("the role lacks a privilege: grant it (docs/permissions.md has the statements)"),
        ("42P01" | "42703" | "42704" | "42P10", _) => halt(
            "a table, column, index or constraint is missing: run `tidegate migrate`, or correct the pipeline's table",
        ),
        (_, "42") => halt("PostgreSQL refuses the statement: has the table been changed?"),
        (_, "28") => halt("PostgreSQL refuses the user or password: correct postgres.url, or pg_hba.conf"),
        ("3D000", _) => halt("the database does not exist: create it, or correct its name in postgres.url"),
        ("3F000", _) => halt("the schema does not exist: create it, or correct the pipeline's table"),
        ("XX001" | "XX002", _) => halt("PostgreSQL reports corrupted data: see its log before anything else"),
        // Letters and digits that PostgreSQL leaves to applications: a trigger's own code.
        _ if is_application_code(code) => split("a trigger of the table refuses a row with a code of its own"),
        _ if attempt <= A_FEW => retry("an error Tidegate does not know; it is tried a few times"),
        _ => halt("an error Tidegate does not know: see PostgreSQL's log"),
    }
}

/// Whether PostgreSQL has no class of errors with such a code, so that a trigger must have raised it (appendix A of its manual).
fn is_application_code(code: &str) -> bool {
    const OF_POSTGRESQL: [&str; 45] = [
        "00", "01", "02", "03", "08", "09", "0A", "0B", "0F", "0L", "0P", "0Z", "10", "20", "21", "22", "23", "24",
        "25", "26", "27", "28", "2B", "2D", "2F", "34", "38", "39", "3B", "3D", "3F", "40", "42", "44", "53", "54",
        "55", "57", "58", "72", "F0", "HV", "P0", "TG", "XX",
    ];
    code.len() == 5 && code.get(..2).is_some_and(|class| !OF_POSTGRESQL.contains(&class))
}

/// The table for Valkey.
fn judge_valkey(code: &str, attempt: u32) -> Judgement {
    match code {
        "NOGROUP" => Judgement {
            verdict: Verdict::Regroup,
            advice: "the consumer group is gone (FLUSHALL, DEL, a restart without persistence?); it is created again at the stream's start",
        },
        "UNBLOCKED" | "READONLY" | "MASTERDOWN" => {
            retry("this Valkey is not, or no longer, the primary; looking for it again")
        }
        "MOVED" => retry(
            "the stream's slot is another node's of the cluster; looking for it there (valkey.url must begin with valkey-cluster:// where \
             Valkey is a cluster)",
        ),
        "ASK" | "TRYAGAIN" => {
            retry("the stream's slot is being moved to another node of the cluster, and its keys are on both meanwhile")
        }
        "CLUSTERDOWN" => retry(
            "the cluster does not serve the stream's slot: are its primaries, or replicas to take their place, running, and is every slot \
             assigned to one?",
        ),
        "CROSSSLOT" => halt(
            "keys that must be in one slot of the cluster are not: set shards to 2 or more, or give the pipeline's stream a hash tag, such \
             as flush:{counters}; its counters then bear the tag, too (docs/cluster.md)",
        ),
        "NOREPLICAS" => {
            retry("Valkey has fewer replicas than min-replicas-to-write and refuses writes: are they running?")
        }
        "LOADING" => retry("Valkey is loading its data set"),
        "MAXCLIENTS" => retry(
            "Valkey has as many clients as its maxclients allows: CLIENT LIST tells whose they are; raise it, or let them have fewer",
        ),
        "BUSY" => retry("Valkey is busy with a script"),
        "MISCONF" => retry("Valkey cannot persist and refuses writes: see its log"),
        "OOM" => retry("Valkey is out of memory: raise maxmemory"),
        "NOFUNCTION" => retry(
            "this Valkey does not know Tidegate's functions yet (a new server?): a daemon with a managed pipeline loads them",
        ),
        "OTHERLIBRARY" => halt(
            "Valkey holds a function library under the name of Tidegate's own, and it is another one: look at it with FUNCTION LIST, and remove it with \
             FUNCTION DELETE where nobody needs it",
        ),
        "WRONGTYPE" => halt(
            "a key that is to be the stream, or a counter, holds another type: rename or delete it, or correct stream or counter_prefix of the \
                 pipeline",
        ),
        "NOAUTH" | "WRONGPASS" => halt("Valkey refuses the user or password: correct valkey.url"),
        "NOPERM" => {
            halt("the Valkey user lacks a permission: grant it with ACL SETUSER (docs/permissions.md has the commands)")
        }
        _ if attempt <= A_FEW => retry("an error Tidegate does not know; it is tried a few times"),
        _ => halt("an error Tidegate does not know: see Valkey's log"),
    }
}

/// What a fault means for a command that ends because of it: what scripts and supervisors are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// A server is out of reach, or is not ready to serve.
    Unavailable,
    /// A limit of the moment: the same command may succeed later.
    Passing,
    /// A server refuses the user.
    NoPermission,
    /// The configuration, a schema or a table does not fit.
    Config,
    /// Everything else.
    Other,
}

/// What a fault means for a command that ends because of it. The one place where a fault becomes an exit code.
pub fn kind(fault: &Fault) -> FaultKind {
    match fault {
        Fault::PostgresLost(_) | Fault::ValkeyLost(_) => FaultKind::Unavailable,
        Fault::PostgresProtocol(_) | Fault::ValkeyProtocol(_) => FaultKind::Config,
        Fault::SumOverflow | Fault::StillRefused => FaultKind::Other,
        Fault::Postgres { sqlstate, .. } => match (sqlstate.as_str(), sqlstate.get(..2).unwrap_or_default()) {
            // A query that was cancelled or ran out of time says nothing about the server.
            ("57014", _) => FaultKind::Passing,
            ("53300" | "25006", _) | (_, "08" | "57") => FaultKind::Unavailable,
            ("55P03", _) | (_, "40" | "53") => FaultKind::Passing,
            ("42501", _) | (_, "28") => FaultKind::NoPermission,
            (_, "0A" | "3D" | "3F" | "42" | "TG") => FaultKind::Config,
            _ => FaultKind::Other,
        },
        Fault::Valkey { code, .. } => match code.as_str() {
            "NOAUTH" | "WRONGPASS" | "NOPERM" => FaultKind::NoPermission,
            "WRONGTYPE" => FaultKind::Config,
            "UNBLOCKED" | "READONLY" | "MASTERDOWN" | "MOVED" | "ASK" | "CLUSTERDOWN" | "TRYAGAIN" | "LOADING"
            | "MAXCLIENTS" => FaultKind::Unavailable,
            "CROSSSLOT" | "OTHERLIBRARY" => FaultKind::Config,
            "BUSY" | "MISCONF" | "OOM" | "NOREPLICAS" | "NOGROUP" | "NOFUNCTION" => FaultKind::Passing,
            _ => FaultKind::Other,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn postgres(code: &str) -> Fault {
        Fault::Postgres { sqlstate: code.into(), message: String::new(), schema: None, constraint: None, routine: None }
    }

    fn verdict(fault: &Fault, attempt: u32) -> Verdict {
        judge(fault, attempt).verdict
    }

    #[test]
    fn passing_trouble_is_retried_for_as_long_as_it_lasts() {
        for code in
            ["08006", "40001", "40P01", "55P03", "53300", "57P01", "57P02", "57P03", "25006", "25P03", "26000", "42P05"]
        {
            assert_eq!(verdict(&postgres(code), 1), Verdict::Retry, "{code}");
            assert_eq!(verdict(&postgres(code), 1000), Verdict::Retry, "{code} after long");
        }
        assert_eq!(verdict(&Fault::PostgresLost("reset".into()), 1000), Verdict::Retry);
    }

    #[test]
    fn what_may_pass_is_retried_for_a_while_and_then_not() {
        assert_eq!(
            (verdict(&postgres("0A000"), A_FEW), verdict(&postgres("0A000"), A_FEW + 1)),
            (Verdict::Retry, Verdict::Halt)
        );
        assert_eq!(verdict(&postgres("53200"), 1), Verdict::Shrink);
    }

    #[test]
    fn an_entry_that_the_table_cannot_take_is_searched_for() {
        for code in
            ["22003", "22021", "21000", "54000", "P0001", "P0002", "P0004", "AP123", "U0001", "23502", "23503", "23505"]
        {
            assert_eq!(verdict(&postgres(code), 1), Verdict::Split, "{code}");
        }
    }

    #[test]
    fn what_no_entry_can_have_caused_halts_and_buries_nothing() {
        for code in ["42P01", "42703", "42704", "42501", "28P01", "3D000", "53100", "XX001", "TG002", "TG003"] {
            assert_eq!(verdict(&postgres(code), 1), Verdict::Halt, "{code}");
        }
    }

    #[test]
    fn an_error_of_tidegates_own_tables_is_never_blamed_on_an_entry() {
        for code in ["23505", "23514", "22003", "54000", "P0001"] {
            let fault = Fault::Postgres {
                sqlstate: code.into(),
                message: String::new(),
                schema: Some("tidegate".into()),
                constraint: Some("any".into()),
                routine: None,
            };
            assert_eq!(verdict(&fault, 1), Verdict::Halt, "{code}");
        }
    }

    #[test]
    fn a_server_that_has_no_transaction_numbers_left_is_not_taken_for_a_row_that_is_too_large() {
        let from = |function: &str| match postgres("54000") {
            Fault::Postgres { sqlstate, message, schema, constraint, .. } => {
                Fault::Postgres { sqlstate, message, schema, constraint, routine: Some(function.into()) }
            }
            other => other,
        };
        assert_eq!(verdict(&from("GetNewTransactionId"), 1), Verdict::Halt);
        assert_eq!(verdict(&from("_bt_check_third_page"), 1), Verdict::Split);
    }

    #[test]
    fn a_missing_partition_is_not_poison_and_a_failed_check_is() {
        assert_eq!(verdict(&postgres("23514"), 1), Verdict::Halt);
        let check = Fault::Postgres {
            sqlstate: "23514".into(),
            message: String::new(),
            schema: Some("public".into()),
            constraint: Some("positive".into()),
            routine: None,
        };
        assert_eq!(verdict(&check, 1), Verdict::Split);
    }

    #[test]
    fn time_outs_end_in_smaller_batches_and_unknown_errors_in_a_halt() {
        for code in ["57014", "25P04"] {
            assert_eq!(verdict(&postgres(code), A_FEW), Verdict::Retry);
            assert_eq!(verdict(&postgres(code), A_FEW + 1), Verdict::Shrink);
        }
        assert_eq!(verdict(&postgres("F0000"), A_FEW), Verdict::Retry);
        assert_eq!(verdict(&postgres("F0000"), A_FEW + 1), Verdict::Halt);
        assert_eq!(verdict(&postgres(""), A_FEW + 1), Verdict::Halt);
    }

    #[test]
    fn valkeys_errors_have_their_verdicts() {
        let valkey = |code: &str| Fault::Valkey { code: code.into(), message: code.into() };
        assert_eq!(verdict(&valkey("NOGROUP"), 1), Verdict::Regroup);
        for code in [
            "UNBLOCKED",
            "READONLY",
            "LOADING",
            "MASTERDOWN",
            "CLUSTERDOWN",
            "TRYAGAIN",
            "NOREPLICAS",
            "BUSY",
            "MOVED",
            "ASK",
            "OOM",
            "MISCONF",
            "MAXCLIENTS",
        ] {
            assert_eq!(verdict(&valkey(code), 1000), Verdict::Retry, "{code}");
        }
        for code in ["WRONGTYPE", "NOAUTH", "WRONGPASS", "NOPERM", "CROSSSLOT"] {
            assert_eq!(verdict(&valkey(code), 1), Verdict::Halt, "{code}");
        }
        assert_eq!(verdict(&valkey("ERR"), A_FEW), Verdict::Retry);
        assert_eq!(verdict(&valkey("ERR"), A_FEW + 1), Verdict::Halt);
    }

    #[test]
    fn each_kind_of_fault_ends_a_command_in_its_own_way() {
        let valkey = |code: &str| Fault::Valkey { code: code.into(), message: code.into() };
        for (fault, expected) in [
            (Fault::PostgresLost("refused".into()), FaultKind::Unavailable),
            (Fault::PostgresProtocol("a certificate".into()), FaultKind::Config),
            (Fault::ValkeyLost("refused".into()), FaultKind::Unavailable),
            (Fault::ValkeyProtocol("a certificate".into()), FaultKind::Config),
            (postgres("28P01"), FaultKind::NoPermission),
            (postgres("28000"), FaultKind::NoPermission),
            (postgres("42501"), FaultKind::NoPermission),
            (postgres("3D000"), FaultKind::Config),
            (postgres("3F000"), FaultKind::Config),
            (postgres("42P01"), FaultKind::Config),
            (postgres("TG002"), FaultKind::Config),
            (postgres("53100"), FaultKind::Passing),
            (postgres("57014"), FaultKind::Passing),
            (postgres("57P03"), FaultKind::Unavailable),
            (postgres("53300"), FaultKind::Unavailable),
            (postgres("XX001"), FaultKind::Other),
            (postgres(""), FaultKind::Other),
            (valkey("WRONGPASS"), FaultKind::NoPermission),
            (valkey("NOAUTH"), FaultKind::NoPermission),
            (valkey("NOPERM"), FaultKind::NoPermission),
            (valkey("LOADING"), FaultKind::Unavailable),
            (valkey("MOVED"), FaultKind::Unavailable),
            (valkey("MAXCLIENTS"), FaultKind::Unavailable),
            (valkey("CROSSSLOT"), FaultKind::Config),
            (valkey("OOM"), FaultKind::Passing),
            (valkey("ERR"), FaultKind::Other),
        ] {
            assert_eq!(kind(&fault), expected, "{fault:?}");
        }
    }

    #[test]
    fn advice_reads_right_where_the_process_ends_and_sends_nobody_to_check_what_it_cannot_know() {
        let codes = [
            "08006", "0A000", "22003", "23514", "25006", "28P01", "3D000", "3F000", "40001", "42501", "42P01", "42804",
            "53100", "53200", "53300", "54000", "55P03", "57014", "57P01", "P0001", "AP123", "TG002", "TG003", "XX001",
            "é€",
        ];
        let valkey = [
            "MOVED",
            "ASK",
            "CLUSTERDOWN",
            "CROSSSLOT",
            "NOREPLICAS",
            "NOGROUP",
            "READONLY",
            "LOADING",
            "OOM",
            "WRONGTYPE",
            "NOAUTH",
            "NOPERM",
            "ERR",
        ];
        let faults = codes
            .map(postgres)
            .into_iter()
            .chain(valkey.map(|code| Fault::Valkey { code: code.into(), message: String::new() }));
        for fault in faults {
            for attempt in [1, A_FEW + 1] {
                let advice = judge(&fault, attempt).advice;
                for wrong in ["by itself", "tidegate check", "mend", "batch is held"] {
                    assert!(!advice.contains(wrong), "{fault:?}: {advice}");
                }
            }
        }
    }
}
