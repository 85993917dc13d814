//! A template's source as Jinja2 reads it, written so that minijinja reads the same.
//!
//! - Line ends become `\n` (Jinja2's `newline_sequence`).
//! - The newline behind `{% raw %}` stays: `trim_blocks` is not for that tag.
//! - `{% generation %}`, which transformers adds for its loss masks, writes nothing.
//! - `%` between a text and what is put into it becomes a filter, as minijinja's `%` is for numbers.
//! - Escapes in texts are Python's.

use super::filters::PERCENT;

/// The source for minijinja.
pub fn as_jinja2(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut reader = Reader { rest: &source, out: String::with_capacity(source.len()) };
    while reader.step().is_some() {}
    let Reader { rest, mut out } = reader;
    out.push_str(rest);
    out
}

/// The text that was read is in `out`; the rest stays in `rest`, and the parser says what is wrong with it.
struct Reader<'a> {
    rest: &'a str,
    out: String,
}

impl<'a> Reader<'a> {
    /// Takes the text up to the next tag, and the tag.
    fn step(&mut self) -> Option<()> {
        let start = opening(self.rest)?;
        self.copy(start);
        match self.rest.get(..2)? {
            "{#" => {
                let end = self.rest.find("#}")?;
                self.copy(end + 2);
                Some(())
            }
            "{%" if self.raw().is_some() => Some(()),
            tag => self.tag(if tag == "{%" { "%}" } else { "}}" }),
        }
    }

    /// A raw block, whole. With `+` its tag keeps the newline behind it.
    fn raw(&mut self) -> Option<()> {
        let inner = self.rest.strip_prefix("{%")?;
        let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
        let inner = inner.strip_prefix("raw")?.trim_start();
        let (body, keeps) = match inner.strip_prefix('-') {
            Some(after) => (after.strip_prefix("%}")?, false),
            None => (inner.strip_prefix("%}")?, true),
        };
        let end = end_of_raw(body)?;
        let tag = self.rest.len() - body.len();
        match self.rest.get(..tag - 2) {
            Some(opened) if keeps => self.out.extend([opened, "+%}"]),
            _ => self.out.push_str(self.rest.get(..tag)?),
        }
        self.out.push_str(body.get(..end)?);
        self.rest = body.get(end..)?;
        Some(())
    }

    /// A block or an expression up to its `end`.
    fn tag(&mut self, end: &str) -> Option<()> {
        let tokens = tokens(self.rest.get(2..)?, end)?;
        let length: usize = 2 + tokens.iter().map(|token| token.text.len()).sum::<usize>();
        self.out.push_str(self.rest.get(..2)?);
        match generation(&tokens) {
            Some(written) if end == "%}" => self.out.push_str(&written),
            _ => self.out.push_str(&with_filters(&tokens)),
        }
        self.rest = self.rest.get(length..)?;
        Some(())
    }

    fn copy(&mut self, bytes: usize) {
        let (text, rest) = self.rest.split_at(bytes);
        self.out.push_str(text);
        self.rest = rest;
    }
}

