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
