//! Matches the ways to write a label.

/// Nouns for an answer. A judge that was asked about "Response A" may write "Output A".
pub const NOUN: &str = "(?:response|answer|assistant|output|option|model|candidate|completion|choice|solution|reply|text\
    |antwort|réponse|respuesta|risposta|resposta)";

/// Brackets allowed around a label.
const OPEN: &str = r"[<(\[{]*\s*";
const CLOSE: &str = r"(?:\s*[>)\]}]+)?";

/// Patterns for the ways to write one label.
pub struct Names {
    /// The whole label; `None` if it has only one or two characters, which may occur by chance.
    full: Option<String>,
    /// The part that differs from the other label: "A" of "Response A".
    short: Option<String>,
    /// The place of the answer: "the first response", "Response 1"; `None` if the labels use such words themselves.
    place: Option<String>,
}

impl Names {
    pub fn of(names: &[String; 2]) -> [Self; 2] {
        let words = names.each_ref().map(|name| name.split_whitespace().collect::<Vec<_>>());
        let same = |(one, other): &(&&str, &&str)| one.eq_ignore_ascii_case(other);
        let first = words[0].iter().zip(&words[1]).take_while(same).count();
        let last = words[0].iter().rev().zip(words[1].iter().rev()).take_while(same).count();
        let places = !names.iter().any(|name| is_place(name));
        [0, 1].map(|i| {
            let brief = names[i].trim().chars().count() <= 2;
            let own = words[i].get(first..words[i].len().saturating_sub(last)).unwrap_or_default().join(" ");
            let own = own.trim_matches(|c: char| !c.is_alphanumeric());
            Self {
                full: (!brief).then(|| word(&names[i])),
                short: if brief {
                    Some(word(&names[i]))
                } else {
                    Some(own).filter(|own| first + last > 0 && !own.is_empty()).map(word)
                },
                place: places.then(|| {
                    let (word, number) = [("first", "1"), ("second", "2")][i];
                    format!(r"{word}\s+(?:one|{NOUN})\b|{NOUN}\s+#?{number}\b")
                }),
            }
        })
    }

    /// Matches every form, in brackets or not, where only a label can stand.
    pub fn value(&self) -> String {
        let short = self.short.as_ref().map(|short| format!(r"(?:{}|{short})", with_noun(short)));
        let forms = [self.full.clone(), short, self.place.clone()];
        format!(r"{OPEN}(?:the\s+)?{}(?:'s\s+{NOUN}\b)?{CLOSE}", either(forms))
    }

    /// Matches the label in a sentence; the short form must have the same case as in the question.
    pub fn noun(&self) -> String {
        let short = self.short.as_ref().map(|short| format!(r"(?:{}|{short})\)?", with_noun(short)));
        let short = short.map(|short| format!("(?-i:{short})").replace(NOUN, &format!("(?i:{NOUN})")));
        format!(r"(?:the\s+)?{}", either([self.full.clone(), short, self.place.clone()]))
    }

    /// Matches any word that may mean the label.
    pub fn mention(&self) -> String {
        let short = self.short.as_ref().map(|short| format!(r"(?:{}|(?-i:{short}))", with_noun(short)));
        either([self.full.clone(), short, self.place.clone()])
    }
}

/// Returns whether a label says the place of an answer.
fn is_place(label: &str) -> bool {
    let label = label.to_lowercase();
    label.contains(|c: char| c.is_ascii_digit())
        || ["first", "second", "one", "two"].iter().any(|word| label.contains(word))
}

/// Matches a noun for an answer and then the short label; they may be separated by `_`.
fn with_noun(short: &str) -> String {
    format!(r"\b{NOUN}[\s(\[_#-]+{short}|(?:回答|答案){short}", short = short.replacen(r"\b", "", 1))
}

fn either(forms: [Option<String>; 3]) -> String {
    format!("(?:{})", forms.into_iter().flatten().collect::<Vec<_>>().join("|"))
}

/// Matches `text` as whole words, with any white space, `_` or `-` between them.
pub fn word(text: &str) -> String {
    let text = text.trim();
    let border = |c: Option<char>| if c.is_some_and(|c| c.is_alphanumeric() || c == '_') { r"\b" } else { "" };
    let words: Vec<String> = text.split_whitespace().map(regex::escape).collect();
    format!("{}{}{}", border(text.chars().next()), words.join(r"[\s_-]+"), border(text.chars().next_back()))
}
