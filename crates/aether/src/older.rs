//! The older command lines: `aether-cli -type vm:create -name web -tools "go,python"`.
//!
//! They are turned into today's, so that there is one way to do each thing. Options are written
//! with one dash or two, and their values after a blank or `=`.

use std::{collections::BTreeMap, ffi::OsString, path::Path};

use crate::failure::Failure;

const NAME: &str = "aether-cli";

const KNOWN: &[&str] =
    &["type", "name", "tools", "tool-versions", "vm-id", "cmd", "args", "url", "key", "json"];

const HINT: &str = "the forms are: -type vm:create [-name N] [-tools a,b] [-tool-versions a=1,b=2], \
                    -type vm:execute -vm-id ID -cmd PROGRAM [-args x,y], -type vm:delete -vm-id ID; \
                    everything else is said as `aether` takes it";

/// The command line to parse: as it is, unless it is an older one.
pub(crate) fn line(given: Vec<OsString>) -> Result<Vec<OsString>, Failure> {
    let called = given.first().and_then(|path| Path::new(path).file_name());
    if called.is_none_or(|name| name != NAME) || !given.iter().any(names_type) {
        return Ok(given);
    }
    let options = options(&given[1..])?;
    let mut line = vec!["aether".to_owned()];
    for name in ["url", "key"] {
        if let Some(value) = options.get(name) {
            line.extend([format!("--{name}"), value.clone()]);
        }
    }
    if options.get("json").is_some_and(|value| value != "false") {
        line.push("--json".to_owned());
    }
    line.extend(command(&options)?);
    Ok(line.into_iter().map(OsString::from).collect())
}

fn names_type(word: &OsString) -> bool {
    let word = word.to_string_lossy();
    let word = word.strip_prefix("--").or_else(|| word.strip_prefix('-'));
    word.is_some_and(|word| word == "type" || word.starts_with("type="))
}

type Options = BTreeMap<&'static str, String>;

fn options(words: &[OsString]) -> Result<Options, Failure> {
    let mut options = Options::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let text = word.to_str().ok_or_else(|| wrong("a word is not UTF-8".to_owned()))?;
        let bare = text.strip_prefix("--").or_else(|| text.strip_prefix('-'));
        let bare = bare.ok_or_else(|| wrong(format!("{text:?} is no option")))?;
        let (name, value) = match bare.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (bare, None),
        };
        let known = KNOWN.iter().find(|known| **known == name);
        let known = *known.ok_or_else(|| wrong(format!("there is no option -{name}")))?;
        let value = match value {
            Some(value) => value,
            None if known == "json" => "true".to_owned(),
            None => {
                let next = words.next().and_then(|word| word.to_str());
                next.ok_or_else(|| wrong(format!("-{name} lacks a value")))?.to_owned()
            }
        };
        if options.insert(known, value).is_some() {
            return Err(wrong(format!("-{name} is given twice")));
        }
    }
    Ok(options)
}

fn command(options: &Options) -> Result<Vec<String>, Failure> {
    let needed = |name: &str| {
        let value = options.get(name).filter(|value| !value.is_empty()).cloned();
        value.ok_or_else(|| wrong(format!("-{name} is needed")))
    };
    let own = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    match needed("type")?.as_str() {
        "vm:create" => {
            let mut line = own(&["vm", "create"]);
            if let Some(name) = options.get("name") {
                line.extend(["--name".to_owned(), name.clone()]);
            }
            for tool in tools(options)? {
                line.extend(["--tool".to_owned(), tool]);
            }
            Ok(line)
        }
        "vm:execute" => {
            let mut line = own(&["exec", "-n"]);
            line.extend([needed("vm-id")?, "--".to_owned(), needed("cmd")?]);
            let args = options.get("args").filter(|args| !args.is_empty());
            line.extend(args.into_iter().flat_map(|args| args.split(',')).map(str::to_owned));
            Ok(line)
        }
        "vm:delete" => {
            let mut line = own(&["vm", "delete"]);
            line.push(needed("vm-id")?);
            Ok(line)
        }
        other => Err(wrong(format!("-type {other:?} is not known"))),
    }
}

