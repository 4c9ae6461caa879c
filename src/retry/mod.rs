//! What to do about a failure: one table, in one place, with a sentence for the operator.
//!
//! Takes a [`Fault`] and how often it was met in a row; gives a [`Judgement`]. It knows no client library, so the whole
//! table can be read, and tested, at a glance. PostgreSQL's codes are those of its manual's appendix A; Valkey's are the
//! first word of its error replies.

use std::fmt;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// How often a fault that is unknown, or a statement that ran out of time, is simply tried again.
pub const A_FEW: u32 = 5;

/// The first wait after a failure.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// The longest wait after a failure: how late a worker notices, at worst, that a server is back.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// How often an operator is reminded of a fault that lasts.
const REMIND_AFTER: Duration = Duration::from_secs(30);

/// What went wrong, in the words of the one who said it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Valkey answered with an error.
    Valkey {
        /// The reply's first word, such as `NOGROUP`.
        code: String,
        /// The whole reply.
        message: String,
    },
    /// Valkey did not answer in time, or closed the connection.
    ValkeyLost(String),
    /// What answered cannot be understood or trusted: a certificate, TLS to a plain port, another protocol.
    ValkeyProtocol(String),
    /// PostgreSQL answered with an error.
    Postgres {
        /// Its five-character code.
        sqlstate: String,
        /// Its primary message. The detail, which may quote rows, is left with the server.
        message: String,
        /// The schema it names, if it names one.
        schema: Option<String>,
        /// The constraint it names, if it names one.
        constraint: Option<String>,
    },
    /// PostgreSQL did not answer in time or closed the connection: what was sent may or may not have happened.
    PostgresLost(String),
    /// PostgreSQL cannot be talked to: TLS, a certificate, or an answer that cannot be understood. Waiting does not help.
    PostgresProtocol(String),
    /// A batch cannot be summed: the total of one key leaves the range of `bigint`.
    SumOverflow,
    /// A flush met rows of concurrent flushes again and again ([`A_FEW`] × the careful path).
    StillRefused,
}

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
    /// Nobody's entry is the cause: bury nothing, say so loudly, hold everything, and probe until it is mended.
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

/// Judges a fault that has now been met `attempt` times in a row (1 for the first).
pub fn judge(fault: &Fault, attempt: u32) -> Judgement {
    match fault {
        Fault::Postgres { sqlstate, schema, constraint, .. } => {
            judge_postgres(sqlstate, schema.as_deref() == Some("tidegate"), constraint.as_deref(), attempt)
        }
        Fault::PostgresLost(_) => {
            retry("PostgreSQL is out of reach; the batch is held and its outcome read from the ledger")
        }
        Fault::PostgresProtocol(_) => {
            halt("PostgreSQL cannot be talked to: correct postgres.url or the certificates; the batch is held")
        }
        Fault::Valkey { code, .. } => judge_valkey(code, attempt),
        Fault::ValkeyLost(_) => retry("Valkey is out of reach; what was read stays pending there"),
        Fault::ValkeyProtocol(_) => halt(
            "what answers there is not Valkey as valkey.url describes it: correct the URL, its scheme or the certificate",
        ),
        Fault::SumOverflow => split("the deltas of one key add up to more than a bigint holds"),
        Fault::StillRefused => {
            halt("the ledger keeps refusing this batch; run `tidegate check` and look at tidegate.ledger")
        }
    }
}

/// The table for PostgreSQL. `ours`: the error names a table of the schema `tidegate`, so no entry can be the cause.
fn judge_postgres(code: &str, ours: bool, constraint: Option<&str>, attempt: u32) -> Judgement {
    match (code, &code[..code.len().min(2)]) {
        // Passing: contention, restarts, limits of the moment.
        ("40001" | "40P01", _) => retry("a conflict with another transaction; it is repeated"),
        ("55P03", _) => retry("a lock was not to be had in time (a long transaction or a DDL statement?)"),
        ("0A000", _) if attempt <= A_FEW => retry("the table changed under a prepared statement; it is prepared again"),
        ("0A000", _) => {
            halt("PostgreSQL does not support the statement on this table (a rule? a type that was changed?)")
        }
        ("53200", _) if attempt <= A_FEW => retry("PostgreSQL is out of memory"),
        ("53200", _) => shrink("PostgreSQL is out of memory again and again; smaller batches are tried"),
        ("26000" | "42P05", _) => retry("a connection pooler swapped the session; statements are prepared again"),
        ("25006", _) => retry("this PostgreSQL is read-only (a failover?); waiting for the primary"),
        ("25P03", _) => retry("the transaction stood idle too long and was ended by the server; it is repeated"),
        ("53100", _) => halt("PostgreSQL's disk is full: free some space"),
        (_, "53") => retry("PostgreSQL is short of connections or memory"),
        ("57014", _) if attempt <= A_FEW => retry("the statement ran out of time (postgres.statement_timeout)"),
        ("57014", _) => shrink("the statement ran out of time again and again; smaller batches are tried"),
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
        ("42501", _) => halt("the role lacks a privilege: grant it"),
        ("42P01" | "42703" | "42704" | "42P10", _) => halt(
            "a table, column, index or constraint is missing: run `tidegate migrate`, or mend the pipeline's table",
        ),
        (_, "42") => halt("PostgreSQL refuses the statement: has the table been changed?"),
        (_, "28") => halt("PostgreSQL refuses the credentials: mend postgres.url"),
        ("3D000" | "3F000", _) => halt("the database or schema does not exist: create it, or mend postgres.url"),
        ("XX001" | "XX002", _) => halt("PostgreSQL reports corrupted data: see its log before anything else"),
        // Letters and digits that PostgreSQL leaves to applications: a trigger's own code.
        _ if is_application_code(code) => split("a trigger of the table refuses a row with a code of its own"),
        _ if attempt <= A_FEW => retry("an error Tidegate does not know; it is tried a few times"),
        _ => halt("an error Tidegate does not know, again and again: see PostgreSQL's log"),
    }
}

