// One block an image, its queue in order; one warp a keypoint type, for the partners of a start are of different types
// and do not see each other. Within a warp the nearest is the smallest of (distance, place in the queue), which does
// not depend on the order of looking, so every run gives the same graphs. Waits for the device once: for the number of
// graphs, and to hear of peaks outside the maps, which are left out on the device.
#include <ATen/Dispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>

#include "../checks.h"
#include "../grouping.h"
#include "launch.h"

namespace kg {
namespace {

constexpr unsigned kWarp = 32, kAllLanes = 0xffffffff;

// What has become of a peak.
constexpr uint8_t kQueued = 1, kRejected = 2;

// Image and bin of each peak; one behind the last for a peak outside the maps.
__global__ void place_kernel(const int64_t* peaks, int64_t count, int64_t n, int64_t h, int64_t w, int64_t* image,
                             int64_t* bin, uint8_t* state, int64_t* outside) {
    const Bins bins(h, w);
    for (int64_t p = first_item(); p < count; p += item_step()) {
        const int64_t *peak = peaks + 4 * p, i = peak[0], k = peak[1], y = peak[2], x = peak[3];
        const bool inside = i >= 0 && i < n && k >= 0 && k < kKeypoints && y >= 0 && y < h && x >= 0 && x < w;
        image[p] = inside ? i : n;
        bin[p] = inside ? bins.of(i, k, y, x) : bins.row(n, 0, 0);
        state[p] = kQueued;
        if (!inside) {
            *outside = 1;
        }
    }
}

// Everything about the peaks of all images that one block needs; the group offsets in any layout.
template <typename T, typename S>
struct Scene {
    const int64_t* peaks;     // [P,4] image, keypoint, y, x
    const S* scores;          // [P]
    const int64_t* queue;     // [P] peaks by image, in their order
    const int64_t* in_image;  // [N+1] where those of an image begin in the queue
    const int64_t* binned;    // [P] peaks by bin, in their order
    const int64_t* in_bin;    // [bins+1] where those of a bin begin
    const T* offsets;
    int64_t image_stride, channel_stride, row_stride, column_stride;
    int64_t h, w;
    double match_radius, reject_radius;
    int hops;
    uint8_t* state;  // [P]

    __device__ int64_t keypoint(int64_t p) const { return peaks[4 * p + 1]; }
    __device__ int64_t y(int64_t p) const { return peaks[4 * p + 2]; }
    __device__ int64_t x(int64_t p) const { return peaks[4 * p + 3]; }

    // This warp calls visit(peak, squared distance) for peaks of type k around a point: all within reach, and some
    // beyond.
    template <typename Visit>
    __device__ void around(int64_t image, int64_t k, double at_x, double at_y, double reach, Visit visit) const {
        const Bins bins(h, w);
        const Window window(bins, at_x, at_y, reach);
        if (window.first_column > window.last_column) {
            return;
        }
        for (int64_t row = window.first_row; row <= window.last_row; ++row) {
            const int64_t bin = bins.row(image, k, row), end = in_bin[bin + window.last_column + 1];
            for (int64_t i = in_bin[bin + window.first_column] + threadIdx.x % kWarp; i < end; i += kWarp) {
                const int64_t p = binned[i];
                visit(p, squared_norm(x(p) - at_x, y(p) - at_y));
            }
        }
    }

    // This warp takes a peak out of the queue, into a graph.
    __device__ void join(int64_t image, int64_t p) const {
        __syncwarp();
        if (threadIdx.x % kWarp == 0) {
            state[p] &= ~kQueued;
        }
        __syncwarp();
        around(image, keypoint(p), x(p), y(p), reject_radius, [&](int64_t other, double squared) {
            if (squared <= reject_radius * reject_radius) {
                state[other] |= kRejected;
            }
        });
        __syncwarp();
    }

    // The partner of type l that this warp finds from a peak, -1 if there is none; all lanes have it.
    __device__ int64_t partner(int64_t image, int64_t source, int l) const {
        const int edge = edge_index(static_cast<int>(keypoint(source)), l);
        const T* offset = offsets + image * image_stride + 2 * edge * channel_stride + y(source) * row_stride +
                          x(source) * column_stride;
        const double at_x = x(source) + static_cast<double>(offset[0]);
        const double at_y = y(source) + static_cast<double>(offset[channel_stride]);
        Nearest nearest;
        around(image, l, at_x, at_y, match_radius, [&](int64_t p, double squared) {
            if (state[p] & kQueued && squared <= match_radius * match_radius) {
                nearest.offer(squared, p);
            }
        });
        __syncwarp();
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            const double squared = __shfl_xor_sync(kAllLanes, nearest.squared, distance);
            const long long peak = __shfl_xor_sync(kAllLanes, static_cast<long long>(nearest.peak), distance);
            nearest.offer(squared, peak);
        }
        return nearest.peak;
    }

