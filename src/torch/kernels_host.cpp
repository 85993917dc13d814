// kernels.cu on the host, for tests: every thread of a block is one of the system's, and blocks follow each other.

#include <cmath>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace {

struct Index {
  unsigned x, y;
};
thread_local Index threadIdx;
Index blockIdx, blockDim, gridDim;

// std::barrier, which GCC has from 11 on.
struct Barrier {
  std::mutex mutex;
  std::condition_variable all;
  unsigned count, waiting = 0, turn = 0;

  explicit Barrier(unsigned count) : count(count) {}

  void arrive_and_wait() {
    std::unique_lock<std::mutex> lock(mutex);
    unsigned mine = turn;
    if (++waiting == count) {
      waiting = 0;
      turn++;
      all.notify_all();
    } else {
      all.wait(lock, [&] { return turn != mine; });
    }
  }
};
Barrier* barrier;

void __syncthreads() { barrier->arrive_and_wait(); }

}  // namespace

#define __device__
#define __global__
#define __launch_bounds__(threads)
// One block at a time: its threads share what is static.
#define __shared__ static
#include "kernels.cu"

// What a launch passes: an address for each argument, as for cuLaunchKernel.
extern "C" void flowrun_host_launch(int kernel, unsigned grid_x, unsigned grid_y, unsigned block, void** args) {
  static std::mutex one;
  std::lock_guard<std::mutex> alone(one);
  auto run = [&](auto call) {
    Barrier all(block);
    barrier = &all;
    blockDim = {block, 1};
    gridDim = {grid_x, grid_y};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < block; t++)
      threads.emplace_back([&, t] {
        threadIdx = {t, 0};
        for (unsigned y = 0; y < grid_y; y++)
          for (unsigned x = 0; x < grid_x; x++) {
            all.arrive_and_wait();
            if (t == 0) blockIdx = {x, y};
            all.arrive_and_wait();
            call();
          }
      });
    for (auto& thread : threads) thread.join();
  };
  // Unpacks the arguments to the kernel's own types.
  auto with = [&]<class... A>(void (*f)(A...)) {
    run([&] {
      [&]<size_t... I>(std::index_sequence<I...>) {
        f(*static_cast<A*>(args[I])...);
      }(std::index_sequence_for<A...>{});
    });
  };
  switch (kernel) {
    case 0: return with(gpu_norm);
    case 1: return with(gpu_head_norm);
    case 2: return with(gpu_turn);
    case 3: return with(gpu_store);
    case 4: return with(gpu_gate);
    case 5: return with(gpu_shrink);
    case 6: return with(gpu_expand);
    case 7: return with(gpu_draw);
  }
}
