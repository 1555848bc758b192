// What keeps the operators inside their memory when they are called past the Python wrappers, which explain more.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <string>

#include "graph.h"

namespace kg {

// Scales of one call: their places travel to a kernel with its arguments.
constexpr size_t kMostScales = 8;

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

// Maps of one batch at several scales: as many images and channels in all, one type and device. Any channels: 0.
inline void check_scales(const char* name, at::TensorList maps, int64_t channels) {
    TORCH_CHECK_VALUE(!maps.empty() && maps.size() <= kMostScales, name, ": expected maps of 1 to ", kMostScales,
                      " scales, got ", maps.size());
    for (const at::Tensor& scale : maps) {
        check_maps(name, scale);
        TORCH_CHECK_VALUE(scale.size(0) == maps[0].size(0) && scale.size(1) == maps[0].size(1) &&
                              (channels == 0 || scale.size(1) == channels) &&
                              scale.scalar_type() == maps[0].scalar_type() && scale.device() == maps[0].device(),
                          name, ": expected (N,", channels ? std::to_string(channels) : "K",
                          ",H,W) of one type and device at every scale, got ", maps[0].sizes(), " and ",
                          scale.sizes());
    }
}

inline void check_peaks(const at::Tensor& peaks) {
    TORCH_CHECK_VALUE(peaks.dim() == 2 && peaks.size(1) == 4 && peaks.scalar_type() == at::kLong,
                      "peaks: expected int64 (P,4), got ", peaks.sizes());
}

inline void check_grouping(const at::Tensor& peaks, const at::Tensor& scores, const at::Tensor& displacements) {
    check_peaks(peaks);
    TORCH_CHECK_VALUE(peaks.size(0) < std::numeric_limits<int32_t>::max(), "peaks: expected less than 2^31");
    TORCH_CHECK_VALUE(scores.dim() == 1 && scores.size(0) == peaks.size(0), "scores: expected (P,), got ",
                      scores.sizes());
    TORCH_CHECK_VALUE(displacements.dim() == 3 && displacements.size(0) == peaks.size(0) &&
                          displacements.size(1) == kKeypoints - 1 && displacements.size(2) == 2,
                      "displacements: expected (P,4,2), got ", displacements.sizes());
    TORCH_CHECK_VALUE(peaks.device() == scores.device() && peaks.device() == displacements.device(),
                      "peaks, scores and displacements: expected one device");
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
