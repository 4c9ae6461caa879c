//! Finding: something about a table that does not fit, or could be better, with the statement that corrects it.

use std::fmt;

use super::Fit;
use crate::model::pipeline::Table;

/// What a finding means for the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// It works, and could be faster.
    Advice,
    /// It works, and rows may be refused or changed, which somebody may want.
    Warning,
    /// `tidegate run` does not start.
    Refusal,
}

/// Something about a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it means.
    pub weight: Weight,
    /// What was seen and what follows, without a full stop. Where no statement corrects it, it ends with what to do.
    pub what: String,
    /// The statements that correct it, as they can be executed; none where the configuration is to be changed.
    pub fix: Option<String>,
    /// The table is as it should be, and the role that asks lacks a right: another one may have it.
    pub is_of_role: bool,
}

impl Finding {
    fn new(weight: Weight, what: impl Into<String>, fix: Option<String>) -> Finding {
        Finding { weight, what: what.into(), fix, is_of_role: false }
    }

    pub(super) fn refusal(what: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding::new(Weight::Refusal, what, Some(fix.into()))
    }

    /// A right that the role lacks, and the statement that grants it.
    pub(super) fn of_role(what: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding { is_of_role: true, ..Finding::refusal(what, fix) }
    }

    pub(super) fn warning(what: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding::new(Weight::Warning, what, Some(fix.into()))
    }

    pub(super) fn advice(what: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding::new(Weight::Advice, what, Some(fix.into()))
    }

    /// A refusal that no statement corrects.
    pub(super) fn refusal_alone(what: impl Into<String>) -> Finding {
        Finding::new(Weight::Refusal, what, None)
    }

    /// A warning that no statement corrects.
    pub(super) fn warning_alone(what: impl Into<String>) -> Finding {
        Finding::new(Weight::Warning, what, None)
    }

    /// A refusal in one sentence, whose end is the statement that corrects it if it has one.
    pub(super) fn of_sentence(sentence: &str) -> Finding {
        match sentence.find("alter table ") {
            Some(at) => {
                let what = sentence[..at].trim_end().trim_end_matches([':', ',']);
                let also = if what.ends_with(", or") { " alter the column" } else { "" };
                Finding::refusal(format!("{what}{also}"), &sentence[at..])
            }
            None => Finding::refusal_alone(sentence),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        self.fix.as_ref().map_or(Ok(()), |fix| write!(f, ": {fix}"))
    }
}

/// A table of a pipeline, examined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Examined {
    /// The table.
    pub table: Table,
    /// How its columns are written; none where it does not fit.
    pub fit: Option<Fit>,
    /// Everything that was found, refusals first.
    pub findings: Vec<Finding>,
}

/// Tables that do not fit, with everything that stands against each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit(pub(super) Vec<(Table, Vec<Finding>)>);

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = |(table, findings): &(Table, Vec<Finding>)| {
            let findings: Vec<String> = findings.iter().map(Finding::to_string).collect();
            format!("table {table} does not fit: {}", findings.join("; "))
        };
        f.write_str(&self.0.iter().map(table).collect::<Vec<_>>().join("; "))
    }
}

impl std::error::Error for Unfit {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_cut_where_its_statement_begins() {
        let finding = Finding::of_sentence("column v has type real: alter table t alter column v type bigint");
        assert_eq!(finding.what, "column v has type real");
        assert_eq!(finding.fix.as_deref(), Some("alter table t alter column v type bigint"));
        let finding = Finding::of_sentence("column v rounds: write numeric(2) in values, or alter table t …");
        assert_eq!(finding.what, "column v rounds: write numeric(2) in values, or alter the column");
        assert_eq!(Finding::of_sentence("write text").fix, None);
        assert_eq!(Finding::refusal("a", "b").to_string(), "a: b");
    }
}