/// The beginning of the next tag of any kind.
fn opening(text: &str) -> Option<usize> {
    let braces = text.match_indices('{').map(|(at, _)| at);
    braces.into_iter().find(|at| matches!(text.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')))
}

/// The beginning of the tag that ends a raw block.
fn end_of_raw(body: &str) -> Option<usize> {
    let is_end = |at: &usize| {
        let inner = body.get(at + 2..).unwrap_or_default();
        let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
        let Some(inner) = inner.strip_prefix("endraw") else { return false };
        let inner = inner.trim_start();
        inner.strip_prefix(['-', '+']).unwrap_or(inner).starts_with("%}")
    };
    body.match_indices("{%").map(|(at, _)| at).find(is_end)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Space,
    Text,
    Number,
    Name,
    /// `(`, `[` or `{`.
    Open,
    Close,
    Sign,
}

#[derive(Debug, Clone, Copy)]
struct Token<'a> {
    kind: Kind,
    text: &'a str,
}

/// The tokens of a tag, its end included; none where the tag has no end.
fn tokens<'a>(source: &'a str, end: &str) -> Option<Vec<Token<'a>>> {
    let (mut rest, mut depth, mut tokens) = (source, 0_usize, Vec::new());
    loop {
        let ends = depth == 0 && rest.trim_start_matches(['-', '+']).starts_with(end);
        if ends && rest.len() - rest.trim_start_matches(['-', '+']).len() <= 1 {
            let length = rest.len() - rest.trim_start_matches(['-', '+']).len() + end.len();
            tokens.push(Token { kind: Kind::Sign, text: rest.get(..length)? });
            return Some(tokens);
        }
        let (kind, length) = token(rest)?;
        match kind {
            Kind::Open => depth += 1,
            Kind::Close => depth = depth.saturating_sub(1),
            _ => {}
        }
        tokens.push(Token { kind, text: rest.get(..length)? });
        rest = rest.get(length..)?;
    }
}

/// The kind of the first token and its bytes.
fn token(text: &str) -> Option<(Kind, usize)> {
    let first = text.chars().next()?;
    let while_in = |good: fn(char) -> bool| text.find(|c| !good(c)).unwrap_or(text.len());
    Some(match first {
        '\'' | '"' => (Kind::Text, quoted(text, first)?),
        '(' | '[' | '{' => (Kind::Open, 1),
        ')' | ']' | '}' => (Kind::Close, 1),
        _ if first.is_whitespace() => (Kind::Space, while_in(char::is_whitespace)),
        _ if first.is_ascii_digit() => (Kind::Number, while_in(|c| c.is_alphanumeric() || c == '_')),
        _ if first.is_alphabetic() || first == '_' => (Kind::Name, while_in(|c| c.is_alphanumeric() || c == '_')),
        _ => {
            let double = ["//", "**", "==", "!=", ">=", "<="].iter().any(|sign| text.starts_with(sign));
            (Kind::Sign, if double { 2 } else { first.len_utf8() })
        }
    })
}

/// Bytes of the string literal that `text` begins with.
fn quoted(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    let end = text.char_indices().skip(1).find(|(_, c)| {
        let ends = !escaped && *c == quote;
        escaped = !escaped && *c == '\\';
        ends
    });
    end.map(|(at, _)| at + 1)
}

