//! docs/outage.md, executed: its faults are made on real servers, and its commands are run and print what it says.

use std::time::{Duration, Instant};

use tidegate::ops::sandbox::Postgres;
use tokio_util::sync::CancellationToken;

use crate::harness::{Client, Lab, STREAM, eventually, output};
use crate::reader::Reader;

const DOCUMENT: &str = include_str!("../../docs/outage.md");
/// How many counters the producer adds to.
const COUNTERS: u64 = 20;

/// How many lines a daemon may say before the walk begins.
const AT_THE_START: usize = 10;

/// Adds to counters as an application does, until it is told to stop.
async fn produce(port: u16, stop: CancellationToken) {
    let (mut client, mut n) = (Client::connect(port).await, 0u64);
    let mut tick = tokio::time::interval(Duration::from_millis(20));
    while !stop.is_cancelled() {
        tick.tick().await;
        let (id, counter) = (format!("k{}", n % COUNTERS), format!("counter:k{}", n % COUNTERS));
        let commands: [Vec<&str>; 4] = [
            vec!["MULTI"],
            vec!["INCRBY", &counter, "1"],
            vec!["XADD", STREAM, "*", "id", &id, "amount", "1"],
            vec!["EXEC"],
        ];
        client.pipeline(&commands).await;
        n += 1;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_outage_of_the_document_is_found_explained_and_repaired_with_its_commands_alone() {
    let mut postgres = Postgres::start(&[]).await.expect("PostgreSQL starts");
    let lab = Lab::on(&postgres, "walk").await;
    let mut daemons = [lab.daemon(), lab.daemon()];
    for daemon in &mut daemons {
        daemon.wait_for("running").await;
    }
    let stop = CancellationToken::new();
    let producer = tokio::spawn(produce(lab.valkey.port(), stop.clone()));
    lab.await_value("k19", 1).await;
    let began = Instant::now();
    let like = lab.program(&[]);
    let mut reader = Reader::told(lab, &like).await;
    let make = async |lab: &mut Lab, fault: &str| {
        eprintln!("{fault}");
        match fault {
            "postgresql stops" => {
                postgres.stop();
                for daemon in &mut daemons {
                    daemon.wait_for("flushing is interrupted").await;
                }
            }
            "postgresql comes back" => postgres.restart().await.expect("PostgreSQL comes back"),
            "one of two daemons is killed" => daemons[0].kill().await,
            "a producer adds an entry whose amount is 1.5" => {
                let add = ["XADD", STREAM, "*", "id", "broken", "amount", "1.5"];
                lab.client().await.call(&add).await;
                let letters = async || lab.number("select count(*) from tidegate.dead_letters").await;
                eventually("the letter", 1, letters).await;
            }
            "somebody adds a constraint that no row can meet" => {
                lab.execute("alter table public.counters add constraint impossible check (value < 0) not valid").await;
                daemons[1].wait_for("flushing is halted").await;
                // It says so at its next look.
                let status = async || output(&mut lab.program(&["status"])).await.1.contains("halted for");
                eventually("status", true, status).await;
            }
            "the constraint is dropped" => {
                lab.execute("alter table public.counters drop constraint impossible").await;
            }
            other => panic!("nobody knows how to make this fault: {other}"),
        }
    };
    let walked = reader.follow(DOCUMENT, |_| false, make).await;
    walked.unwrap_or_else(|why| panic!("docs/outage.md, {why}"));
    let lab = &reader.lab;
    stop.cancel();
    producer.await.expect("it produced");
    // Told calmly: each incident once, by each daemon that met it, however often it was tried.
    for daemon in &mut daemons {
        assert!(daemon.count("flushing is interrupted") <= 1 + began.elapsed().as_secs() as usize / 30);
        assert!(daemon.count("flushing is halted") <= 1, "{}", daemon.last_lines());
        // And at a rate that a person can follow: a line a second at the default level, beside those of the start.
        let mut lines = daemon.all_lines();
        lines.retain(|line| !line.contains("\"level\":\"DEBUG\""));
        let seconds = began.elapsed().as_secs() as usize;
        assert!(lines.len() <= seconds + AT_THE_START, "{} lines in {seconds} s:\n{}", lines.len(), lines.join("\n"));
    }
    let (code, stdout, stderr) = output(&mut lab.program(&["wait"])).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert_eq!(output(&mut lab.program(&["audit", "--full"])).await.0, 0);
}
