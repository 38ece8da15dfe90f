//! JSON as a schema means it, between the reader and what serde derives.
//!
//! Derived code takes `["a", 1]` for an object with its fields in order, and refuses `60.0` where a
//! whole number is needed. A client that sends the first is mistaken, and one that sends the second
//! is not: in JSON both spellings are one number.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, Visitor};

/// Of a reader, a visitor, a seed, or the access to what is in a list or an object.
pub(crate) struct Strict<T>(pub(crate) T);

/// A visitor of a whole number.
struct Whole<V>(V);

/// From here on two whole numbers can be one floating one.
const EXACT_BELOW: f64 = 9_007_199_254_740_992.0;

macro_rules! forward {
    ($($method:ident($($arg:ident: $kind:ty),*) => $wrap:ident),+ $(,)?) => { $(
        fn $method<V: Visitor<'de>>(self, $($arg: $kind,)* visitor: V) -> Result<V::Value, D::Error> {
            self.0.$method($($arg,)* $wrap(visitor))
        }
    )+ };
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Strict<D> {
    type Error = D::Error;

    forward! {
        deserialize_any() => Strict,
        deserialize_bool() => Strict,
        deserialize_i8() => Whole,
        deserialize_i16() => Whole,
        deserialize_i32() => Whole,
        deserialize_i64() => Whole,
        deserialize_u8() => Whole,
        deserialize_u16() => Whole,
        deserialize_u32() => Whole,
        deserialize_u64() => Whole,
        deserialize_f32() => Strict,
        deserialize_f64() => Strict,
        deserialize_char() => Strict,
        deserialize_str() => Strict,
        deserialize_string() => Strict,
        deserialize_bytes() => Strict,
        deserialize_byte_buf() => Strict,
        deserialize_option() => Strict,
        deserialize_unit() => Strict,
        deserialize_unit_struct(name: &'static str) => Strict,
        deserialize_newtype_struct(name: &'static str) => Strict,
        deserialize_seq() => Strict,
        deserialize_tuple(len: usize) => Strict,
        deserialize_tuple_struct(name: &'static str, len: usize) => Strict,
        deserialize_map() => Strict,
        deserialize_enum(name: &'static str, variants: &'static [&'static str]) => Strict,
        deserialize_identifier() => Strict,
        deserialize_ignored_any() => Strict,
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        // An object, and nothing in its place.
        self.0.deserialize_map(Strict(visitor))
    }
}

macro_rules! visit {
    ($($method:ident: $kind:ty),+ $(,)?) => { $(
        fn $method<E: Error>(self, value: $kind) -> Result<V::Value, E> {
            self.0.$method(value)
        }
    )+ };
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Strict<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }

    visit! {
        visit_bool: bool,
        visit_i64: i64,
        visit_u64: u64,
        visit_f64: f64,
        visit_str: &str,
        visit_borrowed_str: &'de str,
        visit_string: String,
        visit_bytes: &[u8],
        visit_borrowed_bytes: &'de [u8],
        visit_byte_buf: Vec<u8>,
    }

    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.0.visit_none()
    }

    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        self.0.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.0.visit_some(Strict(inner))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.0.visit_newtype_struct(Strict(inner))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<V::Value, A::Error> {
        self.0.visit_seq(Strict(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<V::Value, A::Error> {
        self.0.visit_map(Strict(fields))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, variant: A) -> Result<V::Value, A::Error> {
        // Requests have words alone.
        self.0.visit_enum(variant)
    }
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Whole<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }

    visit! { visit_i64: i64, visit_u64: u64 }

    #[expect(clippy::cast_possible_truncation, reason = "it is whole, and small enough")]
    fn visit_f64<E: Error>(self, value: f64) -> Result<V::Value, E> {
        if value.fract() == 0.0 && value.abs() < EXACT_BELOW {
            self.0.visit_i64(value as i64)
        } else {
            self.0.visit_f64(value)
        }
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Strict<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, inner: D) -> Result<S::Value, D::Error> {
        self.0.deserialize(Strict(inner))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Strict<A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        self.0.next_element_seed(Strict(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Strict<A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        self.0.next_key_seed(seed)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.0.next_value_seed(Strict(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use aether_api::{BuildTemplate, CreateVm};
    use aether_types::project::Quota;

    use crate::extract::from_json;

    #[test]
    fn a_list_is_no_object_at_any_depth() {
        assert!(from_json::<Quota>(b"[null, null]").is_err());
        assert!(from_json::<CreateVm>(br#"{"network":["none"]}"#).is_err());
        assert!(from_json::<CreateVm>(br#"{"network":{"egress":"none"}}"#).is_ok());
        let template = |steps: &str| {
            from_json::<BuildTemplate>(format!(r#"{{"name":"a","steps":{steps}}}"#).as_bytes())
        };
        assert!(template(r#"[["true", 1]]"#).is_err());
        assert!(template(r#"[{"run":"true","timeout_s":1}]"#).is_ok());
    }

    #[test]
    fn a_whole_number_has_more_than_one_spelling() {
        let vcpus = |text: &str| {
            from_json::<CreateVm>(format!(r#"{{"vcpus":{text}}}"#).as_bytes()).map(|vm| vm.vcpus)
        };
        assert_eq!(vcpus("2.0").unwrap(), Some(2));
        assert_eq!(vcpus("2e0").unwrap(), Some(2));
        assert_eq!(vcpus("null").unwrap(), None);
        for bad in ["2.5", "-1.0", "1e300", "1e10", "\"2\"", "true"] {
            assert!(vcpus(bad).is_err(), "{bad}");
        }
    }
}
