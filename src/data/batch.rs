//! Record batches in the few types that travel between stages, and the order of their rows.
//!
//! Readers and SQL functions give strings as `Utf8`, `LargeUtf8`, `Utf8View` or dictionaries; every
//! stage downstream would have to know them all. Here they become `Utf8` (and lists `List`) once.

use std::sync::Arc;

use datafusion::arrow::array::{
    Array, ArrayRef, AsArray, ListArray, StructArray, UInt32Array, UInt64Array, new_null_array,
};
use datafusion::arrow::compute::{CastOptions, cast, cast_with_options, concat_batches, take_record_batch};
use datafusion::arrow::datatypes::{DataType, Field, FieldRef, Fields, Int64Type, Schema, SchemaRef, UInt64Type};
use datafusion::arrow::error::ArrowError;
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::arrow::row::{RowConverter, SortField};

use super::DataError;

/// Integers up to here have an f64 each.
pub const EXACT: u64 = 1 << 53;

/// Number of the source row, u64: the key that every row carries.
pub const ROW: &str = "_row";

/// Which of the rows that a query made of one row, u32.
pub const PART: &str = "_part";

/// Columns that the engine owns, in the order that sorts rows.
pub const KEYS: [&str; 4] = [ROW, "_candidate", "_pair", PART];

/// `data_type` as it travels on edges.
fn plain_type(data_type: &DataType) -> DataType {
    match data_type {
        DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
        DataType::LargeBinary | DataType::BinaryView => DataType::Binary,
        DataType::Dictionary(_, value) => plain_type(value),
        DataType::List(f) | DataType::LargeList(f) | DataType::ListView(f) | DataType::FixedSizeList(f, _) => {
            DataType::List(plain_field(f))
        }
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(plain_field).collect::<Fields>()),
        other => other.clone(),
    }
}

fn plain_field(field: &FieldRef) -> FieldRef {
    Arc::new(Field::new(field.name(), plain_type(field.data_type()), true))
}

/// The schema as it travels on edges: plain types, everything nullable but `_row`, no metadata.
pub fn plain_schema(schema: &Schema) -> SchemaRef {
    let fields: Fields = schema
        .fields()
        .iter()
        .map(|f| Arc::new(Field::new(f.name(), plain_type(f.data_type()), f.name() != ROW)))
        .collect();
    Arc::new(Schema::new(fields))
}

/// A type in plain words, for messages.
pub fn type_name(data_type: &DataType) -> String {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "text".into(),
        DataType::Boolean => "true or false".into(),
        kind if kind.is_integer() => "an integer".into(),
        kind if kind.is_numeric() => "a number".into(),
        DataType::Struct(_) => "an object".into(),
        DataType::Map(..) => "a map".into(),
        DataType::Date32 | DataType::Date64 => "a date".into(),
        DataType::Timestamp(..) => "a time".into(),
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => {
            "bytes".into()
        }
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => match item.data_type() {
            DataType::Utf8 => "a list of text".into(),
            DataType::Struct(fields) => {
                let names: Vec<&str> = fields.iter().map(|field| field.name().as_str()).collect();
                format!("a list of {{{}}}", names.join(", "))
            }
            _ => "a list".into(),
        },
        other => other.to_string(),
    }
}

/// The type that holds the values of both, as plain types; none where there is none.
pub fn wider(a: &DataType, b: &DataType) -> Option<DataType> {
    use DataType::{Date32, Date64, Decimal128, Float32, Float64, List, Null, Struct, UInt64};
    let bits = |kind: &DataType| kind.primitive_width().unwrap_or_default();
    Some(match (a, b) {
        (a, b) if a == b => a.clone(),
        (Null, other) | (other, Null) => other.clone(),
        (a, b) if a.is_signed_integer() && b.is_signed_integer() => if bits(a) > bits(b) { a } else { b }.clone(),
        (a, b) if a.is_unsigned_integer() && b.is_unsigned_integer() => if bits(a) > bits(b) { a } else { b }.clone(),
        // An unsigned one of 64 bits has values that no signed one has.
        (UInt64, other) | (other, UInt64) if other.is_integer() => return None,
        (a, b) if a.is_integer() && b.is_integer() => DataType::Int64,
        (Float32, Float64) | (Float64, Float32) => Float64,
        (a, b) if a.is_numeric() && b.is_numeric() && !matches!((a, b), (Decimal128(..), _) | (_, Decimal128(..))) => {
            Float64
        }
        (Date32, Date64) | (Date64, Date32) => Date64,
        (List(a), List(b)) => List(Arc::new(Field::new("item", wider(a.data_type(), b.data_type())?, true))),
        (Struct(a), Struct(b)) => {
            let mut fields: Vec<Field> = Vec::with_capacity(a.len());
            for field in a.iter().chain(b.iter().filter(|f| a.iter().all(|known| known.name() != f.name()))) {
                let other = b.iter().find(|other| other.name() == field.name());
                let kind =
                    other.map_or(Some(field.data_type().clone()), |o| wider(field.data_type(), o.data_type()))?;
                fields.push(Field::new(field.name(), kind, true));
            }
            Struct(fields.into())
        }
        _ => return None,
    })
}