/// `go,python` and `go=1.23.0`: each tool with its version, where one is said.
fn tools(options: &Options) -> Result<Vec<String>, Failure> {
    let list = |name: &str| {
        let text = options.get(name).map(String::as_str).unwrap_or_default();
        text.split(',').map(str::trim).filter(|word| !word.is_empty()).collect::<Vec<_>>()
    };
    let mut tools: Vec<(String, Option<String>)> =
        list("tools").into_iter().map(|tool| (tool.to_owned(), None)).collect();
    for pair in list("tool-versions") {
        let (tool, version) =
            pair.split_once('=').ok_or_else(|| wrong(format!("{pair:?} is not TOOL=VERSION")))?;
        match tools.iter_mut().find(|(name, _)| name == tool) {
            Some((_, said)) => *said = Some(version.to_owned()),
            None => return Err(wrong(format!("-tool-versions has {tool}, and -tools has not"))),
        }
    }
    let word = |(tool, version): (String, Option<String>)| match version {
        Some(version) => format!("{tool}@{version}"),
        None => tool,
    };
    Ok(tools.into_iter().map(word).collect())
}

fn wrong(text: String) -> Failure {
    Failure::usage(text).hint(HINT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turned(words: &[&str]) -> Result<String, Failure> {
        let line = line(words.iter().map(OsString::from).collect())?;
        let words: Vec<_> = line.iter().map(|word| word.to_str().unwrap()).collect();
        Ok(words.join(" "))
    }

    #[test]
    fn older_lines_become_todays() {
        let cli = "/usr/bin/aether-cli";
        for (words, line) in [
            (
                &[
                    "-type",
                    "vm:create",
                    "-name",
                    "my-vm",
                    "-tools",
                    "go,python",
                    "-tool-versions",
                    "go=1.23.0,python=3.11",
                ][..],
                "aether vm create --name my-vm --tool go@1.23.0 --tool python@3.11",
            ),
            (
                &[
                    "-type",
                    "vm:execute",
                    "-vm-id",
                    "ID",
                    "-cmd",
                    "git",
                    "-args",
                    "clone,https://host/repo",
                ],
                "aether exec -n ID -- git clone https://host/repo",
            ),
            (&["--type=vm:delete", "-vm-id=ID"], "aether vm delete ID"),
            (
                &["-json", "-url", "http://h", "-type", "vm:create", "-tools", "go"],
                "aether --url http://h --json vm create --tool go",
            ),
        ] {
            assert_eq!(turned(&[&[cli], words].concat()).unwrap(), line);
        }
        // Today's lines are taken under either name, and the older ones under theirs only.
        assert_eq!(turned(&[cli, "vm", "list"]).unwrap(), format!("{cli} vm list"));
        assert_eq!(turned(&["aether", "-type", "x"]).unwrap(), "aether -type x");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (words, text) in [
            (&["-type", "vm:fly"][..], "vm:fly"),
            (&["-type", "vm:delete"], "-vm-id is needed"),
            (&["-type"], "-type lacks a value"),
            (&["-type", "vm:create", "-nam", "x"], "no option -nam"),
            (&["-type", "vm:create", "web"], "\"web\" is no option"),
            (&["-type", "vm:create", "-type", "vm:create"], "twice"),
            (&["-type", "vm:create", "-tool-versions", "go=1"], "-tools has not"),
            (&["-type", "vm:create", "-tools", "go", "-tool-versions", "go"], "TOOL=VERSION"),
        ] {
            let failure = turned(&[&["aether-cli"], words].concat()).unwrap_err();
            assert!(failure.message.contains(text), "{failure}");
            assert_eq!(failure.exit.status(), 2);
        }
    }
}
