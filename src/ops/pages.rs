//! `tidegate completions` and `tidegate man`: made from the same definitions as the command line itself.

use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::Shell;

use super::cli::Cli;
use super::{Context, Exit, Failure};

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
    #[arg(long, value_name = "FOLDER")]
    pub out: Option<PathBuf>,
}

/// Prints completions for a shell.
pub fn completions(opts: CompletionsOpts, context: &Context) -> Result<Exit, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(opts.shell, &mut Cli::command(), "tidegate", &mut text);
    context.write(&String::from_utf8_lossy(&text))?;
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
