//! Wall-clock times as the API shows them. Durations are measured with monotonic clocks, never
//! by subtracting these across hosts.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A moment in UTC with millisecond precision; RFC 3339 in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(jiff::Timestamp);

impl Timestamp {
    /// The present moment, cut to milliseconds so that it survives a round trip to the store.
    #[must_use]
    pub fn now() -> Self {
        Self::from_unix_ms(jiff::Timestamp::now().as_millisecond())
    }

    /// Out-of-range values are held at the ends of the range (the years -9999 and 9999).
    #[must_use]
    pub fn from_unix_ms(ms: i64) -> Self {
        Self(jiff::Timestamp::from_millisecond(ms).unwrap_or(if ms < 0 {
            jiff::Timestamp::MIN
        } else {
            jiff::Timestamp::MAX
        }))
    }

    #[must_use]
    pub fn unix_ms(self) -> i64 {
        self.0.as_millisecond()
    }

    #[must_use]
    pub fn plus_ms(self, ms: i64) -> Self {
        Self::from_unix_ms(self.unix_ms().saturating_add(ms))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}", self.0)
    }
}

impl FromStr for Timestamp {
    type Err = jiff::Error;

    fn from_str(text: &str) -> Result<Self, jiff::Error> {
        text.parse::<jiff::Timestamp>().map(|t| Self::from_unix_ms(t.as_millisecond()))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips_with_milliseconds() {
        let t = Timestamp::from_unix_ms(1_700_000_000_120);
        assert_eq!(t.to_string(), "2023-11-14T22:13:20.120Z");
        assert_eq!(t.to_string().parse::<Timestamp>().unwrap(), t);
    }
}
