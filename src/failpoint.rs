//! Points at which a test kills this process, to prove that memory is disposable (I7). In no build but those with the
//! feature `failpoints`, and there only where `TIDEGATE_FAILPOINT` names one: `POINT`, or `POINT:N` for the Nth time.
//! Where `TIDEGATE_FAILPOINT_PANICS` is a number, so many passes panic instead, and those behind them do nothing.

#[cfg(feature = "failpoints")]
mod armed {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicI64, Ordering};

    struct Armed {
        point: String,
        passes: AtomicI64,
        /// How often it panics instead of killing the process.
        panics: Option<i64>,
    }

    static ARMED: LazyLock<Option<Armed>> = LazyLock::new(|| {
        let named = std::env::var("TIDEGATE_FAILPOINT").ok()?;
        let (point, nth) = named.split_once(':').unwrap_or((&named, "1"));
        let panics = std::env::var("TIDEGATE_FAILPOINT_PANICS").ok().map(|panics| panics.parse().unwrap_or(1));
        Some(Armed { point: point.to_owned(), passes: AtomicI64::new(nth.parse().unwrap_or(1) - 1), panics })
    });

    /// Whether the process is to die here and now, or the task to panic; for a death it stays so from the Nth time on.
    pub(super) fn is_due(point: &str) -> bool {
        let is_due = |armed: &Armed| {
            let left = armed.passes.fetch_sub(1, Ordering::Relaxed);
            left <= 0 && armed.panics.is_none_or(|panics| -left < panics)
        };
        ARMED.as_ref().is_some_and(|armed| armed.point == point && is_due(armed))
    }

    pub(super) fn panics() -> bool {
        ARMED.as_ref().is_some_and(|armed| armed.panics.is_some())
    }

    /// As `kill -9` does it; or by a panic.
    pub(super) fn die() -> ! {
        if panics() {
            panic!("the failpoint was reached");
        }
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::process::abort()
    }
}

/// Dies here, if this point is named.
#[inline]
pub(crate) fn reached(point: &str) {
    #[cfg(feature = "failpoints")]
    if armed::is_due(point) {
        armed::die()
    }
    let _ = point;
}

/// Dies while this is under way, if this point is named, or right behind it: at a random moment, so that what was sent may have
/// had its effect or not, and its answer may have come or not.
#[inline]
pub(crate) async fn during<T>(point: &str, work: impl Future<Output = T>) -> T {
    #[cfg(feature = "failpoints")]
    if armed::is_due(point) {
        // From 1 us to 2 ms, each power of two as likely: what is under way here takes from 50 us to a few ms.
        let wait = std::time::Duration::from_nanos(1_000 << rand::random_range(0..11));
        if armed::panics() {
            // Dropped with what it holds, wherever it has come to.
            let _ = tokio::time::timeout(wait, work).await;
            armed::die()
        }
        std::thread::spawn(move || {
            std::thread::sleep(wait);
            armed::die()
        });
        work.await;
        armed::die()
    }
    let _ = point;
    work.await
}
