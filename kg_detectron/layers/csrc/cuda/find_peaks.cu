// Waits for the device once: for the number of peaks.
#include <ATen/Dispatch.h>
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

// The maps of all scales. Their pixels are numbered as if they lay end to end; `first` is that of each scale.
template <typename T>
struct Maps {
    const T* scores[kMostScales];
    int64_t first[kMostScales], h[kMostScales], w[kMostScales], count, pixels, images, keypoints;

    __device__ int64_t scale_of(int64_t pixel) const {
        int64_t s = count - 1;
        while (pixel < first[s]) {
            --s;
        }
        return s;
    }
};

template <typename T>
__global__ void mark_kernel(const Maps<T> maps, T threshold, bool* is_peak) {
    for (int64_t pixel = first_item(); pixel < maps.pixels; pixel += item_step()) {
        const int64_t s = maps.scale_of(pixel), i = pixel - maps.first[s], h = maps.h[s], w = maps.w[s];
        const int64_t x = i % w, y = i / w % h;
        const T *scores = maps.scores[s], score = scores[i];
        is_peak[pixel] = is_candidate(score, threshold) && !(x > 0 && hides(scores[i - 1], score)) &&
                         !(x < w - 1 && hides(scores[i + 1], score)) && !(y > 0 && hides(scores[i - w], score)) &&
                         !(y < h - 1 && hides(scores[i + w], score));
    }
}

// Numbers of pixels -> peaks: group = image + N * scale, keypoint, y, x; and their scores.
template <typename T>
__global__ void unravel_kernel(const Maps<T> maps, const int64_t* pixel, int64_t count, int64_t* peaks, T* values) {
    for (int64_t p = first_item(); p < count; p += item_step()) {
        const int64_t s = maps.scale_of(pixel[p]), index = pixel[p] - maps.first[s], h = maps.h[s], w = maps.w[s];
        const int64_t plane = index / (h * w);
        peaks[4 * p] = maps.images * s + plane / maps.keypoints;
        peaks[4 * p + 1] = plane % maps.keypoints;
        peaks[4 * p + 2] = index / w % h;
        peaks[4 * p + 3] = index % w;
        values[p] = maps.scores[s][index];
    }
}

std::tuple<at::Tensor, at::Tensor> find_peaks(at::TensorList scores, double threshold) {
    check_threshold(scores, threshold);
    const c10::cuda::CUDAGuard guard(scores[0].device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const int64_t scales = static_cast<int64_t>(scores.size()), images = scores[0].size(0);
    std::vector<at::Tensor> contiguous;
    int64_t pixels = 0;
    for (const at::Tensor& scale : scores) {
        contiguous.push_back(scale.contiguous());
        pixels += scale.numel();
    }
    const at::Tensor is_peak = at::empty({pixels}, scores[0].options().dtype(at::kBool));
    at::Tensor peaks, values;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, scores[0].scalar_type(), "find_peaks", [&] {
        Maps<scalar_t> maps{{}, {}, {}, {}, scales, 0, images, scores[0].size(1)};
        for (int64_t s = 0; s < scales; ++s) {
            maps.scores[s] = contiguous[s].const_data_ptr<scalar_t>();
            maps.first[s] = maps.pixels;
            maps.h[s] = contiguous[s].size(2);
            maps.w[s] = contiguous[s].size(3);
            maps.pixels += contiguous[s].numel();
        }
        mark_kernel<<<blocks_for(pixels), kThreads, 0, stream>>>(maps, static_cast<scalar_t>(threshold),
                                                                 is_peak.mutable_data_ptr<bool>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
        const at::Tensor pixel = at::nonzero(is_peak).flatten();
        const int64_t count = pixel.size(0);
        peaks = at::empty({count, 4}, pixel.options());
        values = at::empty({count}, scores[0].options());
        unravel_kernel<<<blocks_for(count), kThreads, 0, stream>>>(maps, pixel.const_data_ptr<int64_t>(), count,
                                                                   peaks.mutable_data_ptr<int64_t>(),
                                                                   values.mutable_data_ptr<scalar_t>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    // Stable sorts: equal scores stay in the order of keypoint, y, x.
    at::Tensor order;
    std::tie(values, order) = at::sort(values, /*stable=*/true, /*dim=*/0, /*descending=*/true);
    peaks = peaks.index_select(0, order);
    if (images * scales > 1) {
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
