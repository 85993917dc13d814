//! Rows in flight: what every stage does that asks a model about one source row at a time.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::future::Future;

use datafusion::arrow::array::{Array, ArrayRef, UInt32Array, new_null_array};
use datafusion::arrow::compute::{concat_batches, filter_record_batch, take_record_batch};
use datafusion::arrow::datatypes::FieldRef;
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::arrow::row::{RowConverter, SortField};
use futures::StreamExt;
use futures::stream::FuturesUnordered;

use crate::data::Query;
use crate::data::batch::PART;
use crate::engine::{Message, StageContext, StageError};

/// Why a row has no result.
#[derive(Debug)]
pub enum RowError {
    /// The row's own fault: it becomes a dead letter with this reason.
    DeadLetter(String),
    /// The stage can't go on.
    Stage(StageError),
}

impl From<StageError> for RowError {
    fn from(error: StageError) -> Self {
        Self::Stage(error)
    }
}

/// Runs `work` on each source row of the stage's first input once all of it has arrived.
///
/// At most `window` rows are in flight, counted from the oldest unfinished one, so that order can be
/// restored downstream in bounded memory. Rows that the journal holds are sent again without work.
/// The journal must be open. `sent` sees every result, replayed ones too.
pub async fn each_row<W, F, S>(ctx: &mut StageContext, window: usize, work: W, sent: S) -> Result<(), StageError>
where
    W: Fn(u64, RecordBatch) -> F,
    F: Future<Output = Result<Option<RecordBatch>, RowError>> + Send,
    S: FnMut(&RecordBatch),
{
    each_row_with(ctx, window, |_, hash| Ok(hash), work, sent).await
}

/// As [`each_row`], where more than a row's content decides its result: `key` makes, of a row and the hash of its
/// content, what the journal knows it by.
pub async fn each_row_with<K, W, F, S>(
    ctx: &mut StageContext,
    window: usize,
    key: K,
    work: W,
    mut sent: S,
) -> Result<(), StageError>
where
    K: Fn(u64, u64) -> Result<u64, StageError>,
    W: Fn(u64, RecordBatch) -> F,
    F: Future<Output = Result<Option<RecordBatch>, RowError>> + Send,
    S: FnMut(&RecordBatch),
{
    let mut gathered: BTreeMap<u64, Vec<RecordBatch>> = BTreeMap::new();
    let mut waiting: VecDeque<(u64, Option<RecordBatch>)> = VecDeque::new();
    let mut running = FuturesUnordered::new();
    // Input and order of the rows that `running` works on.
    let mut in_flight: BTreeMap<u64, InFlight> = BTreeMap::new();
    let mut started = 0;
    let mut open = true;
    loop {
        while started - in_flight.values().map(|r| r.order).min().unwrap_or(started) < window {
            let Some((row, rows)) = waiting.pop_front() else { break };
            if let Some((hash, rows)) = unrecorded(ctx, row, rows, &key, &mut sent).await? {
                let result = work(row, rows.clone());
                running.push(async move { (row, result.await) });
                in_flight.insert(row, InFlight { order: started, hash, rows });
                started += 1;
            }
        }
        ctx.works_on(running.len());
        if !open && waiting.is_empty() && running.is_empty() {
            return Ok(());
        }
        tokio::select! {
            message = recv(ctx), if open && waiting.is_empty() => match message? {
                None => open = false,
                Some(message) => waiting.extend(gather(&mut gathered, message)?),
            },
            Some((row, result)) = running.next() => {
                if let Some(input) = in_flight.remove(&row) {
                    settle(ctx, row, input, result, &mut sent).await?;
                }
            }
        }
    }
}

struct InFlight {
    /// Place among the rows started.
    order: usize,
    hash: u64,
    rows: RecordBatch,
}

/// Sends what needs no work; returns the rest with its hash.
async fn unrecorded(
    ctx: &mut StageContext,
    row: u64,
    rows: Option<RecordBatch>,
    key: &impl Fn(u64, u64) -> Result<u64, StageError>,
    sent: &mut impl FnMut(&RecordBatch),
) -> Result<Option<(u64, RecordBatch)>, StageError> {
    let Some(rows) = rows else {
        ctx.replay(row, None).await?;
        return Ok(None);
    };
    let hash = key(row, input_hash(&rows)?)?;
    match ctx.recorded(row, hash) {
        Some(recorded) => {
            recorded.iter().for_each(sent);
            ctx.replay(row, recorded).await.map(|()| None)
        }
        None => Ok(Some((hash, rows))),
    }
}

