#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "../smoothing.h"
#include "vectorize.h"

namespace kg {
namespace {

// out[i] = sum over d of weights[d] * (lines[-d][i] + lines[d][i]): both sides at once, so that a symmetric input has a
// symmetric output to the last bit. Blocks of a fixed length stay in registers.
template <typename T>
KG_INLINE void blend_lines(const T* weights, int64_t reach, const T* const* lines, int64_t length, T* out) {
    constexpr int64_t kBlock = 256 / sizeof(T);
    int64_t i = 0;
    for (; i + kBlock <= length; i += kBlock) {
        T sum[kBlock];
        for (int64_t b = 0; b < kBlock; ++b) {
            sum[b] = weights[0] * lines[0][i + b];
        }
        for (int64_t d = 1; d <= reach; ++d) {
            const T *before = lines[-d] + i, *after = lines[d] + i;
            const T weight = weights[d];
            for (int64_t b = 0; b < kBlock; ++b) {
                sum[b] += weight * (before[b] + after[b]);
            }
        }
        for (int64_t b = 0; b < kBlock; ++b) {
            out[i + b] = sum[b];
        }
    }
    for (; i < length; ++i) {
        T sum = weights[0] * lines[0][i];
        for (int64_t d = 1; d <= reach; ++d) {
            sum += weights[d] * (lines[-d][i] + lines[d][i]);
        }
        out[i] = sum;
    }
}

KG_VECTORIZE void blend(const float* weights, int64_t reach, const float* const* lines, int64_t length, float* out) {
    blend_lines(weights, reach, lines, length, out);
}

KG_VECTORIZE void blend(const double* weights, int64_t reach, const double* const* lines, int64_t length, double* out) {
    blend_lines(weights, reach, lines, length, out);
}

at::Tensor smooth_votes(const at::Tensor& votes, double sigma) {
    check_smoothing(votes, sigma);
    const at::Tensor in = votes.to(c10::promoteTypes(votes.scalar_type(), at::kFloat)).contiguous();
    at::Tensor out = at::empty_like(in);
    const int64_t planes = in.size(0) * in.size(1), h = in.size(2), w = in.size(3);
    if (in.numel() == 0) {
        return out;
    }
    AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "smooth_votes", [&] {
        const std::vector<double> exact = gaussian_weights(sigma);
        const std::vector<scalar_t> weights(exact.begin(), exact.end());
        const int64_t reach = static_cast<int64_t>(weights.size()) - 1;
        const scalar_t* from = in.const_data_ptr<scalar_t>();
        scalar_t* to = out.mutable_data_ptr<scalar_t>();
        // Row by row: down the columns into a line with its borders continued, then along the line.
        at::parallel_for(0, planes * h, std::max<int64_t>(1, 16384 / w), [&](int64_t begin, int64_t end) {
            std::vector<scalar_t> line(w + 2 * reach);
            scalar_t* middle = line.data() + reach;
            std::vector<const scalar_t*> rows(2 * reach + 1), shifts(2 * reach + 1);
            for (int64_t d = -reach; d <= reach; ++d) {
                shifts[reach + d] = middle + d;
            }
            for (int64_t i = begin; i < end; ++i) {
                const int64_t y = i % h;
                for (int64_t d = -reach; d <= reach; ++d) {
                    rows[reach + d] = from + (i - y + reflect(y + d, h)) * w;
                }
                blend(weights.data(), reach, rows.data() + reach, w, middle);
                for (int64_t d = 0; d < reach; ++d) {
                    middle[-1 - d] = middle[reflect(-1 - d, w)];
                    middle[w + d] = middle[reflect(w + d, w)];
                }
                blend(weights.data(), reach, shifts.data() + reach, w, to + i * w);
            }
        });
    });
    return out;
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CPU, m) {
    m.impl("smooth_votes", &kg::smooth_votes);
}
