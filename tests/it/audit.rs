//! `tidegate audit`: no false drift while producers run, every real one found, and set right.

use std::time::Duration;

use serde_json::Value;

use crate::contract::document;
use crate::harness::{Client, Daemon, GROUP, Lab, STREAM, eventually, output};

async fn audit(lab: &Lab, arguments: &[&str]) -> (i32, Value) {
    document(lab, "audit", &[&["audit"], arguments].concat()).await
}

fn keys(audit: &Value) -> Vec<String> {
    let mut keys: Vec<String> = audit["differences"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|d| format!("{} {} {}", d["key"], d["class"], d["difference"]).replace('"', ""))
        .collect();
    keys.sort();
    keys
}

/// Adds in one step, as a producer should.
async fn add(client: &mut Client, id: &str, amount: &str) {
    let counter = format!("counter:{id}");
    let commands: [Vec<&str>; 4] = [
        vec!["MULTI"],
        vec!["INCRBY", &counter, amount],
        vec!["XADD", STREAM, "*", "id", id, "amount", amount],
        vec!["EXEC"],
    ];
    client.pipeline(&commands).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_the_way_is_no_drift() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    add(&mut client, "flushed", "5").await;
    lab.settle_everything().await;
    for (id, amount) in [("flushed", "2"), ("fresh", "7"), ("back", "-3")] {
        add(&mut client, id, amount).await;
    }
    // One of them is read by somebody and not settled.
    client.call(&["XREADGROUP", "GROUP", GROUP, "somebody", "COUNT", "1", "STREAMS", STREAM, ">"]).await;
    let (code, found) = audit(&lab, &["--full"]).await;
    assert_eq!((code, &found["counters"], &found["pending"]), (0, &3.into(), &3.into()), "{found}");
    lab.settle_everything().await;
    let (code, found) = audit(&lab, &["--full"]).await;
    assert_eq!((code, &found["equal"]), (0, &3.into()), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_explain_what_they_hold_back() {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters add constraint small check (value < 100)").await;
    let mut client = lab.client().await;
    add(&mut client, "a", "5").await;
    add(&mut client, "a", "500").await;
    add(&mut client, "b", "1").await;
    client.call(&["XADD", STREAM, "*", "id", "b", "amount", "1.5"]).await;
    lab.settle_everything().await;
    let (code, found) = audit(&lab, &["--full"]).await;
    assert_eq!((code, &found["dead_letters"], &found["unexplained"]), (3, &1.into(), &1.into()), "{found}");
    assert!(found["differences"][0]["why"].to_string().contains("cannot be read"), "{found}");
    assert_eq!(output(&mut lab.program(&["dead", "discard", "--key", "a", "--yes"])).await.0, 0);
    let (_, found) = audit(&lab, &["--key", "a"]).await;
    assert_eq!(found["dead_letters"], 1, "given up, and counted in Valkey all the same: {found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_counter_is_never_called_drift_and_a_real_one_beside_it_is_found() {
    let lab = Lab::new().await;
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__RUN__WORKERS", "2");
    let _daemon = Daemon::start(command);
    let mut client = lab.client().await;
    add(&mut client, "wrong", "5").await;
    add(&mut client, "low", "5").await;
    lab.await_value("low", 5).await;
    lab.await_value("wrong", 5).await;
    client.call(&["INCRBY", "counter:wrong", "3"]).await;
    client.call(&["DECRBY", "counter:low", "2"]).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let producers: Vec<_> = (0..3)
        .map(|n| {
            let (stop, port) = (stop.clone(), lab.valkey.port());
            tokio::spawn(async move {
                let (mut client, mut added) = (Client::connect(port).await, 0u64);
                // Busy, and no more: the others need the processor, too.
                let mut tick = tokio::time::interval(Duration::from_millis(1));
                while !stop.is_cancelled() {
                    for key in 0..10 {
                        tick.tick().await;
                        let id = format!("k{}", (key + n) % 10);
                        // One of them adds the counter first, and the entry a moment later.
                        if n == 0 {
                            client.call(&["INCRBY", &format!("counter:{id}"), "1"]).await;
                            client.call(&["XADD", STREAM, "*", "id", &id, "amount", "1"]).await;
                        } else {
                            add(&mut client, &id, "1").await;
                        }
                        added += 1;
                    }
                }
                added
            })
        })
        .collect();
    let rows = async || lab.number("select count(*) from public.counters").await;
    eventually("every counter has a row", 12, rows).await;
    for _ in 0..5 {
        let (code, found) = audit(&lab, &["--full"]).await;
        assert_eq!((code, keys(&found)), (3, vec!["low pg_ahead -2".into(), "wrong valkey_ahead 3".into()]), "{found}");
        assert_eq!(found["counters"], 12, "{found}");
    }
    // And is set right while they run.
    let (code, found) = audit(&lab, &["--full", "--repair", "--dry-run"]).await;
    assert_eq!((code, &found["repaired"]), (3, &0.into()), "{found}");
    let (code, found) = audit(&lab, &["--full", "--repair", "--yes"]).await;
    assert_eq!((code, &found["repaired"]), (0, &2.into()), "{found}");
    let (code, found) = audit(&lab, &["--full"]).await;
    assert_eq!(code, 0, "{found}");
    stop.cancel();
    let mut added = 0;
    for producer in producers {
        added += producer.await.expect("it added");
    }
    let landed =
        async || lab.number("select coalesce(sum(value), 0)::bigint from public.counters where id like 'k%'").await;
    eventually("everything", added as i64, landed).await;
    assert_eq!(client.call(&["GET", "counter:wrong"]).await.text(), "5");
    assert_eq!(client.call(&["GET", "counter:low"]).await.text(), "5");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_one_side_has_is_found_and_repair_adds_and_never_sets() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    for id in ["evicted", "kept", "restored"] {
        add(&mut client, id, "9").await;
    }
    lab.settle_everything().await;
    client.call(&["DEL", "counter:evicted"]).await;
    lab.execute("delete from public.counters where id = 'restored'").await;
    client.call(&["SET", "counter:text", "hello"]).await;
    client.call(&["LPUSH", "counter:list", "1"]).await;
    let (code, found) = audit(&lab, &["--full"]).await;
    let expected = ["evicted pg_ahead -9", "list unexplained 0", "restored valkey_ahead 9", "text unexplained 0"];
    assert_eq!((code, keys(&found)), (3, expected.map(str::to_owned).to_vec()), "{found}");
    let (code, _, stderr) = output(&mut lab.program(&["audit", "--full", "--repair"])).await;
    assert_eq!(code, 2, "nobody was asked: {stderr}");
    let (code, found) = audit(&lab, &["--key", "evicted", "--repair", "--yes"]).await;
    assert_eq!((code, &found["repaired"]), (0, &1.into()), "{found}");
    assert_eq!(client.call(&["GET", "counter:evicted"]).await.text(), "9");
    // Two at once add what one should.
    client.call(&["INCRBY", "counter:kept", "100"]).await;
    let start = || async { output(&mut lab.program(&["audit", "--key", "kept", "--repair", "--yes"])).await.0 };
    let codes = tokio::join!(start(), start(), start());
    assert!([codes.0, codes.1, codes.2].iter().all(|code| [0, 75].contains(code)), "{codes:?}");
    assert_eq!(client.call(&["GET", "counter:kept"]).await.text(), "9");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restore_the_audit_shows_what_a_replay_will_bring_back() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    for n in 0..6 {
        add(&mut client, &format!("k{}", n % 2), "1").await;
    }
    lab.settle_everything().await;
    // PostgreSQL went back in time: rows and ledger are of before.
    lab.execute("delete from public.counters; delete from tidegate.ledger").await;
    let (code, found) = audit(&lab, &[]).await;
    assert_eq!((code, keys(&found)), (3, vec!["k0 valkey_ahead 3".into(), "k1 valkey_ahead 3".into()]), "{found}");
    assert!(found["differences"][0]["why"].to_string().contains("replay"), "{found}");
    assert_eq!(output(&mut lab.program(&["replay", "--since", "1h", "--yes"])).await.0, 0);
    lab.settle_everything().await;
    assert_eq!(audit(&lab, &["--full"]).await.0, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_valkey_came_back_with_an_older_copy_the_audit_judges_at_once() {
    let mut lab = Lab::new().await;
    let mut client = lab.client().await;
    add(&mut client, "a", "5").await;
    add(&mut client, "b", "1").await;
    lab.settle_everything().await;
    client.call(&["SAVE"]).await;
    add(&mut client, "a", "20").await;
    add(&mut client, "c", "7").await;
    lab.settle_everything().await;
    let (code, found) = audit(&lab, &["--full"]).await;
    assert_eq!((code, &found["equal"], &found["gone"]), (0, &3.into(), &0.into()), "{found}");
    lab.valkey.kill();
    lab.valkey.restart().await.expect("Valkey comes back");
    // Nothing was added since, and no daemon has been here.
    let lost = vec!["a pg_ahead -20".to_owned(), "c pg_ahead -7".into()];
    let (code, found) = audit(&lab, &["--full"]).await;
    assert_eq!((code, keys(&found), &found["gone"]), (3, lost.clone(), &2.into()), "{found}");
    assert!(found["differences"][0]["why"].to_string().contains("Valkey lost increments"), "{found}");
    // The daemon raises the stream's last id to the ledger's.
    lab.settle_everything().await;
    let (code, found) = audit(&lab, &["--full"]).await;
    assert_eq!((code, keys(&found), &found["gone"]), (3, lost, &2.into()), "{found}");
    let (code, found) = audit(&lab, &["--full", "--repair", "--yes"]).await;
    assert_eq!((code, &found["repaired"]), (0, &2.into()), "{found}");
    assert_eq!(lab.client().await.call(&["GET", "counter:a"]).await.text(), "25");
    // And with no group, and no stream.
    lab.client().await.call(&["FLUSHALL"]).await;
    let (code, found) = audit(&lab, &["--full"]).await;
    assert_eq!((code, &found["pg_ahead"], &found["gone"]), (3, &3.into(), &4.into()), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_entries_leave_the_stream_nothing_is_said_of_those_that_are_gone() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    for n in 0..10 {
        add(&mut client, &format!("k{}", n % 5), "1").await;
    }
    lab.settle_everything().await;
    // The group stands at the start again, as behind a replay, and the ledger has everything.
    client.call(&["XGROUP", "SETID", STREAM, GROUP, "0"]).await;
    let first = client.call(&["XRANGE", STREAM, "-", "+", "COUNT", "1"]).await.array().remove(0).array().remove(0);
    client.call(&["XDEL", STREAM, &first.text()]).await;
    let stop = tokio_util::sync::CancellationToken::new();
    // Two, so that whenever it looks something has gone.
    let deleter = || {
        let (stop, port) = (stop.clone(), lab.valkey.port());
        tokio::spawn(async move {
            let mut client = Client::connect(port).await;
            let mut tick = tokio::time::interval(Duration::from_millis(1));
            while !stop.is_cancelled() {
                tick.tick().await;
                let id = client.call(&["XADD", STREAM, "*", "id", "other", "amount", "0"]).await.text();
                client.call(&["XDEL", STREAM, &id]).await;
            }
        })
    };
    let deleters = [deleter(), deleter()];
    let (code, stdout, stderr) = output(&mut lab.unhurried(lab.program(&["audit", "--full"]))).await;
    stop.cancel();
    for deleter in deleters {
        deleter.await.expect("it deleted");
    }
    assert_eq!((code, stdout.as_str()), (75, ""), "{stderr}");
    assert!(stderr.contains("1 entries of flush:counters were trimmed or deleted while they were read"), "{stderr}");
    // At rest it is judged: what left the stream is in the counters.
    let (code, found) = audit(&lab, &["--full"]).await;
    assert_eq!(
        (code, &found["pending"], &found["equal"], &found["gone"]),
        (0, &0.into(), &5.into(), &1.into()),
        "{found}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_whose_keys_have_several_spellings_is_judged_by_its_rows() {
    let lab = Lab::new().await;
    lab.execute("alter table public.counters alter column id type uuid using id::uuid").await;
    let mut client = lab.client().await;
    let lower = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    add(&mut client, lower, "2").await;
    add(&mut client, &lower.to_uppercase(), "3").await;
    lab.settle_everything().await;
    client.call(&["INCRBY", "counter:no-uuid", "1"]).await;
    let (code, found) = audit(&lab, &["--full"]).await;
    // Each spelling is a counter of its own in Valkey; asked for one by one, they are told by the row they share.
    assert_eq!(code, 3, "{found}");
    let (code, found) = audit(&lab, &["--key", lower, "--key", &lower.to_uppercase()]).await;
    assert_eq!((code, &found["counters"], &found["equal"]), (0, &1.into(), &1.into()), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_to_the_end_is_not_judged() {
    let lab = Lab::new().await;
    add(&mut lab.client().await, "a", "1").await;
    lab.settle_everything().await;
    let nobody = crate::harness::free_port();
    let mut command = lab.program(&["audit", "--full"]);
    let (code, stdout, stderr) = output(command.env("VALKEY_URL", format!("valkey://127.0.0.1:{nobody}"))).await;
    assert_eq!((code, stdout.as_str()), (69, ""), "{stderr}");
    let mut command = lab.program(&["audit", "--full"]);
    command.env("DATABASE_URL", format!("postgres://postgres@127.0.0.1:{nobody}/none"));
    let (code, stdout, stderr) = output(&mut command).await;
    assert_eq!((code, stdout.as_str()), (69, ""), "{stderr}");
}
