//! Versions as the sources write them, and what part of them a request accepts. Pure.
//!
//! One reading for npm, PyPI and Debian: numbers with dots, then perhaps something that makes it a
//! pre-release. Whatever is written with fewer numbers means all that begin with them: `20` is
//! `20.x`, `<=3.11` includes `3.11.9`, `>3.11` begins with `3.12`.

use std::cmp::Ordering;

/// A version that a source offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Version {
    /// For people, and what is asked for exactly.
    pub(crate) text: String,
    /// As the source names it: Debian's `1:2.39.5-0+deb12u3` is `2.39.5` for people.
    pub(crate) id: String,
    release: Vec<u64>,
    is_pre: bool,
}

/// More numbers than any version has; what has more is no version.
const NUMBERS_MAX: usize = 8;

impl Version {
    /// A version of npm, PyPI or an archive. `None` for what begins with no number.
    pub(crate) fn parse(id: &str) -> Option<Self> {
        let text = id.strip_prefix('v').unwrap_or(id);
        let (release, rest) = numbers(text)?;
        let is_pre = is_pre_release(rest);
        Some(Self { text: text.to_owned(), id: id.to_owned(), release, is_pre })
    }

    /// A Debian version, which is shown without epoch, revision and what Debian did to the source.
    /// Letters are patch levels (`3.0pl1`): what comes before a release has a `~` there.
    pub(crate) fn parse_debian(id: &str) -> Option<Self> {
        let upstream = id.split_once(':').map_or(id, |(_, rest)| rest);
        let (release, rest) = numbers(upstream)?;
        let numbers = upstream.len() - rest.len();
        let letters = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
        let text = upstream[..numbers + letters].to_owned();
        let is_pre = rest[letters..].starts_with('~');
        Some(Self { text, id: id.to_owned(), release, is_pre })
    }

    pub(crate) fn is_pre(&self) -> bool {
        self.is_pre
    }

    /// The number at a place, 0 where there is none.
    pub(crate) fn number(&self, place: usize) -> u64 {
        self.release.get(place).copied().unwrap_or(0)
    }

    /// Oldest first; a pre-release comes before what it leads to.
    pub(crate) fn order(&self, other: &Self) -> Ordering {
        compare(&self.release, &other.release)
            .then(other.is_pre.cmp(&self.is_pre))
            .then_with(|| natural(&self.id, &other.id))
    }
}

/// `rc1`, `-beta.2`, `a1`, `.dev3`; not `.post1`, `+build` or nothing.
fn is_pre_release(rest: &str) -> bool {
    let word = rest.trim_start_matches(['-', '.', '_']);
    !(word.is_empty() || word.starts_with('+') || word.starts_with("post"))
}

/// The numbers that a text begins with, and what follows them.
fn numbers(text: &str) -> Option<(Vec<u64>, &str)> {
    let mut release = Vec::new();
    let mut rest = text;
    loop {
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        if end == 0 {
            break;
        }
        release.push(rest[..end].parse().ok()?);
        rest = &rest[end..];
        match rest.strip_prefix('.') {
            Some(next) if next.starts_with(|c: char| c.is_ascii_digit()) => rest = next,
            _ => break,
        }
    }
    (1..=NUMBERS_MAX).contains(&release.len()).then_some((release, rest))
}

/// Missing numbers are 0.
fn compare(a: &[u64], b: &[u64]) -> Ordering {
    let at = |numbers: &[u64], place| numbers.get(place).copied().unwrap_or(0);
    (0..a.len().max(b.len()))
        .map(|place| at(a, place).cmp(&at(b, place)))
        .find(|order| order.is_ne())
        .unwrap_or(Ordering::Equal)
}

/// Compares texts, but runs of digits by their value, so that `rc10` follows `rc9`.
fn natural(a: &str, b: &str) -> Ordering {
    let key = |text: &str| {
        let mut parts: Vec<(u64, String)> = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let is_digit = |c: char| c.is_ascii_digit();
            let digits = rest.find(|c| !is_digit(c)).unwrap_or(rest.len());
            let end = rest[digits..].find(is_digit).map_or(rest.len(), |at| at + digits);
            parts.push((rest[..digits].parse().unwrap_or(0), rest[digits..end].to_owned()));
            rest = &rest[end..];
        }
        parts
    };
    key(a).cmp(&key(b))
}

