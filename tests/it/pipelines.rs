//! Pipelines into any table: what lands there is what a computation of PostgreSQL's own makes of the same entries.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use sqlx::AssertSqlSafe;
use tokio::process::Command;

use crate::harness::{Client, Daemon, Lab, eventually, output};
use crate::pooler::Pooler;

/// The stream of the pipelines here.
const REQUESTS: &str = "flush:requests";

/// A request as producers add it.
#[derive(Debug, Clone)]
struct Request {
    id: String,
    fields: Vec<(&'static str, String)>,
}

/// Requests of a few tenants over some days, in an order of no meaning; a few lack what may be lacking.
fn requests(count: usize, seed: u64) -> Vec<Request> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut requests: Vec<Request> = (0..count)
        .map(|n| {
            let tenant = format!("00000000-0000-0000-0000-{:012x}", random.random_range(0..5));
            // The same tenant in two spellings.
            let tenant = if random.random_bool(0.5) { tenant.to_uppercase() } else { tenant };
            let at = 1_790_000_000_000u64 + random.random_range(0..5 * 86_400_000);
            let mut fields = vec![
                ("tenant", tenant),
                ("at", at.to_string()),
                ("status", [200, 301, 404, 500][random.random_range(0..4usize)].to_string()),
                ("bytes", random.random_range(0..1_000_000).to_string()),
                ("price", format!("{}.{:02}", random.random_range(0..50), random.random_range(0..100))),
                ("path", format!("/page/{}", random.random_range(0..40))),
            ];
            if random.random_bool(0.8) {
                fields.push(("ms", random.random_range(0..5_000).to_string()));
            }
            Request { id: format!("{}-{}", 1_700_000_000_000 + n / 3, n % 3), fields }
        })
        .collect();
    // A stream's ids ascend; what the entries say of time does not.
    requests.sort_by_key(|request| request.id.clone());
    requests
}

async fn add(client: &mut Client, stream: &str, requests: &[Request]) {
    for some in requests.chunks(500) {
        let commands: Vec<Vec<String>> = some
            .iter()
            .map(|request| {
                let mut command = vec!["XADD".to_owned(), stream.to_owned(), request.id.clone()];
                command.extend(request.fields.iter().flat_map(|(name, value)| [(*name).to_owned(), value.clone()]));
                command
            })
            .collect();
        client.pipeline(&commands).await;
    }
}

/// The same requests as a table, for PostgreSQL to compute from.
async fn raw(lab: &Lab, requests: &[Request]) {
    lab.execute(
        "create table public.raw (ms bigint, seq bigint, tenant uuid, at timestamptz, status bigint, bytes bigint, price numeric, path text, took bigint)",
    )
    .await;
    let field = |request: &Request, name: &str| {
        request.fields.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone())
    };
    for some in requests.chunks(1_000) {
        let rows: Vec<String> = some
            .iter()
            .map(|request| {
                let text = |name| field(request, name).map_or("null".into(), |value| format!("'{value}'"));
                let (ms, seq) = request.id.split_once('-').expect("an id");
                format!(
                    "({ms}, {seq}, {}, to_timestamp({}::numeric / 1000), {}, {}, {}, {}, {})",
                    text("tenant"),
                    text("at"),
                    text("status"),
                    text("bytes"),
                    text("price"),
                    text("path"),
                    text("ms")
                )
            })
            .collect();
        lab.execute(&format!("insert into public.raw values {}", rows.join(", "))).await;
    }
}

/// How many rows two queries do not have in common.
async fn difference(lab: &Lab, one: &str, other: &str) -> i64 {
    lab.number(&format!(
        "select count(*) from ((({one}) except all ({other})) union all (({other}) except all ({one}))) as d"
    ))
    .await
}

const USAGE: &str = "create table public.usage (tenant uuid, day date, requests bigint not null, bytes bigint not null, price numeric(20, 2) not null,
        slowest bigint, fastest bigint, path text, path_version numeric, entry text, entry_version numeric, any_error text, updated_at timestamptz,
        primary key (tenant, day))";

