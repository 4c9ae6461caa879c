//! What the configuration promises, one sentence a test.

use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use secrecy::ExposeSecret;
use tempfile::TempDir;

use super::kind::Kind;
use super::sections::{KEYS, RELATIONS};
use super::*;
use crate::model::pipeline::Table;

/// Sources for a test. The directory has the file, and is removed with the case.
struct Case {
    directory: TempDir,
    sources: Sources,
}

impl Case {
    fn new() -> Case {
        Case { directory: TempDir::new().expect("a directory"), sources: Sources::default() }
    }

    fn file(mut self, text: &str) -> Case {
        let path = self.directory.path().join("tidegate.toml");
        std::fs::write(&path, text).expect("written");
        self.sources.file = Some(path);
        self
    }

    fn env(mut self, name: &str, value: &str) -> Case {
        self.sources.env.insert(name.into(), value.into());
        self
    }

    fn flag(mut self, key: &str, text: &str) -> Case {
        self.sources.flags.push((key.into(), text.into()));
        self
    }

    fn load(&self, needs: Needs) -> Result<Loaded, Vec<String>> {
        // The directory has another name each time: sentences are compared without it.
        let prefix = format!("{}/", self.directory.path().display());
        load(&self.sources, needs)
            .map_err(|problems| problems.iter().map(|f| f.to_string().replace(&prefix, "")).collect())
    }

    fn config(&self) -> Config {
        self.load(Needs::NONE).unwrap_or_else(|problems| panic!("{}", problems.join("\n"))).config
    }

    fn problems(&self) -> Vec<String> {
        self.load(Needs::NONE).err().unwrap_or_default()
    }

    /// The only problem.
    fn problem(&self) -> String {
        let problems = self.problems();
        assert_eq!(problems.len(), 1, "{problems:#?}");
        problems[0].clone()
    }

    fn row(&self, key: &str) -> Row {
        let loaded = self.load(Needs::BOTH).unwrap_or_else(|problems| panic!("{}", problems.join("\n")));
        loaded.describe().iter().find(|row| row.key == key).unwrap_or_else(|| panic!("no row {key}")).clone()
    }
}

fn file(text: &str) -> Case {
    Case::new().file(text)
}

#[test]
fn without_any_source_the_defaults_hold_and_fit_each_other() {
    let config = Case::new().config();
    assert!(config.valkey.url.is_none() && config.postgres.url.is_none());
    assert_eq!(config.valkey.source, "main");
    assert_eq!(config.valkey.command_timeout, Duration::from_secs(5));
    assert_eq!(config.postgres.statement_timeout, Duration::from_secs(10));
    assert_eq!(config.postgres.lock_timeout, Duration::from_secs(5));
    assert_eq!(config.postgres.idle_in_transaction_timeout, Duration::from_secs(10));
    assert!((1..=256).contains(&config.run.workers));
    assert_eq!((config.batch.max_entries, config.batch.max_bytes), (40_000, 8 << 20));
    assert_eq!((config.batch.read_count, config.batch.max_entry_bytes), (1000, 1 << 20));
    assert_eq!(config.reclaim.dead_after, Duration::from_secs(30));
    assert_eq!(config.reclaim.gone_after, Duration::from_secs(2));
    assert_eq!(config.dead_letters.max_bytes, 1 << 20);
    assert_eq!((config.reclaim.sweep_every, config.reclaim.max_deliveries), (Duration::from_millis(500), 8));
    assert_eq!((config.trim.retention, config.trim.every), (Duration::from_secs(3600), Duration::from_secs(10)));
    assert_eq!((config.compact.margin, config.compact.every), (Duration::from_secs(3600), Duration::from_secs(10)));
    assert_eq!(config.stop.grace, Duration::from_secs(25));
    assert_eq!((config.log.format, config.log.level.as_str()), (LogFormat::Text, "info"));
    assert_eq!(config.pipelines, [Pipeline::counters()]);
}

#[test]
fn each_layer_overrides_the_one_below_and_is_shown_as_the_origin() {
    let base = || file("[valkey]\nurl = 'valkey://file'\n").env("DATABASE_URL", "postgres://db");
    assert_eq!(base().row("batch.read_count").origin, "default");
    assert!(base().row("valkey.url").origin.ends_with("tidegate.toml:2"));
    let case = base().env("VALKEY_URL", "valkey://short");
    assert_eq!(
        (case.row("valkey.url").value.as_str(), case.row("valkey.url").origin.as_str()),
        ("valkey://short", "env VALKEY_URL")
    );
    let case = case.env("TIDEGATE__VALKEY__URL", "valkey://long");
    assert_eq!(case.row("valkey.url").origin, "env TIDEGATE__VALKEY__URL");
    let case = case.flag("valkey.url", "valkey://flag1").flag("valkey.url", "valkey://flag2");
    assert_eq!(
        (case.row("valkey.url").value.as_str(), case.row("valkey.url").origin.as_str()),
        ("valkey://flag2", "flag")
    );
}

