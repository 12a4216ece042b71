// Blocks that share one row: a thread-block cluster, so that sums over a row's columns travel through the
// multiprocessors' shared memories. A cluster of one block is the same code without partners.
#pragma once

#include "cuda/reduce.cuh"

namespace daco::cuda {

// Sums over the blocks of a cluster, `kValues` at a time, added in order of rank: every block gets the same
// bits. Two buffers take turns. A block writes to one only after a barrier that all passed after they read
// it.
template <int kValues>
struct Exchange {
  double buffer[2][kValues];
  double warp[32];

  __device__ double* begin(int turn) { return buffer[turn & 1]; }
  // Once all threads of the block have written their values: makes them visible to the cluster.
  __device__ void publish() { cluster_sync(); }
  __device__ double total(int turn, int value, int blocks) {
    double sum = 0;
    for (int rank = 0; rank < blocks; ++rank)
      sum += in_block(buffer[turn & 1], static_cast<unsigned>(rank))[value];
    return sum;
  }
};

}  // namespace daco::cuda