/// Sets keys of pipelines; none of them is the default one.
fn pipelines<'a>(command: &mut Command, keys: impl IntoIterator<Item = (&'a str, &'a str)>) {
    for (key, value) in keys {
        command.env(format!("TIDEGATE__PIPELINES__{key}"), value);
    }
    command.env_remove("TIDEGATE__PIPELINES__COUNTERS__DELIVERY");
}

fn usage(command: &mut Command) {
    let values = "requests = count(), bytes = sum(bytes), price = sum(price: numeric(2)), slowest = max(ms?), fastest = min(ms?), \
                  path = last(path) by path_version, entry = first(path) by entry_version";
    let keys = [
        ("USAGE__STREAM", REQUESTS),
        ("USAGE__TABLE", "public.usage"),
        ("USAGE__KEYS", "tenant: uuid, day = day(at, America/St_Johns)"),
        ("USAGE__VALUES", values),
    ];
    pipelines(command, keys);
}

/// The program with a pipeline that keeps these values of whoever was seen.
fn seen(lab: &Lab, verb: &[&str], values: &str) -> Command {
    let mut command = lab.program(verb);
    let keys = [
        ("SEEN__STREAM", "flush:seen"),
        ("SEEN__TABLE", "seen"),
        ("SEEN__UPDATED_AT_COLUMN", ""),
        ("SEEN__KEYS", "who"),
        ("SEEN__VALUES", values),
    ];
    pipelines(&mut command, keys);
    command
}

const USAGE_TOLD: &str = "select tenant, day, requests, bytes, price, slowest, fastest, path, entry from public.usage";
const USAGE_COMPUTED: &str = "select tenant, (at at time zone 'America/St_Johns')::date, count(*), sum(bytes)::bigint, sum(price), max(took), min(took),
        (array_agg(path order by ms desc, seq desc))[1], (array_agg(path order by ms, seq))[1] from public.raw group by 1, 2";

/// Workers of both ways, killed while they work, make of the entries what PostgreSQL computes from the same requests.
#[tokio::test(flavor = "multi_thread")]
async fn a_rollup_by_tenant_and_day_is_exact_whoever_is_killed() {
    for delivery in ["group", "exclusive"] {
        let lab = Lab::new().await;
        lab.execute(USAGE).await;
        let requests = requests(12_000, 7);
        raw(&lab, &requests).await;
        let daemon = || {
            let mut command = lab.program(&["run"]);
            usage(&mut command);
            pipelines(&mut command, [("USAGE__DELIVERY", delivery)]);
            command.env("TIDEGATE__BATCH__MAX_ENTRIES", "400").env("TIDEGATE__BATCH__READ_COUNT", "100");
            Daemon::start(command)
        };
        let mut client = lab.client().await;
        let mut daemons = [daemon(), daemon()];
        for (round, some) in requests.chunks(2_000).enumerate() {
            add(&mut client, REQUESTS, some).await;
            let victim = &mut daemons[round % 2];
            victim.kill().await;
            *victim = daemon();
            victim.wait_for("running").await;
        }
        eventually("all requests", 12_000, async || lab.number("select sum(requests)::bigint from public.usage").await)
            .await;
        assert_eq!(difference(&lab, USAGE_TOLD, USAGE_COMPUTED).await, 0, "{delivery}");
        assert_eq!(lab.in_ledger().await, 12_000);
        let versions = "select count(*) from public.usage where path_version < entry_version or path_version is null";
        assert_eq!(lab.number(versions).await, 0);
        assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 0);
    }
}

