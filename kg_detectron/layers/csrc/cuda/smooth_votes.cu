// One kernel takes both passes, down the columns and along the rows: a block holds a tile of the map and its border in
// shared memory, so that memory is read once and written once. Kernels too wide for shared memory take two passes.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "../smoothing.h"
#include "launch.h"

namespace kg {
namespace {

// Pixels of a tile on a side, and the widest kernel that it takes: 48 KB of doubles, what every GPU has for a block.
constexpr int kTile = 32, kTileReach = 16;

// They travel with the arguments of a launch.
template <typename T>
struct Weights {
    T of[kTileReach + 1];
    int reach;

    explicit Weights(const std::vector<double>& exact) : of(), reach(static_cast<int>(exact.size()) - 1) {
        std::copy(exact.begin(), exact.end(), of);
    }

    // Both sides at once, so that a symmetric input has a symmetric output.
    __device__ T blend(const T* center, int step) const {
        T sum = of[0] * *center;
        for (int d = 1; d <= reach; ++d) {
            sum += of[d] * (center[-d * step] + center[d * step]);
        }
        return sum;
    }
};

template <typename T>
__global__ void smooth_kernel(const T* in, int64_t planes, int64_t h, int64_t w, const Weights<T> weights, T* out) {
    extern __shared__ double shared_values[];
    const int reach = weights.reach, side = kTile + 2 * reach;
    T* tile = reinterpret_cast<T*>(shared_values);  // [side,side] of the input
    T* down = tile + side * side;                   // [kTile,side], blended down the columns
    const int64_t tile_rows = (h + kTile - 1) / kTile, tile_columns = (w + kTile - 1) / kTile;
    for (int64_t t = blockIdx.x; t < planes * tile_rows * tile_columns; t += gridDim.x) {
        const int64_t plane = t / (tile_rows * tile_columns) * h * w;
        const int64_t top = t / tile_columns % tile_rows * kTile, left = t % tile_columns * kTile;
        const int rows = static_cast<int>(min(h - top, int64_t{kTile}));
        for (int i = threadIdx.x; i < (rows + 2 * reach) * side; i += blockDim.x) {
            const int64_t y = reflect(top - reach + i / side, h), x = reflect(left - reach + i % side, w);
            tile[i] = in[plane + y * w + x];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < rows * side; i += blockDim.x) {
            down[i] = weights.blend(tile + i + reach * side, side);
        }
        __syncthreads();
        // No third barrier: the next tile is written where nobody reads any more.
        for (int i = threadIdx.x; i < rows * kTile; i += blockDim.x) {
            const int row = i / kTile, column = i % kTile;
            if (left + column < w) {
                out[plane + (top + row) * w + left + column] = weights.blend(down + row * side + reach + column, 1);
            }
        }
    }
}

// Along one axis: `size` elements, `step` apart.
template <typename T>
__global__ void blend_kernel(const T* in, int64_t count, int64_t size, int64_t step, const T* weights, int64_t reach,
                             T* out) {
    for (int64_t i = first_item(); i < count; i += item_step()) {
        const int64_t at = i / step % size;
        const T* line = in + i - at * step;
        T sum = weights[0] * line[at * step];
        for (int64_t d = 1; d <= reach; ++d) {
            sum += weights[d] * (line[reflect(at - d, size) * step] + line[reflect(at + d, size) * step]);
        }
        out[i] = sum;
    }
}

at::Tensor smooth_votes(const at::Tensor& votes, double sigma) {
    check_smoothing(votes, sigma);
    const c10::cuda::CUDAGuard guard(votes.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const at::Tensor in = votes.to(c10::promoteTypes(votes.scalar_type(), at::kFloat)).contiguous();
    at::Tensor out = at::empty_like(in);
    const int64_t h = in.size(2), w = in.size(3), count = in.numel();
    if (count == 0) {
        return out;
    }
    const std::vector<double> exact = gaussian_weights(sigma);
    const int64_t reach = static_cast<int64_t>(exact.size()) - 1;
    AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "smooth_votes", [&] {
        const scalar_t* from = in.const_data_ptr<scalar_t>();
        scalar_t* to = out.mutable_data_ptr<scalar_t>();
        if (reach <= kTileReach) {
            const int64_t planes = count / (h * w), side = kTile + 2 * reach;
            const unsigned blocks = grid_of(planes * ((h + kTile - 1) / kTile) * ((w + kTile - 1) / kTile));
            const size_t bytes = (side * side + kTile * side) * sizeof(scalar_t);
            const Weights<scalar_t> weights(exact);
            smooth_kernel<<<blocks, kThreads, bytes, stream>>>(from, planes, h, w, weights, to);
        } else {
            const at::Tensor weights = at::tensor(exact, at::TensorOptions().dtype(in.scalar_type()))
                                           .to(in.device(), in.scalar_type(), /*non_blocking=*/true);
            const at::Tensor down = at::empty_like(in);
            const scalar_t* weight = weights.const_data_ptr<scalar_t>();
            scalar_t* middle = down.mutable_data_ptr<scalar_t>();
            blend_kernel<<<blocks_for(count), kThreads, 0, stream>>>(from, count, h, w, weight, reach, middle);
            blend_kernel<<<blocks_for(count), kThreads, 0, stream>>>(down.const_data_ptr<scalar_t>(), count, w,
                                                                     int64_t{1}, weight, reach, to);
        }
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return out;
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CUDA, m) {
    m.impl("smooth_votes", &kg::smooth_votes);
}
