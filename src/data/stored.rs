//! Files of a data set as one table, and the types of their columns.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use datafusion::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::catalog::TableProvider;
use datafusion::catalog::streaming::StreamingTable;
use datafusion::error::DataFusionError;
use datafusion::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use datafusion::parquet::file::statistics::Statistics;
use datafusion::physical_plan::streaming::PartitionStream;
use datafusion::prelude::{ParquetReadOptions, SessionContext};

use super::arrow_files::{self, ArrowTable};
use super::error::reader_words;
use super::files::{self, Format};
use super::hub::HubName;
use super::source::SourceSpec;
use super::splits::Wanted;
use super::text::{Layout, TextTable, bytes};
use super::{DataError, batch};

/// Files of a data set, with the columns of all of them.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The files, in the order of their rows.
    pub files: Vec<PathBuf>,
    pub format: Format,
    pub schema: SchemaRef,
    /// Commit of a hub data set.
    pub revision: Option<String>,
    /// Other data files in the same place, which are not read.
    pub beside: Vec<String>,
    /// The table of text files; `None` for Parquet and Arrow.
    text: Option<TextTable>,
}

impl Stored {
    /// Finds the files of a data set and the types of their columns. Text files are read completely.
    ///
    /// # Errors
    /// A file is missing or can't be read; the columns of two files have no common type; the hub and its cache don't
    /// have the data set. In text files the message has the line.
    pub async fn open(spec: &SourceSpec, base: &Path) -> Result<Self, DataError> {
        let wanted = Wanted { config: spec.config.as_deref(), split: spec.split.as_deref() };
        let (files, format, revision, beside) = match HubName::parse(&spec.dataset) {
            Some(name) => {
                let snapshot = name?.snapshot(spec.login, wanted).await?;
                (snapshot.files, snapshot.format, Some(snapshot.revision), snapshot.beside)
            }
            None => {
                let found = files::local(&spec.dataset, wanted, base)?;
                (found.files, found.format, None, found.beside)
            }
        };
        for file in &files {
            bytes::refuse_pointer(file)?;
            if std::fs::metadata(file).is_ok_and(|m| m.len() == 0) {
                return Err(DataError::user(format!("{}: the data set has no rows", file.display())));
            }
        }
        let layout = layout(format, spec.separator)?;
        let (schema, text) = match layout {
            Some(layout) => {
                let table = opened(files.clone(), layout, spec.types.clone()).await?;
                (table.schema().clone(), Some(table))
            }
            None if !spec.types.is_empty() => {
                return Err(DataError::user(format!(
                    "types: a {format} file has its own; cast in select, as in select = {{ x = \"CAST(x AS STRING)\" }}"
                )));
            }
            None => (schema_of(&files, format)?, None),
        };
        if schema.fields().is_empty() {
            let place = files.first().map(|f| f.display().to_string()).unwrap_or_default();
            return Err(DataError::user(format!("{place}: the data set has no rows")));
        }
        Ok(Self { files, format, schema, revision, beside, text })
    }

    /// Number of rows of text files; `None` for others, which DataFusion counts.
    pub fn rows(&self) -> Option<u64> {
        self.text.as_ref().map(TextTable::rows)
    }

    /// Columns of text files that are left out, because their values are objects without keys.
    pub fn left_out(&self) -> &[String] {
        self.text.as_ref().map(TextTable::left_out).unwrap_or_default()
    }

    /// The rows of all files, in order.
    ///
    /// # Errors
    /// DataFusion can't read the files.
    pub async fn table(&self, session: &SessionContext) -> Result<Arc<dyn TableProvider>, DataFusionError> {
        let partition: Arc<dyn PartitionStream> = match &self.text {
            Some(text) => Arc::new(text.clone()),
            None if self.format == Format::Arrow => {
                Arc::new(ArrowTable { files: self.files.clone(), schema: self.schema.clone() })
            }
            None => {
                let urls: Vec<String> = self.files.iter().map(|file| file_url(file)).collect();
                let options =
                    ParquetReadOptions { file_extension: "", schema: Some(&self.schema), ..Default::default() };
                return Ok(session.read_parquet(urls, options).await?.into_view());
            }
        };
        Ok(Arc::new(StreamingTable::try_new(self.schema.clone(), vec![partition])?))
    }
}

/// Layout of the text of a format; `None` for binary formats.
fn layout(format: Format, separator: Option<char>) -> Result<Option<Layout>, DataError> {
    let separated = |default: u8| match separator {
        None => Ok(Some(Layout::Csv { separator: default })),
        Some(letter) if letter.is_ascii() && !matches!(letter, '"' | '\n' | '\r') => {
            Ok(Some(Layout::Csv { separator: letter as u8 }))
        }
        Some(_) => Err(DataError::user("separator: is one ASCII character, such as \";\" or \"\\t\"")),
    };
    match format {
        Format::Csv => separated(b','),
        Format::Tsv => separated(b'\t'),
        _ if separator.is_some() => Err(DataError::user(format!("separator: means nothing to {format} files"))),
        Format::JsonLines | Format::Json => Ok(Some(Layout::Json)),
        Format::Parquet | Format::Arrow => Ok(None),
    }
}

