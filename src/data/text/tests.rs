//! Tables of text, as people have them.

use std::io::Write;
use std::path::Path;

use datafusion::arrow::array::{Array, AsArray};
use datafusion::arrow::compute::concat_batches;
use datafusion::arrow::datatypes::{DataType, Float64Type, Int64Type};

use super::*;

const JSON: Layout = Layout::Json;
const CSV: Layout = Layout::Csv { separator: b',' };

fn types(given: &[(&str, ColumnType)]) -> BTreeMap<String, ColumnType> {
    given.iter().map(|(name, kind)| ((*name).to_owned(), *kind)).collect()
}

/// The whole table of files with these contents, or the message without the folder.
fn table(files: &[&[u8]], layout: Layout, given: &[(&str, ColumnType)]) -> Result<RecordBatch, String> {
    let dir = tempfile::tempdir().unwrap();
    let write = |(number, bytes): (usize, &&[u8])| {
        let path = dir.path().join(format!("{number}.txt"));
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let paths: Vec<PathBuf> = files.iter().enumerate().map(write).collect();
    let told = |e: DataError| e.message.replace(&format!("{}/", dir.path().display()), "");
    let table = TextTable::open(&paths, layout, &types(given)).map_err(told)?;
    let batches = std::cell::RefCell::new(Vec::new());
    let send = |batch: RecordBatch| {
        batches.borrow_mut().push(batch);
        true
    };
    table.read(&send).map_err(told)?;
    let whole = concat_batches(table.schema(), &batches.into_inner()).unwrap();
    assert_eq!(whole.num_rows() as u64, table.rows());
    Ok(whole)
}

fn json(text: &str) -> Result<RecordBatch, String> {
    table(&[text.as_bytes()], JSON, &[])
}

fn csv(text: &str) -> Result<RecordBatch, String> {
    table(&[text.as_bytes()], CSV, &[])
}

fn kind(batch: &RecordBatch, column: &str) -> DataType {
    batch.schema().field_with_name(column).unwrap().data_type().clone()
}

fn texts(batch: &RecordBatch, column: &str) -> Vec<Option<String>> {
    batch.column_by_name(column).unwrap().as_string::<i32>().iter().map(|text| text.map(str::to_owned)).collect()
}

/// So many rows `{"n": I}`, then more text.
fn long(rows: usize, then: &str) -> String {
    (0..rows).map(|i| format!("{{\"n\": {i}}}\n")).collect::<String>() + then
}

#[test]
fn types_come_from_all_rows() {
    let late = json(&long(12_000, "{\"n\": 0.5, \"m\": {\"deep\": [1, null]}}\n{\"m\": {\"more\": true}}\n")).unwrap();
    assert_eq!(kind(&late, "n"), DataType::Float64);
    let numbers = late.column_by_name("n").unwrap().as_primitive::<Float64Type>();
    assert_eq!((numbers.value(11_999), numbers.value(12_000), numbers.null_count()), (11_999.0, 0.5, 1));
    let deep = late.column_by_name("m").unwrap().as_struct();
    assert_eq!((deep.column_names(), deep.null_count()), (vec!["deep", "more"], 12_000));

    let empty: String = (0..12_000).map(|i| format!("{i},\n")).collect();
    let late = csv(&format!("n,note\n{empty}12000,here\n")).unwrap();
    assert_eq!(texts(&late, "note")[12_000].as_deref(), Some("here"));
    assert_eq!((kind(&late, "n"), late.column(1).null_count()), (DataType::Int64, 12_000));
    let late = csv(&format!("n,note\n{empty}x,here\n")).unwrap();
    assert_eq!(texts(&late, "n")[5].as_deref(), Some("5"));
}

#[test]
fn files_that_differ_a_little_are_one_table() {
    for (files, layout) in [([&b"{\"a\": 1}"[..], b"{\"kept\": 3}"], JSON), ([b"a\n1\n", b"kept\n3\n"], CSV)] {
        let told = table(&files, layout, &[]).unwrap_err();
        assert!(told.starts_with("1.txt: none of its columns is in 0.txt"), "{told}");
    }
    let both = table(&[b"{\"a\": 1, \"b\": \"x\"}", b"{\"a\": 1.5}\n{\"c\": null}"], JSON, &[]).unwrap();
    assert_eq!((kind(&both, "a"), kind(&both, "c"), both.num_rows()), (DataType::Float64, DataType::Utf8, 3));
    let both = table(&[b"a,b\n1,x\n", b"b,a\ny,z\n"], CSV, &[]).unwrap();
    assert_eq!(texts(&both, "a"), [Some("1".into()), Some("z".into())]);
    assert_eq!(texts(&both, "b"), [Some("x".into()), Some("y".into())]);
}

#[test]
fn two_kinds_in_a_column_are_told_with_both_places() {
    for (text, message) in [
        (
            "{\"a\": 7}\n{\"a\": \"seven\"}",
            "0.txt:2: column `a` has text here and an integer in line 1; write one kind, or types = { a = \"string\" } \
             to read the column as text",
        ),
        ("{\"a\": true}\n\n{\"a\": 1}", "0.txt:3: column `a` has an integer here and true or false in line 1"),
        (
            "{\"a\": [{\"b\": \"x\"}]}\n{\"a\": [{\"b\": [\"x\"]}]}",
            "0.txt:2: column `a[].b` has a list here and text in line 1",
        ),
        (
            "{\"a\": 9007199254740993}\n{\"a\": 0.5}",
            "0.txt:2: column `a` has 0.5 here and the integer 9007199254740993",
        ),
        ("{\"a\": -1}\n{\"a\": 18446744073709551615}", "0.txt:2: column `a` has 18446744073709551615 here"),
        (
            "{\"a\": 123456789012345678901}",
            "0.txt:1: 123456789012345678901 is an integer past 64 bits; write it as text",
        ),
    ] {
        let told = json(text).unwrap_err();
        assert!(told.starts_with(message), "{text}: {told}");
    }
    let told = table(&[b"{\"a\": 7}", b"{\"a\": \"x\"}"], JSON, &[]).unwrap_err();
    assert!(told.starts_with("1.txt:1: column `a` has text here and an integer in 0.txt:1;"), "{told}");
}

#[test]
fn types_are_given_by_hand() {
    let text = b"{\"a\": 7}\n{\"a\": \"seven\"}\n{\"a\": [1, {\"b\": null}]}\n{\"a\": null}";
    let read = table(&[text], JSON, &[("a", ColumnType::String)]).unwrap();
    let wanted = [Some("7"), Some("seven"), Some("[1,{\"b\":null}]"), None];
    assert_eq!(texts(&read, "a"), wanted.map(|text| text.map(str::to_owned)));
    let read = table(&[b"{\"a\": \"7\"}\n{\"a\": 8}"], JSON, &[("a", ColumnType::F64)]).unwrap();
    assert_eq!(read.column(0).as_primitive::<Float64Type>().values(), &[7.0, 8.0]);
    let read = table(&[b"a\n7\n8\n"], CSV, &[("a", ColumnType::String)]).unwrap();
    assert_eq!(texts(&read, "a"), [Some("7".into()), Some("8".into())]);
    let told = table(&[b"{\"a\": 1}\n{\"a\": \"x\"}"], JSON, &[("a", ColumnType::I64)]).unwrap_err();
    assert_eq!(told, "0.txt:2: column `a` is text here, which can't be read as i64");
    let told = table(&[b"a\n1\nx\n"], CSV, &[("a", ColumnType::I64)]).unwrap_err();
    assert_eq!(told, "0.txt:3: column `a` is x here, which can't be read as i64");
    let told = table(&[b"a\n1\n"], CSV, &[("b", ColumnType::I64)]).unwrap_err();
    assert_eq!(told, "types: there is no column `b`; did you mean `a`? There are: a");
}

#[test]
fn json_in_any_layout() {
    for text in [
        "{\"a\": 1}\n{\"a\": 2}",
        "{\"a\": 1}{\"a\": 2}\n\n",
        "\u{feff}{\"a\": 1}\r\n{\"a\": 2}\r\n",
        "{\n  \"a\": 1\n}\n{\n  \"a\":\n2}",
        "[{\"a\": 1}, {\"a\": 2}]",
        "[\n  {\n    \"a\": 1\n  },\n  {\n    \"a\": 2\n  }\n]\n",
        " [ {\"a\":1}\n,{\"a\":2} ] ",
    ] {
        let read = json(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(read.column(0).as_primitive::<Int64Type>().values(), &[1, 2], "{text}");
    }
    let quoted = json("[{\"a\": \"} ] \\\" {\"}]").unwrap();
    assert_eq!(texts(&quoted, "a")[0].as_deref(), Some("} ] \" {"));
    let large = format!("[{}]", (0..40_000).map(|i| format!("{{\"a\": {i}}}")).collect::<Vec<_>>().join(",\n  "));
    assert_eq!(json(&large).unwrap().num_rows(), 40_000);
}

#[test]
fn what_is_no_json_is_told_with_its_line() {
    for (text, message) in [
        ("{\"a\": 1}\n\n{\"a\": 2\n", "0.txt:3: not a JSON object: EOF while parsing an object"),
        ("{\"a\": 1\n{\"a\": 2}\n{\"a\": 3}\n", "0.txt:1: not a JSON object: EOF while parsing an object"),
        ("{\"a\": 1}\n[1]\n", "0.txt:2: not a JSON object: it is a list"),
        ("{\"a\": 1}\nhello\n", "0.txt:2: not a JSON object: expected value at column 1"),
        ("[{\"a\": 1},\n{\"a\": }]", "0.txt:2: not a JSON object: expected value at column 7"),
        ("[{\"a\": 1}\n{\"a\": 2}]", "0.txt:2: not JSON: a comma is missing between two values"),
        ("[{\"a\": 1},]", "0.txt:1: not JSON: a comma stands before the array's end"),
        ("[{\"a\": 1}", "0.txt:1: the array that begins here does not end"),
        ("[{\"a\": 1}] x", "0.txt:1: not JSON: text after the array's end"),
        ("[1, 2]", "0.txt:1: not a JSON object: it is an integer"),
        ("{\"a\": 1}\n{\"a\": NaN}", "0.txt:2: NaN is not JSON; write null"),
        ("{\"a\": -Infinity}", "0.txt:1: -Infinity is not JSON; write null"),
        ("{\"a\": 1, \"a\": 2}", "0.txt:1: not a JSON object: the key \"a\" stands twice in one object"),
        ("{\n\"a\": 1,\n\"b\": x\n}", "0.txt:3: not a JSON object: expected value at column 6"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "0.txt: the file is a Git LFS pointer"),
    ] {
        let told = json(text).unwrap_err();
        assert!(told.starts_with(message), "{text:?}: {told}");
    }
    let utf16: Vec<u8> = "{\"a\": 1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let marked = [&[0xff, 0xfe][..], &utf16].concat();
    for bytes in [&utf16, &marked] {
        let told = table(&[bytes], JSON, &[]).unwrap_err();
        assert!(told.starts_with("0.txt: the text is UTF-16; convert it to UTF-8: iconv"), "{told}");
    }
    for (bytes, layout) in [(&b"{\"a\": \"x\"}\n{\"a\": \"caf\xe9\"}\n"[..], JSON), (b"a\ncaf\xe9\n", CSV)] {
        let told = table(&[bytes], layout, &[]).unwrap_err();
        assert!(told.starts_with("0.txt:2: the text is not UTF-8; if it is Windows-1252"), "{told}");
    }
}

#[test]
fn csv_as_people_have_it() {
    let long = "x\n".repeat(200_000);
    let read = csv(&format!("a,b\r\n\"1\",\"{long}\"\r\n2,\"say \"\"hi\"\"\"\r\n")).unwrap();
    assert_eq!(texts(&read, "b"), [Some(long), Some("say \"hi\"".into())]);
    let codes = csv("answer,code,day\n007,+49301,2024-01-05\n012,0030,2024-02-30\n").unwrap();
    assert_eq!(texts(&codes, "answer"), [Some("007".into()), Some("012".into())]);
    assert_eq!(texts(&codes, "day")[1].as_deref(), Some("2024-02-30"));
    let tabs = table(&[b"\xef\xbb\xbfa\tb\n1\tx,y\n"], Layout::Csv { separator: b'\t' }, &[]).unwrap();
    assert_eq!((kind(&tabs, "a"), texts(&tabs, "b")[0].as_deref()), (DataType::Int64, Some("x,y")));
    for (text, message) in [
        (
            "a,b\n1,2\n1,2,3\n",
            "0.txt:3: the row has 3 values, and the header has 2; a value with the separator or a line break in it stands in \
             quotes",
        ),
        (
            "a;b\n1;2\n",
            "0.txt:1: the header is one column, \"a;b\"; write separator = \";\" if that is what stands between the values",
        ),
        ("a,b\n\"1,2\n3,4\n", "0.txt:2: a quote that opens in this row is not closed"),
        ("a,b,a\n1,2,3\n", "0.txt:1: two columns are called `a`; rename one in the file"),
        ("a,b\n1,2\n3,\"x\n4,5\n6,7\n", "0.txt:3: a quote that opens in this row is not closed"),
    ] {
        let told = csv(text).unwrap_err();
        assert_eq!(told, message);
    }
}

#[test]
fn compressed_text_is_text() {
    let text = b"{\"a\": 1}\n{\"a\": 2}\n";
    let gzip = {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(text).unwrap();
        gzip.finish().unwrap()
    };
    let bzip2 = {
        let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::default());
        bzip2.write_all(text).unwrap();
        bzip2.finish().unwrap()
    };
    let zstd = zstd::encode_all(&text[..], 0).unwrap();
    // `printf '{"a": 1}\n{"a": 2}\n' | xz`
    let xz = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/rows.jsonl.xz")).unwrap();
    let twice = [&gzip[..], &gzip].concat();
    for (bytes, rows) in [(&gzip, 2), (&bzip2, 2), (&zstd, 2), (&xz, 2), (&twice, 4)] {
        assert_eq!(table(&[bytes], JSON, &[]).unwrap().num_rows(), rows);
    }
    let told = table(&[&gzip[..gzip.len() - 9]], JSON, &[]).unwrap_err();
    assert!(told.ends_with("the compressed file is damaged or incomplete"), "{told}");
}

#[test]
fn objects_without_keys_are_left_out_and_what_is_null_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    std::fs::write(&path, "{\"a\": {}, \"b\": {\"c\": {}, \"d\": 1}, \"e\": null, \"f\": [{}]}\n").unwrap();
    let table = TextTable::open(&[path], JSON, &BTreeMap::new()).unwrap();
    assert_eq!(table.left_out(), ["a", "f"]);
    let names: Vec<&str> = table.schema().fields().iter().map(|field| field.name().as_str()).collect();
    assert_eq!((names, table.schema().field(1).data_type()), (vec!["b", "e"], &DataType::Utf8));
}
