//! Queries in LogQL. Values of users stand in them as quoted strings and nowhere else.

use std::fmt::Write as _;

use crate::{LogFilter, LogLevel};

/// The query that gives what fits the filter.
pub(crate) fn query(filter: &LogFilter) -> String {
    // Loki wants one matcher at least that an empty label does not fit.
    let mut query = String::from(r#"{service=~".+""#);
    if let Some(level) = filter.level {
        let levels: Vec<_> = level.and_above().iter().copied().map(LogLevel::as_str).collect();
        let _ = write!(query, ", level=~{}", quoted(&levels.join("|")));
    }
    query.push('}');
    if let Some(text) = filter.text.as_ref().filter(|text| !text.is_empty()) {
        let _ = write!(query, " |= {}", quoted(text));
    }
    if let Some(id) = filter.vm_id {
        let _ = write!(query, " | vm_id={}", quoted(&id.to_string()));
    }
    if let Some(id) = filter.task_id {
        let _ = write!(query, " | task_id={}", quoted(&id.to_string()));
    }
    query
}

/// A string as LogQL, and Go, read it. Only printable ASCII stands for itself: Loki's scanner
/// refuses some other characters in a query, and no reader of a query takes these for an end.
pub(crate) fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for character in text.chars() {
        let _ = match character {
            '"' | '\\' => write!(quoted, "\\{character}"),
            '\n' => write!(quoted, "\\n"),
            ' '..='~' => write!(quoted, "{character}"),
            '\0'..='\u{ffff}' => write!(quoted, "\\u{:04x}", u32::from(character)),
            _ => write!(quoted, "\\U{:08x}", u32::from(character)),
        };
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What Go's `strconv.Unquote` makes of it, for the escapes that are used.
    fn unquoted(text: &str) -> Option<String> {
        let mut rest = text.strip_prefix('"')?.strip_suffix('"')?.chars();
        let mut out = String::new();
        while let Some(character) = rest.next() {
            let digits = match character {
                '"' | '\n' => return None,
                '\\' => match rest.next()? {
                    kept @ ('"' | '\\') => {
                        out.push(kept);
                        continue;
                    }
                    'n' => {
                        out.push('\n');
                        continue;
                    }
                    'u' => 4,
                    'U' => 8,
                    _ => return None,
                },
                plain => {
                    out.push(plain);
                    continue;
                }
            };
            let code: String = rest.by_ref().take(digits).collect();
            out.push(char::from_u32(u32::from_str_radix(&code, 16).ok()?)?);
        }
        Some(out)
    }

    #[test]
    fn a_query_has_all_that_is_asked_for() {
        let id = "0192f0c4-7b1e-7c3a-9d52-3f6a1b2c4d5e";
        let filter = LogFilter {
            vm_id: id.parse().ok(),
            task_id: id.parse().ok(),
            level: Some(LogLevel::Warn),
            text: Some("a\"} |= \\x\n\u{feff}😀".to_owned()),
        };
        assert_eq!(
            query(&filter),
            format!(
                r#"{{service=~".+", level=~"warn|error"}} |= "a\"}} |= \\x\n\ufeff\U0001f600" | vm_id="{id}" | task_id="{id}""#
            )
        );
        assert_eq!(query(&LogFilter::default()), r#"{service=~".+"}"#);
    }

    proptest! {
        #[test]
        fn any_text_comes_back_as_it_was(text in any::<String>()) {
            let quoted = quoted(&text);
            prop_assert!(quoted.bytes().all(|byte| matches!(byte, b' '..=b'~')));
            prop_assert_eq!(unquoted(&quoted), Some(text));
        }
    }
}
