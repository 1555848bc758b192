#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "../checks.h"

namespace kg {
namespace {

// Votes of one plane: value [h,w], offset_x and offset_y [h,w] -> votes [h,w], zeros at first.
template <typename T>
void vote_plane(const T* value, const T* offset_x, const T* offset_y, int64_t h, int64_t w, T scale, T* votes) {
    const T height = h, width = w;
    for (int64_t row = 0; row < h; ++row) {
        for (int64_t column = 0; column < w; ++column) {
            const int64_t pixel = row * w + column;
            const T x = column + offset_x[pixel], y = row + offset_y[pixel];
            // False for nan too.
            if (!(std::isfinite(value[pixel]) && x > -1 && x < width && y > -1 && y < height)) {
                continue;
            }
            const int64_t left = static_cast<int64_t>(x) - (x < 0), top = static_cast<int64_t>(y) - (y < 0);
            const T dx = x - left, dy = y - top;
            const T v = value[pixel] * scale;
            T* corner = votes + top * w + left;
            if (left >= 0 && top >= 0 && left + 1 < w && top + 1 < h) {
                corner[0] += v * ((1 - dx) * (1 - dy));
                corner[1] += v * (dx * (1 - dy));
                corner[w] += v * ((1 - dx) * dy);
                corner[w + 1] += v * (dx * dy);
            } else {
                for (int64_t below = 0; below < 2; ++below) {
                    for (int64_t right = 0; right < 2; ++right) {
                        if (left + right >= 0 && left + right < w && top + below >= 0 && top + below < h) {
                            corner[below * w + right] += v * ((right ? dx : 1 - dx) * (below ? dy : 1 - dy));
                        }
                    }
                }
            }
        }
    }
}

at::Tensor hough_vote(const at::Tensor& heatmap, const at::Tensor& offsets, double radius) {
    check_votes(heatmap, offsets);
    const auto dtype = c10::promoteTypes(heatmap.scalar_type(), at::kFloat);
    const at::Tensor value = heatmap.to(dtype).contiguous(), offset = offsets.to(dtype).contiguous();
    const int64_t planes = value.size(0) * value.size(1), h = value.size(2), w = value.size(3);
    at::Tensor votes = at::zeros(value.sizes(), value.options());
    AT_DISPATCH_FLOATING_TYPES(dtype, "hough_vote", [&] {
        const scalar_t scale = 1 / (M_PI * radius * radius);
        const scalar_t *from = value.const_data_ptr<scalar_t>(), *by = offset.const_data_ptr<scalar_t>();
        scalar_t* to = votes.mutable_data_ptr<scalar_t>();
        // One thread a plane: the order of the additions, and with it the sums, never depends on the threads.
        const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, h * w));
        at::parallel_for(0, planes, grain, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) {
                vote_plane(from + p * h * w, by + 2 * p * h * w, by + (2 * p + 1) * h * w, h, w, scale, to + p * h * w);
            }
        });
    });
    return votes;
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CPU, m) {
    m.impl("hough_vote", &kg::hough_vote);
}
