//! Complete: what can stand at the cursor when Tab is pressed, for a shell that asks the program itself.
//!
//! Takes the words up to the cursor, as the scripts of `tidegate completions` send them; gives lines for the shell on stdout. `clap_complete`
//! walks over the words by the definitions of the command line; what an argument is the [`Name`] of is looked up here. It cannot fail: where
//! something is wrong or takes too long nothing is offered and nothing is said, for the terminal belongs to the line that is being typed.

mod ask;
mod names;
mod shells;

use std::io::Write;
use std::sync::mpsc;
use std::time::Duration;

use clap::CommandFactory;
use clap_complete::env::EnvCompleter;

pub use self::names::{Name, by};
pub use self::shells::script;
use self::shells::{plain, shells};
use crate::ops::cli::Cli;

/// Names the shell that asks. It begins with no `TIDEGATE_`, so that it is not taken for a key of the configuration.
const VARIABLE: &str = "_TIDEGATE_COMPLETE";
/// How long somebody waits at the most, whatever holds up the answer: a configuration file on a network's disk, for example.
const LIMIT: Duration = Duration::from_millis(800);

/// Answers if it is a shell that asks; false if the command line is to be run. Nothing was started before.
pub fn answered() -> bool {
    let Some(shell) = std::env::var(VARIABLE).ok().filter(|shell| shells().completer(shell).is_some()) else {
        return false;
    };
    // Without it the variable was meant for another one: the command line is run.
    if std::env::args_os().nth(1).is_none_or(|argument| argument != "--") {
        return false;
    }
    // A panic, too, would be written over the line that is being typed.
    std::panic::set_hook(Box::new(|_| {}));
    let (sender, answer) = mpsc::channel();
    // The thread ends with the process.
    std::thread::spawn(move || sender.send(shells().completer(&shell).and_then(lines)));
    if let Ok(Some(lines)) = answer.recv_timeout(LIMIT) {
        // A shell that has gone wants no answer.
        let _ = std::io::stdout().write_all(&lines);
    }
    true
}

fn lines(shell: &dyn EnvCompleter) -> Option<Vec<u8>> {
    let mut lines = Vec::new();
    let words = words().into_iter().map(Into::into).collect();
    shell.write_complete(&mut Cli::command(), words, std::env::current_dir().ok().as_deref(), &mut lines).ok()?;
    Some(lines)
}

/// The words as the shell has them, quotes and all; the last one is begun, or empty.
fn raw_words() -> Vec<String> {
    let words = std::env::args_os().skip_while(|argument| argument != "--").skip(1);
    words.map(|word| word.to_string_lossy().into_owned()).collect()
}

/// The words as the program would be given them.
fn words() -> Vec<String> {
    raw_words().iter().map(|word| plain(word)).collect()
}

/// What was typed for an option up to the word that is begun.
fn typed(option: &str) -> Vec<String> {
    values_of(option, &words())
}

fn values_of(option: &str, words: &[String]) -> Vec<String> {
    let done = &words[..words.len().saturating_sub(1)];
    let apart =
        done.iter().zip(done.iter().skip(1)).filter(|(name, _)| *name == option).map(|(_, value)| value.clone());
    let joined = done.iter().filter_map(|word| word.strip_prefix(option)?.strip_prefix('=').map(str::to_owned));
    apart.chain(joined).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_found_in_both_spellings_and_not_where_it_is_begun() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let found = |text: &str| values_of("--config", &words(text));
        assert_eq!(found("tidegate --config a.toml status --pipeline o"), ["a.toml"]);
        assert_eq!(found("tidegate status --config=a.toml --config b.toml "), ["b.toml", "a.toml"]);
        assert_eq!(found("tidegate status --config a.to"), Vec::<String>::new());
        assert_eq!(found("tidegate status --configure x "), Vec::<String>::new());
    }
}
