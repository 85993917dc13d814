// What tch does not reach of libtorch on a GPU: attention over sequences of different lengths, CUDA graphs, the
// allocator. A shared library of its own, inside the binary: it is opened after libtorch_cuda, which is never
// linked (cuda.rs).
//
// Every function returns 0, or 1 when memory ran out, or 2; `flowrun_error` then says why. tch's tensors are
// pointers to at::Tensor.

#include <ATen/Context.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <memory>
#include <optional>
#include <string>

namespace {

thread_local std::string error;

template <class F>
int guarded(F f) {
  try {
    f();
    return 0;
  } catch (const c10::OutOfMemoryError& e) {
    error = e.what_without_backtrace();
    return 1;
  } catch (const c10::Error& e) {
    error = e.what_without_backtrace();
  } catch (const std::exception& e) {
    error = e.what();
  } catch (...) {
    error = "unknown exception";
  }
  return 2;
}

std::optional<int64_t> given(int64_t value) { return value < 0 ? std::nullopt : std::optional<int64_t>(value); }

// Graphs of one device thread. They are never replayed at the same time, and what one leaves behind is read
// before the next runs, so they share their memory.
struct Pool {
  c10::DeviceIndex device;
  c10::cuda::CUDAStream side;
  at::cuda::MempoolId_t memory;
};

// Tells whether its capture came to an end, from when on it gives its share of the pool back by itself.
struct Graph : at::cuda::CUDAGraph {
  bool ended() const { return capture_ended_; }
};

// Work goes to the pool's stream while it lives: the default stream can't be captured.
struct Capture {
  Pool* pool;
  std::optional<c10::cuda::CUDAStreamGuard> stream;
  std::unique_ptr<Graph> graph;
  bool begun = false;
};

// Ends a capture that failed. libtorch 2.11 leaves the pool of such a one open, and its memory taken for good
// (pytorch#180395, pytorch#190348).
void abandon(Capture& capture) {
  if (!capture.graph || capture.graph->ended()) return;
  const bool begun = capture.begun;
  capture.begun = false;
  if (begun) guarded([&] { capture.graph->capture_end(); });
  if (capture.graph->ended()) return;
  const auto device = capture.pool->device;
  const auto memory = capture.pool->memory;
  const auto host = at::getHostAllocator(at::kCUDA);
  // One that can't be ended was ended already, or never begun; then there is nothing to give back.
  if (guarded([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(device, memory); }) == 0 || begun)
    guarded([&] { c10::cuda::CUDACachingAllocator::releasePool(device, memory); });
  if (guarded([&] { host->end_allocate_to_pool(memory); }) == 0 || begun)
    guarded([&] { host->release_pool(memory); });
}

}  // namespace

extern "C" {

const char* flowrun_error() { return error.c_str(); }

// cuDNN's attention builds a plan for every new shape and is slower than flash attention for most.
int flowrun_set_up() {
  return guarded([] { at::globalContext().setSDPUseCuDNN(false); });
}

// The device of this thread's work from here on.
int flowrun_use_device(int64_t device) {
  return guarded([&] {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    // Makes its context the thread's, which set_device leaves for later where the device is the thread's already.
    C10_CUDA_CHECK(cudaFree(nullptr));
  });
}

// Bytes: free and in all on the device, held in tensors and reserved by this process.
int flowrun_memory(int64_t device, int64_t* figures) {
  return guarded([&] {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    size_t free = 0, total = 0;
    C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    figures[0] = static_cast<int64_t>(free);
    figures[1] = static_cast<int64_t>(total);
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    figures[2] = stats.allocated_bytes[all].current;
    figures[3] = stats.reserved_bytes[all].current;
  });
}

// The allocator's share of the device's memory; beyond it allocations fail as if there were no more.
int flowrun_limit_memory(int64_t device, double share) {
  return guarded([&] {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    c10::cuda::CUDACachingAllocator::setMemoryFraction(share, static_cast<c10::DeviceIndex>(device));
  });
}

// Gives memory that no tensor holds back to the device.
int flowrun_empty_cache() {
  return guarded([] { c10::cuda::CUDACachingAllocator::emptyCache(); });
}

int flowrun_synchronize(int64_t device) {
  return guarded([&] {
    c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    c10::cuda::device_synchronize();
  });
}

// The stream that this thread's work goes to.
int flowrun_stream(int64_t device, void** stream) {
  return guarded(
      [&] { *stream = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream(); });
}

// Flash attention (Dao 2023) of sequences side by side: `q` is [tokens, heads, d]; `k` and `v` are [keys, kv_heads, d];
// `starts_q` and `starts_k` are where each sequence begins, with the end of the last, int32; of the keys only the first
// `used_k` (int32, may be null) of each sequence are seen. The last query sees the last key. Windows below 0 are none.
int flowrun_flash(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, const at::Tensor* starts_q,
                  const at::Tensor* starts_k, const at::Tensor* used_k, int64_t longest_q, int64_t longest_k,
                  bool causal, double scale, int64_t left, int64_t right, at::Tensor** out) {
  return guarded([&] {
    const auto used = used_k ? std::optional<at::Tensor>(*used_k) : std::nullopt;
    auto result = at::_flash_attention_forward(*q, *k, *v, *starts_q, *starts_k, longest_q, longest_k, 0.0, causal,
                                               false, scale, given(left), given(right), used);
    *out = new at::Tensor(std::get<0>(result));
  });
}

int flowrun_pool_new(int64_t device, Pool** pool) {
  return guarded([&] {
    const auto index = static_cast<c10::DeviceIndex>(device);
    *pool = new Pool{index, c10::cuda::getStreamFromPool(false, index), at::cuda::graph_pool_handle()};
  });
}

void flowrun_pool_free(Pool* pool) { delete pool; }

// What this thread does from here on goes to the pool's stream, and is not captured yet.
int flowrun_capture_new(Pool* pool, Capture** capture) {
  return guarded([&] {
    c10::cuda::CUDAGuard guard(pool->device);
    c10::cuda::device_synchronize();
    auto fresh = std::make_unique<Capture>();
    fresh->pool = pool;
    fresh->stream.emplace(pool->side);
    *capture = fresh.release();
  });
}

// What this thread does from here on is captured and not run.
int flowrun_capture_begin(Capture* capture) {
  return guarded([&] {
    c10::cuda::device_synchronize();
    capture->graph = std::make_unique<Graph>();
    // Other threads go on allocating.
    capture->graph->capture_begin(capture->pool->memory, cudaStreamCaptureModeThreadLocal);
    capture->begun = true;
  });
}

// The captured work; the thread is back on its own stream.
int flowrun_capture_end(Capture* capture, Graph** graph) {
  return guarded([&] {
    capture->graph->capture_end();
    capture->stream.reset();
    *graph = capture->graph.release();
  });
}

// Also ends a capture that failed half-way.
void flowrun_capture_free(Capture* capture) {
  guarded([&] { abandon(*capture); });
  guarded([&] { capture->graph.reset(); });
  guarded([&] { capture->stream.reset(); });
  guarded([&] { delete capture; });
}

int flowrun_graph_replay(Graph* graph) {
  return guarded([&] { graph->replay(); });
}

void flowrun_graph_free(Graph* graph) {
  guarded([&] { delete graph; });
}

}  // extern "C"
