//! A page of the documents as the steps that its reader takes: commands in their order, what each prints, the files that he writes.
//!
//! Takes Markdown; gives steps. What stands between the fences of `sh` and `console` is typed. In `console` a command begins with `$ `, and the lines
//! below it are printed by it: in this order, others may stand between, and `…` stands for what differs each time. A command ends with 0, unless
//! `# exit 4` stands behind it. Three remarks, which a reader of the rendered page does not see, say what else happens:
//!
//! - `<!-- file: tidegate.toml -->` before a block: the reader writes the block to this file;
//! - `<!-- given: COMMAND -->`: what the reader is taken to have already, or somebody else does;
//! - `<!-- fault: postgresql stops -->`: what befalls the servers; the page's test does it.

/// A step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// The page's test does this to the servers.
    Fault(String),
    /// The reader writes a file.
    File { name: String, text: String },
    /// The reader, or somebody for him, types this.
    Run(Command),
}

/// A command, and how it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Command {
    /// The line of the page, counted from 1.
    pub(crate) line: usize,
    /// Its text; several lines where one ends with a backslash or a text for it follows.
    pub(crate) text: String,
    /// Its exit code.
    pub(crate) exit: i32,
    /// What it prints.
    pub(crate) says: Vec<String>,
    /// Whether the page shows it.
    pub(crate) is_shown: bool,
}

const REMARK: &str = "<!-- ";
const END_OF_REMARK: &str = "-->";

/// The fenced blocks of a language on a page.
pub(crate) fn blocks<'a>(page: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("```{language}\n");
    page.split(fence.as_str()).skip(1).map(|rest| rest.split("```").next().unwrap_or_default()).collect()
}

/// The steps of a page.
pub(crate) fn steps(page: &str) -> Vec<Step> {
    let mut lines = Lines { lines: page.lines().enumerate().map(|(n, line)| (n + 1, line)).collect(), at: 0 };
    let (mut steps, mut file) = (Vec::new(), None);
    while let Some((number, line)) = lines.next() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        if let Some(language) = trimmed.strip_prefix("```") {
            let block = lines.block(indent);
            match (file.take(), language) {
                (Some(name), _) => steps.push(Step::File { name, text: text(&block) }),
                (None, "sh") => steps.extend(commands(&block, None).into_iter().map(Step::Run)),
                (None, "console") => steps.extend(commands(&block, Some("$ ")).into_iter().map(Step::Run)),
                (None, _) => {}
            }
        } else if let Some(remark) = trimmed.strip_prefix(REMARK) {
            let mut remark = remark.to_owned();
            while !remark.trim_end().ends_with(END_OF_REMARK)
                && let Some((_, line)) = lines.next()
            {
                remark = remark + "\n" + line;
            }
            let remark = remark.trim_end().trim_end_matches(END_OF_REMARK).trim();
            match remark.split_once(':').map(|(kind, rest)| (kind, rest.trim())) {
                Some(("fault", fault)) => steps.push(Step::Fault(fault.to_owned())),
                Some(("file", name)) => file = Some(name.to_owned()),
                Some(("given", text)) => {
                    let (text, exit) = ending(text);
                    steps.push(Step::Run(Command { line: number, text, exit, says: Vec::new(), is_shown: false }));
                }
                _ => {}
            }
        }
    }
    steps
}

/// The commands that a page shows, in their order.
pub(crate) fn shown(page: &str) -> Vec<Command> {
    let shown = |step| match step {
        Step::Run(command) => Some(command).filter(|command| command.is_shown),
        Step::Fault(_) | Step::File { .. } => None,
    };
    steps(page).into_iter().filter_map(shown).collect()
}

/// What is left of a page, line by line.
struct Lines<'a> {
    lines: Vec<(usize, &'a str)>,
    at: usize,
}

impl<'a> Lines<'a> {
    fn next(&mut self) -> Option<(usize, &'a str)> {
        let line = self.lines.get(self.at).copied();
        self.at += 1;
        line
    }

    /// The lines up to the fence that ends the block, without the spaces that it is set in by.
    fn block(&mut self, indent: usize) -> Vec<(usize, &'a str)> {
        let mut block = Vec::new();
        while let Some((number, line)) = self.next() {
            if line.trim_start().starts_with("```") {
                break;
            }
            block.push((number, line.get(indent..).unwrap_or_default()));
        }
        block
    }
}

fn text(block: &[(usize, &str)]) -> String {
    block.iter().map(|(_, line)| format!("{line}\n")).collect()
}