/// Whether no error of PostgreSQL itself has such a code: the SQL standard leaves classes that begin with 5 to 9 or I to Z to
/// implementations, and PostgreSQL uses but a few of them (appendix A of its manual).
fn is_application_code(code: &str) -> bool {
    const OF_POSTGRESQL: [&str; 12] = ["53", "54", "55", "57", "58", "72", "HV", "P0", "XX", "TG", "F0", "0Z"];
    let class = code.get(..2).unwrap_or_default();
    let is_standard = class.starts_with(|c: char| matches!(c, '0'..='4' | 'A'..='H'));
    let is_raised = code.len() == 5 && code != "00000";
    let is_known_standard = [
        "00", "01", "02", "03", "08", "09", "0A", "0B", "0F", "0L", "0P", "20", "21", "22", "23", "24", "25", "26",
        "27", "28", "2B", "2D", "2F", "34", "38", "39", "3B", "3D", "3F", "40", "42", "44",
    ]
    .contains(&class);
    is_raised && !OF_POSTGRESQL.contains(&class) && !(is_standard && is_known_standard)
}

/// The table for Valkey.
fn judge_valkey(code: &str, attempt: u32) -> Judgement {
    match code {
        "NOGROUP" => Judgement {
            verdict: Verdict::Regroup,
            advice: "the consumer group is gone (FLUSHALL, DEL, a restart without persistence?); it is created again at the stream's start",
        },
        "UNBLOCKED" | "READONLY" | "MASTERDOWN" | "MOVED" | "ASK" | "CLUSTERDOWN" | "TRYAGAIN" | "NOREPLICAS" => {
            retry("this Valkey is not, or no longer, the primary; looking for it again")
        }
        "LOADING" => retry("Valkey is loading its data set"),
        "BUSY" => retry("Valkey is busy with a script"),
        "MISCONF" => retry("Valkey cannot persist and refuses writes: see its log"),
        "OOM" => retry("Valkey is out of memory: raise maxmemory; draining goes on where it can"),
        "WRONGTYPE" => halt("the stream's key holds another type: rename or delete it"),
        "NOAUTH" | "WRONGPASS" => halt("Valkey refuses the credentials: mend valkey.url"),
        "NOPERM" => halt(
            "the Valkey user lacks a permission: see the message for the command or key; grant it with ACL SETUSER",
        ),
        _ if attempt <= A_FEW => retry("an error Tidegate does not know; it is tried a few times"),
        _ => halt("an error Tidegate does not know, again and again: see Valkey's log"),
    }
}

/// The waits between attempts: exponential from 50 ms to 5 s, with jitter so that a fleet does not knock in step.
pub fn backoff() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(BACKOFF_MIN)
        .with_max_delay(BACKOFF_MAX)
        .with_jitter()
        .without_max_times()
        .build()
}

/// A fault that lasts: how often it was met, when to try again, when to speak of it again.
#[derive(Debug)]
pub struct Incident {
    attempts: u32,
    since: Option<Instant>,
    said: Option<(Verdict, Instant)>,
    waits: ExponentialBackoff,
}

/// What to do about a fault that was just met.
#[derive(Debug, Clone, Copy)]
pub struct Response {
    /// What to do, and what to tell.
    pub judgement: Judgement,
    /// How long to wait before trying again.
    pub wait: Duration,
    /// Whether the operator is told: at first, when the verdict changes, and every now and then.
    pub tell: bool,
    /// How often in a row it was met.
    pub attempts: u32,
}

