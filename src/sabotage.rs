//! Promises broken on purpose: negative controls, to show that the tests which guard a promise can fail. In no build but those
//! with the feature `sabotage`, and there only where `TIDEGATE_SABOTAGE` names it. tests/it/controls.rs lists them all.

/// Whether this promise is to be broken.
#[cfg(feature = "sabotage")]
pub(crate) fn is(promise: &str) -> bool {
    static NAMED: std::sync::LazyLock<String> =
        std::sync::LazyLock::new(|| std::env::var("TIDEGATE_SABOTAGE").unwrap_or_default());
    *NAMED == promise
}

/// Never.
#[cfg(not(feature = "sabotage"))]
#[inline]
pub(crate) const fn is(_: &str) -> bool {
    false
}