/// `batch` with exactly the columns of `schema`, by name, cast where the type differs.
///
/// Errors where a column is missing or can't be cast.
pub fn align(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, DataError> {
    if batch.schema_ref() == schema {
        return Ok(batch.clone());
    }
    let column = |field: &FieldRef| -> Result<ArrayRef, DataError> {
        let array = batch
            .column_by_name(field.name())
            .ok_or_else(|| DataError::user(format!("column `{}` is missing from a batch", field.name())))?;
        if array.data_type() == field.data_type() {
            return Ok(array.clone());
        }
        cast(array, field.data_type()).map_err(|e| DataError::user(format!("column `{}`: {e}", field.name())))
    };
    let columns = schema.fields().iter().map(column).collect::<Result<Vec<_>, _>>()?;
    assemble(schema.clone(), columns, batch.num_rows())
}

/// `batch` with the columns of `schema`, whose types are [`wider`] than its own; what it lacks is null.
///
/// # Errors
/// A column can't be cast.
pub fn widen(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, DataError> {
    let rows = batch.num_rows();
    let column = |field: &FieldRef| match batch.column_by_name(field.name()) {
        None => Ok(new_null_array(field.data_type(), rows)),
        Some(array) => {
            widened(array, field.data_type()).map_err(|e| DataError::user(format!("column `{}`: {e}", field.name())))
        }
    };
    assemble(schema.clone(), schema.fields().iter().map(column).collect::<Result<Vec<_>, _>>()?, rows)
}

/// An array as a wider type. Fields of structs are found by their names.
fn widened(array: &ArrayRef, to: &DataType) -> Result<ArrayRef, ArrowError> {
    let plain = cast(array, &plain_type(array.data_type()))?;
    Ok(match (plain.data_type(), to) {
        (from, to) if from == to => plain,
        (DataType::Struct(_), DataType::Struct(fields)) => {
            let structs = plain.as_struct();
            let field = |field: &FieldRef| match structs.column_by_name(field.name()) {
                None => Ok(new_null_array(field.data_type(), structs.len())),
                Some(array) => widened(array, field.data_type()),
            };
            let arrays = fields.iter().map(field).collect::<Result<Vec<_>, _>>()?;
            let nulls = structs.nulls().cloned();
            Arc::new(StructArray::try_new_with_length(fields.clone(), arrays, nulls, structs.len())?)
        }
        (DataType::List(_), DataType::List(item)) => {
            let list = plain.as_list::<i32>();
            let values = widened(list.values(), item.data_type())?;
            Arc::new(ListArray::try_new(item.clone(), list.offsets().clone(), values, list.nulls().cloned())?)
        }
        (from, DataType::Float64) if from.is_integer() => {
            // Past 2^53 two integers have one f64.
            match largest(&plain)?.filter(|size| *size > EXACT) {
                Some(size) => Err(ArrowError::CastError(format!(
                    "an integer as large as {size} is beside fractions, and would lose digits; write one kind"
                )))?,
                None => cast(&plain, &DataType::Float64)?,
            }
        }
        // A value that the type can't hold is an error, not null.
        (_, to) => cast_with_options(&plain, to, &CastOptions { safe: false, ..CastOptions::default() })?,
    })
}

/// The greatest size of the integers of an array.
fn largest(integers: &ArrayRef) -> Result<Option<u64>, ArrowError> {
    if *integers.data_type() == DataType::UInt64 {
        return Ok(integers.as_primitive::<UInt64Type>().iter().flatten().max());
    }
    let wide = cast(integers, &DataType::Int64)?;
    Ok(wide.as_primitive::<Int64Type>().iter().flatten().map(i64::unsigned_abs).max())
}

/// [`align`] for many batches of one schema: which column goes where is found once.
#[derive(Debug, Default)]
pub struct Aligner {
    /// The schema that `places` was made for, if columns only move; none where values are cast.
    from: Option<SchemaRef>,
    places: Vec<usize>,
}

impl Aligner {
    pub fn align(&mut self, batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, DataError> {
        let known = self.from.as_ref().is_some_and(|from| Arc::ptr_eq(from, batch.schema_ref()));
        if !known {
            self.learn(batch.schema_ref(), schema);
        }
        if self.from.is_none() {
            return align(batch, schema);
        }
        let columns = self.places.iter().map(|place| batch.column(*place).clone()).collect();
        assemble(schema.clone(), columns, batch.num_rows())
    }

    fn learn(&mut self, from: &SchemaRef, to: &SchemaRef) {
        let place = |field: &FieldRef| {
            from.index_of(field.name()).ok().filter(|i| from.field(*i).data_type() == field.data_type())
        };
        let places: Option<Vec<usize>> = to.fields().iter().map(place).collect();
        self.from = places.is_some().then(|| from.clone());
        self.places = places.unwrap_or_default();
    }
}

/// A batch of `rows` rows, also where there is no column at all.
pub fn assemble(schema: SchemaRef, columns: Vec<ArrayRef>, rows: usize) -> Result<RecordBatch, DataError> {
    let options = datafusion::arrow::record_batch::RecordBatchOptions::new().with_row_count(Some(rows));
    RecordBatch::try_new_with_options(schema, columns, &options).map_err(|e| DataError::user(e.to_string()))
}

/// All of `batches` as one.
pub fn concat(schema: &SchemaRef, batches: &[RecordBatch]) -> Result<RecordBatch, DataError> {
    concat_batches(schema, batches).map_err(|e| DataError::user(e.to_string()))
}

/// Rows sorted by the given columns (ascending, nulls first); rows that are equal keep their order.
pub fn sort_by(batch: &RecordBatch, columns: &[usize]) -> Result<RecordBatch, DataError> {
    if columns.is_empty() || batch.num_rows() < 2 {
        return Ok(batch.clone());
    }
    let arrays: Vec<ArrayRef> = columns.iter().map(|&i| batch.column(i).clone()).collect();
    let fields = arrays.iter().map(|a| SortField::new(a.data_type().clone())).collect();
    let fault = |e: datafusion::arrow::error::ArrowError| DataError::user(format!("rows can't be ordered: {e}"));
    let rows = RowConverter::new(fields).map_err(fault)?.convert_columns(&arrays).map_err(fault)?;
    let mut order: Vec<u32> = (0..batch.num_rows() as u32).collect();
    order.sort_by(|&a, &b| rows.row(a as usize).cmp(&rows.row(b as usize)));
    take_record_batch(batch, &UInt32Array::from(order)).map_err(fault)
}

/// Indices of the key columns that `schema` has, in sorting order.
pub fn key_indices(schema: &Schema) -> Vec<usize> {
    KEYS.iter().filter_map(|name| schema.index_of(name).ok()).collect()
}

/// The `_row` column.
pub fn row_numbers(batch: &RecordBatch) -> Result<&UInt64Array, DataError> {
    batch
        .column_by_name(ROW)
        .and_then(|c| c.as_any().downcast_ref::<UInt64Array>())
        .ok_or_else(|| DataError::user("a batch has no column `_row` of type u64"))
}

/// `batch` with `name` set to `array`, replaced in place or added at the end.
pub fn with_column(batch: &RecordBatch, name: &str, array: ArrayRef) -> Result<RecordBatch, DataError> {
    let schema = schema_with(batch.schema_ref(), name, array.data_type().clone());
    let mut columns = batch.columns().to_vec();
    match batch.schema_ref().index_of(name) {
        Ok(i) => columns[i] = array,
        Err(_) => columns.push(array),
    }
    assemble(schema, columns, batch.num_rows())
}

/// `schema` with a column set in place or added at the end.
pub fn schema_with(schema: &Schema, name: &str, data_type: DataType) -> SchemaRef {
    let field = Arc::new(Field::new(name, data_type, name != ROW));
    let mut fields: Vec<FieldRef> = schema.fields().to_vec();
    match schema.index_of(name) {
        Ok(i) => fields[i] = field,
        Err(_) => fields.push(field),
    }
    Arc::new(Schema::new(fields))
}

/// `schema` without a column.
pub fn without(schema: &Schema, name: &str) -> SchemaRef {
    Arc::new(Schema::new(schema.fields().iter().filter(|f| f.name() != name).cloned().collect::<Vec<_>>()))
}

/// Columns that a user may know of: those without a leading underscore.
pub fn visible(schema: &Schema) -> Vec<String> {
    schema.fields().iter().map(|f| f.name().clone()).filter(|n| !n.starts_with('_')).collect()
}
