// Votes are added as 64-bit integers: their sum does not depend on the order in which the threads come, floating-point
// sums would. The unit is the smallest power of two with which no sum can overflow, at most 2^-42 of the largest value
// for maps of up to 2^18 pixels: far below the rounding of float32. With 32 bits it would be 2^-10 of it.
// Planes take turns in a buffer of sums small enough for the second-level cache.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../voting.h"
#include "launch.h"

namespace kg {
namespace {

using Bits = unsigned long long;

// Sums of the planes that are added at a time: 16 MB, of which the second-level cache of an A100 or H100 holds more. A
// larger plane comes alone.
constexpr int64_t kMostSums = int64_t{1} << 21;

// Bits of the largest absolute value that is finite; those of doubles without sign are ordered as the doubles are.
template <typename T>
__global__ void largest_kernel(const T* value, int64_t count, Bits* largest) {
    Bits bits = 0;
    for (int64_t i = first_item(); i < count; i += item_step()) {
        const double size = fabs(static_cast<double>(value[i]));
        if (isfinite(size)) {
            bits = max(bits, static_cast<Bits>(__double_as_longlong(size)));
        }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        bits = max(bits, __shfl_xor_sync(0xffffffff, bits, distance));
    }
    if (threadIdx.x % 32 == 0 && bits) {
        atomicMax(largest, bits);
    }
}

// Exponent e such that as many votes as a plane has pixels, each of 2^e units at the largest, stay below 2^62.
__device__ int exponent_of_unit(const Bits* largest, int64_t pixels) {
    const double value = __longlong_as_double(static_cast<long long>(*largest));
    return value > 0 ? 60 - ilogb(value) - ilogb(static_cast<double>(pixels)) : 0;
}

// value [P,h,w], offset [P,2,h,w] of P planes -> votes [P,h,w], in units.
template <typename T>
__global__ void vote_kernel(const T* value, const T* offset, int64_t planes, int64_t h, int64_t w, const Bits* largest,
                            Bits* votes) {
    const int exponent = exponent_of_unit(largest, h * w);
    for (int64_t i = first_item(); i < planes * h * w; i += item_step()) {
        const int64_t plane = i / (h * w), pixel = i % (h * w);
        const T* by = offset + 2 * plane * h * w + pixel;
        const T x = pixel % w + by[0], y = pixel / w + by[h * w];
        const Vote<T> vote(value[i], x, y, static_cast<T>(h), static_cast<T>(w));
        for (int corner = 0; vote.lands && corner < 4; ++corner) {
            const int right = corner % 2, below = corner / 2;
            const int64_t column = vote.left + right, row = vote.top + below;
            if (column >= 0 && column < w && row >= 0 && row < h) {
                const double share = vote.corner(right, below);
                const long long units = __double2ll_rn(scalbn(share, exponent));
                atomicAdd(votes + (plane * h + row) * w + column, static_cast<Bits>(units));
            }
        }
    }
}

// clear: for the votes of the next planes.
template <typename T>
__global__ void scale_kernel(Bits* votes, int64_t count, int64_t pixels, const Bits* largest, double scale, bool clear,
                             T* out) {
    const int exponent = exponent_of_unit(largest, pixels);
    for (int64_t i = first_item(); i < count; i += item_step()) {
        const double units = static_cast<double>(static_cast<long long>(votes[i]));
        out[i] = static_cast<T>(scalbn(units, -exponent) * scale);
        if (clear) {
            votes[i] = 0;
        }
    }
}

at::Tensor hough_vote(const at::Tensor& heatmap, const at::Tensor& offsets, double radius) {
    check_votes(heatmap, offsets, radius);
    const c10::cuda::CUDAGuard guard(heatmap.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const auto dtype = c10::promoteTypes(heatmap.scalar_type(), at::kFloat);
    const at::Tensor value = heatmap.to(dtype).contiguous(), offset = offsets.to(dtype).contiguous();
    const int64_t h = value.size(2), w = value.size(3), count = value.numel();
    at::Tensor out = at::empty_like(value);
    if (count == 0) {
        return out;
    }
    const int64_t pixels = h * w, planes = count / pixels, turn = std::clamp<int64_t>(kMostSums / pixels, 1, planes);
    // The votes of the planes of one turn, and behind them the largest value.
    const at::Tensor units = at::zeros({turn * pixels + 1}, value.options().dtype(at::kLong));
    Bits* votes = reinterpret_cast<Bits*>(units.mutable_data_ptr<int64_t>());
    Bits* largest = votes + turn * pixels;
    AT_DISPATCH_FLOATING_TYPES(dtype, "hough_vote", [&] {
        const scalar_t *from = value.const_data_ptr<scalar_t>(), *by = offset.const_data_ptr<scalar_t>();
        scalar_t* to = out.mutable_data_ptr<scalar_t>();
        largest_kernel<<<blocks_for(count), kThreads, 0, stream>>>(from, count, largest);
        for (int64_t first = 0; first < planes; first += turn) {
            const int64_t some = std::min(turn, planes - first), sums = some * pixels;
            const bool clear = first + turn < planes;
            vote_kernel<<<blocks_for(sums), kThreads, 0, stream>>>(from + first * pixels, by + 2 * first * pixels, some,
                                                                   h, w, largest, votes);
            scale_kernel<<<blocks_for(sums), kThreads, 0, stream>>>(votes, sums, pixels, largest, vote_scale(radius),
                                                                    clear, to + first * pixels);
        }
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return out;
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CUDA, m) {
    m.impl("hough_vote", &kg::hough_vote);
}
