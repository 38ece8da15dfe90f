//! What the program says, without what differs from run to run.

use crate::rig::Rig;

pub(crate) fn plain(text: &str) -> String {
    let mut out: Vec<String> = Vec::new();
    // The steps of a start are the worker's business.
    for line in text.lines().filter(|line| !line.starts_with("           ")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let words = words.into_iter().map(|word| {
            let bare = word.trim_matches(|c: char| "(),[]".contains(c));
            let kind = if bare.len() == 36 && bare.matches('-').count() == 4 {
                "ID"
            } else if bare.len() >= 64 && bare.trim_start_matches("blake3:").len() == 64 {
                "DIGEST"
            } else if bare.len() == 24 && bare.ends_with('Z') {
                "TIME"
            } else if bare.parse::<std::net::IpAddr>().is_ok() {
                "ADDRESS"
            } else if bare.len() < 6 && bare.ends_with('s') && bare.as_bytes()[0].is_ascii_digit() {
                "AGE"
            } else {
                return word.to_owned();
            };
            word.replace(bare, kind)
        });
        let words: Vec<String> = words.collect();
        // A time that something took, or room.
        let measured = |n: usize| {
            words.get(n + 1).is_some_and(|unit| unit.starts_with("ms") || unit.starts_with("KiB"))
        };
        let plain = |(n, word): (usize, &String)| {
            if measured(n) && word.parse::<f64>().is_ok() { "N".to_owned() } else { word.clone() }
        };
        out.push(words.iter().enumerate().map(plain).collect::<Vec<_>>().join(" "));
    }
    out.join("\n")
}

/// Both streams of each command: what is told about the way, and what came of it.
pub(crate) fn session(rig: &Rig, lines: &[&[&str]]) -> String {
    let mut said = String::new();
    for line in lines {
        let output = rig.run(line);
        said.extend(["$ aether ", &line.join(" "), "\n"]);
        for stream in [&output.stderr, &output.stdout] {
            let text = plain(&String::from_utf8_lossy(stream));
            if !text.is_empty() {
                said.extend([text.as_str(), "\n"]);
            }
        }
        if !output.status.success() {
            said.extend(["→ ", &output.status.code().unwrap().to_string(), "\n"]);
        }
    }
    said
}