#[test]
fn the_file_of_the_flag_comes_before_the_file_of_the_variable() {
    let named = file("run.workers = 3");
    let path = named.sources.file.clone().expect("a file");
    let by_variable = Case::new().env("TIDEGATE_CONFIG", &path.display().to_string());
    assert_eq!(by_variable.config().run.workers, 3);
    let both = file("run.workers = 4").env("TIDEGATE_CONFIG", "/nowhere");
    assert_eq!(both.config().run.workers, 4);
    assert_eq!(Case::new().env("TIDEGATE_CONFIG", "").problems(), Vec::<String>::new());
}

#[test]
fn a_file_that_cannot_be_read_is_the_only_problem_and_has_its_own_kind() {
    let mut case = Case::new();
    case.sources.file = Some("/nowhere/tidegate.toml".into());
    let problems = case.load(Needs::BOTH).expect_err("refused");
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].starts_with("/nowhere/tidegate.toml: cannot be read"), "{}", problems[0]);
    let kind = |case: &Case| load(&case.sources, Needs::NONE).expect_err("refused").kind();
    assert_eq!(kind(&case), ProblemKind::Unreadable);
    assert_eq!(kind(&file("run.workers = 0")), ProblemKind::Invalid);
    assert_eq!(kind(&file("[run")), ProblemKind::Invalid);
}

#[test]
fn all_problems_of_all_layers_are_reported_at_once_with_their_places() {
    let case = file("[batch]\nmax_entries = 0\n\n[bacth]\nx = 1\n\n[reclaim]\ndead_after = 5\n")
        .env("TIDEGATE__LOG__FORMAT", "xml")
        .flag("run.workers", "many");
    let places: Vec<String> =
        case.problems().iter().map(|problem| problem.split(": ").next().expect("a place").to_owned()).collect();
    assert_eq!(places, ["tidegate.toml:2", "tidegate.toml:4", "tidegate.toml:8", "env TIDEGATE__LOG__FORMAT", "flag"]);
}

#[test]
fn each_problem_is_one_line() {
    let problems = load(&file("a = 1\nb = 2\n").sources, Needs::NONE).expect_err("refused");
    assert_eq!(problems.to_string().lines().count(), 2);
    assert_eq!(problems.iter().count(), 2);
}

#[test]
fn syntax_errors_are_reported_with_their_lines_and_without_quoting_secrets() {
    let problems = file("[valkey]\nurl = \"valkey://u:hunter2@h\nsource = main\n[batch\n").problems();
    assert!(problems.len() >= 2, "{problems:?}");
    assert!(problems[0].starts_with("tidegate.toml:2: is not TOML"), "{problems:?}");
    assert!(!problems.concat().contains("hunter2"), "{problems:?}");
}

#[test]
fn a_key_set_twice_in_a_file_is_a_problem() {
    assert!(file("[run]\nworkers = 1\nworkers = 2\n").problem().starts_with("tidegate.toml:3: is not TOML"));
}

#[test]
fn no_type_is_converted_and_nothing_is_rounded() {
    for bad in
        ["\"10\"", "10.7", "10.0", "true", "[10]", "{ x = 1 }", "-1", "1e3", "1979-05-27", "99999999999999999999"]
    {
        let case = file(&format!("batch.read_count = {bad}"));
        let problem = case.problems().first().cloned().unwrap_or_else(|| panic!("{bad} was accepted"));
        assert!(problem.contains("batch.read_count") || problem.contains("is not TOML"), "{bad}: {problem}");
    }
    for bad in ["10", "10.5", "true", "\"10\"", "\"1.5\"", "[]"] {
        assert!(file(&format!("reclaim.dead_after = {bad}")).problem().contains("reclaim.dead_after"), "{bad}");
    }
    for bad in ["\"1000\"", "1.5", "true", "\"8MB\""] {
        assert!(file(&format!("batch.max_bytes = {bad}")).problem().contains("batch.max_bytes"), "{bad}");
    }
    for bad in ["1", "true", "1.5"] {
        assert!(file(&format!("valkey.source = {bad}")).problem().contains("valkey.source"), "{bad}");
    }
    for bad in ["true", "10.7", " 10", "", "+10"] {
        assert!(Case::new().env("TIDEGATE__BATCH__READ_COUNT", bad).problem().contains("batch.read_count"), "{bad:?}");
        assert!(Case::new().flag("batch.read_count", bad).problem().contains("batch.read_count"), "{bad:?}");
    }
}

#[test]
fn whole_numbers_are_taken_in_every_notation_of_toml_and_as_plain_digits_elsewhere() {
    assert_eq!(file("batch.read_count = 1_500").config().batch.read_count, 1500);
    assert_eq!(file("batch.read_count = 0x10").config().batch.read_count, 16);
    assert_eq!(Case::new().env("TIDEGATE__BATCH__READ_COUNT", "1500").config().batch.read_count, 1500);
    assert_eq!(file("batch.max_bytes = 2097152").config().batch.max_bytes, 2 << 20);
    assert_eq!(file("batch.max_bytes = '2MiB'").config().batch.max_bytes, 2 << 20);
    assert_eq!(Case::new().env("TIDEGATE__BATCH__MAX_BYTES", "2097152").config().batch.max_bytes, 2 << 20);
}

