//! The frozen surface: every name, tag and type on the wire, so that a change is seen in review.
//!
//! After a change that is meant, run the test with `AETHER_UPDATE_SCHEMA=1` and commit the file.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

use std::fmt::Write as _;
use std::path::Path;

const SOURCES: [&str; 4] = ["session", "run", "file", "configure"];

#[test]
fn wire_schema_is_the_one_on_record() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut schema = String::new();
    for source in SOURCES {
        let text = std::fs::read_to_string(root.join(format!("src/message/{source}.rs"))).unwrap();
        render(&text, &mut schema);
    }
    let recorded = root.join("tests/schema.txt");
    if std::env::var_os("AETHER_UPDATE_SCHEMA").is_some() {
        std::fs::write(&recorded, &schema).unwrap();
    }
    let recorded = std::fs::read_to_string(recorded).unwrap();
    assert!(recorded == schema, "the wire has changed; it is now\n{schema}");
}

/// One line for each message, field, body and value.
fn render(text: &str, schema: &mut String) {
    let (mut derives, mut attribute) = (String::new(), String::new());
    let mut is_enumeration = false;
    let mut lines = text.lines().map(str::trim);
    while let Some(line) = lines.next() {
        if let Some(rest) = line.strip_prefix("#[derive(") {
            rest.clone_into(&mut derives);
        } else if line.starts_with("#[prost(") {
            // An attribute may stand on several lines.
            let mut whole = line.to_owned();
            while !whole.ends_with(']') {
                whole.push(' ');
                whole.push_str(lines.next().unwrap());
            }
            whole["#[prost(".len()..whole.len() - 2].trim().clone_into(&mut attribute);
        } else if let Some(rest) =
            line.strip_prefix("pub struct ").or_else(|| line.strip_prefix("pub enum "))
        {
            let Some(kind) =
                ["Message", "Oneof", "Enumeration"].into_iter().find(|kind| derives.contains(kind))
            else {
                // Not on the wire: everything up to its end is passed over.
                lines.by_ref().find(|line| *line == "}");
                derives.clear();
                continue;
            };
            let name = rest.split_whitespace().next().unwrap();
            writeln!(schema, "{} {name}", kind.to_lowercase()).unwrap();
            is_enumeration = kind == "Enumeration";
            attribute.clear();
            derives.clear();
        } else if line.starts_with("impl") || line.starts_with("fn ") {
            is_enumeration = false;
        } else if !attribute.is_empty()
            && let Some(field) = line.strip_suffix(',')
        {
            let field = field.strip_prefix("pub ").unwrap_or(field);
            writeln!(schema, "  {field} [{attribute}]").unwrap();
            attribute.clear();
        } else if is_enumeration
            && let Some((name, number)) =
                line.strip_suffix(',').and_then(|line| line.split_once(" = "))
        {
            writeln!(schema, "  {name} = {number}").unwrap();
        }
    }
}