async fn settle(
    ctx: &mut StageContext,
    row: u64,
    input: InFlight,
    result: Result<Option<RecordBatch>, RowError>,
    sent: &mut impl FnMut(&RecordBatch),
) -> Result<(), StageError> {
    match result {
        Ok(out) => {
            out.iter().for_each(sent);
            ctx.finish(row, input.hash, out).await
        }
        Err(RowError::DeadLetter(reason)) => ctx.dead_letter(row, &reason, &input.rows).await,
        Err(RowError::Stage(error)) => Err(error),
    }
}

async fn recv(ctx: &mut StageContext) -> Result<Option<Message>, StageError> {
    match ctx.inputs.first_mut() {
        Some(input) => input.recv().await,
        None => Ok(None),
    }
}

/// Adds a message's rows; returns the source rows it completes, each with all its rows together.
pub fn gather(
    gathered: &mut BTreeMap<u64, Vec<RecordBatch>>,
    message: Message,
) -> Result<Vec<(u64, Option<RecordBatch>)>, StageError> {
    if let Some(batch) = message.batch.filter(|b| b.num_rows() > 0) {
        for (row, rows) in split_by_row(&batch)? {
            gathered.entry(row).or_default().push(rows);
        }
    }
    let complete = message.completes.into_iter().map(|row| {
        let rows = match gathered.remove(&row) {
            None => None,
            Some(parts) => Some(join(&parts)?),
        };
        Ok((row, rows))
    });
    complete.collect()
}

/// Groups the rows of one source row by the prompt that they answer, in the order in which they came.
///
/// Several prompts that a query made of one row are its parts, and their answers are told apart by them. Where no part
/// has two rows, the parts are answers themselves, told apart by their prompts.
///
/// # Errors
/// A dead letter where a part, or a row without parts, has different prompts.
pub fn groups(rows: &RecordBatch) -> Result<Vec<RecordBatch>, RowError> {
    let parts = rows.column_by_name(PART).map(|_| super::columns::u32s(rows, PART)).transpose()?;
    let part = |row: usize| parts.filter(|parts| parts.is_valid(row)).map(|parts| parts.value(row));
    let mut places = together(rows.num_rows(), part);
    if places.iter().all(|group| group.len() == 1) {
        let prompts = prompts(rows)?;
        places = together(rows.num_rows(), |row| prompts.as_ref().map(|prompts| prompts.row(row).owned()));
    }
    let take = |places: Vec<u32>| {
        let group = take_record_batch(rows, &UInt32Array::from(places));
        let group = group.map_err(|e| StageError::internal(format!("rows can't be grouped: {e}")))?;
        one_prompt(&group).map(|()| group)
    };
    places.into_iter().map(take).collect()
}

/// The places of rows with equal keys.
fn together<K: PartialEq>(rows: usize, key: impl Fn(usize) -> K) -> Vec<Vec<u32>> {
    let mut groups: Vec<(K, Vec<u32>)> = Vec::new();
    for row in 0..rows {
        let own = key(row);
        match groups.iter_mut().find(|(known, _)| *known == own) {
            Some((_, places)) => places.push(row as u32),
            None => groups.push((own, vec![row as u32])),
        }
    }
    groups.into_iter().map(|(_, places)| places).collect()
}

fn prompts(rows: &RecordBatch) -> Result<Option<datafusion::arrow::row::Rows>, StageError> {
    let Ok(at) = rows.schema_ref().index_of("prompt") else { return Ok(None) };
    by_value(&rows.project(&[at]).map_err(|e| StageError::internal(e.to_string()))?).map(Some)
}

fn one_prompt(group: &RecordBatch) -> Result<(), RowError> {
    let Some(prompts) = prompts(group)? else { return Ok(()) };
    match prompts.iter().zip(prompts.iter().skip(1)).all(|(a, b)| a == b) {
        true => Ok(()),
        false => Err(RowError::DeadLetter("its answers are to different prompts, which can't be compared".into())),
    }
}

/// Rows of one prompt in which the columns beside those of an answer are the prompt's. A column whose values differ between
/// the answers, but for the engine's keys and those that `of_answer` names, is null.
///
/// # Errors
/// Values can't be compared.
pub fn shared(rows: &RecordBatch, of_answer: impl Fn(&str) -> bool) -> Result<RecordBatch, StageError> {
    let failed = |e: datafusion::arrow::error::ArrowError| StageError::internal(format!("columns of a prompt: {e}"));
    if rows.num_rows() < 2 {
        return Ok(rows.clone());
    }
    let schema = rows.schema();
    let column = |(field, column): (&FieldRef, &ArrayRef)| -> Result<ArrayRef, StageError> {
        let name = field.name().as_str();
        if name.starts_with('_') || of_answer(name) || !field.is_nullable() {
            return Ok(column.clone());
        }
        let converter = RowConverter::new(vec![SortField::new(column.data_type().clone())]).map_err(failed)?;
        let values = converter.convert_columns(std::slice::from_ref(column)).map_err(failed)?;
        let same = values.iter().skip(1).all(|value| value == values.row(0));
        Ok(if same { column.clone() } else { new_null_array(column.data_type(), column.len()) })
    };
    let columns = schema.fields().iter().zip(rows.columns()).map(column).collect::<Result<Vec<_>, _>>()?;
    RecordBatch::try_new(schema, columns).map_err(failed)
}

