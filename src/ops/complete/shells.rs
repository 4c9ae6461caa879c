//! Shells: the script that each one sources, and the form in which it wants its answer.
//!
//! bash, zsh and fish have scripts of their own beside this file. Those of the library will not do: in bash a name with a colon, which streams
//! have, is several words; zsh completes nothing the first time where the script is installed in a folder; and each says aloud where the
//! program cannot be found. Elvish and PowerShell have the library's.

use std::borrow::Cow;
use std::ffi::OsString;
use std::io;
use std::path::Path;

use clap_complete::engine::{CompletionCandidate, complete};
use clap_complete::env::{Elvish, EnvCompleter, Powershell, Shells};

use super::{VARIABLE, raw_words};

/// How much of a description is sent: shells cut it where the terminal ends.
const DESCRIBED: usize = 160;

pub(super) const fn shells() -> Shells<'static> {
    Shells(&[&BASH, &Elvish, &FISH, &Powershell, &ZSH])
}

/// What a shell sources to have its completions; none for one that is not known.
pub fn script(shell: &str) -> Option<Vec<u8>> {
    let mut script = Vec::new();
    shells().completer(shell)?.write_registration(VARIABLE, "tidegate", "tidegate", "tidegate", &mut script).ok()?;
    Some(script)
}

const BASH: Ours = Ours { shell: "bash", script: include_str!("tidegate.bash"), line: in_bash };
const ZSH: Ours = Ours { shell: "zsh", script: include_str!("tidegate.zsh"), line: in_zsh };
const FISH: Ours = Ours { shell: "fish", script: include_str!("tidegate.fish"), line: in_fish };

/// A shell with a script of ours.
struct Ours {
    shell: &'static str,
    script: &'static str,
    /// A value and its description as a line of the answer; none where it cannot be typed there.
    line: fn(&str, &str) -> Option<String>,
}

impl EnvCompleter for Ours {
    fn name(&self) -> &'static str {
        self.shell
    }

    fn is(&self, name: &str) -> bool {
        self.shell == name
    }

    fn write_registration(&self, _: &str, _: &str, _: &str, _: &str, to: &mut dyn io::Write) -> io::Result<()> {
        to.write_all(self.script.as_bytes())
    }

    fn write_complete(
        &self,
        command: &mut clap::Command,
        words: Vec<OsString>,
        folder: Option<&Path>,
        to: &mut dyn io::Write,
    ) -> io::Result<()> {
        let last = words.len().saturating_sub(1);
        let is_begun = words.last().is_some_and(|word| !word.is_empty());
        let mut offered = complete(command, words, last, folder)?;
        // Options are offered to who types a dash, or where nothing else can stand: else they hide the few names that can.
        let is_option = |candidate: &CompletionCandidate| candidate.get_value().to_string_lossy().starts_with('-');
        if !is_begun && !offered.iter().all(is_option) {
            offered.retain(|candidate| !is_option(candidate));
        }
        for candidate in &offered {
            let Some(value) = candidate.get_value().to_str().filter(|value| can_be_typed(value)) else { continue };
            let help = candidate.get_help().map(ToString::to_string).unwrap_or_default();
            let help: String =
                help.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).take(DESCRIBED).collect();
            if let Some(line) = (self.line)(value, &help) {
                writeln!(to, "{line}")?;
            }
        }
        Ok(())
    }
}

/// A control character would end a line; a tilde within a word stands for nothing.
fn can_be_typed(value: &str) -> bool {
    !value.contains(char::is_control) && !value.contains("=~/")
}

/// bash inserts an answer as it is: a name out of Valkey that a shell would act on must come quoted.
fn in_bash(value: &str, _: &str) -> Option<String> {
    let begun = raw_words().pop().unwrap_or_default();
    if begun.starts_with(['"', '\'']) {
        // bash closes the quotes itself.
        return (!value.contains(['"', '\'', '\\', '$', '`', '!'])).then(|| value.to_owned());
    }
    Some(quoted(value).into_owned())
}

/// A word that bash reads back as this value. A leading tilde stays, for a path that was typed so.
fn quoted(value: &str) -> Cow<'_, str> {
    // Braces alone stay as they are, as in a key with a hash tag.
    let expands_braces = value.contains(',') || value.contains("..");
    let is_plain = |at: usize, c: char| match c {
        '~' => at == 0,
        '{' | '}' => !expands_braces,
        '_' | '-' | '.' | ',' | '/' | ':' | '=' | '@' | '%' | '+' => true,
        _ => c.is_alphanumeric(),
    };
    if value.char_indices().all(|(at, c)| is_plain(at, c)) {
        return Cow::Borrowed(value);
    }
    let mut word = String::new();
    for (at, c) in value.char_indices() {
        if !is_plain(at, c) {
            word.push('\\');
        }
        word.push(c);
    }
    Cow::Owned(word)
}

/// zsh quotes for itself; a colon ends the value.
fn in_zsh(value: &str, help: &str) -> Option<String> {
    let value = value.replace('\\', "\\\\").replace(':', "\\:");
    Some(if help.is_empty() { value } else { format!("{value}:{help}") })
}

/// fish quotes for itself; a tabulator ends the value.
fn in_fish(value: &str, help: &str) -> Option<String> {
    Some(if help.is_empty() { value.to_owned() } else { format!("{value}\t{help}") })
}

/// A word of a shell without its quotes and backslashes. Nothing in it is expanded.
pub(super) fn plain(word: &str) -> String {
    let (mut plain, mut quote) = (String::new(), None);
    let mut rest = word.chars();
    while let Some(c) = rest.next() {
        match (quote, c) {
            (None, '"' | '\'') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (None | Some('"'), '\\') => plain.extend(rest.next()),
            _ => plain.push(c),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_read_as_the_shell_would_read_it() {
        for (word, meant) in [
            ("plain", "plain"),
            ("my\\ file", "my file"),
            ("\"my file\"", "my file"),
            ("'it''s \\ so'", "its \\ so"),
            ("\"half", "half"),
            ("--config='a b'", "--config=a b"),
            ("end\\", "end"),
        ] {
            assert_eq!(plain(word), meant, "{word}");
        }
    }

    #[test]
    fn what_bash_inserts_is_the_value_and_nothing_else() {
        for value in ["flush:{a}:0", "orders", "--pipeline=orders", "~/tide gate.toml", "a.b/c_d@e%20"] {
            assert_eq!(plain(&quoted(value)), value);
        }
        assert_eq!(quoted("flush:{a}:0"), "flush:{a}:0");
        for (value, word) in [
            ("$(reboot)", "\\$\\(reboot\\)"),
            ("a;b", "a\\;b"),
            ("{a,b}", "\\{a,b\\}"),
            ("{1..9}", "\\{1..9\\}"),
            ("a b", "a\\ b"),
            ("a~", "a\\~"),
            ("`a`", "\\`a\\`"),
            ("!a", "\\!a"),
            ("*", "\\*"),
        ] {
            assert_eq!(quoted(value), word);
        }
    }

    #[test]
    fn every_shell_has_a_script_that_names_the_variable() {
        for shell in shells().names() {
            let script = String::from_utf8(script(shell).expect("known")).expect("text");
            assert!(script.contains(&format!("{VARIABLE}=")) || script.contains(&format!("env:{VARIABLE}")), "{shell}");
        }
        assert_eq!(script("tcsh"), None);
    }
}
