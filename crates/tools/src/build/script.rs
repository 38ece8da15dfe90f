//! The script of a build: the recipe's own parts, with what is common to all tools around them.

use crate::recipe::{END_OF_SCRIPT, Recipe, fill};
use crate::version::Version;

const BUILDER: &str = include_str!("builder.sh");

/// Part of every layer's key. To be counted up when the script makes another layer of the same
/// recipe.
pub(crate) const FORMAT: u32 = 1;

/// The same for all layers, so that equal trees give equal bytes. A guest never looks at it.
const UUID: &str = "ae7e0000-0000-4000-8000-0000000000f6";

pub(crate) fn script(recipe: &Recipe, version: &Version) -> String {
    let expect: String = recipe.expect.iter().map(|text| fill(text, version) + "\n").collect();
    let variables = [
        ("TOOL", recipe.name.as_str()),
        ("VERSION", &version.text),
        ("COMMANDS", &recipe.commands.join(" ")),
        ("EXPECT", &expect),
        ("UUID", UUID),
    ];
    let mut script = String::new();
    for (name, value) in variables {
        script.extend([name, "=", &quoted(value), "\n"]);
    }
    let install = recipe.install();
    for (file, content) in [("install.sh", &install), ("verify.sh", &recipe.verify)] {
        let content = content.trim_end();
        let text = format!("cat > \"$1/{file}\" <<'{END_OF_SCRIPT}'\n{content}\n{END_OF_SCRIPT}\n");
        script += &text;
    }
    script + BUILDER
}

/// As one word of a shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_is_one_word_whatever_is_in_it() {
        assert_eq!(quoted("it's $(x)"), r"'it'\''s $(x)'");
    }
}
