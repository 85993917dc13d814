//! The Hugging Face hub: who asks it, and what may stand in a name there.

/// Who asks the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HubLogin {
    /// The user, with the token of the environment where there is one.
    #[default]
    Own,
    /// Nobody: what is public is there, and nothing else.
    Anonymous,
}

impl HubLogin {
    /// The token that the client is given. Without one it takes that of the environment, so for nobody it is one
    /// that can't stand in a header: the client leaves the header out.
    pub fn token(self) -> Option<&'static str> {
        match self {
            Self::Own => None,
            Self::Anonymous => Some("\n"),
        }
    }
}

/// Returns whether `HF_HUB_OFFLINE` keeps the hub from being asked, read as huggingface_hub does.
pub fn is_offline() -> bool {
    let value = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_lowercase();
    matches!(value.as_str(), "1" | "true" | "yes" | "on")
}

/// Returns whether a part of `hf://OWNER/NAME@REVISION` is a name. It becomes a part of a path in the hub's cache, so nothing
/// in it may lead out of there; a revision may have several parts, as in `refs/pr/1`.
///
/// ```
/// use flowrun::flow::hub::is_name;
/// assert!(["refs/pr/1", "v1.0", "main"].iter().all(|name| is_name(name)));
/// assert!(["", "..", "a/../b", "/etc", "a//b", "a\\b", "a b"].iter().all(|name| !is_name(name)));
/// ```
pub fn is_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    text.split('/').all(|part| !part.is_empty() && part.chars().all(plain) && part.chars().any(|c| c != '.'))
}
