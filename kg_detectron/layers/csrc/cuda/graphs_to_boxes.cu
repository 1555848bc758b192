// Waits for the device once: for the number of boxes.
#include <ATen/AccumulateType.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "../retrieval.h"
#include "launch.h"

namespace kg {
namespace {

template <typename T, typename Acc>
__global__ void retrieve_kernel(const T* graphs, int64_t count, bool corner_and_centre, T* boxes, T* scores,
                                bool* there) {
    for (int64_t g = first_item(); g < count; g += item_step()) {
        there[g] = retrieve_box<T, Acc>(graphs + kGraphValues * g, corner_and_centre, boxes + 4 * g, scores + g);
    }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> graphs_to_boxes(const at::Tensor& graphs, bool corner_and_centre) {
    check_graphs(graphs);
    const c10::cuda::CUDAGuard guard(graphs.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const at::Tensor in = graphs.contiguous();
    const int64_t count = in.size(0);
    const at::Tensor boxes = at::empty({count, 4}, in.options()), scores = at::empty({count}, in.options());
    const at::Tensor there = at::empty({count}, in.options().dtype(at::kBool));
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in.scalar_type(), "graphs_to_boxes", [&] {
        using acc_t = at::acc_type<scalar_t, /*is_cuda=*/true>;
        retrieve_kernel<scalar_t, acc_t><<<blocks_for(count), kThreads, 0, stream>>>(
            in.const_data_ptr<scalar_t>(), count, corner_and_centre, boxes.mutable_data_ptr<scalar_t>(),
            scores.mutable_data_ptr<scalar_t>(), there.mutable_data_ptr<bool>());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    at::Tensor graph = at::nonzero(there).flatten();
    return {boxes.index_select(0, graph), scores.index_select(0, graph), graph};
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CUDA, m) {
    m.impl("graphs_to_boxes", &kg::graphs_to_boxes);
}
