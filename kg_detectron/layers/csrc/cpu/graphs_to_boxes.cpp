#include <ATen/AccumulateType.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "../retrieval.h"

namespace kg {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> graphs_to_boxes(const at::Tensor& graphs, bool corner_and_centre) {
    check_graphs(graphs);
    const at::Tensor in = graphs.contiguous();
    const int64_t count = in.size(0);
    at::Tensor boxes = at::empty({count, 4}, in.options()), scores = at::empty({count}, in.options());
    at::Tensor graph = at::empty({count}, in.options().dtype(at::kLong));
    int64_t kept = 0;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in.scalar_type(), "graphs_to_boxes", [&] {
        using acc_t = at::acc_type<scalar_t, /*is_cuda=*/true>;
        const scalar_t* from = in.const_data_ptr<scalar_t>();
        scalar_t *box = boxes.mutable_data_ptr<scalar_t>(), *score = scores.mutable_data_ptr<scalar_t>();
        int64_t* source = graph.mutable_data_ptr<int64_t>();
        for (int64_t g = 0; g < count; ++g) {
            if (retrieve_box<scalar_t, acc_t>(from + kGraphValues * g, corner_and_centre, box + 4 * kept,
                                              score + kept)) {
                source[kept++] = g;
            }
        }
    });
    // Copies, so that the few boxes do not keep the memory of all graphs.
    return {boxes.narrow(0, 0, kept).clone(), scores.narrow(0, 0, kept).clone(), graph.narrow(0, 0, kept).clone()};
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CPU, m) {
    m.impl("graphs_to_boxes", &kg::graphs_to_boxes);
}
