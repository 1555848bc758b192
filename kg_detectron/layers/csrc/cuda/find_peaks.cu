// Waits for the device once: for the number of peaks.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "launch.h"

namespace kg {
namespace {

// Whether a neighbour leaves a peak of this score one: values that are not finite hide none.
template <typename T>
__device__ bool allows(T neighbour, T score) {
    return score >= neighbour || !isfinite(static_cast<float>(neighbour));
}

template <typename T>
__global__ void mark_kernel(const T* scores, int64_t count, int64_t h, int64_t w, T threshold, bool* is_peak) {
    for (int64_t i = first_item(); i < count; i += item_step()) {
        const int64_t x = i % w, y = i / w % h;
        const T score = scores[i];
        is_peak[i] = score > threshold && isfinite(static_cast<float>(score)) &&
                     (x == 0 || allows(scores[i - 1], score)) && (x == w - 1 || allows(scores[i + 1], score)) &&
                     (y == 0 || allows(scores[i - w], score)) && (y == h - 1 || allows(scores[i + w], score));
    }
}

// Index in (N,K,H,W) -> image, keypoint, y, x.
__global__ void unravel_kernel(const int64_t* pixel, int64_t count, int64_t k, int64_t h, int64_t w, int64_t* peaks) {
    for (int64_t p = first_item(); p < count; p += item_step()) {
        peaks[4 * p] = pixel[p] / (k * h * w);
        peaks[4 * p + 1] = pixel[p] / (h * w) % k;
        peaks[4 * p + 2] = pixel[p] / w % h;
        peaks[4 * p + 3] = pixel[p] % w;
    }
}

std::tuple<at::Tensor, at::Tensor> find_peaks(const at::Tensor& scores, double threshold) {
    check_maps("scores", scores);
    const c10::cuda::CUDAGuard guard(scores.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const at::Tensor maps = scores.contiguous();
    const int64_t n = maps.size(0), k = maps.size(1), h = maps.size(2), w = maps.size(3), count = maps.numel();
    const at::Tensor is_peak = at::empty({count}, maps.options().dtype(at::kBool));
    if (count > 0) {
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, maps.scalar_type(), "find_peaks", [&] {
            mark_kernel<<<blocks_for(count), kThreads, 0, stream>>>(maps.const_data_ptr<scalar_t>(), count, h, w,
                                                                    static_cast<scalar_t>(threshold),
                                                                    is_peak.mutable_data_ptr<bool>());
        });
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    // Stable sorts: equal scores stay in the order of keypoint, y, x.
    at::Tensor pixel = at::nonzero(is_peak).flatten();
    at::Tensor values = maps.flatten().index_select(0, pixel), order;
    std::tie(values, order) = at::sort(values, /*stable=*/true, /*dim=*/0, /*descending=*/true);
    pixel = pixel.index_select(0, order);
    if (n > 1) {
        order = std::get<1>(at::sort(at::floor_divide(pixel, std::max<int64_t>(k * h * w, 1)), /*stable=*/true,
                                     /*dim=*/0, /*descending=*/false));
        pixel = pixel.index_select(0, order);
        values = values.index_select(0, order);
    }
    at::Tensor peaks = at::empty({pixel.size(0), 4}, pixel.options());
    unravel_kernel<<<blocks_for(pixel.size(0)), kThreads, 0, stream>>>(pixel.const_data_ptr<int64_t>(), pixel.size(0),
                                                                       k, h, w, peaks.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {peaks, values};
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CUDA, m) {
    m.impl("find_peaks", &kg::find_peaks);
}
