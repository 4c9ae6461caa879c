//! A pipeline with several streams: which key goes where, and what happens when their number changes.

use std::io::Write;
use std::time::Duration;

use tidegate::model::shard::shard_of;
use tokio::process::Command;

use crate::distance::Distance;
use crate::harness::{Daemon, Lab, Resp, eventually, output, within_limit};
use crate::proxy::{Proxy, Then, Way};

const DOCUMENT: &str = include_str!("../../docs/sharding.md");
const VECTORS: &str = include_str!("../../docs/shards.tsv");

/// The program with so many shards.
fn program(lab: &Lab, shards: u16, arguments: &[&str]) -> Command {
    let mut command = lab.program(arguments);
    command.env("TIDEGATE__PIPELINES__COUNTERS__SHARDS", shards.to_string());
    command
}

async fn settle(lab: &Lab, shards: u16) {
    let mut daemon = Daemon::start(program(lab, shards, &["run", "--until-empty"]));
    assert!(daemon.exit().await.success(), "{}", daemon.last_lines());
}

/// Adds one to each of these counters, as a producer with so many shards.
async fn produce(lab: &Lab, shards: u16, counters: std::ops::Range<u32>) {
    let mut lines = tempfile::NamedTempFile::new().expect("a file");
    counters.for_each(|n| writeln!(lines, "c{n} 1").expect("written"));
    let path = lines.path().to_str().expect("text").to_owned();
    let (code, _, stderr) = output(&mut program(lab, shards, &["produce", &path])).await;
    assert_eq!(code, 0, "{stderr}");
}

