//! Sentinel, a primary that dies with a tail nobody else has, and two primaries alive at once.

use rustix::process::Signal;
use tidegate::ops::sandbox::Valkey;
use tidegate_lab::sentinel::{SERVICE, Sentinel};

use crate::harness::{Client, Daemon, Lab, Resp, STREAM, eventually, free_port, valkey};
use crate::rights::least;

/// Whether INFO of this server has this line. A sentinel that promotes it cuts whoever asks meanwhile.
async fn info(port: u16, line: &str) -> bool {
    let Ok(mut client) = Client::try_connect(port).await else { return false };
    let Ok(replies) = client.try_pipeline(&[["INFO", "replication"]]).await else { return false };
    replies[0].text().lines().any(|l| l.trim() == line)
}

/// A primary (the lab's), a replica that has all it has, and a sentinel that knows both.
struct Pair {
    lab: Lab,
    replica: Valkey,
    sentinel: Sentinel,
    /// Where a second sentinel will be.
    second: u16,
}

impl Pair {
    async fn new() -> Pair {
        let lab = Lab::new().await;
        let primary = lab.valkey.port();
        let of = primary.to_string();
        let replica = valkey(&["--replicaof", "127.0.0.1", &of, "--repl-diskless-sync-delay", "0"]).await;
        eventually("replicating", true, async || info(replica.port(), "master_link_status:up").await).await;
        let sentinel = Sentinel::watching(primary, free_port(), 1, &[]).await;
        let knows = async || match sentinel.ask(&["SENTINEL", "REPLICAS", SERVICE]).await {
            Resp::Array(replicas) => replicas.len(),
            _ => 0,
        };
        eventually("the sentinel knows the replica", 1, knows).await;
        Pair { lab, replica, sentinel, second: free_port() }
    }

    fn daemon(&self) -> Daemon {
        let (first, second) = (self.sentinel.port, self.second);
        let url = format!("valkey-sentinel://127.0.0.1:{first}?node=127.0.0.1:{second}&sentinelServiceName={SERVICE}");
        let mut command = self.lab.program(&["run"]);
        command.env("VALKEY_URL", least(&url, &["run"]));
        Daemon::start(command)
    }

    /// The replica has all that the primary has.
    async fn in_step(&self) {
        // WAIT is about what its own connection wrote.
        let mut client = self.lab.client().await;
        client.call(&["SET", "in step", "1"]).await;
        let waited = client.call(&["WAIT", "1", "10000"]).await;
        assert_eq!(waited, Resp::Int(1), "replicated");
    }

    /// From now on the replica gets nothing.
    async fn cut(&self) {
        let mut client = self.lab.client().await;
        client.call(&["ACL", "SETUSER", "default", "-psync", "-sync"]).await;
        client.call(&["CLIENT", "KILL", "TYPE", "replica"]).await;
        eventually("cut", true, async || info(self.replica.port(), "master_link_status:down").await).await;
    }

    /// The replica is the primary, and the sentinel has done with it: it closes the connections of clients on its way.
    async fn promoted(&self) {
        eventually("promoted", true, async || info(self.replica.port(), "role:master").await).await;
        let told = async || match self.sentinel.ask(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE]).await {
            Resp::Array(address) => address.get(1).map(Resp::text),
            _ => None,
        };
        eventually("the sentinel tells so", Some(self.replica.port().to_string()), told).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_that_loses_the_tail_doubles_nothing_and_reports_what_was_lost() {
    let mut pair = Pair::new().await;
    let mut daemon = pair.daemon();
    let mut client = pair.lab.client().await;
    client.add_many("a", 100).await;
    pair.lab.await_value("a", 100).await;
    // These the replica has; that they were delivered and acknowledged it never hears.
    daemon.signal(Signal::STOP);
    client.add_many("again", 50).await;
    pair.in_step().await;
    pair.cut().await;
    daemon.signal(Signal::CONT);
    pair.lab.await_value("again", 50).await;
    // These it never has.
    client.add_many("tail", 20).await;
    pair.lab.await_value("tail", 20).await;
    daemon.forget();

    pair.lab.valkey.kill();
    pair.promoted().await;
    let mut client = Client::connect(pair.replica.port()).await;
    client.add_many("a", 10).await;
    pair.lab.await_value("a", 110).await;
    let lost = daemon.wait_for("entries that were flushed are gone from the stream").await;
    assert_eq!(lost["entries"], 20);
    let recognised = async || daemon.sum("redelivered entries were recognised", "entries");
    eventually("recognised", true, {
        let mut recognised = recognised;
        async move || recognised().await >= 50
    })
    .await;
    assert_eq!((pair.lab.value("again").await, pair.lab.value("tail").await), (Some(50), Some(20)));
    assert_eq!(pair.lab.in_ledger().await, 180);
    assert_eq!(pair.lab.number("select sum(lost)::bigint from tidegate.ledger").await, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_primaries_alive_at_once_with_workers_on_both_sides() {
    let mut pair = Pair::new().await;
    let mut old_side = pair.daemon();
    let mut old = pair.lab.client().await;
    old.add_many("a", 10).await;
    pair.lab.await_value("a", 10).await;
    pair.in_step().await;
    pair.cut().await;
    let promoted = async || {
        // Refused while one is under way, or while the replica has not been heard of for a moment.
        pair.sentinel.ask(&["SENTINEL", "FAILOVER", SERVICE]).await;
        info(pair.replica.port(), "role:master").await
    };
    eventually("promoted", true, promoted).await;
    // From here on nobody tells the old primary that it is none any more.
    pair.sentinel = Sentinel::watching(pair.replica.port(), pair.second, 1, &[]).await;
    let mut new_side = pair.daemon();
    new_side.wait_for("running").await;

    // Both sides give the same ids to different increments, as two clocks that agree do.
    let mut new = Client::connect(pair.replica.port()).await;
    let now = old.call(&["TIME"]).await.array()[0].text().parse::<u64>().expect("seconds") * 1000;
    let ids: Vec<String> = (0..300u64).map(|n| format!("{}-{}", now + 2_000 + n / 7, n % 7)).collect();
    // The new side first: its caretaker has yet to look, and would tell the stream to start above what the old side had flushed.
    let mut taken = 10;
    for (side, client) in [("new", &mut new), ("old", &mut old)] {
        let commands: Vec<Vec<String>> = ids
            .iter()
            .enumerate()
            .flat_map(|(n, id)| {
                let op = format!("{side}-{n}");
                let add = ["XADD", STREAM, id, "id", "a", "amount", "1", "op", &op].map(str::to_owned).to_vec();
                [["INCRBY", "counter:a", "1"].map(str::to_owned).to_vec(), add]
            })
            .collect();
        let replies = client.pipeline(&commands).await;
        taken += replies.iter().filter(|reply| matches!(reply, Resp::Text(_))).count() as i64;
    }
    assert!(taken > 10 + 300, "both sides took some");
    pair.lab.await_value("a", taken).await;

    // The old primary goes; its worker moves over.
    pair.lab.valkey.kill();
    old_side.wait_for("reading is interrupted").await;
    old_side.wait_for("reading goes on").await;
    new.add_many("a", 20).await;
    pair.lab.await_value("a", taken + 20).await;
    assert_eq!(pair.lab.in_ledger().await, taken + 20);
    let collided = old_side.count("other content under used ids was applied")
        + new_side.count("other content under used ids was applied");
    assert!(collided > 0, "the same ids were met with other content");
}