/// One read, one ledger row, three tables: an entry lands in all of them or in none.
#[tokio::test(flavor = "multi_thread")]
async fn entries_of_one_stream_land_in_three_tables_together() {
    let lab = Lab::new().await;
    lab.execute(USAGE).await;
    lab.execute(
        "create table public.by_status (status bigint, hour timestamptz, hits bigint, primary key (hour, status));
         create table public.pages (path text primary key, value bigint)",
    )
    .await;
    let mut requests = requests(3_000, 11);
    raw(&lab, &requests).await;
    // No bigint, which only the second table asks for.
    let mut bad = requests[1_500].clone();
    bad.id = "1800000000000-0".into();
    bad.fields.iter_mut().filter(|(name, _)| *name == "status").for_each(|(_, value)| *value = "two hundred".into());
    requests.push(bad);
    // What only the third table refuses.
    let mut refused = requests[1_501].clone();
    refused.id = "1800000000001-0".into();
    refused.fields.iter_mut().filter(|(name, _)| *name == "path").for_each(|(_, value)| *value = "/refused".into());
    requests.push(refused);
    lab.execute("alter table public.pages add check (path <> '/refused')").await;
    add(&mut lab.client().await, REQUESTS, &requests).await;
    let mut command = lab.program(&["run", "--until-empty"]);
    usage(&mut command);
    let keys = [
        ("BY_STATUS__WITH", "usage"),
        ("BY_STATUS__TABLE", "by_status"),
        ("BY_STATUS__KEYS", "status: bigint, hour = hour(at)"),
        ("BY_STATUS__VALUES", "hits = count()"),
        ("BY_STATUS__UPDATED_AT_COLUMN", ""),
        ("PAGES__WITH", "usage"),
        ("PAGES__TABLE", "pages"),
        ("PAGES__KEY_COLUMN", "path"),
        ("PAGES__KEY_FIELD", "path"),
        ("PAGES__VALUE_FIELD", "bytes"),
        ("PAGES__UPDATED_AT_COLUMN", ""),
    ];
    pipelines(&mut command, keys);
    let mut daemon = Daemon::start(command);
    assert_eq!(daemon.exit().await.code(), Some(65), "two are dead letters: {}", daemon.last_lines());
    assert_eq!(difference(&lab, USAGE_TOLD, USAGE_COMPUTED).await, 0);
    let by_status = "select status, date_trunc('hour', at, 'UTC'), count(*) from public.raw group by 1, 2";
    assert_eq!(difference(&lab, "select status, hour, hits from public.by_status", by_status).await, 0);
    let pages = "select path, sum(bytes)::bigint from public.raw group by 1";
    assert_eq!(difference(&lab, "select path, value from public.pages", pages).await, 0);
    let reasons =
        sqlx::query_scalar::<_, String>("select reason || ': ' || detail from tidegate.dead_letters order by id");
    let reasons = reasons.fetch_all(&mut lab.sql().await).await.expect("letters");
    assert_eq!(reasons[0], "bad_field: the field status is no whole number of 64 bits");
    assert!(reasons.len() == 2 && reasons[1].starts_with("refused_by_table"), "{reasons:?}");
    assert_eq!(lab.in_ledger().await, 3_002);
}

/// The newest entry stays, although four processes read them, none before its batch is killed once and some come again much later.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_value_is_the_newest_entry_s_whatever_the_order_of_flushes() {
    let lab = Lab::new().await;
    lab.execute("create table public.seen (who text primary key, place text, place_version numeric)").await;
    let program = |verb: &[&str]| {
        let mut command = seen(&lab, verb, "place = last(place) by place_version");
        command.env("TIDEGATE__BATCH__MAX_ENTRIES", "20").env("TIDEGATE__BATCH__READ_COUNT", "10");
        command
    };
    let mut client = lab.client().await;
    let mut random = StdRng::seed_from_u64(5);
    let mut last: BTreeMap<String, String> = BTreeMap::new();
    let mut daemons: Vec<Daemon> = (0..4).map(|_| Daemon::start(program(&["run"]))).collect();
    let mut n = 0u64;
    for round in 0..8usize {
        let commands: Vec<Vec<String>> = (0..400)
            .map(|_| {
                let (who, place) = (format!("w{}", random.random_range(0..15)), format!("p{n}"));
                n += 1;
                last.insert(who.clone(), place.clone());
                ["XADD", "flush:seen", &format!("{}-0", 1_700_000_000_000 + n), "who", &who, "place", &place]
                    .map(str::to_owned)
                    .to_vec()
            })
            .collect();
        client.pipeline(&commands).await;
        let victim = &mut daemons[round % 4];
        victim.kill().await;
        *victim = Daemon::start(program(&["run"]));
    }
    eventually("settled", i64::try_from(n).expect("small"), async || lab.in_ledger().await).await;
    let rows = async || {
        let rows: Vec<(String, String)> = sqlx::query_as("select who, place from public.seen order by who")
            .fetch_all(&mut lab.sql().await)
            .await
            .expect("rows");
        rows.into_iter().collect::<BTreeMap<_, _>>()
    };
    assert_eq!(rows().await, last);
}

