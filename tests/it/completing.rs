//! Names that complete in a shell: what the program answers at a Tab, and what a bash makes of that.

use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use tokio::process::Command;

use crate::harness::{GROUP, Lab, STREAM, eventually, eventually_found, free_port, output, program};
use crate::proxy::{Proxy, Way};

/// The program as the script of bash calls it, with these words up to the cursor.
fn asked(lab: &Lab, words: &[&str]) -> Command {
    let mut command = lab.program_by_default(&[&["--", "tidegate"], words].concat());
    command.env("_TIDEGATE_COMPLETE", "bash").env_remove("TIDEGATE__LOG__FORMAT").env("TIDEGATE__LOG__LEVEL", "trace");
    command
}

/// What is offered at one Tab. Nothing is ever said beside it, and it is never a failure.
async fn answer(command: &mut Command) -> Vec<String> {
    let (code, stdout, stderr) = output(command).await;
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    stdout.lines().map(str::to_owned).collect()
}

/// What is offered at one Tab or another: on a machine that is busy an answer may not come in the time that a Tab may take.
async fn offered(lab: &Lab, words: &[&str]) -> Vec<String> {
    answered(&mut asked(lab, words)).await
}

/// The first answer that offers something.
async fn answered(command: &mut Command) -> Vec<String> {
    let words = format!("{command:?}");
    eventually_found(&words, async || {
        let answer = answer(command).await;
        if answer.is_empty() { Err("nothing is offered".into()) } else { Ok(answer) }
    })
    .await
}

/// Nothing is offered.
async fn nothing_is_offered(lab: &Lab, words: &[&str]) {
    assert_eq!(answer(&mut asked(lab, words)).await, [""; 0], "{words:?}");
}

/// Two pipelines, one of them managed.
const TWO: &str = "
[pipelines.orders]
stream = 'flush:orders'
table = 'public.orders'
[pipelines.views]
stream = 'flush:{v}'
table = 'public.views'
counter_prefix = 'views'
mode = 'managed'
";

