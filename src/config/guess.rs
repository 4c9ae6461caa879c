//! "Did you mean": the existing name that is nearest to one that does not exist.
//!
//! Takes a name; gives the nearest candidate, or none if no candidate is near. Pure.

use super::key::{Key, acceptance_in};
use super::sections::KEYS;

/// The path of the key that `path` most likely means.
pub(super) fn did_you_mean(path: &str) -> Option<String> {
    let pipeline = path.strip_prefix("pipelines.").and_then(|rest| rest.split('.').next()).unwrap_or("counters");
    let acceptance = acceptance_in(path).map_or("1", |(number, _)| number);
    let own = |key: &Key| key.path(if key.is_of_acceptances() { acceptance } else { pipeline });
    let known = || KEYS.iter().map(own);
    nearest(path, known()).or_else(|| {
        let leaf = path.rsplit('.').next()?;
        known().find(|candidate| candidate.rsplit('.').next() == Some(leaf))
    })
}

/// The candidate that is the fewest typing errors away, if few enough.
pub(super) fn nearest(given: &str, candidates: impl Iterator<Item = String>) -> Option<String> {
    let limit = (given.len() / 4).clamp(2, 6);
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(&given.to_lowercase(), &candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typing_error_or_a_wrong_section_is_guessed_and_nonsense_is_not() {
        assert_eq!(did_you_mean("batch.max_entrys").as_deref(), Some("batch.max_entries"));
        assert_eq!(did_you_mean("bacth.max_bytes").as_deref(), Some("batch.max_bytes"));
        assert_eq!(did_you_mean("valkey.lock_timeout").as_deref(), Some("postgres.lock_timeout"));
        assert_eq!(did_you_mean("pipelines.orders.steam").as_deref(), Some("pipelines.orders.stream"));
        assert_eq!(did_you_mean("doctor.accept.2.utnil").as_deref(), Some("doctor.accept.2.until"));
        assert_eq!(did_you_mean("doctor.accept.0.until").as_deref(), Some("doctor.accept.1.until"));
        assert_eq!(did_you_mean("colour.of_the_sky"), None);
    }
}
