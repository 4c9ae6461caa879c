//! Producers whose clocks are wrong, by days or by years: a repeated increment is recognised all the same.

use crate::harness::{Client, Lab, Resp, eventually};
use crate::managed::{INDEX, STATE, daemon, is_managed, value};

/// The hour by Valkey's clock.
async fn hour(client: &mut Client) -> u64 {
    let time = client.call(&["TIME"]).await.array();
    time[0].text().parse::<u64>().expect("seconds") / 3600
}

/// An increment of `a` by 5, as a program in another language sends it.
async fn add(client: &mut Client, lane: &str, seq: u64) -> Resp {
    let (lease, seq) = ("tidegate:hydrate:counter:a", seq.to_string());
    let keys = ["counter:a", lease, "flush:counters", INDEX, STATE];
    let arguments = ["a", "5", lane, &seq, "0", "tidegate:counters", "5000", "1"];
    client.call(&[&["FCALL", "tidegate_1_incr", "5"], &keys[..], &arguments[..]].concat()).await
}

async fn field(client: &mut Client, field: String) -> Option<String> {
    match client.call(&["HGET", STATE, &field]).await {
        Resp::Text(text) => Some(String::from_utf8(text).expect("text")),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_in_use_is_not_forgotten_however_wrong_its_producers_clock_is() {
    let lab = Lab::new().await;
    let _first = daemon(&lab);
    is_managed(&lab).await;
    let mut client = lab.client().await;
    let now = hour(&mut client).await;
    let lanes = [
        format!("{:x}-behind", now - 100),
        "1-of-1970".into(),
        format!("{:x}-ahead", now + 100),
        // Begins with the letters of a number.
        "ad-server".into(),
    ];
    let landed = async |adds: i64| lab.await_value("a", 5 * adds).await;
    for lane in &lanes {
        assert_ne!(add(&mut client, lane, 1).await.array()[0], Resp::Int(3), "{lane}: seen");
    }
    landed(4).await;
    // Each daemon looks at the lanes when it begins.
    let _second = daemon(&lab);
    for lane in &lanes {
        let noted = async || field(&mut lab.client().await, format!("idle:{lane}")).await;
        eventually(lane, Some(format!("1 0 {now}")), noted).await;
        assert_eq!(add(&mut client, lane, 1).await.array()[0], Resp::Int(3), "{lane}: sent again");
    }
    for lane in &lanes {
        add(&mut client, lane, 2).await;
    }
    landed(8).await;
    assert!(matches!(value(&lab, "a").await, None | Some(40)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_nobody_uses_is_forgotten_after_two_days_and_no_other_one() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let now = hour(&mut client).await;
    let (before, behind, ahead) = (now - 1, format!("{:x}-a", now - 100), format!("{:x}-b", now + 100_000));
    let set = async |client: &mut Client, lane: &str, number: &str, note: Option<String>| {
        client.call(&["HSET", STATE, &format!("lane:{lane}"), number]).await;
        if let Some(note) = note {
            client.call(&["HSET", STATE, &format!("idle:{lane}"), &note]).await;
        }
    };
    let used = format!("{:x}-used", now - 100);
    let seen = format!("{:x}-seen", now - 100);
    let young = format!("{now:x}-young");
    set(&mut client, &behind, "7", Some(format!("7 47 {before}"))).await;
    set(&mut client, &ahead, "7", Some(format!("7 47 {before}"))).await;
    // Its number has risen, in the last of the hours.
    set(&mut client, &used, "8", Some(format!("7 47 {before}"))).await;
    // It was looked at in this hour already, by another daemon.
    set(&mut client, &seen, "7", Some(format!("7 47 {now}"))).await;
    set(&mut client, &young, "7", None).await;
    // A note whose lane an older daemon has forgotten.
    client.call(&["HSET", STATE, "idle:1-gone", &format!("7 3 {before}")]).await;
    let _daemon = daemon(&lab);
    for gone in [&behind, &ahead] {
        eventually(gone, None, async || field(&mut lab.client().await, format!("lane:{gone}")).await).await;
        assert_eq!(field(&mut client, format!("idle:{gone}")).await, None);
    }
    eventually("the note", None, async || field(&mut lab.client().await, "idle:1-gone".into()).await).await;
    let rest =
        [(&used, "8", Some(format!("8 0 {now}"))), (&seen, "7", Some(format!("7 47 {now}"))), (&young, "7", None)];
    for (lane, number, note) in rest {
        eventually(lane, note, async || field(&mut lab.client().await, format!("idle:{lane}")).await).await;
        assert_eq!(field(&mut client, format!("lane:{lane}")).await.as_deref(), Some(number), "{lane}");
    }
}