/// What a request accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wanted {
    Latest,
    /// A version as it is written or, where there is none, the newest that begins with it.
    Plain {
        text: String,
        range: Range,
    },
    /// One of these, each of which is all of its ranges at once.
    Ranges(Vec<Vec<Range>>),
}

/// From, and up to but not, in numbers. `None`: no bound.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Range {
    from: Option<Vec<u64>>,
    below: Option<Vec<u64>>,
}

impl Wanted {
    /// Reads `latest`, `20`, `20.x`, `^1.2`, `~1.2`, `>=3.10, <3.12`, `^18 || >=20.5`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text == "latest" || text == "*" {
            return Ok(Self::Latest);
        }
        let is_plain = !text.contains(['^', '~', '<', '>', '=', '*', '|', ',', ' ']);
        if is_plain && !is_wildcard(text) {
            let plain = text.strip_prefix('v').unwrap_or(text);
            let range = match numbers(plain) {
                // What has more than numbers means that one only.
                Some((release, "")) => Range::of(release),
                Some(_) => Range::nothing(),
                None => return Err(unreadable(text)),
            };
            return Ok(Self::Plain { text: plain.to_owned(), range });
        }
        let alternatives: Result<Vec<_>, String> = text.split("||").map(all_of).collect();
        Ok(Self::Ranges(alternatives?))
    }

    /// Whether it names one version for ever, so that nothing newer can come to be meant.
    pub(crate) fn is_exactly(&self, version: &Version) -> bool {
        matches!(self, Self::Plain { text, .. } if *text == version.text)
    }

    fn accepts(&self, version: &Version) -> bool {
        match self {
            Self::Latest => !version.is_pre,
            Self::Plain { range, .. } => !version.is_pre && range.holds(version),
            Self::Ranges(alternatives) => {
                !version.is_pre
                    && alternatives.iter().any(|all| all.iter().all(|range| range.holds(version)))
            }
        }
    }

    /// The version to take: the very one, else the newest that fits. `latest` is what the source
    /// says it is, where it does, even a pre-release.
    pub(crate) fn pick<'a>(
        &self,
        offered: &'a [Version],
        latest: Option<&str>,
    ) -> Option<&'a Version> {
        let named = match self {
            Self::Latest => latest,
            Self::Plain { text, .. } => Some(text.as_str()),
            Self::Ranges(_) => None,
        };
        let newest_of = |is_fit: &dyn Fn(&Version) -> bool| {
            offered.iter().filter(|version| is_fit(version)).max_by(|a, b| a.order(b))
        };
        named
            .and_then(|text| newest_of(&|version| version.text == text || version.id == text))
            .or_else(|| newest_of(&|version| self.accepts(version)))
    }

    /// The versions closest to what was asked for, closest first, no two of one text.
    pub(crate) fn nearest(&self, offered: &[Version], count: usize) -> Vec<String> {
        // Nothing is as close to no number at all as the newest.
        let target = self.target().unwrap_or_else(|| vec![u64::MAX]);
        // By the first number that differs; what follows it says nothing of how close one is.
        let distance = |version: &Version| {
            let number = |place| target.get(place).copied().unwrap_or(0);
            (0..NUMBERS_MAX)
                .map(|place| (place, version.number(place).abs_diff(number(place))))
                .find(|(_, difference)| *difference != 0)
                .map(|(place, difference)| (NUMBERS_MAX - place, difference))
        };
        let is_below = |version: &Version| compare(&version.release, &target).is_lt();
        let has_release = offered.iter().any(|version| !version.is_pre);
        let mut candidates: Vec<_> =
            offered.iter().filter(|version| !version.is_pre || !has_release).collect();
        candidates.sort_by(|a, b| {
            let order = if is_below(a) && is_below(b) { b.order(a) } else { a.order(b) };
            distance(a).cmp(&distance(b)).then(is_below(a).cmp(&is_below(b))).then(order)
        });
        let mut texts: Vec<String> = Vec::new();
        for version in candidates {
            if texts.len() < count && !texts.contains(&version.text) {
                texts.push(version.text.clone());
            }
        }
        texts
    }

    fn target(&self) -> Option<Vec<u64>> {
        match self {
            Self::Latest => None,
            Self::Plain { text, .. } => numbers(text).map(|(release, _)| release),
            Self::Ranges(alternatives) => {
                let mut ranges = alternatives.iter().flatten();
                ranges.find_map(|range| range.from.clone().or_else(|| range.below.clone()))
            }
        }
    }
}

