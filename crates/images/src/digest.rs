use std::fmt;
use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};

use crate::ImageError;

const PREFIX: &str = "blake3:";

/// The BLAKE3 digest of a blob, written `blake3:<64 hexadecimal digits>`.
///
/// The text is checked when read, so that it is safe as a file name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    pub fn parse(text: &str) -> Result<Self, ImageError> {
        text.strip_prefix(PREFIX)
            .filter(|hex| {
                hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            })
            .map(|hex| Self(hex.to_owned()))
            .ok_or_else(|| ImageError::InvalidDigest { text: text.to_owned() })
    }

    /// The digits alone, which are also the blob's file name.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.0
    }

    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes).to_hex().to_string())
    }

    pub(crate) fn of_file(file: &File) -> io::Result<Self> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(file)?;
        Ok(Self(hasher.finalize().to_hex().to_string()))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = ImageError;

    fn try_from(text: String) -> Result<Self, ImageError> {
        Self::parse(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_could_leave_the_folder_is_refused() {
        for text in
            ["", "blake3:", "blake3:../../etc/passwd", &format!("blake3:{}", "A".repeat(64))]
        {
            assert_eq!(Digest::parse(text).unwrap_err().code(), "image_digest_invalid", "{text}");
        }
        let digest = Digest::of_bytes(b"x");
        assert_eq!(Digest::parse(&digest.to_string()).unwrap(), digest);
    }
}