/// Rows that are there stay in one table, and go in another one when nothing is left of them.
#[tokio::test(flavor = "multi_thread")]
async fn rows_are_only_inserted_or_deleted_at_zero_where_that_is_asked_for() {
    let lab = Lab::new().await;
    lab.execute(
        "create table public.stock (item text primary key, left_over bigint not null);
         create table public.known (item text primary key, first_path text)",
    )
    .await;
    let mut command = lab.program(&["run"]);
    let keys = [
        ("STOCK__STREAM", "flush:stock"),
        ("STOCK__TABLE", "stock"),
        ("STOCK__KEYS", "item"),
        ("STOCK__VALUES", "left_over = sum(by)"),
        ("STOCK__WRITE", "delete_zero"),
        ("STOCK__UPDATED_AT_COLUMN", ""),
        ("KNOWN__WITH", "stock"),
        ("KNOWN__TABLE", "known"),
        ("KNOWN__KEYS", "item"),
        ("KNOWN__VALUES", "first_path = set_if_null(path)"),
        ("KNOWN__WRITE", "insert"),
        ("KNOWN__UPDATED_AT_COLUMN", ""),
    ];
    pipelines(&mut command, keys);
    let _daemon = Daemon::start(command);
    let mut client = lab.client().await;
    let mut settled = 0;
    for (item, by, path) in [("a", "3", "/1"), ("b", "1", "/2"), ("a", "-3", "/3"), ("b", "-2", "/4"), ("c", "0", "/5")]
    {
        client.call(&["XADD", "flush:stock", "*", "item", item, "by", by, "path", path]).await;
        settled += 1;
        eventually("settled", settled, async || lab.in_ledger().await).await;
    }
    let rows = async |query: &str| {
        let rows = sqlx::query_scalar::<_, String>(AssertSqlSafe(query.to_owned()));
        rows.fetch_all(&mut lab.sql().await).await.expect("rows").join(" ")
    };
    assert_eq!(rows("select item || left_over from public.stock order by 1").await, "b-1");
    assert_eq!(rows("select item || first_path from public.known order by 1").await, "a/1 b/2 c/5");
}

