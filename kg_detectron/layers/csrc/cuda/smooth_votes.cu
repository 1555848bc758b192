#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "../smoothing.h"
#include "launch.h"

namespace kg {
namespace {

// Along one axis: `size` elements, `step` apart. Both sides at once, so that a symmetric input has a symmetric output.
template <typename T>
__global__ void blend_kernel(const T* in, int64_t count, int64_t size, int64_t step, const T* weights, int64_t reach,
                             T* out) {
    for (int64_t i = first_item(); i < count; i += item_step()) {
        const int64_t at = i / step % size;
        const T* line = in + i - at * step;
        T sum = weights[0] * line[at * step];
        for (int64_t d = 1; d <= reach; ++d) {
            sum += weights[d] * (line[reflect(at - d, size) * step] + line[reflect(at + d, size) * step]);
        }
        out[i] = sum;
    }
}

at::Tensor smooth_votes(const at::Tensor& votes, double sigma) {
    check_smoothing(votes, sigma);
    const c10::cuda::CUDAGuard guard(votes.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const at::Tensor in = votes.to(c10::promoteTypes(votes.scalar_type(), at::kFloat)).contiguous();
    const at::Tensor down = at::empty_like(in);
    at::Tensor out = at::empty_like(in);
    const int64_t h = in.size(2), w = in.size(3), count = in.numel();
    if (count == 0) {
        return out;
    }
    const std::vector<double> exact = gaussian_weights(sigma);
    const at::Tensor weights = at::tensor(exact, at::TensorOptions().dtype(in.scalar_type()))
                                   .to(in.device(), in.scalar_type(), /*non_blocking=*/true);
    const int64_t reach = weights.numel() - 1;
    AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "smooth_votes", [&] {
        const scalar_t* weight = weights.const_data_ptr<scalar_t>();
        blend_kernel<<<blocks_for(count), kThreads, 0, stream>>>(in.const_data_ptr<scalar_t>(), count, h, w, weight,
                                                                 reach, down.mutable_data_ptr<scalar_t>());
        blend_kernel<<<blocks_for(count), kThreads, 0, stream>>>(down.const_data_ptr<scalar_t>(), count, w, int64_t{1},
                                                                 weight, reach, out.mutable_data_ptr<scalar_t>());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return out;
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CUDA, m) {
    m.impl("smooth_votes", &kg::smooth_votes);
}
