#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../rendering.h"

namespace kg {
namespace {

// The maps of one image, (5 | 10 | 40, h, w).
struct Maps {
    float *heatmap, *single, *group;
    int64_t h, w;
};

// The disc of keypoint k of one cell. A pixel that an earlier cell holds is taken over only from farther away: its
// distance is that of the single offset there.
void render_disc(const TargetCell& cell, int k, double radius, const Maps& maps) {
    const int64_t plane = maps.h * maps.w;
    const float limit = static_cast<float>(radius * radius);
    int64_t first_x, last_x, first_y, last_y;
    disc_span(cell.x[k], radius, maps.w, &first_x, &last_x);
    disc_span(cell.y[k], radius, maps.h, &first_y, &last_y);
    for (int64_t y = first_y; y <= last_y; ++y) {
        for (int64_t x = first_x; x <= last_x; ++x) {
            const float dx = cell.x[k] - x, dy = cell.y[k] - y, squared = squared_norm(dx, dy);
            const int64_t pixel = y * maps.w + x;
            float &taken = maps.heatmap[k * plane + pixel], &offset_x = maps.single[2 * k * plane + pixel];
            float& offset_y = maps.single[(2 * k + 1) * plane + pixel];
            if (!(squared <= limit) || (taken != 0 && squared >= squared_norm(offset_x, offset_y))) {
                continue;
            }
            taken = 1;
            offset_x = dx;
            offset_y = dy;
            for (int l = 0; l < kKeypoints; ++l) {
                if (l != k) {
                    float* edge = maps.group + 2 * edge_index(k, l) * plane + pixel;
                    edge[0] = cell.x[l] - x;
                    edge[plane] = cell.y[l] - y;
                }
            }
        }
    }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> render_targets(const at::Tensor& boxes, const at::Tensor& image,
                                                              int64_t images, int64_t height, int64_t width,
                                                              double stride, double radius, double min_side) {
    check_targets(boxes, image, images, height, width);
    at::Tensor heatmap = at::zeros({images, kKeypoints, height, width}, boxes.options());
    at::Tensor single = at::zeros({images, 2 * kKeypoints, height, width}, boxes.options());
    at::Tensor group = at::zeros({images, 2 * kEdges, height, width}, boxes.options());
    const at::Tensor every = boxes.contiguous(), of = image.contiguous();
    std::vector<std::vector<TargetCell>> cells(images);
    for (int64_t b = 0; b < every.size(0); ++b) {
        const int64_t i = of.const_data_ptr<int64_t>()[b];
        TORCH_CHECK_VALUE(i >= 0 && i < images, "image: expected indices below ", images, ", got ", i);
        const TargetCell cell(every.const_data_ptr<float>() + 4 * b, static_cast<float>(stride),
                              static_cast<float>(min_side));
        if (cell.target) {
            cells[i].push_back(cell);
        }
    }
    const int64_t plane = height * width;
    float *to_heatmap = heatmap.mutable_data_ptr<float>(), *to_single = single.mutable_data_ptr<float>();
    float* to_group = group.mutable_data_ptr<float>();
    // Every keypoint has channels of its own.
    at::parallel_for(0, images * kKeypoints, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t i = p / kKeypoints;
            const Maps maps{to_heatmap + i * kKeypoints * plane, to_single + i * 2 * kKeypoints * plane,
                            to_group + i * 2 * kEdges * plane, height, width};
            for (const TargetCell& cell : cells[i]) {
                render_disc(cell, static_cast<int>(p % kKeypoints), radius, maps);
            }
        }
    });
    return {heatmap, single, group};
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CPU, m) {
    m.impl("render_targets", &kg::render_targets);
}
