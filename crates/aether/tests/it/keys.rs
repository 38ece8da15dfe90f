use crate::rig::Rig;

#[test]
fn a_key_is_given_used_and_taken_back() {
    let rig = Rig::start();
    let text = rig.ok(&["key", "create", "board", "--role", "viewer", "--expires", "1d"]);
    let key = text.trim();
    assert!(key.starts_with("aeth_") && !key.contains(char::is_whitespace), "{key}");
    assert_eq!(rig.ok(&["--key", key, "--json", "vm", "list"]).matches("items").count(), 1);
    let (status, said) = rig.fails(&["--key", key, "vm", "create"]);
    assert_eq!(status, 5, "{said}");
    assert!(said.contains("[forbidden]") && said.contains("`vms:write` is needed"), "{said}");

    let listed: serde_json::Value =
        serde_json::from_str(&rig.ok(&["--json", "key", "list"])).unwrap();
    let (board, admin) = (&listed["items"][0], &listed["items"][1]);
    assert_eq!((&board["name"], &board["role"]), (&"board".into(), &"viewer".into()));
    assert_eq!((&admin["name"], &board["created_by"]), (&"admin".into(), &admin["id"]));
    let table = rig.ok(&["key", "list"]);
    assert!(table.contains(board["prefix"].as_str().unwrap()) && !table.contains(key), "{table}");

    let id = board["id"].as_str().unwrap();
    assert_eq!(rig.ok(&["key", "revoke", id]), "revoked board\n");
    assert_eq!(rig.fails(&["--key", key, "vm", "list"]).0, 5);
    assert!(rig.ok(&["key", "get", id]).contains("state      revoked"));
    assert!(!rig.ok(&["key", "list"]).contains(id));
    assert!(rig.ok(&["key", "list", "--all"]).contains(id));
    let (status, said) = rig.fails(&["key", "get", "00000000-0000-7000-8000-000000000000"]);
    assert_eq!(status, 3, "{said}");
    assert!(said.contains("[key_not_found]"), "{said}");
}

/// A command line with this key.
fn with<'a>(key: &'a str, args: &[&'a str]) -> Vec<&'a str> {
    [&["--key", key][..], args].concat()
}

#[test]
fn a_project_is_made_bounded_and_deleted() {
    let rig = Rig::start();
    rig.ok(&["project", "create", "build", "--vms", "1"]);
    let key = rig.ok(&["key", "create", "ci", "--project", "build", "--role", "admin"]);
    let key = key.trim();
    rig.ok(&["vm", "create", "--name", "web"]);
    rig.ok(&with(key, &["vm", "create", "--name", "web"]));
    let (status, said) = rig.fails(&with(key, &["vm", "create", "--name", "two"]));
    assert_eq!(status, 4, "{said}");
    assert!(said.contains("[quota_exceeded]"), "{said}");
    let quota = rig.ok(&with(key, &["project", "quota"]));
    assert!(quota.lines().any(|line| line.split_whitespace().eq(["vms", "1", "1"])), "{quota}");
    assert_eq!(rig.fails(&with(key, &["project", "list"])).0, 5);
    let (status, said) = rig.fails(&["project", "delete", "build"]);
    assert_eq!(status, 4, "{said}");
    assert!(said.contains("[project_in_use]"), "{said}");
    rig.ok(&with(key, &["vm", "delete", "web"]));
    rig.ok(&["project", "quota", "build", "--none"]);
    assert_eq!(rig.ok(&["project", "delete", "build"]), "deleted build\n");
    assert_eq!(rig.fails(&with(key, &["vm", "list"])).0, 5);
    assert!(rig.ok(&["vm", "list"]).contains("web"), "another's of this name");
}