    // The next peak of the queue that opens a graph, from `place` on, which moves behind it; -1 at the end. Those
    // passed over leave the queue. For one whole warp.
    __device__ int64_t next_start(int64_t& place, int64_t last) const {
        const unsigned lane = threadIdx.x % kWarp;
        for (; place < last; place += kWarp) {
            const int64_t p = place + lane < last ? queue[place + lane] : -1;
            const unsigned starts = __ballot_sync(kAllLanes, p >= 0 && state[p] == kQueued);
            const unsigned first = starts ? __ffs(static_cast<int>(starts)) - 1 : kWarp;
            if (p >= 0 && lane < first) {
                state[p] &= ~kQueued;
            }
            __syncwarp();
            if (starts) {
                place += first + 1;
                return __shfl_sync(kAllLanes, static_cast<long long>(p), first);
            }
        }
        return -1;
    }
};

// graphs [P,5,3]: those of an image from its first place in the queue on; graph_count [N].
template <typename T, typename S>
__global__ void group_kernel(const Scene<T, S> scene, S* graphs, int64_t* graph_count) {
    const int64_t image = blockIdx.x, last = scene.in_image[image + 1];
    const int type = threadIdx.x / kWarp;
    const bool leads = threadIdx.x % kWarp == 0;
    __shared__ int64_t start, partners[kKeypoints], graph[kKeypoints];
    int64_t place = scene.in_image[image], count = 0;
    S* out = graphs + place * 3 * kKeypoints;
    while (true) {
        if (type == 0) {
            const int64_t found = scene.next_start(place, last);
            if (leads) {
                start = found;
            }
        }
        __syncthreads();
        if (start < 0) {
            break;
        }
        int64_t own = start;
        if (type != scene.keypoint(start)) {
            own = scene.partner(image, start, type);
        }
        if (own >= 0) {
            scene.join(image, own);
        }
        if (leads) {
            graph[type] = own;
            partners[type] = type == scene.keypoint(start) ? -1 : own;
        }
        __syncthreads();
        if (scene.hops == 2 && own < 0) {
            // From the partners by falling score, of equal ones by ascending type; each is taken once.
            bool taken[kKeypoints] = {};
            while (own < 0) {
                int best = -1;
                for (int l = 0; l < kKeypoints; ++l) {
                    if (partners[l] >= 0 && !taken[l] &&
                        (best < 0 || scene.scores[partners[l]] > scene.scores[partners[best]])) {
                        best = l;
                    }
                }
                if (best < 0) {
                    break;
                }
                taken[best] = true;
                own = scene.partner(image, partners[best], type);
            }
            if (own >= 0) {
                scene.join(image, own);
                if (leads) {
                    graph[type] = own;
                }
            }
        }
        __syncthreads();
        if (leads) {
            S* keypoint = out + (count * kKeypoints + type) * 3;
            const int64_t p = graph[type];
            keypoint[0] = p < 0 ? S(0) : static_cast<S>(scene.x(p));
            keypoint[1] = p < 0 ? S(0) : static_cast<S>(scene.y(p));
            keypoint[2] = p < 0 ? S(0) : scene.scores[p];
        }
        ++count;
    }
    if (threadIdx.x == 0) {
        graph_count[image] = count;
    }
}

// The graphs of one image from `graphs` (see group_kernel) to their place behind those of the images before it.
template <typename S>
__global__ void gather_kernel(const S* graphs, const int64_t* in_image, const int64_t* graph_count, S* out,
                              int64_t* out_image) {
    const int64_t image = blockIdx.x, count = graph_count[image];
    const S* from = graphs + in_image[image] * 3 * kKeypoints;
    int64_t before = 0;
    for (int64_t i = 0; i < image; ++i) {
        before += graph_count[i];
    }
    for (int64_t i = threadIdx.x; i < count * 3 * kKeypoints; i += blockDim.x) {
        out[before * 3 * kKeypoints + i] = from[i];
    }
    for (int64_t g = threadIdx.x; g < count; g += blockDim.x) {
        out_image[before + g] = image;
    }
}

// Items by key, stable, and where each of the keys 0 .. count begins among them.
std::tuple<at::Tensor, at::Tensor> sort_into(const at::Tensor& keys, int64_t count) {
    at::Tensor sorted, order;
    std::tie(sorted, order) = at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    return {order, at::searchsorted(sorted, at::arange(count + 1, keys.options()))};
}

std::tuple<at::Tensor, at::Tensor> group_keypoints(const at::Tensor& peaks, const at::Tensor& scores,
                                                   const at::Tensor& group_offsets, double match_radius,
                                                   double reject_radius, int64_t hops) {
    check_grouping(peaks, scores, group_offsets);
    const c10::cuda::CUDAGuard guard(peaks.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const int64_t count = peaks.size(0), n = group_offsets.size(0), h = group_offsets.size(2),
                  w = group_offsets.size(3);
    const at::Tensor every = peaks.contiguous();
    const at::Tensor values = scores.to(c10::promoteTypes(scores.scalar_type(), at::kFloat)).contiguous();
    if (count == 0) {
        return {at::empty({0, kKeypoints, 3}, values.options()), at::empty({0}, every.options())};
    }
    const at::Tensor image = at::empty({count}, every.options()), bin = at::empty({count}, every.options());
    const at::Tensor state = at::empty({count}, every.options().dtype(at::kByte));
    // The number of graphs of each image, and behind them whether a peak lies outside.
    const at::Tensor report = at::zeros({n + 1}, every.options());
    int64_t* graph_count = report.mutable_data_ptr<int64_t>();
    place_kernel<<<blocks_for(count), kThreads, 0, stream>>>(
        every.const_data_ptr<int64_t>(), count, n, h, w, image.mutable_data_ptr<int64_t>(),
        bin.mutable_data_ptr<int64_t>(), state.mutable_data_ptr<uint8_t>(), graph_count + n);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    at::Tensor queue, in_image, binned, in_bin;
    std::tie(queue, in_image) = sort_into(image, n);
    std::tie(binned, in_bin) = sort_into(bin, Bins(h, w).row(n, 0, 0));

    const at::Tensor found = at::empty({count, kKeypoints, 3}, values.options());
    at::Tensor graphs, graph_image;
    AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "group_keypoints", [&] {
        using score_t = scalar_t;
        if (n > 0) {
            AT_DISPATCH_FLOATING_TYPES_AND2(
                at::kHalf, at::kBFloat16, group_offsets.scalar_type(), "group_keypoints", [&] {
                    const Scene<scalar_t, score_t> scene{every.const_data_ptr<int64_t>(),
                                                         values.const_data_ptr<score_t>(),
                                                         queue.const_data_ptr<int64_t>(),
                                                         in_image.const_data_ptr<int64_t>(),
                                                         binned.const_data_ptr<int64_t>(),
                                                         in_bin.const_data_ptr<int64_t>(),
                                                         group_offsets.const_data_ptr<scalar_t>(),
                                                         group_offsets.stride(0),
                                                         group_offsets.stride(1),
                                                         group_offsets.stride(2),
                                                         group_offsets.stride(3),
                                                         h,
                                                         w,
                                                         match_radius,
                                                         reject_radius,
                                                         static_cast<int>(hops),
                                                         state.mutable_data_ptr<uint8_t>()};
                    group_kernel<<<static_cast<unsigned>(n), kKeypoints * kWarp, 0, stream>>>(
                        scene, found.mutable_data_ptr<score_t>(), graph_count);
                });
            C10_CUDA_KERNEL_LAUNCH_CHECK();
        }
        const at::Tensor told = report.cpu();
        const int64_t* own = told.const_data_ptr<int64_t>();
        TORCH_CHECK_VALUE(own[n] == 0, "peaks: expected image, keypoint, y, x below [", n, ", 5, ", h, ", ", w, "]");
        const int64_t total = std::accumulate(own, own + n, int64_t{0});
        graphs = at::empty({total, kKeypoints, 3}, values.options());
        graph_image = at::empty({total}, every.options());
        gather_kernel<<<static_cast<unsigned>(n), kThreads, 0, stream>>>(
            found.const_data_ptr<score_t>(), in_image.const_data_ptr<int64_t>(), graph_count,
            graphs.mutable_data_ptr<score_t>(), graph_image.mutable_data_ptr<int64_t>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    return {graphs, graph_image};
}

}  // namespace
}  // namespace kg

TORCH_LIBRARY_IMPL(kg_detectron, CUDA, m) {
    m.impl("group_keypoints", &kg::group_keypoints);
}