impl Default for Incident {
    fn default() -> Incident {
        Incident { attempts: 0, since: None, said: None, waits: backoff() }
    }
}

impl Incident {
    /// A fault was met.
    pub fn met(&mut self, fault: &Fault, now: Instant) -> Response {
        self.attempts += 1;
        self.since.get_or_insert(now);
        let judgement = judge(fault, self.attempts);
        let tell = self.said.is_none_or(|(verdict, at)| verdict != judgement.verdict || now - at >= REMIND_AFTER);
        if tell {
            self.said = Some((judgement.verdict, now));
        }
        Response { judgement, wait: self.waits.next().unwrap_or(BACKOFF_MAX), tell, attempts: self.attempts }
    }

    /// Whether a fault was met and has not been overcome.
    pub fn lasts(&self) -> bool {
        self.attempts > 0
    }

    /// It works again: how often it had failed and for how long, if it had been told.
    pub fn over(&mut self, now: Instant) -> Option<(u32, Duration)> {
        if self.attempts == 0 {
            return None;
        }
        let Incident { attempts, since, said, .. } = std::mem::take(self);
        said.map(|_| (attempts, since.map_or(Duration::ZERO, |since| now - since)))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Valkey { message, .. } => write!(f, "Valkey: {message}"),
            Fault::ValkeyLost(why) | Fault::ValkeyProtocol(why) => f.write_str(why),
            Fault::Postgres { sqlstate, message, .. } => write!(f, "PostgreSQL: {message} ({sqlstate})"),
            Fault::PostgresLost(why) | Fault::PostgresProtocol(why) => f.write_str(why),
            Fault::SumOverflow => f.write_str("the deltas of one key add up to more than a bigint holds"),
            Fault::StillRefused => f.write_str("the ledger refused the batch again and again"),
        }
    }
}

impl std::error::Error for Fault {}

#[cfg(test)]
mod tests {
    use super::*;

    fn postgres(code: &str) -> Fault {
        Fault::Postgres { sqlstate: code.into(), message: String::new(), schema: None, constraint: None }
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
        assert_eq!(
            (verdict(&postgres("53200"), A_FEW), verdict(&postgres("53200"), A_FEW + 1)),
            (Verdict::Retry, Verdict::Shrink)
        );
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
            };
            assert_eq!(verdict(&fault, 1), Verdict::Halt, "{code}");
        }
    }

    #[test]
    fn a_missing_partition_is_not_poison_and_a_failed_check_is() {
        assert_eq!(verdict(&postgres("23514"), 1), Verdict::Halt);
        let check = Fault::Postgres {
            sqlstate: "23514".into(),
            message: String::new(),
            schema: Some("public".into()),
            constraint: Some("positive".into()),
        };
        assert_eq!(verdict(&check, 1), Verdict::Split);
    }

    #[test]
    fn time_outs_end_in_smaller_batches_and_unknown_errors_in_a_halt() {
        assert_eq!(verdict(&postgres("57014"), A_FEW), Verdict::Retry);
        assert_eq!(verdict(&postgres("57014"), A_FEW + 1), Verdict::Shrink);
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
            "BUSY",
            "MOVED",
            "OOM",
            "MISCONF",
        ] {
            assert_eq!(verdict(&valkey(code), 1000), Verdict::Retry, "{code}");
        }
        for code in ["WRONGTYPE", "NOAUTH", "WRONGPASS", "NOPERM"] {
            assert_eq!(verdict(&valkey(code), 1), Verdict::Halt, "{code}");
        }
        assert_eq!(verdict(&valkey("ERR"), A_FEW), Verdict::Retry);
        assert_eq!(verdict(&valkey("ERR"), A_FEW + 1), Verdict::Halt);
    }

    #[test]
    fn a_fault_that_lasts_is_told_once_and_then_now_and_then() {
        let (mut incident, start) = (Incident::default(), Instant::now());
        let lost = Fault::PostgresLost("reset".into());
        assert!(incident.met(&lost, start).tell);
        assert!(!incident.met(&lost, start + Duration::from_secs(1)).tell);
        assert!(incident.met(&postgres("42P01"), start + Duration::from_secs(2)).tell, "another verdict is news");
        assert!(incident.met(&postgres("42P01"), start + Duration::from_secs(2) + REMIND_AFTER).tell);
        assert_eq!(incident.over(start + Duration::from_secs(60)), Some((4, Duration::from_secs(60))));
        assert_eq!(incident.over(start), None);
    }

    #[test]
    fn waits_grow_and_stay_within_their_limit() {
        let waits: Vec<_> = backoff().take(20).collect();
        assert!(waits.iter().all(|w| *w >= BACKOFF_MIN && *w <= 2 * BACKOFF_MAX));
        assert!(waits[19] >= BACKOFF_MAX);
    }
}
