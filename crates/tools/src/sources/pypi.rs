//! Wheels of a Python package index (PEP 503, and 691 where the index has it).

use reqwest::Url;
use serde::Deserialize;

use super::{Artefact, Offer, needed};
use crate::checksum::Checksum;
use crate::http::{Http, HttpError};
use crate::version::Version;

const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, text/html;q=0.5";
/// The C library of the base image is glibc 2.36.
const GLIBC_MINOR_MAX: u32 = 36;

/// What an index has of one package.
pub(super) struct Package {
    name: String,
    wheels: Vec<Wheel>,
}

struct Wheel {
    version: String,
    /// More fitting ones have more.
    rank: u32,
    url: Url,
    checksum: Option<Checksum>,
    size_bytes: Option<u64>,
}

#[derive(Deserialize)]
struct Listing {
    files: Vec<File>,
}

#[derive(Deserialize)]
struct File {
    filename: String,
    url: String,
    #[serde(default)]
    hashes: std::collections::BTreeMap<String, String>,
    #[serde(default)]
    size: Option<u64>,
    /// `false`, or a text that says why.
    #[serde(default)]
    yanked: serde_json::Value,
}

pub(super) async fn package(http: &Http, index: &str, name: &str) -> Result<Package, String> {
    let normal = name.to_ascii_lowercase().replace(['_', '.'], "-");
    let url = format!("{}/{normal}/", index.trim_end_matches('/'));
    let listing = match http.listing(&url, ACCEPT).await {
        Err(HttpError::NotFound(_)) => return Err(format!("the index has no package {name}")),
        other => needed(other)?,
    };
    let files = if listing.kind.contains("json") {
        let parsed: Listing = serde_json::from_slice(&listing.bytes)
            .map_err(|error| format!("the index's listing of {name} is not readable: {error}"))?;
        parsed.files
    } else {
        files_of_html(&String::from_utf8_lossy(&listing.bytes))
    };
    let wheels = files.iter().filter_map(|file| Wheel::of(file, &listing.url)).collect();
    Ok(Package { name: name.to_owned(), wheels })
}

impl Package {
    pub(super) fn offer(&self) -> Offer {
        let mut ids: Vec<&String> = self.wheels.iter().map(|wheel| &wheel.version).collect();
        ids.sort_unstable();
        ids.dedup();
        let versions = ids.into_iter().filter_map(|id| Version::parse(id)).collect();
        Offer { versions, latest: None }
    }

    pub(super) fn artefact(&self, version: &str) -> Result<Artefact, String> {
        let name = &self.name;
        let wheels = self.wheels.iter().filter(|wheel| wheel.version == version);
        let wheel = wheels
            .max_by_key(|wheel| wheel.rank)
            .ok_or_else(|| format!("pypi:{name} has no wheel of version {version}"))?;
        let checksum = wheel.checksum.clone().ok_or_else(|| {
            format!("pypi:{name} {version} has no SHA-256 digest, and cannot be checked")
        })?;
        let urls = vec![wheel.url.to_string()];
        Ok(Artefact { name: format!("{name}.whl"), urls, checksum, size_bytes: wheel.size_bytes })
    }
}

impl Wheel {
    /// `None` for what is withdrawn, no wheel, or not for the base image.
    fn of(file: &File, page: &Url) -> Option<Self> {
        if !matches!(file.yanked, serde_json::Value::Null | serde_json::Value::Bool(false)) {
            return None;
        }
        let parts: Vec<&str> = file.filename.strip_suffix(".whl")?.split('-').collect();
        let [_, version, .., python, abi, platforms] = parts[..] else { return None };
        if !(python.split('.').any(|tag| tag == "py3") && abi == "none") {
            return None;
        }
        let rank = platforms.split('.').filter_map(rank).max()?;
        let mut url = page.join(&file.url).ok()?;
        let fragment = url.fragment().map(str::to_owned);
        url.set_fragment(None);
        let given = file.hashes.get("sha256").cloned();
        let in_url = || fragment?.strip_prefix("sha256=").map(str::to_owned);
        let checksum = given.or_else(in_url).and_then(|hex| Checksum::new("sha256", &hex));
        Some(Self { version: version.to_owned(), rank, url, checksum, size_bytes: file.size })
    }
}

/// How well a platform's tag fits; nothing where it does not.
fn rank(platform: &str) -> Option<u32> {
    match platform {
        "any" => Some(1),
        "linux_x86_64" => Some(2),
        "manylinux1_x86_64" => Some(105),
        "manylinux2010_x86_64" => Some(112),
        "manylinux2014_x86_64" => Some(117),
        other => {
            let minor = other.strip_prefix("manylinux_2_")?.strip_suffix("_x86_64")?;
            let minor: u32 = minor.parse().ok()?;
            (minor <= GLIBC_MINOR_MAX).then_some(100 + minor)
        }
    }
}

/// The links of a page of the older interface.
fn files_of_html(page: &str) -> Vec<File> {
    let file = |tag: &str| {
        let (attributes, rest) = tag.split_once('>')?;
        let (_, href) = attributes.split_once("href=")?;
        let quote = href.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let url = href[1..].split(quote).next()?.replace("&amp;", "&");
        let filename = rest.split('<').next()?.trim().to_owned();
        let yanked = serde_json::Value::Bool(attributes.contains("data-yanked"));
        Some(File { filename, url, hashes: std::collections::BTreeMap::new(), size: None, yanked })
    };
    page.split("<a ").skip(1).filter_map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wheels_of_other_platforms_are_no_wheels() {
        for (platform, fits) in [
            ("any", true),
            ("manylinux_2_17_x86_64", true),
            ("manylinux_2_39_x86_64", false),
            ("manylinux2014_aarch64", false),
            ("musllinux_1_1_x86_64", false),
            ("macosx_11_0_arm64", false),
        ] {
            assert_eq!(rank(platform).is_some(), fits, "{platform}");
        }
    }

    #[test]
    fn page_of_the_older_interface_is_read() {
        let hex = "0".repeat(64);
        let page = format!(
            "<html><a href=\"../f/x-1.0-py3-none-any.whl#sha256={hex}\" data-x>x-1.0-py3-none-any.whl</a>\
             <a href='x-1.1-py3-none-any.whl' data-yanked=\"bad\">x-1.1-py3-none-any.whl</a>\
             <a href=\"x-1.2.tar.gz\">x-1.2.tar.gz</a>"
        );
        let at = Url::parse("http://127.0.0.1/simple/x/").unwrap();
        let wheels: Vec<_> =
            files_of_html(&page).iter().filter_map(|file| Wheel::of(file, &at)).collect();
        let package = Package { name: "x".to_owned(), wheels };
        assert_eq!(package.offer().versions.len(), 1);
        let artefact = package.artefact("1.0").unwrap();
        assert_eq!(artefact.urls, ["http://127.0.0.1/simple/f/x-1.0-py3-none-any.whl"]);
        assert_eq!(artefact.checksum.hex(), hex);
    }
}
