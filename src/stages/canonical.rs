//! The canonical forms of what the kinds' keys hold.
//!
//! They stand here and not beside the types, whose rooms know nothing of keys. A variant or a field that
//! is not named here does not compile.

use super::process::{Column, Format};
use super::trainer::{Algorithm, Consume, Reference, Start, Template};
use crate::data::ColumnType;
use crate::data::shard::Cut;
use crate::data::split::By;
use crate::judge::pairs::{Choose, Selection, Ties};
use crate::judge::pairwise::{Combine, Order as Asked};
use crate::llm::Sampling;
use crate::model::LoraConfig;
use crate::train::pair::Truncated;
use crate::train::{Decay, Metric, Order};
use crate::{canonical_fields, canonical_names};

// Only benchmarks go on past the end of the turn.
canonical_fields!(Sampling {
    max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, logprobs,
} without { ignore_eos });

canonical_fields!(Cut { count, contiguous } without {});

canonical_fields!(LoraConfig { r, alpha, dropout, targets, rslora } without {});

canonical_fields!(Selection {
    choose, ties, soft, min_gap, max_pairs, length_control, require_stop, near_duplicates,
} without {});

canonical_fields!(Column { name, kind } without {});

canonical_names!(ColumnType { F64 = "f64", I64 = "i64", Bool = "bool", String = "string" });

canonical_names!(Format { Jsonl = "jsonl", Arrow = "arrow" });

canonical_names!(By { Spread = "spread", Position = "position" });

canonical_names!(Choose { BestWorst = "best_worst", All = "all" });

canonical_names!(Ties { Drop = "drop", Soft = "soft" });

canonical_names!(Combine { Majority = "majority", Mean = "mean" });

canonical_names!(Asked { Random = "random", Both = "both", DataDreamer = "datadreamer" });

canonical_names!(Truncated { Keep = "keep", Drop = "drop" });

canonical_names!(Decay { Linear = "linear", Cosine = "cosine", Constant = "constant" });

canonical_names!(Metric { Loss = "loss", Margins = "rewards/margins", Accuracies = "rewards/accuracies" });

canonical_names!(Order { Shuffled = "shuffled", Sequential = "sequential" });

canonical_names!(Algorithm { Dpo = "dpo", Sft = "sft" });

canonical_names!(Consume { Stream = "stream", Collect = "collect" });

canonical_names!(Reference { Base = "base", Previous = "previous", Ema = "ema" });

canonical_names!(Start { Fresh = "fresh", Continue = "continue", FreshOnMerged = "fresh_on_merged" });

canonical_names!(Template { Chat = "chat", None = "none" });
