//! Page: the files that a browser is given, part of the program.
//!
//! Takes nothing; gives each file under its path. They are served as they are written, without a build step, and ask nobody but this port.

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

/// Where the page is.
pub(super) const PATH: &str = "/console";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// A file.
pub(super) struct File {
    pub(super) path: &'static str,
    content_type: &'static str,
    text: &'static str,
}

const fn file(path: &'static str, content_type: &'static str, text: &'static str) -> File {
    File { path, content_type, text }
}

/// All files.
#[rustfmt::skip] // a table, one file a row
pub(super) const FILES: &[File] = &[
    file(PATH, HTML, include_str!("page/index.html")),
    file("/console/console.css", CSS, include_str!("page/console.css")),
    file("/console/icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
    file("/console/console.js", SCRIPT, include_str!("page/console.js")),
    file("/console/api.js", SCRIPT, include_str!("page/api.js")),
    file("/console/dom.js", SCRIPT, include_str!("page/dom.js")),
    file("/console/chart.js", SCRIPT, include_str!("page/chart.js")),
    file("/console/dialog.js", SCRIPT, include_str!("page/dialog.js")),
    file("/console/overview.js", SCRIPT, include_str!("page/overview.js")),
    file("/console/workers.js", SCRIPT, include_str!("page/workers.js")),
    file("/console/letters.js", SCRIPT, include_str!("page/letters.js")),
    file("/console/audit.js", SCRIPT, include_str!("page/audit.js")),
    file("/console/settings.js", SCRIPT, include_str!("page/settings.js")),
];

pub(super) async fn answer(file: &'static File) -> Response {
    ([(CONTENT_TYPE, file.content_type)], file.text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_asks_a_foreign_place_or_has_what_the_content_security_policy_forbids() {
        for File { path, text, .. } in FILES {
            // The namespace of SVG is a name and not a place.
            let text = text.replace("http://www.w3.org/2000/svg", "");
            for forbidden in [
                "http://",
                "https://",
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "style=",
            ] {
                assert!(!text.contains(forbidden), "{path} has {forbidden}");
            }
            if path.ends_with("console") {
                let scripts = text.matches("<script").count();
                assert_eq!(
                    scripts,
                    text.matches("<script type=\"module\" src=\"/console/").count(),
                    "a script is a file"
                );
                let handles = |rest: &str| rest.trim_start_matches(|c: char| c.is_ascii_lowercase()).starts_with('=');
                let has_handler = text.split(" on").skip(1).any(handles);
                assert!(!text.contains("<style") && !has_handler, "{path} has a style or a handler of its own");
            }
        }
    }

    #[test]
    fn every_import_is_served() {
        let paths: Vec<&str> = FILES.iter().map(|file| file.path).collect();
        for File { path, text, .. } in FILES.iter().filter(|file| file.content_type == SCRIPT) {
            for import in text.lines().filter(|line| line.starts_with("import ")) {
                let name = import.split("\"./").nth(1).and_then(|rest| rest.split('"').next()).expect("a name");
                assert!(paths.contains(&format!("/console/{name}").as_str()), "{path} imports {name}");
            }
        }
    }
}