#[test]
fn a_duration_without_a_unit_is_refused_with_an_example() {
    for case in [file("reclaim.dead_after = 30"), Case::new().env("TIDEGATE__RECLAIM__DEAD_AFTER", "30")] {
        assert!(case.problem().contains("reclaim.dead_after is 30 without a unit; write the unit, such as \"30s\""));
    }
}

#[test]
fn an_unknown_key_is_refused_with_a_suggestion() {
    assert_eq!(
        file("[batch]\nmax_entrys = 5\n").problem(),
        "tidegate.toml:2: unknown key batch.max_entrys; did you mean batch.max_entries?"
    );
    assert_eq!(
        file("\n[bacth]\na = 1\nb = 2\n").problem(),
        "tidegate.toml:2: unknown section [bacth]; did you mean [batch]?"
    );
    assert!(file("max_entries = 5").problem().contains("did you mean batch.max_entries?"));
    assert!(file("[valkey]\nlock_timeout = '1s'").problem().contains("did you mean postgres.lock_timeout?"));
    assert!(file("[pipelines.counters]\nsteam = 'x'").problem().contains("did you mean pipelines.counters.stream?"));
    assert!(file("valkey = 3").problem().contains("valkey is a section; write [valkey]"));
    assert!(Case::new().flag("batch.max_entrys", "5").problem().contains("did you mean batch.max_entries?"));
    assert!(!file("[valkey]\nur = 'valkey://u:hunter2@h'").problem().contains("hunter2"));
}

#[test]
fn an_unknown_variable_is_refused_with_a_suggestion() {
    let meant = |variable: &str| Case::new().env(variable, "5").problem();
    assert_eq!(
        meant("TIDEGATE__BATCH__MAX_ENTRYS"),
        "env TIDEGATE__BATCH__MAX_ENTRYS: sets no key; did you mean TIDEGATE__BATCH__MAX_ENTRIES?"
    );
    assert!(meant("TIDEGATE__batch__max_entries").contains("did you mean TIDEGATE__BATCH__MAX_ENTRIES?"));
    assert!(
        meant("TIDEGATE_BATCH_MAX_ENTRIES")
            .contains("did you mean TIDEGATE__BATCH__MAX_ENTRIES, with two underscores?")
    );
    assert!(meant("TIDEGATE__SKY").contains("sets no key"));
    assert!(meant("TIDEGATE__PIPELINES__COUNTERS__STEAM").contains("TIDEGATE__PIPELINES__COUNTERS__STREAM?"));
}

#[test]
fn variables_of_other_programs_are_ignored() {
    let case = Case::new()
        .env("TIDEGATE_SERVICE_HOST", "10.0.0.1")
        .env("TIDEGATE_PORT_9090_TCP", "tcp://10.0.0.1:9090")
        .env("HOME", "/root")
        .env("VALKEY_URL", "")
        .env("DATABASE_URL", "");
    assert_eq!(case.problems(), Vec::<String>::new());
}

#[test]
fn a_variable_that_is_not_utf8_is_refused() {
    assert!(Case::new().env("TIDEGATE__PIPELINES__COUNTERS__STREAM", "a\u{fffd}").problem().contains("is not UTF-8"));
}

#[test]
fn an_invalid_value_is_a_problem_even_if_a_stronger_layer_overrides_it() {
    let case = file("run.workers = 0").flag("run.workers", "2");
    assert!(case.problem().starts_with("tidegate.toml:1: run.workers is 0"));
}

#[test]
fn every_relation_is_checked_and_names_both_keys_both_values_and_both_origins() {
    let cases = [
        ("postgres.statement_timeout = '30s'", "postgres.statement_timeout (30s", "reclaim.dead_after (30s, default)"),
        ("postgres.lock_timeout = '11s'", "postgres.lock_timeout (11s", "postgres.statement_timeout (10s, default)"),
        (
            "postgres.idle_in_transaction_timeout = '30s'",
            "postgres.idle_in_transaction_timeout (30s",
            "reclaim.dead_after (30s, default)",
        ),
        ("reclaim.gone_after = '31s'", "reclaim.gone_after (31s", "reclaim.dead_after (30s, default)"),
        ("dead_letters.max_bytes = '9MiB'", "dead_letters.max_bytes (9MiB", "batch.max_bytes (8MiB, default)"),
        ("reclaim.sweep_every = '31s'", "reclaim.sweep_every (31s", "reclaim.dead_after (30s, default)"),
        ("batch.read_count = 40001", "batch.read_count (40001", "batch.max_entries (40000, default)"),
        ("batch.max_entry_bytes = '9MiB'", "batch.max_entry_bytes (9MiB", "batch.max_bytes (8MiB, default)"),
        ("stop.grace = '10s'", "postgres.statement_timeout (10s, default)", "stop.grace (10s"),
        ("compact.margin = '29s'", "reclaim.dead_after (30s, default)", "compact.margin (29s"),
    ];
    assert_eq!(cases.len(), RELATIONS.len());
    for (text, lesser, greater) in cases {
        let problems = file(text).problems();
        let problem =
            problems.iter().find(|problem| problem.contains(lesser)).unwrap_or_else(|| panic!("{text}: {problems:?}"));
        assert!(problem.contains(greater), "{problem}");
        assert!(problem.starts_with("tidegate.toml:1: "), "{problem}");
    }
}

