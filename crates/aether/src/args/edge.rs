//! How much of whom the gateway takes, and whose pages may read its answers.

use std::str::FromStr;

use aether_gateway::{Origins, Rate, RateLimits};
use clap::ArgAction;

use crate::failure::Failure;

#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Limits")]
pub(crate) struct Edge {
    /// Requests that one key may send each second, and at once; or `off`
    #[arg(long, env = "AETHER_KEY_RATE", value_name = "N[:BURST]", default_value = "1000:5000")]
    pub(crate) key_rate: RateChoice,
    /// Requests that one address may send each second, and at once; or `off`
    #[arg(
        long,
        env = "AETHER_ADDRESS_RATE",
        value_name = "N[:BURST]",
        default_value = "2000:10000"
    )]
    pub(crate) address_rate: RateChoice,
    /// An origin whose pages may use this server in a browser, such as https://board.example; may be
    /// given several times
    #[arg(long, env = "AETHER_CORS_ORIGIN", value_name = "ORIGIN", action = ArgAction::Append,
        value_delimiter = ',')]
    pub(crate) cors_origin: Vec<String>,
}

impl Edge {
    /// Without limits, for a server of one's own.
    pub(crate) fn open() -> Self {
        let off = RateChoice(None);
        Self { key_rate: off, address_rate: off, cors_origin: Vec::new() }
    }

    pub(crate) fn limits(&self) -> RateLimits {
        RateLimits { key: self.key_rate.0, address: self.address_rate.0 }
    }

    pub(crate) fn origins(&self) -> Result<Origins, Failure> {
        Origins::new(&self.cors_origin)
            .map_err(|text| Failure::usage(format!("--cors-origin: {text}")))
    }
}

/// `100`, `100:500` or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RateChoice(Option<Rate>);

impl FromStr for RateChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        let wrong = || format!("{text:?} is no rate such as 100, 100:500 or off");
        let (rate, burst) = text.split_once(':').unwrap_or((text, text));
        let number = |text: &str| text.parse::<u32>().map_err(|_| wrong());
        let rate = Rate::per_second(number(rate)?, number(burst)?);
        rate.map(|rate| Self(Some(rate))).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read() {
        let of = |rate, burst| Ok(RateChoice(Rate::per_second(rate, burst)));
        assert_eq!("100".parse(), of(100, 100));
        assert_eq!("100:500".parse(), of(100, 500));
        assert_eq!("off".parse(), Ok(RateChoice(None)));
        for bad in ["", "0", "1:0", "-1", "1:2:3", "fast"] {
            assert!(bad.parse::<RateChoice>().is_err(), "{bad}");
        }
    }
}
