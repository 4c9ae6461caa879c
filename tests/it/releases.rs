//! What a release is made of agrees with what makes it: the words of the Makefile, the workflows, the image, the versions that they name.

use std::collections::BTreeSet;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn text(file: &str) -> String {
    std::fs::read_to_string(format!("{ROOT}/{file}")).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// The lines of a recipe of the Makefile.
fn recipe(word: &str) -> String {
    let makefile = text("Makefile");
    let (_, rest) = makefile.split_once(&format!("\n{word}:")).unwrap_or_else(|| panic!("the Makefile has no {word}"));
    rest.lines().skip(1).take_while(|line| line.starts_with('\t')).map(|line| format!("{line}\n")).collect()
}

/// Every word of a text that begins with this, up to a blank or a quote.
fn words(text: &str, begin: &str) -> BTreeSet<String> {
    let ends = |c: char| c.is_whitespace() || c == '"';
    text.split(ends).filter(|word| word.starts_with(begin)).map(str::to_owned).collect()
}

/// What stands behind a mark, up to a character that no version has.
fn version_behind(text: &str, mark: &str) -> String {
    let (_, rest) = text.split_once(mark).unwrap_or_else(|| panic!("no {mark}"));
    rest.split(|c: char| !c.is_ascii_digit() && c != '.').next().unwrap_or_default().to_owned()
}

fn workflows() -> Vec<(String, String)> {
    let files = std::fs::read_dir(format!("{ROOT}/.github/workflows")).expect("the workflows");
    let names = files.map(|file| file.expect("a file").file_name().into_string().expect("a name in text"));
    names.map(|name| (name.clone(), text(&format!(".github/workflows/{name}")))).collect()
}

#[test]
fn a_release_is_made_by_the_same_words_as_make_dist() {
    let words_of_make = words(&recipe("dist"), "dist-");
    let release = text(".github/workflows/release.yml");
    let steps = release.lines().filter_map(|line| line.trim_start().strip_prefix("- run: make "));
    let words_of_workflow: BTreeSet<String> =
        steps.map(str::to_owned).filter(|word| word.starts_with("dist-") && word != "dist-tools").collect();
    assert!(words_of_make.len() > 2, "what makes a release? {words_of_make:?}");
    assert_eq!(words_of_make, words_of_workflow);
    // Where they leave what they make is what the workflow takes along.
    let script = text("packaging/dist.sh");
    assert!(script.contains("folder=${DIST:-dist}") && release.contains("path: dist,"));
    let built = "target/dist";
    assert!(script.contains(&format!("CARGO_TARGET_DIR:-{built}}}")));
    assert!(release.contains(&format!("path: {built}/release/tidegate,")));
}

#[test]
fn tools_and_compilers_have_one_version_everywhere() {
    let dockerfile = text("Dockerfile");
    let auditable = version_behind(&recipe("dist-tools"), "cargo-auditable@");
    assert_eq!(version_behind(&dockerfile, "cargo install --locked --version "), auditable, "Dockerfile");
    let rust = version_behind(&text("Cargo.toml"), "rust-version = \"");
    assert_eq!(version_behind(&dockerfile, "RUST_VERSION="), rust, "Dockerfile");
    for (name, workflow) in workflows() {
        for image in words(&workflow, "rust:") {
            assert_eq!(image, format!("rust:{rust}-bookworm"), "{name}");
        }
    }
}

/// A tag can be moved to other code; a commit cannot. The tag stands beside it for whoever reads.
#[test]
fn the_code_of_others_in_workflows_is_named_by_its_commit() {
    let mut used = 0;
    for (name, workflow) in workflows() {
        for line in
            workflow.lines().filter_map(|line| line.trim_start().trim_start_matches("- ").strip_prefix("uses: "))
        {
            used += 1;
            let (action, tag) =
                line.split_once(" # v").unwrap_or_else(|| panic!("{name}: {line} has no version beside it"));
            let commit = action.split_once('@').map_or("", |(_, commit)| commit);
            assert!(commit.len() == 40 && commit.chars().all(|c| c.is_ascii_hexdigit()), "{name}: {line}");
            assert!(tag.split('.').count() == 3, "{name}: {line}");
        }
        assert!(workflow.contains("\npermissions: {}\n"), "{name}: each job says what it may do");
    }
    assert!(used > 10, "only {used} were found");
}

/// What is compiled in an image is all that the program embeds: a file that is missing there is missing in the image alone.
#[test]
fn the_image_is_built_from_all_that_the_program_reads() {
    let (dockerfile, ignored) = (text("Dockerfile"), text(".dockerignore"));
    let build = text("build.rs");
    let read = build.lines().filter_map(|line| line.trim().strip_prefix("println!(\"cargo:rerun-if-changed="));
    let mut folders: Vec<&str> = read.filter_map(|rest| rest.split('"').next()).collect();
    folders.push("src");
    assert!(folders.len() > 2, "what does the build read? {folders:?}");
    for folder in folders {
        assert!(dockerfile.contains(&format!("COPY {folder} {folder}\n")), "the Dockerfile does not copy {folder}");
        assert!(ignored.lines().any(|line| line == format!("!{folder}")), ".dockerignore leaves {folder} out");
    }
}

#[test]
fn only_the_program_is_published() {
    for manifest in ["lab/Cargo.toml", "fuzz/Cargo.toml"] {
        assert!(text(manifest).contains("\npublish = false\n"), "{manifest}");
    }
    let manifest = text("Cargo.toml");
    let (package, _) = manifest.split_once("\n[lints").expect("the package comes first");
    for key in
        ["description", "license", "readme", "keywords", "categories", "rust-version", "documentation", "include"]
    {
        assert!(package.contains(&format!("\n{key} = ")), "Cargo.toml has no {key}");
    }
    assert!(!package.contains("publish"), "tidegate is published");
}

#[test]
fn each_line_of_the_soaks_has_every_column() {
    let page = text("docs/soak.md");
    let columns: BTreeSet<usize> =
        page.lines().filter(|line| line.starts_with("| ")).map(|line| line.matches('|').count()).collect();
    assert_eq!(columns.len(), 1, "docs/soak.md: {columns:?}");
    let soak = text("lab/src/soak.rs");
    let (_, line) = soak.split_once("let line = format!(").expect("the soak writes a line");
    let line = line.lines().find(|line| line.contains('|')).expect("a line of a table");
    assert_eq!(
        columns.first(),
        Some(&line.matches('|').count()),
        "make soak writes another number of columns than docs/soak.md has"
    );
}