#[test]
fn equal_values_are_accepted_where_the_relation_says_at_most() {
    let text = "[postgres]\nstatement_timeout = '900ms'\nlock_timeout = '900ms'\nidle_in_transaction_timeout = '999ms'\n\
        [reclaim]\ndead_after = '1s'\nsweep_every = '1s'\ngone_after = '1s'\n[batch]\nmax_entries = 10\nread_count = 10\nmax_bytes = 1024\n\
        max_entry_bytes = 1024\n[dead_letters]\nmax_bytes = 1024\n[compact]\nmargin = '1s'\n[stop]\ngrace = '901ms'\n[trim]\nretention = '0s'\n";
    assert_eq!(file(text).problems(), Vec::<String>::new());
}

#[test]
fn no_relation_is_checked_against_a_value_that_was_refused() {
    // With the default of 30 s this margin would be too short, but the value that was meant is unknown.
    assert!(file("reclaim.dead_after = 1\ncompact.margin = '5s'").problem().contains("write the unit"));
}

#[test]
fn a_missing_url_is_a_problem_for_the_verbs_that_need_it() {
    let case = Case::new().env("DATABASE_URL", "postgres://db/app");
    assert!(case.load(Needs::POSTGRES).is_ok());
    assert!(case.load(Needs::NONE).is_ok());
    for needs in [Needs::BOTH, Needs::VALKEY] {
        let problems = case.load(needs).expect_err("refused");
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with("configuration: valkey.url is missing; set VALKEY_URL"), "{}", problems[0]);
    }
    let config = case.config();
    assert_eq!(config.postgres.address().expect("set").url.expose_secret(), "postgres://db/app");
    assert!(config.valkey.address().expect_err("missing").to_string().contains("set VALKEY_URL"));
}

#[test]
fn a_url_is_read_from_its_file() {
    let case = Case::new().env("DATABASE_URL", "postgres://db/app");
    let path = case.directory.path().join("secret");
    std::fs::write(&path, "valkey://u:hunter2@h:6379\n").expect("written");
    let case = case.flag("valkey.url_file", &path.display().to_string());
    let loaded = case.load(Needs::BOTH).expect("valid");
    assert_eq!(loaded.config.valkey.address().expect("set").url().expose_secret(), "valkey://u:hunter2@h:6379");
    assert_eq!(case.row("valkey.url").value, "valkey://u:***@h:6379");
    assert_eq!(case.row("valkey.url").origin, format!("file {}", path.display()));

    for (content, complaint) in
        [("", "is empty"), ("hunter2", "is not a url"), ("http://u:hunter2@h", "another scheme")]
    {
        std::fs::write(&path, content).expect("written");
        let problems = case.load(Needs::BOTH).expect_err("refused");
        assert!(
            problems.len() == 1 && problems[0].contains("valkey.url_file") && problems[0].contains(complaint),
            "{problems:?}"
        );
        assert!(!problems[0].contains("hunter2"), "{problems:?}");
    }
    std::fs::remove_file(&path).expect("removed");
    assert!(case.load(Needs::BOTH).expect_err("refused")[0].contains("cannot be read"));
    assert!(case.load(Needs::POSTGRES).is_ok(), "a url that is not needed is not looked for");
}

#[test]
fn a_password_may_have_any_percent_encoded_character() {
    for password in (0..=127u8).map(|byte| format!("p%{byte:02X}w")).chain(["p%20w".into(), "%e2%82%ac".into()]) {
        let urls = [format!("valkey://user:{password}@h:6379/0"), format!("postgres://user:{password}@h/db")];
        let case = Case::new().env("VALKEY_URL", &urls[0]).env("DATABASE_URL", &urls[1]);
        let Config { valkey, postgres, .. } = case.load(Needs::BOTH).expect(&password).config;
        // The url stays as it was written; the client decodes it.
        assert_eq!(valkey.address().expect("set").url().expose_secret(), urls[0]);
        assert_eq!(postgres.address().expect("set").url.expose_secret(), urls[1]);
        assert_eq!(case.row("valkey.url").value, "valkey://user:***@h:6379/0");
        assert_eq!(case.row("postgres.url").value, "postgres://user:***@h/db");
    }
}

