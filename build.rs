//! Migrations are embedded in the binary: a new file among them must lead to a new build. So are the runbooks, as a list of names and texts.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=migrations");
    println!("cargo:rerun-if-changed=docs/runbooks");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    fs::write(out.join("runbooks.rs"), list(&root.join("docs/runbooks"))).expect("written");
}

/// The runbooks of a folder, by name. Without them there is no program: an image or a package that forgot them would say that there are none.
fn list(folder: &Path) -> String {
    let files = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = files.flatten().map(|file| file.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "md"));
    files.sort();
    let entry = |file: &PathBuf| {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        format!("({name:?}, include_str!({:?})),\n", file.display().to_string())
    };
    format!("&[\n{}]\n", files.iter().map(entry).collect::<String>())
}
