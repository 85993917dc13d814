//! From a row to the tokens that are trained.

use std::borrow::Cow;

use crate::model::tokenizer::Tokenizer;
use crate::model::{Chat, ChatMessage, ChatTemplate, ModelError, Opened};

use super::loss::Scores;

/// A prompt with a chosen and a rejected answer, as tokens, and what the reference thinks of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// Source row it descends from.
    pub row: u64,
    /// Which pair of the row it is.
    pub ordinal: u32,
    pub prompt: Vec<u32>,
    /// With the end token, where the answer is finished.
    pub chosen: Vec<u32>,
    pub rejected: Vec<u32>,
    /// Summed reference log-probabilities of the two answers.
    pub reference: [f64; 2],
    /// Probability that the chosen answer is the better one.
    pub label: f64,
    pub weight: f64,
    /// What the chosen answer has to be ahead, see [`Scores::offset`].
    pub offset: f64,
}

impl Pair {
    pub fn scores(&self, policy: [f64; 2]) -> Scores {
        Scores {
            policy,
            reference: self.reference,
            lengths: [self.chosen.len(), self.rejected.len()],
            label: self.label,
            weight: self.weight,
            offset: self.offset,
        }
    }

    /// Tokens that the longer answer has in common with the shorter, by count.
    pub fn common(&self) -> usize {
        self.chosen.len().min(self.rejected.len())
    }

    /// Sums of the log-probabilities of both answers' tokens, those of the chosen one first; what the longer one has
    /// beyond the length of the shorter counts `ld_alpha` (LD-DPO, Liu et al. 2024).
    pub fn sums(&self, log_probs: &[f32], ld_alpha: f64) -> [f64; 2] {
        let common = self.common();
        let (chosen, rejected) = log_probs.split_at(self.chosen.len().min(log_probs.len()));
        let weighted = |(i, p): (usize, &f32)| f64::from(*p) * if i < common { 1.0 } else { ld_alpha };
        [chosen, rejected].map(|side| side.iter().enumerate().map(weighted).sum())
    }

    /// The derivative of a loss by each token's log-probability, those of the chosen answer first, for its derivative
    /// by the two [`Pair::sums`].
    pub fn spread(&self, slope: [f64; 2], ld_alpha: f64) -> impl Iterator<Item = f32> {
        let common = self.common();
        let side = move |tokens: usize, slope: f64| {
            (0..tokens).map(move |i| (slope * if i < common { 1.0 } else { ld_alpha }) as f32)
        };
        side(self.chosen.len(), slope[0]).chain(side(self.rejected.len(), slope[1]))
    }

    /// Tokens of the prompt and both answers.
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.chosen.len() + self.rejected.len()
    }

    /// Hash of all that training reads of the pair, chained to that of the pairs before it.
    pub fn chain(&self, before: [u8; 32]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&before).update(&self.row.to_le_bytes()).update(&self.ordinal.to_le_bytes());
        for ids in [&self.prompt, &self.chosen, &self.rejected] {
            hasher.update(&(ids.len() as u64).to_le_bytes());
            ids.iter().for_each(|id| {
                hasher.update(&id.to_le_bytes());
            });
        }
        for number in [self.reference[0], self.reference[1], self.label, self.weight, self.offset] {
            hasher.update(&number.to_le_bytes());
        }
        *hasher.finalize().as_bytes()
    }
}

/// A prompt as a row has it.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    Text(String),
    Chat(Chat),
}

impl Prompt {
    /// A text is what a user says.
    fn chat(&self) -> Cow<'_, Chat> {
        match self {
            Self::Text(text) => Cow::Owned(Chat { messages: vec![ChatMessage::new("user", text)], tools: None }),
            Self::Chat(chat) => Cow::Borrowed(chat),
        }
    }
}

/// An answer as a row has it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Answer {
    pub text: String,
    /// The sampled ids, where they are known: re-tokenised text differs.
    pub ids: Option<Vec<u32>>,
    /// `stop`, `length`, `context`; unknown counts as finished.
    pub finish_reason: Option<String>,
}

impl Answer {
    fn finished(&self) -> bool {
        self.finish_reason.as_deref().is_none_or(|reason| reason == "stop")
    }
}

/// What to do with answers that were cut off while they were sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Truncated {
    /// Trained as they are, without an end token.
    #[default]
    Keep,
    Drop,
}

/// How rows become pairs.
pub struct Tokens<'a> {
    pub tokenizer: &'a Tokenizer,
    /// `None` for `template = "none"`: the texts as they are, with what begins and ends texts.
    pub template: Option<&'a ChatTemplate>,
    /// The tokens that end a finished answer.
    pub end: &'a [u32],
    /// Each of these ends an answer that was sampled.
    pub stops: &'a [u32],
    /// Sets if a prompt without template begins with the begin-of-text token; `None` leaves it to the tokenizer.
    pub add_bos: Option<bool>,
    pub truncated: Truncated,
    /// Longest prompt and answer together.
    pub max_length: usize,
}

