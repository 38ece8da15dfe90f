//! What a line of a log is known by.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident,
     $($(#[$variant_doc:meta])* $variant:ident = $text:literal),+ $(,)?) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$variant_doc])* $variant),+ }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            /// A sentence with the words that are known.
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                Self::ALL.iter().copied().find(|word| word.as_str() == text).ok_or_else(|| {
                    let known: Vec<_> = Self::ALL.iter().map(|word| word.as_str()).collect();
                    format!("one of {} is needed", known.join(", "))
                })
            }
        }
    };
}

words!(
    /// Who said it. A label of Loki, so there are few.
    LogService,
    Gateway = "gateway",
    Worker = "worker",
    /// Our program in the guest.
    Agent = "agent",
    /// What runs in the guest.
    Guest = "guest",
    /// The rest of the platform.
    Platform = "platform",
);

words!(
    /// In ascending order of weight. A label of Loki.
    LogLevel,
    Trace = "trace",
    Debug = "debug",
    Info = "info",
    Warn = "warn",
    Error = "error",
);

words!(
    /// Where it was said. A label of Loki.
    LogStream,
    Stdout = "stdout",
    Stderr = "stderr",
    /// Of the VM.
    Console = "console",
    /// A line of the platform's own log.
    Log = "log",
);

impl LogLevel {
    /// This and all that weigh more.
    #[must_use]
    pub fn and_above(self) -> &'static [Self] {
        let from = Self::ALL.iter().position(|level| *level == self).unwrap_or(0);
        Self::ALL.get(from..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_have_one_spelling() {
        assert_eq!("warn".parse(), Ok(LogLevel::Warn));
        assert_eq!(LogLevel::Warn.and_above(), [LogLevel::Warn, LogLevel::Error]);
        let error = "WARN".parse::<LogLevel>().unwrap_err();
        assert_eq!(error, "one of trace, debug, info, warn, error is needed");
        for stream in LogStream::ALL {
            let json = serde_json::to_string(stream).unwrap();
            assert_eq!(json, format!("\"{stream}\""));
        }
    }
}
