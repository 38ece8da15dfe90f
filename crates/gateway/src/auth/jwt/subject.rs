//! The name of who has a token, as the audit log and the limits know it.

use std::fmt::Write as _;

/// Of each part, so that a line of the log stays one.
const ISSUER_BYTES_MAX: usize = 256;
const SUBJECT_BYTES_MAX: usize = 128;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::auth) struct Subject {
    /// `jwt:ISSUER/SUBJECT`, in printable ASCII.
    pub(in crate::auth) name: String,
    /// One for each name.
    pub(in crate::auth) bucket: [u8; 16],
}

impl Subject {
    /// `None`: there is no subject, or one of them is too long to be written down whole. Cut off,
    /// two could have one name.
    pub(super) fn new(issuer: Option<&str>, subject: Option<&str>) -> Option<Self> {
        let (issuer, subject) = (issuer.unwrap_or_default(), subject?);
        let fits = issuer.len() <= ISSUER_BYTES_MAX
            && !subject.is_empty()
            && subject.len() <= SUBJECT_BYTES_MAX;
        if !fits {
            return None;
        }
        // The last slash is the one between them.
        let name = format!("jwt:{}/{}", escaped(issuer, true), escaped(subject, false));
        let [bucket @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] =
            *blake3::hash(name.as_bytes()).as_bytes();
        Some(Self { name, bucket })
    }
}

fn escaped(text: &str, slash: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'%' => out.push_str("%25"),
            b'/' if !slash => out.push_str("%2F"),
            b'!'..=b'~' => out.push(char::from(byte)),
            _ => {
                // Nothing fails that is written to a string.
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(issuer: &str, subject: &str) -> String {
        Subject::new(Some(issuer), Some(subject)).unwrap().name
    }

    #[test]
    fn each_subject_has_a_name_of_its_own() {
        assert_eq!(name("https://id.example/a", "ann"), "jwt:https://id.example/a/ann");
        assert_eq!(name("a", "b/c"), "jwt:a/b%2Fc");
        assert_ne!(name("a", "b/c"), name("a/b", "c"));
        assert_ne!(name("a", "b/c"), name("a", "b%2Fc"));
        assert_eq!(name("", "a\n\u{202e}b c"), "jwt:/a%0A%E2%80%AEb%20c");
    }

    #[test]
    fn what_is_too_long_has_none() {
        assert_eq!(Subject::new(None, None), None);
        assert_eq!(Subject::new(None, Some("")), None);
        assert!(Subject::new(None, Some(&"s".repeat(128))).is_some());
        assert_eq!(Subject::new(None, Some(&"s".repeat(129))), None);
        assert_eq!(Subject::new(Some(&"i".repeat(257)), Some("s")), None);
    }
}