/// Through a pooler in transaction mode, into a partitioned table, from many shards that one reader reads at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_partitioned_table_is_fed_from_many_shards_through_a_pooler() {
    let lab = Lab::new().await;
    lab.execute(&USAGE.replace("primary key (tenant, day))", "primary key (tenant, day)) partition by range (day)"))
        .await;
    lab.execute(
        "create table public.usage_early partition of public.usage for values from (minvalue) to ('2026-09-23');
         create table public.usage_late partition of public.usage for values from ('2026-09-23') to (maxvalue)",
    )
    .await;
    let requests = requests(4_000, 23);
    raw(&lab, &requests).await;
    let mut client = lab.client().await;
    for (shard, some) in requests.chunks(1_000).enumerate() {
        add(&mut client, &format!("{REQUESTS}:{{{shard}}}"), some).await;
    }
    let pooler = Pooler::start(&lab, "").await;
    for delivery in ["group", "exclusive"] {
        let mut command = lab.program(&["run", "--until-empty"]);
        usage(&mut command);
        pipelines(&mut command, [("USAGE__DELIVERY", delivery), ("USAGE__SHARDS", "4")]);
        command.env("TIDEGATE__BATCH__MAX_ENTRIES", "300").env("TIDEGATE__BATCH__READ_COUNT", "100");
        if let Some(pooler) = &pooler {
            command.env("DATABASE_URL", pooler.url(&lab));
        }
        let mut daemon = Daemon::start(command);
        assert!(daemon.exit().await.success(), "{}", daemon.last_lines());
        // What is read again by the other way is recognised.
        assert_eq!(difference(&lab, USAGE_TOLD, USAGE_COMPUTED).await, 0, "{delivery}");
        for shard in 0..4 {
            let stream = format!("{REQUESTS}:{{{shard}}}");
            client.call(&["XGROUP", "SETID", &stream, "tidegate:usage", "0"]).await;
        }
    }
    assert_eq!(lab.in_ledger().await, 4_000);
    assert!(lab.number("select count(*) from public.usage_early").await > 0);
    assert!(lab.number("select count(*) from public.usage_late").await > 0);
}

/// What the table refused lands when the table was corrected, once, with the version of its own entry.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_table_refused_is_redriven_with_the_age_of_its_entry() {
    let lab = Lab::new().await;
    lab.execute("create table public.seen (who text primary key, hits bigint, place text check (place <> '/refused'), place_version numeric)")
        .await;
    let program = |verb: &[&str]| seen(&lab, verb, "hits = count(), place = last(place) by place_version");
    let mut client = lab.client().await;
    for entries in [&[("5-0", "/first"), ("6-0", "/refused")][..], &[("7-0", "/newest")]] {
        for (id, place) in entries {
            client.call(&["XADD", "flush:seen", id, "who", "a", "place", place]).await;
        }
        let mut daemon = Daemon::start(program(&["run", "--until-empty"]));
        assert!(matches!(daemon.exit().await.code(), Some(0 | 65)), "{}", daemon.last_lines());
    }
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters").await, 1);
    lab.execute("alter table public.seen drop constraint seen_place_check").await;
    for times in 0..2 {
        let (_, _, stderr) = output(&mut program(&["dead", "redrive", "--all", "--yes"])).await;
        let row: (i64, String) =
            sqlx::query_as("select hits, place from public.seen").fetch_one(&mut lab.sql().await).await.expect("a row");
        assert_eq!(row, (3, "/newest".into()), "redriven {times} times before: {stderr}");
    }
}

/// Two daemons that would make different rows of the same entries: the second one is refused while the first one lives, and takes over when it has gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_with_other_values_is_refused_while_the_first_one_lives() {
    let lab = Lab::new().await;
    lab.execute("create table public.seen (who text primary key, hits bigint, most bigint)").await;
    let (before, after) = ("hits = count(), most = max(n)", "hits = count(), most = min(n)");
    let mut client = lab.client().await;
    client.call(&["XADD", "flush:seen", "*", "who", "a", "n", "5"]).await;
    let mut first = Daemon::start(seen(&lab, &["run"], before));
    eventually("flushed", 1, async || lab.in_ledger().await).await;
    let (code, _, stderr) = output(&mut seen(&lab, &["run"], after)).await;
    assert_eq!(code, 78, "{stderr}");
    assert!(stderr.contains("most = max(n: bigint)") && stderr.contains("most = min(n: bigint)"), "{stderr}");
    first.signal(Signal::TERM);
    assert!(first.exit().await.success(), "{}", first.last_lines());
    client.call(&["XADD", "flush:seen", "*", "who", "a", "n", "3"]).await;
    let mut second = Daemon::start(seen(&lab, &["run", "--until-empty"], after));
    assert!(second.exit().await.success(), "{}", second.last_lines());
    // What was flushed stays as it was flushed; from now on the least counts.
    assert_eq!(lab.number("select hits * 100 + most from public.seen").await, 203);
}
