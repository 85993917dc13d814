//! What travels on an edge.

use datafusion::arrow::record_batch::RecordBatch;

/// Rows, and what is now known to be complete.
///
/// Every batch has the key column `_row` (u64, number of the source row it descends from). The
/// rows of one `_row` may come in several messages and in any order between rows; the message that
/// names the row in `completes` is the last to hold any of it. A filtered row or a dead letter is
/// completed without rows.
#[derive(Debug, Clone, Default)]
pub struct Message {
    /// `None` or empty where the message only completes rows.
    pub batch: Option<RecordBatch>,
    /// Source rows for which nothing more will come on this edge; each is named exactly once a round.
    pub completes: Vec<u64>,
    /// No row below this one will come on this edge any more, whether named or not.
    pub watermark: u64,
}

impl Message {
    pub fn rows(&self) -> usize {
        self.batch.as_ref().map_or(0, RecordBatch::num_rows)
    }
}
