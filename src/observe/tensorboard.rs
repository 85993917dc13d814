//! TensorBoard's event files, from the lines of `metrics.jsonl`: what reads TRL's runs reads these.
//!
//! A file is a sequence of TFRecords (length, its CRC, data, its CRC), each an `Event` message in protobuf's wire
//! format (tensorflow/core/util/event.proto, framework/summary.proto). Only scalars are written, under the tags that
//! transformers' trainer uses: `train/loss`, `eval/rewards/margins`.

use std::collections::BTreeMap;

use serde_json::Value;

/// What the writer of a file says of its format.
const VERSION: &str = "brain.Event:2";

/// Keys of a line that are no figures of training.
const NO_FIGURES: [&str; 7] = ["time", "event", "round", "stage", "step", "skipped", "kind"];

/// Name of every file; one of another name beside it would be laid over it.
const FILE: &str = "events.out.tfevents.1.flowrun";

/// What is added to one file.
#[derive(Debug, Default)]
pub struct Records {
    /// Of the first line.
    time: f64,
    pub bytes: Vec<u8>,
}

impl Records {
    /// What a file begins with.
    pub fn head(&self) -> Vec<u8> {
        record(&event(self.time, 0, &field_bytes(3, VERSION.as_bytes())))
    }
}

/// The lines as records, by the path of their file below `RUN/tensorboard`: one for each stage and round, so that rounds
/// can be laid over each other.
pub fn records(lines: impl Iterator<Item = Value>) -> BTreeMap<String, Records> {
    let mut files: BTreeMap<String, Records> = BTreeMap::new();
    for line in lines {
        let (Some(time), Some(round), Some(stage)) =
            (line["time"].as_f64(), line["round"].as_u64(), line["stage"].as_str())
        else {
            continue;
        };
        let prefix = match line["event"].as_str() {
            Some("step") => "train/",
            Some("evaluation") => "eval/",
            _ => continue,
        };
        let step = line["step"].as_u64().unwrap_or(0);
        let file = files.entry(format!("{stage}/round-{round}/{FILE}"));
        let file = file.or_insert_with(|| Records { time, bytes: Vec::new() });
        let figures = line.as_object().into_iter().flatten().filter(|(key, _)| !NO_FIGURES.contains(&key.as_str()));
        let values: Vec<u8> = figures
            .filter_map(|(key, value)| Some((tag(prefix, key), value.as_f64()?)))
            .flat_map(|(tag, value)| field_bytes(1, &scalar(&tag, value as f32)))
            .collect();
        file.bytes.extend(record(&event(time, step, &field_bytes(5, &values))));
    }
    files
}

/// `eval_loss` is `eval/loss`, as transformers writes it.
fn tag(prefix: &str, key: &str) -> String {
    match key.strip_prefix("eval_") {
        Some(rest) => format!("eval/{rest}"),
        None => format!("{prefix}{key}"),
    }
}

/// One TFRecord.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc(data).to_le_bytes());
    record
}

/// TFRecord's masking of a CRC32C, so that a CRC of data with CRCs in it is no trouble.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// `Event`: wall_time = 1 (double), step = 2 (int64), and what happened.
fn event(time: f64, step: u64, what: &[u8]) -> Vec<u8> {
    let mut out = vec![1 << 3 | 1];
    out.extend(time.to_le_bytes());
    // What is 0 is left out, as protobuf's own writers do.
    if step > 0 {
        out.push(2 << 3);
        out.extend(varint(step));
    }
    out.extend(what);
    out
}

/// `Summary.Value`: tag = 1 (string), simple_value = 2 (float).
fn scalar(tag: &str, value: f32) -> Vec<u8> {
    let mut out = field_bytes(1, tag.as_bytes());
    out.push(2 << 3 | 5);
    out.extend(value.to_le_bytes());
    out
}

/// A field of length-delimited type.
fn field_bytes(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    out.extend(varint(bytes.len() as u64));
    out.extend(bytes);
    out
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_file_is_what_tensorboards_own_writer_makes() {
        let lines = include_str!("../../tests/fixtures/tensorboard/lines.jsonl").lines();
        let lines: Vec<Value> = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
        // In two parts, as a run goes on.
        let (first, more) = lines.split_at(2);
        let [first, more] = [first, more].map(|part| records(part.iter().cloned()).into_values().next().unwrap());
        let file = [first.head(), first.bytes, more.bytes].concat();
        assert!(
            file == include_bytes!("../../tests/fixtures/tensorboard/expected"),
            "tests/oracle/event_files.py fixture"
        );
    }

    #[test]
    fn a_record_is_framed_as_tensorflow_does_it() {
        // tensorboard.compat.tensorflow_stub's RecordWriter on b"abc".
        let framed = record(b"abc");
        assert_eq!(framed.len(), 8 + 4 + 3 + 4);
        assert_eq!(&framed[..8], &3u64.to_le_bytes());
        assert_eq!(&framed[12..15], b"abc");
        // RFC 3720: the CRC32C of "123456789".
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8));
        assert_eq!(varint(300), [0xac, 0x02]);
    }

    #[test]
    fn rounds_are_files_of_their_own_and_names_are_transformers() {
        let line = |event: &str, round: u64, step: u64, figure: &str| {
            let mut line = json!({ "time": 1e9, "event": event, "round": round, "stage": "align", "step": step });
            line[figure] = json!(0.5);
            line
        };
        let lines = [
            line("step", 1, 1, "loss"),
            line("step", 1, 2, "rewards/margins"),
            line("evaluation", 1, 2, "eval_rewards/margins"),
            line("step", 2, 1, "loss"),
            json!({ "time": 1e9, "event": "gate", "round": 1, "stage": "gate", "win_rate": 0.5 }),
        ];
        let files = records(lines.into_iter());
        let names: Vec<&str> = files.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            ["align/round-1/events.out.tfevents.1.flowrun", "align/round-2/events.out.tfevents.1.flowrun"]
        );
        let has = |file: usize, tag: &str| {
            let bytes = &files.values().nth(file).unwrap().bytes;
            bytes.windows(tag.len()).any(|w| w == tag.as_bytes())
        };
        assert!(has(0, "train/loss") && has(0, "train/rewards/margins"));
        assert!(has(0, "eval/rewards/margins") && !has(0, "eval_") && has(1, "train/loss"));
    }
}