#[test]
fn a_url_and_its_file_together_are_a_problem_unless_one_is_empty() {
    let case = file("[valkey]\nurl_file = '/run/secrets/valkey'\n").env("VALKEY_URL", "valkey://u:hunter2@h");
    let problem = case.problem();
    assert!(
        problem.contains("valkey.url (env VALKEY_URL) and valkey.url_file (tidegate.toml:2) are both set"),
        "{problem}"
    );
    let emptied = case.env("TIDEGATE__VALKEY__URL_FILE", "");
    assert!(emptied.load(Needs::VALKEY).is_ok());
}

#[test]
fn no_secret_is_in_any_debug_row_or_problem() {
    let case = file("[valkey]\nurl = 'valkey://u:hunter2@h'\n")
        .env("DATABASE_URL", "postgres://u:hunter2@h/db")
        .flag("postgres.url", "postgres://u:hunter2@h/db?password=hunter2");
    let loaded = case.load(Needs::BOTH).expect("valid");
    let everything = format!("{loaded:?} {:?} {:?}", loaded.describe(), case.sources);
    assert!(!everything.contains("hunter2"), "{everything}");
    assert!(everything.contains("valkey://u:***@h"), "the host is to be seen");
    let problems =
        file("valkey.url = 'valkey-cluster://u:hunter2@h,x'\nvalkey.source = 'valkey://u:hunter2@h'").problems();
    assert!(problems.len() == 2 && !problems.concat().contains("hunter2"), "{problems:?}");
    let misplaced =
        Case::new().flag("valkey.url_file", "valkey://u:hunter2@h").load(Needs::VALKEY).expect_err("refused");
    assert!(!misplaced.concat().contains("hunter2"), "{misplaced:?}");
}

#[test]
fn the_counters_pipeline_can_be_changed_key_by_key() {
    let case = file("[pipelines.counters]\ntable = 'app.totals'\nupdated_at_column = ''\n")
        .env("TIDEGATE__PIPELINES__COUNTERS__STREAM", "flush:totals");
    let expected = Pipeline {
        stream: "flush:totals".into(),
        table: Table::parse("app.totals").expect("valid"),
        updated_at: None,
        ..Pipeline::counters()
    };
    assert_eq!(case.config().pipelines, [expected]);
}

#[test]
fn another_pipeline_needs_a_stream_and_a_table_and_replaces_counters() {
    let problems = file("[pipelines.orders]\nvalue_column = 'total'\n").problems();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].starts_with("tidegate.toml:1: pipelines.orders.stream is missing; write"), "{problems:?}");
    assert!(problems[1].contains("pipelines.orders.table is missing"), "{problems:?}");
    let config = file("[pipelines.order-totals]\nstream = 's'\ntable = 'totals'\n").config();
    assert_eq!(config.pipelines.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["order-totals"]);
    assert_eq!(config.pipelines[0].table.to_string(), "public.totals");
}

#[test]
fn an_empty_pipeline_section_is_not_ignored() {
    assert_eq!(file("[pipelines.orders]\n").problems().len(), 2);
    assert_eq!(file("[pipelines.counters]\n").config().pipelines, [Pipeline::counters()]);
    assert_eq!(file("[pipelines]\n").config().pipelines, [Pipeline::counters()]);
}

#[test]
fn a_misspelt_pipeline_name_gets_a_suggestion() {
    let problem = Case::new().env("TIDEGATE__PIPELINES__CUONTERS__STREAM", "x").problem();
    assert!(problem.contains("pipelines.cuonters.table is missing"), "{problem}");
    assert!(problem.contains("did you mean the pipeline counters?"), "{problem}");
}

#[test]
fn a_variable_finds_a_pipeline_with_hyphens_and_capitals_in_its_name() {
    let text = "[pipelines.Order-Totals]\nstream = 's'\ntable = 't'\n";
    let variable = "TIDEGATE__PIPELINES__ORDER_TOTALS__STREAM";
    let config = file(text).env(variable, "other").config();
    assert_eq!((config.pipelines[0].name.as_str(), config.pipelines[0].stream.as_str()), ("Order-Totals", "other"));
    let twins = format!("{text}[pipelines.order_totals]\nstream = 's2'\ntable = 't'\n");
    assert!(file(&twins).env(variable, "other").problem().contains("Order-Totals or order_totals"));
}

#[test]
fn shards_that_would_all_lie_in_one_slot_are_refused() {
    let text = |shards| format!("[pipelines.counters]\nstream = 'flush:{{likes}}'\nshards = {shards}\n");
    assert!(
        file(&text(2))
            .problem()
            .contains("would keep them all in one slot of a cluster; write a stream without braces")
    );
    assert_eq!(file(&text(1)).config().pipelines[0].counter_of("a"), "counter:{likes}:a");
}

#[test]
fn two_pipelines_with_one_stream_and_one_table_are_refused() {
    let text = "[pipelines.a]\nstream = 's'\ntable = 't'\n[pipelines.b]\nstream = 's'\ntable = 'public.t'\n";
    let problem = file(text).problem();
    assert!(problem.starts_with("tidegate.toml:4: pipelines a and b both feed public.t from s"), "{problem}");
    assert_eq!(file(&text.replace("'public.t'", "'other.t'")).config().pipelines.len(), 2);
    assert_eq!(file(&text.replacen("'s'", "'r'", 1)).config().pipelines.len(), 2);
}

