//! What bears our name on this host.

use super::{elements, foreign, instance, link, namespace};

/// Namespaces, links, tables and rules of this host (the namespace of this thread) that belong to
/// one instance, or to any. For `doctor` and for tests: a running instance shows up here as well.
pub fn leftovers(instance: Option<&str>) -> Vec<String> {
    let mut found = Vec::new();
    let is_ours = |id: Option<&str>| match (id, instance) {
        (None, _) => false,
        (Some(id), Some(wanted)) => id == wanted,
        (Some(_), None) => true,
    };
    for name in namespace::names() {
        if is_ours(name.strip_prefix("aether-")) {
            found.push(format!("namespace {name}"));
        }
    }
    let links = instance::route_socket().map(|mut socket| link::links(&mut socket));
    for link in links.into_iter().flatten().flatten() {
        if instance::is_uplink(&link.name) && is_ours(link.name.get(2..10)) {
            found.push(format!("link {}", link.name));
        }
    }
    let tables = instance::filter_socket().map(|mut socket| elements::tables(&mut socket));
    for table in tables.into_iter().flatten().flatten() {
        if is_ours(table.strip_prefix("aether_")) {
            found.push(format!("table inet {table}"));
        }
    }
    found.extend(foreign::marked(&format!("aether-{}", instance.unwrap_or_default())));
    found
}