/// A row's tokens, or why there are none.
#[derive(Debug, Clone, PartialEq)]
pub enum Encoded {
    Pair {
        prompt: Vec<u32>,
        chosen: Vec<u32>,
        rejected: Vec<u32>,
        /// Answers that lost their end to `max_length`.
        cut: u32,
    },
    /// Teaches nothing: sides that are equal or empty, or cut off where those are dropped.
    Dropped(&'static str),
    /// The prompt leaves no room for an answer.
    TooLong { prompt: usize },
}

impl Tokens<'_> {
    pub fn encode(&self, prompt: &Prompt, chosen: &Answer, rejected: &Answer) -> Result<Encoded, ModelError> {
        if self.truncated == Truncated::Drop && !(chosen.finished() && rejected.finished()) {
            return Ok(Encoded::Dropped("an answer was cut off"));
        }
        let opened = self.open(prompt)?;
        let [mut chosen, mut rejected] =
            [self.answer(prompt, &opened, chosen)?, self.answer(prompt, &opened, rejected)?];
        let prompt = opened.into_ids();
        if prompt.len() >= self.max_length {
            return Ok(Encoded::TooLong { prompt: prompt.len() });
        }
        let room = self.max_length - prompt.len();
        let mut cut = 0;
        for answer in [&mut chosen, &mut rejected] {
            cut += u32::from(answer.len() > room);
            answer.truncate(room);
        }
        Ok(if self.is_empty(&chosen) || self.is_empty(&rejected) {
            Encoded::Dropped("an answer is empty")
        } else if chosen == rejected {
            Encoded::Dropped("the answers are equal")
        } else {
            Encoded::Pair { prompt, chosen, rejected, cut }
        })
    }

    /// One answer, as a pair without a rejected one.
    pub fn encode_one(&self, prompt: &Prompt, answer: &Answer) -> Result<Encoded, ModelError> {
        if self.truncated == Truncated::Drop && !answer.finished() {
            return Ok(Encoded::Dropped("an answer was cut off"));
        }
        let opened = self.open(prompt)?;
        let mut chosen = self.answer(prompt, &opened, answer)?;
        let prompt = opened.into_ids();
        if prompt.len() >= self.max_length {
            return Ok(Encoded::TooLong { prompt: prompt.len() });
        }
        let room = self.max_length - prompt.len();
        let cut = u32::from(chosen.len() > room);
        chosen.truncate(room);
        Ok(if self.is_empty(&chosen) {
            Encoded::Dropped("an answer is empty")
        } else {
            Encoded::Pair { prompt, chosen, rejected: Vec::new(), cut }
        })
    }

    /// Whether an answer says nothing but its end.
    fn is_empty(&self, ids: &[u32]) -> bool {
        self.without_end(ids).iter().all(|id| self.stops.contains(id))
    }

    /// An answer up to what ended it.
    pub fn without_end<'b>(&self, ids: &'b [u32]) -> &'b [u32] {
        if let Some(said) = ids.strip_suffix(self.end) {
            return said;
        }
        match ids.split_last() {
            Some((last, said)) if self.stops.contains(last) => said,
            _ => ids,
        }
    }

    /// The prompt up to where the answer begins.
    pub fn open(&self, prompt: &Prompt) -> Result<Opened, ModelError> {
        match (self.template, prompt) {
            (Some(template), prompt) => template.opened(self.tokenizer, prompt.chat().as_ref()),
            (None, Prompt::Text(text)) => Opened::of_text(self.tokenizer, text.clone(), self.add_bos),
            (None, Prompt::Chat(_)) => Err(ModelError::Setting(
                "the prompt is a conversation, which template = \"none\" can't render; leave `template` out".into(),
            )),
        }
    }

    /// Tokens of an answer to `prompt`, which is `opened`; uncut. Only a finished one has an end; one that was sampled
    /// with an end of its own keeps that.
    pub fn answer(&self, prompt: &Prompt, opened: &Opened, answer: &Answer) -> Result<Vec<u32>, ModelError> {
        let mut ids = match (&answer.ids, self.template) {
            (Some(ids), _) => ids.clone(),
            (None, Some(template)) => {
                template.encode_answer(self.tokenizer, prompt.chat().as_ref(), opened, &answer.text)?
            }
            (None, None) => opened.behind(self.tokenizer, &answer.text)?,
        };
        if answer.finished() && self.without_end(&ids).len() == ids.len() {
            ids.extend(self.end);
        }
        Ok(ids)
    }
}
