//! The console in a real Chromium: `make console-test`, which looks for one. Where there is none the test says so and is skipped.

use std::path::PathBuf;

use tokio::process::Command;

use crate::admin::Admin;
use crate::harness::{Daemon, Lab, STREAM, within_limit};

const TOKEN: &str = "a-token-of-a-browser-0123456789";
/// Markup, a bell, and a character that turns the direction of writing.
const HOSTILE: &str = "<script>window.pwned=1</script>";
const AMOUNT: &str = "<img src=x onerror=alert(1)>\u{7}\u{202e}";

/// What a variable names; none if it could not be had, and then it is said why.
fn part(variable: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).map(PathBuf::from);
    if found.is_none() {
        let why = std::env::var(format!("{variable}_MISSING"));
        eprintln!("skipped: {}", why.unwrap_or_else(|_| format!("{variable} is not set; run make console-test")));
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: make console-test"]
async fn an_operator_works_with_the_console_by_keyboard_in_light_and_dark_and_on_a_narrow_screen() {
    let (Some(chromium), Some(browser)) = (part("TIDEGATE_CHROMIUM"), part("TIDEGATE_BROWSER")) else { return };
    let lab = Lab::new().await;
    lab.execute("alter table public.counters add constraint small check (value < 1000000)").await;
    lab.execute("create table public.page_views (page text primary key, views bigint not null)").await;
    let mut client = lab.client().await;
    for amount in ["1000000", "2000000", "3000000"] {
        client.call(&["XADD", STREAM, "*", "id", "refused", "amount", amount]).await;
    }
    client.call(&["XADD", STREAM, "*", "id", HOSTILE, "amount", AMOUNT, "note", HOSTILE]).await;
    lab.settle_everything().await;
    lab.execute("alter table public.counters drop constraint small").await;
    let mut command = lab.program(&["run"]);
    command.env("TIDEGATE__ADMIN__CONSOLE", "open").env("TIDEGATE__ADMIN__TOKEN", TOKEN);
    command.env("TIDEGATE__PIPELINES__COUNTERS__STREAM", STREAM);
    for (key, value) in [
        ("STREAM", "flush:page-views"),
        ("TABLE", "public.page_views"),
        ("KEY_COLUMN", "page"),
        ("VALUE_COLUMN", "views"),
        ("UPDATED_AT_COLUMN", ""),
    ] {
        command.env(format!("TIDEGATE__PIPELINES__PAGE_VIEWS__{key}"), value);
    }
    let mut daemon = Daemon::start(command);
    let admin = Admin::of(&mut daemon).await;
    daemon.wait_for_event("running", |_| true).await;
    // A load that rises and falls, so that the charts have something to show.
    let mut pace = tokio::time::interval(std::time::Duration::from_millis(100));
    let load = tokio::spawn(async move {
        for n in 0_u64.. {
            pace.tick().await;
            let wave = 40 + (60.0 * (n as f64 / 9.0).sin()).abs() as usize;
            client.add_many(&format!("user:{}", n % 50), wave).await;
            let page = format!("/articles/{}", n % 20);
            client.pipeline(&vec![vec!["XADD", "flush:page-views", "*", "id", &page, "amount", "1"]; wave / 3]).await;
        }
    });
    let mut command = Command::new("node");
    command.arg(browser.join("console.mjs")).current_dir(&browser).kill_on_drop(true);
    command
        .env("CONSOLE_URL", format!("http://{}", admin.address))
        .env("CONSOLE_TOKEN", TOKEN)
        .env("CHROMIUM", chromium);
    let output = tokio::time::timeout(std::time::Duration::from_secs(300), command.output()).await;
    let output = output.expect("it ends").expect("node runs");
    load.abort();
    let said = String::from_utf8_lossy(&output.stdout);
    eprintln!("{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    let redriven = "select count(*) from tidegate.dead_letters where resolution = 'redriven by ada (console)'";
    assert_eq!((lab.value("refused").await, lab.number(redriven).await), (Some(6_000_000), 3));
    assert_eq!(
        lab.number("select count(*) from tidegate.dead_letters where resolved_at is null").await,
        1,
        "opened again"
    );
    assert_eq!(lab.number("select count(*) from tidegate.pauses").await, 0, "resumed");
    daemon.signal(rustix::process::Signal::TERM);
    assert!(within_limit("the end", daemon.exit()).await.success());
}