#[test]
fn a_field_has_one_role_and_is_not_one_that_producers_fill() {
    assert!(file("[pipelines.counters]\nvalue_field = 'id'\n").problem().contains("uses one field twice"));
    for field in ["op", "traceparent"] {
        let problem = file(&format!("[pipelines.counters]\nkey_field = '{field}'\n")).problem();
        assert!(problem.contains("which producers fill"), "{problem}");
    }
}

#[test]
fn one_column_cannot_have_two_roles() {
    assert!(file("[pipelines.counters]\nvalue_column = 'id'\n").problem().contains("uses the column id twice"));
    assert!(
        file("[pipelines.counters]\nupdated_at_column = 'value'\n").problem().contains("uses the column value twice")
    );
}

#[test]
fn columns_are_said_in_one_way_and_have_fields_that_producers_do_not_fill() {
    let columns = |text: &str| file(&format!("[pipelines.counters]\n{text}\n"));
    assert!(
        columns("keys = 'a, b'\nkey_column = 'a'").problem().contains("has keys and key_column; write one of them")
    );
    assert!(columns("values = 'v = count()'\nvalue_field = 'a'").problem().contains("has values and value_field"));
    assert!(columns("values = 'v = last(op) by w'").problem().contains("uses the field op, which producers fill"));
    assert!(columns("keys = 'd = day(at, Europe/Berln)'").problem().contains("Europe/Berln"));
    assert!(
        columns("keys = 'a, b'\nmode = 'managed'")
            .problem()
            .contains("is managed, and its rows are more than a counter each")
    );
    assert!(
        columns("write = 'delete_zero'\nvalues = 'm = max(x)'")
            .problem()
            .contains("the value m, which would be forgotten")
    );
    // What is said in another way and means the same is the same.
    assert_eq!(columns("keys = 'id'\nvalues = 'value = sum(amount)'").config().pipelines, [Pipeline::counters()]);
    let pipeline = columns("keys = 'id, day = day()'").config().pipelines.swap_remove(0);
    assert_eq!(
        pipeline.mapping(),
        "keys=\"id = id: text, day = day(, UTC)\" values=\"value = sum(amount: bigint)\" updated_at=updated_at write=merge"
    );
}

#[test]
fn a_pipeline_that_goes_with_another_one_reads_its_stream() {
    let text = "[pipelines.counters]\nshards = 4\n[pipelines.daily]\nwith = 'counters'\ntable = 'daily'\nkeys = 'id, day = day()'\n";
    let case = file(text);
    let pipelines = case.config().pipelines;
    let tables: Vec<String> = pipelines[0].targets().iter().map(|target| target.table.to_string()).collect();
    assert_eq!((pipelines.len(), tables), (1, vec!["public.counters".into(), "public.daily".into()]));
    assert!(pipelines[0].is_counter(), "its own table still has a counter a row");
    let loaded = case.load(Needs::NONE).expect("valid");
    let shards = loaded.describe().iter().find(|row| row.key == "pipelines.daily.shards").map(|row| row.value.as_str());
    assert_eq!(shards, Some("4"), "as the pipeline that it goes with");
    for (instead, said) in [
        ("with = 'daily'", "goes with daily, which reads no stream itself"),
        ("with = 'countres'", "is no pipeline; did you mean counters?"),
        ("with = 'counters'\nshards = 2", "which says shards for both; leave shards out"),
    ] {
        let problem = file(&text.replace("with = 'counters'", instead)).problem();
        assert!(problem.contains(said), "{problem}");
    }
    let same = file(&text.replace("table = 'daily'", "table = 'counters'")).problem();
    assert!(same.contains("both feed public.counters"), "{same}");
}

#[test]
fn a_pipeline_s_name_is_checked_wherever_it_is_written() {
    assert!(file("[pipelines.'a b']\nstream = 's'\n").problem().contains("cannot name a pipeline"));
    assert!(Case::new().env("TIDEGATE__PIPELINES__1A__STREAM", "s").problem().contains("cannot name a pipeline"));
    assert!(Case::new().flag("pipelines.1a.stream", "s").problem().contains("cannot name a pipeline"));
    assert!(file("pipelines.a = 1").problem().contains("pipelines.a is a section"));
}

/// The keys of an acceptance, each with a value.
const ACCEPTED: [(&str, &str); 3] = [("finding", "D1"), ("until", "2027-01-31"), ("reason", "staging; OPS-1234")];

/// A file with an acceptance.
const ACCEPTING: &str = "[[doctor.accept]]\nfinding = 'D1'\nuntil = '2027-01-31'\nreason = 'staging; OPS-1234'\n";

