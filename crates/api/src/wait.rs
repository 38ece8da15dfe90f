//! The text form of `?wait=`.

use std::time::Duration;

/// The text is not a time such as `30`, `30s`, `500ms` or `2m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParseWaitError;

impl std::fmt::Display for ParseWaitError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("not a time such as 30s, 500ms or 2m")
    }
}

impl std::error::Error for ParseWaitError {}

/// Reads whole seconds, or a whole number with `ms`, `s` or `m`.
pub fn parse_wait(text: &str) -> Result<Duration, ParseWaitError> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let ms_per_unit = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        _ => return Err(ParseWaitError),
    };
    let number: u64 = number.parse().map_err(|_| ParseWaitError)?;
    number.checked_mul(ms_per_unit).map(Duration::from_millis).ok_or(ParseWaitError)
}

/// The form that [`parse_wait`] reads.
#[must_use]
pub fn format_wait(wait: Duration) -> String {
    format!("{}ms", wait.as_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_nothing_else() {
        for (text, ms) in [("30", 30_000), ("30s", 30_000), ("500ms", 500), ("2m", 120_000)] {
            assert_eq!(parse_wait(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "-1", "1.5s", "1h", "30 s", "99999999999999999999", "+1"] {
            assert_eq!(parse_wait(text), Err(ParseWaitError), "{text}");
        }
        assert_eq!(
            parse_wait(&format_wait(Duration::from_millis(1500))),
            Ok(Duration::from_millis(1500))
        );
    }
}
