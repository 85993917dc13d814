//! Texts of others in messages and logs.

/// Characters that are shown.
const SHOWN: usize = 300;

/// The beginning of a text of someone else's, in one line.
///
/// ```
/// use flowrun::observe::shortened;
/// assert_eq!(shortened(" a\r\n\u{7}b "), "a b");
/// assert_eq!(shortened(&"é".repeat(1000)), format!("{}...", "é".repeat(300)));
/// ```
pub fn shortened(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let line = words.collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}
