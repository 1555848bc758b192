#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../peaks.h"
#include "tasks.h"
#include "vectorize.h"

namespace kg {
namespace {

template <typename T>
struct Peak {
    T score;
    int64_t pixel;  // within the image: (k * h + y) * w + x
};

// Which pixels of a row [w] are peaks; above and below are its neighbours, or the row itself at the border.
template <typename T>
KG_INLINE void mark_peaks(const T* row, const T* above, const T* below, int64_t w, T threshold, uint8_t* marks) {
    for (int64_t x = 0; x < w; ++x) {
        marks[x] = is_candidate(row[x], threshold) & !hides(above[x], row[x]) & !hides(below[x], row[x]);
    }
    for (int64_t x = 1; x < w; ++x) {
        marks[x] &= !hides(row[x - 1], row[x]);
    }
    for (int64_t x = 0; x + 1 < w; ++x) {
        marks[x] &= !hides(row[x + 1], row[x]);
    }
}

KG_VECTORIZE void mark_row(const float* row, const float* above, const float* below, int64_t w, float threshold,
                           uint8_t* marks) {
    mark_peaks(row, above, below, w, threshold, marks);
}

template <typename T>
void mark_row(const T* row, const T* above, const T* below, int64_t w, T threshold, uint8_t* marks) {
    mark_peaks(row, above, below, w, threshold, marks);
}

template <typename T>
void peaks_of_plane(const T* scores, int64_t k, int64_t h, int64_t w, T threshold, std::vector<Peak<T>>& peaks) {
    std::vector<uint8_t> marks(w);
    for (int64_t y = 0; y < h && w > 0; ++y) {
        const T* row = scores + y * w;
        mark_row(row, y > 0 ? row - w : row, y + 1 < h ? row + w : row, w, threshold, marks.data());
        const uint8_t *begin = marks.data(), *end = begin + w, *mark = begin;
        // Few pixels of a row are peaks, and memchr skips the others many at a time.
        for (const void* found; (found = std::memchr(mark, 1, end - mark)) != nullptr; ++mark) {
            mark = static_cast<const uint8_t*>(found);
            peaks.push_back({row[mark - begin], (k * h + y) * w + (mark - begin)});
        }
    }
}

std::tuple<at::Tensor, at::Tensor> find_peaks(at::TensorList maps, double threshold) {
    check_threshold(maps, threshold);
    std::vector<at::Tensor> scales;
    for (const at::Tensor& scale : maps) {
        scales.push_back(scale.contiguous());
    }
    const int64_t n = maps[0].size(0), keypoints = maps[0].size(1), groups = n * static_cast<int64_t>(maps.size());
    at::Tensor peaks, values;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, maps[0].scalar_type(), "find_peaks", [&] {
        const scalar_t limit = static_cast<scalar_t>(threshold);
        std::vector<std::vector<Peak<scalar_t>>> peaks_of_planes(groups * keypoints);
        std::vector<int64_t> first(groups + 1, 0);  // of each group, in the result
        each_task(groups * keypoints, [&](int64_t p) {
            const at::Tensor& scale = scales[p / (n * keypoints)];
            const int64_t h = scale.size(2), w = scale.size(3);
            peaks_of_plane(scale.const_data_ptr<scalar_t>() + p % (n * keypoints) * h * w, p % keypoints, h, w, limit,
                           peaks_of_planes[p]);
        });
        for (int64_t p = 0; p < groups * keypoints; ++p) {
            first[p / keypoints + 1] += static_cast<int64_t>(peaks_of_planes[p].size());
        }
        std::partial_sum(first.begin(), first.end(), first.begin());
        peaks = at::empty({first[groups], 4}, maps[0].options().dtype(at::kLong));
        values = at::empty({first[groups]}, maps[0].options());
        each_task(groups, [&](int64_t g) {
            std::vector<Peak<scalar_t>> peaks_of_group;
            peaks_of_group.reserve(first[g + 1] - first[g]);
            for (int64_t k = 0; k < keypoints; ++k) {
                peaks_of_group.insert(peaks_of_group.end(), peaks_of_planes[g * keypoints + k].begin(),
                                      peaks_of_planes[g * keypoints + k].end());
            }
            // Stable: equal scores stay in the order of keypoint, y, x.
            std::stable_sort(peaks_of_group.begin(), peaks_of_group.end(),
                             [](const auto& a, const auto& b) { return a.score > b.score; });
            const int64_t h = scales[g / n].size(2), w = scales[g / n].size(3);
            int64_t* peak = peaks.mutable_data_ptr<int64_t>() + 4 * first[g];
            scalar_t* value = values.mutable_data_ptr<scalar_t>() + first[g];
            for (const auto& [score, pixel] : peaks_of_group) {
                *peak++ = g;
                *peak++ = pixel / (h * w);
                *peak++ = pixel / w % h;
                *peak++ = pixel % w;
                *value++ = score;
            }
        });
    });
    return {peaks, values};
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CPU, m) {
    m.impl("find_peaks", &kg::find_peaks);
}
