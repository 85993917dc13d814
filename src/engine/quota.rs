//! Limits (quotas) on the resources of a run.

use super::error::{Domain, RunError};

/// A limited resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quota {
    /// Rows sent by all stages.
    Rows,
    /// Tokens read and written by models.
    Tokens,
    /// Bytes in the run directory.
    Bytes,
    /// Seconds since the run was started in this process.
    Seconds,
    /// Simultaneous runs.
    Runs,
}

/// The limits of a run; `None` is no limit. Work reused from an earlier execution counts as rows and bytes, and not
/// as tokens and seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Quotas {
    pub rows: Option<u64>,
    pub tokens: Option<u64>,
    pub bytes: Option<u64>,
    pub seconds: Option<u64>,
    pub runs: Option<u64>,
}

/// The resources that a run has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Usage {
    pub rows: u64,
    pub tokens: u64,
    pub bytes: u64,
    pub seconds: u64,
}

impl Quotas {
    /// Returns the error of the first exceeded quota. `seconds` counts as exceeded when it is reached.
    pub(super) fn exceeded(&self, usage: &Usage) -> Option<RunError> {
        let each = [
            (Quota::Rows, self.rows, usage.rows),
            (Quota::Tokens, self.tokens, usage.tokens),
            (Quota::Bytes, self.bytes, usage.bytes),
            (Quota::Seconds, self.seconds, usage.seconds),
        ];
        let over = |quota, most, used| used > most || (quota == Quota::Seconds && used == most);
        each.into_iter().find_map(|(quota, most, used)| {
            let most = most?;
            over(quota, most, used).then(|| quota.exceeded(most))
        })
    }
}

impl Quota {
    /// Returns the error for a run that exceeded the limit `most`.
    pub fn exceeded(self, most: u64) -> RunError {
        let message = match self {
            Self::Rows => format!(
                "the run made more than {most} rows, which is all that it may make\n  help: lower `take`, `candidates` or `rounds`"
            ),
            Self::Tokens => format!(
                "the run's models read and wrote more than {most} tokens, which is all that they may\n  help: lower `take`, `candidates`, `max_new_tokens` or `rounds`"
            ),
            Self::Bytes => format!(
                "the run's directory holds more than {most} bytes, which is all that it may hold\n  help: lower `take` or `rounds`, or write `table = false` in stages whose rows nobody reads"
            ),
            Self::Seconds => format!(
                "the run went on for {most} seconds, which is all that it may take\n  help: lower `take`, `candidates` or `rounds`"
            ),
            Self::Runs => format!(
                "{most} runs go on, which are all that may at one time\n  help: wait until one of them has ended"
            ),
        };
        RunError { domain: Domain::Quota(self), message, stage: None }
    }
}
