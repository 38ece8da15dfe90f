//! What the host's own clients are configured with. They are asked themselves: how npm and pip
//! find their configuration, and what they use where there is none, is theirs to know.

use crate::program::run;

/// The registry that npm uses.
pub(super) fn npm() -> Result<String, String> {
    let missing = |reason: &str| {
        format!(
            "no npm registry is configured, and npm cannot be asked for its own ({reason}); give \
             one with --npm-registry"
        )
    };
    let text = run("npm", ["config", "get", "registry"]).map_err(|reason| missing(&reason))?;
    address(&text).ok_or_else(|| missing("it has none"))
}

/// The index that pip uses.
pub(super) fn pypi() -> Result<String, String> {
    let mut why = "neither python3 nor pip3 is there".to_owned();
    for command in [&["python3", "-m", "pip"][..], &["pip3"], &["pip"]] {
        match run(command[0], command[1..].iter().chain(&["config", "list"])) {
            Ok(text) => match index_in(&text).or_else(pips_own) {
                Some(url) => return Ok(url),
                None => "pip has none".clone_into(&mut why),
            },
            Err(reason) => why = reason,
        }
    }
    Err(format!(
        "no Python package index is configured, and pip cannot be asked for its own ({why}); give \
         one with --pypi-index"
    ))
}

/// Of `pip config list`, whose lines are `global.index-url='https://…'`. What stands in the
/// environment goes before what a file says.
fn index_in(text: &str) -> Option<String> {
    let value = |line: &str| {
        let (name, value) = line.split_once('=')?;
        let name = name.trim();
        let is_index = name.ends_with(".index-url");
        let rank = match name {
            ":env:.index-url" => 0,
            "install.index-url" | "download.index-url" => 1,
            _ => 2,
        };
        is_index.then(|| Some((rank, address(value.trim().trim_matches(['\'', '"']))?)))?
    };
    text.lines().filter_map(value).min().map(|(_, url)| url)
}

/// What pip uses where nothing is configured.
fn pips_own() -> Option<String> {
    let program = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)";
    address(&run("python3", ["-c", program]).ok()?)
}

fn address(text: &str) -> Option<String> {
    let text = text.trim();
    (text.starts_with("https://") || text.starts_with("http://")).then(|| text.to_owned())
}

/// The addresses of Debian's archive and security archive that the host's apt has for a suite, of
/// `apt-get indextargets`.
pub(super) fn debian_in(targets: &str, suite: &str) -> (Option<String>, Option<String>) {
    let find = |codename: &str| {
        targets
            .lines()
            .filter_map(|line| line.strip_prefix("Debian ")?.split_once(' '))
            .find(|(found, uri)| *found == codename && uri.starts_with("http"))
            .map(|(_, uri)| uri.trim_end_matches('/').to_owned())
    };
    (find(suite), find(&format!("{suite}-security")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pips_environment_goes_before_its_files() {
        let text = "global.index-url='http://file.example/simple'\nglobal.cert='/x'\n\
                    :env:.index-url='http://environment.example/simple'\n";
        assert_eq!(index_in(text).unwrap(), "http://environment.example/simple");
        assert_eq!(index_in(":env:.find-links='/wheels'\n"), None);
        assert_eq!(index_in("global.index-url='/not/an/address'\n"), None);
    }

    #[test]
    fn debians_addresses_are_those_of_the_suite() {
        let targets = "Google bookworm http://packages.example/apt\n\
                       Debian bookworm http://mirror.example/debian/\n\
                       Debian trixie-security http://other.example/security/\n";
        let (archive, security) = debian_in(targets, "bookworm");
        assert_eq!(archive.unwrap(), "http://mirror.example/debian");
        assert_eq!(security, None);
    }
}
