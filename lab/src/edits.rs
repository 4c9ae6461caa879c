//! Edits: promises that are broken on purpose, as textual edits of a copied tree. The table is `lab/controls.toml`.
//!
//! Takes the table and the text of each file; gives the edited files. Fails with one sentence for each edit that does not apply.

use std::collections::BTreeMap;

use serde::Deserialize;

/// One promise, how it is broken, and which tests must notice.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Control {
    /// What it is called: `TIDEGATE_BROKEN` names it.
    pub name: String,
    /// What is promised, in one sentence.
    pub promise: String,
    /// The tests that must fail when it is broken.
    pub tests: Vec<String>,
    /// How often it may be tried: more than once where the harm shows by chance (a deadlock).
    #[serde(default = "once")]
    pub tries: u32,
    /// How it is broken.
    pub edit: Vec<Edit>,
}

fn once() -> u32 {
    1
}

/// A place in a file, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Edit {
    /// The file, from the root of the repository.
    pub file: String,
    /// The place: a text that occurs exactly once in the file.
    pub find: String,
    /// Stands there instead.
    pub replace: Option<String>,
    /// Stands before it.
    pub insert: Option<String>,
}

/// All controls.
pub fn controls() -> Vec<Control> {
    #[derive(Deserialize)]
    struct Table {
        control: Vec<Control>,
    }
    toml::from_str::<Table>(include_str!("../controls.toml")).expect("lab/controls.toml is a table of controls").control
}

/// The files that the controls edit, edited; or everything that does not apply.
pub fn apply(
    controls: &[Control],
    read: impl Fn(&str) -> std::io::Result<String>,
) -> Result<BTreeMap<String, String>, Vec<String>> {
    let (mut places, mut faults) = (BTreeMap::<&str, Vec<Place<'_>>>::new(), Vec::new());
    for control in controls {
        let asks = ["is", "replaced"].map(|ask| format!("broken::{ask}(\"{}\"", control.name));
        if !control.edit.iter().any(|edit| asks.iter().any(|ask| edit.text().contains(ask))) {
            faults.push(format!("control {}: no edit asks whether it is broken", control.name));
        }
        for edit in &control.edit {
            match Place::of(edit, &read) {
                Ok(place) => places.entry(&edit.file).or_default().push(place),
                Err(why) => faults.push(format!("control {}: {}: {why}: {}", control.name, edit.file, edit.find)),
            }
        }
    }
    let mut edited = BTreeMap::new();
    for (file, mut places) in places {
        // Where two begin at one place, insertions come first, in the order of the table.
        places.sort_by_key(|place| (place.start, place.end > place.start));
        let (mut text, mut at) = (String::new(), 0);
        let before = read(file).unwrap_or_default();
        for place in places {
            if place.start < at {
                faults.push(format!("{file}: two controls replace the same text: {}", place.find));
                continue;
            }
            text.push_str(&before[at..place.start]);
            text.push_str(place.text);
            if place.end == place.start {
                text.push('\n');
            }
            at = place.end;
        }
        text.push_str(&before[at..]);
        edited.insert(file.to_owned(), text);
    }
    if faults.is_empty() { Ok(edited) } else { Err(faults) }
}

/// Where an edit goes: nothing is taken away where it ends as it starts.
struct Place<'a> {
    start: usize,
    end: usize,
    text: &'a str,
    find: &'a str,
}

impl<'a> Place<'a> {
    fn of(edit: &'a Edit, read: impl Fn(&str) -> std::io::Result<String>) -> Result<Place<'a>, String> {
        let text = read(&edit.file).map_err(|error| error.to_string())?;
        let found: Vec<usize> = text.match_indices(&edit.find).map(|(at, _)| at).collect();
        let [start] = found[..] else {
            return Err(format!("the text to find occurs {} times, and must occur once", found.len()));
        };
        let end = match (&edit.replace, &edit.insert) {
            (Some(_), None) => start + edit.find.len(),
            (None, Some(_)) => start,
            _ => return Err("an edit has either `replace` or `insert`".into()),
        };
        Ok(Place { start, end, text: edit.text(), find: &edit.find })
    }
}

impl Edit {
    fn text(&self) -> &str {
        self.replace.as_deref().or(self.insert.as_deref()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(name: &str, find: &str, replace: Option<&str>, insert: Option<&str>) -> Control {
        let (replace, insert) = (replace.map(str::to_owned), insert.map(str::to_owned));
        let edit = Edit { file: "a.rs".into(), find: find.into(), replace, insert };
        Control { name: name.into(), promise: String::new(), tests: Vec::new(), tries: 1, edit: vec![edit] }
    }

    #[test]
    fn edits_of_several_controls_meet_in_one_file() {
        let controls = [
            control("b", "two", Some("broken::is(\"b\")"), None),
            control("a", "two", None, Some("broken::is(\"a\")")),
        ];
        let edited = apply(&controls, |_| Ok("one two three".into())).expect("they apply");
        assert_eq!(edited["a.rs"], "one broken::is(\"a\")\nbroken::is(\"b\") three");
    }

    #[test]
    fn an_edit_that_does_not_apply_is_said_with_its_control_and_file() {
        let faults = |controls: &[Control]| apply(controls, |_| Ok("one one".into())).expect_err("it does not apply");
        let twice = faults(&[control("a", "one", Some("broken::is(\"a\")"), None)]);
        assert_eq!(twice, ["control a: a.rs: the text to find occurs 2 times, and must occur once: one"]);
        let same = control("a", "one one", Some("broken::is(\"a\")"), None);
        assert!(faults(&[same.clone(), same])[0].contains("two controls replace the same text"));
        assert!(faults(&[control("a", "one one", Some("nothing"), None)])[0].contains("no edit asks"));
    }
}
