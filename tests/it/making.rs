//! `tidegate pipeline new` and `tidegate pipeline test`.

use std::path::Path;

use serde_json::Value;

use crate::contract::assert_fits;
use crate::harness::{Lab, output};

/// Runs `tidegate pipeline …`: exit code, stdout, stderr.
async fn pipeline(lab: &Lab, arguments: &[&str]) -> (i32, String, String) {
    output(&mut lab.program(&[&["pipeline"], arguments].concat())).await
}

/// Writes a configuration and gives its path.
fn written(folder: &tempfile::TempDir, name: &str, text: &str) -> String {
    let path = folder.path().join(name);
    std::fs::write(&path, text).expect("written");
    path.display().to_string()
}

/// What is printed passes `check` and `check --live` as it is.
async fn assert_usable(lab: &Lab, printed: &str) -> tempfile::TempDir {
    let folder = tempfile::TempDir::new().expect("a folder");
    let file = written(&folder, "tidegate.toml", printed);
    for arguments in [&["check"][..], &["check", "--live"]] {
        let (code, stdout, stderr) = output(&mut lab.program(&[&["--config", &file], arguments].concat())).await;
        assert_eq!(code, 0, "{arguments:?}: {stdout}{stderr}\n{printed}");
    }
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_made_from_a_table_fits_it_as_it_is() {
    let lab = Lab::new().await;
    for (table, has) in [
        (
            "create table public.made (tenant uuid, day date, hits bigint not null default 0, cost numeric(12, 2), seen timestamptz, ok boolean,
                 path text, path_version numeric, note text, updated_at timestamptz, primary key (day, tenant))",
            vec!["day = day: date,", "hits = sum(hits?: bigint)", "cost = sum(cost?: numeric(2))", "path = last(path?: text) by path_version", "# note (text): it is left out", "updated_at_column = \"updated_at\""],
        ),
        (
            "create table public.made (id bigserial primary key, code citext not null, at timestamptz not null, label text not null, sold int not null, unique (code, at))",
            vec!["code = code: text,", "at = at: timestamptz", "label = set_if_null(label: text)", "sold = sum(sold: bigint)"],
        ),
        (
            "create table public.made (\"Key\" inet primary key, \"Sum\" numeric, raw bytea not null, doc jsonb, doc_version jsonb, gen bigint generated always as (1) stored)",
            vec!["Key = Key: inet", "Sum = sum(Sum?: numeric)", "raw = set_if_null(raw: bytea)", "doc = jsonb_merge(doc?: jsonb) by doc_version"],
        ),
        ("create table public.made (k timestamp, v smallint not null, x double precision not null, unique (k))", vec!["k = k: text", "x = set_if_null(x: text)"]),
    ] {
        lab.execute(&format!("create extension if not exists citext; drop table if exists public.made; {table}")).await;
        let (code, stdout, stderr) = pipeline(&lab, &["new", "--table", "public.made"]).await;
        assert_eq!(code, 0, "{stderr}");
        for words in has {
            assert!(stdout.contains(words), "no {words:?} in {stdout}");
        }
        assert_usable(&lab, &stdout).await;
        // Its migration only makes it better, and is nothing more when it is done.
        let (_, sql, _) = pipeline(&lab, &["new", "--table", "public.made", "--sql"]).await;
        lab.execute(&sql).await;
        let (code, again, _) = pipeline(&lab, &["new", "--table", "public.made", "--sql"]).await;
        assert_eq!((code, again.as_str()), (0, ""), "{table}");
    }
    let (code, stdout, _) = pipeline(&lab, &["new", "--table", "made", "--name", "made-two", "--output", "json"]).await;
    let document: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_fits("pipeline-new", &document);
    assert_eq!((code, document["pipeline"].as_str()), (0, Some("made-two")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_made_is_told_with_the_next_step() {
    let lab = Lab::new().await;
    lab.execute("create table public.heap (a text); create table public.keys (a text primary key)").await;
    lab.client().await.call(&["SET", "text", "1"]).await;
    for (arguments, code, words) in [
        (&["--table", "public.none"][..], 65, "there is no table public.none"),
        (&["--table", "a.b.c"], 2, "no plain SQL name"),
        (&["--table", "heap"], 65, "create unique index on public.heap"),
        (&["--table", "keys"], 65, "add column entries bigint not null default 0"),
        (&["--stream", "none"], 65, "there are no entries in the stream \"none\""),
        (&["--stream", "text"], 1, "WRONGTYPE"),
        (&["--table", "heap", "--name", "a b"], 2, "is no name of a pipeline"),
        (&["--table", "heap", "--stream", "x"], 2, "cannot be used with"),
        (&[], 2, "--table"),
    ] {
        let (found, _, stderr) = pipeline(&lab, &[&["new"], arguments].concat()).await;
        assert!(stderr.contains(words) && (found == code || words == "WRONGTYPE"), "{arguments:?}: {found} {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_made_from_a_sample_flushes_that_stream_exactly() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    for n in 0..50 {
        let (user, bytes, at) = (format!("u{}", n % 4), (n * 3).to_string(), format!("2026-11-27T08:00:{n:02}Z"));
        let mut add = vec![
            "XADD",
            "log:access",
            "*",
            "User-Agent",
            "curl \"x\"\n[a]",
            "user_id",
            &user,
            "bytes",
            &bytes,
            "at",
            &at,
            "op",
            &at,
        ];
        if n % 2 == 0 {
            add.extend(["referer", "/x", "a b", "1"]);
        }
        client.call(&add).await;
    }
    let (code, stdout, stderr) = pipeline(&lab, &["new", "--stream", "log:access"]).await;
    assert_eq!(code, 0, "{stderr}");
    for words in [
        "[pipelines.access]",
        "stream = \"log:access\"",
        "user_id = user_id: text",
        "user_agent = last(User-Agent: text) by user_agent_version",
        "bytes = sum(bytes: bigint)",
        "at = max(at: timestamptz)",
        "referer = last(referer?: text) by referer_version",
        "\"User-Agent\" becomes the column user_agent",
        "\"a b\" is left out",
        "\"op\" is left out",
    ] {
        assert!(stdout.contains(words), "no {words:?} in {stdout}");
    }
    let (_, sql, _) = pipeline(&lab, &["new", "--stream", "log:access", "--sql"]).await;
    lab.execute(&sql).await;
    let folder = assert_usable(&lab, &stdout).await;
    let file = folder.path().join("tidegate.toml").display().to_string();
    let (code, _, stderr) = output(&mut lab.program(&["--config", &file, "run", "--until-empty"])).await;
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(lab.number("select sum(entries)::bigint from public.access").await, 50);
    assert_eq!(lab.number("select sum(bytes)::bigint from public.access").await, 3 * 49 * 50 / 2);
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0);
}

const CONFIGURATION: &str = r#"
[pipelines.usage]
stream = "flush:usage"
table = "public.usage"
keys = "tenant, day = day(at, Europe/Berlin)"
values = "requests = count(), cost = sum(cost?: numeric(2)), slowest = max(ms?), path = last(path?) by path_version"
updated_at_column = ""

[pipelines.totals]
with = "usage"
table = "public.totals"
keys = "tenant"
values = "cost = sum(cost?: numeric)"
updated_at_column = ""
"#;

const TESTS: &str = r#"
[[test]]
name = "a tenant has a row a day, by the clock of Berlin"
pipeline = "usage"

[[test.entry]]
fields = { tenant = "a", at = "2026-11-26T22:59:59Z", cost = "0.10", path = "/old" }
[[test.entry]]
fields = { tenant = "a", at = "2026-11-26T23:00:00Z", cost = 2.5, ms = 7 }
[[test.entry]]
id = "2-0"
fields = { tenant = "a", at = "2026-11-26T23:00:00Z", cost = 2.5, ms = 7 }
[[test.entry]]
fields = { tenant = "a", at = "yesterday" }
[[test.entry]]
fields = { at = "2026-11-26T23:00:00Z" }

[[test.row]]
table = "public.usage"
columns = { tenant = "a", day = 2026-11-26, requests = 1, cost = 0.1, slowest = { null = true }, path = "/old", path_version = "1-0" }
[[test.row]]
table = "public.usage"
columns = { tenant = "a", day = 2026-11-27, requests = 1, cost = "2.50", slowest = 7, path = { null = true } }
[[test.row]]
table = "public.totals"
columns = { tenant = "a", cost = "2.60" }

[[test.dead]]
entry = 4
reason = "bad_field"
[[test.dead]]
entry = 5
reason = "missing_field"
"#;

/// Runs tests without any server.
async fn tested(lab: &Lab, configuration: &str, tests: &str, arguments: &[&str]) -> (i32, String, String) {
    let folder = tempfile::TempDir::new().expect("a folder");
    let (config, file) = (written(&folder, "tidegate.toml", configuration), written(&folder, "usage.test.toml", tests));
    let mut command = lab.program(&[&["--config", &config, "pipeline", "test", &file], arguments].concat());
    command.env_remove("VALKEY_URL").env_remove("DATABASE_URL");
    let (code, stdout, stderr) = output(&mut command).await;
    let shown =
        |text: String| text.replace(&format!("{}/", Path::new(&file).parent().expect("a folder").display()), "");
    (code, shown(stdout), shown(stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn sample_entries_are_compared_with_the_rows_that_are_expected() {
    let lab = Lab::new().await;
    let (code, stdout, stderr) = tested(&lab, CONFIGURATION, TESTS, &[]).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert_eq!(
        stdout,
        "ok    a tenant has a row a day, by the clock of Berlin (usage.test.toml:2, pipeline usage)\n1 test passed\n"
    );
    let (code, stdout, _) = tested(&lab, CONFIGURATION, TESTS, &["--output", "json"]).await;
    let document: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_fits("pipeline-test", &document);
    assert_eq!((code, document["passed"].as_u64()), (0, Some(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_differs_is_shown_and_the_exit_code_is_1() {
    let lab = Lab::new().await;
    for (from, to, says) in [
        (
            "cost = \"2.50\"",
            "cost = \"2.51\"",
            "      public.usage tenant=a, day=2026-11-27\n        cost  expected 2.51\n              found    2.5\n",
        ),
        ("path = { null = true }", "path = \"/x\"", "        path  expected /x\n              found    null\n"),
        (
            "day = 2026-11-26",
            "day = 2026-11-25",
            "      public.usage tenant=a, day=2026-11-25: expected (usage.test.toml:",
        ),
        (
            "day = 2026-11-26",
            "day = 2026-11-25",
            "day=2026-11-26, requests=1, cost=0.1, slowest=null, path=/old, path_version=18446744073709551616: there, and not expected",
        ),
        (
            "reason = \"missing_field\"",
            "reason = \"bad_field\"",
            "entry 5: expected that it is buried for bad_field; found that it is buried for missing_field (the field tenant is missing)",
        ),
        ("entry = 4", "entry = 1", "entry 1: expected that it is buried for bad_field; found that it lands"),
    ] {
        let tests = TESTS.replace(from, to);
        assert_ne!(tests, TESTS);
        let (code, stdout, stderr) = tested(&lab, CONFIGURATION, &tests, &[]).await;
        assert!(
            code == 1 && stdout.contains(says) && stdout.ends_with("0 tests passed, 1 failed\n"),
            "{says}: {code} {stdout}{stderr}"
        );
        assert!(stdout.starts_with("FAIL  a tenant"), "{stdout}");
        let (code, stdout, _) = tested(&lab, CONFIGURATION, &tests, &["--output", "json"]).await;
        let document: Value = serde_json::from_str(&stdout).expect("JSON");
        assert_fits("pipeline-test", &document);
        assert!(code == 1 && document["tests"][0]["differences"][0]["kind"].is_string(), "{document}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_that_cannot_be_meant_is_told_with_its_line() {
    let lab = Lab::new().await;
    for (from, to, says) in [
        (
            "pipeline = \"usage\"",
            "pipeline = \"totals\"",
            "usage.test.toml:2: there is no pipeline \"totals\" that reads a stream; name one of usage",
        ),
        (
            "table = \"public.totals\"",
            "table = \"public.total\"",
            "the pipeline has no table \"public.total\"; name one of public.usage, public.totals",
        ),
        (
            "requests = 1, cost = 0.1",
            "request = 1, cost = 0.1",
            "public.usage has no column \"request\" that entries fill",
        ),
        ("requests = 1, cost = 0.1", "requests = 1, cost = \"x\"", "the column cost is no decimal number"),
        (
            "columns = { tenant = \"a\", cost = \"2.60\" }",
            "columns = { cost = \"2.60\" }",
            "the row lacks the key column tenant",
        ),
        (
            "[[test.row]]\ntable = \"public.totals\"",
            "[[test.row]]",
            "the pipeline has several tables; add table = one of",
        ),
        ("fields = { at", "felds = { at", "unknown key \"felds\" of an entry"),
        ("[[test]]", "[[test]", "is not TOML"),
    ] {
        let tests = TESTS.replacen(from, to, 1);
        assert_ne!(tests, TESTS);
        let (code, stdout, stderr) = tested(&lab, CONFIGURATION, &tests, &[]).await;
        assert!(
            code == 65 && stdout.contains(says) && stdout.contains("usage.test.toml:"),
            "{says}: {code} {stdout}{stderr}"
        );
    }
    let (code, stdout, _) = output(&mut lab.program(&["pipeline", "test", "none.toml"])).await;
    assert!(code == 66 && stdout.contains("none.toml: cannot be read"), "{stdout}");
    let (code, _, stderr) = tested(&lab, CONFIGURATION, TESTS, &["--only", "nothing"]).await;
    assert!(code == 65 && stderr.contains("leave out --only"), "{stderr}");
}

/// The law: what a test says of entries is what the daemon makes of them.
#[tokio::test(flavor = "multi_thread")]
async fn what_passes_offline_is_what_the_daemon_writes() {
    let lab = Lab::new().await;
    lab.execute(
        "create table public.usage (tenant text, day date, requests bigint, cost numeric, slowest bigint, path text, path_version numeric, primary key (tenant, day));
         create table public.totals (tenant text primary key, cost numeric)",
    )
    .await;
    let mut client = lab.client().await;
    for (id, fields) in [
        ("1-0", &["tenant", "a", "at", "2026-11-26T22:59:59Z", "cost", "0.10", "path", "/old"][..]),
        ("2-0", &["tenant", "a", "at", "2026-11-26T23:00:00Z", "cost", "2.5", "ms", "7"]),
        ("4-0", &["tenant", "a", "at", "yesterday"]),
        ("5-0", &["at", "2026-11-26T23:00:00Z"]),
    ] {
        client.call(&[&["XADD", "flush:usage", id], fields].concat()).await;
    }
    let folder = tempfile::TempDir::new().expect("a folder");
    let config = written(&folder, "tidegate.toml", CONFIGURATION);
    let (code, _, stderr) = output(&mut lab.program(&["--config", &config, "run", "--until-empty"])).await;
    assert_eq!(code, 65, "dead letters: {stderr}");
    let rows = "select string_agg(concat_ws(' ', tenant, day, requests, cost, coalesce(slowest::text, 'null'), coalesce(path, 'null')), ', ' order by day)
         from public.usage";
    let rows: String = sqlx::query_scalar(rows).fetch_one(&mut lab.sql().await).await.expect("rows");
    assert!(
        [
            "a 2026-11-26 1 0.1 null /old, a 2026-11-27 1 2.5 7 null",
            "a 2026-11-26 1 0.10 null /old, a 2026-11-27 1 2.50 7 null"
        ]
        .contains(&rows.as_str()),
        "{rows}"
    );
    let reasons = "select string_agg(reason, ' ' order by id) from tidegate.dead_letters";
    let reasons: String = sqlx::query_scalar(reasons).fetch_one(&mut lab.sql().await).await.expect("reasons");
    assert_eq!(reasons, "bad_field missing_field");
    // Letters name the fields that their rows are known by.
    let (code, stdout, _) = output(&mut lab.program(&["--config", &config, "dead", "list", "--output", "json"])).await;
    let list: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_fits("dead-list", &list);
    assert_eq!(code, 0);
    let key = &list["letters"]
        .as_array()
        .expect("a list")
        .iter()
        .find(|letter| letter["reason"] == "bad_field")
        .expect("the letter")["key"];
    assert_eq!(
        key.to_string(),
        r#"[{"name":{"text":"tenant"},"value":{"text":"a"}},{"name":{"text":"at"},"value":{"text":"yesterday"}}]"#
    );
    let (_, stdout, _) = output(&mut lab.program(&["--config", &config, "dead", "show", "--key", "yesterday"])).await;
    assert!(stdout.contains("key         tenant=a at=yesterday") && stdout.contains("keys or values"), "{stdout}");
    let (_, stdout, _) =
        output(&mut lab.program(&["--config", &config, "tap", "--after", "0-0", "--bad", "--limit", "2"])).await;
    assert!(
        stdout.contains("CANNOT BE APPLIED: the field at is no moment")
            && stdout.contains("the field tenant is missing"),
        "{stdout}"
    );
    let (_, stdout, _) = output(&mut lab.program(&["--config", &config, "status"])).await;
    assert!(stdout.contains("usage writes public.usage, public.totals"), "{stdout}");
}

#[tokio::test(flavor = "multi_thread")]
async fn estimates_objects_and_bytes_are_compared_as_what_they_mean() {
    let lab = Lab::new().await;
    let configuration = "[pipelines.seen]\nstream = \"s\"\ntable = \"seen\"\nkeys = \"k: bytea\"\nupdated_at_column = \"\"\n\
        values = \"users = distinct(user?), doc = jsonb_merge(doc) by v, at = last(at: timestamptz) by w\"\n";
    let tests = r#"
[[test]]
name = "three users"
[[test.entry]]
fields = { k = { hex = "ff00" }, user = "a", doc = '{"x": 1, "y": [1]}', at = 0 }
[[test.entry]]
fields = { k = { hex = "ff00" }, user = "b", doc = '{"x": 2}', at = "2026-11-27T09:00:00+01:00" }
[[test.entry]]
fields = { k = { hex = "ff00" }, user = "b", doc = '{}', at = "2026-11-27T08:00:00Z" }
[[test.row]]
columns = { k = '\xff00', users = 2, doc = '{"y":[1],"x":2}', at = 2026-11-27T08:00:00Z, w = "3-0" }
"#;
    let (code, stdout, stderr) = tested(&lab, configuration, tests, &[]).await;
    assert_eq!(code, 0, "{stdout}{stderr}");
    let (code, stdout, _) = tested(&lab, configuration, &tests.replace("users = 2", "users = 3"), &[]).await;
    assert!(code == 1 && stdout.contains("users  expected 3\n               found    2\n"), "{stdout}");
}
