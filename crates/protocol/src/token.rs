//! The secret that opens a guest.

use std::fmt;

use subtle::ConstantTimeEq as _;

/// Bytes of a token.
pub const TOKEN_BYTES: usize = 32;

/// A VM's token: 256 random bits that only its worker and its agent know.
///
/// Compared in constant time and never printed.
#[derive(Clone)]
pub struct Token([u8; TOKEN_BYTES]);

/// The text is not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a token is {} hexadecimal digits", TOKEN_BYTES * 2)]
pub struct TokenParseError;

impl Token {
    pub const fn from_bytes(bytes: [u8; TOKEN_BYTES]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; TOKEN_BYTES] {
        &self.0
    }

    /// The bytes of a message, if they are as many as a token has.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Reads 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Result<Self, TokenParseError> {
        let digits = text.as_bytes();
        if digits.len() != TOKEN_BYTES * 2 {
            return Err(TokenParseError);
        }
        let mut bytes = [0; TOKEN_BYTES];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let (high, low) = (hex_value(pair[0])?, hex_value(pair[1])?);
            *byte = high << 4 | low;
        }
        Ok(Self(bytes))
    }

    /// The form that a kernel command line carries.
    pub fn to_hex(&self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble)]);
        self.0.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
    }

    /// Whether a peer's bytes are this token, in a time that does not depend on them.
    pub fn matches(&self, candidate: &[u8]) -> bool {
        self.0.as_slice().ct_eq(candidate).into()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

fn hex_value(digit: u8) -> Result<u8, TokenParseError> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(TokenParseError),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_survives_its_text_form() {
        let token = Token::from_bytes(std::array::from_fn(|i| u8::try_from(i * 7).unwrap()));
        let again = Token::from_hex(&token.to_hex()).unwrap();
        assert!(again.matches(token.as_bytes()));
        assert!(Token::from_hex(&token.to_hex().to_uppercase()).is_ok());
    }

    #[test]
    fn other_bytes_and_other_lengths_do_not_match() {
        let token = Token::from_bytes([7; TOKEN_BYTES]);
        assert!(!token.matches(&[8; TOKEN_BYTES]));
        assert!(!token.matches(&[7; TOKEN_BYTES - 1]));
        assert!(!token.matches(&[]));
        assert!(
            Token::from_slice(&[7; TOKEN_BYTES]).is_some_and(|it| it.matches(&[7; TOKEN_BYTES]))
        );
        assert!(Token::from_slice(&[7; TOKEN_BYTES - 1]).is_none());
        assert!(Token::from_hex("é").is_err());
        assert!(Token::from_hex(&"g".repeat(64)).is_err());
    }

    #[test]
    fn token_is_never_printed() {
        assert_eq!(format!("{:?}", Token::from_bytes([7; TOKEN_BYTES])), "Token(..)");
    }
}
