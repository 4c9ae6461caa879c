//! Promises broken on purpose, for the tests and benchmarks that must notice. In no build but those with the feature
//! `sabotage`, and there only where `TIDEGATE_SABOTAGE` names it.

use std::sync::LazyLock;

static NAMED: LazyLock<String> = LazyLock::new(|| std::env::var("TIDEGATE_SABOTAGE").unwrap_or_default());

/// Whether this promise is to be broken.
pub(crate) fn is(promise: &str) -> bool {
    cfg!(feature = "sabotage") && *NAMED == promise
}
