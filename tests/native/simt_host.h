// CUDA's threads on the CPU: each thread of a cluster is a fiber, and one real thread runs them in turns. It
// switches at barriers and at collectives of a warp only, in an order drawn anew each round, so a result that
// needs a barrier that is not there changes from seed to seed. Nothing here is fast.
#pragma once

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define DACO_DEVICE inline
#define DACO_BOTH inline

namespace daco::cuda {

inline uint3 threadIdx{}, blockIdx{};

namespace simt {

enum class Wait { kNone, kWarp, kBlock, kCluster, kDone };

struct Fiber {
  ucontext_t context;
  int block = 0;  // in the cluster
  int thread = 0;
  unsigned phase = 0;  // of the warp's exchange buffer
  Wait wait = Wait::kNone;
};

struct Machine {
  int threads = 0;
  int blocks = 0;  // of the cluster
  int64_t first_block = 0;
  std::vector<Fiber> fibers;
  std::vector<std::vector<unsigned char>> shared;
  std::vector<uint64_t> exchange;  // [blocks, threads, 2]
  std::function<void()> body;
  ucontext_t scheduler;
  Fiber* now = nullptr;
};

inline Machine machine;

inline void enter() {
  machine.body();
  machine.now->wait = Wait::kDone;
  swapcontext(&machine.now->context, &machine.scheduler);
}

inline void wait_for(Wait what) {
  Fiber* self = machine.now;
  self->wait = what;
  swapcontext(&self->context, &machine.scheduler);
}

// Lets go of every group of `size` fibers that all wait for `what`. A thread that has left while others of
// its group wait would hang a GPU.
inline bool release(Wait what, size_t size) {
  bool any = false;
  for (size_t first = 0; first < machine.fibers.size(); first += size) {
    size_t waiting = 0, gone = 0;
    for (size_t i = first; i < first + size; ++i) {
      waiting += machine.fibers[i].wait == what;
      gone += machine.fibers[i].wait == Wait::kDone;
    }
    if (waiting > 0 && gone > 0) {
      std::fprintf(stderr, "a thread has left a barrier's group\n");
      std::abort();
    }
    if (waiting < size) continue;
    for (size_t i = first; i < first + size; ++i) machine.fibers[i].wait = Wait::kNone;
    any = true;
  }
  return any;
}

// Runs `body` as a kernel: `grid` blocks of `threads`, in clusters of `blocks`.
inline void launch(int64_t grid, int blocks, int threads, size_t shared_bytes, unsigned seed,
                   std::function<void()> body) {
  constexpr size_t kStack = 96 * 1024;
  Machine& m = machine;
  m.threads = threads;
  m.blocks = blocks;
  m.body = std::move(body);
  const auto count = static_cast<size_t>(blocks) * static_cast<size_t>(threads);
  auto* stacks = static_cast<char*>(mmap(nullptr, kStack * count, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) std::abort();
  std::mt19937 draw(seed);
  std::vector<size_t> order;
  for (m.first_block = 0; m.first_block < grid; m.first_block += blocks) {
    m.fibers.assign(count, Fiber{});
    m.exchange.assign(count * 2, 0);
    m.shared.assign(static_cast<size_t>(blocks), std::vector<unsigned char>(shared_bytes + 128, 0xff));
    for (size_t i = 0; i < count; ++i) {
      Fiber& f = m.fibers[i];
      f.block = static_cast<int>(i) / threads;
      f.thread = static_cast<int>(i) % threads;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = stacks + i * kStack;
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, enter, 0);
    }
    int favoured = 0;
    for (unsigned turn = 0;;) {
      order.clear();
      for (size_t i = 0; i < count; ++i) {
        if (m.fibers[i].wait == Wait::kNone) order.push_back(i);
      }
      // A hasty block passes its own barriers while its peers have not moved.
      const bool ready = std::any_of(order.begin(), order.end(),
                                     [&](size_t i) { return m.fibers[i].block == favoured; });
      if (!ready && !order.empty() && (release(Wait::kWarp, 32) || release(Wait::kBlock, static_cast<size_t>(threads)))) {
        continue;
      }
      if (order.empty()) {
        const bool warp = release(Wait::kWarp, 32);
        const bool block = release(Wait::kBlock, static_cast<size_t>(threads));
        const bool cluster = release(Wait::kCluster, count);
        if (warp || block || cluster) continue;
        const bool done = std::all_of(m.fibers.begin(), m.fibers.end(),
                                      [](const Fiber& f) { return f.wait == Wait::kDone; });
        if (done) break;
        std::fprintf(stderr, "threads wait at different barriers\n");
        std::abort();
      }
      // A block, and in it some threads, run ahead as far as barriers let them, as they may on a GPU.
      const auto hasty = static_cast<int>(draw() % static_cast<unsigned>(blocks));
      std::shuffle(order.begin(), order.end(), draw);
      const auto others = std::stable_partition(order.begin(), order.end(),
                                                [&](size_t i) { return m.fibers[i].block == favoured; });
      if (turn++ % 256 == 0) favoured = hasty;
      if (others != order.begin()) order.erase(others, order.end());
      if (draw() % 4 == 0) order.resize(1 + draw() % order.size());
      for (const size_t i : order) {
        m.now = &m.fibers[i];
        threadIdx.x = static_cast<unsigned>(m.now->thread);
        blockIdx.x = static_cast<unsigned>(m.first_block + m.now->block);
        swapcontext(&m.scheduler, &m.now->context);
      }
    }
  }
  munmap(stacks, kStack * count);
}

// Every lane gives a value and may look at all of them.
template <class T, class F>
auto exchange(T x, F&& use) {
  static_assert(sizeof(T) <= 8);
  Machine& m = machine;
  Fiber* self = m.now;
  const size_t first = static_cast<size_t>(self->block * m.threads + self->thread / 32 * 32);
  const size_t half = self->phase++ % 2;
  std::memcpy(&m.exchange[(first + static_cast<size_t>(self->thread % 32)) * 2 + half], &x, sizeof(T));
  wait_for(Wait::kWarp);
  return use([&](int lane) {
    T y;
    std::memcpy(&y, &m.exchange[(first + static_cast<size_t>(lane)) * 2 + half], sizeof(T));
    return y;
  });
}

inline int lane() { return machine.now->thread % 32; }

}  // namespace simt

inline unsigned cluster_rank() { return static_cast<unsigned>(simt::machine.now->block); }
inline void cluster_sync() { simt::wait_for(simt::Wait::kCluster); }
inline void block_sync() { simt::wait_for(simt::Wait::kBlock); }
inline void warp_sync() { simt::wait_for(simt::Wait::kWarp); }

inline unsigned char* shared_of(int block) {
  auto at = reinterpret_cast<uintptr_t>(simt::machine.shared[static_cast<size_t>(block)].data());
  return reinterpret_cast<unsigned char*>((at + 127) / 128 * 128);
}
inline unsigned char* dynamic_shared() { return shared_of(simt::machine.now->block); }

template <class T>
T* in_block(T* shared, unsigned rank) {
  const auto offset = reinterpret_cast<unsigned char*>(shared) - dynamic_shared();
  return reinterpret_cast<T*>(shared_of(static_cast<int>(rank)) + offset);
}

template <class T>
T from_lane_xor(T x, int mask) {
  return simt::exchange(x, [&](auto&& of) { return of(simt::lane() ^ mask); });
}
template <class T>
T from_lane(T x, int lane) {
  return simt::exchange(x, [&](auto&& of) { return of(lane); });
}
inline uint32_t warp_max(uint32_t x) {
  return simt::exchange(x, [](auto&& of) {
    uint32_t best = 0;
    for (int i = 0; i < 32; ++i) best = std::max(best, of(i));
    return best;
  });
}
inline uint32_t warp_min(uint32_t x) {
  return simt::exchange(x, [](auto&& of) {
    uint32_t least = 0xffffffffu;
    for (int i = 0; i < 32; ++i) least = std::min(least, of(i));
    return least;
  });
}
inline uint32_t warp_ballot(bool x) {
  return simt::exchange(x, [](auto&& of) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(of(i)) << i;
    return bits;
  });
}
inline void async_copy16(void* shared, const void* global) { std::memcpy(shared, global, 16); }
inline void async_wait() {}
inline void after_previous() {}
inline void start_next() {}
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }

}  // namespace daco::cuda
