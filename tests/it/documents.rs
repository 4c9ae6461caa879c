//! Commands in documents and workflows can be typed as they stand: their verbs, options and values are those of the program, their words for
//! `make` those of the Makefile. What they do is shown by the tests that type them (pages).

use std::collections::BTreeSet;
use std::path::Path;

use clap::{CommandFactory, Parser};
use tidegate::ops::cli::Cli;

use crate::repository::rust_files;

pub(crate) const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Documents and workflows: their names and texts.
pub(crate) fn texts() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for folder in ["", "docs", "docs/runbooks", ".github/workflows"] {
        for file in std::fs::read_dir(format!("{ROOT}/{folder}")).expect("a folder") {
            let name = file.expect("a file").file_name().into_string().expect("a name in text");
            if name.ends_with(".md") || name.ends_with(".yml") && !folder.is_empty() {
                let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
                found.push((path.clone(), std::fs::read_to_string(format!("{ROOT}/{path}")).expect("text")));
            }
        }
    }
    assert!(found.len() > 30, "where are the documents? {found:?}");
    found
}

/// The table that stands in the document between its marker and the end.
pub(crate) fn documented(document: &str, marker: &str, table: &str) {
    let path = Path::new(ROOT).join(document);
    let text = std::fs::read_to_string(&path).expect("the document");
    let begin = format!("<!-- {marker} -->\n");
    let (before, rest) = text.split_once(&begin).expect("the marker");
    let (inside, after) = rest.split_once("<!-- end -->").expect("the end");
    if std::env::var_os("TIDEGATE_UPDATE_DOCS").is_some() {
        std::fs::write(&path, format!("{before}{begin}{table}<!-- end -->{after}")).expect("written");
    } else {
        assert_eq!(inside, table, "{document} differs from the program: run this test with TIDEGATE_UPDATE_DOCS=1");
    }
}

/// The lines of a document's blocks of this language, those that end with a backslash put together with what follows.
fn block_lines(text: &str, language: &str) -> Vec<String> {
    let (mut lines, mut inside, mut begun) = (Vec::new(), false, String::new());
    for line in text.lines() {
        if let Some(fence) = line.trim_start().strip_prefix("```") {
            inside = !inside && fence == language;
        } else if inside {
            match line.strip_suffix('\\') {
                Some(part) => begun.push_str(part),
                None => lines.push(std::mem::take(&mut begun) + line),
            }
        }
    }
    lines
}

/// The commands of a shell's line, as words: parted at pipes and the like, without settings of variables, redirections and remarks.
fn commands(line: &str) -> Vec<Vec<String>> {
    let (mut all, mut words, mut word, mut quote): (Vec<Vec<String>>, Vec<String>, Option<String>, Option<char>) =
        Default::default();
    for sign in line.chars().chain(['\n']) {
        match (quote, sign) {
            (Some(end), _) if sign == end => quote = None,
            (Some(_), _) => word.get_or_insert_default().push(sign),
            (None, '\'' | '"') => {
                quote = Some(sign);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, ' ' | '\n' | '|' | ';' | '&' | '(' | ')') => {
                words.extend(word.take());
                if sign != ' ' {
                    all.push(std::mem::take(&mut words));
                }
            }
            (None, _) => word.get_or_insert_default().push(sign),
        }
    }
    words.extend(word);
    all.push(words);
    for words in &mut all {
        let is_prefix =
            |word: &String| word == "sudo" || word.split_once('=').is_some_and(|(name, _)| is_variable(name));
        let prefix = words.iter().take_while(|word| is_prefix(word)).count();
        words.drain(..prefix);
        if let Some(redirected) = words.iter().position(|word| word.starts_with(['<', '>']) || word.starts_with("2>")) {
            words.truncate(redirected);
        }
    }
    all.retain(|words| !words.is_empty());
    all
}

fn is_variable(name: &str) -> bool {
    name.chars().all(|sign| sign.is_ascii_uppercase() || sign.is_ascii_digit() || sign == '_')
}

