// The checks of arguments. Every compiled kernel calls its own first: whoever calls an operator, they run once, and no
// argument makes it leave its memory. The PyTorch reference has the same ones in kg_detectron/layers/checks.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <string>

#include "graph.h"

namespace kg {

// Scales of one call: their places travel to a kernel with its arguments.
constexpr size_t kMostScales = 8;

// channels: their number, 0 for any.
inline void check_maps(const char* name, const at::Tensor& maps, int64_t channels = 0) {
    TORCH_CHECK_VALUE(maps.dim() == 4 && maps.is_floating_point(), name,
                      ": expected a floating-point tensor (N,C,H,W), got ", maps.scalar_type(), " of shape ",
                      maps.sizes());
    TORCH_CHECK_VALUE(channels == 0 || maps.size(1) == channels, name, ": expected ", channels, " channels, got shape ",
                      maps.sizes());
}

inline void check_number(const char* name, double value, bool or_zero = false) {
    TORCH_CHECK_VALUE(std::isfinite(value) && (value > 0 || (or_zero && value == 0)), name, ": expected a ",
                      or_zero ? "non-negative" : "positive", " finite number, got ", value);
}

inline void check_votes(const at::Tensor& heatmap, const at::Tensor& offsets, double radius) {
    check_maps("heatmap", heatmap);
    check_maps("offsets", offsets);
    TORCH_CHECK_VALUE(offsets.size(0) == heatmap.size(0) && offsets.size(1) == 2 * heatmap.size(1) &&
                          offsets.size(2) == heatmap.size(2) && offsets.size(3) == heatmap.size(3) &&
                          offsets.device() == heatmap.device(),
                      "offsets: expected (N,2K,H,W) for a heatmap (N,K,H,W) of shape ", heatmap.sizes(), " on ",
                      heatmap.device(), ", got ", offsets.sizes(), " on ", offsets.device());
    TORCH_CHECK_VALUE(heatmap.size(2) < std::numeric_limits<int32_t>::max() - 2 &&
                          heatmap.size(3) < std::numeric_limits<int32_t>::max() - 2,
                      "heatmap: expected sides below 2^31 - 3 pixels, got ", heatmap.sizes());
    check_number("radius", radius);
}

inline void check_smoothing(const at::Tensor& votes, double sigma) {
    check_maps("votes", votes);
    check_number("sigma", sigma, /*or_zero=*/true);
}

// Maps of one batch at several scales: as many images and channels in all, one type and device. Any channels: 0.
inline void check_scales(const char* name, at::TensorList maps, int64_t channels) {
    TORCH_CHECK_VALUE(!maps.empty() && maps.size() <= kMostScales, name, ": expected maps of 1 to ", kMostScales,
                      " scales, got ", maps.size());
    for (const at::Tensor& scale : maps) {
        check_maps(name, scale, channels);
        TORCH_CHECK_VALUE(scale.size(0) == maps[0].size(0) && scale.size(1) == maps[0].size(1) &&
                              scale.scalar_type() == maps[0].scalar_type() && scale.device() == maps[0].device(),
                          name, ": expected N, C, type and device of the first scale, ", maps[0].sizes(), " ",
                          maps[0].scalar_type(), " on ", maps[0].device(), ", at every scale, got ", scale.sizes(), " ",
                          scale.scalar_type(), " on ", scale.device());
    }
}

inline void check_threshold(at::TensorList scores, double threshold) {
    check_scales("scores", scores, 0);
    TORCH_CHECK_VALUE(!std::isnan(threshold), "threshold: expected a number, got ", threshold);
}

inline void check_peaks(const at::Tensor& peaks) {
    TORCH_CHECK_VALUE(peaks.dim() == 2 && peaks.size(1) == 4 && peaks.scalar_type() == at::kLong,
                      "peaks: expected int64 (P,4), got ", peaks.scalar_type(), " of shape ", peaks.sizes());
}

inline void check_edges(at::IntArrayRef edges) {
    bool known[kKeypoints][kKeypoints] = {};
    bool fits = edges.size() % 2 == 0;
    for (size_t e = 0; fits && e < edges.size(); e += 2) {
        const int64_t k = edges[e], l = edges[e + 1];
        fits = k >= 0 && k < kKeypoints && l >= 0 && l < kKeypoints && k != l && !known[k][l];
        if (fits) {
            known[k][l] = true;
        }
    }
    TORCH_CHECK_VALUE(fits, "edges: expected different pairs of different keypoints below ", kKeypoints, ", got ",
                      edges);
}

inline void check_gathering(const at::Tensor& peaks, at::TensorList group_offsets, at::IntArrayRef edges) {
    check_peaks(peaks);
    check_edges(edges);
    check_scales("group_offsets", group_offsets, static_cast<int64_t>(edges.size()));
    TORCH_CHECK_VALUE(peaks.device() == group_offsets[0].device(), "peaks and group_offsets: expected one device, got ",
                      peaks.device(), " and ", group_offsets[0].device());
}

inline void check_grouping(const at::Tensor& peaks, const at::Tensor& scores, const at::Tensor& displacements,
                           double match_radius, double reject_radius, int64_t hops) {
    check_peaks(peaks);
    const int64_t count = peaks.size(0);
    TORCH_CHECK_VALUE(count < std::numeric_limits<int32_t>::max(), "peaks: expected fewer than 2^31 - 1, got ", count);
    TORCH_CHECK_VALUE(scores.dim() == 1 && scores.size(0) == count && scores.is_floating_point(),
                      "scores: expected floating-point (", count, ",), got ", scores.scalar_type(), " of shape ",
                      scores.sizes());
    TORCH_CHECK_VALUE(displacements.dim() == 3 && displacements.size(0) == count &&
                          displacements.size(1) == kKeypoints - 1 && displacements.size(2) == 2 &&
                          displacements.is_floating_point(),
                      "displacements: expected floating-point (", count, ",", kKeypoints - 1, ",2), got ",
                      displacements.scalar_type(), " of shape ", displacements.sizes());
    TORCH_CHECK_VALUE(peaks.device() == scores.device() && peaks.device() == displacements.device(),
                      "peaks, scores and displacements: expected one device, got ", peaks.device(), ", ",
                      scores.device(), " and ", displacements.device());
    TORCH_CHECK_VALUE(hops == 1 || hops == 2, "hops: expected 1 or 2, got ", hops);
    check_number("match_radius", match_radius, /*or_zero=*/true);
    check_number("reject_radius", reject_radius, /*or_zero=*/true);
}

inline void check_graphs(const at::Tensor& graphs) {
    TORCH_CHECK_VALUE(
        graphs.dim() == 3 && graphs.size(1) == kKeypoints && graphs.size(2) == 3 && graphs.is_floating_point(),
        "graphs: expected a floating-point tensor (G,", kKeypoints, ",3), got ", graphs.scalar_type(), " of shape ",
        graphs.sizes());
}

inline void check_targets(const at::Tensor& boxes, const at::Tensor& image, int64_t images, int64_t height,
                          int64_t width, double stride, double radius, at::IntArrayRef edges) {
    TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.scalar_type() == at::kFloat,
                      "boxes: expected float32 (M,4), got ", boxes.scalar_type(), " of shape ", boxes.sizes());
    TORCH_CHECK_VALUE(image.dim() == 1 && image.size(0) == boxes.size(0) && image.scalar_type() == at::kLong &&
                          image.device() == boxes.device(),
                      "image: expected int64 (", boxes.size(0), ",) on ", boxes.device(), ", got ", image.scalar_type(),
                      " of shape ", image.sizes(), " on ", image.device());
    TORCH_CHECK_VALUE(images >= 0 && height >= 0 && width >= 0,
                      "images, height and width: expected no negative ones, got ", images, ", ", height, " and ",
                      width);
    check_number("stride", stride);
    check_number("radius", radius);
    check_edges(edges);
}

// input: of a depthwise convolution with as many pixels of padding on all sides; gradient: of its result.
inline void check_depthwise(const at::Tensor& input, const at::Tensor& gradient, int64_t kernel, int64_t stride,
                            int64_t padding) {
    check_maps("input", input);
    TORCH_CHECK_VALUE(kernel >= 1 && stride >= 1 && padding >= 0,
                      "kernel, stride and padding: expected 1 or more, 1 or more and 0 or more, got ", kernel, ", ",
                      stride, " and ", padding);
    const int64_t height = (input.size(2) + 2 * padding - kernel) / stride + 1;
    const int64_t width = (input.size(3) + 2 * padding - kernel) / stride + 1;
    check_maps("gradient", gradient, input.size(1));
    TORCH_CHECK_VALUE(input.size(2) + 2 * padding >= kernel && input.size(3) + 2 * padding >= kernel &&
                          gradient.size(0) == input.size(0) && gradient.size(2) == height &&
                          gradient.size(3) == width && gradient.device() == input.device(),
                      "gradient: expected (N,C,", height, ",", width, ") for an input (N,C,H,W) of shape ",
                      input.sizes(), " on ", input.device(), ", got ", gradient.sizes(), " on ", gradient.device());
}

}  // namespace kg
