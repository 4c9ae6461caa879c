//! Many streams in one process: over few connections, in few flushes, none kept waiting by another.

use std::collections::BTreeMap;
use std::io::Write;

use rustix::process::Signal;
use tokio::process::Command;

use crate::harness::{Daemon, Lab, eventually, output, within_limit};
use crate::proxy::{Proxy, Then, Way};

/// The program with so many streams, each read by one process at a time.
fn program(lab: &Lab, streams: u16, arguments: &[&str]) -> Command {
    let mut command = lab.exclusive(arguments);
    command.env("TIDEGATE__PIPELINES__COUNTERS__SHARDS", streams.to_string());
    command
}

fn stream(number: u16) -> String {
    format!("flush:counters:{{{number}}}")
}

/// Adds one to each of these counters.
async fn produce(lab: &Lab, streams: u16, counters: std::ops::Range<u32>) {
    let mut lines = tempfile::NamedTempFile::new().expect("a file");
    counters.for_each(|n| writeln!(lines, "c{n} 1").expect("written"));
    let path = lines.path().to_str().expect("text").to_owned();
    let (code, _, stderr) = output(&mut program(lab, streams, &["produce", &path])).await;
    assert_eq!(code, 0, "{stderr}");
}

/// How many connections there are by the first two words of their names.
async fn connections(lab: &Lab) -> BTreeMap<String, usize> {
    let clients = lab.client().await.call(&["CLIENT", "LIST"]).await.text();
    let names = clients.split_whitespace().filter_map(|field| field.strip_prefix("name="));
    let mut count = BTreeMap::new();
    for name in names.filter(|name| name.starts_with("tidegate")) {
        *count.entry(name.split(':').take(2).collect::<Vec<_>>().join(":")).or_default() += 1;
    }
    count
}

