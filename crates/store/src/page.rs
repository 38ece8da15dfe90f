//! Pages of a list, newest first.
//!
//! A cursor names the last item that a page showed, not a count of items: items that come or go
//! meanwhile shift nothing. Clients keep cursors as they are; the form may change.

use std::{fmt, str::FromStr};

use aether_types::limits;
use uuid::Uuid;

use crate::StoreError;

/// Where a page ended: an item's time of creation and id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    created_at_ms: i64,
    id: Uuid,
}

impl Cursor {
    pub(crate) fn new(created_at_ms: i64, id: &str) -> Option<Self> {
        Some(Self { created_at_ms, id: Uuid::try_parse(id).ok()? })
    }

    pub(crate) fn created_at_ms(self) -> i64 {
        self.created_at_ms
    }

    pub(crate) fn id(self) -> String {
        self.id.to_string()
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}{}", self.created_at_ms, self.id.as_simple())
    }
}

impl FromStr for Cursor {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let parse = || {
            // One spelling only: from_str_radix would take a sign.
            if text.len() != 48 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                return None;
            }
            let created_at_ms = u64::from_str_radix(&text[..16], 16).ok()?.cast_signed();
            Some(Self { created_at_ms, id: Uuid::try_parse(&text[16..]).ok()? })
        };
        parse().ok_or(StoreError::BadCursor)
    }
}

/// Which page. The limit is held to 1 to `PAGE_LIMIT_MAX`.
#[derive(Debug, Clone, Copy)]
pub struct PageRequest {
    pub limit: u32,
    pub after: Option<Cursor>,
}

impl PageRequest {
    /// From what a client gave. Fails with `BadCursor`.
    pub fn new(limit: Option<u32>, cursor: Option<&str>) -> Result<Self, StoreError> {
        let after = cursor.map(str::parse).transpose()?;
        Ok(Self { limit: limit.unwrap_or(limits::PAGE_LIMIT_DEFAULT), after })
    }

    pub(crate) fn bounded_limit(self) -> u32 {
        self.limit.clamp(1, limits::PAGE_LIMIT_MAX)
    }
}

impl Default for PageRequest {
    fn default() -> Self {
        Self { limit: limits::PAGE_LIMIT_DEFAULT, after: None }
    }
}

#[derive(Debug, Clone)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Of the next page; `None` at the end.
    pub next: Option<Cursor>,
}

impl<T> Page<T> {
    /// From up to `limit` + 1 items; the one too many says that there is a next page.
    pub(crate) fn cut(
        mut items: Vec<T>,
        limit: u32,
        position: impl Fn(&T) -> Option<Cursor>,
    ) -> Self {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let more = items.len() > limit;
        items.truncate(limit);
        let next = if more { items.last().and_then(position) } else { None };
        Self { items, next }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_round_trip_and_have_one_spelling() {
        let id = Uuid::now_v7().to_string();
        for ms in [0, 1_700_000_000_000, -1, i64::MAX, i64::MIN] {
            let cursor = Cursor::new(ms, &id).unwrap();
            assert_eq!(cursor.to_string().parse::<Cursor>().unwrap(), cursor);
            assert!(matches!(
                cursor.to_string().to_uppercase().parse::<Cursor>(),
                Err(StoreError::BadCursor)
            ));
        }
    }

    #[test]
    fn a_malformed_cursor_is_a_typed_error() {
        for bad in ["", "zz", &"0".repeat(47), &"+".repeat(48), "ä", &"é".repeat(24)] {
            assert!(
                matches!(PageRequest::new(None, Some(bad)), Err(StoreError::BadCursor)),
                "{bad}"
            );
        }
    }
}