/// Batches of one schema as one.
pub fn join(parts: &[RecordBatch]) -> Result<RecordBatch, StageError> {
    match parts {
        [only] => Ok(only.clone()),
        [first, ..] => concat_batches(&first.schema(), parts).map_err(|e| StageError::internal(e.to_string())),
        [] => Err(StageError::internal("no rows to join")),
    }
}

/// Applies a row-wise query. Source rows for which it can't be computed become dead letters, and their numbers are added to
/// `dead`. `what` names the query in the reasons.
///
/// # Errors
/// There are more dead letters than `max_dead_letters` allows; the query fails on rows that it can be computed for alone.
pub async fn apply_or_give_up(
    ctx: &mut StageContext,
    query: &mut Query,
    what: &str,
    batch: &RecordBatch,
    dead: &mut HashSet<u64>,
) -> Result<RecordBatch, StageError> {
    if let Ok(made) = query.apply(batch).await {
        return Ok(made);
    }
    for (row, reason) in failures(query, batch).await? {
        dead.insert(row);
        ctx.dead_letter(row, &format!("the {what} can't be computed: {reason}"), &of_row(batch, row)?).await?;
    }
    Ok(query.apply(&without(batch, dead)?).await?)
}

/// Source rows for which a row-wise query can't be computed, each with the reason.
pub async fn failures(query: &mut Query, batch: &RecordBatch) -> Result<BTreeMap<u64, String>, StageError> {
    let rows = super::columns::u64s(batch, "_row")?;
    let mut failed = BTreeMap::new();
    for (i, row) in rows.values().iter().enumerate() {
        if let Err(error) = query.apply(&batch.slice(i, 1)).await {
            failed.entry(*row).or_insert(error.message);
        }
    }
    Ok(failed)
}

/// The rows of one source row.
fn of_row(batch: &RecordBatch, row: u64) -> Result<RecordBatch, StageError> {
    filtered(batch, |other| other == row)
}

/// The rows of all source rows but those given up.
pub fn without(batch: &RecordBatch, dead: &HashSet<u64>) -> Result<RecordBatch, StageError> {
    if dead.is_empty() {
        return Ok(batch.clone());
    }
    filtered(batch, |row| !dead.contains(&row))
}

fn filtered(batch: &RecordBatch, kept: impl Fn(u64) -> bool) -> Result<RecordBatch, StageError> {
    let rows = super::columns::u64s(batch, "_row")?;
    let kept = rows.values().iter().map(|row| Some(kept(*row))).collect();
    filter_record_batch(batch, &kept).map_err(|e| StageError::internal(e.to_string()))
}

/// The runs of equal `_row` in a batch.
fn split_by_row(batch: &RecordBatch) -> Result<Vec<(u64, RecordBatch)>, StageError> {
    let rows = super::columns::u64s(batch, "_row")?;
    let mut parts = Vec::new();
    let mut start = 0;
    for end in 1..=rows.len() {
        if end == rows.len() || rows.value(end) != rows.value(start) {
            parts.push((rows.value(start), batch.slice(start, end - start)));
            start = end;
        }
    }
    Ok(parts)
}

/// Hash of rows by value, whatever the layout of their arrays.
pub fn input_hash(rows: &RecordBatch) -> Result<u64, StageError> {
    let mut hasher = column_hasher(rows);
    for row in &by_value(rows)? {
        hasher.update(&(row.as_ref().len() as u64).to_le_bytes()).update(row.as_ref());
    }
    Ok(first_word(&hasher))
}

/// [`input_hash`] of each row alone.
pub fn input_hashes(rows: &RecordBatch) -> Result<Vec<u64>, StageError> {
    let columns = column_hasher(rows);
    let hash = |row: datafusion::arrow::row::Row<'_>| {
        let mut hasher = columns.clone();
        hasher.update(&(row.as_ref().len() as u64).to_le_bytes()).update(row.as_ref());
        first_word(&hasher)
    };
    Ok(by_value(rows)?.iter().map(hash).collect())
}

fn column_hasher(rows: &RecordBatch) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    for field in rows.schema_ref().fields() {
        hasher.update(field.name().as_bytes()).update(&[0]);
    }
    hasher
}

fn by_value(rows: &RecordBatch) -> Result<datafusion::arrow::row::Rows, StageError> {
    let failed = |e: datafusion::arrow::error::ArrowError| StageError::internal(format!("rows can't be hashed: {e}"));
    let fields = rows.schema_ref().fields().iter().map(|f| SortField::new(f.data_type().clone())).collect();
    RowConverter::new(fields).and_then(|converter| converter.convert_columns(rows.columns())).map_err(failed)
}

