//! Files behind addresses, with digests that the recipe has or names.

use super::{Artefact, Offer, needed};
use crate::checksum::Checksum;
use crate::http::Http;
use crate::recipe::{Archive, Index, fill};
use crate::version::Version;

pub(super) async fn offer(http: &Http, archive: &Archive) -> Result<Offer, String> {
    let mut ids: Vec<String> =
        archive.releases.iter().map(|release| release.version.clone()).collect();
    if let Some(index) = &archive.index {
        let page = needed(http.listing(&index.url, "*/*").await)?;
        ids.extend(versions_in(&String::from_utf8_lossy(&page.bytes), index));
    }
    ids.sort_unstable();
    ids.dedup();
    let versions = ids.iter().filter_map(|id| Version::parse(id)).collect();
    Ok(Offer { versions, latest: None })
}

pub(super) async fn artefact(
    http: &Http,
    archive: &Archive,
    version: &Version,
) -> Result<Artefact, String> {
    let url = fill(&archive.url, version);
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default().to_owned();
    if name.is_empty() || name.starts_with('.') {
        return Err(format!("{url} has no file name at its end"));
    }
    let own = archive.releases.iter().find(|release| release.version == version.id);
    let checksum = match (own.and_then(|release| release.digest.clone()), &archive.checksums) {
        (Some(digest), _) => digest,
        (None, Some(checksums)) => {
            let address = fill(checksums, version);
            let page = needed(http.listing(&address, "*/*").await)?;
            let text = String::from_utf8_lossy(&page.bytes);
            checksum_in(&text, &name).ok_or_else(|| format!("{address} has no digest of {name}"))?
        }
        (None, None) => return Err(format!("the recipe has no digest of {}", version.text)),
    };
    Ok(Artefact { name, urls: vec![url], checksum, size_bytes: None })
}

fn versions_in(page: &str, index: &Index) -> Vec<String> {
    let version = |part: &str| {
        let (version, _) = part.split_once(&index.before)?;
        Version::parse(version).map(|version| version.id)
    };
    page.split(&index.after).skip(1).filter_map(version).collect()
}

/// Of lines `<hexadecimal>  <file>`, as `sha256sum` writes them, or the digest alone.
fn checksum_in(text: &str, name: &str) -> Option<Checksum> {
    let of_hex = |hex: &str| Checksum::new("sha256", hex).or_else(|| Checksum::new("sha512", hex));
    let line = |line: &str| {
        let (hex, file) = line.split_once(char::is_whitespace)?;
        let file = file.trim().trim_start_matches('*');
        (file.rsplit('/').next() == Some(name)).then(|| of_hex(hex))?
    };
    text.lines().find_map(line).or_else(|| of_hex(text.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_is_that_of_the_file() {
        let (a, b) = ("a".repeat(64), "b".repeat(128));
        let text = format!("{a}  x-1.tar.gz\n{b} *./dist/y-1.tar.gz\n");
        assert_eq!(checksum_in(&text, "x-1.tar.gz").unwrap().hex(), a);
        assert_eq!(checksum_in(&text, "y-1.tar.gz").unwrap().hex(), b);
        assert_eq!(checksum_in(&text, "z"), None);
        assert_eq!(checksum_in(&format!("{a}\n"), "z").unwrap().hex(), a);
    }

    #[test]
    fn versions_stand_between_two_texts() {
        let index =
            Index { url: String::new(), after: "href=\"v".to_owned(), before: "/\"".to_owned() };
        let page = "<a href=\"v1.2.3/\"><a href=\"v2.0-rc1/\"><a href=\"vnext/\"><a href=\"v9";
        assert_eq!(versions_in(page, &index), ["1.2.3", "2.0-rc1"]);
    }
}
