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

// The maps of one image: (5,h,w), (10,h,w) and (2 edges,h,w).
struct Maps {
    float *heatmap, *single, *group;
    int64_t h, w;
};

// The disc of keypoint k of one cell. It takes a pixel over from an earlier cell only where it is nearer; the distance
// of the earlier one is the length of the single offset there.
void render_disc(const TargetCell& cell, int k, double radius, const Edges& edges, const Maps& maps) {
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
                if (edges.index[k][l] >= 0) {
                    float* offset = maps.group + 2 * edges.index[k][l] * plane + pixel;
                    offset[0] = cell.x[l] - x;
                    offset[plane] = cell.y[l] - y;
                }
            }
        }
    }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> render_targets(const at::Tensor& boxes, const at::Tensor& image,
                                                              int64_t images, int64_t height, int64_t width,
                                                              double stride, double radius, double min_side,
                                                              at::IntArrayRef edge_list) {
    check_targets(boxes, image, images, height, width, stride, radius, edge_list);
    const Edges edges(edge_list);
    at::Tensor heatmap = at::zeros({images, kKeypoints, height, width}, boxes.options());
    at::Tensor single = at::zeros({images, 2 * kKeypoints, height, width}, boxes.options());
    at::Tensor group = at::zeros({images, 2 * edges.count, height, width}, boxes.options());
    const at::Tensor all_boxes = boxes.contiguous(), images_of_boxes = image.contiguous();
    std::vector<std::vector<TargetCell>> cells(images);
    for (int64_t b = 0; b < all_boxes.size(0); ++b) {
        const int64_t i = images_of_boxes.const_data_ptr<int64_t>()[b];
        TORCH_CHECK_VALUE(i >= 0 && i < images, "image: expected indices below ", images, ", got ", i);
        const TargetCell cell(all_boxes.const_data_ptr<float>() + 4 * b, static_cast<float>(stride),
                              static_cast<float>(min_side));
        if (cell.target) {
            cells[i].push_back(cell);
        }
    }
    const int64_t plane = height * width;
    float *to_heatmap = heatmap.mutable_data_ptr<float>(), *to_single = single.mutable_data_ptr<float>();
    float* to_group = group.mutable_data_ptr<float>();
    // Keypoints share no channel.
    at::parallel_for(0, images * kKeypoints, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t i = p / kKeypoints;
            const Maps maps{to_heatmap + i * kKeypoints * plane, to_single + i * 2 * kKeypoints * plane,
                            to_group + i * 2 * edges.count * plane, height, width};
            for (const TargetCell& cell : cells[i]) {
                render_disc(cell, static_cast<int>(p % kKeypoints), radius, edges, maps);
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