fn file(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).expect("written");
    path.to_str().expect("text").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_the_configuration_that_the_command_would_read_complete() {
    let lab = Lab::new().await;
    let folder = tempfile::tempdir().expect("a folder");
    let config = file(folder.path(), "two pipelines.toml", TWO);
    assert_eq!(offered(&lab, &["status", "--pipeline", ""]).await, ["counters"], "the default");
    let typed = format!("--config={config}");
    for words in [
        &["--config", &config, "status", "--pipeline", ""][..],
        &["status", &typed, "--pipeline", ""],
        // As bash has a word that was quoted.
        &["--config", &format!("'{config}'"), "pause", ""],
        &["migrate", &typed, "--retarget", ""],
    ] {
        assert_eq!(offered(&lab, words).await, ["orders", "views"], "{words:?}");
    }
    let mut by_variable = asked(&lab, &["tap", "--pipeline=o"]);
    assert_eq!(answered(by_variable.env("TIDEGATE_CONFIG", &config)).await, ["--pipeline=orders"]);
    assert_eq!(offered(&lab, &[&typed, "warm", "--top", "5", "--pipeline", ""]).await, ["views"], "managed ones alone");
    assert_eq!(offered(&lab, &[&typed, "dead", "list", "--stream", ""]).await, ["flush:orders", "flush:{v}"]);
    let of_one = ["dead", "list", "--pipeline", "views", "--stream", ""];
    assert_eq!(offered(&lab, &[&[&*typed], &of_one[..]].concat()).await, ["flush:{v}"]);
    let keys = offered(&lab, &[&typed, "config", "show", "pipelines.views"]).await;
    assert!(
        ["pipelines.views", "pipelines.views.stream"].iter().all(|key| keys.contains(&(*key).to_owned())),
        "{keys:?}"
    );
    assert_eq!(offered(&lab, &["config", "show", "batch.max_e"]).await, ["batch.max_entries", "batch.max_entry_bytes"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_program_knows_completes_and_options_where_a_dash_is_typed() {
    let lab = Lab::new().await;
    assert_eq!(offered(&lab, &["explain", "bad_"]).await, ["bad_key", "bad_amount", "bad_field"]);
    assert_eq!(offered(&lab, &["explain", "NOG"]).await, ["NOGROUP"]);
    assert_eq!(offered(&lab, &["explain", "42P01"]).await, ["42P01"]);
    let all = offered(&lab, &["explain", ""]).await;
    assert!(["D1", "78"].iter().all(|code| all.contains(&(*code).to_owned())), "{all:?}");
    assert!(!all.iter().any(|code| code.starts_with('-')), "{all:?}");
    assert_eq!(offered(&lab, &["runbook", "TidegateHal"]).await, ["TidegateHalted"]);
    assert_eq!(offered(&lab, &["dead", "list", "--reason", "over"]).await, ["oversized"]);
    assert_eq!(offered(&lab, &["bench", "--delivery", ""]).await, ["group", "exclusive"]);
    assert_eq!(offered(&lab, &["dead", "re"]).await, ["redrive", "reopen"]);
    assert!(offered(&lab, &["pause", "--"]).await.contains(&"--reason".to_owned()));
    // With a description, for shells that show one.
    for (shell, line) in [("zsh", "D24:an operator has paused"), ("fish", "D24\tan operator has paused")] {
        let lines = answered(asked(&lab, &["explain", "D24"]).env("_TIDEGATE_COMPLETE", shell)).await;
        assert!(lines.len() == 1 && lines[0].starts_with(line), "{lines:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_only_the_servers_know_complete() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.add("good", 5).await;
    let id = client.call(&["XADD", STREAM, "*", "id", "bad", "amount", "1.5"]).await.text().to_owned();
    lab.settle_everything().await;
    client.call(&["XADD", "flush:clicks", "*", "page", "a"]).await;
    client.call(&["XADD", STREAM, "*", "id", "a", "amount", "1"]).await;
    for (group, consumer) in [(GROUP, "here-1"), (GROUP, "there-2"), ("analytics", "other")] {
        client.call(&["XGROUP", "CREATE", STREAM, group, "0"]).await;
        client.call(&["XREADGROUP", "GROUP", group, consumer, "STREAMS", STREAM, ">"]).await;
    }
    let consumers = offered(&lab, &["pending", "--entries", "--consumer", ""]).await;
    assert!(["here-1", "there-2"].iter().all(|name| consumers.contains(&(*name).to_owned())), "{consumers:?}");
    assert!(!consumers.contains(&"other".to_owned()), "another group's: {consumers:?}");
    assert_eq!(offered(&lab, &["pending", "--consumer", "he"]).await, ["here-1"]);
    assert_eq!(offered(&lab, &["group", "repair", "--group", ""]).await, ["analytics"], "not the pipeline's own");
    assert_eq!(offered(&lab, &["pipeline", "new", "--stream", "flush:cl"]).await, ["flush:clicks"]);
    // What is begun is no pattern.
    nothing_is_offered(&lab, &["pipeline", "new", "--stream", "f*"]).await;
    assert_eq!(offered(&lab, &["pipeline", "new", "--table", "count"]).await, ["counters"]);
    assert_eq!(offered(&lab, &["pipeline", "new", "--table", "public.co"]).await, ["public.counters"]);
    assert_eq!(offered(&lab, &["dead", "show", &id[..3]]).await, [&*id]);
    nothing_is_offered(&lab, &["dead", "reopen", &id[..3]]).await;
    let mut renamed = asked(&lab, &["migrate", "--rename-pipeline", ""]);
    renamed
        .env("TIDEGATE__PIPELINES__CLICKS__STREAM", STREAM)
        .env("TIDEGATE__PIPELINES__CLICKS__TABLE", "public.counters");
    assert_eq!(answered(&mut renamed).await, ["counters="]);
    assert_eq!(offered(&lab, &["migrate", "--rename-pipeline", "old="]).await, ["old=counters"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_something_is_wrong_nothing_is_offered_nothing_is_said_and_nobody_waits() {
    let lab = Lab::new().await;
    lab.client().await.call(&["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
    let folder = tempfile::tempdir().expect("a folder");
    let (wrong, empty) =
        (file(folder.path(), "wrong.toml", "[batch]\nmax_entrys = 1\n"), file(folder.path(), "empty.toml", ""));
    let pipe = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo runs").success());
    let silent = Proxy::start(lab.valkey.port()).await;
    silent.hold(Way::ToClient);
    silent.hold(Way::ToServer);
    let nobody = free_port();
    let (folder, pipe) = (folder.path().to_str().expect("text"), pipe.to_str().expect("text"));
    let consumer = ["pending", "--consumer", ""];
    for (config, valkey) in [
        ("missing.toml", lab.valkey.url()),
        (folder, lab.valkey.url()),
        // Nobody ever writes to it, and a read of it does not end.
        (pipe, lab.valkey.url()),
        (&wrong, lab.valkey.url()),
        (&empty, format!("valkey://localhost:{nobody}")),
        (&empty, silent.url()),
        (&empty, lab.valkey.url().replace("://", "://nobody:hunter2@")),
        (&empty, format!("http://127.0.0.1:{}", lab.valkey.port())),
        (&empty, format!("valkey://127.0.0.1:{}", lab.postgres_port())),
    ] {
        let mut command = asked(&lab, &[&["--config", config], &consumer[..]].concat());
        command.env("VALKEY_URL", &valkey);
        // What waits for an answer elsewhere waits five seconds, each time; a machine that is busy holds up one try or another.
        let is_at_once = async || {
            let began = Instant::now();
            assert_eq!(answer(&mut command).await, [""; 0], "{config} {valkey}");
            began.elapsed().as_millis() < 2_500
        };
        eventually(&format!("at once: {config} {valkey}"), true, is_at_once).await;
    }
    nothing_is_offered(&lab, &["--config", &wrong, "status", "--pipeline", ""]).await;
    // PostgreSQL, too.
    let mut command = asked(&lab, &["pipeline", "new", "--table", ""]);
    assert_eq!(answer(command.env("DATABASE_URL", format!("postgres://a:b@localhost:{nobody}/c"))).await, [""; 0]);
    // Words that make no sense, and no words at all.
    for words in [&["pending", "--nonsense", "x", ""][..], &["nonsense", ""], &["explain", "\u{1b}[2J"], &[]] {
        answer(&mut asked(&lab, words)).await;
    }
    let mut none = lab.program_by_default(&["--"]);
    assert_eq!(answer(none.env("_TIDEGATE_COMPLETE", "bash")).await, [""; 0]);
    // A shell that does not listen any more.
    let closed = format!("exec {:?} -- tidegate explain '' >&-", program());
    let mut command = Command::new("bash");
    command.args(["-c", &closed]).env("_TIDEGATE_COMPLETE", "bash");
    assert_eq!(answer(&mut command).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tab_sends_no_telemetry_and_shows_no_secret() {
    let lab = Lab::new().await;
    let collector = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    collector.set_nonblocking(true).expect("set");
    let address = format!("http://{}", collector.local_addr().expect("an address"));
    for words in [&["run", "--"][..], &["pending", "--consumer", ""], &["config", "show", ""], &["demo", "--"]] {
        let mut command = asked(&lab, words);
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &address).env("TIDEGATE__TELEMETRY__OTLP_ENDPOINT", &address);
        command.env("DATABASE_URL", "postgres://me:hunter2@localhost:1/db").env("TIDEGATE_DEMO_VALKEY_URL", "hunter2");
        let lines = answer(&mut command).await;
        assert!(!lines.concat().contains("hunter2"), "{lines:?}");
    }
    assert_eq!(collector.accept().map_err(|error| error.kind()).err(), Some(std::io::ErrorKind::WouldBlock));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_variable_of_another_shell_keeps_no_command_from_running() {
    let lab = Lab::new().await;
    for (shell, arguments) in [("bash", &["explain", "D1"][..]), ("tcsh", &["explain", "D1"]), ("", &["explain", "D1"])]
    {
        let mut command = lab.program_by_default(arguments);
        let (code, stdout, stderr) = output(command.env("_TIDEGATE_COMPLETE", shell)).await;
        assert_eq!((code, stdout.starts_with("D1")), (0, true), "{shell}: {stderr}");
    }
}

/// A bash that has sourced the script, and calls it for each of these lines as it does at a Tab: what it would insert or list.
async fn in_bash(lab: &Lab, lines: &[&str]) -> Vec<Vec<String>> {
    let folder = program().parent().expect("a folder").to_str().expect("text").to_owned();
    let mut script = String::from(
        r#"source <(tidegate completions bash) || exit 1
        complete -p tidegate | grep -q -- '-F _tidegate tidegate' || exit 2
        # Words as bash splits them, at COMP_WORDBREAKS: $2 is what stands behind the last place.
        tab() {
            COMP_LINE=$1 COMP_POINT=${#1} COMP_WORDS=() COMPREPLY=()
            local rest=$1 word break='^[[:space:]]*([:=]|[^[:space:]:=]+)(.*)$'
            while [[ $rest =~ $break ]]; do COMP_WORDS+=("${BASH_REMATCH[1]}") rest=${BASH_REMATCH[2]}; done
            [[ -z $rest ]] || COMP_WORDS+=("")
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            word=${COMP_WORDS[COMP_CWORD]}
            [[ $word != [:=] ]] || word=
            _tidegate tidegate "$word" "" && printf '%s\n' "${COMPREPLY[@]}" && printf '\0'
        }
        "#,
    );
    for line in lines {
        script.push_str(&format!("tab '{line}'\n"));
    }
    let of_program = lab.program_by_default(&["--"]);
    let environment = of_program.as_std().get_envs().filter_map(|(name, value)| Some((name, value?)));
    let mut command = Command::new("bash");
    command.args(["--norc", "-c", &script]).env_clear().envs(environment).stdin(Stdio::null());
    let path = std::env::var("PATH").unwrap_or_default();
    let (code, stdout, stderr) = output(command.env("PATH", format!("{folder}:{path}"))).await;
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    let answers = stdout.split_terminator('\0');
    answers.map(|answer| answer.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bash_that_sources_the_script_completes_names_with_colons_and_quotes_those_of_others() {
    let lab = Lab::new().await;
    let mut client = lab.client().await;
    client.call(&["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
    client.call(&["XGROUP", "CREATECONSUMER", STREAM, GROUP, "host:1"]).await;
    client.call(&["XGROUP", "CREATECONSUMER", STREAM, GROUP, "host:2 $(reboot)"]).await;
    client.call(&["XGROUP", "CREATECONSUMER", STREAM, GROUP, "evil\nline"]).await;
    let lines = [
        ("tidegate stat", &["status"][..]),
        ("tidegate status --pipeline ", &["counters"]),
        ("tidegate status --pipeline=", &["counters"]),
        ("tidegate status --pipeline=cou", &["counters"]),
        ("tidegate dead list --stream fl", &["flush:counters"]),
        ("tidegate dead list --stream flush:", &["counters"]),
        ("tidegate  dead list  --stream=flush:co", &["counters"]),
        ("tidegate pending --consumer host:1", &["1"]),
        ("tidegate pending --consumer host:2", &[r"2\ \$\(reboot\)"]),
        // A name with a line's end cannot be typed.
        ("tidegate pending --consumer ev", &[]),
        ("tidegate explain NOGR", &["NOGROUP"]),
        ("tidegate pending --nonsense x", &[]),
    ];
    let expected = lines.map(|(_, answer)| answer.iter().map(|name| (*name).to_owned()).collect()).to_vec();
    eventually("all answers", expected, async || in_bash(&lab, &lines.map(|(line, _)| line)).await).await;
}