/// How many entries a stream holds.
async fn length(lab: &Lab, stream: &str) -> i64 {
    lab.client().await.call(&["XLEN", stream]).await.int().expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn each_key_has_its_shard_and_its_counter_lies_beside_the_stream() {
    let lab = Lab::new().await;
    produce(&lab, 4, 0..400).await;
    let mut total = 0;
    for shard in 0..4 {
        let stream = format!("flush:counters:{{{shard}}}");
        let entries = lab.client().await.call(&["XRANGE", &stream, "-", "+"]).await.array();
        assert!(entries.len() > 50, "{} of 400 keys are in shard {shard}", entries.len());
        total += entries.len();
        for entry in entries {
            let id = entry.array()[1].clone().array()[1].text();
            assert_eq!(shard_of(&id, 4), shard, "{id}");
            let counter = format!("counter:{{{shard}}}:{id}");
            assert_eq!(lab.client().await.call(&["GET", &counter]).await, Resp::Text(b"1".to_vec()), "{counter}");
        }
    }
    assert_eq!((total, length(&lab, "flush:counters").await), (400, 0));
    settle(&lab, 4).await;
    let exact = "select count(*) from public.counters where value = 1";
    assert_eq!((lab.number(exact).await, lab.in_ledger().await), (400, 400));
    assert_eq!(lab.number("select count(*) from tidegate.lanes").await, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_shards_changes_and_what_the_old_streams_hold_lands() {
    let lab = Lab::new().await;
    // One stream, then four, then two; producers are late each time, and early.
    settle_and_leave(&lab, 1, &[1, 4]).await;
    settle_and_leave(&lab, 4, &[1, 4, 2]).await;
    settle_and_leave(&lab, 2, &[4, 1, 2]).await;
    settle(&lab, 2).await;
    let exact = "select count(*) from public.counters where value = 8";
    assert_eq!((lab.number(exact).await, lab.in_ledger().await), (100, 800));
    for stream in ["flush:counters", "flush:counters:{0}", "flush:counters:{3}"] {
        let mut client = lab.client().await;
        let Resp::Array(pending) = client.call(&["XPENDING", stream, "tidegate:counters"]).await else {
            panic!("no group")
        };
        assert_eq!(pending[0], Resp::Int(0), "{stream}");
    }
}

/// A daemon with so many shards is there for a while; producers with these numbers add while it is, and behind it.
async fn settle_and_leave(lab: &Lab, shards: u16, producers: &[u16]) {
    let mut daemon = Daemon::start(program(lab, shards, &["run"]));
    daemon.wait_for("running").await;
    for producer in producers {
        produce(lab, *producer, 0..100).await;
    }
    daemon.signal(rustix::process::Signal::TERM);
    assert!(daemon.exit().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_is_about_every_shard() {
    let lab = Lab::new().await;
    produce(&lab, 3, 0..300).await;
    settle(&lab, 3).await;
    lab.execute("delete from tidegate.ledger; delete from public.counters").await;
    // Also about one that the pipeline has no more, and whose stream still holds what was lost.
    let (code, stdout, stderr) = output(&mut program(&lab, 2, &["replay", "--since", "1h", "--yes"])).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert_eq!(stdout.matches("rewound").count(), 3, "{stdout}");
    settle(&lab, 2).await;
    let exact = "select count(*) from public.counters where value = 1";
    assert_eq!((lab.number(exact).await, lab.in_ledger().await), (300, 300));
}

/// The block of the document in this language.
fn block(language: &str) -> &'static str {
    let (_, rest) = DOCUMENT.split_once(&format!("```{language}\n")).expect("a block");
    rest.split("```").next().expect("its end")
}

/// Keys, and their shards of 2, 4, 16 and 1000.
fn vectors() -> impl Iterator<Item = (&'static str, [(&'static str, &'static str); 4])> {
    VECTORS.lines().skip(1).map(|line| {
        let fields: Vec<&str> = line.split('\t').collect();
        (fields[0], [("2", fields[2]), ("4", fields[3]), ("16", fields[4]), ("1000", fields[5])])
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_function_in_lua_gives_the_shards_of_the_vectors() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let script = format!("{}\nreturn tostring(shard_of(ARGV[1], tonumber(ARGV[2])))", block("lua"));
    for (key, shards) in vectors() {
        for (of, shard) in shards {
            let found = client.call(&["EVAL", &script, "0", key, of]).await;
            assert_eq!(found, Resp::Text(shard.into()), "{key:?} of {of}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_function_in_python_gives_the_shards_of_the_vectors() {
    let mut program = format!("{}\nimport sys\n", block("python"));
    for (key, shards) in vectors() {
        for (of, shard) in shards {
            program += &format!("assert shard_of({key:?}, {of}) == {shard}, ({key:?}, {of})\n");
        }
    }
    program += "print('all')\n";
    // Where there is no Python there is nobody whom its line would help.
    let Ok(output) = Command::new("python3").args(["-c", &program]).output().await else { return };
    assert_eq!(String::from_utf8_lossy(&output.stdout), "all\n", "{}", String::from_utf8_lossy(&output.stderr));
}

/// How many shards each of these daemons reads, by the tokens of the leases.
async fn shares(lab: &Lab, shards: u16, daemons: &[&Daemon]) -> Vec<usize> {
    let mut client = lab.client().await;
    let mut holders = Vec::new();
    for shard in 0..shards {
        let lease = format!("tidegate:lease:{{{shard}}}:flush:counters:{{{shard}}}:counters");
        holders.push(match client.call(&["GET", &lease]).await {
            Resp::Text(token) => String::from_utf8(token).expect("text"),
            _ => String::new(),
        });
    }
    let of = |daemon: &&Daemon| holders.iter().filter(|token| token.contains(&format!("-{}-", daemon.pid()))).count();
    daemons.iter().map(of).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_process_reads_its_share_of_the_shards_and_shares_change_as_processes_come_and_go() {
    let lab = Lab::new().await;
    let start = || {
        let mut command = program(&lab, 4, &["run"]);
        command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", "exclusive");
        Daemon::start(command)
    };
    let first = start();
    eventually("alone it reads all", vec![4], async || shares(&lab, 4, &[&first]).await).await;
    produce(&lab, 4, 0..200).await;
    let mut second = start();
    produce(&lab, 4, 0..200).await;
    eventually("each reads its share", vec![2, 2], async || shares(&lab, 4, &[&first, &second]).await).await;
    produce(&lab, 4, 0..200).await;
    second.kill().await;
    produce(&lab, 4, 0..200).await;
    eventually("what the dead one had", vec![4], async || shares(&lab, 4, &[&first]).await).await;
    let mut third = start();
    eventually("once more", vec![2, 2], async || shares(&lab, 4, &[&first, &third]).await).await;
    produce(&lab, 4, 0..200).await;
    third.signal(rustix::process::Signal::TERM);
    assert!(third.exit().await.success());
    eventually("what was handed over", vec![4], async || shares(&lab, 4, &[&first]).await).await;
    produce(&lab, 4, 0..200).await;
    let exact = "select count(*) from public.counters where value = 6";
    eventually("all of it", 200, async || lab.number(exact).await).await;
    assert_eq!(lab.in_ledger().await, 1_200);
}

/// Everything that is added to four shards lands, after this has happened to them.
async fn all_shards_are_read(lab: &Lab) {
    let before = lab.in_ledger().await;
    produce(lab, 4, 0..200).await;
    eventually("all of it", before + 200, async || lab.in_ledger().await).await;
}

/// How many connections the lab's workers have to Valkey.
async fn connections(lab: &Lab) -> usize {
    let list = lab.client().await.call(&["CLIENT", "LIST"]).await.text();
    list.lines().filter(|line| line.contains(":counters:")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_would_take_the_connections_of_everybody_else_are_refused() {
    let lab = Lab::new().await;
    let of_groups = || {
        let mut command = program(&lab, 20, &["run"]);
        command.env("TIDEGATE__RUN__WORKERS", "2").env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", "group");
        command
    };
    let mut client = lab.client().await;
    client.call(&["CONFIG", "SET", "maxclients", "150"]).await;
    let (code, _, stderr) = output(&mut of_groups()).await;
    assert_eq!(code, 78, "{stderr}");
    assert!(
        stderr.contains("20 streams") && stderr.contains("take 80 connections") && stderr.contains("(maxclients)"),
        "{stderr}"
    );
    client.call(&["CONFIG", "SET", "maxclients", "160"]).await;
    let mut daemon = Daemon::start(of_groups());
    daemon.wait_for_event("running", |_| true).await;
    eventually("each worker has two connections", 80, async || connections(&lab).await).await;
    // Read together they take a handful, however many they are.
    client.call(&["CONFIG", "SET", "maxclients", "100"]).await;
    drop(daemon);
    let mut together = of_groups();
    together.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", "exclusive");
    let mut daemon = Daemon::start(together);
    daemon.wait_for_event("running", |_| true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_process_should_take_and_does_not_is_read_all_the_same() {
    let lab = Lab::new().await;
    // Somebody who would read, and never does.
    for shard in 0..4 {
        let readers = format!("tidegate:lease:{{{shard}}}:flush:counters:{{{shard}}}:counters:readers");
        lab.client().await.call(&["ZADD", &readers, "99999999999999", "a ghost"]).await;
    }
    let mut command = program(&lab, 4, &["run"]);
    command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", "exclusive");
    let daemon = Daemon::start(command);
    all_shards_are_read(&lab).await;
    eventually("it keeps them", vec![4], async || shares(&lab, 4, &[&daemon]).await).await;
    all_shards_are_read(&lab).await;
}

/// A look at the other streams takes longer than the time from one to the next: what is known to be there is read all the same.
#[tokio::test(flavor = "multi_thread")]
async fn far_from_the_server_what_one_shard_has_is_read_though_the_others_have_nothing() {
    let lab = Lab::new().await;
    let id = (0..).map(|n| format!("c{n}")).find(|id| shard_of(id, 4) == 2).expect("a key of the shard");
    let add = ["XADD", "flush:counters:{2}", "*", "id", &id, "amount", "1"];
    lab.client().await.pipeline(&vec![add.to_vec(); 2_000]).await;
    let away = Distance::to(lab.valkey.port(), Duration::from_millis(25)).await;
    let mut command = program(&lab, 4, &["run", "--until-empty"]);
    command.env("VALKEY_URL", format!("valkey://127.0.0.1:{}", away.port()));
    command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", "exclusive").env("TIDEGATE__BATCH__READ_COUNT", "10");
    let mut daemon = Daemon::start(command);
    assert!(daemon.exit().await.success(), "{}", daemon.last_lines());
    assert_eq!(lab.value(&id).await, Some(2_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_that_breaks_off_leaves_no_shard_unread() {
    let lab = Lab::new().await;
    let proxy = Proxy::start(lab.valkey.port()).await;
    let exclusive = || {
        let mut command = program(&lab, 4, &["run"]);
        command.env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", "exclusive");
        command
    };
    let first = lab.start_through(exclusive(), Some(proxy.port()), None);
    eventually("alone it reads all", vec![4], async || shares(&lab, 4, &[&first]).await).await;
    // The first lease that is given back never arrives.
    let given_back = proxy.trap(Way::ToServer, b"goes on", Then::Hold);
    let second = Daemon::start(exclusive());
    within_limit("a hand-over", given_back).await.expect("sprung");
    proxy.cut();
    proxy.heal();
    eventually("each reads its share", vec![2, 2], async || shares(&lab, 4, &[&first, &second]).await).await;
    all_shards_are_read(&lab).await;
}
