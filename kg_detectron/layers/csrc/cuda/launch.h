// Launches of one thread for each of `count` items, whatever their number.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>

namespace kg {

constexpr int kThreads = 256;

// At least one block, because CUDA refuses an empty launch; kernels stride over the grid.
inline unsigned grid_of(int64_t blocks) {
    return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, 65535));
}
inline unsigned blocks_for(int64_t count) {
    return grid_of((count + kThreads - 1) / kThreads);
}

// First item of this thread, and the step to its next one.
__device__ inline int64_t first_item() {
    return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t item_step() {
    return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

}  // namespace kg
