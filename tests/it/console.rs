//! The console: what is served over HTTP, to whom, and what each change does in PostgreSQL.

use std::path::PathBuf;

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::admin::{Admin, Answer};
use crate::contract::assert_fits;
use crate::harness::{Daemon, Lab, STREAM, eventually, within_limit};
use crate::proxy::{Proxy, Way};

const TOKEN: &str = "canary-token-0123456789";
const JSON: (&str, &str) = ("Content-Type", "application/json");
/// Everything that can be read.
const READ: [&str; 9] = [
    "/api/status",
    "/api/streams",
    "/api/workers",
    "/api/consumers",
    "/api/history",
    "/api/config",
    "/api/dead",
    "/api/dead/letter?id=1-1",
    "/api/actions",
];
/// Every change, with a body that makes sense.
const CHANGES: [(&str, &str); 6] = [
    ("/api/dead/redrive", r#"{"all": true, "dry_run": true}"#),
    ("/api/dead/discard", r#"{"all": true, "dry_run": true}"#),
    ("/api/dead/reopen", r#"{"all": true, "dry_run": true}"#),
    ("/api/pause", r#"{"pipeline": "counters"}"#),
    ("/api/resume", r#"{"pipeline": "counters"}"#),
    ("/api/audit", r#"{"pipeline": "counters"}"#),
];

/// A daemon with a console.
struct Served {
    admin: Admin,
    daemon: Daemon,
    token_file: PathBuf,
    _directory: TempDir,
}

impl Served {
    async fn by(lab: &Lab, access: &str) -> Served {
        Served::through(lab, access, None, None).await
    }

    async fn through(lab: &Lab, access: &str, valkey: Option<u16>, postgres: Option<u16>) -> Served {
        let directory = TempDir::new().expect("a directory");
        let token_file = directory.path().join("token");
        std::fs::write(&token_file, format!("{TOKEN}\n")).expect("written");
        let mut command = lab.program(&["run"]);
        command.env("TIDEGATE__ADMIN__CONSOLE", access).env("TIDEGATE__ADMIN__TOKEN_FILE", &token_file);
        let mut daemon = lab.start_through(command, valkey, postgres);
        let admin = Admin::of(&mut daemon).await;
        daemon.wait_for_event("running", |_| true).await;
        Served { admin, daemon, token_file, _directory: directory }
    }

    async fn get(&self, path: &str) -> Answer {
        self.admin.request("GET", path, &[], "").await
    }

    /// A change with the token.
    async fn change(&self, path: &str, body: Value) -> (u16, Value) {
        let answer = self.send(path, TOKEN, &body.to_string()).await;
        (answer.status, answer.json())
    }

    async fn send(&self, path: &str, token: &str, body: &str) -> Answer {
        let bearer = format!("Bearer {token}");
        within_limit(path, self.admin.request("POST", path, &[JSON, ("Authorization", &bearer)], body)).await
    }
}

async fn letters(lab: &Lab) {
    lab.execute("alter table public.counters add constraint small check (value < 100)").await;
    let mut client = lab.client().await;
    for amount in ["100", "200", "300"] {
        client.call(&["XADD", STREAM, "*", "id", "refused", "amount", amount]).await;
    }
    client
        .call(&["XADD", STREAM, "*", "id", "<script>alert(1)</script>", "amount", "<img src=x onerror=alert(1)>"])
        .await;
    lab.settle_everything().await;
    assert_eq!(lab.number("select count(*) from tidegate.dead_letters where resolved_at is null").await, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_off_unless_it_is_asked_for_and_a_reload_switches_it() {
    let lab = Lab::new().await;
    let directory = TempDir::new().expect("a directory");
    let file = directory.path().join("tidegate.toml");
    std::fs::write(&file, "").expect("written");
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE_CONFIG", &file);
    let mut daemon = Daemon::start(command);
    let admin = Admin::of(&mut daemon).await;
    daemon.wait_for_event("running", |_| true).await;
    let status = async |path: &str| admin.request("GET", path, &[], "").await.status;
    for path in ["/console", "/console/console.js", "/api/session", "/api/status"] {
        assert_eq!(status(path).await, 404, "{path}");
    }
    for (text, expected) in [("[admin]\nconsole = \"open\"\n", 200), ("[admin]\nconsole = \"off\"\n", 404)] {
        std::fs::write(&file, text).expect("written");
        daemon.signal(Signal::HUP);
        eventually("the console", expected, async || status("/console").await).await;
        assert_eq!(status("/api/config").await, expected);
    }
    assert_eq!(status("/live").await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_forbids_foreign_scripts_frames_and_caches() {
    let lab = Lab::new().await;
    let served = Served::by(&lab, "open").await;
    let page = served.get("/console").await;
    assert_eq!((page.status, page.headers["content-type"].as_str()), (200, "text/html; charset=utf-8"));
    let files = page.body.split('"').filter(|text| text.starts_with("/console/")).map(str::to_owned);
    let files: Vec<String> =
        files.chain(READ.map(str::to_owned)).chain(["/console".into(), "/api/session".into()]).collect();
    assert!(files.iter().any(|file| file.ends_with(".js")) && files.iter().any(|file| file.ends_with(".css")));
    for path in &files {
        let answer = served.get(path).await;
        assert!(answer.status == 200 || path.contains("letter"), "{path}: {answer:?}");
        let policy = &answer.headers["content-security-policy"];
        for rule in [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
        ] {
            assert!(policy.split("; ").any(|is| is == rule), "{path}: {policy} has no {rule}");
        }
        assert!(!policy.contains("unsafe"), "{policy}");
        for (name, value) in [
            ("x-content-type-options", "nosniff"),
            ("cache-control", "no-store"),
            ("x-frame-options", "DENY"),
            ("referrer-policy", "no-referrer"),
        ] {
            assert_eq!(answer.headers[name], value, "{path}");
        }
        assert!(
            !answer.headers.keys().any(|name| name.starts_with("access-control") || name == "set-cookie"),
            "{path}"
        );
    }
    // A foreign name, and a foreign page.
    assert_eq!(served.admin.request("GET", "/console", &[("Host", "evil.example")], "").await.status, 421);
    assert_eq!(served.admin.request("GET", "/api/status", &[("Host", "evil.example")], "").await.status, 421);
    for (site, expected) in [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)] {
        let answer = served.admin.request("GET", "/api/session", &[("Sec-Fetch-Site", site)], "").await;
        assert_eq!(answer.status, expected, "{site}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_need_the_token_in_a_header_and_a_locked_console_needs_it_for_reading_too() {
    let lab = Lab::new().await;
    let mut served = Served::by(&lab, "open").await;
    let pauses = "select count(*) from tidegate.pauses";
    for (path, body) in CHANGES {
        let post = async |headers: &[(&str, &str)]| served.admin.request("POST", path, headers, body).await.status;
        let (right, wrong) = (format!("Bearer {TOKEN}"), format!("Bearer {TOKEN}x"));
        assert_eq!(post(&[JSON]).await, 401, "{path} without a token");
        for bad in
            [wrong.as_str(), "Bearer ", "Bearer", "", TOKEN, "Basic Y2FuYXJ5", &format!("Bearer {}", &TOKEN[1..])]
        {
            assert_eq!(post(&[JSON, ("Authorization", bad)]).await, 401, "{path} with {bad:?}");
        }
        assert_eq!(post(&[JSON, ("Authorization", &right), ("Authorization", &right)]).await, 401, "{path} with two");
        assert_eq!(post(&[JSON, ("Cookie", &format!("token={TOKEN}"))]).await, 401, "{path} with a cookie");
        assert_eq!(
            post(&[("Authorization", &right), ("Content-Type", "text/plain")]).await,
            415,
            "{path} as a form could send it"
        );
        assert_eq!(
            post(&[JSON, ("Authorization", &right), ("Sec-Fetch-Site", "cross-site")]).await,
            403,
            "{path} from a foreign page"
        );
        let get = served.admin.request("GET", path, &[("Authorization", &right)], "").await.status;
        assert_eq!(get, 405, "{path} is nothing that a link can do");
    }
    assert_eq!(lab.number(pauses).await, 0, "nothing was changed");
    served.daemon.wait_for_event("console_refused", |_| true).await;
    let session = served.get("/api/session").await.json();
    assert_eq!(
        (&session["may_read"], &session["may_change"], &session["has_token"]),
        (&true.into(), &false.into(), &true.into())
    );

    // The token is changed in its file: a reload takes the new one, and the old one is refused.
    std::fs::write(&served.token_file, "another-token-0123456789").expect("written");
    served.daemon.signal(Signal::HUP);
    let resume = r#"{"pipeline": "counters"}"#;
    eventually("the new token", 200, async || {
        served.send("/api/resume", "another-token-0123456789", resume).await.status
    })
    .await;
    assert_eq!(served.send("/api/resume", TOKEN, resume).await.status, 401);
    let reloaded = served.daemon.wait_for_event("reloaded", |_| true).await.to_string();
    assert!(reloaded.contains("admin.token") && !reloaded.contains("another-token"), "{reloaded}");

    let served = Served::by(&lab, "locked").await;
    for path in READ {
        assert_eq!(served.get(path).await.status, 401, "{path}");
        let answer = served.admin.request("GET", path, &[("Authorization", &format!("Bearer {TOKEN}"))], "").await;
        assert_ne!(answer.status, 401, "{path}");
    }
    assert_eq!(served.get("/console").await.status, 200, "the page asks for the token");
    assert_eq!(served.get("/api/session").await.json()["may_read"], false);
    assert_eq!(served.get("/metrics").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_configured_token_nothing_can_be_changed_and_a_locked_console_is_refused() {
    let lab = Lab::new().await;
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__ADMIN__CONSOLE", "open");
    let mut daemon = Daemon::start(command);
    let admin = Admin::of(&mut daemon).await;
    for bearer in ["Bearer ", "Bearer x", "Bearer \u{0}"] {
        for (path, body) in CHANGES {
            let status = admin.request("POST", path, &[JSON, ("Authorization", bearer)], body).await.status;
            assert!([400, 403].contains(&status), "{path}: {status}");
        }
    }
    for (variables, words) in [
        (&[("ADMIN__CONSOLE", "locked")][..], "there is no admin.token to open it with"),
        (&[("ADMIN__CONSOLE", "open"), ("ADMIN__TOKEN", "hunter2")], "is no such token; write 16 to 512"),
        (&[("ADMIN__TOKEN_FILE", "/nowhere/token")], "admin.token_file is \"/nowhere/token\""),
    ] {
        let mut command = lab.program(&["check"]);
        for (name, value) in variables {
            command.env(format!("TIDEGATE__{name}"), value);
        }
        let (code, _, stderr) = crate::harness::output(&mut command).await;
        assert!([66, 78].contains(&code) && stderr.contains(words) && !stderr.contains("hunter2"), "{code} {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_tells_what_the_verbs_tell_with_secrets_hidden() {
    let lab = Lab::new().await;
    letters(&lab).await;
    let mut served = Served::by(&lab, "open").await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    lab.await_value("a", 1).await;
    eventually("a member of the group", true, async || served.get("/api/consumers").await.json()["total"] != 0).await;
    let status = served.get("/api/status").await.json();
    assert_eq!(status["pipelines"][0]["name"], "counters");
    assert_eq!(
        (&status["pipelines"][0]["dead_letters"], &status["valkey"]["reachable"]),
        (&4.into(), &true.into()),
        "{status}"
    );
    assert!(
        status["verdict"]["sentence"].as_str().is_some_and(|sentence| sentence.starts_with("OK: flushing")),
        "{status}"
    );
    let streams = served.get("/api/streams?pipeline=counters").await.json();
    assert_eq!((&streams["total"], &streams["rows"][0]["stream"]), (&1.into(), &STREAM.into()));
    eventually("the daemon", json!("flowing"), async || {
        served.get("/api/workers").await.json()["rows"][0]["state"].clone()
    })
    .await;
    eventually("a point", true, async || {
        let history = served.get("/api/history").await.json();
        history["pipelines"]["counters"].as_array().is_some_and(|points| points.len() >= 2)
    })
    .await;
    let config = served.get("/api/config?limit=500").await.json();
    let row = |key: &str| {
        config["rows"].as_array().and_then(|rows| rows.iter().find(|row| row["key"] == key)).cloned().expect(key)
    };
    assert_eq!(
        (&row("admin.token")["value"], &row("run.workers")["origin"]),
        (&"***".into(), &"env TIDEGATE__RUN__WORKERS".into())
    );
    assert_eq!(row("admin.token")["origin"], format!("file {}", served.token_file.display()));

    let list = served.get("/api/dead").await;
    assert_fits("dead-list", &list.json());
    assert_eq!((list.json()["total"].as_u64(), list.headers["content-type"].as_str()), (Some(4), "application/json"));
    let (bad, refused) = ("/api/dead?reason=bad_amount", "/api/dead?key=refused&limit=2&skip=2");
    let bad = served.get(bad).await.json();
    let name = bad["letters"][0]["letter"].as_str().expect("one").to_owned();
    let letter = served.get(&format!("/api/dead/letter?id={name}")).await;
    assert_eq!(letter.json()["letters"][0]["fields"][0]["value"]["text"], "<script>alert(1)</script>");
    assert_eq!(letter.headers["content-type"], "application/json");
    let refused = served.get(refused).await.json();
    assert_eq!(
        (&refused["total"], refused["letters"].as_array().map(Vec::len)),
        (&3.into(), Some(1)),
        "paged: {refused}"
    );
    for (path, expected) in [
        ("/api/dead?resaon=x", 400),
        ("/api/dead?limit=100000", 400),
        ("/api/dead?id=';drop", 400),
        ("/api/dead?since=soon", 400),
        ("/api/dead/letter", 400),
        ("/api/dead/letter?id=1-1", 404),
        ("/api/config?skip=-1", 400),
        ("/api/nothing", 404),
        ("/api/dead?key=%00", 200),
    ] {
        assert_eq!(served.get(path).await.status, expected, "{path}");
    }
    // A letter longer than is shown says so.
    let long = "x".repeat(20_000);
    client.call(&["XADD", STREAM, "*", "id", "long", "amount", &long]).await;
    let found =
        async || served.get("/api/dead?key=long").await.json()["letters"][0]["letter"].as_str().map(str::to_owned);
    eventually("buried", true, async || found().await.is_some()).await;
    let letter = served.get(&format!("/api/dead/letter?id={}", found().await.expect("one"))).await;
    assert!(letter.body.len() < 12_000, "{}", letter.body.len());
    assert_eq!(letter.json()["letters"][0]["left_out_bytes"], 20_000 - 8_192);

    let all = served.daemon.all_lines().join("\n");
    for text in [status.to_string(), config.to_string(), all] {
        assert!(!text.contains(TOKEN), "the token is told");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_are_redriven_discarded_and_reopened_and_the_log_tells_who_did() {
    let lab = Lab::new().await;
    letters(&lab).await;
    let mut served = Served::by(&lab, "open").await;
    let open = "select count(*) from tidegate.dead_letters where resolved_at is null";
    let (status, tried) = served.change("/api/dead/redrive", json!({"all": true, "dry_run": true})).await;
    assert_eq!((status, &tried["result"]["redriven"], &tried["state"]), (200, &0.into(), &"done".into()), "{tried}");
    assert_fits("dead-redrive", &tried["result"]);
    lab.execute("alter table public.counters drop constraint small").await;
    let (_, tried) = served.change("/api/dead/redrive", json!({"letters": {"key": "refused"}, "dry_run": true})).await;
    assert_eq!(tried["result"]["redriven"], 3);
    assert_eq!((lab.number(open).await, lab.value("refused").await), (4, None), "rolled back");
    let body = json!({"letters": {"key": "refused"}, "operator": "ada\u{1b}[31m"});
    let (status, done) = served.change("/api/dead/redrive", body).await;
    assert_eq!((status, &done["result"]["redriven"]), (200, &3.into()), "{done}");
    assert_eq!((lab.number(open).await, lab.value("refused").await), (1, Some(600)));
    let by = "select count(*) from tidegate.dead_letters where resolution = 'redriven by ada\\u{1b}[31m (console)'";
    assert_eq!(lab.number(by).await, 3);
    let event = served
        .daemon
        .wait_for_event("console_action", |event| event["action"] == "redrive" && event["dry_run"] == false)
        .await;
    assert_eq!(
        (&event["outcome"], &event["operator"]),
        (&"done".into(), &"ada\\u{1b}[31m (console)".into()),
        "{event}"
    );

    let (_, done) =
        served.change("/api/dead/discard", json!({"letters": {"reasons": ["bad_amount"]}, "because": "a test"})).await;
    assert_fits("dead-mark", &done["result"]);
    assert_eq!((&done["result"]["letters"], lab.number(open).await), (&1.into(), 0));
    let because = "select count(*) from tidegate.dead_letters where resolution = 'discarded by console: a test'";
    assert_eq!(lab.number(because).await, 1);
    let (_, done) = served.change("/api/dead/reopen", json!({"all": true})).await;
    assert_eq!((&done["result"]["letters"], lab.number(open).await), (&1.into(), 1), "{done}");

    // What makes no sense changes nothing; a misspelt filter is not everything.
    for (path, body, expected) in [
        ("/api/dead/discard", "{}", 400),
        ("/api/dead/discard", r#"{"letters": {}}"#, 400),
        ("/api/dead/discard", r#"{"letters": {"reason": ["bad_amount"]}}"#, 400),
        ("/api/dead/discard", r#"{"letters": {"ids": ["1-1"]}}"#, 404),
        ("/api/dead/redrive", r#"{"letters": {"ids": ["x"]}}"#, 400),
        ("/api/dead/redrive", r#"{"all": true, "accept_doubt": true}"#, 400),
        ("/api/dead/redrive", "not json", 400),
        ("/api/dead/redrive", "", 400),
        ("/api/dead/discard", &format!(r#"{{"because": "{}"}}"#, "x".repeat(200_000)), 413),
    ] {
        assert_eq!(served.send(path, TOKEN, body).await.status, expected, "{path} {}", &body[..body.len().min(80)]);
    }
    assert_eq!(lab.number(open).await, 1);
    let actions = served.get("/api/actions").await.json();
    let named: Vec<&str> =
        actions["actions"].as_array().expect("a list").iter().filter_map(|a| a["action"].as_str()).collect();
    assert!(named.len() >= 5 && named.contains(&"reopen"), "{actions}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_is_paused_and_resumed_and_an_audit_finds_what_differs() {
    let lab = Lab::new().await;
    let mut served = Served::by(&lab, "open").await;
    let mut client = lab.client().await;
    client.add("a", 1).await;
    client.add("b", 5).await;
    lab.await_value("a", 1).await;
    lab.await_value("b", 5).await;
    let (status, done) = served
        .change("/api/pause", json!({"pipeline": "counters", "duration": "1h", "reason": "a test", "operator": "ada"}))
        .await;
    assert_eq!((status, &done["result"]["pipelines"][0]["paused"]), (200, &true.into()), "{done}");
    assert_fits("pause", &done["result"]);
    let kept = "select count(*) from tidegate.pauses where pipeline = 'counters' and reason = 'a test' and operator = 'ada (console)' and until > now() + interval '50 minutes'";
    assert_eq!(lab.number(kept).await, 1);
    served.daemon.wait_for_event("paused", |_| true).await;
    eventually("paused, in the status", json!(true), async || {
        served.get("/api/status").await.json()["pipelines"][0]["paused"].clone()
    })
    .await;
    client.add("a", 1).await;
    let (status, done) = served.change("/api/resume", json!({"pipeline": "counters"})).await;
    assert_eq!((status, &done["result"]["pipelines"][0]["paused"]), (200, &false.into()), "{done}");
    assert_eq!(lab.number("select count(*) from tidegate.pauses").await, 0);
    lab.await_value("a", 2).await;
    for (path, body) in [
        ("/api/pause", json!({"pipeline": "nobody"})),
        ("/api/resume", json!({"pipeline": "nobody"})),
        ("/api/pause", json!({"pipeline": "counters", "duration": "0s"})),
        ("/api/pause", json!({"pipeline": "counters", "duration": "soon"})),
        ("/api/audit", json!({"pipeline": "counters", "sample": 0})),
        ("/api/audit", json!({"pipeline": "counters", "full": true})),
    ] {
        let (status, answer) = served.change(path, body.clone()).await;
        assert!([400, 422].contains(&status), "{path} {body}: {status} {answer}");
    }
    assert_eq!(lab.number("select count(*) from tidegate.pauses").await, 0);

    // Somebody wrote past the stream.
    client.call(&["INCRBY", "counter:b", "7"]).await;
    let (_, begun) = served.change("/api/audit", json!({"pipeline": "counters"})).await;
    let number = begun["number"].as_u64().expect("a number");
    eventually("the audit's end", json!("done"), async || {
        let actions = served.get("/api/actions").await.json();
        actions["actions"]
            .as_array()
            .and_then(|all| all.iter().find(|a| a["number"] == number))
            .map(|a| a["state"].clone())
            .expect("it")
    })
    .await;
    let actions = served.get("/api/actions").await.json();
    let result = &actions["actions"].as_array().and_then(|all| all.iter().find(|a| a["number"] == number)).expect("it")
        ["result"];
    assert_fits("audit", result);
    assert_eq!((&result["valkey_ahead"], &result["equal"]), (&1.into(), &1.into()), "{result}");
    assert_eq!((&result["differences"][0]["key"], &result["differences"][0]["difference"]), (&"b".into(), &"7".into()));
    assert_eq!(lab.value("b").await, Some(5), "an audit changes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_postgresql_keeps_neither_metrics_nor_health_waiting_and_many_who_ask_are_bounded() {
    let lab = Lab::new().await;
    let postgres = Proxy::start(lab.postgres_port()).await;
    let served = Served::through(&lab, "open", None, Some(postgres.port())).await;
    assert_eq!(served.get("/api/status").await.status, 200);
    postgres.hold(Way::ToClient);
    let mut asking = tokio::task::JoinSet::new();
    for n in 0..40 {
        let address = served.admin.address.clone();
        let path = if n % 2 == 0 { "/api/status" } else { "/api/dead" };
        asking.spawn(async move { Admin { address }.request("GET", path, &[], "").await });
    }
    eventually("asked", true, async || served.get("/api/dead").await.status == 503).await;
    for path in ["/metrics", "/live", "/ready", "/api/history", "/api/session"] {
        let began = std::time::Instant::now();
        let status = served.get(path).await.status;
        let is_quick = began.elapsed() < std::time::Duration::from_secs(5);
        assert!(is_quick && status == 200, "{path}: {status} {:?}", began.elapsed());
    }
    let (mut answered, mut sent_away) = (Vec::new(), 0);
    while let Some(answer) = within_limit("all answers", asking.join_next()).await {
        let answer = answer.expect("answered");
        // A server that is away is told by 503, too; who is sent away for too many ask at once is told when to come again.
        sent_away += usize::from(answer.headers.contains_key("retry-after"));
        answered.push(answer.status);
    }
    // Too much at once, not in time, or not reached; or as it was before.
    assert!(answered.iter().all(|status| [200, 503, 504].contains(status)), "{answered:?}");
    assert!(answered.contains(&503), "{answered:?}");
    assert!(sent_away > 0, "40 ask at once, and 16 are served: {answered:?}");
    postgres.release(Way::ToClient);
    eventually("PostgreSQL again", json!(true), async || {
        served.get("/api/status").await.json()["postgres"]["reachable"].clone()
    })
    .await;
}
