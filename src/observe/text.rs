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
    let breaks = |c: char| matches!(c, '\u{2028}' | '\u{2029}');
    let text: String = console::strip_ansi_codes(text).chars().filter(|c| breaks(*c) || !is_unseen(*c)).collect();
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// A text of someone else's for a terminal, in its own lines: as [`plain`], and with its blanks, and the characters
/// that join letters.
///
/// ```
/// use flowrun::observe::text::printable;
/// assert_eq!(printable("a\u{1b}[2J  b\r\n\tc\u{7}\u{202e}d\u{85}"), "a  b\n\tcd");
/// assert_eq!(printable("\u{645}\u{200c}\u{62e}"), "\u{645}\u{200c}\u{62e}");
/// ```
pub fn printable(text: &str) -> String {
    let joins = |c: char| matches!(c, '\u{200c}' | '\u{200d}');
    let shown = |c: &char| matches!(c, '\n' | '\t') || joins(*c) || !(c.is_control() || is_unseen(*c));
    console::strip_ansi_codes(text).chars().filter(shown).collect()
}

/// Marks of direction, and characters without width.
fn is_unseen(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{ad}' | '\u{61c}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}
