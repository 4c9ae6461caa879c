//! `tidegate completions` and `tidegate man`: what is installed beside the program.

use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::Shell;

use super::cli::Cli;
use super::{Context, Exit, Failure, complete};

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct CompletionsOpts {
    /// For which shell
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: Shell,
}

/// What can be said on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct ManOpts {
    /// Write the page of every command into this folder, instead of the main one to stdout
    #[arg(long, value_name = "FOLDER", value_hint = clap::ValueHint::DirPath)]
    pub out: Option<PathBuf>,
}

/// Prints what a shell sources to complete: a script that asks this program at each Tab.
pub fn completions(opts: CompletionsOpts, context: &Context) -> Result<Exit, Failure> {
    let none = || Failure::usage(format!("there are no completions for {}", opts.shell));
    let script = complete::script(&opts.shell.to_string()).ok_or_else(none)?;
    context.write(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Ok)
}

/// Prints the manual page, or writes all of them.
pub fn man(opts: ManOpts, context: &Context) -> Result<Exit, Failure> {
    match opts.out {
        None => {
            let mut text = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut text)?;
            context.write(&String::from_utf8_lossy(&text))?;
        }
        Some(folder) => {
            let unwritable = |error: std::io::Error| {
                Failure::new(Exit::Error, format!("cannot write to {}: {error}", folder.display()))
            };
            std::fs::create_dir_all(&folder).map_err(unwritable)?;
            clap_mangen::generate_to(Cli::command(), &folder).map_err(unwritable)?;
        }
    }
    Ok(Exit::Ok)
}
