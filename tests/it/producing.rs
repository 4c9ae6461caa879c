//! The writing side: the counter and its delta, both or neither.

use std::process::Stdio;

use tidegate::pipeline::Pipeline;
use tidegate::produce::{ProduceError, Producer};
use tidegate::valkey::Address;
use tokio::io::AsyncWriteExt;

use crate::harness::{Lab, Resp, STREAM, within_limit};
use crate::proxy::{Proxy, Then, Way};

async fn producer(port: u16) -> Producer {
    let limit = std::time::Duration::from_secs(5);
    let url = format!("valkey://127.0.0.1:{port}").into();
    let address = Address { url, connect_timeout: limit, command_timeout: limit };
    Producer::connect(&address, Pipeline::counters()).await.expect("connected")
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_become_increments_and_bad_ones_are_told_by_number() {
    let lab = Lab::new().await;
    let mut command = lab.program(&["produce"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("it runs");
    let lines: String = (0..1_000).map(|n| format!("/page/{}\n", n % 7)).collect();
    let bad = "a 5\n\n  b -2  \nc x\n\x1b[2J 1 2\n";
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all((lines + bad).as_bytes()).await.expect("taken");
    drop(stdin);
    let output = within_limit("the end", child.wait_with_output()).await.expect("it ran");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(65), "{stderr}");
    assert!(stderr.contains("added 1002 increments, 1003 in sum"), "{stderr}");
    assert!(stderr.contains("stdin:1004: ") && stderr.contains("stdin:1005: ") && !stderr.contains('\x1b'), "{stderr}");
    lab.settle_everything().await;
    assert_eq!(lab.number("select sum(value)::bigint from public.counters").await, 1_003);
    assert_eq!((lab.value("a").await, lab.value("b").await), (Some(5), Some(-2)));
    assert_eq!(lab.client().await.call(&["GET", "counter:/page/0"]).await, Resp::Text(b"143".to_vec()));
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_increments_get_entries_that_differ() {
    let lab = Lab::new().await;
    let producer = producer(lab.valkey.port()).await;
    let first = producer.add("a", 2).await.expect("added");
    let second = producer.add("a", 2).await.expect("added");
    assert_eq!((first.value, second.value), (2, 4));
    let entries = lab.client().await.call(&["XRANGE", STREAM, "-", "+"]).await.array();
    let fields: Vec<Vec<Resp>> = entries.into_iter().map(|e| e.array().remove(1).array()).collect();
    assert_eq!(fields[0][..4], fields[1][..4]);
    assert_eq!(fields[0][4], Resp::Text(b"op".to_vec()));
    assert_ne!(fields[0][5], fields[1][5]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_side_refuses_does_not_happen_on_the_other() {
    let lab = Lab::new().await;
    let (producer, mut client) = (producer(lab.valkey.port()).await, lab.client().await);
    client.call(&["RPUSH", "counter:list", "x"]).await;
    client.call(&["SET", "counter:full", &i64::MAX.to_string()]).await;
    let outcomes = producer.add_many(&[("list", 1), ("full", 1), ("good", i64::MAX), ("full", -1)]).await;
    assert!(matches!(&outcomes[0], Err(ProduceError::Refused(why)) if why.starts_with("WRONGTYPE")), "{outcomes:?}");
    assert!(matches!(&outcomes[1], Err(ProduceError::Refused(why)) if why.contains("overflow")), "{outcomes:?}");
    assert_eq!(outcomes[2].as_ref().map(|added| added.value), Ok(i64::MAX), "exact beyond 53 bits");
    assert_eq!(outcomes[3].as_ref().map(|added| added.value), Ok(i64::MAX - 1));
    assert_eq!(client.call(&["XLEN", STREAM]).await.int(), Some(2));

    client.call(&["DEL", STREAM]).await;
    client.call(&["SET", STREAM, "a string"]).await;
    let refused = producer.add("new", 1).await;
    assert!(matches!(&refused, Err(ProduceError::Refused(why)) if why.starts_with("WRONGTYPE")), "{refused:?}");
    assert_eq!(client.call(&["EXISTS", "counter:new"]).await.int(), Some(0));
    // A stream at its last id takes nothing more: the counter is put back.
    client.call(&["DEL", STREAM]).await;
    client.call(&["XADD", STREAM, "18446744073709551615-18446744073709551615", "a", "b"]).await;
    client.call(&["SET", "counter:old", "5", "EX", "1000"]).await;
    for id in ["new", "old"] {
        let refused = producer.add(id, 1).await;
        assert!(matches!(refused, Err(ProduceError::Refused(_))), "{refused:?}");
    }
    assert_eq!(client.call(&["EXISTS", "counter:new"]).await.int(), Some(0));
    assert_eq!(client.call(&["GET", "counter:old"]).await.text(), "5");
    assert!(client.call(&["TTL", "counter:old"]).await.int() > Some(0), "with the time it had to live");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_is_unknown_and_never_sent_again() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let producer = producer(proxy.port()).await;
    let lost = proxy.trap(Way::ToServer, b"marked", Then::LoseReply);
    let outcome = producer.add("marked", 1).await;
    within_limit("the lost answer", lost).await.expect("sprung");
    assert!(matches!(outcome, Err(ProduceError::Unknown(_))), "{outcome:?}");
    let mut client = lab.client().await;
    assert_eq!(client.call(&["GET", "counter:marked"]).await.text(), "1");
    assert_eq!(client.call(&["XLEN", STREAM]).await.int(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_forgot_the_script_is_told_it_again() {
    let lab = Lab::new().await;
    let producer = producer(lab.valkey.port()).await;
    lab.client().await.call(&["SCRIPT", "FLUSH"]).await;
    assert_eq!(producer.add("a", 1).await.map(|added| added.value), Ok(1));
}
