#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "../displacements.h"
#include "launch.h"

namespace kg {
namespace {

template <typename T>
__global__ void gather_kernel(const int64_t* peaks, int64_t count, const Scales<T> scales, T* out) {
    for (int64_t p = first_item(); p < count; p += item_step()) {
        scales.gather(peaks + 4 * p, out + 2 * (kKeypoints - 1) * p);
    }
}

at::Tensor gather_displacements(const at::Tensor& peaks, at::TensorList group_offsets, at::IntArrayRef edges) {
    check_gathering(peaks, group_offsets, edges);
    const c10::cuda::CUDAGuard guard(peaks.device());
    const at::Tensor every = peaks.contiguous();
    at::Tensor out = at::empty({every.size(0), kKeypoints - 1, 2}, group_offsets[0].options());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "gather_displacements", [&] {
        gather_kernel<<<blocks_for(every.size(0)), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            every.const_data_ptr<int64_t>(), every.size(0), Scales<scalar_t>(group_offsets, edges),
            out.mutable_data_ptr<scalar_t>());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return out;
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CUDA, m) {
    m.impl("gather_displacements", &kg::gather_displacements);
}
