//! The writing side against a real server: both or neither, and the truth about what is not known.
//!

use std::io::Write;
use std::time::Duration;

use tidegate::client::{NotAdded, Producer};
use tidegate::model::names;
use tidegate::model::pipeline::Pipeline;
use tidegate::ops::{self, Exit, sandbox::Valkey};
use tidegate::retry::Fault;
use tidegate::valkey::{Command, Connection, Endpoint, Reply};
use tokio::io::AsyncWriteExt;
use url::Url;

use crate::harness::{Lab, eventually, within_limit};
use crate::proxy::{Proxy, Then, Way};

/// No test waits longer for anything.
const LIMIT: Duration = Duration::from_secs(10);

fn address(url: &str) -> Endpoint {
    Endpoint::new(url.to_owned().into(), LIMIT, LIMIT)
}

/// One test's own corner of the server.
struct Corner {
    connection: Connection,
    pipeline: Pipeline,
    /// What every id of the test begins with.
    prefix: String,
}

impl Corner {
    async fn new(url: &str) -> Corner {
        let prefix = format!("{:016x}", rand::random::<u64>());
        let pipeline = Pipeline { stream: format!("flush:{prefix}"), ..Pipeline::counters() };
        let connection = Connection::open(&address(url), "test").await.expect("a server");
        Corner { connection, pipeline, prefix }
    }

    async fn producer(&self, url: &str) -> Producer {
        Producer::connect(&address(url), &self.pipeline).await.expect("a server")
    }

    fn id(&self, name: &str) -> String {
        format!("{}:{name}", self.prefix)
    }

    async fn call(&self, command: Command) -> Reply {
        self.connection.call(command).await.expect("an answer")
    }

    async fn set(&self, key: &str, value: &str) {
        self.call(Command::new("SET").arg(key).arg(value)).await;
    }

    /// A counter as text, if it is there.
    async fn counter(&self, name: &str) -> Option<String> {
        let reply = self.call(Command::new("GET").arg(names::counter(&self.id(name)))).await;
        reply.as_text().map(str::to_owned)
    }

    /// The stream's entries, each as its strings: name, value, name, value …
    async fn entries(&self) -> Vec<Vec<String>> {
        let reply = self.call(Command::new("XRANGE").arg(self.pipeline.stream.as_str()).arg("-").arg("+")).await;
        let strings = |entry: Reply| {
            let fields = entry.into_array().and_then(|mut parts| parts.nth(1)).and_then(Reply::into_array);
            fields.expect("fields").map(|field| field.as_text().expect("text").to_owned()).collect()
        };
        reply.into_array().expect("entries").map(strings).collect()
    }

