//! Invalidate by pattern: what matches is dropped, key by key, at a pace, and from where an earlier run stopped.
//!
//! Takes a connection to one server and a pattern; gives a [`Step`] at a time, so that the caller shows progress and keeps the pace. Fails with what Valkey
//! said; what was dropped until then stays dropped. A key that is put in place behind the cursor stays; therefore the leases of readers go first: what they
//! have read before is not put in place any more.

use crate::retry::Fault;
use crate::valkey::{Command, Connection, unexpected};

/// How many keys one step looks at: 1 ms of the server's time. 100 take three times as long in all, 10,000 hold up everybody else for 7 ms.
pub const LOOKED_AT: usize = 1_000;

/// What one step came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Where the next step goes on; none if this was the last one.
    pub next: Option<String>,
    /// The keys that matched.
    pub keys: Vec<Vec<u8>>,
}

/// Looks at some keys from `cursor` on ("0" at first), and gives those that match.
pub async fn scan(connection: &Connection, cursor: &str, pattern: &str) -> Result<Step, Fault> {
    let command = Command::new("SCAN").arg(cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(LOOKED_AT);
    let mut parts = connection.call(command).await?.into_array().ok_or_else(|| unexpected("SCAN"))?;
    let (next, keys) = parts.next().zip(parts.next()).ok_or_else(|| unexpected("SCAN"))?;
    let next = next.as_text().ok_or_else(|| unexpected("SCAN"))?.to_owned();
    let keys = keys.strings().map(<[u8]>::to_vec).collect();
    Ok(Step { next: Some(next).filter(|next| next != "0"), keys })
}

/// Drops keys; gives how many there were.
pub async fn unlink(connection: &Connection, keys: &[Vec<u8>]) -> Result<u64, Fault> {
    if keys.is_empty() {
        return Ok(0);
    }
    let reply = connection.call(keys.iter().fold(Command::new("UNLINK"), |command, key| command.bytes(key))).await?;
    Ok(reply.as_int().ok_or_else(|| unexpected("UNLINK"))?.unsigned_abs())
}

/// A text in which the characters of a pattern stand for themselves.
pub fn literal(text: &str) -> String {
    let mut pattern = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '*' | '?' | '[' | ']' | '\\' | '^') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_literal_text_matches_nothing_else() {
        assert_eq!(literal("counter:{1}:a*b?[c]\\"), "counter:{1}:a\\*b\\?\\[c\\]\\\\");
    }
}