/// How many entries of a stream its group has not been moved over.
async fn lag(lab: &Lab, number: u16) -> i64 {
    let groups = lab.client().await.call(&["XINFO", "GROUPS", &stream(number)]).await.array();
    groups[0].clone().array()[11].int().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_streams_take_a_handful_of_connections_and_of_flushes() {
    let lab = Lab::new().await;
    produce(&lab, 300, 0..3_000).await;
    let mut command = program(&lab, 300, &["run"]);
    command.env("TIDEGATE__COMPACT__EVERY", "1h");
    let mut daemon = Daemon::start(command);
    eventually("all of it", 3_000, async || lab.in_ledger().await).await;
    // One of them is opened two seconds after the start.
    eventually("connections", 9, async || connections(&lab).await.values().sum()).await;
    // Each stream's group has been moved over all of it.
    let lag = async || {
        let mut all = 0;
        for number in 0..300 {
            all += lag(&lab, number).await;
        }
        all
    };
    eventually("the groups' lag", 0, lag).await;
    daemon.signal(Signal::TERM);
    assert!(daemon.exit().await.success());
    let flushes = lab.number("select count(distinct xmin::text) from tidegate.ledger").await;
    assert!(flushes < 150, "{flushes} flushes");
    assert_eq!(lab.number("select count(*) from public.counters where value = 1").await, 3_000);
    let consumers = lab.client().await.call(&["XINFO", "CONSUMERS", &stream(7), "tidegate:counters"]).await.array();
    assert!(consumers.is_empty(), "it has left every group: {consumers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_none_or_ceases_to_be_one_keeps_no_other_waiting() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["SET", &stream(3), "not a stream"]).await;
    let mut daemon = Daemon::start(program(&lab, 8, &["run"]));
    produce(&lab, 8, 0..1).await;
    eventually("the first", 1, async || lab.in_ledger().await).await;
    // One that was read becomes something else.
    client.call(&["DEL", &stream(5)]).await;
    client.call(&["SET", &stream(5), "not a stream"]).await;
    let of_others: Vec<u16> = (0..8).filter(|number| ![3, 5].contains(number)).collect();
    for number in &of_others {
        client.call(&["XADD", &stream(*number), "*", "id", "a", "amount", "1"]).await;
    }
    lab.await_value("a", of_others.len() as i64).await;
    daemon.wait_for_event("halted", |event| event["fault"].to_string().contains("WRONGTYPE")).await;
    // Corrected, they are read like the others.
    for number in [3, 5] {
        client.call(&["DEL", &stream(number)]).await;
        client.call(&["XADD", &stream(number), "*", "id", "a", "amount", "1"]).await;
    }
    lab.await_value("a", 8).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_moved_or_destroyed_is_read_again_and_the_others_go_on() {
    let lab = Lab::new().await;
    let mut daemon = Daemon::start(program(&lab, 20, &["run"]));
    produce(&lab, 20, 0..400).await;
    eventually("all of it", 400, async || lab.in_ledger().await).await;
    let mut client = lab.client().await;
    // What was flushed is acknowledged by moving the group over it, behind the COMMIT.
    eventually("the group's lag", 0, async || lag(&lab, 4).await).await;
    let again = client.call(&["XLEN", &stream(4)]).await.int().expect("entries");
    client.call(&["XGROUP", "SETID", &stream(4), "tidegate:counters", "0"]).await;
    let mut recognised = || daemon.sum("redelivered entries were recognised", "entries") as i64;
    eventually("what was read again", again, async || recognised()).await;
    let more = client.call(&["XLEN", &stream(9)]).await.int().expect("entries");
    client.call(&["XGROUP", "DESTROY", &stream(9), "tidegate:counters"]).await;
    produce(&lab, 20, 0..400).await;
    eventually("all of it", 800, async || lab.in_ledger().await).await;
    eventually("what was read again", true, async || recognised() >= again + more).await;
    assert_eq!(lab.number("select count(*) from public.counters where value = 2").await, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_of_one_stream_that_the_table_refuses_is_buried_and_those_of_all_streams_land() {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters add check (id <> 'c7')").await;
    produce(&lab, 10, 0..500).await;
    // What is malformed is no refusal, and is buried in the same flush.
    lab.client().await.call(&["XADD", &stream(2), "*", "id", "x", "amount", "much"]).await;
    let mut daemon = Daemon::start(program(&lab, 10, &["run", "--until-empty"]));
    daemon.exit().await;
    assert_eq!(lab.number("select count(*) from public.counters where value = 1").await, 499);
    let letters = "select count(*) from tidegate.dead_letters d join tidegate.lanes l using (lane)
                   where reason = 'bad_amount' and stream = 'flush:counters:{2}' or reason = 'refused_by_table' and fields[2] = 'c7'";
    assert_eq!(lab.number(letters).await, 2);
    assert_eq!(lab.in_ledger().await, 501);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_killed_leaves_its_streams_to_the_other_one_and_everything_counts_once() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let mut first = lab.start_through(program(&lab, 60, &["run"]), Some(proxy.port()), None);
    produce(&lab, 60, 0..600).await;
    eventually("all of it", 600, async || lab.in_ledger().await).await;
    // What follows is committed, and no position is moved over it.
    let moved = proxy.trap(Way::ToServer, b"XGROUP", Then::Hold);
    produce(&lab, 60, 0..600).await;
    within_limit("a move", moved).await.expect("sprung");
    let mut second = Daemon::start(program(&lab, 60, &["run"]));
    second.wait_for("running").await;
    first.kill().await;
    proxy.cut();
    produce(&lab, 60, 0..600).await;
    eventually("all of it", 1_800, async || lab.in_ledger().await).await;
    assert_eq!(lab.number("select count(*) from public.counters where value = 3").await, 600);
}

/// How the clients by this name stand at the server: their flags.
async fn flags(lab: &Lab, name: &str) -> Vec<String> {
    let clients = lab.client().await.call(&["CLIENT", "LIST"]).await.text();
    let field = |client: &str, field: &str| {
        client.split_whitespace().find_map(|word| word.strip_prefix(field)).unwrap_or_default().to_owned()
    };
    clients.lines().filter(|client| field(client, "name=").starts_with(name)).map(|c| field(c, "flags=")).collect()
}

/// How many reads wait for entries.
async fn waiting_reads(lab: &Lab) -> usize {
    flags(lab, "tidegate:").await.iter().filter(|flags| flags.contains('b')).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_streams_the_server_says_which_are_written_to_and_no_read_waits() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let mut daemon = Daemon::start(program(&lab, 100, &["run"]));
    produce(&lab, 100, 0..1_000).await;
    eventually("all of it", 1_000, async || lab.in_ledger().await).await;
    assert!(flags(&lab, "tidegate:news").await.iter().all(|flags| flags.contains('t')), "{}", daemon.last_lines());
    eventually("reads that wait", 0, async || waiting_reads(&lab).await).await;
    for n in 1..=3 {
        client.call(&["XADD", &stream(57), "*", "id", "heard", "amount", "1"]).await;
        lab.await_value("heard", n).await;
    }
    assert_eq!(waiting_reads(&lab).await, 0);
    // Nobody hears anything any more: what is written just then lands, and reads wait as they do where there are few.
    let clients = client.call(&["CLIENT", "LIST"]).await.text();
    let news = clients.lines().find(|client| client.contains("name=tidegate:news")).expect("it is there");
    let id = news.split_whitespace().find_map(|word| word.strip_prefix("id=")).expect("its number").to_owned();
    assert_eq!(client.call(&["CLIENT", "KILL", "ID", &id]).await.int(), Some(1));
    client.call(&["XADD", &stream(3), "*", "id", "unheard", "amount", "1"]).await;
    lab.await_value("unheard", 1).await;
    eventually("reads that wait", 1, async || waiting_reads(&lab).await).await;
    client.call(&["XADD", &stream(3), "*", "id", "unheard", "amount", "1"]).await;
    lab.await_value("unheard", 2).await;
    daemon.signal(Signal::TERM);
    assert!(daemon.exit().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_hear_which_streams_are_written_to_reads_all_of_them() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["ACL", "SETUSER", "default", "-client|tracking"]).await;
    let mut daemon = Daemon::start(program(&lab, 100, &["run"]));
    eventually("reads that wait", 1, async || waiting_reads(&lab).await).await;
    produce(&lab, 100, 0..1_000).await;
    eventually("all of it", 1_000, async || lab.in_ledger().await).await;
    assert_eq!(daemon.count("interrupted"), 0, "{}", daemon.last_lines());
    daemon.signal(Signal::TERM);
    assert!(daemon.exit().await.success());
}