    /// Runs the verb on a file of these bytes.
    async fn produce(&self, url: &str, bytes: &[u8]) -> Exit {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(bytes).expect("written");
        let args = ops::produce::Opts { files: vec![file.path().to_owned()], quiet: true, ..Default::default() };
        ops::produce::produce(args, address(url), self.pipeline.clone()).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_increment_is_both_a_higher_counter_and_an_entry() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let producer = corner.producer(url).await;
    let id = corner.id("a");
    let first = producer.add(&id, 5).await.expect("added");
    let second = producer.add(&id, -7).await.expect("added");
    assert_eq!((first.value, second.value), (5, -2));
    assert!(first.entry < second.entry);
    assert_eq!(corner.counter("a").await.as_deref(), Some("-2"));
    let entries = corner.entries().await;
    assert_eq!(entries[0][..5], ["id", id.as_str(), "amount", "5", "op"]);
    assert_eq!(entries[1][..5], ["id", id.as_str(), "amount", "-7", "op"]);
    assert_eq!((entries.len(), entries[0].len()), (2, 6));
    assert_ne!(entries[0][5], entries[1][5], "two increments with one op");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_traced_increment_carries_its_trace() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let producer = corner.producer(url).await;
    producer.traced(trace).add(&corner.id("a"), 1).await.expect("added");
    producer.add(&corner.id("a"), 1).await.expect("added");
    let entries = corner.entries().await;
    assert_eq!(entries[0][6..], ["traceparent", trace]);
    assert_eq!(entries[1].len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_increments_happen_in_their_order_with_an_op_of_their_own() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let increments: Vec<(String, i64)> = (0..5000).map(|i| (corner.id(&(i % 7).to_string()), i)).collect();
    let outcomes = corner.producer(url).await.add_many(&increments).await;
    let entries = corner.entries().await;
    assert_eq!((outcomes.len(), entries.len()), (5000, 5000));
    for (((id, amount), entry), outcome) in increments.iter().zip(&entries).zip(&outcomes) {
        assert_eq!(entry[..4], ["id", id.as_str(), "amount", amount.to_string().as_str()]);
        assert!(outcome.is_ok());
    }
    let ops: std::collections::HashSet<_> = entries.iter().map(|entry| &entry[5]).collect();
    assert_eq!(ops.len(), 5000);
    assert_eq!(corner.counter("3").await, Some((0..5000).filter(|i| i % 7 == 3).sum::<i64>().to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn any_text_is_an_id_and_one_with_nul_is_refused_alone() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let producer = corner.producer(url).await;
    let ids = [corner.id("é \n\r\"{x}"), corner.id("a\0b"), corner.id("message")];
    let outcomes = producer.add_many(&ids.clone().map(|id| (id, 1))).await;
    assert!(outcomes[0].is_ok() && outcomes[2].is_ok());
    assert_eq!(outcomes[1], Err(NotAdded::BadId));
    let seen: Vec<String> = corner.entries().await.into_iter().map(|mut entry| entry.swap_remove(1)).collect();
    assert_eq!(seen, [ids[0].clone(), ids[2].clone()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_counter_is_exact_where_a_double_is_not() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let producer = corner.producer(url).await;
    let near = (1 << 53) + 1;
    assert_eq!(producer.add(&corner.id("a"), near).await.expect("added").value, near);
    assert_eq!(producer.add(&corner.id("a"), 2).await.expect("added").value, near + 2);
    assert_eq!(producer.add(&corner.id("b"), i64::MIN).await.expect("added").value, i64::MIN);
    assert_eq!(producer.add(&corner.id("b"), i64::MAX).await.expect("added").value, -1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_counter_of_another_type_refuses_and_no_entry_is_made() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let producer = corner.producer(url).await;
    corner.call(Command::new("RPUSH").arg(names::counter(&corner.id("list"))).arg("x")).await;
    corner.set(&names::counter(&corner.id("text")), "seven").await;
    for (name, code) in [("list", "WRONGTYPE"), ("text", "ERR")] {
        match producer.add(&corner.id(name), 1).await {
            Err(NotAdded::CounterRefused(Fault::Valkey { code: said, .. })) => assert_eq!(said, code),
            other => panic!("{name}: {other:?}"),
        }
    }
    assert!(corner.entries().await.is_empty());
    assert_eq!(corner.counter("text").await.as_deref(), Some("seven"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_counter_at_its_end_refuses_and_its_neighbours_go_on() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let producer = corner.producer(url).await;
    let most = i64::MAX.to_string();
    corner.set(&names::counter(&corner.id("full")), &most).await;
    let increments = [("a", 1), ("full", 1), ("full", -1), ("b", 1)].map(|(name, amount)| (corner.id(name), amount));
    let outcomes = producer.add_many(&increments).await;
    assert!(matches!(&outcomes[1], Err(why @ NotAdded::CounterRefused(_)) if why.happened_not()), "{outcomes:?}");
    assert!(outcomes[0].is_ok() && outcomes[2].is_ok() && outcomes[3].is_ok());
    assert_eq!(corner.counter("full").await, Some((i64::MAX - 1).to_string()));
    assert_eq!(corner.entries().await.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_another_type_refuses_and_the_counters_are_as_they_were() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let producer = corner.producer(url).await;
    corner.set(&corner.pipeline.stream, "no stream").await;
    let old = names::counter(&corner.id("old"));
    corner.call(Command::new("SET").arg(old.as_str()).arg("41").arg("EX").arg(1000)).await;
    let outcomes = producer.add_many(&[(corner.id("old"), 1), (corner.id("new"), i64::MIN)]).await;
    for outcome in outcomes {
        assert!(matches!(&outcome, Err(NotAdded::StreamRefused(_))), "{outcome:?}");
    }
    assert_eq!(corner.counter("old").await.as_deref(), Some("41"));
    assert!(corner.call(Command::new("TTL").arg(old)).await.as_int() > Some(900), "the time to live is gone");
    assert_eq!(corner.counter("new").await, None);
}

/// A user that may not run scripts, or may not write the stream, adds nothing at all.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_permission_leaves_everything_as_it_was() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let user = |name: &str| format!("{}-{name}", corner.prefix);
    for (name, rule) in [("no-eval", "-eval"), ("no-xadd", "-xadd")] {
        let rules = ["on", ">secret", "~*", "+@all", rule];
        corner.call(Command::new("ACL").arg("SETUSER").arg(user(name)).args(rules)).await;
        let mut as_user = Url::parse(url).expect("a URL");
        as_user.set_username(&user(name)).expect("a host");
        as_user.set_password(Some("secret")).expect("a host");
        let outcome = corner.producer(as_user.as_str()).await.add(&corner.id("a"), 1).await;
        assert!(matches!(&outcome, Err(why) if why.happened_not()), "{outcome:?}");
        assert_eq!((corner.counter("a").await, corner.entries().await.len()), (None, 0), "{name}");
        corner.call(Command::new("ACL").arg("DELUSER").arg(user(name))).await;
    }
}

/// The reply is swallowed and the connection cut: it happened, nobody was told, and it is not done twice.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_lost_makes_unknown_and_nothing_is_sent_again() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let proxy = Proxy::start(server.port()).await;
    let producer = corner.producer(&proxy.url()).await;
    producer.add(&corner.id("a"), 1).await.expect("added");
    let lost = proxy.trap(Way::ToServer, b"EVAL", Then::LoseReply);
    let outcome = producer.add(&corner.id("a"), 10).await;
    lost.await.expect("sprung");
    assert!(matches!(outcome, Err(NotAdded::Unknown(_))), "{outcome:?}");
    assert_eq!((corner.counter("a").await.as_deref(), corner.entries().await.len()), (Some("11"), 2));
    assert_eq!(producer.add(&corner.id("a"), 100).await.expect("a new connection").value, 111);
    assert_eq!(corner.entries().await.len(), 3);
}

/// Of many, what was answered is added, what was on its way is unknown, what was not sent did certainly not happen.
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_in_the_middle_is_told_apart_into_added_unknown_and_untouched() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let proxy = Proxy::start(server.port()).await;
    let producer = corner.producer(&proxy.url()).await;
    // An amount that stands out marks the increment whose answer is lost.
    let amount = |n: i64| if n == 10_000 { 7_777_777 } else { 1 };
    let increments: Vec<(String, i64)> = (0..20_000).map(|n| (corner.id("a"), amount(n))).collect();
    let lost = proxy.trap(Way::ToServer, b"7777777", Then::LoseReply);
    let outcomes = producer.add_many(&increments).await;
    lost.await.expect("sprung");
    let added = outcomes.iter().filter(|o| o.is_ok()).count();
    let unknown = outcomes.iter().filter(|o| matches!(o, Err(NotAdded::Unknown(_)))).count();
    let untouched = outcomes.iter().filter(|o| matches!(o, Err(NotAdded::Unavailable(_)))).count();
    assert_eq!(added + unknown + untouched, 20_000);
    assert!(added > 0 && unknown > 0 && untouched > 0, "{added} {unknown} {untouched}");
    // What the server had received before the cut it does in one go, before it looks at this connection.
    let amounts: Vec<i64> = corner.entries().await.iter().map(|fields| fields[3].parse().expect("a number")).collect();
    let entries = amounts.len();
    assert_eq!(corner.counter("a").await, Some(amounts.iter().sum::<i64>().to_string()), "half a pair");
    assert!((added..=added + unknown).contains(&entries), "{added} added, {unknown} unknown, {entries} happened");
}

/// A connection that died unused is noticed without being tried, so it puts nothing in doubt.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_died_idle_is_known_to_be_lost() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let idle = Connection::open(&address(url), "test").await.expect("a server");
    let id = idle.call(Command::new("CLIENT").arg("ID")).await.expect("an answer").as_int().expect("an id");
    corner.call(Command::new("CLIENT").arg("KILL").arg("ID").arg(id)).await;
    let noticed = async {
        while !idle.is_lost() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, noticed).await.expect("the end of the connection is noticed");
    let refused = tokio::time::timeout(LIMIT / 2, idle.call(Command::new("PING"))).await;
    assert!(matches!(refused, Ok(Err(Fault::ValkeyLost(_)))), "a command waits on a dead connection: {refused:?}");
}

/// A primary that becomes a replica keeps its connections, which then lead nowhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_to_a_primary_that_became_a_replica_is_left() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let corner = Corner::new(&server.url()).await;
    let producer = corner.producer(&server.url()).await;
    let connection = async || {
        let clients = corner.call(Command::new("CLIENT").arg("LIST")).await;
        let ours = clients.as_text().expect("text").lines().find(|line| line.contains("name=tidegate-produce"));
        ours.and_then(|line| line.split(' ').next()).map(str::to_owned)
    };
    let first = connection().await.expect("connected");
    corner.call(Command::new("REPLICAOF").arg("127.0.0.1").arg(1)).await;
    let refused = producer.add(&corner.id("a"), 1).await.expect_err("a replica");
    assert!(refused.happened_not() && refused.to_string().contains("READONLY"), "{refused}");
    corner.call(Command::new("REPLICAOF").arg("NO").arg("ONE")).await;
    producer.add(&corner.id("a"), 1).await.expect("a primary again");
    eventually("the first connection is left", true, async || connection().await.is_some_and(|now| now != first)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_lines_become_both_increment_and_entry() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let (a, b) = (corner.id("a"), corner.id("b"));
    let lines = format!("{a}\n{b} 5\r\n\n  {a}\t-3  \n{b} 10");
    assert_eq!(corner.produce(url, lines.as_bytes()).await, Exit::Ok);
    assert_eq!((corner.counter("a").await.as_deref(), corner.counter("b").await.as_deref()), (Some("-2"), Some("15")));
    let seen: Vec<String> = corner.entries().await.into_iter().map(|entry| entry[3].clone()).collect();
    assert_eq!(seen, ["1", "5", "-3", "10"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_and_refused_lines_are_passed_over_and_told_by_the_exit_code() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    corner.call(Command::new("RPUSH").arg(names::counter(&corner.id("list"))).arg("x")).await;
    let (a, list) = (corner.id("a"), corner.id("list"));
    let lines =
        [format!("{a} x\n{a} 1 2\n{a} 1\n").as_bytes(), b"\xff\n", format!("{list}\n{a}\n").as_bytes()].concat();
    assert_eq!(corner.produce(url, &lines).await, Exit::BadInput);
    assert_eq!((corner.counter("a").await.as_deref(), corner.entries().await.len()), (Some("2"), 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_refuses_ends_the_verb() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    corner.set(&corner.pipeline.stream, "no stream").await;
    assert_eq!(corner.produce(url, corner.id("a").as_bytes()).await, Exit::Config);
    assert_eq!(corner.counter("a").await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_cut_under_the_verb_ends_it_and_doubles_nothing() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    let proxy = Proxy::start(server.port()).await;
    let line = format!("{}\n", corner.id("a"));
    let lines = format!("{}{} 7777777\n{}", line.repeat(50_000), corner.id("b"), line.repeat(50_000));
    let lost = proxy.trap(Way::ToServer, b"7777777", Then::LoseReply);
    assert_eq!(corner.produce(&proxy.url(), lines.as_bytes()).await, Exit::Retry);
    lost.await.expect("sprung");
    let entries = corner.entries().await;
    let of_a = entries.iter().filter(|fields| fields[1].ends_with(":a")).count();
    assert_eq!(corner.counter("a").await, Some(of_a.to_string()));
    assert!(entries.len() < 100_000, "it went on after the cut");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_out_of_reach_ends_with_69_and_a_missing_file_with_66() {
    let server = Valkey::start(&[]).await.expect("Valkey starts");
    let url = &server.url();
    let corner = Corner::new(url).await;
    assert_eq!(corner.produce("valkey://127.0.0.1:1", b"a\n").await, Exit::Unavailable);
    let args = ops::produce::Opts { files: vec!["no/such/file".into()], ..Default::default() };
    assert_eq!(ops::produce::produce(args, address(url), corner.pipeline.clone()).await, Exit::NoInput);
}

/// As a user types it: lines through a pipe, and from there into PostgreSQL.
#[tokio::test(flavor = "multi_thread")]
async fn lines_through_a_pipe_land_and_bad_ones_are_told_by_number() {
    let lab = Lab::new().await;
    let mut command = lab.program(&["produce"]);
    command.stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = command.spawn().expect("it runs");
    let lines: String = (0..1_000).map(|n| format!("/page/{}\n", n % 7)).collect();
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all((lines + "a 5\n\n  b -2  \nc x\n\x1b[2J 1 2\n").as_bytes()).await.expect("taken");
    drop(stdin);
    let output = within_limit("the end", child.wait_with_output()).await.expect("it ran");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(65), "{stderr}");
    assert!(stderr.contains("1004") && stderr.contains("1005") && !stderr.contains('\x1b'), "{stderr}");
    lab.settle_everything().await;
    assert_eq!(lab.number("select sum(value)::bigint from public.counters").await, 1_003);
    assert_eq!((lab.value("a").await, lab.value("b").await), (Some(5), Some(-2)));
}
