#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../displacements.h"

namespace kg {
namespace {

// Number of peaks for which memory is requested ahead: the offsets of one peak lie far apart, and loading them is slow.
constexpr int64_t kAhead = 8;

template <typename T>
void prefetch(const Scales<T>& scales, const int64_t* peak) {
#ifdef __GNUC__
    const auto pixel = scales.at(peak);
    for (int l = 0; pixel.data && l < kKeypoints; ++l) {
        const int edge = scales.edges.index[peak[1]][l];
        if (edge >= 0) {
            __builtin_prefetch(pixel.offset(edge));
            __builtin_prefetch(pixel.offset(edge) + pixel.channel);
        }
    }
#endif
}

at::Tensor gather_displacements(const at::Tensor& peaks, at::TensorList group_offsets, at::IntArrayRef edges) {
    check_gathering(peaks, group_offsets, edges);
    const at::Tensor every = peaks.contiguous();
    const int64_t count = every.size(0), *peak = every.const_data_ptr<int64_t>();
    at::Tensor out = at::empty({count, kKeypoints - 1, 2}, group_offsets[0].options());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "gather_displacements", [&] {
        const Scales<scalar_t> scales(group_offsets, edges);
        scalar_t* to = out.mutable_data_ptr<scalar_t>();
        at::parallel_for(0, count, 1024, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < std::min(end, begin + kAhead); ++p) {
                prefetch(scales, peak + 4 * p);
            }
            for (int64_t p = begin; p < end; ++p) {
                if (p + kAhead < end) {
                    prefetch(scales, peak + 4 * (p + kAhead));
                }
                scales.gather(peak + 4 * p, to + 2 * (kKeypoints - 1) * p);
            }
        });
    });
    return out;
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CPU, m) {
    m.impl("gather_displacements", &kg::gather_displacements);
}