/// Opens text files on a blocking thread, because all rows are read.
async fn opened(
    files: Vec<PathBuf>,
    layout: Layout,
    types: BTreeMap<String, super::ColumnType>,
) -> Result<TextTable, DataError> {
    let opened = tokio::task::spawn_blocking(move || TextTable::open(&files, layout, &types)).await;
    opened.map_err(|e| DataError::external(e.to_string()))?
}

/// Columns of all files; if files differ, with the wider type.
fn schema_of(files: &[PathBuf], format: Format) -> Result<SchemaRef, DataError> {
    let mut merged: Vec<(Field, &Path)> = Vec::new();
    for file in files {
        let schema = match format {
            Format::Parquet => parquet_schema(file)?,
            _ => arrow_files::schema_of(file)?,
        };
        refuse_doubles(file, &schema)?;
        for field in batch::plain_schema(&schema).fields() {
            match merged.iter_mut().find(|(known, _)| known.name() == field.name()) {
                None => merged.push((field.as_ref().clone().with_nullable(true), file)),
                Some((known, first)) => {
                    let wide = batch::wider(known.data_type(), field.data_type()).ok_or_else(|| {
                        DataError::user(format!(
                            "{}: column `{}` is {} here and {} in {}",
                            file.display(),
                            field.name(),
                            batch::type_name(field.data_type()),
                            batch::type_name(known.data_type()),
                            first.display()
                        ))
                    })?;
                    known.set_data_type(wide);
                }
            }
        }
    }
    let schema = Schema::new(merged.into_iter().map(|(field, _)| field).collect::<Vec<_>>());
    if format == Format::Parquet {
        files.iter().try_for_each(|file| refuse_large(file, &schema))?;
    }
    Ok(Arc::new(schema))
}

/// Refuses integers of a Parquet file that would lose digits as f64, the type of the column in other files. Only the
/// file's statistics are read.
fn refuse_large(file: &Path, schema: &Schema) -> Result<(), DataError> {
    let own = parquet_schema(file)?;
    let is_number =
        |name: &str| schema.field_with_name(name).is_ok_and(|field| *field.data_type() == DataType::Float64);
    let widened = own.fields().iter().filter(|field| field.data_type().is_integer() && is_number(field.name()));
    for field in widened {
        if let Some(large) = parquet_range(file, field.name())?.into_iter().find(|n| n.unsigned_abs() > batch::EXACT) {
            let (file, name) = (file.display(), field.name());
            return Err(DataError::user(format!(
                "{file}: column `{name}` has {large} and is fractions in another file; as a fraction it would lose digits"
            )));
        }
    }
    Ok(())
}

/// Bounds of an integer column in each row group, as far as the statistics have them.
fn parquet_range(file: &Path, column: &str) -> Result<Vec<i64>, DataError> {
    let open = std::fs::File::open(file).map_err(|e| DataError::external(format!("{}: {e}", file.display())))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(open)
        .map_err(|e| DataError::user(format!("{}: {}", file.display(), reader_words(&e))))?;
    let groups = reader.metadata().row_groups().iter().flat_map(|group| group.columns());
    let statistics =
        groups.filter(|chunk| chunk.column_path().string() == column).filter_map(|chunk| chunk.statistics());
    let bounds = statistics.flat_map(|statistics| match statistics {
        Statistics::Int64(range) => [range.min_opt().copied(), range.max_opt().copied()],
        _ => [None, None],
    });
    Ok(bounds.flatten().collect())
}

/// Columns of a Parquet file, duplicates included.
fn parquet_schema(file: &Path) -> Result<Schema, DataError> {
    let fault = |e: String| DataError::user(format!("{}: {e}", file.display()));
    let open = std::fs::File::open(file).map_err(|e| DataError::external(format!("{}: {e}", file.display())))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(open).map_err(|e| fault(reader_words(&e)))?;
    Ok(reader.schema().as_ref().clone())
}

fn refuse_doubles(file: &Path, schema: &Schema) -> Result<(), DataError> {
    for (place, field) in schema.fields().iter().enumerate() {
        if schema.fields()[..place].iter().any(|before| before.name() == field.name()) {
            let (file, name) = (file.display(), field.name());
            return Err(DataError::user(format!("{file}: two columns are called `{name}`; rename one in the file")));
        }
    }
    Ok(())
}

/// `file://` URL of a path. Characters of glob patterns are escaped.
fn file_url(path: &Path) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut url = String::from("file://");
    for byte in absolute.as_os_str().as_encoded_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' | b'~' | b'=' => url.push(char::from(*byte)),
            b if b.is_ascii_alphanumeric() => url.push(char::from(*b)),
            b => url.push_str(&format!("%{b:02X}")),
        }
    }
    url
}
