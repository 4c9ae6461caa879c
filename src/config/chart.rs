//! What the Helm chart's value `config` accepts is what the declaration of the configuration says.
//!
//! `TIDEGATE_UPDATE_DOCS=1 cargo test --lib config::chart` writes it into `helm/tidegate/values.schema.json`, whose other values are written by
//! hand; without the variable a difference is a failure.

use serde_json::{Map, Value, json};

use super::accept::ACCEPTABLE;
use super::key::{Key, section_names};
use super::kind::Kind;
use super::sections::KEYS;

const SCHEMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/helm/tidegate/values.schema.json");

/// Keys that the chart sets itself: urls are mounted from a Secret, and the probes ask a port that the chart knows. A token is a secret, too:
/// `admin.token_file` names it.
const OF_THE_CHART: [&str; 6] =
    ["valkey.url", "valkey.url_file", "postgres.url", "postgres.url_file", "admin.listen", "admin.token"];

#[test]
fn the_charts_schema_has_every_key_of_the_declaration_and_no_other() {
    let text = std::fs::read_to_string(SCHEMA).expect("the schema");
    let mut schema: Value = serde_json::from_str(&text).expect("JSON");
    schema["properties"]["config"] = config();
    let expected = format!("{schema:#}\n");
    if std::env::var_os("TIDEGATE_UPDATE_DOCS").is_some() {
        return std::fs::write(SCHEMA, expected).expect("written");
    }
    let command = "TIDEGATE_UPDATE_DOCS=1 cargo test --lib config::chart";
    assert!(text == expected, "{SCHEMA} differs from the declaration: run {command}");
}

/// The schema of the value `config`: one object a section, unknown keys refused.
fn config() -> Value {
    let mut sections = Map::new();
    for name in section_names() {
        let of_section = |key: &&Key| key.name.split('.').next() == Some(name) && !OF_THE_CHART.contains(&key.name);
        let keys: Map<String, Value> = KEYS.iter().filter(of_section).map(property).collect();
        let section = json!({ "type": "object", "additionalProperties": false, "properties": keys });
        let section = match name {
            "pipelines" => json!({
                "type": "object",
                "additionalProperties": false,
                "patternProperties": { "^[A-Za-z_][A-Za-z0-9_-]{0,62}$": section },
            }),
            "doctor" => json!({
                "type": "object",
                "additionalProperties": false,
                "properties": { "accept": { "type": "array", "items": all_required(section) } },
            }),
            _ => section,
        };
        sections.insert(name.into(), section);
    }
    let about = "Sections and keys of docs/configuration.md; the urls and admin.listen are set by the chart.";
    json!({ "type": "object", "description": about, "additionalProperties": false, "properties": sections })
}

/// An object that lacks none of its properties.
fn all_required(mut section: Value) -> Value {
    let keys = section["properties"].as_object().into_iter().flat_map(Map::keys).cloned().collect::<Vec<String>>();
    section["required"] = keys.into();
    section
}

fn property(key: &Key) -> (String, Value) {
    let name = key.name.rsplit('.').next().unwrap_or(key.name);
    let mut schema = match &key.kind {
        Kind::Count(_, range) => json!({ "type": "integer", "minimum": range.start(), "maximum": range.end() }),
        Kind::Bytes(_) => {
            json!({ "type": ["integer", "string"], "minimum": 1, "pattern": "^[0-9]+ ?(B|KiB|MiB|GiB)?$" })
        }
        Kind::Time(_) => json!({ "type": "string", "pattern": "^([0-9]+ *(ms|s|sec|m|min|h|d) *)+$" }),
        Kind::Choice(words) => json!({ "type": "string", "enum": words }),
        Kind::Switch => json!({ "type": "boolean" }),
        Kind::Finding => json!({ "type": "string", "enum": ACCEPTABLE }),
        Kind::Until => json!({ "type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}([Tt ].+)?$" }),
        // What is only text for JSON; the migration's job and the workers read it strictly.
        _ => json!({ "type": "string" }),
    };
    let default = key.default.map_or_else(|| "required".into(), |default| format!("default: {default:?}"));
    schema["description"] = format!("{} ({}; {default})", key.reason, key.kind.limits()).into();
    (name.into(), schema)
}
