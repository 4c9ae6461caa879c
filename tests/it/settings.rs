//! `tidegate check`, `config show`, `completions` and `man`.

use crate::contract::assert_fits;
use crate::harness::{Lab, output};

#[tokio::test(flavor = "multi_thread")]
async fn every_value_is_shown_with_its_origin_and_no_secret() {
    let lab = Lab::new().await;
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "[batch]\nmax_entries = 5_000\n").expect("written");
    let show = |arguments: &[&str]| {
        let mut command = lab.program_by_default(&[&["config", "show"], arguments].concat());
        command.env("TIDEGATE_CONFIG", file.path()).env("DATABASE_URL", "postgres://me:hunter2@localhost/db");
        command.env("TIDEGATE__RUN__WORKERS", "3");
        command
    };
    let (code, stdout, stderr) = output(&mut show(&["--origin"])).await;
    assert_eq!(code, 0, "{stderr}");
    let line = |key: &str| stdout.lines().find(|line| line.starts_with(key)).unwrap_or_default().to_owned();
    let words = line("batch.max_entries").split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words, ["batch.max_entries", "5000", &*format!("{}:2", file.path().display())], "{stdout}");
    assert!(line("run.workers").ends_with("env TIDEGATE__RUN__WORKERS"), "{stdout}");
    assert!(line("trim.retention").ends_with("default"), "{stdout}");
    assert!(
        line("postgres.url ").contains("postgres://me:***@localhost/db") && !stdout.contains("hunter2"),
        "{stdout}"
    );
    let (_, stdout, _) = output(show(&["--changed", "run", "batch"]).args(["--output", "json"])).await;
    let settings: serde_json::Value = serde_json::from_str(&stdout).expect("JSON");
    assert_fits("config-show", &settings);
    let keys: Vec<_> = settings["settings"].as_array().expect("a list").iter().map(|s| s["key"].clone()).collect();
    assert_eq!(keys, ["run.workers", "batch.max_entries"]);
    assert_eq!(output(&mut show(&["nonsense"])).await.0, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_and_manual_pages_know_every_command() {
    let lab = Lab::new().await;
    let (_, help, _) = output(&mut lab.program(&["--help"])).await;
    let verbs: Vec<&str> = help
        .split("Commands:")
        .nth(1)
        .and_then(|rest| rest.split("Options:").next())
        .expect("a list of commands")
        .lines()
        .filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next().filter(|_| !line.starts_with("   ")))
        .filter(|verb| *verb != "help")
        .collect();
    assert!(verbs.len() > 20, "{verbs:?}");
    for shell in ["bash", "zsh", "fish"] {
        let (code, script, _) = output(&mut lab.program(&["completions", shell])).await;
        assert!(code == 0 && script.contains(&format!("_TIDEGATE_COMPLETE={shell}")), "{script}");
        // What the script asks for at a Tab.
        let (_, stdout, _) = output(lab.program(&["--", "tidegate", ""]).env("_TIDEGATE_COMPLETE", shell)).await;
        let offered: Vec<&str> = stdout.lines().filter_map(|line| line.split([':', '\t']).next()).collect();
        verbs.iter().for_each(|verb| assert!(offered.contains(verb), "{shell} does not know {verb}: {offered:?}"));
    }
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().join("man");
    let (code, _, stderr) = output(&mut lab.program(&["man", "--out", place.to_str().expect("text")])).await;
    assert_eq!(code, 0, "{stderr}");
    for verb in &verbs {
        let page = std::fs::read_to_string(place.join(format!("tidegate-{verb}.1"))).unwrap_or_default();
        assert!(page.contains(".SH NAME"), "{verb} has a page");
    }
    let (code, page, _) = output(&mut lab.program(&["man"])).await;
    assert!(code == 0 && page.contains(".SH SUBCOMMANDS"), "{page}");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_tells_every_fault_and_hides_every_secret() {
    let lab = Lab::new().await;
    let mut command = lab.program(&["check", "--print"]);
    command.env("DATABASE_URL", "postgres://me:hunter2@localhost/db");
    let (code, stdout, stderr) = output(&mut command).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("postgres://me:***@localhost/db") && !stdout.contains("hunter2"), "{stdout}");
    let mut command = lab.program(&["check"]);
    command.env("TIDEGATE__BATCH__MAX_ENTRYS", "5").env("TIDEGATE__RUN__WORKERS", "two");
    let (code, _, stderr) = output(&mut command).await;
    assert_eq!(code, 78);
    assert!(stderr.contains("did you mean") && stderr.contains("run.workers"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_verb_ends_with_66_if_a_configuration_file_cannot_be_read() {
    let lab = Lab::new().await;
    for verb in ["check", "run", "migrate", "produce"] {
        let (code, _, stderr) = output(&mut lab.program(&[verb, "--config", "missing.toml"])).await;
        assert_eq!(code, 66, "{verb}: {stderr}");
        assert!(stderr.contains("missing.toml: cannot be read"), "{verb}: {stderr}");
    }
}
