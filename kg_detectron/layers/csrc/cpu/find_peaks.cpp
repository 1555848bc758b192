#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "vectorize.h"

namespace kg {
namespace {

template <typename T>
struct Peak {
    T score;
    int64_t pixel;  // within the image: (k * h + y) * w + x
};

// Whether a neighbour is above a score: values that are not finite are above none.
template <typename T>
KG_INLINE bool hides(T neighbour, T score) {
    return (neighbour > score) & (neighbour <= std::numeric_limits<T>::max());
}

// Which pixels of a row [w] are peaks; above and below are its neighbours, or the row itself at the border.
template <typename T>
KG_INLINE void mark_peaks(const T* row, const T* above, const T* below, int64_t w, T threshold, uint8_t* marks) {
    for (int64_t x = 0; x < w; ++x) {
        marks[x] = (row[x] > threshold) & (row[x] <= std::numeric_limits<T>::max()) & !hides(above[x], row[x]) &
                   !hides(below[x], row[x]);
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
        // Few of a row are, and memchr passes over the others many at a time.
        for (const void* found; (found = std::memchr(mark, 1, end - mark)) != nullptr; ++mark) {
            mark = static_cast<const uint8_t*>(found);
            peaks.push_back({row[mark - begin], (k * h + y) * w + (mark - begin)});
        }
    }
}

std::tuple<at::Tensor, at::Tensor> find_peaks(const at::Tensor& scores, double threshold) {
    check_maps("scores", scores);
    const at::Tensor maps = scores.contiguous();
    const int64_t n = maps.size(0), keypoints = maps.size(1), h = maps.size(2), w = maps.size(3);
    at::Tensor peaks, values;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, maps.scalar_type(), "find_peaks", [&] {
        const scalar_t* from = maps.const_data_ptr<scalar_t>();
        const scalar_t limit = static_cast<scalar_t>(threshold);
        std::vector<std::vector<Peak<scalar_t>>> found(n * keypoints);
        const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, h * w));
        at::parallel_for(0, n * keypoints, grain, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) {
                peaks_of_plane(from + p * h * w, p % keypoints, h, w, limit, found[p]);
            }
        });
        std::vector<Peak<scalar_t>> all;
        std::vector<int64_t> first(n + 1, 0);  // of each image, in all
        for (int64_t p = 0; p < n * keypoints; ++p) {
            all.insert(all.end(), found[p].begin(), found[p].end());
            first[p / keypoints + 1] = static_cast<int64_t>(all.size());
        }
        peaks = at::empty({static_cast<int64_t>(all.size()), 4}, maps.options().dtype(at::kLong));
        values = at::empty({static_cast<int64_t>(all.size())}, maps.options());
        int64_t* peak = peaks.mutable_data_ptr<int64_t>();
        scalar_t* value = values.mutable_data_ptr<scalar_t>();
        at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                // Stable: equal scores stay in the order of keypoint, y, x.
                std::stable_sort(all.begin() + first[i], all.begin() + first[i + 1],
                                 [](const auto& a, const auto& b) { return a.score > b.score; });
                for (int64_t p = first[i]; p < first[i + 1]; ++p) {
                    const int64_t pixel = all[p].pixel;
                    peak[4 * p] = i;
                    peak[4 * p + 1] = pixel / (h * w);
                    peak[4 * p + 2] = pixel / w % h;
                    peak[4 * p + 3] = pixel % w;
                    value[p] = all[p].score;
                }
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
