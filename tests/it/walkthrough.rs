//! docs/outage.md, executed: its faults are made on real servers, and its commands are run and print what it says.

use std::time::{Duration, Instant};

use tidegate::model::pipeline::Identifier;
use tidegate::ops::sandbox::Postgres;
use tokio_util::sync::CancellationToken;

use crate::harness::{Client, Lab, STREAM, migrate, output};

const DOCUMENT: &str = include_str!("../../docs/outage.md");
/// How many counters the producer adds to.
const COUNTERS: u64 = 20;

/// How many lines a daemon may say before the walk begins.
const AT_THE_START: usize = 10;

/// A step of the walk.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Fault(String),
    Run { command: String, exit: i32, says: Vec<String> },
}

fn steps(document: &str) -> Vec<Step> {
    let (mut steps, mut in_console) = (Vec::new(), false);
    for line in document.lines() {
        if let Some(fault) = line.strip_prefix("<!-- fault: ") {
            steps.push(Step::Fault(fault.trim_end_matches(" -->").to_owned()));
        } else if line.starts_with("```") {
            in_console = line == "```console";
        } else if let Some(command) = line.strip_prefix("$ tidegate ").filter(|_| in_console) {
            let (command, exit) = command.rsplit_once("# exit ").expect("a command says how it ends");
            let (command, exit) = (command.trim().to_owned(), exit.parse().expect("a number"));
            steps.push(Step::Run { command, exit, says: Vec::new() });
        } else if in_console {
            let Some(Step::Run { says, .. }) = steps.last_mut() else { panic!("{line}: output of no command") };
            says.push(line.to_owned());
        }
    }
    steps
}

/// The words of a command line; quotes keep some together.
fn words(command: &str) -> Vec<String> {
    command
        .split('"')
        .enumerate()
        .flat_map(
            |(n, part)| {
                if n % 2 == 1 { vec![part.to_owned()] } else { part.split_whitespace().map(str::to_owned).collect() }
            },
        )
        .collect()
}

/// Whether a line of the output has these pieces, in their order.
fn has_line(output: &str, expected: &str) -> bool {
    output.lines().any(|line| {
        let mut rest = line;
        expected.split('…').map(str::trim).all(|piece| match rest.find(piece) {
            Some(at) => {
                rest = &rest[at + piece.len()..];
                true
            }
            None => false,
        })
    })
}

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
    let mut lab = Lab::new().await;
    let mut postgres = Postgres::start(&[]).await.expect("PostgreSQL starts");
    postgres.create_database(&Identifier::parse("walk").expect("a name"), None).await.expect("created");
    lab.database = postgres.url("walk");
    migrate(&lab.database).await;
    let mut daemons = [lab.daemon(), lab.daemon()];
    for daemon in &mut daemons {
        daemon.wait_for("running").await;
    }
    let stop = CancellationToken::new();
    let producer = tokio::spawn(produce(lab.valkey.port(), stop.clone()));
    lab.await_value("k19", 1).await;
    let began = Instant::now();
    for step in steps(DOCUMENT) {
        match step {
            Step::Fault(fault) => {
                eprintln!("{fault}");
                match fault.as_str() {
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
                        crate::harness::eventually("the letter", 1, letters).await;
                    }
                    "somebody adds a constraint that no row can meet" => {
                        lab.execute(
                            "alter table public.counters add constraint impossible check (value < 0) not valid",
                        )
                        .await;
                        daemons[1].wait_for("flushing is halted").await;
                        // It says so at its next look.
                        crate::harness::eventually("status", true, async || {
                            output(&mut lab.program(&["status"])).await.1.contains("halted for")
                        })
                        .await;
                    }
                    "the constraint is dropped" => {
                        lab.execute("alter table public.counters drop constraint impossible").await;
                    }
                    other => panic!("nobody knows how to make this fault: {other}"),
                }
            }
            Step::Run { command, exit, says } => {
                let words = words(&command);
                let arguments: Vec<&str> = words.iter().map(String::as_str).collect();
                let (code, stdout, stderr) = output(&mut lab.program(&arguments)).await;
                assert_eq!(code, exit, "tidegate {command}: {stdout}{stderr}");
                for line in says {
                    assert!(has_line(&stdout, &line), "tidegate {command} does not print {line:?}: {stdout}{stderr}");
                }
            }
        }
    }
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

#[test]
fn a_walk_is_read_as_it_is_meant() {
    let document = "text\n<!-- fault: x stops -->\n```console\n$ tidegate dead list --because \"a b\"   # exit 4\none … three\n```\n";
    let run = Step::Run { command: "dead list --because \"a b\"".into(), exit: 4, says: vec!["one … three".into()] };
    assert_eq!(steps(document), [Step::Fault("x stops".into()), run]);
    assert_eq!(words("dead list --because \"a b\""), ["dead", "list", "--because", "a b"]);
    assert!(has_line("zero\none two three", "one … three") && !has_line("one\nthree", "one … three"));
}
