use std::fmt;

/// A password, which neither `Debug` nor anything else prints.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    /// For whoever has to say it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

impl From<String> for Password {
    fn from(text: String) -> Self {
        Self(text)
    }
}
