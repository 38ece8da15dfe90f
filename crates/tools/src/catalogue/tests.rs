use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

#[test]
fn every_recipe_of_the_folder_is_built_in_and_sound() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("catalogue");
    let files: BTreeSet<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let built_in: BTreeSet<String> = BUILT_IN.iter().map(|(file, _)| (*file).to_owned()).collect();
    assert_eq!(files, built_in);
    let catalogue = Catalogue::load(None).unwrap();
    let mut names = BTreeSet::new();
    for recipe in catalogue.list() {
        assert!(files.contains(&format!("{}.toml", recipe.name)), "{}", recipe.name);
        for name in std::iter::once(&recipe.name).chain(&recipe.aliases) {
            assert!(names.insert(name.clone()), "{name} means two tools");
            assert_eq!(catalogue.find(name).unwrap().name, recipe.name);
        }
    }
    for name in "git nodejs node bun deno claude-code go golang python python3 rust uv docker \
                 ripgrep rg jq gh amp"
        .split(' ')
        .filter(|name| !name.is_empty())
    {
        assert!(names.contains(name), "{name}");
    }
}

#[test]
fn unknown_name_gives_the_closest() {
    let catalogue = Catalogue::load(None).unwrap();
    let closest = |name: &str| match catalogue.find(name) {
        Err(ToolError::UnknownTool { closest, .. }) => closest,
        other => panic!("{other:?}"),
    };
    assert_eq!(closest("pyhton")[0], "python");
    assert_eq!(closest("nodesj")[0], "nodejs");
    assert_eq!(closest("rustc")[0], "rust");
    assert_eq!(closest("claude-cod")[0], "claude-code");
    assert!(closest("kubernetes").is_empty(), "{:?}", closest("kubernetes"));
    let text = catalogue.find("pyhton").unwrap_err().to_string();
    assert!(text.contains("pyhton") && text.contains("python"), "{text}");
}

const RECIPE: &str = r#"
name = "hello"
aliases = ["go"]
summary = "Says hello"
commands = ["hello"]
install = "true"
verify = "hello"
expect = ["{version}"]
[source]
kind = "archive"
url = "http://127.0.0.1/hello-{version}.tar.gz"
releases = [{ version = "1.0", digest = "sha256:DIGEST" }]
"#;

fn recipe() -> String {
    RECIPE.replace("DIGEST", &"0".repeat(64))
}

#[test]
fn recipe_of_the_documentation_is_sound() {
    let docs = include_str!("../../../../docs/tools.md");
    let (_, rest) = docs.split_once("```toml\n").unwrap();
    let (recipe, _) = rest.split_once("```").unwrap();
    assert_eq!(Recipe::parse(Path::new("docs/tools.md"), recipe).unwrap().aliases, ["hi"]);
}

#[test]
fn users_folder_adds_and_replaces() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("hello.toml"), recipe()).unwrap();
    let mine = recipe().replace("\"hello\"\naliases = [\"go\"]", "\"jq\"");
    fs::write(folder.path().join("jq.toml"), mine).unwrap();
    fs::write(folder.path().join("notes.txt"), "no recipe").unwrap();
    let catalogue = Catalogue::load(Some(folder.path())).unwrap();
    assert_eq!(catalogue.find("hello").unwrap().summary, "Says hello");
    assert_eq!(catalogue.find("jq").unwrap().summary, "Says hello");
    assert_eq!(catalogue.find("go").unwrap().name, "go", "a name goes before an alias");
    assert_eq!(catalogue.list().len(), BUILT_IN.len() + 1);
}

#[test]
fn wrong_recipe_is_named_with_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.toml");
    for (from, to, reason) in [
        ("summary", "sumary", "unknown field"),
        ("[\"hello\"]", "[\"a/b\"]", "plain file name"),
        ("[\"hello\"]", "[]", "at least one"),
        ("expect = [\"{version}\"]", "expect = []", "looked at"),
        ("\"hello\"\n", "\"Hello\"\n", "lower-case"),
        ("sha256:", "md5:", "no digest"),
        (", digest = \"sha256:DIGEST\"", "", "digest is needed"),
    ] {
        let text = RECIPE.replacen(from, to, 1).replace("DIGEST", &"0".repeat(64));
        fs::write(&path, text).unwrap();
        let error = Catalogue::load(Some(folder.path())).unwrap_err().to_string();
        assert!(error.contains("bad.toml") && error.contains(reason), "{reason}: {error}");
    }
    let error = Catalogue::load(Some(&folder.path().join("none"))).unwrap_err();
    assert!(error.to_string().contains("none"), "{error}");
}

#[test]
fn recipes_digest_is_of_what_makes_the_layer() {
    let parse = |text: &str| Recipe::parse(Path::new("x"), text).unwrap();
    let one = parse(&recipe());
    assert_eq!(one.digest(), parse(&recipe().replace("Says", "Cries")).digest());
    assert_ne!(one.digest(), parse(&recipe().replace("\"true\"", "\":\"")).digest());
    assert_ne!(one.digest(), parse(&recipe().replace("{version}.tar", "v{version}.tar")).digest());
}

proptest! {
    #[test]
    fn distance_is_one(a in "[a-d]{0,8}", b in "[a-d]{0,8}") {
        prop_assert_eq!(distance(&a, &b), distance(&b, &a));
        prop_assert_eq!(distance(&a, &b) == 0, a == b);
        prop_assert!(distance(&a, &b) <= a.len().max(b.len()));
    }
}
