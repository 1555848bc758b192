// Never waits for the device: boxes that are too small are left out there.
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../checks.h"
#include "../rendering.h"
#include "launch.h"

namespace kg {
namespace {

using Key = unsigned long long;

// The pixel that item i of the discs stands for: M cells, 5 keypoints, a square of `side` pixels around each.
struct DiscPixel {
    int64_t cell, image, k, x, y, pixel;
    TargetCell keypoints;
    float dx, dy, squared;
    bool inside;

    __device__ DiscPixel(int64_t i, const float* boxes, const int64_t* images, int64_t n, int64_t h, int64_t w,
                         int64_t side, float stride, double radius, float min_side)
        : cell(i / (kKeypoints * side * side)),
          image(images[cell]),
          k(i / (side * side) % kKeypoints),
          keypoints(boxes + 4 * cell, stride, min_side) {
        int64_t last_x, last_y;
        disc_span(keypoints.x[k], radius, w, &x, &last_x);
        disc_span(keypoints.y[k], radius, h, &y, &last_y);
        x += i % side;
        y += i / side % side;
        dx = keypoints.x[k] - x;
        dy = keypoints.y[k] - y;
        squared = squared_norm(dx, dy);
        inside = keypoints.target && x <= last_x && y <= last_y && squared <= static_cast<float>(radius * radius) &&
                 image >= 0 && image < n;
        pixel = y * w + x;
    }

    // The nearest keypoint has the smallest key, of equally near ones the first cell.
    __device__ Key key() const { return static_cast<Key>(__float_as_uint(squared)) << 32 | static_cast<Key>(cell); }
};

// owner [N,5,h,w]: the smallest key of each pixel, whatever the order of the threads.
__global__ void claim_kernel(int64_t count, const float* boxes, const int64_t* images, int64_t n, int64_t h, int64_t w,
                             int64_t side, float stride, double radius, float min_side, Key* owner) {
    for (int64_t i = first_item(); i < count; i += item_step()) {
        const DiscPixel disc(i, boxes, images, n, h, w, side, stride, radius, min_side);
        if (disc.inside) {
            atomicMin(owner + (disc.image * kKeypoints + disc.k) * h * w + disc.pixel, disc.key());
        }
    }
}

__global__ void write_kernel(int64_t count, const float* boxes, const int64_t* images, int64_t n, int64_t h, int64_t w,
                             int64_t side, float stride, double radius, float min_side, const Key* owner,
                             const Edges edges, float* heatmap, float* single, float* group) {
    const int64_t plane = h * w;
    for (int64_t i = first_item(); i < count; i += item_step()) {
        const DiscPixel disc(i, boxes, images, n, h, w, side, stride, radius, min_side);
        const int64_t k = disc.image * kKeypoints + disc.k;
        if (!disc.inside || owner[k * plane + disc.pixel] != disc.key()) {
            continue;
        }
        heatmap[k * plane + disc.pixel] = 1;
        single[2 * k * plane + disc.pixel] = disc.dx;
        single[(2 * k + 1) * plane + disc.pixel] = disc.dy;
        for (int l = 0; l < kKeypoints; ++l) {
            if (edges.index[disc.k][l] >= 0) {
                const int64_t edge = disc.image * edges.count + edges.index[disc.k][l];
                group[2 * edge * plane + disc.pixel] = disc.keypoints.x[l] - disc.x;
                group[(2 * edge + 1) * plane + disc.pixel] = disc.keypoints.y[l] - disc.y;
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
    const c10::cuda::CUDAGuard guard(boxes.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    at::Tensor heatmap = at::zeros({images, kKeypoints, height, width}, boxes.options());
    at::Tensor single = at::zeros({images, 2 * kKeypoints, height, width}, boxes.options());
    at::Tensor group = at::zeros({images, 2 * edges.count, height, width}, boxes.options());
    const at::Tensor all_boxes = boxes.contiguous(), images_of_boxes = image.contiguous();
    const at::Tensor owner = at::full({images, kKeypoints, height, width}, -1, image.options());
    // No disc is wider than the map, whatever its radius.
    const double widest = static_cast<double>(std::max(height, width));
    const int64_t side = static_cast<int64_t>(std::min(2 * std::ceil(radius) + 2, widest));
    const int64_t count = all_boxes.size(0) * kKeypoints * side * side;
    const float* from = all_boxes.const_data_ptr<float>();
    const int64_t* in = images_of_boxes.const_data_ptr<int64_t>();
    Key* key = reinterpret_cast<Key*>(owner.mutable_data_ptr<int64_t>());
    const float step = static_cast<float>(stride), smallest = static_cast<float>(min_side);
    if (count > 0 && heatmap.numel() > 0) {
        claim_kernel<<<blocks_for(count), kThreads, 0, stream>>>(count, from, in, images, height, width, side, step,
                                                                 radius, smallest, key);
        write_kernel<<<blocks_for(count), kThreads, 0, stream>>>(
            count, from, in, images, height, width, side, step, radius, smallest, key, edges,
            heatmap.mutable_data_ptr<float>(), single.mutable_data_ptr<float>(), group.mutable_data_ptr<float>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    return {heatmap, single, group};
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CUDA, m) {
    m.impl("render_targets", &kg::render_targets);
}
