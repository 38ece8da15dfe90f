//! The API's page says what there is.

use aether_gateway::Gateway;
use aether_types::ErrorCode;

const PAGE: &str = include_str!("../../../../docs/api.md");

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
