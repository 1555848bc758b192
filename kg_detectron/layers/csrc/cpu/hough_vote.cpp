#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "../checks.h"
#include "../voting.h"
#include "vectorize.h"

namespace kg {
namespace {

// Pixels whose votes are computed, many at a time, before they are added, one by one. Neighbours often vote for the
// same place, and the second would wait for the first: they are added in steps of kStep.
constexpr int64_t kBlock = 128, kStep = 32;

// Votes of a block: where the top left one goes, and the values of the four.
template <typename T>
struct Votes {
    int32_t top_left[kBlock];
    T corner[4][kBlock];
};

// Votes of `count` pixels from (column, row) on. They go into a plane with a margin of one pixel, `stride` wide, so
// that no corner needs a check; a pixel that casts none adds zeros in the margin.
template <typename T>
KG_INLINE void block_votes(const T* value, const T* offset_x, const T* offset_y, int64_t row, int64_t column,
                           int64_t count, int64_t h, int64_t w, T scale, Votes<T>& votes) {
    const T height = h, width = w;
    const int32_t stride = static_cast<int32_t>(w + 2);
    for (int64_t i = 0; i < count; ++i) {
        const T x = static_cast<int32_t>(column + i) + offset_x[i], y = row + offset_y[i];
        Vote<T> vote(value[i], x, y, height, width);
        vote.value *= scale;
        votes.top_left[i] = vote.lands ? (vote.top + 1) * stride + vote.left + 1 : 0;
        votes.corner[0][i] = vote.corner(0, 0);
        votes.corner[1][i] = vote.corner(1, 0);
        votes.corner[2][i] = vote.corner(0, 1);
        votes.corner[3][i] = vote.corner(1, 1);
    }
}

KG_VECTORIZE void compute_votes(const float* value, const float* offset_x, const float* offset_y, int64_t row,
                                int64_t column, int64_t count, int64_t h, int64_t w, float scale, Votes<float>& votes) {
    block_votes(value, offset_x, offset_y, row, column, count, h, w, scale, votes);
}

KG_VECTORIZE void compute_votes(const double* value, const double* offset_x, const double* offset_y, int64_t row,
                                int64_t column, int64_t count, int64_t h, int64_t w, double scale,
                                Votes<double>& votes) {
    block_votes(value, offset_x, offset_y, row, column, count, h, w, scale, votes);
}

// Votes of one plane: value [h,w], offset [2,h,w] -> out [h,w]; padded [h+2,w+2] is room to work in.
template <typename T>
void vote_plane(const T* value, const T* offset, int64_t h, int64_t w, T scale, T* padded, T* out) {
    const int64_t stride = w + 2;
    std::fill(padded, padded + (h + 2) * stride, T(0));
    Votes<T> votes;
    for (int64_t row = 0; row < h; ++row) {
        for (int64_t column = 0; column < w; column += kBlock) {
            const int64_t pixel = row * w + column, count = std::min(kBlock, w - column);
            compute_votes(value + pixel, offset + pixel, offset + h * w + pixel, row, column, count, h, w, scale,
                          votes);
            for (int64_t first = 0; first < kStep; ++first) {
                for (int64_t i = first; i < count; i += kStep) {
                    T* to = padded + votes.top_left[i];
                    to[0] += votes.corner[0][i];
                    to[1] += votes.corner[1][i];
                    to[stride] += votes.corner[2][i];
                    to[stride + 1] += votes.corner[3][i];
                }
            }
        }
    }
    for (int64_t row = 0; row < h; ++row) {
        const T* from = padded + (row + 1) * stride + 1;
        std::copy(from, from + w, out + row * w);
    }
}

at::Tensor hough_vote(const at::Tensor& heatmap, const at::Tensor& offsets, double radius) {
    check_votes(heatmap, offsets, radius);
    const auto dtype = c10::promoteTypes(heatmap.scalar_type(), at::kFloat);
    const at::Tensor value = heatmap.to(dtype).contiguous(), offset = offsets.to(dtype).contiguous();
    const int64_t planes = value.size(0) * value.size(1), h = value.size(2), w = value.size(3);
    TORCH_CHECK_VALUE((h + 2) * (w + 2) <= std::numeric_limits<int32_t>::max(),
                      "heatmap: expected maps of fewer than 2^31 pixels, got ", heatmap.sizes());
    at::Tensor votes = at::empty_like(value);
    AT_DISPATCH_FLOATING_TYPES(dtype, "hough_vote", [&] {
        const scalar_t scale = vote_scale(radius);
        const scalar_t *from = value.const_data_ptr<scalar_t>(), *by = offset.const_data_ptr<scalar_t>();
        scalar_t* to = votes.mutable_data_ptr<scalar_t>();
        // One thread a plane: the order of the additions, and with it the sums, never depends on the threads.
        const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, h * w));
        at::parallel_for(0, planes, grain, [&](int64_t begin, int64_t end) {
            const std::unique_ptr<scalar_t[]> padded(new scalar_t[(h + 2) * (w + 2)]);
            for (int64_t p = begin; p < end; ++p) {
                vote_plane(from + p * h * w, by + 2 * p * h * w, h, w, scale, padded.get(), to + p * h * w);
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