impl Range {
    fn of(release: Vec<u64>) -> Self {
        let below = Some(after(&release));
        Self { from: Some(release), below }
    }

    fn nothing() -> Self {
        Self { from: Some(vec![0]), below: Some(vec![0]) }
    }

    fn holds(&self, version: &Version) -> bool {
        let from = |from: &Vec<u64>| compare(&version.release, from).is_ge();
        let below = |below: &Vec<u64>| compare(&version.release, below).is_lt();
        self.from.as_ref().is_none_or(from) && self.below.as_ref().is_none_or(below)
    }
}

/// The first that no longer begins with these numbers.
fn after(release: &[u64]) -> Vec<u64> {
    let mut after = release.to_vec();
    if let Some(last) = after.last_mut() {
        *last = last.saturating_add(1);
    }
    after
}

/// `20.x`, `20.X`, `x`.
fn is_wildcard(text: &str) -> bool {
    text.rsplit('.').next().is_some_and(|last| matches!(last, "x" | "X" | "*"))
}

fn unreadable(text: &str) -> String {
    format!(
        "{text:?} is no version; write `latest`, a version such as `1.2.3`, the beginning of one \
         such as `1.2`, or ranges such as `^1.2` and `>=3.10, <3.12`"
    )
}

/// The ranges of `>=3.10, <3.12`, which are parted by commas or spaces.
fn all_of(text: &str) -> Result<Vec<Range>, String> {
    let mut ranges = Vec::new();
    let mut operator = "";
    for word in text.split([',', ' ']).filter(|word| !word.is_empty()) {
        let digits = word.find(|c: char| !"^~<>=".contains(c)).unwrap_or(word.len());
        let (found, version) = word.split_at(digits);
        if !found.is_empty() && !operator.is_empty() {
            return Err(unreadable(text));
        }
        let used = if found.is_empty() { operator } else { found };
        if version.is_empty() {
            operator = used;
            continue;
        }
        ranges.push(range(used, version).ok_or_else(|| unreadable(text.trim()))?);
        operator = "";
    }
    if ranges.is_empty() || !operator.is_empty() {
        return Err(unreadable(text));
    }
    Ok(ranges)
}

fn range(operator: &str, version: &str) -> Option<Range> {
    if matches!(version, "x" | "X" | "*") {
        return matches!(operator, "" | "=" | "==" | ">=").then(Range::default);
    }
    let plain = version.trim_end_matches(['x', 'X', '*', '.']);
    let plain = plain.strip_prefix('v').unwrap_or(plain);
    // The rest of a pre-release bounds nothing here: pre-releases are taken by their name only.
    let (release, rest) = numbers(plain)?;
    if !(rest.is_empty() || rest.starts_with(['-', '+'])) {
        return None;
    }
    let up_to = |places: usize| after(&release[..places.clamp(1, release.len())]);
    Some(match operator {
        "" | "=" | "==" => Range::of(release),
        ">=" => Range { from: Some(release), below: None },
        ">" => Range { from: Some(after(&release)), below: None },
        "<" => Range { from: None, below: Some(release) },
        "<=" => Range { from: None, below: Some(after(&release)) },
        "~" => Range { below: Some(up_to(2)), from: Some(release) },
        // PEP 440: the last number may grow.
        "~=" if release.len() > 1 => {
            Range { below: Some(up_to(release.len() - 1)), from: Some(release) }
        }
        "^" => {
            let first = release.iter().position(|number| *number != 0);
            let places = first.map_or(release.len(), |place| place + 1);
            Range { below: Some(up_to(places)), from: Some(release) }
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
