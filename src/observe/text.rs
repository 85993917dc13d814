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
    let line = plain(text);
    match line.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

/// A text of someone else's for a terminal, in one line: nothing in it moves the cursor, changes a colour, or turns the
/// order of letters round.
///
/// ```
/// use flowrun::observe::text::plain;
/// assert_eq!(plain("\u{1b}[2Ja\u{202e}b\u{200b}\r\nc"), "ab c");
/// ```
pub fn plain(text: &str) -> String {
    // Marks of direction, and characters without width.
    let unseen = |c: char| matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{ad}');
    let text: String = console::strip_ansi_codes(text).chars().filter(|c| !unseen(*c)).collect();
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}
