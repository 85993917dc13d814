//! [`Form`], the canonical form of every setting that affects rows, and the key computed from it.
//!
//! Keys are stored and compared by later versions of the program, so this module alone defines their bytes. `Debug`
//! is not used, because its text may change with the compiler; a JSON writer is not used, because its order follows
//! the code.
//!
//! ```
//! use flowrun::flow::{Canonical, Form};
//! let a = Form::table([("rounds", 2_u32.form()), ("beta", 0.1.form())]);
//! let b = Form::table([("beta", 0.1.form()), ("rounds", 2_u32.form()), ("gamma", None::<f64>.form())]);
//! assert_eq!(a.key(), b.key(), "neither order nor what is not set is in a key");
//! assert_ne!(a.key(), Form::List(vec![2_u32.form(), 0.1.form()]).key());
//! ```

use std::collections::BTreeMap;

use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};

use super::record::FORMAT;

/// A value in canonical form.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Form {
    #[default]
    Unset,
    Flag(bool),
    Whole(i128),
    Number(f64),
    Text(String),
    List(Vec<Form>),
    /// Entries by name. Unset entries are left out, so adding a new optional setting does not change existing keys.
    Table(BTreeMap<String, Form>),
}

/// A type with a canonical form.
pub trait Canonical {
    fn form(&self) -> Form;
}

/// Implements [`Canonical`] for a struct: every field is named, either as part of the form or after `without`. A
/// field in neither list is a compile error.
#[macro_export]
macro_rules! canonical_fields {
    ($type:ty { $($field:ident),* $(,)? } without { $($left_out:ident),* $(,)? }) => {
        impl $crate::flow::Canonical for $type {
            fn form(&self) -> $crate::flow::Form {
                let Self { $($field,)* $($left_out: _,)* } = self;
                $crate::flow::Form::table([$((stringify!($field), $crate::flow::Canonical::form($field)),)*])
            }
        }
    };
}

/// Implements [`Canonical`] for an enum of plain variants, with their names in flow files. A variant without a name
/// is a compile error.
#[macro_export]
macro_rules! canonical_names {
    ($type:ty { $($variant:ident = $name:literal),* $(,)? }) => {
        impl $crate::flow::Canonical for $type {
            fn form(&self) -> $crate::flow::Form {
                match self { $(Self::$variant => $crate::flow::Form::Text($name.to_owned()),)* }
            }
        }
    };
}

impl Form {
    pub fn table<const N: usize>(entries: [(&str, Form); N]) -> Self {
        let set = entries.into_iter().filter(|(_, form)| *form != Form::Unset);
        Self::Table(set.map(|(name, form)| (name.to_owned(), form)).collect())
    }

    /// Returns the table with one entry more.
    pub fn with(mut self, name: &str, form: Self) -> Self {
        if let Self::Table(entries) = &mut self {
            entries.insert(name.to_owned(), form);
        }
        self
    }

    /// Returns an entry of a table; `Unset` if there is none.
    pub fn get(&self, name: &str) -> &Form {
        match self {
            Self::Table(entries) => entries.get(name).unwrap_or(&Self::Unset),
            _ => &Self::Unset,
        }
    }

    /// Returns the key: BLAKE3 over the run directory format's number and the bytes of the form, as 64 hex digits.
    pub fn key(&self) -> String {
        let mut bytes = format!("flowrun key {FORMAT}\n").into_bytes();
        self.write(&mut bytes);
        blake3::hash(&bytes).to_hex().to_string()
    }

    /// Writes a letter for the type, then the value. Texts, lists and tables have their length before their content.
    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Unset => out.push(b'u'),
            Self::Flag(on) => out.extend([b'f', u8::from(*on)]),
            Self::Whole(number) => {
                out.push(b'w');
                out.extend(number.to_le_bytes());
            }
            Self::Number(number) => {
                out.push(b'n');
                out.extend(bits(*number).to_le_bytes());
            }
            Self::Text(text) => write_text(text, out),
            Self::List(list) => {
                out.push(b'l');
                out.extend((list.len() as u64).to_le_bytes());
                list.iter().for_each(|item| item.write(out));
            }
            Self::Table(entries) => {
                out.push(b't');
                out.extend((entries.len() as u64).to_le_bytes());
                for (name, form) in entries {
                    write_text(name, out);
                    form.write(out);
                }
            }
        }
    }
}

fn write_text(text: &str, out: &mut Vec<u8>) {
    out.push(b's');
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The bits of a number; 0.0 and -0.0 are the same, and so are all NaNs.
fn bits(number: f64) -> u64 {
    match number {
        number if number.is_nan() => f64::NAN.to_bits(),
        0.0 => 0,
        number => number.to_bits(),
    }
}

/// For display in `plan.json`, `check --diff` and model cards. Keys come only from [`Form::key`].
impl Serialize for Form {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Unset => serializer.serialize_none(),
            Self::Flag(on) => serializer.serialize_bool(*on),
            Self::Whole(number) => match (u64::try_from(*number), i64::try_from(*number)) {
                (Ok(number), _) => serializer.serialize_u64(number),
                (_, Ok(number)) => serializer.serialize_i64(number),
                _ => serializer.serialize_str(&number.to_string()),
            },
            Self::Number(number) if number.is_finite() => serializer.serialize_f64(*number),
            Self::Number(number) => serializer.serialize_str(&number.to_string()),
            Self::Text(text) => serializer.serialize_str(text),
            Self::List(list) => {
                let mut items = serializer.serialize_seq(Some(list.len()))?;
                list.iter().try_for_each(|item| items.serialize_element(item))?;
                items.end()
            }
            Self::Table(entries) => {
                let mut table = serializer.serialize_map(Some(entries.len()))?;
                entries.iter().try_for_each(|(name, form)| table.serialize_entry(name, form))?;
                table.end()
            }
        }
    }
}

