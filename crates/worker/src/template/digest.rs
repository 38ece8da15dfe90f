//! The name of what a template is made from.

use aether_types::TemplateSpec;

use crate::failure::{Failure, internal};

/// Raised when the same content gives another template: the way it is built has changed.
const FORMAT: &str = "aetherium template 1";

/// BLAKE3 in hex of everything that the template depends on. The image's name is not: what it
/// means is.
pub(super) fn digest(
    spec: &TemplateSpec,
    image_digest: &str,
    snapshot_format: &str,
    layers: &[&str],
) -> Result<String, Failure> {
    let nameless = TemplateSpec { image: String::new(), ..spec.clone() };
    let spec = serde_json::to_vec(&nameless)
        .map_err(|_| Failure::last(internal("describe a template")))?;
    let mut hasher = blake3::Hasher::new();
    for part in [FORMAT.as_bytes(), image_digest.as_bytes(), snapshot_format.as_bytes(), &spec] {
        // With its length, so that no two lists of parts are the same bytes.
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    // Without tools it is what it always was.
    for layer in layers {
        hasher.update(&(layer.len() as u64).to_le_bytes());
        hasher.update(layer.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use aether_types::{DriverKind, NetworkPolicy, TemplateStep};

    use super::*;

    fn spec() -> TemplateSpec {
        TemplateSpec {
            image: "debian".into(),
            driver: DriverKind::Sim,
            vcpus: 1,
            memory_mb: 256,
            disk_mb: 64,
            env: BTreeMap::new(),
            files: Vec::new(),
            steps: Vec::new(),
            start: None,
            ready: None,
            network: NetworkPolicy::default(),
            tools: Vec::new(),
        }
    }

    #[test]
    fn the_digest_is_that_of_the_content() {
        let of = |spec: &TemplateSpec, image, format| digest(spec, image, format, &[]).unwrap();
        let base = of(&spec(), "blake3:a", "f");
        assert_eq!(base.len(), 64);
        let renamed = TemplateSpec { image: "other".into(), ..spec() };
        assert_eq!(of(&renamed, "blake3:a", "f"), base);
        assert_ne!(of(&spec(), "blake3:b", "f"), base);
        assert_ne!(of(&spec(), "blake3:a", "g"), base);
        assert_ne!(of(&spec(), "blake3:af", ""), base);
        let step = TemplateStep { run: "true".into(), timeout_s: None };
        let stepped = TemplateSpec { steps: vec![step], ..spec() };
        assert_ne!(of(&stepped, "blake3:a", "f"), base);
        let with = |layers: &[&str]| digest(&spec(), "blake3:a", "f", layers).unwrap();
        assert_ne!(with(&["blake3:1"]), base);
        assert_ne!(with(&["blake3:1", "blake3:2"]), with(&["blake3:2", "blake3:1"]));
    }
}
