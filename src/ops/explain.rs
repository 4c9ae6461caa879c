//! `tidegate explain`: what a code means, without a server.
//!
//! Takes a code that Tidegate, PostgreSQL or Valkey shows: an SQLSTATE, the first word of an error of Valkey, the reason of a dead letter, the
//! number of an exit code; gives what it means, what Tidegate does about it, and what to do. Fails for a code that it does not know.

use serde::Serialize;

use super::columns::{Page, Tone};
use super::complete::{Name, by};
use super::context::Report;
use super::{Context, Exit, Failure};
use crate::retry::{A_FEW, Fault, Verdict, judge};

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Opts {
    /// An SQLSTATE (42P01), an error of Valkey (NOGROUP), the reason of a dead letter (bad_amount), a check of doctor (D1), or an exit code (78)
    #[arg(value_name = "CODE", add = by(Name::Code))]
    pub code: String,
}

/// What a code means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Explanation {
    /// The code.
    pub code: String,
    /// Who says it.
    pub said_by: &'static str,
    /// What it means and what to do.
    pub meaning: String,
    /// What Tidegate does about it by itself.
    pub what_happens: String,
}

/// Runs the verb.
pub fn run(opts: Opts, context: &Context) -> Result<Exit, Failure> {
    let Some(explanation) = explain(opts.code.trim()) else {
        let words = format!(
            "{:?} is no code of Tidegate's: write an SQLSTATE such as 42P01, an error of Valkey such as NOGROUP, the reason of a dead letter \
             such as bad_amount, a check such as D1, or an exit code such as 78",
            opts.code
        );
        return Err(Failure::usage(words));
    };
    context.print(&explanation)?;
    Ok(Exit::Ok)
}

/// The reasons of dead letters.
pub const REASONS: [(&str, &str); 13] = [
    (
        "missing_key",
        "the entry has no field with the row's key (pipelines.<name>.key_field): correct the producer or the configuration, then redrive",
    ),
    (
        "bad_key",
        "the row's key is not UTF-8 text without NUL: correct the producer; such a letter can only be discarded",
    ),
    (
        "missing_amount",
        "the entry has no field with the delta (pipelines.<name>.value_field): correct the producer or the configuration, then redrive",
    ),
    (
        "bad_amount",
        "the delta is not a whole decimal number: correct the producer; such a letter can only be discarded",
    ),
    (
        "missing_field",
        "the entry lacks a field that keys or values of the pipeline name: correct the producer, or write the field with a ? where entries may lack it, then redrive",
    ),
    (
        "bad_field",
        "a field does not hold what keys or values of the pipeline say, such as a number or a day; the letter's detail names the field: correct the producer or the configuration; after a change of the configuration redrive it",
    ),
    ("amount_overflow", "the delta does not fit into 64 bits: such a letter can only be discarded"),
    (
        "duplicate_field",
        "a field that is needed stands twice, so that nobody can know which is meant: correct the producer, discard the letter",
    ),
    (
        "oversized",
        "the entry is larger than batch.max_entry_bytes: raise it for what comes; a letter with all its bytes can be redriven",
    ),
    (
        "kills_the_process",
        "every process that took the entry died before it was settled: report it; it can be redriven alone",
    ),
    (
        "cannot_be_judged",
        "the ledger no longer tells whether the entry was flushed: compare its counter with `tidegate audit`, then redrive it with --accept-doubt, or discard it",
    ),
    (
        "refused_by_table",
        "the table refuses the row: the letter's detail has PostgreSQL's sentence and code; correct the table, then redrive",
    ),
    (
        "sum_overflow",
        "the counter would leave the range of bigint: correct the row, then redrive, or discard the letter",
    ),
];

/// The exit codes, as README has them.
pub const EXITS: [(Exit, &str); 12] = [
    (Exit::Ok, "done"),
    (Exit::Error, "something failed: stderr says what"),
    (Exit::Usage, "the command line cannot be understood: see --help"),
    (Exit::Drift, "what must be equal is not: counters differ, or entries were lost"),
    (Exit::Degraded, "it works, and not as it should: the first line of the output says why"),
    (Exit::BadInput, "some of the input was bad; the rest was done"),
    (Exit::NoInput, "a file cannot be read"),
    (Exit::Unavailable, "a server is out of reach"),
    (Exit::Retry, "not finished, nothing lost: run it again"),
    (Exit::NoPermission, "a server refuses the user: docs/permissions.md has the rights"),
    (Exit::Config, "the configuration, the database's schema or a table does not fit"),
    (Exit::Interrupted, "ended by Ctrl-C"),
];

/// The codes of PostgreSQL that the table of faults names by themselves; of the others it names the class.
const SQLSTATES: [&str; 24] = [
    "40001", "40P01", "55P03", "0A000", "53200", "26000", "42P05", "25006", "25P03", "25P04", "53100", "57014",
    "TG002", "TG003", "23514", "42501", "42P01", "42703", "42704", "42P10", "3D000", "3F000", "XX001", "XX002",
];

/// Every code that can be listed: an SQLSTATE of which only the class is known, or a trigger's own, is explained all the same.
pub fn codes() -> impl Iterator<Item = String> {
    let checks = super::doctor::checks::CHECKS.iter().map(|check| check.id);
    let words = REASONS.iter().map(|(reason, _)| *reason).chain(checks).chain(VALKEY).chain(SQLSTATES);
    words.map(str::to_owned).chain(EXITS.iter().map(|(exit, _)| (*exit as u8).to_string()))
}

