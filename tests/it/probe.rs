//! `tidegate probe`: one delta through the workers that are there.

use crate::harness::{Lab, output};

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_sees_its_delta_land_once_and_counts_probes() {
    let lab = Lab::new().await;
    let mut daemon = lab.daemon();
    daemon.wait_for("running").await;
    for count in 1..=2 {
        let (code, stdout, stderr) = output(&mut lab.program(&["probe"])).await;
        assert_eq!(code, 0, "{stderr}");
        assert!(stdout.contains("landed once"), "{stdout}");
        assert_eq!(lab.value("tidegate-probe").await, Some(count));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_without_a_worker_ends_in_time_and_says_what_to_look_at() {
    let lab = Lab::new().await;
    let (code, _, stderr) = output(&mut lab.program(&["probe", "--timeout", "200ms"])).await;
    assert_eq!(code, 75, "{stderr}");
    assert!(stderr.contains("has not landed within 200ms: is a worker at work"), "{stderr}");
    lab.settle_everything().await;
    assert_eq!(lab.value("tidegate-probe").await, Some(1), "it was sent all the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_that_counts_twice_is_noticed() {
    let lab = Lab::new().await;
    lab.execute(
        "create function twice() returns trigger language plpgsql as 'begin new.value := new.value * 2; return new; end';
         create trigger twice before insert on public.counters for each row execute function twice()",
    )
    .await;
    let mut daemon = lab.daemon();
    daemon.wait_for("running").await;
    let (code, _, stderr) = output(&mut lab.program(&["probe", "--key", "k"])).await;
    assert_eq!(code, 3, "{stderr}");
    assert!(stderr.contains("went from 0 to 2, and should be 1"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_other_types_are_probed_and_bad_ones_are_named() {
    let lab = Lab::new().await;
    lab.execute(
        "drop table public.counters; create table public.counters (id uuid primary key, value numeric not null, updated_at timestamptz)",
    )
    .await;
    let (code, _, stderr) = output(&mut lab.program(&["probe"])).await;
    assert_ne!(code, 0);
    assert!(stderr.contains("uuid"), "{stderr}");
    let mut daemon = lab.daemon();
    daemon.wait_for("running").await;
    let key = "00000000-0000-4000-8000-000000000001";
    let (code, _, stderr) = output(&mut lab.program(&["probe", "--key", key])).await;
    assert_eq!(code, 0, "{stderr}");
    let (code, _, stderr) = output(&mut lab.program(&["probe", "--pipeline", "nobody"])).await;
    assert_eq!(code, 78);
    assert!(stderr.contains("there is no pipeline \"nobody\": name one of counters"), "{stderr}");
}