#[test]
fn an_acceptance_has_a_finding_an_end_and_a_reason() {
    assert!(Case::new().config().accepted.is_empty());
    let accepted = file(ACCEPTING).config().accepted;
    let [Acceptance { finding, until, reason }] = &accepted[..] else { panic!("{accepted:?}") };
    assert_eq!(
        (finding.as_str(), until.to_string(), reason.as_str()),
        ("D1", "2027-01-31".into(), "staging; OPS-1234")
    );
    // A date of TOML is as good as a text, and so is a list in one line.
    let inline = "doctor.accept = [{ finding = 'D1', until = 2027-01-31T20:00:00+02:00, reason = 'staging' }]";
    assert_eq!(file(inline).config().accepted[0].until.to_string(), "2027-01-31T18:00:00Z");
    let case = file(ACCEPTING).env("TIDEGATE__DOCTOR__ACCEPT__1__UNTIL", "2027-02-28");
    assert_eq!(case.config().accepted[0].until.to_string(), "2027-02-28");
    let rows = case.load(Needs::NONE).expect("valid");
    let row = rows.describe().iter().find(|row| row.key == "doctor.accept.1.finding").expect("a row");
    assert_eq!((row.value.as_str(), row.origin.ends_with("tidegate.toml:2")), ("D1", true), "{row:?}");
    // For a reload: what is another one now.
    let changes = file(ACCEPTING).load(Needs::NONE).expect("valid").changes(&rows);
    assert_eq!(changes.iter().map(|change| change.key.as_str()).collect::<Vec<_>>(), ["doctor.accept.1.until"]);
}

#[test]
fn an_acceptance_that_lacks_something_is_refused_where_it_stands() {
    for (leaf, _) in ACCEPTED {
        let less: String =
            ACCEPTING.lines().filter(|line| !line.starts_with(leaf)).map(|line| format!("{line}\n")).collect();
        let problem = file(&format!("\n{less}")).problem();
        assert!(
            problem.starts_with(&format!("tidegate.toml:2: doctor.accept.1.{leaf} is missing; write")),
            "{problem}"
        );
    }
    for (instead, told) in [
        (
            "finding = 'D9'",
            "tidegate.toml:2: doctor.accept.1.finding is \"D9\"; write D1, the finding that can be accepted",
        ),
        ("until = 'soon'", "tidegate.toml:3: doctor.accept.1.until is \"soon\"; write a date such as 2027-01-31"),
        ("until = 2027-01-31T18:00:00", "tidegate.toml:3: doctor.accept.1.until is \"2027-01-31T18:00:00\"; write"),
        ("until = 20270131", "tidegate.toml:3: doctor.accept.1.until is a number; write a date"),
        ("reason = ' '", "tidegate.toml:4: doctor.accept.1.reason is \" \"; write 1 to 512 bytes"),
        ("reason = ''", "tidegate.toml:4: doctor.accept.1.reason is \"\"; write"),
        ("raeson = 'x'", "tidegate.toml:4: unknown key doctor.accept.1.raeson; did you mean doctor.accept.1.reason?"),
    ] {
        let key = instead.split(' ').next().expect("a key").replace("raeson", "reason");
        let lines = ACCEPTING.lines().map(|line| if line.starts_with(&key) { instead } else { line });
        let problems = file(&lines.collect::<Vec<_>>().join("\n")).problems();
        assert!(problems[0].starts_with(told), "{problems:?}");
    }
    let twice = file(&format!("{ACCEPTING}{ACCEPTING}")).problem();
    assert_eq!(twice, "tidegate.toml:5: doctor.accept.2 accepts D1 a second time; remove one of them");
}

#[test]
fn what_is_no_acceptance_is_told_how_one_is_written() {
    for bad in ["[doctor.accept]\nfinding = 'D1'", "doctor.accept = 'D1'", "doctor.accept = ['D1']"] {
        assert!(
            file(bad).problem().contains("write [[doctor.accept]] and the keys finding, until and reason"),
            "{bad}"
        );
    }
    assert!(file("[doctor]\naccpet = 1").problem().contains("unknown key doctor.accpet"));
    assert!(file("doctor = 1").problem().contains("doctor is a section"));
    assert!(file("[[docter.accept]]\nfinding = 'D1'").problem().contains("did you mean [doctor]?"));
    for (variable, meant) in [("0__REASON", "1__REASON"), ("X__REASON", "1__REASON"), ("1__RAESON", "1__REASON")] {
        let problem = Case::new().env(&format!("TIDEGATE__DOCTOR__ACCEPT__{variable}"), "x").problem();
        assert!(problem.ends_with(&format!("did you mean TIDEGATE__DOCTOR__ACCEPT__{meant}?")), "{problem}");
    }
    assert!(
        Case::new().env("TIDEGATE__DOCTOR__ACCEPT__2__REASON", "x").problems().len() == 2,
        "the others are missing"
    );
}

