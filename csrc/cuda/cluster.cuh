// Blocks that share one row: a thread-block cluster, so that sums over a row's columns travel through the
// multiprocessors' shared memories. A cluster of one block is the same code without partners.
#pragma once

#include <cooperative_groups.h>

#include "cuda/reduce.cuh"

namespace daco::cuda {

__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// The same variable of block `rank`.
__device__ __forceinline__ const double* of_block(double* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#else
  return mine;
#endif
}

// Sums over the blocks of a cluster, `kValues` at a time, added in order of rank: every block gets the same
// bits. Two buffers take turns. A block writes to one only after a barrier that all passed after they read it.
template <int kValues>
struct Exchange {
  double buffer[2][kValues];
  double warp[32];

  __device__ double* begin(int turn) { return buffer[turn & 1]; }
  // Once all threads of the block have written their values: makes them visible to the cluster.
  __device__ void publish() { cluster_barrier(); }
  __device__ double total(int turn, int value, int blocks) {
    double sum = 0;
    for (int rank = 0; rank < blocks; ++rank) sum += of_block(buffer[turn & 1], rank)[value];
    return sum;
  }
};

}  // namespace daco::cuda
