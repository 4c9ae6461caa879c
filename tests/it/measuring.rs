//! `tidegate demo` and `tidegate bench`.

use crate::harness::{self, Lab, output};

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_proves_itself_and_leaves_nothing_on_borrowed_servers() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    let mut command =
        lab.program(&["demo", "--seconds", "3", "--processes", "2", "--kill-every", "400", "--rate", "5000"]);
    command.env("TIDEGATE_DEMO_VALKEY_URL", lab.valkey.url()).env("TIDEGATE_DEMO_DATABASE_URL", &lab.database);
    let (code, stdout, stderr) = output(&mut command).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stdout.contains("every counter is equal: nothing lost, nothing doubled"), "{stdout}");
    assert_eq!(client.call(&["DBSIZE"]).await.int(), Some(0));
    assert_eq!(lab.number("select count(*) from pg_class where relname like 'tidegate_demo%'").await, 0);
    assert_eq!(lab.in_ledger().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bench_measures_proves_itself_and_leaves_nothing() {
    let lab = Lab::new().await;
    let small =
        ["bench", "--json", "--entries", "2_000", "--runs", "1", "--keys", "50", "--rate", "500", "--seconds", "1"];
    let (code, stdout, stderr) = output(&mut lab.program(&small)).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((&report["exact"], &report["drain"]["entries"]), (&true.into(), &2_000.into()), "{report}");
    for figure in
        ["/drain/entries_per_second", "/drain/rows_per_second", "/drain/bytes_per_entry", "/steady/latency_ms/p99"]
    {
        assert!(
            report.pointer(figure).and_then(serde_json::Value::as_f64).is_some_and(|n| n > 0.0),
            "{figure}: {report}"
        );
    }
    assert_eq!(lab.client().await.call(&["DBSIZE"]).await.int(), Some(0));
    assert_eq!(lab.number("select count(*) from pg_class where relname like 'tidegate_bench%'").await, 0);
    assert_eq!(lab.number("select count(*) from tidegate.lanes").await, 0);
    assert_eq!(lab.in_ledger().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bench_refuses_a_database_that_is_not_migrated_and_sizes_that_make_no_sense() {
    let lab = Lab { database: harness::database(false).await, ..Lab::new().await };
    let (code, _, stderr) = output(&mut lab.program(&["bench"])).await;
    assert_eq!(code, 78);
    assert!(stderr.contains("run `tidegate migrate`"), "{stderr}");
    for bad in [["--entries", "0"], ["--amounts", "9-1"], ["--id-bytes", "1-5"], ["--rate", "many"]] {
        let (code, _, stderr) = output(lab.program(&["bench"]).args(bad)).await;
        assert_eq!(code, 2, "{bad:?}: {stderr}");
    }
}