macro_rules! whole {
    ($($type:ty),*) => {
        $(impl Canonical for $type {
            fn form(&self) -> Form {
                Form::Whole(*self as i128)
            }
        })*
    };
}

whole!(i64, u32, u64, usize);

impl Canonical for Form {
    fn form(&self) -> Form {
        self.clone()
    }
}

impl Canonical for chrono::NaiveDate {
    fn form(&self) -> Form {
        Form::Text(self.to_string())
    }
}

impl Canonical for serde_json::Value {
    fn form(&self) -> Form {
        use serde_json::Value;
        match self {
            Value::Null => Form::Unset,
            Value::Bool(on) => on.form(),
            Value::Number(number) => match (number.as_i128(), number.as_f64()) {
                (Some(whole), _) => Form::Whole(whole),
                (None, number) => number.form(),
            },
            Value::String(text) => text.form(),
            Value::Array(list) => list.form(),
            Value::Object(table) => table.form(),
        }
    }
}

/// Null values stay in the table, because they are sent to the server.
impl Canonical for serde_json::Map<String, serde_json::Value> {
    fn form(&self) -> Form {
        Form::Table(self.iter().map(|(name, value)| (name.clone(), value.form())).collect())
    }
}

impl Canonical for bool {
    fn form(&self) -> Form {
        Form::Flag(*self)
    }
}

impl Canonical for f64 {
    fn form(&self) -> Form {
        Form::Number(*self)
    }
}

impl Canonical for str {
    fn form(&self) -> Form {
        Form::Text(self.to_owned())
    }
}

impl Canonical for String {
    fn form(&self) -> Form {
        self.as_str().form()
    }
}

impl<T: Canonical + ?Sized> Canonical for &T {
    fn form(&self) -> Form {
        (*self).form()
    }
}

impl<T: Canonical> Canonical for Option<T> {
    fn form(&self) -> Form {
        self.as_ref().map_or(Form::Unset, T::form)
    }
}

impl<T: Canonical> Canonical for [T] {
    fn form(&self) -> Form {
        Form::List(self.iter().map(T::form).collect())
    }
}

impl<T: Canonical> Canonical for Vec<T> {
    fn form(&self) -> Form {
        self.as_slice().form()
    }
}

impl<T: Canonical> Canonical for BTreeMap<String, T> {
    fn form(&self) -> Form {
        Form::Table(self.iter().map(|(name, value)| (name.clone(), value.form())).collect())
    }
}

impl<T: Canonical, const N: usize> Canonical for [T; N] {
    fn form(&self) -> Form {
        self.as_slice().form()
    }
}

impl<A: Canonical, B: Canonical> Canonical for (A, B) {
    fn form(&self) -> Form {
        Form::List(vec![self.0.form(), self.1.form()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(dead_code, reason = "a form reads only what it holds")]
    struct Pair {
        first: u32,
        second: Option<f64>,
        shown: &'static str,
    }

    canonical_fields!(Pair { second, first } without { shown });

    enum Choice {
        One,
        Other,
    }

    canonical_names!(Choice { One = "one", Other = "other" });

    /// The bytes of a key must not change between versions, unless the format number changes.
    #[test]
    fn the_bytes_are_written_down() {
        let form = Form::table([
            ("b", [Choice::One, Choice::Other].form()),
            ("a", Pair { first: 7, second: Some(-0.5), shown: "" }.form()),
        ]);
        let mut bytes = Vec::new();
        form.write(&mut bytes);
        let length = |length: u64| length.to_le_bytes().to_vec();
        let text = |text: &str| [b"s".to_vec(), length(text.len() as u64), text.as_bytes().to_vec()].concat();
        let pair = [
            b"t".to_vec(),
            length(2),
            text("first"),
            b"w".to_vec(),
            7_i128.to_le_bytes().to_vec(),
            text("second"),
            b"n".to_vec(),
            0xbfe0_0000_0000_0000_u64.to_le_bytes().to_vec(),
        ];
        let list = [b"l".to_vec(), length(2), text("one"), text("other")];
        let expected = [b"t".to_vec(), length(2), text("a"), pair.concat(), text("b"), list.concat()];
        assert_eq!(bytes, expected.concat());
        assert_eq!(form.key(), form.clone().key());
        assert_eq!(form.key().len(), 64);
    }

    #[test]
    fn values_that_differ_have_other_keys() {
        let forms = [
            Form::Unset,
            false.form(),
            true.form(),
            0_u32.form(),
            0.0.form(),
            f64::NAN.form(),
            f64::INFINITY.form(),
            f64::NEG_INFINITY.form(),
            "".form(),
            "0".form(),
            Form::List(Vec::new()),
            [0_u32].form(),
            ["ab", "c"].form(),
            ["a", "bc"].form(),
            Form::table([]),
            Form::table([("a", Form::table([("b", 1_u32.form())]))]),
            Form::table([("a", 1_u32.form()), ("b", 1_u32.form())]),
            u64::MAX.form(),
            (-1_i64).form(),
        ];
        let keys: std::collections::BTreeSet<String> = forms.iter().map(Form::key).collect();
        assert_eq!(keys.len(), forms.len());
        assert_eq!((-0.0).form().key(), 0.0.form().key());
    }

    #[test]
    fn what_people_see_is_json() {
        let form = Form::table([("seed", u64::MAX.form()), ("warm", 1.0.form()), ("worst", f64::INFINITY.form())]);
        let json = serde_json::to_string(&form).unwrap();
        assert_eq!(json, r#"{"seed":18446744073709551615,"warm":1.0,"worst":"inf"}"#);
    }
}
