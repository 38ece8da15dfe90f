//! What the tests could not do on this host. A test says so in a line `skipped: WHY`; nextest
//! keeps its output in the JUnit report, and here the lines are collected and counted.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

use crate::steps::say;

#[derive(Debug, Default, PartialEq, Eq)]
struct Report {
    passed: usize,
    failed: usize,
    /// The test's name and its reason.
    skipped: Vec<(String, String)>,
}

/// Prints the skipped tests, then the count. Fails where a test failed or none ran.
pub(crate) fn report(path: &Path) -> Result<()> {
    let text = fs::read_to_string(path)
        .with_context(|| format!("read the test report {}", path.display()))?;
    let report = read(&text);
    for (test, reason) in &report.skipped {
        say(&format!(" skipped  {test}: {reason}"));
    }
    let Report { passed, failed, skipped } = &report;
    say(&format!("{passed} passed, {failed} failed, {} skipped", skipped.len()));
    if *failed > 0 {
        bail!("{failed} tests failed");
    }
    if *passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

/// Reads what nextest writes, which is regular; this is no reader of XML at large.
fn read(text: &str) -> Report {
    let mut report = Report::default();
    for case in text.split("<testcase ").skip(1) {
        let case = case.split("</testcase>").next().unwrap_or(case);
        let name = format!("{} {}", attribute(case, "classname"), attribute(case, "name"));
        // A test that passed at a second try is flaky, and counts as failed.
        let bad = ["<failure", "<error", "<flakyFailure", "<flakyError"];
        if bad.iter().any(|tag| case.contains(tag)) {
            report.failed += 1;
            continue;
        }
        let reason = case.lines().find_map(|line| {
            let line = line.rsplit_once('>').map_or(line, |(_, after)| after);
            line.trim().strip_prefix("skipped: ")
        });
        match reason {
            Some(reason) => report.skipped.push((name, plain(reason))),
            None => report.passed += 1,
        }
    }
    report
}

fn attribute<'a>(case: &'a str, name: &str) -> &'a str {
    let start = format!("{name}=\"");
    let head = case.split('>').next().unwrap_or(case);
    // `name` is also the end of `classname`: a space or the start stands before it.
    head.match_indices(&start)
        .find(|(at, _)| *at == 0 || head.as_bytes()[at - 1] == b' ')
        .and_then(|(at, found)| head[at + found.len()..].split('"').next())
        .unwrap_or("?")
}

fn plain(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&apos;", "'")
        .replace("&amp;", "&")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_counted() {
        let text = r#"<testsuites><testsuite name="a">
<testcase name="one" classname="a" time="0.1"><system-out>running
ok</system-out></testcase>
<testcase name="two" classname="a::b"><system-err>skipped: no &quot;/dev/kvm&quot; here
</system-err></testcase>
<testcase name="three" classname="a"><failure type="x">skipped: not really</failure></testcase>
<testcase name="four" classname="a"><flakyFailure/></testcase>
<testcase name="five" classname="a"/>
</testsuite></testsuites>"#;
        let skipped = vec![("a::b two".to_owned(), "no \"/dev/kvm\" here".to_owned())];
        assert_eq!(read(text), Report { passed: 2, failed: 2, skipped });
    }
}