/// What a code means; none if it is not known.
pub fn explain(code: &str) -> Option<Explanation> {
    let explanation = |said_by, meaning: String, what_happens: &str| {
        Some(Explanation { code: code.to_owned(), said_by, meaning, what_happens: what_happens.to_owned() })
    };
    if let Some((_, meaning)) = REASONS.iter().find(|(reason, _)| *reason == code) {
        return explanation(
            "a dead letter",
            (*meaning).into(),
            "the entry is kept in tidegate.dead_letters with every byte; its neighbours land",
        );
    }
    if let Ok(number) = code.parse::<u8>() {
        let (_, meaning) = EXITS.iter().find(|(exit, _)| *exit as u8 == number)?;
        return explanation("a command's exit", (*meaning).into(), "nothing: it is for scripts and supervisors");
    }
    if let Some(check) = super::doctor::check_named(code) {
        return explanation("tidegate doctor", check.meaning.into(), check.consequence);
    }
    let upper = code.to_ascii_uppercase();
    let is_sqlstate = upper.len() == 5
        && upper.bytes().all(|b| b.is_ascii_alphanumeric())
        && upper.bytes().any(|b| b.is_ascii_digit());
    let is_word = upper.len() >= 2 && upper.bytes().all(|b| b.is_ascii_uppercase());
    let known_word = VALKEY.contains(&upper.as_str());
    let (said_by, fault) = if is_sqlstate && !known_word {
        let fault = Fault::Postgres {
            sqlstate: upper,
            message: String::new(),
            schema: None,
            constraint: Some(String::new()),
            routine: None,
        };
        ("PostgreSQL", fault)
    } else if is_word && known_word {
        ("Valkey", Fault::Valkey { code: upper, message: String::new() })
    } else {
        return None;
    };
    let (first, last) = (judge(&fault, 1), judge(&fault, A_FEW + 1));
    let meaning = if first.advice == last.advice {
        first.advice.to_owned()
    } else {
        format!("{}; after a few times: {}", first.advice, last.advice)
    };
    let happens = if first.verdict == last.verdict {
        does(first.verdict).to_owned()
    } else {
        format!("{}; after {A_FEW} times in a row: {}", does(first.verdict), does(last.verdict))
    };
    explanation(said_by, meaning, &happens)
}

/// What a code means and what to do, in one sentence.
pub fn advice(code: &str) -> Option<String> {
    explain(code).map(|explanation| explanation.meaning)
}

/// The errors of Valkey that have a row in the table.
const VALKEY: [&str; 22] = [
    "NOGROUP",
    "UNBLOCKED",
    "READONLY",
    "MASTERDOWN",
    "MOVED",
    "ASK",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "NOREPLICAS",
    "LOADING",
    "MAXCLIENTS",
    "BUSY",
    "MISCONF",
    "OOM",
    "WRONGTYPE",
    "NOAUTH",
    "WRONGPASS",
    "NOPERM",
    "NOFUNCTION",
    "OTHERLIBRARY",
    "CROSSSLOT",
    "ERR",
];

fn does(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Retry => {
            "the same is tried again with growing pauses, for as long as it lasts; nothing is acknowledged meanwhile"
        }
        Verdict::Split => {
            "the batch is halved until the entry stands alone; that one becomes a dead letter, and its neighbours land"
        }
        Verdict::Shrink => "smaller batches are tried; nothing is buried",
        Verdict::Halt => {
            "the pipeline halts, buries nothing, and is probed until the cause is gone; entries wait in Valkey"
        }
        Verdict::Regroup => "the consumer group is created again at the stream's start; what was flushed is recognised",
    }
}

impl Report for Explanation {
    fn show(&self, page: &mut Page) {
        page.toned(Tone::Head, format!("{} (said by {})", self.code, self.said_by));
        page.line(format!("  meaning       {}", self.meaning));
        page.line(format!("  what happens  {}", self.what_happens));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::entry::Malformed;

    #[test]
    fn codes_of_every_origin_are_explained() {
        for (code, words) in [
            ("42P01", "run `tidegate migrate`"),
            ("57014", "after a few times"),
            ("TG002", "another daemon runs"),
            ("NOGROUP", "created again"),
            ("oom", "maxmemory"),
            ("bad_amount", "whole decimal number"),
            ("78", "configuration"),
            ("D1", "evict"),
        ] {
            let explanation = explain(code).unwrap_or_else(|| panic!("{code} is explained"));
            let all = format!("{} {}", explanation.meaning, explanation.what_happens);
            assert!(all.contains(words), "{code}: {explanation:?}");
        }
        for unknown in ["", "hello", "999", "D999", "bad amount", "42", "ABCDEFG"] {
            assert_eq!(explain(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn every_code_that_the_table_of_faults_names_is_explained() {
        let table = include_str!("../retry/table.rs");
        let of_servers = table
            .split("fn judge_postgres")
            .nth(1)
            .and_then(|rest| rest.split("/// What a fault means for a command").next());
        let codes = of_servers.expect("the table").split('"').filter(|word| {
            word.len() >= 3
                && word.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
                && word.parse::<u8>().is_err()
        });
        let codes: Vec<&str> = codes.collect();
        assert!(codes.len() > 40, "{codes:?}");
        let listed: Vec<String> = super::codes().collect();
        for code in codes {
            assert!(explain(code).is_some() && listed.iter().any(|other| other == code), "{code}");
        }
    }

    #[test]
    fn every_reason_of_a_dead_letter_is_explained() {
        use Malformed::*;
        let all =
            [NoKey, KeyNotText, NoAmount, AmountNotANumber, AmountTooLarge, FieldTwice, TooLarge, Deadly, Unjudgeable];
        for malformed in all {
            assert!(advice(malformed.reason()).is_some(), "{}", malformed.reason());
        }
        // Those of pipelines with keys and values.
        for reason in ["missing_field", "bad_field"] {
            assert!(advice(reason).is_some_and(|advice| advice.contains("keys or values")), "{reason}");
        }
    }
}