#[test]
fn describe_has_one_row_for_every_key_of_every_pipeline() {
    let case = file("[pipelines.a]\nstream = 's'\ntable = 't'\n[pipelines.b]\nstream = 'r'\ntable = 't'\n");
    let loaded = case.load(Needs::NONE).expect("valid");
    let paths: Vec<&str> = loaded.describe().iter().map(|row| row.key.as_str()).collect();
    let of_all = || KEYS.iter().filter(|key| !key.is_of_acceptances());
    let expected: usize = of_all().map(|key| if key.is_of_pipelines() { 2 } else { 1 }).sum();
    assert_eq!(paths.len(), expected);
    assert!(of_all().all(|key| paths.contains(&key.path("b").as_str())));
}

#[test]
fn every_key_can_be_set_by_the_variable_of_its_name() {
    for key in KEYS {
        let path = key.path(if key.is_of_acceptances() { "1" } else { "counters" });
        let variable_of = |path: &str| format!("TIDEGATE__{}", path.to_uppercase().replace('.', "__"));
        let variable = variable_of(&path);
        let text = match key.kind.is_secret() {
            true if path.starts_with("valkey") => "valkey://h".to_owned(),
            true if path.starts_with("postgres") => "postgres://h".to_owned(),
            true => "0123456789abcdef".to_owned(),
            false if key.is_of_acceptances() => {
                ACCEPTED.iter().find(|(leaf, _)| path.ends_with(leaf)).expect("a value").1.into()
            }
            false => key.default.unwrap_or_default().to_owned(),
        };
        let mut case = Case::new().env(&variable, &text);
        if key.is_of_acceptances() {
            // One that lacks a key is refused.
            for (leaf, text) in ACCEPTED {
                case = case.env(&variable_of(&format!("doctor.accept.1.{leaf}")), text);
            }
        }
        let loaded = case.load(Needs::NONE).expect("valid");
        let row = loaded.describe().iter().find(|row| row.key == path).expect("a row");
        assert_eq!(row.origin, format!("env {variable}"));
    }
}

#[test]
fn every_word_of_a_choice_is_a_value() {
    for key in KEYS {
        let Kind::Choice(words) = &key.kind else { continue };
        for word in *words {
            let path = key.path("counters");
            let loaded = Case::new().flag(&path, word).load(Needs::NONE).expect(word);
            assert!(loaded.describe().iter().any(|row| row.key == path && row.value == *word));
        }
    }
}

#[test]
fn every_key_is_a_field_of_the_configuration() {
    let config = format!("{:?}", Case::new().config());
    for key in KEYS.iter().filter(|key| !key.is_of_pipelines() && !key.is_of_acceptances()) {
        let (section, field) = key.name.split_once('.').expect("a section and a field");
        let (_, fields) = config.split_once(&format!("{section}: ")).unwrap_or_else(|| panic!("{section} is no field"));
        let (fields, _) = fields.split_once('}').expect("an end");
        assert!(fields.contains(&format!(" {field}: ")), "{section} has no field {field}");
    }
}

#[test]
fn the_examples_in_the_document_are_valid() {
    let document = include_str!("../../docs/configuration.md");
    let examples: Vec<&str> =
        document.split("```toml\n").skip(1).map(|rest| rest.split("```").next().expect("an end")).collect();
    assert!(!examples.is_empty());
    for example in examples {
        assert_eq!(file(example).problems(), Vec::<String>::new(), "{example}");
    }
}

#[test]
fn a_file_has_a_limit() {
    let case = file(&format!("# {}\n", "x".repeat(1 << 20)));
    assert!(case.problem().contains("larger than"));
}

#[test]
fn only_variables_that_concern_tidegate_are_taken_from_the_process() {
    let sources = Sources::from_process(Some(Path::new("f.toml").into()), vec![("run.workers".into(), "1".into())]);
    assert_eq!(sources.file.as_deref(), Some(Path::new("f.toml")));
    assert_eq!(sources.flags.len(), 1);
    let ours = |name: &String| name.starts_with("TIDEGATE_") || name == "VALKEY_URL" || name == "DATABASE_URL";
    assert!(sources.env.keys().all(ours));
}

proptest! {
    #[test]
    fn any_input_gives_a_configuration_or_sentences(
        file in r#"(\[?\[?(batch|run|trim|pipelines|doctor|doctor\.accept|[a-z.]{0,9})\]?\]?\n|[a-z_.]{0,14} ?= ?("[^"\n]{0,9}"|[0-9]{0,20}|true|\[\]|\{\})\n){0,6}"#,
        variables in prop::collection::btree_map("TIDEGATE(__[A-Z_]{0,12}){0,4}|VALKEY_URL|DATABASE_URL", ".{0,30}", 0..5),
        flags in prop::collection::vec(("[a-z_.]{0,20}", ".{0,20}"), 0..3),
    ) {
        let mut case = Case::new().file(&file);
        case.sources.env.extend(variables);
        case.sources.flags.extend(flags);
        if let Err(sentences) = case.load(Needs::BOTH) {
            prop_assert!(!sentences.is_empty() && sentences.iter().all(|sentence| !sentence.is_empty()));
        }
    }
}