/// `generation` and `endgeneration` alone in a tag, as a condition that always holds.
fn generation(tokens: &[Token<'_>]) -> Option<String> {
    let words: Vec<&str> = tokens.iter().filter(|t| t.kind == Kind::Name).map(|t| t.text).collect();
    let written = match words.as_slice() {
        ["generation"] => "if true",
        ["endgeneration"] => "endif",
        _ => return None,
    };
    let text = |token: &Token<'_>| if token.kind == Kind::Name { written.to_owned() } else { token.text.to_owned() };
    Some(tokens.iter().map(text).collect())
}

/// The tokens with each `%` that may put something into a text as a filter of its left side.
fn with_filters(tokens: &[Token<'_>]) -> String {
    let mut before = vec![String::new(); tokens.len() + 1];
    let mut replaced = vec![false; tokens.len()];
    let last = tokens.len().saturating_sub(1);
    for at in (0..last).filter(|at| tokens.get(*at).is_some_and(|t| t.kind == Kind::Sign && t.text == "%")) {
        if let Some(end) = formats(tokens, at) {
            replaced[at] = true;
            before[end].insert(0, ')');
        }
    }
    let mut out = String::new();
    for (at, token) in tokens.iter().enumerate() {
        out.push_str(&before[at]);
        match token.kind {
            _ if replaced[at] => out.extend(["|", PERCENT, "("]),
            Kind::Text => push_literal(token.text, &mut out),
            _ => out.push_str(token.text),
        }
    }
    out
}

/// A string literal with the escapes that Python has, and minijinja reads in another way, as it reads them.
fn push_literal(text: &str, out: &mut String) {
    let mut rest = text;
    while let Some((before, escape)) = rest.split_once('\\') {
        out.push_str(before);
        let long = escape.strip_prefix('U').and_then(|hex| hex.get(..8));
        let named = long.and_then(|hex| u32::from_str_radix(hex, 16).ok()).and_then(char::from_u32);
        let length = escape.chars().next().map_or(0, char::len_utf8);
        let (first, after) = escape.split_at(length);
        rest = after;
        match (first, named) {
            ("U", Some(c)) => {
                out.push(c);
                rest = escape.get(9..).unwrap_or_default();
            }
            ("a", _) => out.push_str("\\x07"),
            ("v", _) => out.push_str("\\x0b"),
            ("/", _) => out.push_str("\\\\/"),
            ("\n", _) => {}
            _ => out.extend(["\\", first]),
        }
    }
    out.push_str(rest);
}

/// The end of the right side of the `%` at `at`, if its left side may be a text: one operand with nothing before it
/// that binds as strongly.
fn formats(tokens: &[Token<'_>], at: usize) -> Option<usize> {
    let spaceless = |range: std::ops::Range<usize>| range.filter(|i| tokens[*i].kind != Kind::Space);
    let start = start_of_operand(tokens, at)?;
    let end = end_of_operand(tokens, at + 1)?;
    let previous = spaceless(0..start).next_back();
    if previous.is_some_and(|i| ["*", "/", "//", "%", "**"].contains(&tokens[i].text)) {
        return None;
    }
    // A sign in front of an operand and not between two.
    if let Some(sign) = previous.filter(|i| ["-", "+"].contains(&tokens[*i].text)) {
        let left = spaceless(0..sign).next_back().map(|i| tokens[i].kind);
        left.filter(|kind| matches!(kind, Kind::Text | Kind::Number | Kind::Name | Kind::Close))?;
    }
    let left = spaceless(0..at).next_back().map(|i| tokens[i].kind)?;
    let right = spaceless(at + 1..tokens.len()).next().map(|i| tokens[i].kind)?;
    let numbers = left == Kind::Number || (right == Kind::Number && left != Kind::Text);
    (!numbers).then_some(end)
}

/// The first token of the operand that ends in front of `end`: `name.of[0](x)|filter`, a literal, parentheses.
fn start_of_operand(tokens: &[Token<'_>], end: usize) -> Option<usize> {
    let mut at = end;
    loop {
        let last = (0..at).rev().find(|i| tokens[*i].kind != Kind::Space)?;
        let first = match tokens[last].kind {
            Kind::Close => matching(tokens, last)?,
            Kind::Text | Kind::Number | Kind::Name => last,
            _ => return None,
        };
        let Some(previous) = (0..first).rev().find(|i| tokens[*i].kind != Kind::Space) else { return Some(first) };
        let opens = tokens[first].kind == Kind::Open && tokens[first].text != "{";
        match tokens[previous].kind {
            // A call or a subscript of what stands before it.
            Kind::Name | Kind::Close if opens && !is_word(tokens[previous].text) => at = previous + 1,
            Kind::Sign if [".", "|"].contains(&tokens[previous].text) => at = previous,
            Kind::Text if tokens[first].kind == Kind::Text => at = previous + 1,
            _ => return Some(first),
        }
    }
}

/// The place behind the operand that begins at `start`.
fn end_of_operand(tokens: &[Token<'_>], start: usize) -> Option<usize> {
    let next = |from: usize| (from..tokens.len()).find(|i| tokens[*i].kind != Kind::Space);
    let mut at = next(start)?;
    while ["-", "+"].contains(&tokens[at].text) {
        at = next(at + 1)?;
    }
    let mut end = match tokens[at].kind {
        Kind::Open => closing(tokens, at)? + 1,
        Kind::Text | Kind::Number | Kind::Name => at + 1,
        _ => return None,
    };
    while let Some(at) = next(end) {
        match tokens[at].text {
            "(" | "[" => end = closing(tokens, at)? + 1,
            "." | "|" => end = next(at + 1)? + 1,
            _ => break,
        }
    }
    Some(end)
}

/// Words that no call or subscript belongs to.
fn is_word(text: &str) -> bool {
    ["and", "or", "not", "in", "is", "if", "else", "elif", "set", "for", "print", "do"].contains(&text)
}

/// The bracket that the one at `close` closes.
fn matching(tokens: &[Token<'_>], close: usize) -> Option<usize> {
    let mut depth = 0_usize;
    (0..=close).rev().find(|i| {
        match tokens[*i].kind {
            Kind::Close => depth += 1,
            Kind::Open => depth -= 1,
            _ => {}
        }
        depth == 0
    })
}

/// The bracket that closes the one at `open`.
fn closing(tokens: &[Token<'_>], open: usize) -> Option<usize> {
    let mut depth = 0_usize;
    (open..tokens.len()).find(|i| {
        match tokens[*i].kind {
            Kind::Open => depth += 1,
            Kind::Close => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn texts_are_put_into_texts_by_a_filter() {
        for (source, expected) in [
            ("{{ '%s' % x }}", "{{ '%s' |__mod__( x) }}"),
            ("{{ a ~ '<%s>' % m.role|upper ~ b }}", "{{ a ~ '<%s>' |__mod__( m.role|upper) ~ b }}"),
            ("{{ '%s%s' % (a, b[0]) + c }}", "{{ '%s%s' |__mod__( (a, b[0])) + c }}"),
            ("{% set t = f.g('x') % -y %}", "{% set t = f.g('x') |__mod__( -y) %}"),
            ("{{ loop.index0 % 2 == 0 }}", "{{ loop.index0 % 2 == 0 }}"),
            ("{{ 3 * i % n }}", "{{ 3 * i % n }}"),
            ("{{ -i % n }}", "{{ -i % n }}"),
            ("{% if a %}{% endif %}", "{% if a %}{% endif %}"),
            ("{{ {'a': {'b': 1}} }}", "{{ {'a': {'b': 1}} }}"),
            ("{{ '}} {% %}' }}", "{{ '}} {% %}' }}"),
            ("{# '%s' % x #}'%s' % x", "{# '%s' % x #}'%s' % x"),
        ] {
            assert_eq!(as_jinja2(source), expected, "{source}");
        }
    }

    #[test]
    fn raw_blocks_and_generation_tags_are_read_as_they_are() {
        for (source, expected) in [
            ("{% raw %}\n{{ '%s' % x }}{% endraw %}", "{% raw +%}\n{{ '%s' % x }}{% endraw %}"),
            ("{%- raw -%}\n{% generation %}{% endraw %}", "{%- raw -%}\n{% generation %}{% endraw %}"),
            ("{% generation %}x{%- endgeneration -%}", "{% if true %}x{%- endif -%}"),
            ("{{ generation }}", "{{ generation }}"),
            ("a\r\nb\rc", "a\nb\nc"),
        ] {
            assert_eq!(as_jinja2(source), expected, "{source}");
        }
    }

    proptest! {
        #[test]
        fn nothing_that_comes_panics(pieces in prop::collection::vec(
            prop::sample::select(vec!["{{", "}}", "{%", "%}", "{#", "#}", "%", "'", "\"", "\\", "(", ")", "[", "]", "{", "}",
                "raw", "endraw", "generation", " ", "\n", "-", "+", "x", ".", "|", "é", "7", "*"]), 0..24)) {
            let source: String = pieces.concat();
            let read = as_jinja2(&source);
            if !source.contains('%') {
                prop_assert_eq!(read, source);
            }
        }
    }
}
