//! Digests as the sources give them, and our own.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha512};

/// What a file must be, written `sha512:<hex>`. The text is checked when read, so that it is safe
/// in a file name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Checksum {
    algorithm: Algorithm,
    hex: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Algorithm {
    Sha256,
    Sha512,
    Blake3,
}

impl Algorithm {
    const ALL: [(&'static str, Self, usize); 3] =
        [("sha256", Self::Sha256, 64), ("sha512", Self::Sha512, 128), ("blake3", Self::Blake3, 64)];

    fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
            Self::Blake3 => "blake3",
        }
    }
}

impl Checksum {
    pub(crate) fn new(algorithm: &str, hex: &str) -> Option<Self> {
        let (_, algorithm, digits) =
            Algorithm::ALL.into_iter().find(|(name, ..)| *name == algorithm)?;
        let hex = hex.to_ascii_lowercase();
        let is_hex = hex.len() == digits && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hex.then_some(Self { algorithm, hex })
    }

    /// Of npm's `integrity`, which may have several: the strongest that is good enough. `None`
    /// where there is none, such as of old packages that have SHA-1 alone.
    pub(crate) fn of_integrity(text: &str) -> Option<Self> {
        let one = |wanted: &str| {
            text.split_ascii_whitespace().find_map(|part| {
                let (algorithm, value) = part.split_once('-')?;
                let value = value.split('?').next().unwrap_or(value);
                let bytes = STANDARD.decode(value).ok()?;
                (algorithm == wanted).then(|| Self::new(algorithm, &hex(&bytes)))?
            })
        };
        one("sha512").or_else(|| one("sha256"))
    }

    pub(crate) fn blake3(hash: &blake3::Hash) -> Self {
        Self { algorithm: Algorithm::Blake3, hex: hash.to_hex().to_string() }
    }

    pub(crate) fn hex(&self) -> &str {
        &self.hex
    }

    /// Its name in a folder of files by content.
    pub(crate) fn file_name(&self) -> String {
        format!("{}-{}", self.algorithm.name(), self.hex)
    }

    pub(crate) fn hasher(&self) -> Hasher {
        match self.algorithm {
            Algorithm::Sha256 => Hasher::Sha256(Sha256::new()),
            Algorithm::Sha512 => Hasher::Sha512(Box::new(Sha512::new())),
            Algorithm::Blake3 => Hasher::Blake3(Box::default()),
        }
    }

    /// Reads all of a file. Blocks.
    pub(crate) fn is_of(&self, file: &mut File) -> io::Result<bool> {
        let mut hasher = self.hasher();
        let mut buffer = vec![0; 1 << 18];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hasher.finish() == self.hex),
                count => hasher.update(&buffer[..count]),
            }
        }
    }
}

/// One checksum in the making.
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha512(Box<Sha512>),
    Blake3(Box<blake3::Hasher>),
}

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
            Self::Blake3(hasher) => {
                hasher.update(bytes);
            }
        }
    }

    /// In lower-case hexadecimal.
    pub(crate) fn finish(self) -> String {
        match self {
            Self::Sha256(hasher) => hex(&hasher.finalize()),
            Self::Sha512(hasher) => hex(&hasher.finalize()),
            Self::Blake3(hasher) => hasher.finalize().to_hex().to_string(),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

impl FromStr for Checksum {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split_once(':').and_then(|(algorithm, hex)| Self::new(algorithm, hex)).ok_or_else(
            || format!("{text:?} is no digest: `sha256:`, `sha512:` or `blake3:` and hexadecimal"),
        )
    }
}

impl TryFrom<String> for Checksum {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Checksum> for String {
    fn from(checksum: Checksum) -> Self {
        checksum.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integrity_gives_the_strongest() {
        let of_x =
            |algorithm: &str, bytes: &[u8]| format!("{algorithm}-{}", STANDARD.encode(bytes));
        let sha256 = of_x("sha256", &Sha256::digest(b"x"));
        let sha512 = of_x("sha512", &Sha512::digest(b"x"));
        let both = Checksum::of_integrity(&format!("sha1-AAAA {sha256} {sha512}?opt")).unwrap();
        assert_eq!(both.hex(), hex(&Sha512::digest(b"x")));
        assert_eq!(Checksum::of_integrity(&sha256).unwrap().algorithm, Algorithm::Sha256);
        assert_eq!(Checksum::of_integrity("sha1-2jmj7l5rSw0yVb/vlWAYkK/YBwk="), None);
    }

    #[test]
    fn text_that_could_leave_the_folder_is_refused() {
        for text in ["", "sha256:", "sha256:../x", "md5:d41d8cd98f00b204e9800998ecf8427e"] {
            assert!(Checksum::from_str(text).is_err(), "{text}");
        }
        let text = format!("sha256:{}", "aB".repeat(32));
        assert_eq!(Checksum::from_str(&text).unwrap().to_string(), text.to_ascii_lowercase());
    }

    #[test]
    fn file_is_told_from_another() {
        let mut file = tempfile::tempfile().unwrap();
        let checksum = Checksum::new("sha256", &hex(&Sha256::digest(b""))).unwrap();
        assert!(checksum.is_of(&mut file).unwrap());
        io::Write::write_all(&mut file, b"x").unwrap();
        io::Seek::rewind(&mut file).unwrap();
        assert!(!checksum.is_of(&mut file).unwrap());
    }
}
