// Waits for the device once: for the number of peaks.
#include <ATen/Dispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../checks.h"
#include "../peaks.h"
#include "launch.h"

namespace kg {
namespace {

template <typename T>
__global__ void mark_kernel(const T* scores, int64_t count, int64_t h, int64_t w, T threshold, bool* is_peak) {
    for (int64_t i = first_item(); i < count; i += item_step()) {
        const int64_t x = i % w, y = i / w % h;
        const T score = scores[i];
        is_peak[i] = is_candidate(score, threshold) && !(x > 0 && hides(scores[i - 1], score)) &&
                     !(x < w - 1 && hides(scores[i + 1], score)) && !(y > 0 && hides(scores[i - w], score)) &&
                     !(y < h - 1 && hides(scores[i + w], score));
    }
}

// Where the maps of each scale lie, in all of them laid end to end.
struct Places {
    int64_t images, keypoints;
    int64_t first[kMostScales], h[kMostScales], w[kMostScales], count;
};

// Index in the maps of all scales -> group = image + N * scale, keypoint, y, x.
__global__ void unravel_kernel(const int64_t* pixel, int64_t count, const Places places, int64_t* peaks) {
    for (int64_t p = first_item(); p < count; p += item_step()) {
        int64_t s = places.count - 1;
        while (pixel[p] < places.first[s]) {
            --s;
        }
        const int64_t index = pixel[p] - places.first[s], h = places.h[s], w = places.w[s], plane = index / (h * w);
        peaks[4 * p] = places.images * s + plane / places.keypoints;
        peaks[4 * p + 1] = plane % places.keypoints;
        peaks[4 * p + 2] = index / w % h;
        peaks[4 * p + 3] = index % w;
    }
}

std::tuple<at::Tensor, at::Tensor> find_peaks(at::TensorList maps, double threshold) {
    check_threshold(maps, threshold);
    const c10::cuda::CUDAGuard guard(maps[0].device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    std::vector<at::Tensor> flat;
    Places places{maps[0].size(0), maps[0].size(1), {}, {}, {}, static_cast<int64_t>(maps.size())};
    int64_t total = 0;
    for (int64_t s = 0; s < places.count; ++s) {
        flat.push_back(maps[s].contiguous().flatten());
        places.first[s] = total;
        places.h[s] = maps[s].size(2);
        places.w[s] = maps[s].size(3);
        total += flat[s].numel();
    }
    const at::Tensor every = places.count > 1 ? at::cat(flat) : flat[0];
    const at::Tensor is_peak = at::empty({total}, every.options().dtype(at::kBool));
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, every.scalar_type(), "find_peaks", [&] {
        for (int64_t s = 0; s < places.count; ++s) {
            if (const int64_t count = flat[s].numel()) {
                mark_kernel<<<blocks_for(count), kThreads, 0, stream>>>(
                    every.const_data_ptr<scalar_t>() + places.first[s], count, places.h[s], places.w[s],
                    static_cast<scalar_t>(threshold), is_peak.mutable_data_ptr<bool>() + places.first[s]);
                C10_CUDA_KERNEL_LAUNCH_CHECK();
            }
        }
    });
    const at::Tensor pixel = at::nonzero(is_peak).flatten();
    at::Tensor peaks = at::empty({pixel.size(0), 4}, pixel.options());
    unravel_kernel<<<blocks_for(pixel.size(0)), kThreads, 0, stream>>>(pixel.const_data_ptr<int64_t>(), pixel.size(0),
                                                                       places, peaks.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    // Stable sorts: equal scores stay in the order of keypoint, y, x.
    at::Tensor values = every.index_select(0, pixel), order;
    std::tie(values, order) = at::sort(values, /*stable=*/true, /*dim=*/0, /*descending=*/true);
    peaks = peaks.index_select(0, order);
    if (places.images * places.count > 1) {
        order = std::get<1>(at::sort(peaks.select(1, 0), /*stable=*/true, /*dim=*/0, /*descending=*/false));
        peaks = peaks.index_select(0, order);
        values = values.index_select(0, order);
    }
    return {peaks, values};
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CUDA, m) {
    m.impl("find_peaks", &kg::find_peaks);
}
