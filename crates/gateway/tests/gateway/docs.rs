//! The API's page says what there is.

use aether_gateway::Gateway;
use aether_types::ErrorCode;

const PAGE: &str = include_str!("../../../../docs/api.md");
const RIGHTS: &str = include_str!("../../../../docs/security.md");

#[test]
fn the_page_on_rights_has_every_route_with_what_it_needs() {
    for (method, path, rule) in Gateway::rules() {
        let route = format!("`{method} {}`", path.trim_start_matches("/api/v1"));
        let line = RIGHTS.lines().find(|line| line.starts_with("| ") && line.contains(&route));
        let line = line.unwrap_or_else(|| panic!("docs/security.md lacks {route}"));
        let needed = rule.map_or("nothing".to_owned(), |scope| format!("`{scope}`"));
        assert!(line.starts_with(&format!("| {needed}")), "{route} needs {needed}: {line}");
    }
}

#[test]
fn the_page_names_every_route_and_every_code() {
    for (method, path) in Gateway::routes() {
        let path = path.trim_start_matches("/api/v1");
        let line = format!("`{method} {path}`");
        assert!(PAGE.contains(&line), "docs/api.md lacks {line}");
    }
    for code in ErrorCode::ALL {
        assert!(PAGE.contains(&format!("`{code}`")), "docs/api.md lacks {code}");
    }
}
