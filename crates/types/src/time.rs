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

/// A moment in UTC to the nanosecond, as log lines have it; RFC 3339 in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PreciseTime(jiff::Timestamp);

impl PreciseTime {
    #[must_use]
    pub fn from_unix_ns(ns: i64) -> Self {
        // Every such number of nanoseconds is within jiff's range: the years 1677 to 2262.
        Self(jiff::Timestamp::from_nanosecond(ns.into()).unwrap_or_default())
    }

    /// Times beyond the range of the number are held at its ends.
    #[must_use]
    pub fn unix_ns(self) -> i64 {
        let ns = self.0.as_nanosecond();
        i64::try_from(ns).unwrap_or(if ns < 0 { i64::MIN } else { i64::MAX })
    }
}

impl fmt::Display for PreciseTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.9}", self.0)
    }
}

impl FromStr for PreciseTime {
    /// A sentence for whoever wrote it.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|_: jiff::Error| {
            "a time such as 2026-01-31T09:30:00Z, with or without a fraction, is needed".into()
        })
    }
}

impl Serialize for PreciseTime {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PreciseTime {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precise_times_round_trip_from_end_to_end() {
        for ns in [i64::MIN, -1, 0, 1_700_000_000_123_456_789, i64::MAX] {
            let time = PreciseTime::from_unix_ns(ns);
            assert_eq!(time.to_string().parse(), Ok(time));
            assert_eq!(time.unix_ns(), ns);
        }
        let time = PreciseTime::from_unix_ns(1_700_000_000_000_000_001);
        assert_eq!(time.to_string(), "2023-11-14T22:13:20.000000001Z");
        assert!("yesterday".parse::<PreciseTime>().is_err());
    }

    #[test]
    fn text_form_round_trips_with_milliseconds() {
        let t = Timestamp::from_unix_ms(1_700_000_000_120);
        assert_eq!(t.to_string(), "2023-11-14T22:13:20.120Z");
        assert_eq!(t.to_string().parse::<Timestamp>().unwrap(), t);
    }
}