/// The commands of a block. `prompt` begins each of them where lines without it are what they print.
fn commands(block: &[(usize, &str)], prompt: Option<&str>) -> Vec<Command> {
    let (mut commands, mut lines) = (Vec::<Command>::new(), block.iter());
    while let Some((number, line)) = lines.next() {
        let command = prompt.map_or(Some(*line), |prompt| line.strip_prefix(prompt));
        let Some(command) = command else {
            let Some(last) = commands.last_mut() else { panic!("line {number}: {line}: printed by no command") };
            last.says.push((*line).to_owned());
            continue;
        };
        if command.is_empty() || command.starts_with('#') {
            continue;
        }
        let (mut text, exit) = ending(command);
        while text.ends_with('\\')
            && let Some((_, more)) = lines.next()
        {
            text = text + "\n" + more;
        }
        if let Some(end) = end_of_text(&text) {
            for (_, more) in lines.by_ref() {
                text = text + "\n" + more;
                if *more == end {
                    break;
                }
            }
        }
        commands.push(Command { line: *number, text, exit, says: Vec::new(), is_shown: true });
    }
    commands
}

/// A command and the exit code that it says behind itself.
fn ending(command: &str) -> (String, i32) {
    match command.rsplit_once("# exit ") {
        Some((command, exit)) => (command.trim_end().to_owned(), exit.trim().parse().expect("an exit code")),
        None => (command.to_owned(), 0),
    }
}

/// The line that ends the text which follows a command (`<<'END'`).
fn end_of_text(command: &str) -> Option<String> {
    let (_, rest) = command.split_once("<<")?;
    let word = rest.trim_start_matches('\'').split(['\'', ' ', '\n']).next()?;
    (!rest.starts_with('<') && !word.is_empty()).then(|| word.to_owned())
}

/// The first line that is not printed where it should be, if there is one.
pub(crate) fn missing<'a>(says: &'a [String], stdout: &str, stderr: &str) -> Option<&'a str> {
    // A terminal shows both, each in its order.
    let (mut out, mut err) = (stdout.lines(), stderr.lines());
    says.iter().map(String::as_str).find(|expected| {
        let before = out.clone();
        if out.any(|line| is_as(line, expected)) {
            return false;
        }
        out = before;
        !err.any(|line| is_as(line, expected))
    })
}

/// Whether a line is the expected one, where `…` stands for anything.
fn is_as(line: &str, expected: &str) -> bool {
    let (line, expected) = (line.trim_end(), expected.trim_end());
    let pieces: Vec<&str> = expected.split('…').collect();
    let [first, middle @ .., last] = &pieces[..] else { return line == expected };
    let Some(mut rest) = line.strip_prefix(*first) else { return false };
    for piece in middle {
        let Some((_, behind)) = rest.split_once(*piece) else { return false };
        rest = behind;
    }
    rest.ends_with(*last)
}

#[test]
fn a_page_is_read_as_it_is_meant() {
    let page = "text\n<!-- fault: x stops -->\n<!-- file: a.toml -->\n```toml\n[a]\n```\n<!-- given: touch b\ntouch c -->\n```sh\n# a remark\none two   # exit 4\n\
                three \\\n    four <<'END'\nfive\nEND\nsix <<< 'seven'\n```\n   ```console\n   $ tidegate x\n   says … this\n   ```\n```text\nnothing\n```\n";
    let run = |line, text: &str, exit, says: &[&str], is_shown| {
        let says = says.iter().map(|line| (*line).to_owned()).collect();
        Step::Run(Command { line, text: text.into(), exit, says, is_shown })
    };
    let expected = [
        Step::Fault("x stops".into()),
        Step::File { name: "a.toml".into(), text: "[a]\n".into() },
        run(7, "touch b\ntouch c", 0, &[], false),
        run(11, "one two", 4, &[], true),
        run(12, "three \\\n    four <<'END'\nfive\nEND", 0, &[], true),
        run(16, "six <<< 'seven'", 0, &[], true),
        run(19, "tidegate x", 0, &["says … this"], true),
    ];
    assert_eq!(steps(page), expected);
    assert_eq!(shown(page).len(), 4);
}

#[test]
fn what_is_printed_is_compared_line_by_line_and_in_its_order() {
    let says = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
    assert_eq!(missing(&says(&["one", "… three"]), "zero\none\ntwo three\n", ""), None);
    assert_eq!(missing(&says(&["… three", "one"]), "one\ntwo three\n", ""), Some("one"));
    assert_eq!(missing(&says(&["one", "err"]), "one\n", "err\n"), None);
    assert_eq!(missing(&says(&["one"]), "one and more\n", ""), Some("one"));
    assert_eq!(missing(&says(&["a … b … c"]), "a 1 b 2 c  \n", ""), None);
    assert_eq!(missing(&says(&["a … b … c"]), "a 1 c 2 b\n", ""), Some("a … b … c"));
}
