//! A steady load: entries added evenly over time.

use std::time::{Duration, Instant};

use tidegate_lab::harness::{Client, STREAM};
use tokio::time::{MissedTickBehavior, interval};

/// Between two bursts.
const BURST_EVERY: Duration = Duration::from_millis(2);
/// Different counters.
const COUNTERS: u64 = 1_000;

/// Adds `rate` entries a second for so long; gives how many it added.
pub async fn run(mut client: Client, rate: u64, lasts: Duration) -> u64 {
    let mut ticks = interval(BURST_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (started, mut sent) = (Instant::now(), 0);
    while started.elapsed() < lasts {
        ticks.tick().await;
        let due = (started.elapsed().as_secs_f64() * rate as f64) as u64;
        let commands: Vec<[String; 7]> = (sent..due)
            .map(|n| ["XADD", STREAM, "*", "id", &format!("c{}", n % COUNTERS), "amount", "1"].map(str::to_owned))
            .collect();
        if !commands.is_empty() {
            client.pipeline(&commands).await;
        }
        sent = due;
    }
    sent
}
