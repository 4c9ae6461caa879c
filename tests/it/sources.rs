//! Daemons that do not agree: on a Valkey's name in the ledger (`valkey.source`), or on the PostgreSQL that its streams are flushed into. They are told before
//! anything counts twice, or half of it elsewhere.

use tidegate::ops::sandbox::Postgres;
use tokio::process::Command;

use crate::accepting::has_reason;
use crate::contract::document;
use crate::harness::{Daemon, GROUP, Lab, STREAM, database, eventually, output, valkey};
use crate::proxy::Proxy;

/// The program, which calls the lab's Valkey so.
fn program(lab: &Lab, source: &str, arguments: &[&str]) -> Command {
    let mut command = lab.program(arguments);
    command.env("TIDEGATE__VALKEY__SOURCE", source);
    command
}

async fn assert_refused(lab: &Lab, source: &str) {
    let (code, _, stderr) = output(&mut program(lab, source, &["run", "--until-empty"])).await;
    assert_eq!(code, 78, "{stderr}");
    assert!(
        stderr.contains("under the name main") && stderr.contains(&format!("valkey.source is {source}")),
        "{stderr}"
    );
    let registered = format!("select count(*) from tidegate.lanes where source = '{source}'");
    assert_eq!(lab.number(&registered).await, 0, "it is not registered either");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_name_for_a_valkey_that_was_flushed_is_refused_and_given_by_the_statement_that_is_told() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    for n in 0..300 {
        client.add(&format!("k{}", n % 7), 1).await;
    }
    lab.settle_everything().await;
    // One is delivered to a worker that dies behind its COMMIT, and comes again; one is not flushed yet.
    client.add("k0", 1).await;
    client.call(&["XREADGROUP", "GROUP", GROUP, "dead", "STREAMS", STREAM, ">"]).await;
    client.add("k1", 1).await;
    assert_refused(&lab, "other").await;
    let total = "select sum(value)::bigint from public.counters";
    assert_eq!(lab.number(total).await, 300);
    lab.execute("update tidegate.lanes set source = 'other' where source = 'main'").await;
    let (code, stdout, stderr) = output(&mut program(&lab, "other", &["replay", "--since", "1h", "--yes"])).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    let (code, _, stderr) = output(&mut program(&lab, "other", &["run", "--until-empty"])).await;
    assert_eq!((code, lab.number(total).await), (0, 302), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_daemon_is_at_work_none_calls_its_valkey_by_another_name() {
    for exclusive in [false, true] {
        let lab = Lab::new().await;
        let mut daemon = Daemon::start(if exclusive { lab.exclusive(&["run"]) } else { lab.program(&["run"]) });
        daemon.wait_for_event("running", |_| true).await;
        lab.client().await.add("a", 1).await;
        lab.await_value("a", 1).await;
        // Nothing is there to be compared.
        lab.client().await.call(&["XTRIM", STREAM, "MAXLEN", "0"]).await;
        assert_refused(&lab, "other").await;
        // Whoever does the same by the same name is welcome.
        assert_eq!(output(&mut lab.program(&["run", "--until-empty"])).await.0, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_valkey_with_the_same_names_is_no_other_name_of_the_first() {
    let east = Lab::new().await;
    let west = Lab { valkey: valkey(&[]).await, database: east.database.clone() };
    for (lab, of) in [(&east, "east"), (&west, "west")] {
        let mut client = lab.client().await;
        // The same ids on both, and the same content for one of them.
        for n in 1..=50 {
            let key = if n == 1 { "both".to_owned() } else { format!("{of}{n}") };
            client.call(&["XADD", STREAM, &format!("1700000000000-{n}"), "id", &key, "amount", "1"]).await;
        }
        // Read and settled before anybody looks: as a group that was made by hand.
        let (code, _, stderr) = output(&mut program(lab, of, &["run", "--until-empty"])).await;
        assert_eq!(code, 0, "{stderr}");
    }
    // The second one loses its place in the ledger, and its group stands behind everything.
    east.execute(
        "delete from tidegate.ledger where lane in (select lane from tidegate.lanes where source = 'west');
                  delete from tidegate.lanes where source = 'west'",
    )
    .await;
    west.client().await.add("new", 1).await;
    let (code, _, stderr) = output(&mut program(&west, "west", &["run", "--until-empty"])).await;
    assert_eq!((code, east.value("new").await, east.value("both").await), (0, Some(1), Some(2)), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_daemon_is_at_work_none_flushes_its_stream_into_another_database() {
    for delivery in ["group", "exclusive"] {
        let lab = Lab::new().await;
        let elsewhere = Lab { valkey: valkey(&[]).await, database: database(true).await };
        let run = |database: &str, arguments: &[&str]| {
            let mut command = lab.program(arguments);
            command.env("DATABASE_URL", database).env("TIDEGATE__PIPELINES__COUNTERS__DELIVERY", delivery);
            command
        };
        let another = async || output(&mut run(&elsewhere.database, &["run", "--until-empty"])).await;
        let mut daemon = Daemon::start(run(&lab.database, &["run"]));
        daemon.wait_for_event("running", |_| true).await;
        // Nothing has been produced. It is seen once it has said where it flushes into.
        let is_refused = async || {
            let (code, _, stderr) = another().await;
            (code, stderr.contains("into another PostgreSQL") && stderr.contains("Correct postgres.url"))
        };
        eventually("refused", (78, true), is_refused).await;
        // Whoever flushes into the same one is welcome, by whatever address.
        let proxy = Proxy::start(lab.postgres_port()).await;
        let (port, way) = (lab.postgres_port().to_string(), proxy.port().to_string());
        let mut same = run(&lab.database.replace(&port, &way), &["run", "--until-empty"]);
        let (code, _, stderr) = output(&mut same).await;
        assert_eq!(code, 0, "{stderr}");
        daemon.kill().await;
        let (code, _, stderr) = another().await;
        assert_eq!(code, 0, "who was killed is in nobody's way: {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_becomes_another_one_behind_its_address_is_told_by_status() {
    let (one, other) = (Postgres::start(&[]).await.expect("it starts"), Postgres::start(&[]).await.expect("it starts"));
    let (lab, there) = (Lab::on(&one, "app").await, Lab::on(&other, "app").await);
    // A program that is prepared has its role's rights made: the other database, too, has the worker's.
    drop(there.program(&["run"]));
    let proxy = Proxy::start(one.port()).await;
    let mut moved = lab.daemon_through(None, Some(proxy.port()));
    let mut stays = lab.daemon();
    let status = async || {
        let (_, status) = document(&lab, "status", &["status"]).await;
        (
            status["pipelines"][0]["streams"][0]["processes"].as_array().map(Vec::len),
            has_reason(&status, "several_databases"),
        )
    };
    for daemon in [&mut moved, &mut stays] {
        daemon.wait_for_event("running", |_| true).await;
    }
    eventually("both are there, and into one", (Some(2), false), status).await;
    proxy.retarget(other.port());
    proxy.reset();
    eventually("they flush into two", (Some(2), true), status).await;
    assert_eq!(output(&mut lab.program(&["run", "--until-empty"])).await.0, 78, "nobody joins them");
    stays.kill().await;
    eventually("one is left", (Some(1), false), status).await;
    lab.client().await.add("a", 1).await;
    there.await_value("a", 1).await;
}
