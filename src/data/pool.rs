//! The threads that queries run on.
//!
//! A query may work for minutes without giving its thread back: a join of two large tables, a function over long
//! texts. On threads of its own it holds up no other stage, no server and no timer. Each query has one thread, so one
//! does not wait for another.

use std::future::Future;
use std::sync::LazyLock;

use datafusion::arrow::datatypes::SchemaRef;
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::error::DataFusionError;
use datafusion::execution::SendableRecordBatchStream;
use datafusion::physical_plan::stream::RecordBatchReceiverStream;
use futures::StreamExt;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::sync::CancellationToken;

use super::DataError;

/// Bytes of stack: expressions are evaluated by recursion.
const STACK: usize = 16 << 20;

/// None where no thread can be started.
static RUNTIME: LazyLock<Option<Runtime>> = LazyLock::new(|| {
    let mut threads = Builder::new_multi_thread();
    threads.worker_threads(1).thread_name("query").thread_stack_size(STACK).enable_all().build().ok()
});

fn handle() -> Result<&'static Handle, DataError> {
    let runtime = RUNTIME.as_ref().ok_or_else(|| DataError::external("no thread for a query can be started"))?;
    Ok(runtime.handle())
}

/// Runs a query on a thread of its own. If the future is dropped, the query ends the next time it gives way.
///
/// # Errors
/// There is no thread, or the query panicked.
pub async fn run<T: Send + 'static>(query: impl Future<Output = T> + Send + 'static) -> Result<T, DataError> {
    let handle = handle()?;
    let dropped = CancellationToken::new();
    let _guard = dropped.clone().drop_guard();
    let on_thread = move || handle.block_on(dropped.run_until_cancelled_owned(query));
    let done = handle.spawn_blocking(on_thread).await;
    let done = done.map_err(|e| DataError::external(format!("a query ended without a result: {e}")))?;
    done.ok_or_else(|| DataError::external("a query was cancelled"))
}

/// The batches that `read` sends, read on a thread that may block. `read` ends when its argument returns false: nobody
/// takes batches any more.
pub fn read(
    schema: SchemaRef,
    read: impl FnOnce(&dyn Fn(RecordBatch) -> bool) -> Result<(), DataError> + Send + 'static,
) -> SendableRecordBatchStream {
    let mut stream = RecordBatchReceiverStream::builder(schema, 2);
    let batches = stream.tx();
    stream.spawn_blocking(move || {
        read(&|batch| batches.blocking_send(Ok(batch)).is_ok()).map_err(|e| DataFusionError::External(Box::new(e)))
    });
    stream.build()
}

/// The same batches, made on a thread of their own.
///
/// # Errors
/// There is no thread.
pub fn stream(
    schema: SchemaRef,
    mut batches: SendableRecordBatchStream,
) -> Result<SendableRecordBatchStream, DataError> {
    let handle = handle()?;
    let mut stream = RecordBatchReceiverStream::builder(schema, 2);
    let taken = stream.tx();
    let on_thread = move || {
        handle.block_on(async move {
            while let Some(batch) = batches.next().await {
                // Whoever asked may have gone.
                if taken.send(batch).await.is_err() {
                    break;
                }
            }
            Ok(())
        })
    };
    stream.spawn_blocking_on(on_thread, handle);
    Ok(stream.build())
}