/// Whatever stands between backticks in a line.
fn inline(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.starts_with("```")).flat_map(|line| line.split('`').skip(1).step_by(2))
}

#[test]
fn every_command_in_the_documents_can_be_typed() {
    let (mut faults, mut typed) = (Vec::new(), 0);
    for (name, text) in texts() {
        let lines = ["sh", "console"].into_iter().flat_map(|language| block_lines(&text, language));
        for line in lines {
            for words in commands(line.trim_start_matches("$ ")) {
                if words[0].rsplit('/').next() != Some("tidegate") {
                    continue;
                }
                typed += 1;
                if let Err(error) = Cli::try_parse_from(&words)
                    && error.use_stderr()
                {
                    faults.push(format!("{name}: {line}: {error}"));
                }
            }
        }
    }
    assert!(typed > 30, "only {typed} commands were found");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_verb_and_option_that_the_text_names_is_there() {
    let program = Cli::command();
    let mut faults = Vec::new();
    for (name, text) in texts() {
        for code in inline(&text).filter(|code| code.starts_with("tidegate ")) {
            let (mut command, mut path) = (&program, vec!["tidegate"]);
            for word in code.split_whitespace().skip(1) {
                if let Some(option) = word.strip_prefix("--") {
                    let option = option.split(['=', '…', ',', ']']).next().unwrap_or_default();
                    let has =
                        |of: &clap::Command| of.get_arguments().any(|argument| argument.get_long() == Some(option));
                    if !(has(command) || has(&program) || ["help", "version"].contains(&option)) {
                        faults.push(format!("{name}: `{code}`: {} has no --{option}", path.join(" ")));
                    }
                } else if command.has_subcommands() && word.starts_with(|sign: char| sign.is_ascii_lowercase()) {
                    let verb = word.trim_end_matches(',');
                    match command.find_subcommand(verb) {
                        Some(found) => (command, path) = (found, [path, vec![verb]].concat()),
                        None => faults.push(format!("{name}: `{code}`: {} has no {verb}", path.join(" "))),
                    }
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_word_for_make_is_in_the_makefile() {
    let makefile = std::fs::read_to_string(format!("{ROOT}/Makefile")).expect("the Makefile");
    let mut targets: BTreeSet<&str> = makefile
        .lines()
        .filter(|line| line.starts_with(|sign: char| sign.is_ascii_lowercase()) && !line.contains(":="))
        .filter_map(|line| line.split_once(':'))
        .map(|(target, _)| target)
        .collect();
    let curves = makefile.lines().find_map(|line| line.strip_prefix("CURVES = ")).expect("the curves");
    targets.extend(curves.split(' '));
    let mut faults = Vec::new();
    let mut named = 0;
    for (name, text) in texts() {
        let blocks = block_lines(&text, "sh");
        let steps = text.lines().filter_map(|line| line.trim_start().trim_start_matches("- ").strip_prefix("run: "));
        let codes = inline(&text).filter(|_| !name.ends_with(".yml"));
        for line in blocks.iter().map(String::as_str).chain(steps).chain(codes) {
            // What a workflow's matrix fills in is a value of the variable before it.
            let line = &line.replace("${{ matrix.servers }}", "any").replace("${{ matrix.redis }}", "redis7");
            for words in commands(line).into_iter().filter(|words| words[0] == "make") {
                for word in words[1..].iter().map(|word| word.trim_end_matches(',')) {
                    let is_setting = word.contains('=') || word.starts_with('-');
                    let variable = word.split('=').next().unwrap_or_default();
                    named += 1;
                    if is_setting && is_variable(variable) && !makefile.contains(&format!("$({variable})")) {
                        let in_a_script = ["TIDEGATE_IMAGE", "TIDEGATE_BINARY_DIR", "OBSERVABILITY", "DIRTY", "DIST"]
                            .contains(&variable);
                        if !in_a_script {
                            faults.push(format!("{name}: {line}: the Makefile knows no {variable}"));
                        }
                    } else if !is_setting
                        && word.starts_with(|sign: char| sign.is_ascii_lowercase())
                        && !targets.contains(word)
                    {
                        faults.push(format!("{name}: {line}: the Makefile has no {word}"));
                    }
                }
            }
        }
    }
    assert!(named > 40, "only {named} words were found");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_line_is_read_as_a_shell_reads_it() {
    let words = |line: &str| commands(line).iter().map(|words| words.join("·")).collect::<Vec<_>>();
    assert_eq!(words("A=1 tidegate check --set 'a b' > file # why"), ["tidegate·check·--set·a b"]);
    assert_eq!(words("awk '{print $7 | x}' log | tidegate produce"), ["awk·{print $7 | x}·log", "tidegate·produce"]);
    assert_eq!(words("sudo make deb && echo \"done; really\""), ["make·deb", "echo·done; really"]);
    assert_eq!(block_lines("```sh\na \\\n  b\n```\nc\n```text\nd\n```", "sh"), ["a   b"]);
}

#[test]
fn every_test_that_a_document_names_is_there() {
    let mut tests = BTreeSet::new();
    for (_, text) in rust_files(&["tests/", "src/"]) {
        tests.extend(text.lines().filter_map(|line| Some(line.split_once("fn ")?.1.split_once('(')?.0.to_owned())));
    }
    // In code, a word of so many parts is a test's name: no key, no metric and no file has as many.
    let is_test = |code: &&str| {
        code.matches('_').count() > 4
            && code.chars().all(|sign| sign.is_ascii_lowercase() || sign.is_ascii_digit() || sign == '_')
    };
    let (mut named, mut missing) = (0, Vec::new());
    for (document, text) in texts() {
        for code in inline(&text).filter(is_test) {
            named += 1;
            if !tests.contains(code) {
                missing.push(format!("{document}: {code}"));
            }
        }
    }
    assert!(named > 100, "documents name tests as evidence: {named}");
    assert!(missing.is_empty(), "these are not there: {missing:#?}");
}

/// A document without what stands in blocks of code.
fn prose(text: &str) -> String {
    text.split("```").step_by(2).collect()
}

/// What a heading is linked by.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn every_link_in_the_documents_leads_somewhere() {
    let mut broken = Vec::new();
    for (name, text) in texts().into_iter().filter(|(name, _)| name.ends_with(".md")) {
        let folder = Path::new(ROOT).join(&name).parent().expect("in a folder").to_owned();
        for link in prose(&text).split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0.to_owned())) {
            if link.contains("://") {
                continue;
            }
            let (file, part) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() { Path::new(ROOT).join(&name) } else { folder.join(file) };
            if !target.exists() {
                broken.push(format!("{name}: {link}"));
            } else if !part.is_empty() {
                let text = std::fs::read_to_string(&target).expect("text");
                let headings = text.lines().filter_map(|line| line.strip_prefix('#'));
                let is_there = headings.map(|line| anchor(line.trim_start_matches('#'))).any(|heading| heading == part);
                if !is_there {
                    broken.push(format!("{name}: {link}, a heading"));
                }
            }
        }
    }
    assert!(broken.is_empty(), "these lead nowhere: {broken:#?}");
}

/// It is how a reader finds a page, and what the site has as its chapters.
#[test]
fn the_table_of_the_readme_leads_to_every_page() {
    let readme = std::fs::read_to_string(Path::new(ROOT).join("README.md")).expect("text");
    let (_, table) = readme.split_once("## Documentation").expect("a table");
    let is_page = |name: &str| name.ends_with(".md") && !name.starts_with("docs/runbooks/") && name != "README.md";
    let pages = texts().into_iter().map(|(name, _)| name).filter(|name| is_page(name));
    let missing: Vec<_> = pages.filter(|name| !table.contains(&format!("]({name})"))).collect();
    assert!(missing.is_empty(), "the table lacks {missing:?}");
}
