// What keeps the operators inside their memory when they are called past the Python wrappers, which explain more.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "graph.h"

namespace kg {

inline void check_votes(const at::Tensor& heatmap, const at::Tensor& offsets) {
    TORCH_CHECK_VALUE(heatmap.dim() == 4, "heatmap: expected (N,K,H,W), got ", heatmap.sizes());
    TORCH_CHECK_VALUE(offsets.dim() == 4 && offsets.size(0) == heatmap.size(0) &&
                          offsets.size(1) == 2 * heatmap.size(1) && offsets.size(2) == heatmap.size(2) &&
                          offsets.size(3) == heatmap.size(3) && offsets.device() == heatmap.device(),
                      "offsets: expected (N,2K,H,W) for a heatmap of ", heatmap.sizes(), ", got ", offsets.sizes());
}

inline void check_maps(const char* name, const at::Tensor& maps) {
    TORCH_CHECK_VALUE(maps.dim() == 4, name, ": expected (N,K,H,W), got ", maps.sizes());
}

inline void check_grouping(const at::Tensor& peaks, const at::Tensor& scores, const at::Tensor& group_offsets) {
    TORCH_CHECK_VALUE(peaks.dim() == 2 && peaks.size(1) == 4 && peaks.scalar_type() == at::kLong,
                      "peaks: expected int64 (P,4), got ", peaks.sizes());
    TORCH_CHECK_VALUE(scores.dim() == 1 && scores.size(0) == peaks.size(0), "scores: expected (P,), got ",
                      scores.sizes());
    TORCH_CHECK_VALUE(group_offsets.dim() == 4 && group_offsets.size(1) == 2 * kEdges,
                      "group_offsets: expected (N,40,H,W), got ", group_offsets.sizes());
    TORCH_CHECK_VALUE(peaks.device() == scores.device() && peaks.device() == group_offsets.device(),
                      "peaks, scores and group_offsets: expected one device");
}

inline void check_graphs(const at::Tensor& graphs) {
    TORCH_CHECK_VALUE(graphs.dim() == 3 && graphs.size(1) == kKeypoints && graphs.size(2) == 3,
                      "graphs: expected (G,5,3), got ", graphs.sizes());
}

inline void check_targets(const at::Tensor& boxes, const at::Tensor& image, int64_t images, int64_t height,
                          int64_t width) {
    TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.scalar_type() == at::kFloat,
                      "boxes: expected float32 (M,4), got ", boxes.sizes());
    TORCH_CHECK_VALUE(image.dim() == 1 && image.size(0) == boxes.size(0) && image.scalar_type() == at::kLong &&
                          image.device() == boxes.device(),
                      "image: expected int64 (M,), got ", image.sizes());
    TORCH_CHECK_VALUE(images >= 0 && height >= 0 && width >= 0, "images, height and width: expected no negative ones");
}

}  // namespace kg
