//! docs/producing.md, executed: its programs by the real client libraries, its script, and what it says of a MULTI that is refused.
//!
//! The client libraries are those of [`functions`](crate::functions).

use std::process::Stdio;
use std::time::Duration;

use tidegate::client::Producer;
use tidegate::model::pipeline::Pipeline;
use tidegate::valkey::Endpoint;
use tokio::process::Command;

use crate::functions::{in_node, in_python};
use crate::harness::{Client, Daemon, Lab, Resp, output};
use crate::page::blocks;
use crate::proxy::{Proxy, Then, Way};

const DOCUMENT: &str = include_str!("../../docs/producing.md");
const STREAM: &str = "flush:counters";

fn only(language: &str) -> &'static str {
    let [block] = blocks(DOCUMENT, language)[..] else { panic!("one block of {language}") };
    block
}

async fn entries(client: &mut Client) -> Option<i64> {
    client.call(&["XLEN", STREAM]).await.int()
}

/// Runs a program that adds 5, 6 and 4. The answer to the 6 is lost: it says so, goes on, and has sent nothing twice.
async fn lands_and_repeats_nothing(mut command: Command, id: &str) {
    let lab = Lab::new().await;
    let _daemon = Daemon::start(lab.program(&["run"]));
    let proxy = Proxy::start(lab.valkey.port()).await;
    let lost = proxy.trap(Way::ToServer, b"amount\r\n$1\r\n6", Then::LoseReply);
    command.env("VALKEY_URL", proxy.url()).stdin(Stdio::null());
    let (code, stdout, stderr) = output(&mut command).await;
    assert_eq!((code, stdout.as_str()), (0, "5\nunknown\n15\n"), "{stderr}");
    lost.await.expect("sprung");
    lab.await_value(id, 15).await;
    assert_eq!(entries(&mut lab.client().await).await, Some(3), "one was sent twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_python_producer_lands_and_repeats_nothing() {
    if let Some(command) = in_python(only("python")) {
        lands_and_repeats_nothing(command, "python").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_node_producer_lands_and_repeats_nothing() {
    if let Some(command) = in_node(only("javascript")) {
        lands_and_repeats_nothing(command, "node").await;
    }
}

/// What the page has for Rust stands here, line for line.
#[tokio::test(flavor = "multi_thread")]
async fn the_documented_rust_producer_is_this_one() {
    let source = include_str!("producers.rs");
    for line in only("rust").lines().map(str::trim) {
        assert!(source.lines().any(|ours| ours.trim() == line), "{line}");
    }
    let lab = Lab::new().await;
    let told = documented(lab.valkey.url()).await.expect("connected");
    assert!(told.starts_with("5 by "), "{told}");
    assert_eq!(lab.client().await.call(&["GET", "counter:rust"]).await, Resp::Text(b"5".to_vec()));
}

async fn documented(url: String) -> Result<String, Box<dyn std::error::Error>> {
    let endpoint = Endpoint::new(url.into(), Duration::from_secs(2), Duration::from_secs(2));
    let producer = Producer::connect(&endpoint, &Pipeline::counters()).await?;
    let told = match producer.add("rust", 5).await {
        Ok(added) => format!("{} by {}", added.value, added.entry),
        Err(error) if error.happened_not() => format!("not added: {error}"),
        Err(error) => format!("unknown: {error}"),
    };
    Ok(told)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_script_does_both_or_neither() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let script = only("lua");
    let eval = ["EVAL", script, "2", "counter:a", STREAM, "a", "5", "one"];
    assert_eq!(client.call(&eval).await.int(), Some(5));
    client.call(&["SET", "counter:a", "9223372036854775807"]).await;
    let refused = client.call(&eval).await;
    assert!(matches!(&refused, Resp::Error(error) if error.contains("overflow")), "{refused:?}");
    assert_eq!(entries(&mut client).await, Some(1));
}

/// One increment in a MULTI; gives what EXEC answers.
async fn in_a_multi(client: &mut Client) -> Resp {
    client.call(&["MULTI"]).await;
    client.call(&["INCRBY", "counter:a", "1"]).await;
    client.call(&["XADD", STREAM, "*", "id", "a", "amount", "1"]).await;
    client.call(&["EXEC"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_multi_is_refused_as_a_whole_by_the_server_and_in_part_by_a_counter() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    for (refusing, taking) in [
        (["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"]),
        (["CONFIG", "SET", "min-replicas-to-write", "1"], ["CONFIG", "SET", "min-replicas-to-write", "0"]),
    ] {
        client.call(&refusing).await;
        let refused = in_a_multi(&mut client).await;
        assert!(matches!(&refused, Resp::Error(error) if error.starts_with("EXECABORT")), "{refused:?}");
        client.call(&taking).await;
        assert_eq!((client.call(&["EXISTS", "counter:a"]).await.int(), entries(&mut client).await), (Some(0), Some(0)));
    }
    client.call(&["SET", "counter:a", "9223372036854775807"]).await;
    let half = in_a_multi(&mut client).await.array();
    assert!(matches!(&half[0], Resp::Error(error) if error.contains("overflow")), "{half:?}");
    assert_eq!(entries(&mut client).await, Some(1), "XADD happened all the same");
}
