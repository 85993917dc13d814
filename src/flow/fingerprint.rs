//! One hash for one JSON value, whatever the order of its keys.

use serde_json::Value;

/// BLAKE3 of the canonical form, 64 hex digits.
///
/// ```
/// use flowrun::flow::fingerprint::hash;
/// use serde_json::json;
/// assert_eq!(hash(&json!({ "a": 1, "b": [2.5] })), hash(&json!({ "b": [2.5], "a": 1 })));
/// assert_ne!(hash(&json!([1, 2])), hash(&json!([2, 1])));
/// ```
pub fn hash(value: &Value) -> String {
    let mut text = String::new();
    canonical(value, &mut text);
    blake3::hash(text.as_bytes()).to_hex().to_string()
}

/// JSON without blanks, keys sorted.
fn canonical(value: &Value, out: &mut String) {
    match value {
        Value::Array(list) => {
            out.push('[');
            for (number, item) in list.iter().enumerate() {
                out.push_str(if number > 0 { "," } else { "" });
                canonical(item, out);
            }
            out.push(']');
        }
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(name, _)| *name);
            out.push('{');
            for (number, (name, item)) in entries.into_iter().enumerate() {
                out.push_str(if number > 0 { "," } else { "" });
                out.push_str(&Value::from(name.as_str()).to_string());
                out.push(':');
                canonical(item, out);
            }
            out.push('}');
        }
        leaf => out.push_str(&leaf.to_string()),
    }
}