fn first_word(hasher: &blake3::Hasher) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use datafusion::arrow::array::{ArrayRef, StringArray, UInt64Array};

    use super::*;

    fn batch(rows: &[u64], text: &[&str]) -> RecordBatch {
        let rows: ArrayRef = Arc::new(UInt64Array::from(rows.to_vec()));
        let text: ArrayRef = Arc::new(StringArray::from(text.to_vec()));
        RecordBatch::try_from_iter([("_row", rows), ("text", text)]).unwrap()
    }

    #[test]
    fn rows_are_released_when_complete_whatever_the_order_they_came_in() {
        let mut gathered = BTreeMap::new();
        let first = Message { batch: Some(batch(&[4, 7, 7], &["a", "b", "c"])), completes: vec![4], watermark: 0 };
        let out = gather(&mut gathered, first).unwrap();
        assert_eq!(out.len(), 1);
        assert_eq!(out[0], (4, Some(batch(&[4], &["a"]))));
        let second = Message { batch: Some(batch(&[7], &["d"])), completes: vec![7, 9], watermark: 0 };
        let out = gather(&mut gathered, second).unwrap();
        assert_eq!(out[0], (7, Some(batch(&[7, 7, 7], &["b", "c", "d"]))));
        assert_eq!(out[1], (9, None));
        assert!(gathered.is_empty());
    }

    #[test]
    fn what_differs_between_answers_is_no_column_of_their_prompt() {
        let rows = batch(&[7, 7], &["x", "y"]);
        let same: ArrayRef = Arc::new(StringArray::from(vec!["a", "a"]));
        let fields: Vec<_> = [("text", true), ("same", true), ("generation", true)]
            .map(|(name, nullable)| {
                datafusion::arrow::datatypes::Field::new(name, datafusion::arrow::datatypes::DataType::Utf8, nullable)
            })
            .to_vec();
        let text = rows.column(1).clone();
        let schema = Arc::new(datafusion::arrow::datatypes::Schema::new(fields));
        let rows = RecordBatch::try_new(schema, vec![text.clone(), same, text]).unwrap();
        let shared = shared(&rows, |name| name == "generation").unwrap();
        assert_eq!([0, 1, 2].map(|i| shared.column(i).null_count()), [2, 0, 0]);
    }

    #[test]
    fn rows_of_a_part_belong_together() {
        let with = |parts: &[Option<u32>], prompts: &[&str]| {
            let columns: [(&str, ArrayRef); 2] = [
                (PART, Arc::new(UInt32Array::from(parts.to_vec()))),
                ("prompt", Arc::new(StringArray::from(prompts.to_vec()))),
            ];
            RecordBatch::try_from_iter(columns).unwrap()
        };
        let fanned = with(&[Some(1), Some(0), Some(1), Some(0)], &["b", "a", "b", "a"]);
        let prompts = |group: &RecordBatch| -> Vec<String> {
            let texts = super::super::columns::strings(group, "prompt").unwrap();
            texts.iter().flatten().map(str::to_owned).collect()
        };
        let found: Vec<_> = groups(&fanned).unwrap().iter().map(prompts).collect();
        assert_eq!(found, [["b", "b"], ["a", "a"]]);
        // Parts of one row each are answers, to one prompt or to several.
        let unnested = with(&[Some(0), Some(1), Some(2), Some(3)], &["a", "a", "b", "a"]);
        let found: Vec<_> = groups(&unnested).unwrap().iter().map(prompts).collect();
        assert_eq!(found, [vec!["a", "a", "a"], vec!["b"]]);
        let plain = fanned.project(&[1]).unwrap();
        for mixed in [plain, with(&[None; 4], &["a", "a", "a", "b"])] {
            let RowError::DeadLetter(reason) = groups(&mixed).unwrap_err() else { panic!("no dead letter") };
            assert!(reason.contains("different prompts"), "{reason}");
        }
        assert_eq!(groups(&batch(&[3, 3], &["x", "y"])).unwrap().len(), 1, "rows without a prompt are of one");
    }

    #[test]
    fn the_hash_is_of_values_not_of_layout() {
        let whole = batch(&[1, 2], &["x", "y"]);
        assert_eq!(input_hash(&whole.slice(1, 1)).unwrap(), input_hash(&batch(&[2], &["y"])).unwrap());
        assert_ne!(input_hash(&whole.slice(0, 1)).unwrap(), input_hash(&batch(&[1], &["y"])).unwrap());
        let each = [0, 1].map(|i| input_hash(&whole.slice(i, 1)).unwrap());
        assert_eq!(input_hashes(&whole).unwrap(), each);
    }
}
